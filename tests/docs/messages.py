"""What the code says to people: its texts, with `…` in the place of every value."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ROOMS = ("nextstate", "proxy", "judge", "learner", "rollout", "plugins")
_PLACEHOLDER = re.compile(r"%(?:\.\d+)?[sdrf]")


@cache
def said_by_the_code() -> frozenset[str]:
    """Every text in the code of the rooms, without its docstrings."""
    files = [path for room in _ROOMS for path in (ROOT / room).rglob("*.py")]
    return frozenset(text for path in files for text in _texts(ast.parse(path.read_text())))


def _texts(tree: ast.AST) -> Iterator[str]:
    pieces = {
        id(piece)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for piece in node.values
    }
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in pieces or id(node) in alone:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(_piece(piece) for piece in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _PLACEHOLDER.sub("…", node.value)


def _piece(piece: ast.expr) -> str:
    return str(piece.value) if isinstance(piece, ast.Constant) else "…"
