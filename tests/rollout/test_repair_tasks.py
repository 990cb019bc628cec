"""plugins/environments/repair_tasks.py: each package has a bug that its tests find."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.episodes import Split
from nextstate.records import Json
from plugins.environments import repair_tasks
from plugins.environments.generated import print_tasks
from plugins.environments.repair import RepairKind, create
from plugins.environments.repair_judge import expected_of
from plugins.environments.repair_programs import KINDS, PROGRAMS
from plugins.environments.repair_tasks import SCALES, Running, fill, judged, task
from rollout.tasks import read_tasks
from tests.rollout.machine import needs_pytest

HAND_WORKED: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("parts", "f", [[1, 2, 3]], {"gives": [[1, 2], [3]]}),
    ("prices", "f", [[[10, 3], [5, 4]]], {"gives": 49}),  # 50 less 2 %
    ("prices", "g", [[[10, 3]], 30], {"gives": True}),
    ("bounds", "f", [9, 1, 4], {"gives": 4}),
    ("bounds", "g", [[0, 3, 9]], {"gives": [2, 3, 5]}),
    ("search", "f", [[2, 4, 8], 8], {"gives": 2}),
    ("search", "f", [[2, 4, 8], 3], {"gives": -1}),
    ("runs", "f", [[1, 1, 2, 2, 2, 1]], {"gives": 3}),
    ("runs", "f", [[]], {"gives": 0}),
    ("join", "f", [[[5, 8], [1, 2], [2, 4], [6, 7]]], {"gives": [[1, 4], [5, 8]]}),
    ("pay", "f", [{"a": 3, "b": 0}, "a", "b", 2], {"gives": {"a": 1, "b": 2}}),
    ("pay", "f", [{"a": 3, "b": 0}, "a", "b", 4], {"raises": "ValueError"}),
    ("pay", "g", [{"a": 3, "b": 0}, [["a", "b", 3], ["b", "a", 1]]], {"gives": {"a": 1, "b": 2}}),
    ("middle", "f", [[9, 1, 5, 7]], {"gives": 5}),
    ("middle", "f", [[]], {"gives": None}),
    ("lines", "f", ["a bc def", 4], {"gives": ["a bc", "def"]}),
    ("window", "f", [[1, 2, 3]], {"gives": [3, 5]}),
    ("window", "g", [[1, 2, 9, 0]], {"gives": 1}),
    ("window", "g", [[1], 2], {"gives": -1}),
    ("percent", "f", [3, 2, 4], {"gives": 50}),
    ("percent", "f", [3, 2, 2], {"gives": 0}),
    ("percent", "g", [[2, 5]], {"gives": [0, 100]}),
]
"""With n = 2 and m = 5."""


@pytest.mark.parametrize(("name", "hole", "args", "expected"), HAND_WORKED)
def test_a_program_without_a_bug_does_what_its_words_say(
    name: str, hole: str, args: list[Any], expected: dict[str, Any]
) -> None:
    scale = repair_tasks.Scale(SCALES["train"].words, (1, 1), (0, 9), (3, 4), (2, 3))
    module = fill(random.Random(0), scale, "p.m", PROGRAMS[name])
    module.names.update(n="2", m="5")
    assert Running(module.text()).call(module.names[hole], args) == expected


def test_every_program_has_a_hand_worked_call_and_every_kind_several_programs() -> None:
    assert {name for name, *_ in HAND_WORKED} == PROGRAMS.keys()
    shapes = dict.fromkeys(KINDS, 0)
    for program in PROGRAMS.values():
        for kind in {bug.kind for bug in program.bugs}:
            shapes[kind] += 1
    assert min(shapes.values()) >= 4


@pytest.mark.parametrize("split", SCALES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_bug_of_every_program_is_found_by_its_calls(name: str, split: str) -> None:
    for bug in PROGRAMS[name].bugs:
        for seed in range(5):
            draw = random.Random(seed)
            module = fill(draw, SCALES[split], "p.m", PROGRAMS[name])
            assert not all(holds for _, holds in judged(draw, module, bug)), (bug, seed)


def holding(files: dict[str, str], cases: list[Json]) -> list[bool]:
    """Which cases hold, without a sandbox: the texts are ours."""
    found: list[bool] = []
    for case in cases:
        module, _, function = case["call"].rpartition(".")
        text = files[module.replace(".", "/") + ".py"]
        found.append(Running(text).call(function, case["args"]) == expected_of(case))
    return found


def repaired(fields: Json, answers: list[str]) -> dict[str, str]:
    """The files after the answer that replaces lines."""
    (edit,) = [one for one in answers if one.startswith("replace ")]
    head, _, new = edit.partition("\n")
    _, path, places = head.split(" ")
    first, _, last = places.partition("-")
    lines = fields["files"][path].split("\n")
    lines[int(first) - 1 : int(last or first)] = new.split("\n")
    return {**fields["files"], path: "\n".join(lines)}


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from([*SCALES]), st.integers(0, 1 << 32))
def test_every_bug_fails_hidden_tests_and_the_solution_passes_all(
    kind: str, split: str, seed: int
) -> None:
    fields, answers = task(kind, split, seed)
    for cases in (fields["visible"], fields["hidden"]):
        assert not all(holding(fields["files"], cases))
        assert all(holding(repaired(fields, answers), cases))


def test_hidden_calls_are_others_unless_one_call_alone_shows_the_bug() -> None:
    for kind in KINDS:
        for seed in range(20):
            fields, _ = task(kind, "train", seed)
            visible, hidden = (
                {json.dumps([one["call"], one["args"]]): one for one in fields[name]}
                for name in ("visible", "hidden")
            )
            if both := visible.keys() & hidden.keys():
                failing = [k for k in hidden if not all(holding(fields["files"], [hidden[k]]))]
                assert both == {*failing}
                assert len(both) <= 2


def test_a_task_depends_on_its_kind_split_and_seed_alone() -> None:
    for kind in KINDS:
        assert task(kind, "train", 3) == task(kind, "train", 3)
        assert task(kind, "train", 3)[0]["files"] != task(kind, "train", 4)[0]["files"]


def test_no_name_number_or_size_of_a_held_out_package_is_in_training() -> None:
    train, held_out = SCALES["train"], SCALES["eval"]
    assert not {*train.words} & {*held_out.words}
    for name in ("modules", "values", "length", "numbers"):
        assert getattr(train, name)[1] < getattr(held_out, name)[0]


def test_the_printed_tasks_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(repair_tasks.numbered, 48)
    file = tmp_path / "tasks.jsonl"
    file.write_text(capsys.readouterr().out)
    found = read_tasks(file, "repair", RepairKind().check_task)
    splits = [one.split for one in found]
    assert (splits.count(Split.TRAIN), splits.count(Split.EVAL)) == (48, 12)
    assert {one.id.rsplit("-", 2)[0] for one in found if one.split is Split.EVAL} == {*KINDS}


async def outcome(kind: str, split: str, seed: int, policy: str) -> float:
    fields, solution = task(kind, split, seed)
    environment = create(None).make()
    await environment.reset({**fields}, seed)
    draw = random.Random(seed)
    answers = {"oracle": solution, "random": [a_random_edit(draw, fields), "submit"]}[policy]
    acted = [await environment.step(answer) for answer in answers]
    assert acted[-1].done
    if policy == "oracle":
        assert max(one.reward or 0 for one in acted) > 0
        assert "exit code 0" in acted[2].observation, "the visible tests pass"
    return (await environment.score()).outcome


def a_random_edit(draw: random.Random, fields: Json) -> str:
    """One line of the package in the place of another."""
    path = draw.choice([path for path, text in fields["files"].items() if text])
    lines = fields["files"][path].rstrip("\n").split("\n")
    return f"replace {path} {draw.randint(1, len(lines))}\n{draw.choice(lines)}"


@needs_pytest
@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_repairs_every_kind_of_bug_and_random_edits_none(kind: str) -> None:
    async def each(policy: str) -> list[float]:
        return [await outcome(kind, split, 0, policy) for split in SCALES]

    assert asyncio.run(each("oracle")) == [1.0] * 2
    assert asyncio.run(each("random")) == [0.0] * 2
