"""What a plugin may be, as protocols, with the loader that finds one by its configured name.

A name such as `rules` means the module `plugins.<group>.rules`; a dotted name with a colon
(`my_package.module:create`) reaches a plugin that lives outside this repository. Either way the
module offers `create(settings)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from nextstate.errors import PluginError
from nextstate.records import Json, NextState, Source, TurnKind, Vote

_ATTACHED = ("image", "audio", "video", "file", "document")
"""Stand in the type of a part that has no text: `image_url`, `input_audio`."""


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
    """What the user said when the task ended that this reply was an earlier step of."""


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """What a judge plugin may use; secrets are passed as values, never looked up by plugins."""

    model: str = ""
    """The judge's model: the engine's base model, or a litellm model name."""
    base_url: str = ""
    """An OpenAI-compatible address ending in /v1, where the kind needs one."""
    api_key: str | None = None
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.6
    extra: Json = field(default_factory=dict[str, Any])


class JudgeKind(Protocol):
    """One way to vote on a turn."""

    name: str
    deterministic: bool
    """True when asking twice gives the same vote: then one vote is asked for, not m."""

    async def vote(self, evidence: Evidence, seed: int) -> Vote:
        """One independent vote; raises JudgeError when there is no parseable answer."""
        ...

    async def close(self) -> None:
        """Releases connections."""
        ...


class Heard(NamedTuple):
    """What one message of a request says, and who says it."""

    source: Source
    text: str
    """A person's is stripped of the agent's envelope, a tool's is exact."""


class AgentProfile(Protocol):
    """What is known about one agent's envelope around human text."""

    name: str

    def of(self, request: Json) -> AgentProfile:
        """The profile of the agent that sent `request`: itself, unless it knows several.

        It depends on the request alone, so that the judge finds the one that the proxy found.
        """
        ...

    def kind(self, request: Json) -> TurnKind:
        """Whether the request is the agent's own work or its housekeeping."""
        ...

    def session(self, name: str) -> str:
        """The client's name for a session, without what changes while the conversation goes on."""
        ...

    def heard(self, message: Json) -> Heard | None:
        """What a person, a tool or the environment said in a message that is no reply.

        None for what the agent wrote itself. A role does not tell: agents put their own notes and
        what they observed into the user role.
        """
        ...


def load_judge(kinds: Sequence[str], settings: JudgeSettings) -> JudgeKind:
    """The judge of one name, or the chain of several. Raises PluginError and JudgeError."""
    judges = [cast(JudgeKind, load_plugin("judges", name, settings)) for name in kinds]
    return judges[0] if len(judges) == 1 else load_plugin("judges", "chain", judges)


def text_of(content: object) -> str:
    """The plain text of a message's content, given as a string or as a list of parts.

    Lone surrogates, which JSON can hold and no encoding, are question marks in it.
    """
    if isinstance(content, str):
        return content.encode(errors="replace").decode()
    if isinstance(content, list):
        parts = cast(Sequence[object], content)
        texts = [cast(Json, p).get("text", "") for p in parts if isinstance(p, dict)]
        return text_of("\n".join(t for t in texts if isinstance(t, str) and t))
    return ""


def attached(content: object) -> Heard | None:
    """What a person sent without a word: the kinds of its parts, such as `[image]`."""
    parts: Sequence[object] = cast(Sequence[object], content) if isinstance(content, list) else ()
    kinds = [str(cast(Json, part).get("type")) for part in parts if isinstance(part, dict)]
    if not kinds or text_of(cast(object, content)).strip():
        return None
    found = [name for kind in kinds for name in _ATTACHED if name in kind]
    return Heard(Source.USER, " ".join(f"[{name}]" for name in found)) if found else None


def is_wordless(text: str) -> bool:
    """Whether a next state says only that something was attached.

    >>> is_wordless("[image] [file]"), is_wordless("[image] is wrong")
    (True, False)
    """
    return bool(text) and all(word[1:-1] in _ATTACHED for word in text.split())


def load_plugin(group: str, name: str, settings: object) -> Any:
    """Creates the plugin `name` of `group` (`agents`, `judges`). Raises PluginError."""
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
