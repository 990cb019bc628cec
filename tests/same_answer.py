"""Whether two servers gave the same answer: every byte of it but what is random or the time."""

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
"""How vLLM sums a request up that it refuses; the proxy's has more fields."""
_TEXTS = ("content", "text", "arguments", "reasoning", "delta", "partial_json")
"""Where a token's text stands in an event; tokens that come together share one."""


@dataclass(frozen=True)
class Answer:
    """All that a client sees."""

    status: int
    headers: dict[str, str]
    """With their names in small letters; without the date, and those that only the proxy has."""
    body: bytes
    """With ids by their order, and without the time."""
    turn: str | None
    """The id that the proxy gave the turn."""

    def naming(self, asked: Json | bytes | None, adapter: str | None) -> Answer:
        """With the name that the client gave the model."""
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
        """With each event as the SDKs read it, its fields in the order of their names."""
        headers = {name: held for name, held in self.headers.items() if name != "content-length"}
        if len(self.events) == 1:
            return replace(self, headers=headers, body=_parsed(self.body))
        told = [b"data: %b\n\n" % _parsed(event_data(event) or b"") for event in self.events]
        return replace(self, headers=headers, body=b"".join(told))

    @property
    def events(self) -> list[bytes]:
        """The events of a stream; one for any other body."""
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
    """What a server answers to one request; `key` is its own, where it asks for one."""
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

    `adapter` is what vLLM calls the one that serves.

    With `as_parsed` only what the SDKs make of the answers is compared: to them null and no field
    at all are the same, and so are fields in another order.

    An engine that is late puts two tokens into one event, so a stream that differs is asked for
    again. If its text stays cut elsewhere, neighbouring pieces of it are compared as one.
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
    print("cut elsewhere: neighbouring tokens were compared as one")
    joined, expected_joined = merged(told), merged(expected)
    assert joined == expected_joined, _difference(joined, expected_joined)
    return ours


def _difference(ours: Sequence[object], native: Sequence[object]) -> str:
    pairs = [(x, y) for x, y in zip_longest(ours, native) if x != y]
    shown = "\n".join(f"ours   {x!r}\nnative {y!r}" for x, y in pairs[:3])
    return f"{len(ours)} events of ours, {len(native)} of vLLM; the first that differ:\n{shown}"


def by_choice(events: list[bytes]) -> list[bytes]:
    """The events in the order of their choices, which take turns as the engine's timing has it."""
    if len(events) < 2:
        return events

    def place(event: bytes) -> int:
        choices = _payload(event).get("choices")
        return choices[0]["index"] if choices else len(events)

    return sorted(events, key=place)


def merged(events: list[bytes]) -> list[Json | bytes]:
    """The events with those that differ only in how many tokens they hold as one."""
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
    """With a salt of its own where the body has one, so that the engine's cache tells nothing."""
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
    """The texts of a stream, as they were cut."""
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
