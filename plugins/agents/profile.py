"""The profile of an agent, made from its marks: what a message says, and who says it.

Every scan is linear: each step cuts a block off an end of the text, or the loop stops.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast

from nextstate.hooks import AgentProfile, Utterance, text_of
from nextstate.records import Json, Source, TurnKind
from plugins.agents.envelopes.known import AGENTS, without_files
from plugins.agents.envelopes.shape import Agent
from plugins.agents.machine import is_tagged, is_typed, source_of

GENERIC = Agent("generic")


class _Marks:
    """Texts with which another one may begin. Only those with its first characters are compared."""

    def __init__(self, marks: Iterable[str]) -> None:
        every = tuple(marks)
        self._size = min(map(len, every))
        self._by_start: dict[str, tuple[str, ...]] = {}
        for mark in every:
            start = mark[: self._size]
            self._by_start[start] = (*self._by_start.get(start, ()), mark)

    def begin(self, text: str) -> str | None:
        """The first of the marks with which `text` begins."""
        for mark in self._by_start.get(text[: self._size], ()):
            if text.startswith(mark):
                return mark
        return None


_PREFIXES = _Marks(mark for agent in AGENTS for mark in agent.prefixes)
_FIRST_WORDS = _Marks(mark for agent in AGENTS for mark in agent.first_words)
_HOUSEKEEPING = _Marks(mark for agent in AGENTS for mark in agent.housekeeping)
_OBSERVATIONS = _Marks(mark for agent in AGENTS for mark in agent.observations)
_SIDE_SYSTEM = _Marks(mark for agent in AGENTS for mark in agent.side_system)
_SIDE_ASKED = _Marks(mark for agent in AGENTS for mark in agent.side_asked)
_CARRIERS = _Marks(mark for agent in AGENTS for mark in agent.carriers)
_SIDE = tuple(agent.is_side for agent in AGENTS if agent.is_side)
_SHARED = tuple(agent.read_shared for agent in AGENTS if agent.read_shared)
_NOTES = frozenset(tag for agent in AGENTS for tag in agent.notes)
_WORDS = frozenset(tag for agent in AGENTS for tag in agent.words)
_OPENING = re.compile(r"<([A-Za-z_][\w -]{0,60})>|<([A-Za-z_][\w-]{0,60})\s[^<>]{0,500}>")
_CLOSING = re.compile(r"</([A-Za-z_][\w -]{0,60})>\Z")
_PROBES = ("quota", "count", "Warmup")
"""Claude Code sends one of these with `max_tokens = 1` to test the connection."""
_LONGEST_CLOSING = 64
_MOST_BLOCKS = 100
_SYSTEM_CHARS, _FIRST_MESSAGES = 20_000, 12
_BEGINNING = 1000


class Profile:
    """The profile of one agent. Marks that no person would write hold for every agent."""

    def __init__(self, agent: Agent) -> None:
        self.name = agent.name
        self._agent = agent

    def for_request(self, request: Json) -> AgentProfile:
        """Itself."""
        return self

    def kind(self, request: Json) -> TurnKind:
        """Side for titles, compaction and other requests that the agent makes for itself."""
        messages = _messages(request)
        system = [text for m in messages if _is_system(m) for text in _texts(m)]
        last, parts = _last_asked(messages)
        side = (
            any(_SIDE_SYSTEM.begin(text[:_BEGINNING].lstrip()) for text in system)
            or any(map(_is_aside, {last, *parts}))
            or (last in _PROBES and request.get("max_tokens") == 1)
        )
        return TurnKind.SIDE if side else TurnKind.MAIN

    def session(self, name: str) -> str:
        """The session's name without what changes while the conversation goes on."""
        return name if self._agent.session_name is None else self._agent.session_name(name)

    def utterance(self, message: Json) -> Utterance | None:
        """What a message says, and who says it; None where the agent wrote it."""
        role, text = message.get("role"), text_of(message.get("content"))
        if role in ("tool", "function"):
            return Utterance(Source.TOOL, text) if text else None
        if role == "user":
            return self._in_user_role([_bare(text) for text in without_files(_texts(message))])
        if _is_system(message) and self._agent is not GENERIC:
            return None  # known agents give the model general instructions there
        return Utterance(Source.ENVIRONMENT, text.strip()) if text.strip() else None

    def _in_user_role(self, texts: Sequence[str]) -> Utterance | None:
        if any(map(_is_aside, texts)):
            return None
        found = [utterance for text in texts if (utterance := self._read(text))]
        if len(found) > 1:  # beside other words, a part that is one block is the agent's
            found = [utterance for utterance in found if not is_tagged(utterance.text)] or found
        said = [utterance.text for utterance in found if utterance.source is Source.USER]
        if said:
            text = "\n".join(said)
            source = source_of(text)
            if source is not Source.USER and (words := [peeled(t) for t in texts if _is_words(t)]):
                return Utterance(
                    Source.USER, "\n".join(words)
                )  # words between tags, beside a tool's result
            return None if source is None else Utterance(source, text)
        text = "\n".join(utterance.text for utterance in found)
        return Utterance(Source.ENVIRONMENT, text) if text else None

    def _read(self, text: str) -> Utterance | None:
        """One text without its envelope, and who wrote it."""
        if self._agent.read_own is not None:
            unwrapped = self._agent.read_own(text)
            if unwrapped is None:
                return None
            text = unwrapped
        text = peeled(text.strip())
        for words_in in _SHARED:
            words = words_in(text)
            if words is not None:
                return Utterance(Source.USER, words) if words else None
        if not text or _HOUSEKEEPING.begin(text):
            return None
        if _OBSERVATIONS.begin(text) and (self._agent is not GENERIC or not is_typed(text)):
            return Utterance(Source.ENVIRONMENT, text)
        return Utterance(Source.USER, text)


