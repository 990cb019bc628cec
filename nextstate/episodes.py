"""The records of environments: an episode, one attempt at a task, and its rewards.

Both are frozen and check themselves. A constructor raises RecordError that names value and
expectation. Unknown is `None`, never 0.0.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from nextstate.errors import RecordError
from nextstate.records import Json

MOST_REWARDS = 10_000
"""Of an episode: while they are written, no turn is recorded."""
SOLVED = 1.0
"""An outcome of at least this counts as solved, as in judge/advantages.py."""
FAMILY = 50
"""Outcomes of a task family that the running mean for an episode alone is taken over."""
MAX_TASK_CHARS = 200_000
LABEL = "^[A-Za-z0-9][A-Za-z0-9._:~+-]{0,99}$"
"""What names an episode, group, environment or reward."""
_LABEL = re.compile(LABEL)
_NUMBER = re.compile(r"(?:[-._](?:train|eval))?[-._]\d{1,20}$")
_MOST_SEED, _MOST_BUDGET = 1 << 63, 1 << 31
SAMPLER: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "top_k": (-1, 1 << 20),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-6, 2),
}
"""What an episode may set of the sampler, with the least and the most of each."""
LEFT_OUT = (*SAMPLER, "seed", "logit_bias", "min_tokens", "tool_choice")
"""What of an agent's request an episode may have left out. With one seed the attempts of a group
are all alike; the last two change the sampler so that the turn cannot train."""


class Split(StrEnum):
    """What the episodes of a task are for."""

    TRAIN = "train"
    EVAL = "eval"
    """Its turns never train: versions are compared on it."""


class EpisodeState(StrEnum):
    """Where an episode stands on its way into an adapter."""

    OPEN = "open"
    CLOSED = "closed"
    SETTLED = "settled"
    """Its turns have got their advantages."""
    DROPPED = "dropped"
    """It never trains, and its group is compared without it."""


class EpisodeStatus(StrEnum):
    """How an episode ended."""

    DONE = "done"
    TRUNCATED = "truncated"
    """It was stopped at a budget; what it reached counts."""
    FAILED = "failed"
    """The environment or the engine broke: that says nothing about the policy."""
    ABORTED = "aborted"
    """Its runner gave it up."""


NEVER_TRAIN = (EpisodeStatus.FAILED, EpisodeStatus.ABORTED)
"""An episode that ended so is dropped."""


class RewardKind(StrEnum):
    """What a reward is about."""

    OUTCOME = "outcome"
    """The whole episode."""
    PROCESS = "process"
    """One step."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One attempt at a task of an environment. A retry is another episode."""

    id: str
    lineage: str
    environment: str
    """Its name."""
    task: str
    """The task as the environment wrote it: a text, or an id of its own."""
    group: str | None = None
    """The group of episodes that it is compared with; None: it is alone."""
    split: Split = Split.TRAIN
    seed: int | None = None
    max_calls: int | None = None
    """How often it may call the model; None: without a bound, as the two below."""
    max_tokens: int | None = None
    """How many tokens its replies may have together."""
    deadline_s: float | None = None
    """Seconds from its opening after which no call begins."""
    version: int | None = None
    """The policy version that shall serve it; None: the one that serves its lineage."""
    sampling: Mapping[str, float | None] = field(default_factory=dict[str, float | None])
    """Sampling settings that take the place of the client's; None: the client's is left out."""
    metadata: Json = field(default_factory=dict[str, Any])
    state: EpisodeState = EpisodeState.OPEN
    status: EpisodeStatus | None = None
    """How it ended; None while it is open."""
    outcome: float | None = None
    """None while it is open, and if nobody said how well it ended."""
    opened_at: float = 0.0
    """Unix time in seconds."""
    closed_at: float | None = None
    version_min: int | None = None
    """The oldest policy version that served one of its turns; None before the first."""
    version_max: int | None = None
    calls: int = 0
    """Calls that began."""
    tokens: int = 0
    """Of its recorded replies."""
    reason: str | None = None
    """Why it was dropped."""

    def __post_init__(self) -> None:
        for name in ("id", "environment", "group"):
            if (label := getattr(self, name)) is not None:
                check_label("episode" if name == "id" else name, label)
        if not self.task.strip() or len(self.task) > MAX_TASK_CHARS:
            raise RecordError(
                f"task has {len(self.task)} characters: expected a text of at most {MAX_TASK_CHARS}"
            )
        if self.seed is not None and not -_MOST_SEED <= self.seed < _MOST_SEED:
            raise RecordError(f"seed = {self.seed!s:.80}: expected a number of 64 bits")
        if self.version is not None and not 0 <= self.version < _MOST_BUDGET:
            raise RecordError(f"version = {self.version!s:.80}: expected the number of a version")
        for name in ("max_calls", "max_tokens", "deadline_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < _MOST_BUDGET:
                raise RecordError(f"{name} = {value!s:.80}: expected more than 0, below 2^31")
        for name, value in self.sampling.items():
            least, most = SAMPLER.get(name, (math.nan, math.nan))
            if value is None:
                fits = name in LEFT_OUT
            else:
                fits = type(value) in (int, float) and least <= value <= most
            if not fits:
                known = ", ".join(SAMPLER)
                expected = f"{least:g} to {most:g}" if name in SAMPLER else f"one of {known}"
                expected = "null" if name in LEFT_OUT and name not in SAMPLER else expected
                raise RecordError(f"sampling.{name:.80} = {value!s:.80}: expected {expected}")
        if self.outcome is not None:
            check_finite("outcome", self.outcome)

    @property
    def task_key(self) -> str:
        """32 hexadecimal digits that are the same for every attempt at the task."""
        return self._key(self.task)

    @property
    def family_key(self) -> str:
        """32 hexadecimal digits that are the same for all tasks of a family.

        The tasks of an environment that are no ids of a family are one family.
        """
        family = family_of(self.task) if is_label(self.task) else self.task
        return self._key("" if family == self.task else family)

    def _key(self, name: str) -> str:
        text = f"{self.environment}\0{name}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Reward:
    """One number about an episode or one of its steps; the last word counts per name and step."""

    episode: str
    name: str
    kind: RewardKind
    value: float
    turn: str | None = None
    """The turn of a process reward; None for an outcome."""
    source: str | None = None
    """Who gave it, such as a verifier's name; None if nobody said."""

    def __post_init__(self) -> None:
        check_label("name", self.name)
        if self.source is not None:
            check_label("source", self.source)
        check_finite("value", self.value)
        if (self.kind is RewardKind.PROCESS) != (self.turn is not None):
            named = "names its turn or index" if self.turn is None else "is of the whole episode"
            raise RecordError(f"kind = {self.kind.value!r}: a reward of this kind {named}")


def family_of(name: str) -> str:
    """The family of a task: its id without its number and its split.

    >>> family_of("add-up-train-12"), family_of("count-1"), family_of("hello")
    ('add-up', 'count', 'hello')
    """
    return _NUMBER.sub("", name) or name


def is_label(name: str) -> bool:
    """Whether it can name an episode, group, environment or reward."""
    return _LABEL.fullmatch(name) is not None


def check_label(what: str, label: str) -> None:
    """Raises RecordError unless it can name an episode, group, environment or reward."""
    if not is_label(label):
        raise RecordError(
            f"{what} = {label!r:.120}: expected 1 to 100 letters, digits and . _ : ~ + -, "
            "beginning with a letter or digit"
        )


def check_finite(what: str, value: float) -> None:
    """Raises RecordError for NaN and infinities."""
    if not math.isfinite(value):
        raise RecordError(f"{what} = {value}: expected a finite number; leave out what is unknown")
