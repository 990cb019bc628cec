"""demo/lesson.py: which tasks are played; and what the tool demo's policy is taught at first."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from demo.competence import Chat
from demo.curve import draw_solved
from demo.lesson import HeardKind, key_of, tasks
from demo.tool_competence import shares
from demo.tool_corpus import MOST_CALLS, draw_episode
from nextstate.episodes import Split
from plugins.environments.tool_tasks import FAMILIES, call
from plugins.environments.tools import ToolsKind, call_of


def test_the_families_take_turns_and_no_task_comes_twice() -> None:
    for split in Split:
        found = list(islice(tasks(ToolsKind(), split, 0), 30))
        assert [one.id.split("-")[0] for one in found] == [*FAMILIES] * 10
        assert len({one.id for one in found}) == 30
        for one in found:
            ToolsKind().check_task(one.fields)
            assert one.split is split


def test_another_seed_trains_on_other_tasks() -> None:
    first, second = (list(islice(tasks(ToolsKind(), Split.TRAIN, seed), 30)) for seed in (0, 1))
    assert not {one.id for one in first} & {one.id for one in second}


def test_the_policy_imitates_calls_only_which_the_environment_understands() -> None:
    rng = Random(0)
    for _ in range(200):
        lines = draw_episode(rng)
        imitated = [line for line in lines if line.imitate]
        assert 1 <= len(imitated) <= MOST_CALLS
        assert all(line.role == "assistant" and call_of(line.content) for line in imitated)


def test_what_a_policy_can_do_at_a_step_is_told_apart_from_its_habits() -> None:
    def answers(chats: Sequence[Chat]) -> list[str]:
        """Of four chats: one habit, one reply that is neither, two right ones."""
        return [_reply(number % 4, chat) for number, chat in enumerate(chats)]

    def _reply(kind: int, chat: Chat) -> str:
        first = json.loads(chat[1]["content"])["arguments"]
        shown = chat[2]["content"]
        asked = chat[0]["content"].partition(".")[0].split()
        name = "add" if asked[-2] == "+" else "subtract"
        if kind == 0:
            return call("submit", value=int(shown))
        if kind == 1:
            return call("add", a=first["a"], b=-1)
        return call(name, a=int(shown), b=int(asked[-1]))

    found = shares(answers, "chain", "train", 1)
    assert found is not None
    assert (found.right, found.habit) == (0.5, 0.25)
    assert found.competence == pytest.approx(2 / 3)
    assert shares(answers, "chain", "train", 3) is None


def test_what_was_said_is_kept_for_each_task_also_with_the_same_instruction() -> None:
    async def play(kind: HeardKind, answer: str) -> None:
        for goal in (1, 2):
            tools = kind.make()
            await tools.reset({**task, "goal": goal}, 0)
            await tools.step(answer)

    task = {"service": "calculator", "instruction": "Guess."}
    kind = HeardKind(ToolsKind())
    asyncio.run(play(kind, "1"))
    said = kind.episodes[key_of({"goal": 2, **task})]
    assert [who for who, _ in said] == ["task", "call", "answer"]
    assert len(kind.episodes) == 2


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    draw_solved([(0, 0.2, 0.1, 0.3), (4, 0.9, 0.8, 1.0)], 0.8, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
