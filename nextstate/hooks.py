"""The protocols of plugins, and the loader that finds a plugin by its configured name.

A name such as `rules` means `create(settings)` of the module `plugins.<group>.rules`.
A name with a colon (`my_package.module:create`) names a function outside this repository.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from nextstate.errors import PluginError
from nextstate.records import Json, NextState, Source, TurnKind, Vote

_ATTACHED = ("image", "audio", "video", "file", "document")
"""One of these stands in the type of a part without text: `image_url`, `input_audio`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a judge sees of one turn; every text is untrusted."""

    tail: tuple[tuple[str, str], ...]
    """The last messages of the request as (role, text)."""
    reply: str
    """The assistant's text with its tool calls written out."""
    next_states: tuple[NextState, ...]
    """What came right after the reply."""
    later: tuple[NextState, ...] = ()
    """What the user said at the end of the task, if this reply was an earlier step of it."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Makes probabilities of a model's log-probs of scores: those less `bias`, by `temperature`."""

    temperature: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """By score: how much the model favours it whatever it reads, in nats."""


@dataclass(frozen=True, slots=True)
class TrainedJudge:
    """An adapter of the base model that was trained to vote."""

    name: str
    """The judge's name in its votes."""
    model: str
    """The model name under which the engine serves it."""
    calibration: Calibration
    load: Callable[[], Awaitable[None]]
    """Has the engine load it. Raises JudgeError."""


def _untrained() -> None:
    return None


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """What a judge plugin may use. Secrets come as values; a plugin never looks them up."""

    model: str = ""
    """The judge's model: the engine's base model, or a litellm model name."""
    base_url: str = ""
    """An OpenAI-compatible address ending in /v1, where the kind needs one."""
    api_key: str | None = None
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.6
    extra: Json = field(default_factory=dict[str, Any])
    hints: bool = True
    """Whether anything learns from hints. If not, a model need not be asked for them."""
    trained: Callable[[], TrainedJudge | None] = _untrained
    """The newest judge that was trained on the engine's base model, if there is one."""
    further_urls: tuple[str, ...] = ()
    """Servers of the same model beside it: each is asked in turn, and one that is down left out."""


class JudgeKind(Protocol):
    """One way to vote on a turn."""

    name: str

    @property
    def deterministic(self) -> bool:
        """True if two votes on the same evidence are equal: then one vote is asked for."""
        ...

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """One independent vote. Raises JudgeError when the answer is not readable."""
        ...

    async def close(self) -> None:
        """Releases connections."""
        ...


class Utterance(NamedTuple):
    """What one message of a request says, and who says it."""

    source: Source
    text: str
    """A person's words without the agent's envelope; a tool's output unchanged."""


class AgentProfile(Protocol):
    """What is known about one agent's envelope around a person's words."""

    name: str

    def for_request(self, request: Json) -> AgentProfile:
        """The profile of the agent that sent `request`; a profile of one agent returns itself.

        Only the request decides, so the judge finds the same profile as the proxy.
        """
        ...

    def kind(self, request: Json) -> TurnKind:
        """Whether the request is a main turn or the agent's housekeeping."""
        ...

    def session(self, name: str) -> str:
        """The client's name of a session without what changes while the conversation goes on."""
        ...

    def utterance(self, message: Json) -> Utterance | None:
        """What a person, a tool or the environment said in a message that is not a reply.

        None where the agent wrote it. The role does not decide: agents write their own notes and
        observations into the user role.
        """
        ...


@dataclass(frozen=True, slots=True)
class Acted:
    """What an environment answers to one action."""

    observation: str
    """What the agent sees next."""
    reward: float | None
    """What the step is worth, as a process reward; None: the environment does not say."""
    done: bool
    """Whether the agent has ended the episode."""


@dataclass(frozen=True, slots=True)
class Scored:
    """How well an episode ended."""

    outcome: float
    """At least 1: the task is solved."""
    observation: str = ""
    """What the check showed, from which hints may be made; it may be empty."""
    steps: Mapping[int | str, float] = field(default_factory=dict[int | str, float])
    """Process rewards where these become known only at the end: by step, from 0, or by turn."""


@dataclass(frozen=True, slots=True)
class ModelAccess:
    """How an agent's program calls the model as one episode."""

    base_url: str
    """It ends in /v1."""
    api_key: str
    model: str
    deadline_s: float
    """How long the program may run."""


