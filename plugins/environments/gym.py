"""The environment `gym`: an environment in Python with Gymnasium's `reset` and `step`.

A task has these fields beside its id:

    make          what makes the environment, as my_module:MyEnvironment or gymnasium:make
    arguments     what `make` gets, by name, as {"id": "Words-v0"} (optional)
    options       the options of `reset` (optional)
    instruction   a text before the first observation (optional)
    action        `text`, or `number` for a discrete space (optional; text)
    outcome       what of the rewards is the outcome: `sum`, or `last`, that of the step that ended
                  the episode (optional; sum)
    solved        the reward from which on the task is solved, as 195 for CartPole: the outcome is
                  divided by it (optional; 1)

Whoever writes the tasks says which code runs. An environment lives in a thread of its own. A step
that never ends cannot be ended; use the environment `command` for such.

The reward of a step that does not end the episode is the step's process reward. Gymnasium itself is
not imported, unless `make` does so.
"""

from __future__ import annotations

import asyncio
import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

from nextstate.errors import ConfigError, RolloutError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.long_texts import beginning_of
from plugins.environments.solved_at import solved_at

_FIELDS = {
    "make": str,
    "arguments": dict,
    "options": dict,
    "instruction": str,
    "action": str,
    "outcome": str,
    "solved": object,
}
_CHOICES = {"action": ("text", "number"), "outcome": ("sum", "last")}
_MOST_DIGITS = 18
T = TypeVar("T")


class GymEnvironment(Protocol):
    """What `make` returns."""

    def reset(self, *, seed: int | None = None, options: Json | None = None) -> Any: ...

    def step(self, action: Any) -> Any: ...


class Gym:
    """One episode."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "gym")
        self._environment: GymEnvironment | None = None
        self._rewards: list[float] = []
        self._last = 0.0
        """The reward of the step that ended the episode."""

    async def reset(self, task: Json, seed: int) -> str:
        self._task = task

        def begin() -> object:
            made: GymEnvironment = _factory(task["make"])(**task.get("arguments", {}))
            self._environment = made
            return made.reset(seed=seed, options=task.get("options"))

        found = await self._call(begin)
        if isinstance(found, tuple):  # with an info
            found = cast("tuple[object, ...]", found)[0]
        return "\n\n".join(filter(None, (task.get("instruction"), _text(found))))

    async def step(self, action: str) -> Acted:
        environment = self._environment
        assert environment is not None
        given: str | int = action.strip()
        if self._task.get("action") == "number":
            if not given.removeprefix("-").isdecimal() or len(given) > _MOST_DIGITS:
                return Acted("Expected a whole number, and nothing else.", -1.0, False)
            given = int(given)
        found: object = await self._call(lambda: environment.step(given))
        values: list[Any] = [*cast("tuple[Any, ...]", found)] if isinstance(found, tuple) else []
        if len(values) not in (4, 5):
            raise RolloutError(
                f"step returned {type(cast(object, found)).__name__}: expected (observation, "
                "reward, terminated, truncated, info)"
            )
        observation, given_reward, *ends, _ = values
        reward = float(given_reward)
        if not math.isfinite(reward):
            raise RolloutError(f"step returned the reward {reward}: expected a finite number")
        self._rewards.append(reward)
        done = any(map(bool, ends))
        self._last = reward if done else 0.0
        return Acted(_text(observation), None if done else reward, done)

    async def score(self) -> Scored:
        of_all = self._task.get("outcome") != "last"
        found = math.fsum(self._rewards) if of_all else self._last
        return Scored(found / solved_at(self._task))

    async def close(self) -> None:
        environment = self._environment
        try:
            end: Callable[[], object] | None = getattr(environment, "close", None)
            if end is not None:
                await self._call(end)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _call(self, work: Callable[[], T]) -> T:
        """Runs code of the environment in its thread. Raises RolloutError for all it raises."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (ConfigError, RolloutError):
            raise
        except Exception as error:
            raise RolloutError(f"the environment raised {type(error).__name__}: {error}") from error


class GymKind:
    """Makes environments as tasks name them."""

    def check_task(self, task: Json) -> None:
        for name, value in task.items():
            if name not in _FIELDS:
                raise ConfigError(f"unknown field {name!r:.80}: known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[name]):
                kind = "an object" if _FIELDS[name] is dict else "a text"
                raise ConfigError(f"{name} = {value!r:.80}: expected {kind}")
        for name, choices in _CHOICES.items():
            if task.get(name, choices[0]) not in choices:
                raise ConfigError(f"{name} = {task[name]!r:.80}: expected {' or '.join(choices)}")
        solved_at(task)
        _factory(task.get("make", ""))

    async def check_machine(self) -> None:
        """What is missing is told with the task that needs it."""

    def make(self) -> Gym:
        return Gym()


def create(settings: object) -> GymKind:
    return GymKind()


def _factory(name: str) -> Callable[..., GymEnvironment]:
    """What a task's `make` names. Raises ConfigError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"make = {name!r:.80}: expected module:function, as gymnasium:make")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"make = {name!r:.80}: {error}") from error
    found: object = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"make = {name!r:.80}: {module_name} has no function {attribute!r}")
    return cast("Callable[..., GymEnvironment]", found)


def _text(observation: object) -> str:
    """An observation as the agent sees it."""
    return beginning_of(observation if isinstance(observation, str) else str(observation))
