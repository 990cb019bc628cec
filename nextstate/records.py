"""The four records of the pipeline: Turn → NextState → Verdict → Sample.

All are frozen and check themselves. A constructor raises RecordError if a per-token list is not as
long as `completion_ids`: nothing is padded or cut to fit. Unknown is `None`, never 0.0.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from nextstate.errors import RecordError
from nextstate.redaction import Redactor
from nextstate.sampling import PLAIN, Sampling

Json = dict[str, Any]
"""A JSON object as it stood on the wire: unknown fields survive."""

MAIN_LINEAGE = "main"
FEEDBACK = "feedback"
"""The judge's name in a verdict that a person gave."""
MAX_HINT_CHARS, MAX_COMMENT_CHARS = 1000, 4000
"""Limits of a person's feedback; the hint goes into the teacher's prompt."""
BASE_VERSION = 0
"""The base model without an adapter is version 0 of every lineage."""
_NAME_DIGITS = 16
"""How many digits of an adapter's hash its name holds."""
_MOST_LOGPROB = 1e-6
_ADAPTER = re.compile(rf"\A.+-v\d{{6}}(-[0-9a-f]{{{_NAME_DIGITS}}})?")


class TurnKind(StrEnum):
    """Whether a turn is the agent's own work or its housekeeping."""

    MAIN = "main"
    """May train."""
    SIDE = "side"
    """Titles, compaction, memory flushes, heartbeats: kept, never judged or trained."""
    IMPORTED = "imported"
    """A conversation from elsewhere: kept and exported, never judged or trained."""


class Source(StrEnum):
    """Where a next state came from, most trusted first."""

    FEEDBACK = "feedback"
    USER = "user"
    ENVIRONMENT = "environment"
    TOOL = "tool"


TRUST: Mapping[Source, float] = {
    Source.FEEDBACK: 1.0,
    Source.USER: 0.9,
    Source.ENVIRONMENT: 0.6,
    Source.TOOL: 0.4,
}
"""Default trust in each source, in [0, 1]: tools carry text that strangers wrote."""


class SampleState(StrEnum):
    """Where a judged turn stands on its way into an adapter."""

    WAITING = "waiting"
    """A step of an episode: it is ready once its group is settled."""
    READY = "ready"
    LEASED = "leased"
    TRAINED = "trained"
    DROPPED = "dropped"
    HELD = "held"
    """Never trained on: new versions are checked on it."""


class VersionState(StrEnum):
    """Where a policy version stands."""

    CANDIDATE = "candidate"
    SERVING = "serving"
    RETIRED = "retired"
    REJECTED = "rejected"


class Timings(NamedTuple):
    """Wall-clock facts about one turn. A tuple, because it is pickled with each turn."""

    started_at: float
    """Unix time in seconds when the request arrived."""
    first_token_s: float | None
    """Seconds to the first event of the reply; None if the reply never started."""
    total_s: float
    """Seconds to the reply's end."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and its reply."""

    id: str
    session: str
    index: int
    """Position in the session, from 0."""
    kind: TurnKind
    lineage: str
    policy_version: int | None
    """The version that the engine says it served; None if it named a model that is not ours."""
    client_model: str
    """The model name that the client sent."""
    request: Json
    """The client's own request body, without what NextState added."""
    reply: Json
    """The assistant message, as the client received it."""
    finish_reason: str | None
    prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...] | None
    behaviour_logprobs: tuple[float, ...] | None
    """Natural logarithms of the probabilities at sampling, one per completion token."""
    sampling: Json
    """The sampling settings that the client sent. `defaults` has the engine's own for the others,
    without those that change nothing; `Sampling.read` gives what held."""
    timings: Timings
    untrainable: str | None = None
    """Why this turn must not train; None when token integrity holds."""
    parent: str | None = None
    """The turn whose reply this request continues."""
    episode: str | None = None
    """The episode that it is a step of; None for people's turns."""
    step: int | None = None
    """Position in the episode, from 0; None without an episode."""
    client: str = ""
    """The key that sent it; empty: one that may do everything, or none was needed."""
    engine: str | None = None
    """Which of the engines answered: what the supervisor calls it, or its host and port; None for
    turns that were recorded before that was kept, and for imported ones."""

    def __post_init__(self) -> None:
        if (self.episode is None) != (self.step is None):
            raise RecordError(f"turn {self.id}: episode {self.episode!r} with step {self.step}")
        if self.index < 0:
            raise RecordError(f"turn {self.id}: index is {self.index}, expected 0 or more")
        if self.behaviour_logprobs is not None:
            ids = len(self.completion_ids) if self.completion_ids is not None else None
            if ids != len(self.behaviour_logprobs):
                raise RecordError(
                    f"turn {self.id}: {len(self.behaviour_logprobs)} behaviour log-probs for "
                    f"{ids} completion ids"
                )
            if not (
                _are_finite(self.behaviour_logprobs)
                and max(self.behaviour_logprobs, default=0.0) <= _MOST_LOGPROB
            ):
                wrong = next(
                    v for v in self.behaviour_logprobs if not -math.inf < v <= _MOST_LOGPROB
                )
                raise RecordError(f"turn {self.id}: {wrong} is not a log-probability")
        if self.untrainable is None and not (
            self.prompt_ids and self.completion_ids and self.behaviour_logprobs
        ):
            raise RecordError(f"turn {self.id}: trainable without ids and log-probs")

    @property
    def trainable(self) -> bool:
        """True if ids, log-probs and usage agree exactly."""
        return self.untrainable is None