class Environment(Protocol):
    """What one episode acts in. Every method raises RolloutError if the environment breaks.

    A mistake of the agent is no such error: the observation tells of it.
    """

    async def reset(self, task: Json, seed: int) -> str:
        """Begins the task, which `check_task` has passed; returns the first observation.

        The episodes of a group have the same seed, so that they begin alike.
        """
        ...

    async def step(self, action: str) -> Acted:
        """Takes the text of one reply, which is hostile."""
        ...

    async def score(self) -> Scored:
        """Called once after the last step, also when the episode was cut at a budget."""
        ...

    async def close(self) -> None:
        """Releases everything; called once in every case, also without a reset."""
        ...


@runtime_checkable
class AgentProgram(Protocol):
    """One episode of an agent that calls the model itself. Every method raises RolloutError if
    something other than the agent breaks."""

    async def play(self, task: Json, seed: int, access: ModelAccess) -> str:
        """Runs the agent until it ends; returns what it said last. A deadline cancels it.

        Raises LateError with what it said last if it was ended at the deadline by itself.
        """
        ...

    async def score(self) -> Scored:
        """Called once after `play`, also when that was cut at the deadline."""
        ...

    async def close(self) -> None:
        """Releases everything; called once in every case, also without a `play`."""
        ...


@runtime_checkable
class Pictured(Protocol):
    """An environment that a person can look at."""

    async def picture(self) -> bytes | None:
        """What the agent sees now, as a JPEG; None: there is nothing to be seen."""
        ...


class EnvironmentKind(Protocol):
    """One kind of environment, from which each episode gets its own."""

    def check_task(self, task: Json) -> None:
        """Checks the fields of a task. Raises ConfigError that names the field."""
        ...

    async def check_machine(self) -> None:
        """Raises StartError if this machine lacks what the environment needs."""
        ...

    def make(self) -> Environment | AgentProgram: ...


@runtime_checkable
class GeneratesTasks(Protocol):
    """A kind of environment that makes tasks too."""

    def generate(self, split: str, number: int) -> Json:
        """Task number N of the split `train` or `eval`, from 0 on: `id`, `split`, and its fields.

        Always the same for these two. What is `eval` differs from all that is `train`, and
        families take turns.
        """
        ...


@runtime_checkable
class Shared(Protocol):
    """A kind whose environments share something, such as browsers."""

    async def release(self) -> None:
        """Releases what was shared; called when no episode runs. It may be used again."""
        ...


def load_judge(kinds: Sequence[str], settings: JudgeSettings) -> JudgeKind:
    """The judge of one name, or a chain of several. Raises PluginError and JudgeError."""
    judges = [cast(JudgeKind, load_plugin("judges", name, settings)) for name in kinds]
    return judges[0] if len(judges) == 1 else load_plugin("judges", "chain", judges)


def text_of(content: object) -> str:
    """The plain text of a message's content: a string, or a list of parts and of strings.

    JSON can contain lone surrogates, but no encoding can; they become question marks.
    """
    if isinstance(content, str):
        return content if content.isascii() else content.encode(errors="replace").decode()
    if isinstance(content, list):
        parts = cast(Sequence[object], content)
        texts = [cast(Json, p).get("text", "") if isinstance(p, dict) else p for p in parts]
        return text_of("\n".join(t for t in texts if isinstance(t, str) and t))
    return ""


def attached(content: object, source: Source) -> Utterance | None:
    """The kinds of the parts of a message that are no texts, such as `[image]`.

    They say something where its texts say nothing, for a person wrote none of them.
    """
    parts: Sequence[object] = cast(Sequence[object], content) if isinstance(content, list) else ()
    found = [cast(Json, part) for part in parts if isinstance(part, dict)]
    kinds = [str(part.get("type") or [*part]) for part in found]  # vLLM needs no type
    names = [name for kind in kinds for name in _ATTACHED if name in kind]
    return Utterance(source, " ".join(f"[{name}]" for name in names)) if names else None


def is_wordless(text: str) -> bool:
    """Whether a next state only names what was attached.

    >>> is_wordless("[image] [file]"), is_wordless("[image] is wrong")
    (True, False)
    """
    return bool(text) and all(word[1:-1] in _ATTACHED for word in text.split())


def load_plugin(group: str, name: str, settings: object) -> Any:
    """Creates the plugin `name` of a folder `group` in plugins/. Raises PluginError."""
    module_name, _, attribute = name.partition(":")
    if not attribute:
        module_name, attribute = f"plugins.{group}.{name}", "create"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise PluginError(
                f"plugin {name!r} needs the package {error.name!r}, which is not installed: "
                "run `make env`"
            ) from error
        raise PluginError(
            f"there is no plugin {name!r} in plugins/{group}/: name a file of that folder or "
            "a `module:function` on the Python path"
        ) from error
    create = cast("Callable[[object], Any] | None", getattr(module, attribute, None))
    if create is None:
        raise PluginError(f"plugin {name!r}: {module_name} has no function {attribute!r}")
    return create(settings)
