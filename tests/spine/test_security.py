"""SECURITY.md and docs/security.md name only tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_NAMED = re.compile(r"`(tests/[\w/]{1,100}\.py)(?:::(\w{1,200}))?`")


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/security.md", "docs/privacy.md"])
def test_every_named_test_exists(page: str) -> None:
    named = _NAMED.findall((ROOT / page).read_text())
    assert named
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text())
        tests = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name.startswith("test_")
        }
        assert tests, file
        assert not test or test in tests, f"{file} has no {test}"


@pytest.mark.parametrize("page", ["docs/security.md", "docs/privacy.md"])
def test_every_row_of_a_table_of_promises_names_a_test(page: str) -> None:
    rows = named = 0
    of_promises = False
    for line in (ROOT / page).read_text().splitlines():
        if line[:2] != "| ":
            of_promises = of_promises and line[:2] == "|-"
        elif re.search(r"\| (?:its )?test \|$", line):
            of_promises, rows = True, rows + 1
        elif of_promises:
            assert re.search(r"`tests/[\w/]{1,100}\.py(?:::\w{1,200})?`", line), line
            named += 1
    assert rows >= 3
    assert named >= 30
