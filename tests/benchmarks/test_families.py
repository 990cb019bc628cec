"""benchmarks/families: what its policies are taught at first is what a sandbox would show."""

from __future__ import annotations

import asyncio
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import get_args

import pytest

from benchmarks.families import gui_corpus
from benchmarks.families.__main__ import asked
from benchmarks.families.judge_stage import settings_with
from benchmarks.families.opinions import LIKES_WRONG, Opinions
from benchmarks.families.terminal_corpus import (
    MOST_CALLS,
    Act,
    acts,
    block,
    draw_drill,
    draw_episode,
)
from demo.configuration import Served, write_configuration
from demo.lesson import LEARNER
from judge.advantages import CreditMethod
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.gui import action_of
from plugins.environments.gui_tasks import pages, solution
from plugins.environments.terminal import SUBMIT, command_of, create
from plugins.environments.terminal_tasks import FAMILIES, SCALES, numbered, task
from tests.rollout.machine import needs_bubblewrap


@needs_bubblewrap
@pytest.mark.processes
@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_observations_are_those_of_a_real_sandbox(family: str) -> None:
    fields, solution = task(family, "eval", 5)
    right, habits = acts(family, fields, solution)

    async def play(steps: list[Act]) -> tuple[list[str], float]:
        terminal = create(None).make()
        await terminal.reset(fields, 0)
        shown = [(await terminal.step(block(one.command))).observation for one in steps]
        return shown, (await terminal.score()).outcome

    def checked(steps: list[Act]) -> float:
        shown, outcome = asyncio.run(play(steps))
        assert shown == [one.shown for one in steps]
        return outcome

    assert checked([*right]) == 1.0
    for number, others in enumerate(habits):
        for habit in others:
            checked([*right[:number], habit])


def test_an_episode_of_the_corpus_is_one_of_the_environment() -> None:
    rng = Random(0)
    for _ in range(100):
        lines = draw_episode(rng)
        assert all(one.role != other.role for one, other in pairwise(lines))
        replies = [line for line in lines if line.role == "assistant"]
        assert all(line.imitate and command_of(line.content) for line in replies)
        assert not any(line.imitate for line in lines if line.role == "user")
        assert 1 <= len(replies) <= MOST_CALLS


def test_a_drill_has_a_command_for_each_instruction() -> None:
    lines = draw_drill(Random(0))
    assert [line.role for line in lines] == ["user", "assistant"] * (len(lines) // 2)
    assert all(command_of(line.content) for line in lines if line.imitate)


def test_no_task_of_the_corpus_is_played() -> None:
    played = {task(f, s, n)[0]["id"] for f, s, n in product(FAMILIES, SCALES, range(50))}
    for family, split in product(FAMILIES, SCALES):
        assert task(family, split, f"corpus {Random(1).random()}")[0]["id"] not in played


@pytest.mark.parametrize("page", gui_corpus.PAGES)
def test_imitated_pages_are_asked_and_solved_as_real_ones(page: str) -> None:
    rng = Random(0)
    for _ in range(50):
        made = gui_corpus.PAGES[page](rng)
        assert solution(page, gui_corpus.opening(made)) == made.right
        shown = [gui_corpus.act(made, action) for action in made.right]
        assert shown[-1] == gui_corpus.OVER
        assert gui_corpus.OVER not in shown[:-1]


def test_the_page_that_never_trains_is_in_no_corpus() -> None:
    assert {*gui_corpus.PAGES} == {*pages("train")}


def test_an_episode_of_pages_has_actions_alone() -> None:
    rng = Random(0)
    for _ in range(200):
        replies = [one for one in gui_corpus.draw_episode(rng) if one.role == "assistant"]
        assert all(one.imitate and action_of(one.content) for one in replies)


@pytest.mark.parametrize(("judge", "right"), [("0.95", 0.95), ("0.6", 0.6), (LIKES_WRONG, 0.5)])
def test_a_simulated_judge_is_right_as_often_as_asked(judge: str, right: float) -> None:
    kind = Opinions(Shown(), judge, seed=0)
    fields = kind.generate("train", 0)
    del fields["id"], fields["split"]
    (command,), (liked,) = kind.of(fields)

    async def play() -> list[bool]:
        found: list[bool] = []
        for _ in range(300):
            world = kind.make()
            await world.reset(fields, 0)
            for text, good in ((liked, -1.0), (command, 1.0), (SUBMIT, 1.0), (command, -1.0)):
                said = (await world.step(block(text))).reward
                if judge != LIKES_WRONG or text in (liked, SUBMIT):
                    found.append(said == good)
        return found

    found = asyncio.run(play())
    assert sum(found) / len(found) == pytest.approx(right, abs=0.04)


@pytest.mark.parametrize("credit", get_args(CreditMethod))
def test_the_judge_of_a_lesson_gives_the_credit_that_is_asked_for(
    credit: CreditMethod, tmp_path: Path
) -> None:
    served = Served(tmp_path, "policy", "float32", "outcome", LEARNER)
    file = write_configuration(tmp_path / "out", served).file
    assert file is not None
    assert settings_with(file, credit).judge.credit == credit


def test_a_judge_is_simulated_only_where_one_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert asked(["terminal"]).judge is None
    assert asked(["terminal", "--judge", "0.75"]).judge == "0.75"
    for words, told in (
        (["terminal", "--judge", "1.5"], "the share of right opinions, 0.5 to 1"),
        (["gui", "--judge", "0.75"], "only of terminal; leave it out"),
    ):
        with pytest.raises(SystemExit):
            asked(words)
        assert told in capsys.readouterr().err


class Shown:
    """An environment whose commands do nothing."""

    def check_task(self, task: Json) -> None:
        pass

    async def check_machine(self) -> None:
        pass

    def generate(self, split: str, number: int) -> Json:
        return numbered(split, number)

    def make(self) -> Shown:
        return self

    async def reset(self, task: Json, seed: int) -> str:
        return ""

    async def step(self, action: str) -> Acted:
        return Acted("", None, False)

    async def score(self) -> Scored:
        return Scored(0.0)

    async def close(self) -> None:
        pass
