"""Compares the answers of two servers byte by byte, apart from random ids and times."""

from __future__ import annotations

import http.client
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any
from urllib.parse import urlsplit

import orjson

from nextstate.records import Json
from proxy.sse import EventSplitter, event_data
from tests.running_loop import Engine

_TIMEOUT_S = 120
_TRIES = 4
_OWN = ("date", "x-nextstate-turn", "x-nextstate-version")
_SALT = "cache_salt"
_RANDOM = re.compile(
    rb'"((?:chatcmpl-tool|chatcmpl|cmpl|modelperm)-|(?:call|resp|msg|rs|fc|ctc)_)[0-9a-f-]+"'
)
_FIELDS = re.compile(rb"<dict of \d+ items>")
"""vLLM's summary of a request that it refuses; the proxy's request has more fields."""
_TEXTS = ("content", "text", "arguments", "reasoning", "delta", "partial_json")
"""The fields of an event that hold text; tokens that arrive together share one event."""


@dataclass(frozen=True)
class Answer:
    """Everything that a client sees."""

    status: int
    headers: dict[str, str]
    """Names in lower case; without the date and without the proxy's own headers."""
    body: bytes
    """Random ids are replaced by their order, and times by 0."""
    turn: str | None
    """The proxy's id of the turn."""

    def naming(self, asked: Json | bytes | None, adapter: str | None) -> Answer:
        """The same answer with the model name that the client sent."""
        if not isinstance(asked, dict) or adapter is None:
            return self
        names = [b'"model":' + orjson.dumps(name) for name in (adapter, asked["model"])]
        body = self.body.replace(*names)
        headers = {**self.headers}
        if "content-length" in headers:
            grown = len(body) - len(self.body)
            headers["content-length"] = str(int(headers["content-length"]) + grown)
        return replace(self, headers=headers, body=body)

    @property
    def as_parsed(self) -> Answer:
        """The same answer with each event as the SDKs read it, and its fields sorted by name."""
        headers = {name: held for name, held in self.headers.items() if name != "content-length"}
        if len(self.events) == 1:
            return replace(self, headers=headers, body=_parsed(self.body))
        told = [b"data: %b\n\n" % _parsed(event_data(event) or b"") for event in self.events]
        return replace(self, headers=headers, body=b"".join(told))

    @property
    def events(self) -> list[bytes]:
        """The events of a stream; any other body is one event."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return [self.body]
        splitter = EventSplitter()
        return [*splitter.feed(self.body), splitter.rest]


def answer_of(
    url: str,
    path: str,
    body: Json | bytes | None,
    *,
    method: str = "POST",
    content_type: str | None = "application/json",
    key: str | None = None,
) -> Answer:
    """A server's answer to one request; `key` is the API key of the server, if it needs one."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=_TIMEOUT_S)
    sent = orjson.dumps(body) if isinstance(body, dict) else body
    try:
        headers = {} if content_type is None else {"Content-Type": content_type}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        connection.request(method, path, sent, headers)
        reply = connection.getresponse()
        found = {name.lower(): value for name, value in reply.getheaders()}
        turn = found.get("x-nextstate-turn")
        told = {name: value for name, value in found.items() if name not in _OWN}
        return Answer(reply.status, told, _certain(reply.read()), turn)
    finally:
        connection.close()


def assert_same(
    engine: Engine,
    path: str,
    body: Json | bytes | None,
    adapter: str | None = None,
    as_parsed: bool = False,
    **how: Any,
) -> Answer:
    """Asks vLLM and the proxy, and returns the proxy's answer.

    `adapter` is vLLM's name of the serving adapter.

    `as_parsed` compares what the SDKs read: they treat null like a missing field, and ignore the
    order of fields.

    A slow engine puts two tokens into one event. So a stream that differs is requested again. If
    the events still split the text in different places, neighbouring events are joined first.
    """
    told: list[bytes] = []
    expected: list[bytes] = []
    for _ in range(_TRIES):
        asked = _salted(_naming(adapter, body))
        native = answer_of(engine.url, path, asked, key=engine.key, **how)
        native = native.naming(body, adapter)
        ours = answer_of(engine.proxy_url, path, _salted(body), **how)
        if as_parsed:
            native, ours = native.as_parsed, ours.as_parsed
        assert (ours.status, ours.headers) == (native.status, native.headers), (ours, native)
        told, expected = by_choice(ours.events), by_choice(native.events)
        if told == expected:
            return ours
    assert [*_pieces(told)] != [*_pieces(expected)], _difference(told, expected)
    print("the events split the text in different places: neighbours were joined")
    joined, expected_joined = merged(told), merged(expected)
    assert joined == expected_joined, _difference(joined, expected_joined)
    return ours


