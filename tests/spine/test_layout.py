"""The arrows of DESIGN.md: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("nextstate", "proxy", "judge", "learner", "plugins", "demo")
HEAVY = {"torch", "transformers", "peft", "trl", "accelerate"}
# The composition root puts the stages together; nothing else in the spine knows them.
COMPOSITION = {"cli.py", "settings.py", "stages.py", "doctor.py", "stack.py", "status.py"}
ALLOWED = {
    "nextstate": {"nextstate"},
    "proxy": {"proxy", "nextstate"},
    "judge": {"judge", "nextstate"},
    "learner": {"learner", "nextstate"},
    "plugins": {
        "plugins",
        *(f"nextstate.{n}" for n in ("hooks", "records", "errors", "error_text")),
    },
    "demo": {"demo", "nextstate"},
}
FILES = [path for name in OURS for path in sorted((ROOT / name).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module that the file names in an import."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    if folder == "nextstate" and path.name in COMPOSITION:
        return
    allowed = ALLOWED[folder]
    for name in imported(path):
        if name.partition(".")[0] in OURS:
            assert any(name == a or name.startswith(a + ".") for a in allowed), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_learner_imports_torch(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    # The seed policy is made, not served, with torch: its script is the one exception.
    if folder == "learner" or path.name in ("seed_policy.py", "competence.py"):
        return
    assert not {name.partition(".")[0] for name in imported(path)} & HEAVY
