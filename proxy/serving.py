"""How one request is served: what the engine gets, and what each of its answers becomes.

`Direct` adds fields to a request and takes them out of the reply again. `Translated` serves another
wire format through the chat route, the only one that returns token ids and log-probs. `Native`
relays such a format as it is, where a translation could differ: the turn is kept without tokens.
`Passed` is for all other routes: nothing is recorded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from nextstate.engine.client import EngineClient
from nextstate.engine.messages_behaviour import MessagesBehaviour
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
_MALFORMED = (TypeError, KeyError, ValueError, AttributeError, IndexError)
"""Reading an answer of another API raises these. The client gets it unchanged."""


class Serving(Protocol):
    """One form of a request. It does no input or output."""

    path: str
    """The engine's route."""

    def request(self, model: str) -> bytes:
        """The body that the engine gets; `model` is the serving adapter's name there.

        Raises ValueError if it is nested too deep to be written.
        """
        ...

    def plainer(self) -> Serving | None:
        """The same request in the form to try if the engine refuses this one, if there is one."""
        return None


class Recorded(Serving, Protocol):
    """One form of a request that generates, fed with what the engine sends."""

    chat: Json
    """The request in chat form, as it is recorded."""
    capture: Capture
    choices: int
    """How many choices the reply has."""
    untrainable: str | None
    """Why the turn cannot train whatever the engine answers, or None."""

    def plainer(self) -> Recorded | None:
        """See `Serving`."""
        return None

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """(what the client gets for the plain content events from `start` on, where they end).

        None of them finishes the reply. `event` reads the events that follow.
        """
        return b"", start

    def event(self, event: bytes) -> bytes:
        """What the client gets for one event of the stream, with its terminator; may be empty."""
        ...

    def reply(self, data: bytes) -> bytes | None:
        """What the client gets for a whole reply; None if `plainer` has to be asked for it."""
        ...

    @property
    def broken(self) -> bool:
        """Whether the stream must be cut, because it cannot be ended as a complete one."""
        return False


class EventWriter(Protocol):
    """Chat chunks in, the dialect's events out."""

    failed: bool
    """Whether an error came in the stream: nothing more is written, and the connection is cut."""

    def feed(self, chunk: Json) -> bytes: ...
    def done(self) -> bytes: ...


class EventReader(Protocol):
    """The dialect's events in, chat chunks out."""

    def feed(self, payload: Json) -> Json | None: ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """A wire format that the chat route can serve."""

    to_chat: Callable[[Json, MessagesBehaviour], Translation]
    """(client's request, what the engine's own route does with it) → the request in chat form."""
    from_chat: Callable[[Json, Json, int], Json | None]
    """(chat reply, client's request, longest context) → its reply; None: ask its own route."""
    events: Callable[[Json, int], EventWriter]
    """(client's request, longest context) → what writes its stream."""
    to_chat_reply: Callable[[Json], Json]
    chunks: Callable[[], EventReader]


DIALECTS = {
    MESSAGES: Dialect(
        messages.to_chat,
        lambda reply, _body, _length: messages.from_chat(reply),
        lambda _body, _length: messages.Events(),
        messages.to_chat_reply,
        messages.Chunks,
    ),
    RESPONSES: Dialect(
        responses.to_chat,
        responses.from_chat,
        responses.Events,
        responses.to_chat_reply,
        responses.Chunks,
    ),
}


class Direct(Recorded):
    """Chat and completions: the client's request with our additions, if the engine accepts them."""

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

    def plainer(self) -> Recorded | None:
        """The request as the client wrote it."""
        if not self.additions:
            return None
        return Direct(self.path, self._body, self._asked.model, None, additions=False)

    def content(self, data: bytes, start: int) -> tuple[bytes, int]:
        """See `Serving`."""
        if self._splice is None or self.capture.finished:
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
                return event  # an error, as the engine wrote it
            splice = None if self.capture.finished else self._splice
            if splice is not None and (piece := splice.learn(event, chunk)):
                self.capture.cut(piece)
            sent = self._format.client_chunk(chunk, self._asked, self._fingerprint)
        except _MALFORMED as error:
            return _unreadable(event, self.capture, error)
        return b"" if sent is None else b"data: " + orjson.dumps(sent) + b"\n\n"

    def reply(self, data: bytes) -> bytes:
        """See `Serving`."""
        whole = take_apart(data, self._asked) if self.path == CHAT else None
        if whole is not None:
            self.capture.whole(whole)
            return whole.sent
        reply = json_object(data)
        if reply is None:
            return _unreadable(data, self.capture, "it is not a JSON object")
        try:
            self.capture.body(reply if self.path == CHAT else completions.as_chat(reply))
            # In vLLM's own notation: the numbers that the client asked for stay the same.
            return compact(chat.client_reply(reply, self._asked))
        except _MALFORMED as error:
            return _unreadable(data, self.capture, error)


