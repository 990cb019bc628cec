"""How one request is served: what the engine gets, and what each of its answers becomes.

`Direct` adds to a request and takes back out of the reply. `Translated` serves another wire format
through the chat route, which alone tells token ids and log-probs. `Native` relays such a format as
it is, where a translation could differ: the turn is kept, without tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from nextstate.engine.client import EngineClient
from nextstate.engine.messages_behaviour import Habits
from nextstate.error_text import safe_text
from nextstate.records import Json
from nextstate.wire import json_object, write_json
from proxy.capture import Capture
from proxy.dialects import chat, completions, messages, responses
from proxy.dialects.chat import Asked
from proxy.dialects.translation import Translation
from proxy.splice import Splice
from proxy.sse import event_data
from proxy.whole_reply import take_apart

log = logging.getLogger(__name__)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
_DONE = b"[DONE]"
_MISSHAPEN = (TypeError, KeyError, ValueError, AttributeError, IndexError)
"""What reading an answer raises that is not the API's: it goes to the client as it came."""


class Serving(Protocol):
    """One request while it runs; pure, fed with what the engine sends."""

    path: str
    chat: Json
    """The request in chat form, as it is recorded."""
    capture: Capture
    choices: int
    """How many choices the reply has."""
    untrainable: str | None
    """Why the turn cannot train whatever the engine answers, or None."""

    def request(self, model: str) -> bytes:
        """The body that the engine gets; `model` is the serving adapter's name there."""
        ...

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """What the client gets for the plain content events from `start` on, and where they end.

        None of them finishes the reply; what they leave is for `event`.
        """
        ...

    def event(self, event: bytes) -> bytes:
        """What the client gets for one event of the stream, with its terminator; maybe nothing."""
        ...

    def reply(self, data: bytes) -> bytes | None:
        """What the client gets for a whole reply; None if only the native route can word it."""
        ...

    @property
    def broken(self) -> bool:
        """Whether the stream cannot be ended as one that went well."""
        ...


class EventWriter(Protocol):
    """Chat chunks in, the dialect's events out."""

    failed: bool
    """After an error in the stream: nothing more comes, and the connection is cut."""

    def feed(self, chunk: Json) -> bytes: ...
    def done(self) -> bytes: ...


class EventReader(Protocol):
    """The dialect's events in, chat chunks out."""

    def feed(self, payload: Json) -> Json | None: ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """A wire format that the chat route can serve."""

    to_chat: Callable[[Json, Habits], Translation]
    """(client's request, the engine's habits) → the request in chat form."""
    from_chat: Callable[[Json, Json, int], Json | None]
    """(chat reply, client's request, longest context) → its reply; None: only natively."""
    encode: Callable[[Json], bytes]
    events: Callable[[Json, int], EventWriter]
    """(client's request, longest context) → what writes its stream."""
    to_chat_reply: Callable[[Json], Json]
    chunks: Callable[[], EventReader]


DIALECTS = {
    MESSAGES: Dialect(
        messages.to_chat,
        lambda reply, _body, _length: messages.from_chat(reply),
        messages.encode,
        lambda _body, _length: messages.Events(),
        messages.to_chat_reply,
        messages.Chunks,
    ),
    RESPONSES: Dialect(
        responses.to_chat,
        responses.from_chat,
        responses.encode,
        responses.Events,
        responses.to_chat_reply,
        responses.Chunks,
    ),
}


class Direct:
    """Chat and completions: the client's request with our additions, if the engine takes them."""

    def __init__(
        self,
        path: str,
        body: Json,
        model: str,
        fingerprint: str | None,
        *,
        additions: bool = True,
    ) -> None:
        self.path = path
        self.untrainable: str | None = None
        self.capture = Capture()
        self._body = body
        self._asked = (Asked.of if path == CHAT else completions.asked_for)(body, model)
        self.additions = additions
        if not additions:
            self.untrainable = "the engine refuses to be asked for log-probs and token ids"
            self._asked = Asked(model, logprobs=True, token_ids=True, usage=True)
        self._fingerprint = fingerprint
        self._format: Any = chat if path == CHAT else completions
        self._splice = Splice(self._asked) if path == CHAT and additions else None
        self.chat = body if path == CHAT else completions.to_chat(body)
        self.choices = chat.count(body) if path == CHAT else completions.choices_of(body)

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        if not self.additions:
            return write_json({**self._body, "model": model})
        return write_json(self._format.upstream_request(self._body, model))

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """See `Serving`."""
        if self._splice is None:
            return b"", start
        sent, piece, end = self._splice.cut(data, start)
        if piece is not None:
            self.capture.piece(piece)
        return sent, end

    def event(self, event: bytes) -> bytes:
        """See `Serving`."""
        payload = event_data(event)
        chunk = _chunk(payload, self.capture)
        if chunk is None:
            return event
        try:
            if self.path == CHAT:
                self.capture.chunk(chunk, payload)
            else:
                self.capture.chunk(completions.as_chat(chunk))
            if "choices" not in chunk:
                return event  # an error, in the engine's own spelling
            if self._splice is not None:
                self._splice.learn(event, chunk)
            sent = self._format.client_chunk(chunk, self._asked, self._fingerprint)
        except _MISSHAPEN as error:
            return _misshapen(event, self.capture, error)
        return b"" if sent is None else b"data: " + orjson.dumps(sent) + b"\n\n"

    def reply(self, data: bytes) -> bytes:
        """See `Serving`."""
        whole = take_apart(data, self._asked) if self.path == CHAT else None
        if whole is not None:
            self.capture.whole(whole)
            return whole.sent
        reply = json_object(data)
        if reply is None:
            return _misshapen(data, self.capture, "it is not a JSON object")
        try:
            self.capture.body(reply if self.path == CHAT else completions.as_chat(reply))
            # As vLLM writes it: its numbers, which are the client's where it asked, stay the same.
            return compact(self._format.client_reply(reply, self._asked))
        except _MISSHAPEN as error:
            return _misshapen(data, self.capture, error)

    @property
    def broken(self) -> bool:
        """See `Serving`."""
        return False


