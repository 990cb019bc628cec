"""The layout of DESIGN.md: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("nextstate", "proxy", "judge", "learner", "rollout", "plugins", "demo")
TORCH = {"torch", "transformers", "peft", "trl", "accelerate"}
HOOKS = {f"nextstate.{name}" for name in ("hooks", "records", "errors", "error_text")}
ALLOWED = {
    "app": set(ROOMS),
    "spine": {"nextstate"},
    "proxy": {"proxy", "nextstate"},
    "judge": {"judge", "nextstate"},
    "learner": {"learner", "nextstate"},
    "rollout": {"rollout", "nextstate"},
    "plugins": {"plugins", *HOOKS},
    "demo": {"demo", "rollout", "plugins", "nextstate"},
}
"""By room: the modules that its files may import, with everything below them."""
IMPORTS_APP = {"app", "demo"}
IMPORTS_TORCH = {
    "demo/seed_policy.py",
    "demo/tool_policy.py",
    "demo/tool_competence.py",
    "demo/smollm2.py",
}
"""Besides learner/: the scripts that make the models of the demo."""
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def room_of(path: Path) -> str:
    """A key of `ALLOWED`: the folder, where nextstate/ is the root (`app`) or the spine."""
    folder, *inner = path.relative_to(ROOT).parts
    if folder != "nextstate":
        return folder
    return "app" if inner[0] in ("app", "__main__.py") else "spine"


def imported(path: Path) -> set[str]:
    """Every name that the file imports, with its module: `nextstate.hooks.Utterance`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_in(name: str, modules: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room, names = room_of(path), imported(path)
    ours = {name for name in names if is_in(name, set(ROOMS))}
    assert not {name for name in ours if not is_in(name, ALLOWED[room])}
    if room not in IMPORTS_APP:
        assert not {name for name in ours if is_in(name, {"nextstate.app"})}
    if room != "learner" and str(path.relative_to(ROOT)) not in IMPORTS_TORCH:
        assert not {name for name in names if is_in(name, TORCH)}


MAX_LINES = 500
LONG = {"lexicons"}
"""Folders whose files may be longer: lists of words."""


def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in (*ROOMS, "tests", "benchmarks", "docs")]
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    files += [p for f in folders for p in f.rglob("*") if p.suffix in (".py", ".md", ".toml")]
    lines = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for path in files
        if not LONG.intersection(path.parts)
    }
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}
