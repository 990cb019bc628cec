"""plugins/environments/tools.py: what the services answer, and what they refuse."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.episodes import Split
from nextstate.errors import ConfigError
from nextstate.hooks import Acted, Scored
from plugins.environments import tool_tasks
from plugins.environments.generated import print_tasks
from plugins.environments.tool_tasks import FAMILIES, SCALES, call, task
from plugins.environments.tools import ToolsKind, create
from rollout.tasks import read_tasks

CALENDAR = {
    "service": "calendar",
    "instruction": "Book.",
    "goal": [["Mon", 10]],
    "busy": {"Mon": [9]},
}
CHAIN = {"service": "calculator", "instruction": "Work out (1 + 2) - 3.", "goal": 0}
PERSON = {"id": 7, "name": "Ida", "city": "Rome", "manager": 7}
PEOPLE = {"service": "directory", "instruction": "Where?", "goal": "Rome", "people": [PERSON]}


def play(fields: dict[str, Any], *replies: str) -> tuple[list[Acted], Scored]:
    async def episode() -> tuple[list[Acted], Scored]:
        tools = create(None).make()
        await tools.reset(fields, 0)
        return [await tools.step(reply) for reply in replies], await tools.score()

    ToolsKind().check_task(fields)
    return asyncio.run(episode())


@pytest.mark.parametrize("split", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_solves_every_task_without_a_mistake(family: str, split: str) -> None:
    for seed in range(50):
        fields, solution = task(family, split, seed)
        acted, scored = play(without(fields), *solution)
        assert scored.outcome == 1.0
        assert [one.done for one in acted] == [False] * (len(solution) - 1) + [True]
        assert all(one.reward == 0.0 for one in acted)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_calls_solve_next_to_nothing(family: str) -> None:
    """They have the right tools and values; of the cities, one of six is right."""
    draw, solved = random.Random(0), 0.0
    for seed in range(200):
        fields, solution = task(family, "train", seed)
        replies = [guess(draw, fields, solution) for _ in range(6)]
        ends = [at for at, reply in enumerate(replies) if '"submit"' in reply]
        solved += play(without(fields), *replies[: ends[0] + 1 if ends else 6])[1].outcome
    assert solved / 200 <= {"chain": 0.02, "manager": 1 / 6, "book": 0.05}[family]


def guess(draw: random.Random, fields: dict[str, Any], solution: list[str]) -> str:
    low, high = SCALES["train"].numbers
    number = draw.randint(low, high)
    if fields["service"] == "calculator":
        tool = draw.choice(["add", "subtract", "multiply", "submit"])
        if tool == "submit":
            return call(tool, value=draw.randint(low, 3 * high))
        return call(tool, a=number, b=draw.randint(low, high))
    if fields["service"] == "directory":
        person = draw.choice(fields["people"])
        found = [call("find", name=person["name"]), call("get", id=person["id"])]
        return draw.choice([*found, call("submit", value=draw.choice(SCALES["train"].cities))])
    booked = call("book", day=draw.choice(SCALES["train"].days), hour=draw.randint(8, 19))
    return draw.choice([booked, call("submit")])


def without(fields: dict[str, Any]) -> dict[str, Any]:
    """What the environment reads of a task."""
    return {name: value for name, value in fields.items() if name not in ("id", "split")}


def test_a_conflict_is_no_mistake_but_the_same_call_again_is() -> None:
    taken = call("book", day="Mon", hour=9)
    acted, scored = play(CALENDAR, taken, taken, call("book", day="Mon", hour=10), call("submit"))
    assert [(one.observation, one.reward) for one in acted] == [
        ("error: Mon 9 is taken", 0.0),
        ("error: Mon 9 is taken", -1.0),
        ("Mon 10 is booked", 0.0),
        ("submitted", 0.0),
    ]
    assert scored.outcome == 1.0


def test_a_calendar_with_one_booking_too_many_is_wrong() -> None:
    booked = [call("book", day="Mon", hour=hour) for hour in (10, 11)]
    assert play(CALENDAR, *booked, call("submit"))[1].outcome == 0.0


def test_who_does_not_submit_has_solved_nothing() -> None:
    assert play(CALENDAR, call("book", day="Mon", hour=10))[1].outcome == 0.0
    assert play(CHAIN, call("add", a=1, b=2))[1].outcome == 0.0


@pytest.mark.parametrize(
    ("fields", "reply", "told"),
    [
        (CHAIN, "It is 0.", "this is no call"),
        (CHAIN, '{"name": "add"}', "this is no call"),
        (CHAIN, '{"name": "add", "arguments": {"a": NaN, "b": 1}}', "this is no call"),
        (CHAIN, "[" * 100_000, "this is no call"),
        (CHAIN, "[" * 4000, "this is no call"),
        (CHAIN, call("divide", a=1, b=2), "there is no tool divide"),
        (CHAIN, call("add", a=1), "add takes a, b"),
        (CHAIN, call("add", a="1", b=2), "a must be a whole number"),
        (CHAIN, call("add", a=True, b=2), "a must be a whole number"),
        (CHAIN, call("multiply", a=10**10, b=2), "a is too large"),
        (PEOPLE, call("find", name="Tom"), "nobody has the name Tom"),
        (PEOPLE, call("get", id="Ida"), "id must be a whole number"),
        (CALENDAR, call("book", day="Sun", hour=9), "there is no day Sun"),
        (CALENDAR, call("book", day="Mon", hour=23), "23 is outside of 8 to 20"),
        (CALENDAR, call("submit", value=1), "submit takes no arguments"),
    ],
)
def test_a_mistake_is_told_and_costs(fields: dict[str, Any], reply: str, told: str) -> None:
    (acted,), scored = play(fields, reply)
    assert acted.observation.startswith(f"error: {told}")
    assert (acted.reward, acted.done, scored.outcome) == (-1.0, False, 0.0)


@given(st.text() | st.recursive(st.text(), lambda part: part.map(lambda t: f'{{"name": {t}}}')))
def test_no_reply_breaks_a_service(reply: str) -> None:
    for fields in (CHAIN, PEOPLE, CALENDAR):
        play(fields, reply)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({**CHAIN, "service": "oracle"}, "service = 'oracle': expected calculator or directory"),
        ({**CHAIN, "instruction": None}, "instruction = None: expected a text"),
        ({**CHAIN, "goal": "0"}, "goal = '0': expected a whole number"),
        ({**CHAIN, "extra": 1}, "unknown field 'extra'"),
        ({**PEOPLE, "goal": 1}, "goal = 1: expected a text"),
        ({**PEOPLE, "people": []}, "people = []: expected a list of 1 to 1000 people"),
        ({**PEOPLE, "people": [{**PERSON, "id": "7"}]}, "people = {'id': '7'"),
        ({**CALENDAR, "goal": [["Mon"]]}, "goal = [['Mon']]: expected a list of bookings"),
        ({**CALENDAR, "busy": {"Mon": [99]}}, "busy = {'Mon': [99]}: expected hours by day"),
    ],
)
def test_a_wrong_task_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        ToolsKind().check_task(fields)
    assert str(error.value).startswith(told)


def test_no_parameter_of_a_held_out_task_is_in_training() -> None:
    train, held_out = SCALES["train"], SCALES["eval"]
    for kind in ("names", "cities", "days"):
        assert not {*getattr(train, kind)} & {*getattr(held_out, kind)}
    assert train.numbers[1] < held_out.numbers[0]
    assert train.ids[1] < held_out.ids[0]
    assert train.taken[1] < held_out.taken[1]


def test_the_printed_tasks_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(tool_tasks.numbered, 24)
    file = tmp_path / "tasks.jsonl"
    file.write_text(capsys.readouterr().out)
    found = read_tasks(file, "tools", ToolsKind().check_task)
    splits = [one.split for one in found]
    assert (splits.count(Split.TRAIN), splits.count(Split.EVAL)) == (24, 6)
    assert {one.id.split("-")[0] for one in found if one.split is Split.EVAL} == {*FAMILIES}
