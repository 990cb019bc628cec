"""The user's own expressions for what must not be kept, checked to need linear time.

What can repeat is one character, for a bounded number of times: then a search takes at most a
bounded number of steps at each character of a text, whoever wrote the text.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any

from nextstate.errors import ConfigError

c: Any = importlib.import_module("re._constants")
parser: Any = importlib.import_module("re._parser")
"""What `re` makes of an expression; they have no types."""
_MOST_PATTERNS, _LONGEST_PATTERN = 50, 500
_MOST_REPEATS = 1000
_MOST_WAYS = 1000
"""In how many ways an expression may match from one place: a search may have to try them all."""
_ONE_CHARACTER = (c.LITERAL, c.NOT_LITERAL, c.IN, c.ANY, c.CATEGORY)
_REPEATS = (c.MAX_REPEAT, c.MIN_REPEAT, c.POSSESSIVE_REPEAT)


def compile_patterns(patterns: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """`[privacy] patterns`, compiled. Raises ConfigError that says what to change."""
    if len(patterns) > _MOST_PATTERNS:
        raise ConfigError(
            f"[privacy] patterns has {len(patterns)} expressions: expected at most "
            f"{_MOST_PATTERNS}; join some by |"
        )
    return tuple(map(_compiled, patterns))


def _compiled(pattern: str) -> re.Pattern[str]:
    where = f"[privacy] patterns: {pattern!r:.100}"
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(f"{where} has more than {_LONGEST_PATTERN} characters: shorten it")
    try:
        compiled = re.compile(pattern)
        ways = _ways(parser.parse(pattern, compiled.flags & ~re.DEBUG))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{where} is no regular expression of Python: {error}") from None
    except _Slow as why:
        raise ConfigError(f"{where} could be slow on a hostile text: {why}") from None
    if ways > _MOST_WAYS:
        raise ConfigError(
            f"{where} could be slow on a hostile text: its repetitions can be combined in {ways} "
            f"ways; expected at most {_MOST_WAYS}, so lower their bounds"
        )
    if compiled.match("") is not None or compiled.search("\n \n") is not None:
        raise ConfigError(
            f"{where} matches where nothing stands: name a character that must be there"
        )
    return compiled


class _Slow(Exception):
    """What in an expression may take more than linear time."""


def _ways(sequence: Any) -> int:
    """In how many ways a sequence may match from one place, at most. Raises _Slow."""
    ways = 1
    for kind, argument in sequence:
        if kind in _REPEATS:
            ways *= _ways_of_repeat(*argument)
        elif kind is c.SUBPATTERN:
            ways *= _ways(argument[3])
        elif kind is c.BRANCH:
            ways *= sum(map(_ways, argument[1]))
        elif kind in (c.ASSERT, c.ASSERT_NOT):
            ways *= _ways(argument[1])
        elif kind is not c.AT and kind not in _ONE_CHARACTER:
            raise _Slow(
                f"it uses {str(kind).lower()}, which this check does not know; write it out"
            )
    return ways


def _ways_of_repeat(least: int, most: Any, repeated: Any) -> int:
    single = len(repeated) == 1 and repeated[0][0] in _ONE_CHARACTER
    if most is c.MAXREPEAT or most > _MOST_REPEATS:
        raise _Slow(
            f"a repetition has no end below {_MOST_REPEATS}; write {{1,64}} in place of +, "
            "and {0,64} in place of *"
        )
    if not single and most > 1:
        raise _Slow("a group is repeated; repeat single characters or classes only")
    return int(most) - int(least) + (1 if single else _ways(repeated))
