"""A mock model for the judge: each vote takes the same time, however many are asked for.

python -m benchmarks.mock_judge PORT VOTE_S
"""

from __future__ import annotations

import asyncio
import sys

import orjson
from aiohttp import web

from benchmarks.client import HOST

MODEL = "mock-judge"
_VOTE = orjson.dumps({"score": -1, "hint": "Answer in plain sentences, without a list."}).decode()
_ANSWER = {
    "id": "vote",
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": _VOTE},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 900, "completion_tokens": 20, "total_tokens": 920},
}


def main() -> None:
    """Serves until killed."""
    port, vote_s = int(sys.argv[1]), float(sys.argv[2])

    async def vote(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(vote_s)
        return web.json_response(_ANSWER)

    async def tokenize(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"tokens": list(range(900)), "count": 900, "max_model_len": 4096})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", vote)
    app.router.add_post("/tokenize", tokenize)
    web.run_app(app, host=HOST, port=port, print=None, access_log=None)


if __name__ == "__main__":
    main()
