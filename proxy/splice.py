"""The hot path: our additions cut out of a streamed chunk's bytes, without parsing it.

A reply's content chunks differ only in what follows `"delta":`. The first one is parsed and shows
where its parts lie; in the others the engine's bytes are searched for the same parts, and the
client gets them with its model's name, and null where it did not ask. A chunk with any other shape
(the role, a finish reason, usage, an error, another choice) is left to the parser.

The search is safe: within a JSON string every quote is escaped, so `,"logprobs":` is always a key.
"""

from __future__ import annotations

import orjson

from nextstate.records import Json
from nextstate.wire import json_object, objects
from proxy.capture import Piece
from proxy.dialects.chat import Asked, client_chunk

_LOGPROBS, _IDS = b',"logprobs":', b',"finish_reason":null,"token_ids":['
_NO_IDS = b',"finish_reason":null,"token_ids":null}]}\n\n'
_END = b"]}]}\n\n"
_TRIES = 3
"""Chunks that are looked at as a pattern before a reply is left to the parser."""


class Splice:
    """Cuts the chunks of one reply; knows nothing until it has learned one."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._tail: tuple[bool, bool] = asked.logprobs, asked.token_ids
        self._theirs = b""
        self._ours = b""
        self._tries = _TRIES

    def learn(self, event: bytes, chunk: Json) -> None:
        """Takes a parsed content chunk as the pattern, unless cutting it goes wrong."""
        choices = objects(chunk.get("choices"))
        if self._theirs or not self._tries or len(choices) != 1:
            return
        if choices[0].get("index") != 0 or not choices[0].get("token_ids"):
            return
        self._tries -= 1
        head, key, _ = event.partition(b'"delta":')
        named, name = orjson.dumps(chunk.get("model")), orjson.dumps(self._asked.model)
        self._theirs = head + key
        self._ours = self._theirs.replace(b'"model":' + named, b'"model":' + name, 1)
        cut = self.cut(event)
        expected = client_chunk(chunk, self._asked, None)
        if cut is None or json_object(cut[0].removeprefix(b"data: ")) != expected:
            self._theirs = b""

    def cut(self, event: bytes) -> tuple[bytes, Piece] | None:
        """(what the client gets, what is captured); None for a chunk that must be parsed."""
        theirs = self._theirs
        if not theirs or not event.startswith(theirs) or not event.endswith(_END):
            return None
        start = len(theirs)
        delta_end = event.find(_LOGPROBS, start)
        logprobs_end = event.find(_IDS, delta_end)
        if delta_end < 0 or logprobs_end < 0:
            return None
        keep_logprobs, keep_ids = self._tail
        delta = event[start:delta_end]
        if delta == b"{}" and not (keep_logprobs or keep_ids):
            sent = b""  # the parser held this token's text back: unasked there is no such chunk
        else:
            logprobs = event[delta_end:logprobs_end] if keep_logprobs else b',"logprobs":null'
            ids = event[logprobs_end:] if keep_ids else _NO_IDS
            sent = b"%b%b%b%b" % (self._ours, delta, logprobs, ids)
        piece = (
            delta,
            event[delta_end + len(_LOGPROBS) : logprobs_end],
            event[logprobs_end + len(_IDS) : -len(_END)],
        )
        return sent, piece
