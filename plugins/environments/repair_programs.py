"""Small programs for generated repair tasks, and the bugs that each of them may get.

The text of a program has holes: $f and $g are its functions, $a and $b names of variables, $n and
$m numbers with n < m. A bug puts one text in the place of another that is there once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = ("off-by-one", "operator", "swapped-arguments", "default", "edge-case", "return")


class Bug(NamedTuple):
    """One mistake."""

    kind: str
    right: str
    wrong: str


class Numbers(NamedTuple):
    """Ranges of what calls are about, from the split of the task."""

    values: tuple[int, int]
    length: tuple[int, int]
    n: int
    m: int

    def draw(self, draw: random.Random, least: int = 0) -> list[int]:
        """A list of values."""
        count = max(least, draw.randint(*self.length))
        return [draw.randint(*self.values) for _ in range(count)]


Call = tuple[str, list[Any]]
"""The hole of a function, and arguments for it."""


@dataclass(frozen=True, slots=True)
class Program:
    """One shape."""

    text: str
    bugs: Sequence[Bug]
    calls: Callable[[random.Random, Numbers], list[Call]]
    """Some calls, other ones each time; among them those at the edges."""


def _parts(draw: random.Random, of: Numbers) -> list[Call]:
    full = (of.draw(draw) * of.m)[: of.n * draw.randint(1, 2) + 1]
    return [("f", [full]), ("f", [of.draw(draw), draw.randint(1, of.n)]), ("f", [[]])]


PARTS = Program(
    '''\
def $f($a, size=$n):
    """Split a list into parts of the given size; the last may be shorter."""
    return [$a[at : at + size] for at in range(0, len($a), size)]
''',
    [
        Bug("off-by-one", "len($a), size", "len($a) - 1, size"),
        Bug("operator", "at + size", "at * size"),
        Bug("default", "size=$n", "size=$m"),
        Bug("swapped-arguments", "range(0, len($a), size)", "range(0, size, len($a))"),
    ],
    _parts,
)


def _prices(draw: random.Random, of: Numbers) -> list[Call]:
    pieces = [[value, draw.randint(2, 9)] for value in of.draw(draw, 1)]
    cost = sum(price * count for price, count in pieces)
    limits = [cost, cost + draw.choice([-1, 1]) * draw.randint(1, 9)]
    calls: list[Call] = [("g", [pieces, limit]) for limit in limits]
    return [*calls, ("f", [pieces]), ("f", [pieces, draw.randint(1, 90)])]


PRICES = Program(
    '''\
def $f($a, $b=$n):
    """The price of all pieces (price, count), less $b percent."""
    whole = sum(price * count for price, count in $a)
    return whole * (100 - $b) // 100


def $g($a, most):
    """Whether all pieces cost at most so much, without a discount."""
    return $f($a, 0) <= most
''',
    [
        Bug("operator", "price * count", "price + count"),
        Bug("operator", "100 - $b", "100 + $b"),
        Bug("off-by-one", "<= most", "< most"),
        Bug("default", "$b=$n", "$b=$m"),
    ],
    _prices,
)


def _bounds(draw: random.Random, of: Numbers) -> list[Call]:
    low, high = sorted(draw.sample(range(of.values[0], of.values[1] + 1), 2))
    values = [low - draw.randint(1, 9), high + draw.randint(1, 9), *of.draw(draw)]
    calls: list[Call] = [("f", [value, low, high]) for value in values[:2]]
    return [*calls, ("g", [values]), ("g", [[of.m + draw.randint(0, 9), *values], low, high])]


BOUNDS = Program(
    '''\
def $f(value, low, high):
    """The value, or the bound that it is beyond."""
    return max(low, min(value, high))


def $g($a, low=$n, high=$m):
    """All values within the bounds, in their order."""
    return [$f(value, low, high) for value in $a]
''',
    [
        Bug("swapped-arguments", "[$f(value, low, high)", "[$f(low, value, high)"),
        Bug("swapped-arguments", "[$f(value, low, high)", "[$f(value, high, low)"),
        Bug("operator", "max(low, min(value, high))", "min(low, min(value, high))"),
        Bug("default", "high=$m", "high=$n"),
        Bug("return", "return max(low, min(value, high))", "return min(value, high)"),
    ],
    _bounds,
)


def _search(draw: random.Random, of: Numbers) -> list[Call]:
    values = sorted({*of.draw(draw, 2)})
    missing = draw.choice([values[0] - 1, values[-1] + 1])
    wanted = [values[-1], values[0], draw.choice(values), missing]
    return [("f", [values, one]) for one in wanted] + [("f", [[], wanted[0]])]


SEARCH = Program(
    '''\
def $f($a, wanted):
    """The place of the wanted value in a sorted list, or -1."""
    low, high = 0, len($a) - 1
    while low <= high:
        middle = (low + high) // 2
        if $a[middle] == wanted:
            return middle
        if $a[middle] < wanted:
            low = middle + 1
        else:
            high = middle - 1
    return -1
''',
    [
        Bug("off-by-one", "len($a) - 1", "len($a) - 2"),
        Bug("off-by-one", "low <= high", "low < high"),
        Bug("operator", "$a[middle] < wanted", "$a[middle] > wanted"),
        Bug("return", "return middle", "return $a[middle]"),
        Bug("edge-case", "return -1", "return low"),
    ],
    _search,
)


def _runs(draw: random.Random, of: Numbers) -> list[Call]:
    two = draw.sample(range(of.values[0], of.values[1] + 1), 2)
    count = draw.randint(*of.length)
    blocks = [draw.choice(two) for _ in range(count)]
    first = [two[0]] * draw.randint(2, of.m) + [two[1]]
    return [("f", [blocks]), ("f", [first]), ("f", [[two[1], *first[:-1]]]), ("f", [[]])]


RUNS = Program(
    '''\
def $f($a):
    """The length of the longest run of equal neighbours; 0 if there is none."""
    if not $a:
        return 0
    $b = longest = 1
    for before, now in zip($a, $a[1:]):
        $b = $b + 1 if before == now else 1
        longest = max(longest, $b)
    return longest
''',
    [
        Bug("edge-case", "    if not $a:\n        return 0\n", ""),
        Bug("operator", "before == now", "before != now"),
        Bug("off-by-one", "else 1", "else 0"),
        Bug("return", "return longest", "return $b"),
    ],
    _runs,
)


def _join(draw: random.Random, of: Numbers) -> list[Call]:
    starts = of.draw(draw)
    spans = [[start, start + draw.randint(1, of.n)] for start in starts]
    first, step = draw.randint(*of.values), draw.randint(1, of.n)
    touching = [[first + step, first + 2 * step], [first, first + step]]
    inner = [[first, first + 3 * of.m], [first + 1, first + 1 + step]]
    return [("f", [spans]), ("f", [touching]), ("f", [inner]), ("f", [[]])]


JOIN = Program(
    '''\
def $f($a):
    """Intervals [start, end] without overlaps, sorted; those that touch are joined."""
    $b = []
    for start, end in sorted($a):
        if $b and start <= $b[-1][1]:
            $b[-1][1] = max($b[-1][1], end)
        else:
            $b.append([start, end])
    return $b
''',
    [
        Bug("off-by-one", "start <= $b[-1][1]", "start < $b[-1][1]"),
        Bug("operator", "max($b[-1][1], end)", "min($b[-1][1], end)"),
        Bug("edge-case", "if $b and start", "if start"),
        Bug("swapped-arguments", "[start, end])\n", "[end, start])\n"),
        Bug("return", "return $b\n", "return $b[:-1]\n"),
    ],
    _join,
)


def _pay(draw: random.Random, of: Numbers) -> list[Call]:
    names = draw.sample(("kim", "lea", "max", "ida", "tom"), 3)
    purse = {name: draw.randint(of.n, of.values[1]) for name in names}
    one, two, three = names
    part = draw.randint(1, max(1, purse[one] - 1))
    both = [[one, two, part], [two, three, draw.randint(1, purse[two])]]
    beyond = purse[one] + draw.randint(1, 9)
    calls: list[Call] = [("f", [purse, one, two, much]) for much in (part, purse[one], beyond)]
    return [*calls, ("g", [purse, both])]


PAY = Program(
    '''\
def $f($a, source, target, amount):
    """What everybody has after a payment; ValueError if the source has too little."""
    if $a[source] < amount:
        raise ValueError(source)
    after = dict($a)
    after[source] -= amount
    after[target] += amount
    return after


def $g($a, payments):
    """What everybody has after all payments (source, target, amount)."""
    for source, target, amount in payments:
        $a = $f($a, source, target, amount)
    return $a
''',
    [
        Bug("swapped-arguments", "= $f($a, source, target", "= $f($a, target, source"),
        Bug("operator", "after[target] += amount", "after[target] -= amount"),
        Bug("off-by-one", "$a[source] < amount", "$a[source] <= amount"),
        Bug("edge-case", "    if $a[source] < amount:\n        raise ValueError(source)\n", ""),
        Bug("return", "return after\n", "return $a\n"),
    ],
    _pay,
)


def _middle(draw: random.Random, of: Numbers) -> list[Call]:
    values = of.draw(draw, 4)
    return [("f", [values[: len(values) // 2 * 2]]), ("f", [values]), ("f", [[]])]


MIDDLE = Program(
    '''\
def $f($a):
    """The middle of the sorted values: of an even number the lower one, of none None."""
    if not $a:
        return None
    $b = sorted($a)
    return $b[(len($b) - 1) // 2]
''',
    [
        Bug("edge-case", "    if not $a:\n        return None\n", ""),
        Bug("off-by-one", "(len($b) - 1) // 2", "len($b) // 2"),
        Bug("return", "return $b[(len($b) - 1) // 2]", "return (len($b) - 1) // 2"),
        Bug("operator", "(len($b) - 1) // 2", "(len($b) - 1) % 2"),
    ],
    _middle,
)


def _lines(draw: random.Random, of: Numbers) -> list[Call]:
    words = ["abcdefghijkl"[: draw.randint(1, of.n)] for _ in of.draw(draw)]
    width = len(" ".join(words[:2]))
    text = " ".join(words)
    return [("f", [text, width]), ("f", [text]), ("f", [text, width + 1]), ("f", [""])]


LINES = Program(
    '''\
def $f($a, width=$m):
    """Lines of at most so many characters, broken at blanks; longer words stand alone."""
    $b = []
    for word in $a.split():
        if $b and len($b[-1]) + 1 + len(word) <= width:
            $b[-1] += " " + word
        else:
            $b.append(word)
    return $b
''',
    [
        Bug("off-by-one", "<= width", "< width"),
        Bug("off-by-one", "+ 1 + len(word)", "+ len(word)"),
        Bug("edge-case", "if $b and len", "if len"),
        Bug("default", "width=$m", "width=$n"),
        Bug("return", "return $b\n", "return $b[-1]\n"),
    ],
    _lines,
)


def _window(draw: random.Random, of: Numbers) -> list[Call]:
    values = of.draw(draw, of.n + 1)
    size = draw.randint(1, 2)
    best = sorted(values)
    return [
        *(("f", [values]), ("f", [values, size]), ("g", [values, size]), ("g", [values])),
        *(("g", [best, size]), ("g", [values[:1], 2]), ("f", [values[:size], size])),
    ]


WINDOW = Program(
    '''\
def $f($a, size=$n):
    """The sum of each window of so many neighbours."""
    return [sum($a[at : at + size]) for at in range(len($a) - size + 1)]


def $g($a, size=$n):
    """Where the window with the largest sum begins; -1 if there is no window."""
    $b = $f($a, size)
    if not $b:
        return -1
    return $b.index(max($b))
''',
    [
        Bug("off-by-one", "len($a) - size + 1", "len($a) - size"),
        Bug("swapped-arguments", "$f($a, size)\n", "$f(size, $a)\n"),
        Bug("operator", "max($b)", "min($b)"),
        Bug("edge-case", "    if not $b:\n        return -1\n", ""),
        Bug("return", "return $b.index(max($b))", "return max($b)"),
        Bug("default", "$f($a, size=$n)", "$f($a, size=$m)"),
    ],
    _window,
)


def _percent(draw: random.Random, of: Numbers) -> list[Call]:
    low, high = sorted(draw.sample(range(of.values[0], of.values[1] + 1), 2))
    value = draw.randint(low, high)
    return [
        *(("f", [value, low, high]), ("f", [value + 1, low, high]), ("f", [value, low, low])),
        *(("g", [of.draw(draw)]), ("g", [of.draw(draw), low, high])),
    ]


PERCENT = Program(
    '''\
def $f(value, low, high):
    """How far a value is from low to high, in whole percent; 0 if there is no way."""
    if high == low:
        return 0
    return 100 * (value - low) // (high - low)


def $g($a, low=$n, high=$m):
    """The percent of each value, in their order."""
    return [$f(value, low, high) for value in $a]
''',
    [
        Bug("edge-case", "    if high == low:\n        return 0\n", ""),
        Bug("swapped-arguments", "[$f(value, low, high)", "[$f(value, high, low)"),
        Bug("operator", "(value - low)", "(value + low)"),
        Bug("default", "low=$n", "low=0"),
        Bug("return", "return 100 * (value - low) // (high - low)", "return value - low"),
    ],
    _percent,
)

PROGRAMS = {
    "parts": PARTS,
    "prices": PRICES,
    "bounds": BOUNDS,
    "search": SEARCH,
    "runs": RUNS,
    "join": JOIN,
    "pay": PAY,
    "middle": MIDDLE,
    "lines": LINES,
    "window": WINDOW,
    "percent": PERCENT,
}
