"""The time of a regular expression on outside text grows linearly with the text.

Every expression of these packages is tried, also one that is added tomorrow, on texts made from its
own parts: the beginning of a match over and over, and what it repeats without the end that it
waits for.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from re import _constants as c  # pyright: ignore
from re import _parser as parser  # pyright: ignore
from typing import Any

import pytest

from nextstate.thoughts import without_thoughts
from proxy.linking.meaning import meaning_of

ROOT = Path(__file__).parents[2]
PACKAGES = ("nextstate", "proxy", "judge", "plugins", "demo")
READ_ONLY = "learner"
"""Its modules import torch: their expressions are read from the source."""
Expression = re.Pattern[Any]
SIZES = (250, 1_000, 4_000)
"""Numbers of characters. From the second to the third, quadratic time grows sixteenfold, that of
a repetition of up to some hundred characters fivefold; from the first it grows more."""
HOPELESS_S = 0.1
"""Seconds for one of the shorter texts after which the longest is not tried."""
MOST_GROWTH = 9.0
SMALL_GROWTH = 6.0
"""Less than this in the first look is not measured again: quadratic time grows far more."""
MEASUREMENTS = 6
USES = ("compile", "sub", "split", "search", "match", "fullmatch", "findall", "finditer")
UNMEASURED_S = 0.002
"""Seconds for a large text that are not compared: too few to measure."""


def modules() -> list[str]:
    found = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    return [name for name in found if not name.endswith("__main__")]


def compiled(name: str, value: object, depth: int = 4) -> Iterator[tuple[str, Expression]]:
    """The expressions in a value, also within containers and dataclasses."""
    if isinstance(value, re.Pattern):
        yield name, value
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for position, item in enumerate(value):  # pyright: ignore
            yield from compiled(f"{name}[{position}]", item, depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():  # pyright: ignore
            yield from compiled(f"{name}[{key}]", item, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from compiled(f"{name}.{field.name}", getattr(value, field.name), depth - 1)


def written_out(name: str, source: str) -> Iterator[tuple[str, Expression]]:
    """The expressions that a module gives to `re` inside its functions."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "re"
            and node.func.attr in USES
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            pattern = node.args[0].value
            at_start = node.func.attr in ("match", "fullmatch")
            yield f"{name}:{node.lineno}", re.compile(rf"\A(?:{pattern})" if at_start else pattern)


def expressions() -> dict[str, Expression]:
    found: dict[tuple[Any, int], tuple[str, Expression]] = {}
    for path in sorted((ROOT / READ_ONLY).rglob("*.py")):
        for where, one in written_out("line", path.read_text()):
            found.setdefault((one.pattern, one.flags), (f"{path.stem}.{where}", one))
    for name in modules():
        module = importlib.import_module(name)
        here = [pair for key, value in vars(module).items() for pair in compiled(key, value)]
        assert module.__file__ is not None
        for where, one in [*here, *written_out("line", Path(module.__file__).read_text())]:
            found.setdefault((one.pattern, one.flags), (f"{name}.{where}", one))
    return dict(found.values())


ALL = expressions()
SOME = "a1A \n.-_<>\"'`中é,;:/(){}[]=?!#"