@dataclass(frozen=True, slots=True)
class NextState:
    """One message that followed a turn's reply."""

    turn: str
    source: Source
    text: str
    trust: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.trust <= 1.0:
            raise RecordError(f"next state of {self.turn}: trust {self.trust} is not in [0, 1]")


@dataclass(frozen=True, slots=True)
class Vote:
    """One judge's opinion of one turn."""

    score: int
    """+1, 0 or -1."""
    hint: str | None = None
    """What the next state says should have been done, in 1 to 3 sentences."""
    sure: bool = True
    """False if the judge found no evidence: then the next judge of a chain is asked."""
    tokens: int = 0
    """Prompt and completion tokens that the vote cost; 0 for a judge without a model."""
    written: int = 0
    """The completion tokens among them."""
    judge: str = ""
    """Which judge of a chain gave it; empty if there is only one."""

    def __post_init__(self) -> None:
        if self.score not in (-1, 0, 1):
            raise RecordError(f"a vote's score is -1, 0 or 1, not {self.score!r}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the votes about one turn, or a person's decision."""

    turn: str
    votes: tuple[int, ...]
    score: int
    judge: str
    """The judge that voted, of a chain its member, or `feedback` when a person decided."""
    hint: str | None = None
    hinted_prompt_ids: tuple[int, ...] | None = None
    """The turn's prompt with the hint, as the engine rendered it."""

    def __post_init__(self) -> None:
        if self.score not in (-1, 0, 1):
            raise RecordError(f"verdict of {self.turn}: score {self.score!r} is not -1, 0 or 1")
        if self.hinted_prompt_ids is not None and not self.hint:
            raise RecordError(f"verdict of {self.turn}: a hinted prompt without a hint")


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a person said about one turn: it overrides votes."""

    turn: str
    score: int
    """+1, 0 or -1."""
    hint: str | None = None
    """What should have been done; it goes into the teacher's prompt."""
    comment: str | None = None
    """For people to read: nothing trains on it."""

    def without_secrets(self, redactor: Redactor) -> Feedback:
        """The same with placeholders for secrets in its texts."""
        hint = redactor.comment(self.hint, MAX_HINT_CHARS)
        comment = redactor.comment(self.comment, MAX_COMMENT_CHARS)
        return replace(self, hint=hint, comment=comment)

    def __post_init__(self) -> None:
        if type(self.score) is not int or self.score not in (-1, 0, 1):
            raise RecordError(f"score = {self.score!r:.80}: expected 1, 0 or -1")
        texts = (("hint", self.hint, MAX_HINT_CHARS), ("comment", self.comment, MAX_COMMENT_CHARS))
        for name, text, most in texts:
            if text is None:
                continue
            if not text.strip():
                raise RecordError(f"{name} = {text!r:.80} says nothing: leave it out")
            if len(text) > most:
                raise RecordError(
                    f"{name} has {len(text)} characters: expected at most {most}; shorten it"
                )
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise RecordError(f"{name} = {text!r:.80} is not valid Unicode: type it anew")


@dataclass(frozen=True, slots=True)
class Sample:
    """A judged turn as the learner takes it: token lists and the two signals."""

    turn: str
    session: str
    policy_version: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    score: int
    hinted_prompt_ids: tuple[int, ...] | None
    sampling: Sampling = PLAIN
    """What the tokens were drawn with."""
    advantage: float | None = None
    """Of a step of an episode, within its group; `score` is its sign. None for people's turns."""
    outcome: float | None = None
    """Of the step's episode; None for people's turns."""

    @property
    def credit(self) -> float:
        """How much more likely the reply should become: its advantage, or else its score."""
        return float(self.score) if self.advantage is None else self.advantage

    @property
    def quality(self) -> float:
        """How good it was, from -1 to 1: its episode's outcome, or else its score."""
        return float(self.score) if self.outcome is None else min(max(self.outcome, -1.0), 1.0)

    def __post_init__(self) -> None:
        if self.advantage is not None and not math.isfinite(self.advantage):
            raise RecordError(f"sample {self.turn}: advantage is {self.advantage}")
        if len(self.completion_ids) != len(self.behaviour_logprobs):
            raise RecordError(
                f"sample {self.turn}: {len(self.behaviour_logprobs)} behaviour log-probs for "
                f"{len(self.completion_ids)} completion ids"
            )
        if not self.prompt_ids or not self.completion_ids:
            raise RecordError(f"sample {self.turn}: an empty prompt or completion cannot train")


@dataclass(frozen=True, slots=True)
class JudgedTurn:
    """What the watch needs of a turn with a verdict."""

    session: str
    version: int
    """The policy version that served it."""
    score: int
    judge: str = ""
    """Who gave the verdict."""
    client: str = ""
    """The key that decided it; empty: whoever is not limited (`nextstate/store/shares.py`)."""


WATCHED_TURNS = 1040
"""Newest judged turns of a lineage that the watch looks at, and that retention keeps."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A person has paused a lineage: it takes no batch until a person resumes it."""

    by: str
    """Their name on this machine."""
    at: float
    """Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """What people have decided about a lineage: `nextstate rollback`, `pause` and `resume`."""

    choices: int = 0
    """How often a person has put a version into service."""
    after: int = -1
    """The newest version when the last one was made; what was before it is accepted. -1: none."""
    pinned: frozenset[int] = frozenset()
    """The versions that a person has put into service."""
    pause: Pause | None = None
    """Set while a person has paused it. A rollback does not end that."""


WHOLE_MODEL = "weights/all"
"""The metric of a version that holds all weights of its model: how many they are."""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One adapter or whole model in a lineage's chain; number 0 is the base."""

    lineage: str
    number: int
    parent: int | None
    path: str | None
    """The adapter's folder; None for the base, and once the folder was deleted to make room."""
    sha256: str | None
    """Of its folder (`folder_sha256`); None for the base and for what the gate rejected."""
    samples: int
    """How many samples its update used."""
    state: VersionState
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    reason: str | None = None
    """Why it was rejected or retired; None if no reason was given."""

    @property
    def can_serve(self) -> bool:
        """True for the base and for a version whose adapter is kept."""
        return self.number == BASE_VERSION or self.path is not None

    @property
    def is_whole_model(self) -> bool:
        """Whether its folder holds all weights of the model instead of an adapter."""
        return WHOLE_MODEL in self.metrics

    @property
    def adapter_name(self) -> str | None:
        """The name under which vLLM serves it, new for each version; None without an adapter.

        It ends in a part of the weights' hash, so that nobody can load another adapter under the
        name before.
        """
        if self.number == BASE_VERSION or self.sha256 is None:
            return None
        return f"{self.lineage}-v{self.number:06d}-{self.sha256[:_NAME_DIGITS]}"


def names_adapter(model: str) -> bool:
    """True if a model's name has the form of a version's adapter, with or without a hash.

    >>> names_adapter("main-v000012-0123456789abcdef"), names_adapter("main-v000012")
    (True, True)
    >>> names_adapter("main"), names_adapter("qwen-v2")
    (False, False)
    """
    return _ADAPTER.fullmatch(model) is not None


def new_id(what: str) -> str:
    """A unique name such as `turn_…`; later names sort after earlier ones.

    48 bits of milliseconds and 32 random bits, as 20 hexadecimal digits. New names in sorted order
    go to the end of the store's index, which is faster than random places.
    """
    return f"{what}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(4)}"


def _are_finite(values: Sequence[float]) -> bool:
    """What is not finite makes the sum so too, which is faster than a look at each value."""
    return math.isfinite(sum(values)) or all(map(math.isfinite, values))


def majority(scores: Sequence[int]) -> int:
    """The score with the most votes; a tie is 0.

    >>> majority([1, 1, -1]), majority([1, -1]), majority([1, 0, -1])
    (1, 0, 0)
    """
    counts = {score: scores.count(score) for score in (-1, 0, 1)}
    best = max(counts.values())
    winners = [score for score, count in counts.items() if count == best]
    return winners[0] if len(winners) == 1 else 0
