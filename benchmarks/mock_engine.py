"""A mock vLLM that answers every chat request at once with a prepared 64-token stream.

python -m benchmarks.mock_engine PORT
"""

from __future__ import annotations

import json
import sys
from typing import Any

from aiohttp import web

MODEL = "mock"
TOKENS = 64


def chunks(ask: bool) -> list[bytes]:
    """The events of a reply, with token ids and log-probs if `ask`."""
    head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 1, "model": MODEL}

    def event(choice: dict[str, Any] | None, **more: Any) -> bytes:
        body = {**head, "choices": [] if choice is None else [choice], **more}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    base = {"index": 0, "logprobs": None, "finish_reason": None}
    first = {**base, "delta": {"role": "assistant", "content": ""}}
    events = [event(first, prompt_token_ids=list(range(200)) if ask else None, prompt_text=None)]
    for number in range(TOKENS):
        text = f" word{number}"
        logprob = {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []}
        choice = {
            **base,
            "delta": {"content": text},
            "logprobs": {"content": [logprob]} if ask else None,
            "finish_reason": "stop" if number == TOKENS - 1 else None,
            "token_ids": [number] if ask else None,
        }
        events.append(event(choice))
    if ask:
        usage = {"prompt_tokens": 200, "completion_tokens": TOKENS, "total_tokens": 200 + TOKENS}
        events.append(event(None, usage=usage))
    return [*events, b"data: [DONE]\n\n"]


PLAIN, ASKED = chunks(False), chunks(True)


async def chat(request: web.Request) -> web.StreamResponse:
    """Streams the reply, one write an event."""
    body = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in ASKED if body.get("return_token_ids") else PLAIN:
        await response.write(event)
    await response.write_eof()
    return response


async def models(_: web.Request) -> web.Response:
    """The one model."""
    return web.json_response({"data": [{"id": MODEL, "parent": None, "root": "mock"}]})


async def once(request: web.Request) -> web.Response:
    """A completion, for the proxy's warm-up."""
    return web.json_response({"model": (await request.json())["model"], "choices": []})


async def health(_: web.Request) -> web.Response:
    """Always well."""
    return web.Response()


def main() -> None:
    """Serves until killed."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/completions", once)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, access_log=None)


if __name__ == "__main__":
    main()