def _difference(ours: Sequence[object], native: Sequence[object]) -> str:
    pairs = [(x, y) for x, y in zip_longest(ours, native) if x != y]
    shown = "\n".join(f"ours   {x!r}\nnative {y!r}" for x, y in pairs[:3])
    return f"{len(ours)} events of ours, {len(native)} of vLLM; the first that differ:\n{shown}"


def by_choice(events: list[bytes]) -> list[bytes]:
    """The events sorted by choice: the engine's timing decides the order between choices."""
    if len(events) < 2:
        return events

    def place(event: bytes) -> int:
        choices = _payload(event).get("choices")
        return choices[0]["index"] if choices else len(events)

    return sorted(events, key=place)


def merged(events: list[bytes]) -> list[Json | bytes]:
    """The events, with neighbours joined that differ only in their text."""
    found: list[Json | bytes] = []
    for event in events:
        payload = _payload(event)
        payload.pop("sequence_number", None)
        last = found[-1] if found else b""
        if isinstance(last, dict) and _is_text(last) and _continues(last, payload):
            found[-1] = _joined(last, payload)
        else:
            found.append(payload or event)
    return found


def _naming(adapter: str | None, body: Json | bytes | None) -> Json | bytes | None:
    return {**body, "model": adapter} if adapter is not None and isinstance(body, dict) else body


def _salted(body: Json | bytes | None) -> Json | bytes | None:
    """The body with a new cache salt, if it has one: no answer comes from the engine's cache."""
    if isinstance(body, dict) and _SALT in body:
        return {**body, _SALT: uuid.uuid4().hex}
    return body


def _parsed(data: bytes) -> bytes:
    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(held) for name, held in value.items() if held is not None}
        return [known(held) for held in value] if isinstance(value, list) else value

    if not data.startswith(b"{"):
        return data  # the end of a stream
    return orjson.dumps(known(orjson.loads(data)), option=orjson.OPT_SORT_KEYS)


def _certain(body: bytes) -> bytes:
    numbers: dict[bytes, int] = {}

    def number(match: re.Match[bytes]) -> bytes:
        return b'"%b%d"' % (match[1], numbers.setdefault(match[0], len(numbers)))

    body = re.sub(rb'"(created|created_at)":\d+', rb'"\1":0', _RANDOM.sub(number, body))
    return _FIELDS.sub(b"<dict>", body)


def _payload(event: bytes) -> Json:
    data = event_data(event)
    return orjson.loads(data) if data and data != b"[DONE]" else {}


def _is_text(payload: Json) -> bool:
    if "choices" not in payload:
        return str(payload.get("type")).endswith("delta")
    choices = payload["choices"]
    return len(choices) == 1 and "role" not in choices[0].get("delta", ())


def _continues(last: Json, payload: Json) -> bool:
    if not _is_text(payload) or last.get("type") != payload.get("type"):
        return False
    indexes = [one.get("index", one.get("output_index")) for one in (last, payload)]
    if "choices" in payload:
        indexes = [one["choices"][0]["index"] for one in (last, payload)]
    return indexes[0] == indexes[1]


def _joined(one: Any, other: Any, name: str = "") -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return {
            name: _joined(one[name], other[name], name)
            if name in one and name in other
            else one.get(name, other.get(name))
            for name in names
        }
    if isinstance(one, list) and isinstance(other, list):
        if name == "choices":
            return [_joined(one[0], other[0])]
        if name == "tool_calls" and one[-1]["index"] == other[0]["index"]:
            return [*one[:-1], _joined(one[-1], other[0]), *other[1:]]
        return [*one, *other]
    if name in _TEXTS and isinstance(one, str) and isinstance(other, str):
        return one + other
    return one if other is None else other


def _pieces(events: list[bytes]) -> Iterator[str]:
    """The pieces of text of a stream."""
    for event in events:
        payload = _payload(event)
        if _is_text(payload):
            yield from _texts(payload)


def _texts(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif name in _TEXTS and isinstance(value, str) and value:
        yield value
