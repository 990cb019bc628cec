"""The file in which a program says what an episode is worth.

    0.5
    {"outcome": 0.5, "observation": "1 of 2 tests passed", "steps": [{"index": 0, "value": -1}]}

Everything but the outcome is optional. `steps` are process rewards: by the number of the model's
recorded reply, from 0, or by {"turn": "turn_…", "value": -1} with the reply's x-nextstate-turn. A
call that was sent again changes the numbers of those after it, and no turn's name.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn, cast

from nextstate.errors import RolloutError
from nextstate.hooks import Scored
from nextstate.records import Json

MOST_BYTES = 256 << 10
_FIELDS = {"outcome", "observation", "steps"}


def read_reward(data: bytes) -> Scored:
    """What a reward file says. Raises RolloutError that names the part."""
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError):
        _wrong(data, "a number or a JSON object")
    if not isinstance(found, dict):
        return Scored(_number("it", found))
    given = cast(Json, found)
    for name in given.keys() - _FIELDS:
        _wrong(name, f"the fields {', '.join(sorted(_FIELDS))}")
    observation: object = given.get("observation", "")
    steps: object = given.get("steps", [])
    if not isinstance(observation, str):
        _wrong(observation, "observation to be a text")
    if not isinstance(steps, list):
        _wrong(steps, "steps to be a list")
    of_steps: dict[int | str, float] = {}
    for step in cast("list[object]", steps):
        fields = cast(Json, step) if isinstance(step, dict) else {}
        index, turn = fields.get("index"), fields.get("turn")
        by_index = fields.keys() == {"index", "value"} and type(index) is int and index >= 0
        by_turn = fields.keys() == {"turn", "value"} and isinstance(turn, str)
        if not by_index and not by_turn:
            _wrong(cast(object, step), 'steps like {"index": 0, "value": -1}')
        named = cast("int | str", index if by_index else turn)
        of_steps[named] = _number("the value of a step", fields["value"])
    return Scored(_number("outcome", given.get("outcome")), observation, of_steps)


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(number := float(cast(float, value))):
        _wrong(value, f"{name} to be a finite number")
    return number


def _wrong(value: object, what: str) -> NoReturn:
    raise RolloutError(f"the reward file has {value!r:.80}: expected {what}")
