"""A mock vLLM on a raw protocol, so that the engine never limits a measurement.

    python -m benchmarks.mock_engine PORT

It answers every chat request with a prepared reply in the bytes of vLLM 0.32, one write for each
event. Two fields of the request shape the reply: `tokens` (default 64) and `pace_s`, the seconds
from one token to the next (default 0: all at once). Times count from the first token, so a late
token does not delay the next ones.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
from typing import Any, cast

import orjson
import uvloop

MODEL = "mock"
TOKENS = 64
PROMPT_TOKENS = 200
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunks(tokens: int = TOKENS, *, ids: bool = False, usage: bool = False) -> list[bytes]:
    """The events of a reply: with token ids and log-probs if `ids`, with a usage chunk if asked.

    Field for field what vLLM 0.32 sends; the role comes first, then one event a token.
    """
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    fingerprint = {"system_fingerprint": "vllm-0.32.0-mock"}

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        body = {**head, "choices": choices, **more}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    role = {"role": "assistant", "content": ""}
    first = {"index": 0, "delta": role, "logprobs": None, "finish_reason": None}
    prompt = list(range(PROMPT_TOKENS)) if ids else None
    events = [event([first], prompt_token_ids=prompt, prompt_text=None)]
    for number in range(tokens):
        last = number == tokens - 1
        text = f" word{number}"
        entry = {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}
        choice: dict[str, Any] = {
            "index": 0,
            "delta": {"content": text},
            "logprobs": {"content": [entry]} if ids else None,
            "finish_reason": "stop" if last else None,
            **({"stop_reason": None} if last else {}),
            "token_ids": [number] if ids else None,
        }
        events.append(event([choice], **(fingerprint if last and not usage else {})))
    if usage:
        events.append(event([], usage=_usage(tokens), **fingerprint))
    return [*events, b"data: [DONE]\n\n"]


@functools.lru_cache(maxsize=32)
def _frames(tokens: int, ids: bool, usage: bool) -> tuple[bytes, ...]:
    """The events as HTTP chunks; the last frame also ends the body."""
    frames = [b"%x\r\n%b\r\n" % (len(e), e) for e in chunks(tokens, ids=ids, usage=usage)]
    frames[-1] += b"0\r\n\r\n"
    return tuple(frames)


@functools.lru_cache(maxsize=32)
def whole(tokens: int = TOKENS, ids: bool = False) -> bytes:
    """A reply that is not streamed: with token ids and log-probs if `ids`."""
    texts = [f" word{number}" for number in range(tokens)]
    entries = [
        {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}
        for text in texts
    ]
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(texts)},
        "logprobs": {"content": entries} if ids else None,
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": list(range(tokens)) if ids else None,
    }
    reply = {
        **{"id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": MODEL},
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-mock",
        "usage": _usage(tokens),
        "prompt_logprobs": None,
        "prompt_token_ids": list(range(PROMPT_TOKENS)) if ids else None,
    }
    return json.dumps(reply, separators=(",", ":")).encode()


def _usage(tokens: int) -> dict[str, int]:
    total = PROMPT_TOKENS + tokens
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": total,
        "completion_tokens": tokens,
    }


class _Connection(asyncio.Protocol):
    """One kept-alive connection; clients ask again only after the end of a reply."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        wanted = int(length[1]) if length else 0
        if len(rest) < wanted:
            return
        self._received = rest[wanted:]
        self._answer(head[: head.index(b"\r\n")].split(b" ")[1], rest[:wanted])

    def _answer(self, path: bytes, body: bytes) -> None:
        if path == b"/v1/chat/completions":
            asked = orjson.loads(body)
            if asked.get("stream"):
                self._stream(asked)
            else:
                ids = bool(asked.get("return_token_ids"))
                self._once(whole(asked.get("tokens", TOKENS), ids))
        elif path == b"/v1/completions":
            self._once({"model": orjson.loads(body)["model"], "choices": []})
        elif path == b"/v1/models":
            self._once({"data": [{"id": MODEL, "parent": None, "root": MODEL}]})
        elif path == b"/health":
            self._once({})
        else:
            self._once({"detail": "Not Found"}, b"404 Not Found")

    def _once(self, answer: dict[str, Any] | bytes, status: bytes = b"200 OK") -> None:
        body = answer if isinstance(answer, bytes) else orjson.dumps(answer)
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)

    def _stream(self, request: dict[str, Any]) -> None:
        tokens: int = request.get("tokens", TOKENS)
        usage = bool((request.get("stream_options") or {}).get("include_usage"))
        frames = _frames(tokens, bool(request.get("return_token_ids")), usage)
        self._transport.write(_STREAM_HEAD)
        started = self._loop.time()
        self._send(frames, 0, started, request.get("pace_s", 0.0), tokens)

    def _send(
        self, frames: tuple[bytes, ...], number: int, started: float, pace_s: float, tokens: int
    ) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(frames[number])
        number += 1
        if number == len(frames):
            return
        if pace_s and number <= tokens:
            due = started + number * pace_s
            self._loop.call_at(due, self._send, frames, number, started, pace_s, tokens)
        else:  # in another iteration of the loop: uvloop joins the writes of one iteration
            self._loop.call_soon(self._send, frames, number, started, pace_s, tokens)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Connection, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    """Serves until killed."""
    uvloop.run(_serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
