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
_BARE_END = _LOGPROBS + b"null" + _NO_IDS
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

    def cut(self, data: bytes) -> tuple[bytes, list[Piece]] | None:
        """(what the client gets, what is captured) of whole content chunks; None: parse them."""
        theirs = self._theirs
        if not theirs or not data.startswith(theirs) or not data.endswith(_END) or b"\r" in data:
            return None
        # No JSON string holds a line break: what stands between two of these is one chunk.
        chunks = data[len(theirs) : -len(_END)].split(_END + theirs)
        sent: list[bytes] = []
        pieces: list[Piece] = []
        keep_logprobs, keep_ids = self._tail
        bare = not (keep_logprobs or keep_ids)
        for chunk in chunks:
            delta, _, rest = chunk.partition(_LOGPROBS)
            logprobs, found, ids = rest.partition(_IDS)
            if not found or b"\n" in chunk:
                return None
            pieces.append((delta, logprobs, ids))
            if not bare:
                kept = logprobs if keep_logprobs else b"null"
                tail = _IDS + ids + _END if keep_ids else _NO_IDS
                sent += self._ours, delta, _LOGPROBS, kept, tail
            elif delta != b"{}":  # the parser held this token's text back: no such chunk unasked
                sent.append(self._ours + delta + _BARE_END)
        return b"".join(sent), pieces
