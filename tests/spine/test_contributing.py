"""The documents are true: what they name exists, and the map and the glossary are complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from nextstate.app import cli

ROOT = Path(__file__).parents[2]
NAMES = (
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
    "benchmarks/RESULTS.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/results/*.md")),
)
DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
ROOMS = ("nextstate", "proxy", "judge", "plugins", "learner", "rollout")
WORDS = """turn, session, main turn, side turn, next state, vote, verdict, hint, feedback, lease,
sample, held-out session, behaviour log-probs, policy log-probs, drift, importance ratio, advantage,
teacher, adapter, policy version, candidate, policy lag, lineage, environment, gate, canary,
watch, suspect, pause, share, engine, dialect, profile, check word, persona, seed policy"""
STATE = (
    *("judge/v", "learner/main/", "learner/NAME/", "versions/", "logs/", "pictures/"),
    *("warm-up/", "logins/", "site/"),
)
"""Folders of a state folder, and that of the built documentation."""
_PATH = re.compile(r"`((?:[\w.-]+/)+(?:(?!NAME)[\w-]+\.\w+)?)`")
_KEY = re.compile(r"`\[([a-z]+)\]\s+([a-z]\w*)")
_COMMAND = re.compile(r"`(?:\.venv/bin/)?(make|nextstate|python -m)\s+([a-z][\w.-]*)")
_TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)


def rows() -> list[list[str]]:
    """The cells of each row of the map: file, what to change there, tests."""
    lines = DOCUMENTS["docs/map.md"].splitlines()
    found = [line.split(" | ") for line in lines if line[:3] == "| `"]
    assert {len(row) for row in found} == {3}
    return found


def mapped() -> set[str]:
    """The files of the map."""
    return {path for row in rows() for path in re.findall(r"`([^`]+)`", row[0])}


@pytest.mark.parametrize("name", NAMES)
def test_every_path_in_a_document_exists(name: str) -> None:
    paths = {path for path in _PATH.findall(DOCUMENTS[name]) if not path.startswith(STATE)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_key_in_a_document_exists(name: str) -> None:
    example = tomllib.loads((ROOT / "config.example.toml").read_text(encoding="utf-8"))
    keys = set(_KEY.findall(DOCUMENTS[name]))
    assert [key for key in sorted(keys) if key[1] not in example.get(key[0], {})] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_in_a_document_exists(name: str) -> None:
    modules = (*ROOT.glob("[bdl]*/*.py"), *ROOT.glob("plugins/*/*.py"))
    known = {
        "make": set(_TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8"))),
        "nextstate": {path.stem.rstrip("_") for path in Path(cli.__file__).parent.glob("*.py")}
        - {"common"},
        "python -m": {"pytest", *map(_module, modules)},
    }
    commands = set(_COMMAND.findall(DOCUMENTS[name]))
    assert [found for found in sorted(commands) if found[1] not in known[found[0]]] == []


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_agents_md_is_short() -> None:
    assert len(DOCUMENTS["AGENTS.md"].splitlines()) <= 60


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_a_row_of_its_own(room: str) -> None:
    files = {str(path.relative_to(ROOT)) for path in (ROOT / room).rglob("*.py")}
    modules = {path for path in files if not path.endswith("__init__.py")}
    alone = {row[0].strip("|` ") for row in rows()}
    assert modules - alone == set()


def test_every_module_of_the_demo_is_in_the_map() -> None:
    modules = {f"demo/{path.name}" for path in (ROOT / "demo").glob("[!_]*.py")}
    assert modules - mapped() == set()


def test_every_row_of_the_map_is_a_file_with_tests() -> None:
    assert [path for path in sorted(mapped()) if not (ROOT / path).exists()] == []
    assert [row[0] for row in rows() if "`tests/" not in row[2]] == []


@pytest.mark.parametrize("word", [word.strip() for word in WORDS.split(",")])
def test_the_glossary_has_every_word_of_the_design(word: str) -> None:
    assert f"*{word}*" in DOCUMENTS["docs/glossary.md"]