class Parts:
    """Texts that an expression's parts match."""

    def __init__(self, expression: Expression) -> None:
        self.repeated: set[tuple[str, str]] = set()
        """(the part before a repetition, the repeated part)."""
        pattern: str | bytes = expression.pattern
        text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
        flags = expression.flags & ~re.DEBUG
        flags |= 0 if flags & re.ASCII else re.UNICODE
        self.whole = self._text(parser.parse(text, flags), "")

    def texts(self, size: int) -> list[str]:
        """Texts that may be slow to search, each with `size` characters or a little more."""
        units = {("", character) for character in SOME}
        units |= {("", self.whole), ("", self.whole[:-1])}
        for before, repeated in self.repeated:
            units |= {("", repeated), ("", before + repeated), (before, repeated), ("", before)}
        return [before + unit * (size // len(unit) + 1) for before, unit in sorted(units) if unit]

    def _text(self, sequence: Sequence[Any], before: str) -> str:
        text = ""
        for kind, argument in sequence:
            text += self._one(kind, argument, before + text)
        return text

    def _one(self, kind: Any, argument: Any, before: str) -> str:
        if kind is c.LITERAL:
            return chr(argument)
        if kind in (c.IN, c.NOT_LITERAL, c.ANY, c.CATEGORY):
            return next(iter(self._members(kind, argument)), "")
        if kind in (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT):
            least, most, repeated = argument
            text = self._text(repeated, before)
            if most > 50:
                self.repeated.add((before, text))
                if len(repeated) == 1:
                    for character in self._members(*repeated[0]):
                        self.repeated.add((before, character))
            return text * least
        if kind is c.SUBPATTERN:
            return self._text(argument[3], before)
        if kind is c.ATOMIC_GROUP:
            return self._text(argument, before)
        if kind is c.BRANCH:
            found = [self._text(branch, before) for branch in argument[1]]
            return found[0]
        if kind in (c.ASSERT, c.ASSERT_NOT):
            self._text(argument[1], before)
        return ""

    def _members(self, kind: Any, argument: Any) -> list[str]:
        """Characters of a character class."""
        if kind is c.IN:
            inverted = argument[0][0] is c.NEGATE
            tests = argument[inverted:]
            listed = [chr(value) for which, value in tests if which is c.LITERAL]
            listed += [chr(value[0]) for which, value in tests if which is c.RANGE]
            candidates = SOME if inverted else [*listed, *SOME]
            return [
                one for one in candidates if any(_holds(*test, one) for test in tests) != inverted
            ]
        return [one for one in SOME if _holds(kind, argument, one)]


CLASSES = {
    c.CATEGORY_DIGIT: r"\d",
    c.CATEGORY_NOT_DIGIT: r"\D",
    c.CATEGORY_SPACE: r"\s",
    c.CATEGORY_NOT_SPACE: r"\S",
    c.CATEGORY_WORD: r"\w",
    c.CATEGORY_NOT_WORD: r"\W",
}


def _holds(kind: Any, argument: Any, character: str) -> bool:
    if kind is c.LITERAL:
        return ord(character) == argument
    if kind is c.NOT_LITERAL:
        return ord(character) != argument
    if kind is c.RANGE:
        return argument[0] <= ord(character) <= argument[1]
    if kind is c.CATEGORY:
        return re.match(CLASSES[argument], character) is not None
    return kind is c.ANY and character != "\n"


def seconds(expression: Expression, text: str, tries: int) -> float:
    """The least CPU seconds of a search for all matches."""
    given = text.encode("latin-1", "replace") if isinstance(expression.pattern, bytes) else text
    best = float("inf")
    for _ in range(tries):
        started = time.process_time()
        for _ in expression.finditer(given):
            pass
        best = min(best, time.process_time() - started)
    return best


def slow(expression: Expression) -> Iterator[str]:
    """The beginnings of texts on which an expression's time grows faster than their length."""
    parts = Parts(expression)
    for texts in zip(*(parts.texts(size) for size in SIZES), strict=True):
        if _grows(expression, texts):
            yield texts[0][:60]


def _grows(expression: Expression, texts: Sequence[str]) -> bool:
    *shorter, longest = texts
    took = 0.0
    for text in shorter:
        took = seconds(expression, text, 1)
        if took >= HOPELESS_S and seconds(expression, text, 2) >= HOPELESS_S:
            return True
    if seconds(expression, longest, 1) < max(UNMEASURED_S, SMALL_GROWTH * took):
        return False
    return grows_every_time(
        lambda: seconds(expression, longest, 1), lambda: seconds(expression, shorter[-1], 3)
    )


def grows_every_time(large: Callable[[], float], small: Callable[[], float]) -> bool:
    """Whether more than MOST_GROWTH lies between two costs however often they are measured.

    A busy machine slows single measurements down, a slow search is slow in all of them.
    """
    return all(large() > MOST_GROWTH * small() for _ in range(MEASUREMENTS))


@pytest.mark.parametrize("where", ALL)
def test_time_grows_linearly_with_the_text(where: str) -> None:
    assert list(slow(ALL[where])) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"<think>.*?</think>",
        r"(?=[\w+=-]*\d)[\w+=-]{16,}",
        r"(?m)^\W*\d\d:\d\d",
        r"\s+and\s+",
        r"\[.*\]x",
    ],
)
def test_these_tests_notice_a_slow_expression(pattern: str) -> None:
    assert any(slow(re.compile(pattern, re.DOTALL)))


def test_all_expressions_of_the_code_are_found() -> None:
    inside = {"a": [(re.compile("x"),)]}
    assert [name for name, _ in compiled("top", inside)] == ["top[a][0][0]"]
    assert [one.pattern for _, one in written_out("m", "re.sub(r'a+', '', text)")] == ["a+"]
    assert any("thoughts" in where for where in ALL)
    assert any("REPORTS" in where for where in ALL)


@pytest.mark.parametrize("mark", ["<think>", "</think>", "<|channel|>", "< ", "[THINK]", "<think "])
def test_thoughts_are_searched_once(mark: str) -> None:
    """64 kB of opening tags once stopped all recording for many seconds."""

    def cost(count: int) -> float:
        text = mark * count
        started = time.process_time()
        without_thoughts(text)
        meaning_of({"role": "assistant", "content": text})
        return time.process_time() - started

    assert not grows_every_time(lambda: cost(16_000), lambda: cost(4_000))
