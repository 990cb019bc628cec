"""Which of several engines a conversation goes to, decided from values without input or output.

A conversation stays on the engine that has its prefix in its cache. A new one goes to the engine
with the fewest running requests, then to the one with the fewest conversations; rendezvous hashing
decides what is equal. A conversation leaves an engine that is overloaded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar, cast

from nextstate.records import Json
from nextstate.wire import objects
from proxy.linking.names import explicit_session, names_conversation

KEPT_S = 3600.0
"""A conversation without a request for so long may be placed anew: its prefix was evicted."""
MOST_KEPT = 50_000
"""Conversations that are remembered; about 10 MB."""
SPILL_ABOVE, SPILL_RATIO = 32, 1.5
"""An engine is overloaded with more running requests than both of these above the idlest one. Below
that a new prefill elsewhere costs more than the wait."""
_READ_CHARS = 2048
_READ_PARTS = 8


class Placed(Protocol):
    """An engine, as far as it matters for what may be sent to it."""

    @property
    def up(self) -> bool:
        """Whether requests are sent to it."""
        ...

    @property
    def takes_adapters(self) -> bool:
        """Whether it loads adapters while it runs."""
        ...

    @property
    def loaded(self) -> Container[str]:
        """Adapters that it has loaded and that have answered a probe."""
        ...


E = TypeVar("E", bound=Placed)


def able(engines: Sequence[E], adapter: str | None, *, serving: bool) -> Sequence[E]:
    """Those engines that may get a request of an adapter, or of the base: never none.

    An engine that has not loaded what is `serving` gets nothing of it yet. An adapter that only
    episodes ask for is loaded where they ask.
    """
    found = [engine for engine in engines if engine.up] or engines
    if adapter is None:
        return found
    found = [engine for engine in found if engine.takes_adapters] or found
    if serving:
        found = [engine for engine in found if adapter in engine.loaded] or found
    return found


class _Place(NamedTuple):
    engine: str
    used_at: float


class Places:
    """Where each conversation is. `now` is in seconds of any clock that only goes forward."""

    def __init__(self, *, shared: bool = False) -> None:
        """`shared`: several proxies place conversations and cannot ask each other.

        Then hashing decides first, so that they agree; only an overload moves a conversation.
        """
        self._shared = shared
        self._kept: dict[bytes, _Place] = {}
        """The one that was used last comes last."""
        self._conversations: Counter[str] = Counter()
        """How many of them each engine has."""

    def place(self, key: bytes | None, running: Mapping[str, int], now: float) -> str:
        """The engine for a request of the conversation `key`, and remembers it.

        `running` holds the running requests of each engine that can answer: at least one. None is
        a request without a conversation.
        """
        if key is None:
            return min(running, key=lambda name: (running[name], self._conversations[name]))
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._conversations[kept.engine] -= 1
        self._forget(now)
        if kept is None or kept.used_at <= now - KEPT_S or kept.engine not in running:
            engine = self._chosen(key, running)
        else:
            engine = kept.engine
        if overloaded(running[engine], min(running.values())):
            engine = self._least(key, running)
        self._kept[key] = _Place(engine, now)
        self._conversations[engine] += 1
        return engine

    def _chosen(self, key: bytes, running: Mapping[str, int]) -> str:
        return first_of(key, running) if self._shared else self._least(key, running)

    def _least(self, key: bytes, running: Mapping[str, int]) -> str:
        loads = {name: (count, self._conversations[name]) for name, count in running.items()}
        least = min(loads.values())
        return first_of(key, {name: 0 for name, load in loads.items() if load == least})

    def _forget(self, now: float) -> None:
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if oldest.used_at > now - KEPT_S and len(self._kept) < MOST_KEPT:
                return
            del self._kept[key]
            self._conversations[oldest.engine] -= 1


def overloaded(running: int, idlest: int) -> bool:
    """Whether an engine has so many requests more than the idlest that conversations leave it."""
    return running > idlest + SPILL_ABOVE and running > idlest * SPILL_RATIO


def first_of(key: bytes, names: Mapping[str, object]) -> str:
    """The engine that rendezvous hashing puts first: it changes only when that engine leaves."""
    return max(names, key=lambda name: hashlib.blake2b(name.encode(), key=key).digest())


def conversation_key(
    headers: Mapping[str, str], body: Json, lineage: str, episode: str | None
) -> bytes:
    """16 bytes that the requests of one conversation have in common.

    They are of its episode, else of the session that the client names. Without one, or with the
    name of a person or an app, they are also of the first user message.
    """
    named = episode or explicit_session(headers, body) or ""
    parts = [lineage, named]
    if episode is None and not names_conversation(headers, body):
        parts.append(_first_said(body))
    text = "\0".join(parts).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _first_said(body: Json) -> str:
    """A request's first user message, or the beginning of its prompt, which grows."""
    said = body.get("messages") or body.get("input")
    if isinstance(said, list):
        messages = objects(cast(object, said))
        user = next((message for message in messages if message.get("role") == "user"), None)
        if user:
            return _beginning(user.get("content"), whole=True)
        return _beginning(cast(object, said))
    return _beginning(said or body.get("prompt"))


def _beginning(value: object, depth: int = 3, *, whole: bool = False) -> str:
    """A text of bounded length: of a large value its beginning.

    `whole`: and the end, because the task may follow a preamble that many share, and its length.
    """
    if isinstance(value, str):
        start = value[:_READ_CHARS]
        return f"{start}{value[-_READ_CHARS:]}{len(value)}" if whole else start
    parts: list[object] = []
    if isinstance(value, list):
        parts = cast("list[object]", value)
    elif isinstance(value, dict):
        parts = [*cast("dict[str, object]", value).values()]
    if parts and isinstance(parts[0], int):  # token ids
        return str(parts[: _READ_CHARS // 4])
    read = parts[: _READ_PARTS * (depth > 0)]
    return "\n".join(_beginning(part, depth - 1, whole=whole) for part in read)
