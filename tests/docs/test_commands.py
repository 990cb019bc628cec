"""docs/commands.md has every command; the examples of the help and the documents are valid."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextstate.app import cli
from tests.docs.messages import ROOT

PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> dict[str, argparse.ArgumentParser]:
    """Each command's parser by its name."""
    added = argparse.ArgumentParser().add_subparsers()
    for command in cli._COMMANDS:
        command.add(added)
    return dict(added.choices)


def examples(text: str) -> Iterator[str]:
    """What stands after `nextstate` in each line that shows a command, without what explains it."""
    for found in re.finditer(
        r"(?m)^.*?(?<![\w/`-])(?:\.venv/bin/)?nextstate ([a-z]\w* ?.*)$", text
    ):
        line = re.split(r"  +#? ?|\s#|\)\"| [|>] | &$|`", found[1])[0]
        if not re.search(r"\b[A-Z]{2,}\b|…", line):  # a form, such as `export WHAT --out FILE`
            yield line


def accepts(line: str) -> bool:
    try:
        cli.command_parser().parse_args(shlex.split(line))
    except SystemExit as error:
        return error.code == 0  # --help
    return True


@pytest.mark.parametrize("name", commands())
def test_a_section_names_the_command(name: str) -> None:
    headings = " ".join(re.findall(r"^## .*", PAGE, re.M))
    assert f"`{name}`" in headings


@pytest.mark.parametrize("name", commands())
def test_the_help_has_examples_that_the_parser_accepts(name: str) -> None:
    shown = [*examples(commands()[name].epilog or "")]
    assert [line for line in shown if line.split()[0] == name] != []
    assert [line for line in shown if not accepts(line)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_parser_accepts_every_command_that_a_document_shows(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S)
    shown = [line for language, block in every if not language for line in examples(block)]
    assert [line for line in shown if not accepts(line)] == []


def test_nothing_is_installed_by_our_name_from_an_index_where_it_is_not() -> None:
    """Nothing has been released: somebody else could take the name."""
    files = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"]
    for room in ("nextstate", "proxy", "judge", "learner", "rollout", "plugins", "demo"):
        files += (ROOT / room).rglob("*.py")
    by_name = re.compile(r"(?:pip|pipx|uv)\S* [^`\n]*(?<![\w/.-])nextstate\[|needs nextstate\[")
    assert [str(file) for file in files if by_name.search(file.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", document.read_text("utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []
