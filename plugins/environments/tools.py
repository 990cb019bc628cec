"""The environment `tools`: the agent calls JSON tools of a stateful service until it submits.

A task has these fields beside its id:

    service       calculator, directory or calendar
    instruction   what the agent is asked to do
    goal          what has to be submitted; of a calendar, the bookings that have to be there
    people        directory: a list of {"id", "name", "city", "manager"}
    busy          calendar: hours that are taken, by day

The agent answers with one call, {"name": …, "arguments": {…}}, perhaps between <tool_call> marks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol, cast

from nextstate.errors import ConfigError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json

SUBMIT = "submit"
OPEN_HOURS = range(8, 20)
_MOST_REPLY_CHARS = 4096
_MOST_NUMBER = 10**9
_MOST_PEOPLE, _MOST_DAYS = 1000, 100
_MARKS = "<tool_call>", "</tool_call>"
_EXAMPLE = 'Answer with one call, like {"name": "tool", "arguments": {"x": 1}}'
Parameters = Mapping[str, type[int] | type[str]]
_TWO: Parameters = {"a": int, "b": int}
_KINDS: dict[type, str] = {int: "a whole number", str: "a text"}


class ToolError(Exception):
    """What a tool answers to a call that it cannot follow; the agent sees the text."""


class TakenError(ToolError):
    """A mistake that the agent could not have foreseen."""


class Service(Protocol):
    """What the tools of one episode work on."""

    tools: Mapping[str, Parameters]
    """Their parameters by name; what `submit` takes is among them."""

    def call(self, name: str, arguments: Json) -> str:
        """What a tool answers; its arguments have the right types. Raises ToolError."""
        ...

    def is_solved(self, goal: object, submitted: Json | None) -> bool:
        """`submitted` are the arguments of `submit`; None: it was not called."""
        ...


class Calculator:
    """Whole numbers."""

    tools: Mapping[str, Parameters] = {
        "add": _TWO,
        "subtract": _TWO,
        "multiply": _TWO,
        SUBMIT: {"value": int},
    }

    def __init__(self, task: Json) -> None:
        """Needs nothing of the task."""

    @staticmethod
    def check(task: Json) -> None:
        if type(task.get("goal")) is not int:
            _expected("goal", task.get("goal"), "a whole number")

    def call(self, name: str, arguments: Json) -> str:
        a, b = arguments["a"], arguments["b"]
        return str(a + b if name == "add" else a - b if name == "subtract" else a * b)

    def is_solved(self, goal: object, submitted: Json | None) -> bool:
        return submitted is not None and submitted["value"] == goal


class Directory:
    """People who have managers."""

    tools: Mapping[str, Parameters] = {
        "find": {"name": str},
        "get": {"id": int},
        SUBMIT: {"value": str},
    }

    def __init__(self, task: Json) -> None:
        self._people: Sequence[Json] = task["people"]

    @staticmethod
    def check(task: Json) -> None:
        if not isinstance(task.get("goal"), str):
            _expected("goal", task.get("goal"), "a text")
        people = _list(task.get("people"))
        if not 0 < len(people) <= _MOST_PEOPLE:
            _expected("people", people, f"a list of 1 to {_MOST_PEOPLE} people")
        for one in people:
            if _kinds(one) != {"id": int, "name": str, "city": str, "manager": int}:
                _expected("people", one, '{"id": 1, "name": "Ida", "city": "Rome", "manager": 2}')

    def call(self, name: str, arguments: Json) -> str:
        ((field, wanted),) = arguments.items()
        for one in self._people:
            if one[field] == wanted:
                return json.dumps(one)
        raise ToolError(f"nobody has the {field} {wanted}")

    def is_solved(self, goal: object, submitted: Json | None) -> bool:
        return submitted is not None and submitted["value"] == goal


class Calendar:
    """Days with hours, of which each can be booked once."""

    tools: Mapping[str, Parameters] = {"book": {"day": str, "hour": int}, SUBMIT: {}}

    def __init__(self, task: Json) -> None:
        self._busy = {day: set(hours) for day, hours in task["busy"].items()}
        self._booked: list[tuple[str, int]] = []

    @staticmethod
    def check(task: Json) -> None:
        goal, busy = _list(task.get("goal")), _object(task.get("busy"))
        if not goal or [_types(one) for one in goal] != [[str, int]] * len(goal):
            _expected("goal", goal, 'a list of bookings, as [["Mon", 9]]')
        if not 0 < len(busy) <= _MOST_DAYS or not all(map(_is_hours, busy.values())):
            _expected("busy", busy, 'hours by day, as {"Mon": [9, 10], "Tue": []}')

    def call(self, name: str, arguments: Json) -> str:
        day, hour = arguments["day"], arguments["hour"]
        if day not in self._busy:
            raise ToolError(f"there is no day {day}")
        if hour not in OPEN_HOURS:
            raise ToolError(f"{hour} is outside of {OPEN_HOURS.start} to {OPEN_HOURS.stop}")
        if hour in self._busy[day]:
            raise TakenError(f"{day} {hour} is taken")
        self._busy[day].add(hour)
        self._booked.append((day, hour))
        return f"{day} {hour} is booked"

    def is_solved(self, goal: object, submitted: Json | None) -> bool:
        wanted = sorted((day, hour) for day, hour in cast(list[tuple[str, int]], goal))
        return submitted is not None and sorted(self._booked) == wanted


_SERVICES: Mapping[str, type[Calculator] | type[Directory] | type[Calendar]] = {
    "calculator": Calculator,
    "directory": Directory,
    "calendar": Calendar,
}
_FIELDS = {"service", "instruction", "goal", "people", "busy"}


class Tools:
    """One episode with a service."""

    def __init__(self) -> None:
        self._submitted: Json | None = None
        self._failed: set[str] = set()
        """Calls that were errors."""

    async def reset(self, task: Json, seed: int) -> str:
        self._goal = task["goal"]
        self._service: Service = _SERVICES[task["service"]](task)
        listed = [f"{name}({', '.join(of)})" for name, of in self._service.tools.items()]
        return f"{task['instruction']}\nTools: {', '.join(listed)}. {_EXAMPLE}"

    async def step(self, action: str) -> Acted:
        try:
            name, arguments = self._checked(call_of(action))
            if name == SUBMIT:
                self._submitted = arguments
                return Acted("submitted", 0.0, True)
            return Acted(self._service.call(name, arguments), 0.0, False)
        except ToolError as error:
            again = action in self._failed
            self._failed.add(action)
            foreseen = again or not isinstance(error, TakenError)
            return Acted(f"error: {error}", -1.0 if foreseen else 0.0, False)

    async def score(self) -> Scored:
        solved = self._service.is_solved(self._goal, self._submitted)
        return Scored(float(solved), "right" if solved else "wrong")

    async def close(self) -> None:
        """Nothing is left."""

    def _checked(self, call: Json) -> tuple[str, Json]:
        """Name and arguments of a call, if the service has such a tool. Raises ToolError."""
        name, arguments = call["name"], call["arguments"]
        wanted = self._service.tools.get(name)
        if wanted is None:
            raise ToolError(f"there is no tool {name[:40]}")
        if arguments.keys() != wanted.keys():
            raise ToolError(f"{name} takes {', '.join(wanted) or 'no arguments'}")
        for key, kind in wanted.items():
            if type(value := arguments[key]) is not kind:  # True is an int too
                raise ToolError(f"{key} must be {_KINDS[kind]}")
            if kind is int and abs(int(value)) > _MOST_NUMBER:
                raise ToolError(f"{key} is too large")
        return name, arguments


class ToolsKind:
    """Makes services."""

    def check_task(self, task: Json) -> None:
        for name in task.keys() - _FIELDS:
            raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(sorted(_FIELDS))}")
        service, instruction = task.get("service"), task.get("instruction")
        if not isinstance(service, str) or service not in _SERVICES:
            _expected("service", service, " or ".join(_SERVICES))
        if not isinstance(instruction, str):
            _expected("instruction", instruction, "a text")
        _SERVICES[service].check(task)

    async def check_machine(self) -> None:
        """Nothing is needed."""

    def make(self) -> Tools:
        return Tools()

    def generate(self, split: str, number: int) -> Json:
        from plugins.environments.tool_tasks import numbered  # it imports this module

        return numbered(split, number)


def create(settings: object) -> ToolsKind:
    return ToolsKind()


def call_of(reply: str) -> Json:
    """The one call in a reply: its `name` and its `arguments`. Raises ToolError.

    >>> call_of('<tool_call> {"name": "get", "arguments": {"id": 7}} </tool_call>')
    {'name': 'get', 'arguments': {'id': 7}}
    """
    text = reply.strip()
    if len(text) <= _MOST_REPLY_CHARS:
        text = text.removeprefix(_MARKS[0]).removesuffix(_MARKS[1])
        try:
            found: object = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            found = None
        if _kinds(found) == {"name": str, "arguments": dict}:
            return cast(Json, found)
    raise ToolError(f"this is no call. {_EXAMPLE}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _expected(name: str, value: object, what: str) -> NoReturn:
    raise ConfigError(f"{name} = {value!r:.80}: expected {what}")


def _object(value: object) -> dict[str, object]:
    """A JSON object; of anything else, an empty one."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    """A JSON array; of anything else, an empty one."""
    return cast(list[object], value) if isinstance(value, list) else []


def _types(values: object) -> list[type]:
    return [type(value) for value in _list(values)]


def _kinds(value: object) -> dict[str, type]:
    """The types of an object's values by name."""
    return {name: type(of) for name, of in _object(value).items()}


def _is_hours(value: object) -> bool:
    return isinstance(value, list) and all(
        type(hour) is int and hour in OPEN_HOURS for hour in _list(cast(object, value))
    )