def _bare(text: str) -> str:
    """The text without white space and byte order marks around it."""
    return text.strip().strip("\ufeff").strip()


def _is_words(text: str) -> bool:
    """Whether the whole text is a person's words between tags."""
    closing = _CLOSING.search(text, max(0, len(text) - _LONGEST_CLOSING))
    return closing is not None and closing[1] in _WORDS and text.startswith(f"<{closing[1]}>")


@lru_cache(maxsize=8)
def _is_aside(text: str) -> bool:
    """Whether a text makes its message a side request of the agent."""
    return bool(_SIDE_ASKED.begin(text)) or any(is_side(text) for is_side in _SIDE)


def detected(request: Json) -> Agent:
    """The agent that sent a request, by its system prompt or its messages' envelope."""
    messages = _messages(request)
    system = "\n".join(text_of(m.get("content"))[:_SYSTEM_CHARS] for m in messages if _is_system(m))
    if (known := _agent_of(system[:_SYSTEM_CHARS])) is not None:
        return known
    asked = [m for m in messages if m.get("role") == "user"]
    beginnings = [text for m in asked[:_FIRST_MESSAGES] for text in _texts(m)]
    if any(map(_FIRST_WORDS.begin, beginnings)):
        for agent in AGENTS:
            words = tuple(agent.first_words)
            if words and any(text.startswith(words) for text in beginnings):
                return agent
    return GENERIC


@lru_cache(maxsize=128)
def _agent_of(system: str) -> Agent | None:
    return next((a for a in AGENTS if any(sign in system for sign in a.signs)), None)


def peeled(text: str) -> str:
    """A text without the agents' notes at both ends, and without the prefix of the words.

    >>> peeled("<system-reminder>\\nx\\n</system-reminder>\\nno, shorter")
    'no, shorter'
    """
    for _ in range(_MOST_BLOCKS):
        shorter = _without_prefix(_without_notes(text))
        if shorter == text:
            break
        text = shorter
    if not text.startswith("<"):
        return text
    closing = _CLOSING.search(text, max(0, len(text) - _LONGEST_CLOSING))
    if closing and closing[1] in _WORDS:
        start = text.rfind(f"<{closing[1]}>", 0, closing.start())
        if start == 0 or (start > 0 and text[start - 1] in "\n>"):
            return text[start + len(closing[1]) + 2 : closing.start()].strip()
    return text


def _without_notes(text: str) -> str:
    """The text without whole blocks of notes at both ends."""
    start, end = 0, len(text)
    for _ in range(_MOST_BLOCKS):
        opened = _OPENING.match(text, start)
        name = opened and (opened[1] or opened[2])
        if not opened or name not in _NOTES:
            break
        found = text.find(f"</{name}>", opened.end())
        if found < 0:
            break
        start = found + len(name) + 3
        while start < end and text[start].isspace():
            start += 1
    for _ in range(_MOST_BLOCKS):
        if text[end - 1 : end] != ">":
            break
        closing = _CLOSING.search(text[max(start, end - _LONGEST_CLOSING) : end])
        if closing is None or closing[1] not in _NOTES:
            break
        found = text.rfind(f"<{closing[1]}", start, end)
        if found < 0 or (found > start and text[found - 1] not in "\n>"):
            break
        end = found
        while end > start and text[end - 1].isspace():
            end -= 1
    return text[start:end]


def _without_prefix(text: str) -> str:
    mark = _PREFIXES.begin(text)
    return text if mark is None else text[len(mark) :].strip()


def _last_asked(messages: Sequence[Json]) -> tuple[str, Sequence[str]]:
    """The last text in the user role without its notes, and all texts of that message.

    The texts of the message keep their notes: a note may mark the request as a side request.
    """
    for message in reversed(messages):
        if message.get("role") == "user":
            texts = [text.strip() for text in _texts(message)]
            for text in reversed(texts):
                asked = _without_notes(text)
                if asked and not _CARRIERS.begin(asked):
                    return asked, texts
    return "", ()


def _messages(request: Json) -> list[Json]:
    messages = request.get("messages")
    if not isinstance(messages, list):
        return []
    return [cast(Json, m) for m in cast("list[object]", messages) if isinstance(m, dict)]


def _is_system(message: Json) -> bool:
    return message.get("role") in ("system", "developer")


def _texts(message: Json) -> list[str]:
    """The texts of a message, one for each part that has one."""
    content = message.get("content")
    if not isinstance(content, list):
        return [text_of(content)]
    return [text_of([part]) for part in cast("list[object]", content)]
