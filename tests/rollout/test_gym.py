"""plugins/environments/gym.py: environments in Python, in Gymnasium's shapes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from nextstate.errors import ConfigError, RolloutError
from nextstate.hooks import Acted, Scored
from plugins.environments.gym import Gym, GymKind, create

WORDS = {"make": f"{__name__}:Words", "arguments": {"goal": "tree"}, "instruction": "Guess."}


class Words:
    """The agent guesses a word; the shapes are Gymnasium's, without a space."""

    def __init__(self, goal: str = "", old: bool = False, result: Any = None) -> None:
        self.goal, self.old, self.result = goal, old, result
        self.thread = threading.get_ident()
        self.closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = 3
        shown = f"seed {seed}, options {options}, {len(self.goal)} letters"
        return shown if self.old else (shown, {})

    def step(self, action: Any) -> Any:
        assert threading.get_ident() == self.thread
        if self.result is not None:
            return self.result
        if action == "break":
            raise KeyError("no such word")
        self.left -= 1
        found, over = action == self.goal, self.left == 0
        reward = 1.0 if found else -0.25
        if self.old:
            return [action], reward, found or over, {}
        return f"{action} is {'right' if found else 'wrong'}", reward, found, over, {}

    def close(self) -> None:
        self.closed = True


def play(task: dict[str, Any], *replies: str) -> tuple[str, list[Acted], Scored]:
    async def episode() -> tuple[str, list[Acted], Scored]:
        kind = create(None)
        kind.check_task(task)
        await kind.check_machine()
        gym = kind.make()
        try:
            shown = await gym.reset(task, 3)
            return shown, [await gym.step(reply) for reply in replies], await gym.score()
        finally:
            await gym.close()

    return asyncio.run(episode())


def test_an_episode_shows_text_and_its_return_is_the_outcome() -> None:
    shown, acted, scored = play(WORDS, "bush", " tree\n")
    assert shown == "Guess.\n\nseed 3, options None, 4 letters"
    assert acted == [Acted("bush is wrong", -0.25, False), Acted("tree is right", None, True)]
    assert scored.outcome == 0.75
    assert play({**WORDS, "outcome": "last"}, "bush", "tree")[2].outcome == 1.0
    assert play({**WORDS, "solved": 1.5}, "bush", "tree")[2].outcome == 0.5


def test_an_episode_that_is_cut_short_keeps_what_it_reached() -> None:
    assert play(WORDS)[2].outcome == 0.0
    assert play(WORDS, "bush", "bush")[2].outcome == -0.5
    assert play({**WORDS, "outcome": "last"}, "bush", "bush")[2].outcome == 0.0
    *_, last = play(WORDS, "bush", "bush", "bush")[1]
    assert last.done


def test_the_four_values_of_older_environments_and_other_observations_are_taken() -> None:
    task = {**WORDS, "arguments": {"goal": "tree", "old": True}, "options": {"level": 2}}
    shown, acted, _ = play(task, "tree")
    assert shown == "Guess.\n\nseed 3, options {'level': 2}, 4 letters"
    assert acted == [Acted("['tree']", None, True)]


def test_an_action_may_be_a_number() -> None:
    task = {"make": f"{__name__}:Words", "arguments": {"goal": 7}, "action": "number"}
    task["arguments"] = {"goal": "x", "result": ("ok", 0, False, False, {})}
    for reply, reward in (("7", 0.0), ("-7", 0.0), ("seven", -1.0), ("9" * 5000, -1.0)):
        (acted,) = play(task, reply)[1]
        assert acted.reward == reward, reply


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ("text", "step returned str: expected"),
        ((1, 2), "step returned tuple: expected"),
        (("x", float("nan"), False, False, {}), "the reward nan: expected a finite number"),
    ],
)
def test_a_step_of_another_shape_breaks_the_environment(result: object, told: str) -> None:
    with pytest.raises(RolloutError, match=told):
        play({**WORDS, "arguments": {"result": result}}, "x")


def test_what_the_environment_raises_is_told() -> None:
    with pytest.raises(RolloutError, match="the environment raised KeyError: 'no such word'"):
        play(WORDS, "break")
    with pytest.raises(RolloutError, match="raised TypeError"):
        play({**WORDS, "arguments": {"size": 1}})


def test_the_environment_is_closed_in_its_thread_also_without_a_reset() -> None:
    async def test() -> None:
        gym = Gym()
        await gym.reset(WORDS, 0)
        made = gym._environment  # pyright: ignore[reportPrivateUsage]
        await gym.close()
        assert isinstance(made, Words)
        assert made.closed
        await Gym().close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({}, "make = '': expected module:function"),
        ({"make": "words"}, "make = 'words': expected module:function"),
        ({"make": "no_such_module:make"}, "No module named 'no_such_module'"),
        ({"make": "math:no"}, "math has no function 'no'"),
        ({**WORDS, "action": "json"}, "action = 'json': expected text or number"),
        ({**WORDS, "outcome": "mean"}, "outcome = 'mean': expected sum or last"),
        ({**WORDS, "solved": 0}, "solved = 0: expected a number above 0"),
        ({**WORDS, "solved": "nan"}, "solved = 'nan': expected a number above 0"),
        ({**WORDS, "solved": True}, "solved = True: expected a number above 0"),
        ({**WORDS, "solved": [1]}, "solved = [1]: expected a number above 0"),
        ({**WORDS, "arguments": []}, "arguments = []: expected an object"),
        ({**WORDS, "seed": 1}, "unknown field 'seed'"),
    ],
)
def test_a_wrong_task_is_named(task: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        GymKind().check_task(task)
    assert told in str(error.value)
