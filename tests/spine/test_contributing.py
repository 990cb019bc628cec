"""The documents are true: their paths exist, the map has every module, the glossary every word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = ("nextstate", "proxy", "judge", "plugins", "learner", "demo", "benchmarks")
WORDS = """turn, session, main turn, side turn, next state, verdict, hint, behaviour log-probs,
policy log-probs, importance ratio, advantage, teacher, adapter, policy version, policy lag,
lineage, environment, task, episode, group, reward, replica, rank"""
_PATH = re.compile(r"`((?:[\w.-]+/)+(?:(?!NAME)[\w-]+\.\w+)?)`")


def section(title: str) -> str:
    """The text under a heading of the second level."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def mapped() -> set[str]:
    """The paths of the map's column "Open"."""
    rows = [line.split("|") for line in section("The map").splitlines() if line.startswith("|")]
    return {path for row in rows for path in _PATH.findall(row[2])}


@pytest.mark.parametrize("path", sorted(set(_PATH.findall(TEXT))))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", ["README.md", "AGENTS.md", "docs/architecture.md"])
def test_every_file_that_another_document_names_exists(name: str) -> None:
    named = _PATH.findall((ROOT / name).read_text(encoding="utf-8"))
    files = {path for path in named if not path.endswith("/")}
    assert [path for path in sorted(files) if not (ROOT / path).exists()] == []


def test_agents_md_is_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_is_named_or_covered_by_a_row_of_its_folder(room: str) -> None:
    named = mapped()
    missing: list[str] = []
    for file in sorted((ROOT / room).rglob("*.py")):
        path = file.relative_to(ROOT)
        folders = {f"{folder}/" for folder in path.parents}
        if file.name != "__init__.py" and str(path) not in named and not folders & named:
            missing.append(str(path))
    assert missing == []


def test_every_row_of_the_map_has_a_test() -> None:
    rows = [line.split("|") for line in section("The map").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[1].strip() != "To change"]
    assert len(rows) > 60
    assert [row[1] for row in rows if "`tests/" not in row[3]] == []


@pytest.mark.parametrize("word", [word.strip() for word in WORDS.split(",")])
def test_the_glossary_has_every_word_of_the_design(word: str) -> None:
    assert f"*{word}*" in section("Glossary")