class Translated:
    """Another wire format, served through the chat route."""

    def __init__(
        self, dialect: Dialect, body: Json, chat_request: Json, model: str, max_model_len: int
    ) -> None:
        self.path = CHAT
        self.untrainable: str | None = None
        self.chat = chat_request
        self.capture = Capture()
        self.choices = 1
        self._dialect = dialect
        self._body = body
        self._asked = Asked.of(chat_request, model)
        self._max_model_len = max_model_len
        self._writer = dialect.events(body, max_model_len)

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        return write_json(chat.upstream_request(self.chat, model))

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """See `Serving`."""
        return b"", start

    def event(self, event: bytes) -> bytes:
        """See `Serving`."""
        payload = event_data(event)
        if payload == _DONE:
            return self._writer.done()
        chunk = _chunk(payload, self.capture)
        if chunk is None:
            return b""
        try:
            self.capture.chunk(chunk, payload)
            stripped = chat.client_chunk(chunk, self._asked, None)
            return b"" if stripped is None else self._writer.feed(stripped)
        except _MISSHAPEN as error:
            return _misshapen(b"", self.capture, error)

    def reply(self, data: bytes) -> bytes | None:
        """See `Serving`."""
        whole = take_apart(data, self._asked)
        reply = json_object(data if whole is None or self._asked.logprobs else whole.sent)
        if reply is None:
            return None
        try:
            if whole is None:
                self.capture.body(reply)
            else:
                self.capture.whole(whole)
            stripped = chat.client_reply(reply, self._asked)
            answer = self._dialect.from_chat(stripped, self._body, self._max_model_len)
            return None if answer is None else self._dialect.encode(answer)
        except _MISSHAPEN as error:
            log.warning(
                "a chat reply could not be put into the client's format: %s", safe_text(error)
            )
            return None

    @property
    def broken(self) -> bool:
        """See `Serving`."""
        return self._writer.failed


class Native:
    """Another wire format, relayed as it is; nothing but the model's name changes."""

    def __init__(
        self, dialect: Dialect, path: str, body: Json, translation: Translation, model: str
    ) -> None:
        self.path = path
        self.chat = translation.chat
        self.capture = Capture()
        self.choices = 1
        self.untrainable: str | None = (
            translation.native or "the engine refused its form as a chat request"
        )
        self._dialect = dialect
        self._body = body
        self._client_name = b'"model":' + orjson.dumps(model)
        self._engine_name = self._client_name
        self._reader = dialect.chunks()

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        self._engine_name = b'"model":' + orjson.dumps(model)
        return write_json({**self._body, "model": model})

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """See `Serving`."""
        return b"", start

    def event(self, event: bytes) -> bytes:
        """See `Serving`."""
        said = _chunk(event_data(event), self.capture)
        if said is None:
            return event
        try:
            if (chunk := self._reader.feed(said)) is not None:
                self.capture.chunk(chunk)
        except _MISSHAPEN as error:
            return _misshapen(event, self.capture, error)
        return self._renamed(event)

    def reply(self, data: bytes) -> bytes:
        """See `Serving`."""
        reply = json_object(data)
        if reply is None:
            return _misshapen(data, self.capture, "it is not a JSON object")
        try:
            self.capture.body(self._dialect.to_chat_reply(reply))
        except _MISSHAPEN as error:
            return _misshapen(data, self.capture, error)
        return self._renamed(data)

    @property
    def broken(self) -> bool:
        """See `Serving`."""
        return False

    def _renamed(self, data: bytes) -> bytes:
        # Quotes inside of a JSON string are escaped, so this is always a key with its value.
        return data.replace(self._engine_name, self._client_name)


def serving_of(path: str, body: Json, model: str, engine: EngineClient) -> Serving:
    """How a request that named `model` is served."""
    dialect = DIALECTS.get(path)
    if dialect is None:
        additions = engine.abilities.additions
        return Direct(path, body, model, engine.fingerprint, additions=additions)
    translation = dialect.to_chat(body, engine.habits)
    if translation.native is not None or engine.max_model_len is None:
        return Native(dialect, path, body, translation, model)
    return Translated(dialect, body, translation.chat, model, engine.max_model_len)


def natively(path: str, body: Json, model: str) -> Serving:
    """The same request relayed as it is, where its form as a chat request will not do."""
    dialect = DIALECTS[path]
    return Native(dialect, path, body, dialect.to_chat(body, Habits()), model)


def compact(reply: Json) -> bytes:
    """JSON as vLLM writes a whole reply."""
    return json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()


def _chunk(payload: bytes | None, capture: Capture) -> Json | None:
    """The object in an event's data; None for the end, comments and what is not one."""
    if payload is None or payload == _DONE:
        return None
    chunk = json_object(payload)
    if chunk is None:
        capture.error = "the stream held an event that is not a JSON object"
    return chunk


def _misshapen(data: bytes, capture: Capture, why: Exception | str) -> bytes:
    why = why if isinstance(why, str) else safe_text(why)
    capture.error = f"the engine's answer could not be read: {why}"
    return data
