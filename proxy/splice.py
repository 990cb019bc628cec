"""The hot path: cuts our additions out of a streamed chunk's bytes without parsing it.

A reply's content chunks differ only in what follows `"delta":`. The first one is parsed and shows
where its parts are. The others are searched for the same parts as bytes. The client gets them with
its own model's name, and null in place of what it did not ask for. A chunk of any other shape (the
role, a finish reason, usage, an error, another choice) is left to the parser.

The search is safe: within a JSON string every quote is escaped, so `,"logprobs":` is always a key.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TypeAlias

import orjson

from nextstate.records import Json
from nextstate.wire import json_object, objects
from proxy.capture import Piece
from proxy.dialects.chat import Asked, client_chunk

_LOGPROBS, _IDS = b',"logprobs":', b',"finish_reason":null,"token_ids":['
_NO_IDS = b',"finish_reason":null,"token_ids":null}]}\n\n'
_END = b"]}]}\n\n"
_BARE_END = _LOGPROBS + b"null" + _NO_IDS
_RETURN, _BRACE, _NEWLINE = b"\r}\n"
"""As numbers: `b"}" in ids` makes CPython try the bytes as a number first, which costs an error."""
_BETWEEN = len(_LOGPROBS) + len(_IDS) + len(_END)
_Parts: TypeAlias = tuple[list[bytes], list[bytes], list[bytes], Piece]
"""(deltas, log-probs, token ids) of several chunks, and all of them joined."""
_HEAD = frozenset(("id", "object", "created", "model", "system_fingerprint", "choices"))
_CHOICE = frozenset(("index", "delta", "logprobs", "finish_reason", "token_ids"))
"""Fields of a chunk, and of its choice, of which only the parts are captured."""
_TRIES = 3
"""How many chunks are tried as the pattern before a reply is left to the parser."""


class Splice:
    """Cuts the chunks of one reply, once it has learned their pattern from one."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._theirs = b""
        self._ours = b""
        self._tries = _TRIES

    def learn(self, event: bytes, chunk: Json) -> Piece | None:
        """Makes a parsed content chunk the pattern, unless cutting it gives another result.

        Returns its parts if it says nothing else; None also if it is not the pattern.
        """
        if self._theirs or not self._tries:
            return None
        choices = objects(chunk.get("choices"))
        if len(choices) != 1:
            return None
        if choices[0].get("index") != 0 or not choices[0].get("token_ids"):
            return None
        self._tries -= 1
        head, key, _ = event.partition(b'"delta":')
        named, name = orjson.dumps(chunk.get("model")), orjson.dumps(self._asked.model)
        self._theirs = head + key
        self._ours = self._theirs.replace(b'"model":' + named, b'"model":' + name, 1)
        sent, piece, taken = self.cut(event, 0)
        expected = client_chunk(chunk, self._asked, None)
        if taken != len(event) or json_object(sent.removeprefix(b"data: ")) != expected:
            self._theirs = b""
            return None
        return piece if chunk.keys() <= _HEAD and choices[0].keys() <= _CHOICE else None

    def cut(self, data: bytes, start: int) -> tuple[bytes, Piece | None, int]:
        """Cuts the whole content chunks that stand in `data` from `start` on, one after the other.

        Returns what the client gets, what is captured, and where what is left to the parser begins.
        """
        theirs = self._theirs
        if not theirs or not data.startswith(theirs, start) or _RETURN in data:
            return b"", None, start
        chunks = data[start:].split(_END)[:-1]
        if chunks and not self._fits(chunks[-1]):  # it often ends the reply
            chunks.pop()
        found = self._parts(chunks) or self._parts(list(takewhile(self._fits, chunks)))
        if found is None:
            return b"", None, start
        deltas, logprobs, ids, piece = found
        size = sum(map(len, piece)) + len(deltas) * (len(theirs) + _BETWEEN) - 3 * (len(deltas) - 1)
        return self._sent(deltas, logprobs, ids), piece, start + size

    def _fits(self, chunk: bytes) -> bool:
        """Whether one chunk, without its end, has the pattern's parts."""
        return self._parts([chunk]) is not None

    def _parts(self, chunks: list[bytes]) -> _Parts | None:
        """The parts of chunks that all fit the pattern; None if one does not, or there is none.

        All are checked at once. What is not found is not cut off, so only chunks that fit have the
        right size without their parts.
        """
        if not chunks:
            return None
        split = [chunk.removeprefix(self._theirs).partition(_LOGPROBS) for chunk in chunks]
        ends = [rest.partition(_IDS) for _, _, rest in split]
        deltas = [delta for delta, _, _ in split]
        logprobs = [numbers for numbers, _, _ in ends]
        ids = [named for _, _, named in ends]
        piece = b",".join(deltas), b",".join(logprobs), b",".join(ids)
        cut = len(b"".join(chunks)) - sum(map(len, piece)) + 3 * (len(chunks) - 1)
        fits = cut == len(chunks) * (len(self._theirs) + len(_LOGPROBS) + len(_IDS))
        # No JSON string holds a line break: with one, it is not a single chunk.
        if not fits or not all(ids) or _BRACE in piece[2] or any(_NEWLINE in p for p in piece):
            return None
        return deltas, logprobs, ids, piece

    def _sent(self, deltas: list[bytes], logprobs: list[bytes], ids: list[bytes]) -> bytes:
        ours = self._ours
        if not (self._asked.logprobs or self._asked.token_ids):
            # An empty delta is a token whose text is held back: vLLM sends such a chunk only if it
            # was asked for token ids.
            shown = [delta for delta in deltas if delta != b"{}"]
            return ours + (_BARE_END + ours).join(shown) + _BARE_END if shown else b""
        sent: list[bytes] = []
        for delta, numbers, named in zip(deltas, logprobs, ids, strict=True):
            kept = numbers if self._asked.logprobs else b"null"
            tail = _IDS + named + _END if self._asked.token_ids else _NO_IDS
            sent += ours, delta, _LOGPROBS, kept, tail
        return b"".join(sent)