class Translated(Recorded):
    """Another wire format, served through the chat route."""

    def __init__(
        self,
        dialect: Dialect,
        path: str,
        body: Json,
        chat_request: Json,
        model: str,
        max_model_len: int,
        sampling_defaults: Json,
    ) -> None:
        self.path = CHAT
        self._client_path = path
        self.untrainable: str | None = None
        self.chat = chat_request
        self.capture = Capture()
        self.choices = 1
        self._dialect = dialect
        self._body = body
        self._asked = Asked.of(chat_request, model)
        self._max_model_len = max_model_len
        left_out = {n: v for n, v in sampling_defaults.items() if body.get(n) is None}
        self._in_effect = {**body, **left_out}
        """The request with the engine's own sampling settings, which a reply may repeat."""
        self._writer = dialect.events(self._in_effect, max_model_len)

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        return write_json(chat.upstream_request(self.chat, model))

    def plainer(self) -> Recorded | None:
        """The request on the client's own route: an error about it is worded there."""
        translation = self._dialect.to_chat(self._body, MessagesBehaviour())
        return Native(self._dialect, self._client_path, self._body, translation)

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
        except _MALFORMED as error:
            return _unreadable(b"", self.capture, error)

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
            answer = self._dialect.from_chat(stripped, self._in_effect, self._max_model_len)
            return None if answer is None else compact(answer)
        except _MALFORMED as error:
            log.warning(
                "a chat reply could not be put into the client's format: %s", safe_text(error)
            )
            return None

    @property
    def broken(self) -> bool:
        """See `Serving`."""
        return self._writer.failed


class Native(Recorded):
    """Another wire format, relayed as it is; nothing but the model's name changes."""

    def __init__(self, dialect: Dialect, path: str, body: Json, translation: Translation) -> None:
        self.path = path
        self.chat = translation.chat
        self.capture = Capture()
        self.choices = 1
        self.untrainable: str | None = (
            translation.native or "the engine refused its form as a chat request"
        )
        self._dialect = dialect
        self._passed = Passed(path, b"", body)
        self._reader = dialect.chunks()

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        return self._passed.request(model)

    def event(self, event: bytes) -> bytes:
        """See `Serving`."""
        payload = _chunk(event_data(event), self.capture)
        if payload is None:
            return event
        try:
            if (chunk := self._reader.feed(payload)) is not None:
                self.capture.chunk(chunk)
        except _MALFORMED as error:
            return _unreadable(event, self.capture, error)
        return self._passed.reply(event)

    def reply(self, data: bytes) -> bytes:
        """See `Serving`."""
        reply = json_object(data)
        if reply is None:
            return _unreadable(data, self.capture, "it is not a JSON object")
        try:
            self.capture.body(self._dialect.to_chat_reply(reply))
        except _MALFORMED as error:
            return _unreadable(data, self.capture, error)
        return self._passed.reply(data)


class Passed(Serving):
    """A request that is relayed and not recorded; nothing but the model's name changes."""

    def __init__(
        self,
        path: str,
        data: bytes,
        body: Json | None = None,
        reply: Callable[[bytes], bytes] | None = None,
    ) -> None:
        self.path = path
        self._data = data
        self._body = body
        """The request's JSON object, if it names a model that is served here."""
        self._reply = reply
        self._client_name = b"" if body is None else model_field(str(body["model"]))
        self._engine_name = self._client_name

    @property
    def changes(self) -> bool:
        """Whether a reply may differ from the engine's."""
        return self._body is not None or self._reply is not None

    def request(self, model: str) -> bytes:
        """See `Serving`."""
        if self._body is None:
            return self._data
        self._engine_name = model_field(model)
        return write_json({**self._body, "model": model})

    def reply(self, data: bytes) -> bytes:
        """What the client gets for a whole reply, or for one event of a stream."""
        if self._reply is not None:
            return self._reply(data)
        # Quotes inside a JSON string are escaped, so this is always a key with its value.
        return data.replace(self._engine_name, self._client_name) if self._body else data


def recorded_form(
    path: str, body: Json, model: str, engine: EngineClient, sampling: Json, more: Json
) -> Recorded:
    """How a request that generates and named `model` is served.

    `sampling` takes the place of what the client wrote, and so does `more`, where the form has it.
    What is None in it is left out of the request.
    """
    if sampling:
        left_out = {name for name, value in sampling.items() if value is None}
        sampling = {name: value for name, value in sampling.items() if value is not None}
        body = {name: value for name, value in body.items() if name not in left_out} | sampling
    dialect = DIALECTS.get(path)
    if dialect is None:
        additions = engine.abilities.additions
        return Direct(path, {**body, **more}, model, engine.fingerprint, additions=additions)
    translation = dialect.to_chat(body, engine.messages_behaviour)
    if translation.native is not None or engine.max_model_len is None:
        return Native(dialect, path, body, translation)
    length, defaults = engine.max_model_len, engine.sampling_defaults
    chat_request = {**translation.chat, **sampling, **more}
    return Translated(dialect, path, body, chat_request, model, length, defaults)


def model_field(name: str) -> bytes:
    """The JSON field that names a model, as vLLM writes it."""
    return b'"model":' + orjson.dumps(name)


def compact(reply: Json) -> bytes:
    """JSON as vLLM writes a whole reply."""
    return json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode()


def _chunk(payload: bytes | None, capture: Capture) -> Json | None:
    """The object in an event's data; None for the end, a comment or anything else."""
    if payload is None or payload == _DONE:
        return None
    chunk = json_object(payload)
    if chunk is None:
        capture.error = "the stream held an event that is not a JSON object"
    return chunk


def _unreadable(data: bytes, capture: Capture, why: Exception | str) -> bytes:
    why = why if isinstance(why, str) else safe_text(why)
    capture.error = f"the engine's answer could not be read: {why}"
    return data
