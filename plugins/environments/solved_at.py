"""What of an environment's own rewards counts as solved: an outcome of at least 1 does."""

from __future__ import annotations

import math

from nextstate.errors import ConfigError
from nextstate.records import Json


def solved_at(task: Json) -> float:
    """The reward by which the outcome is divided: the field `solved`, by default 1.

    Raises ConfigError unless it is a number above 0; it may be a text, as in an address.

    >>> solved_at({}), solved_at({"solved": "195"})
    (1.0, 195.0)
    """
    given: object = task.get("solved", 1)
    try:
        found = float(given) if isinstance(given, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if isinstance(given, bool) or not 0 < found < math.inf:
        raise ConfigError(f"solved = {given!r:.80}: expected a number above 0, as 195")
    return found
