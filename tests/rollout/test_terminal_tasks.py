"""plugins/environments/terminal_tasks.py: generated tasks can be solved, and only by doing them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nextstate.episodes import Split
from plugins.environments import terminal_tasks
from plugins.environments.generated import print_tasks
from plugins.environments.terminal import TerminalKind, create
from plugins.environments.terminal_tasks import FAMILIES, SCALES, task
from rollout.tasks import read_tasks
from tests.rollout.machine import needs_bubblewrap
from tests.rollout.test_terminal import block


async def outcome(family: str, split: str, seed: int, *commands: str | None) -> float:
    """Of an episode with these commands; None: the task's solution."""
    fields, solution = task(family, split, seed)
    terminal = create(None).make()
    await terminal.reset({**fields}, seed)
    for command in commands:
        acted = await terminal.step(block(command or solution))
        assert command is not None or acted.reward == 0.0, acted.observation
    return (await terminal.score()).outcome


@needs_bubblewrap
@pytest.mark.processes
@pytest.mark.parametrize("split", SCALES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_solves_every_task_and_who_does_nothing_none(family: str, split: str) -> None:
    async def each(seed: int) -> list[float]:
        attempts = ([None], ["ls -R"], ["echo 1 > answer.txt"])
        return [await outcome(family, split, seed, *commands) for commands in attempts]

    for seed in range(2):
        assert asyncio.run(each(seed)) == [1.0, 0.0, 0.0]


def test_a_task_depends_on_its_family_split_and_seed_alone() -> None:
    for family in FAMILIES:
        assert task(family, "train", 3) == task(family, "train", 3)
        assert task(family, "train", 3)[0]["files"] != task(family, "train", 4)[0]["files"]


def test_no_word_or_size_of_a_held_out_task_is_in_training() -> None:
    train, held_out = SCALES["train"], SCALES["eval"]
    assert not {*train.words} & {*held_out.words}
    assert train.files[1] < held_out.files[0]
    assert train.lines[1] < held_out.lines[0]


def test_the_printed_tasks_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(terminal_tasks.numbered, 40)
    file = tmp_path / "tasks.jsonl"
    file.write_text(capsys.readouterr().out)
    found = read_tasks(file, "terminal", TerminalKind().check_task)
    splits = [one.split for one in found]
    assert (splits.count(Split.TRAIN), splits.count(Split.EVAL)) == (40, 10)
    families = {one.id.rsplit("-", 2)[0] for one in found if one.split is Split.EVAL}
    assert families == {*FAMILIES}
