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


def test_every_promise_about_keys_and_every_limit_names_a_test() -> None:
    rows = [
        line for line in (ROOT / "docs/security.md").read_text().splitlines() if line[:2] == "| "
    ]
    for row in rows:
        assert "its test |" in row or _NAMED.search(row), row
