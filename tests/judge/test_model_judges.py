"""The judges that ask a model over HTTP and read what it writes: `litellm`, `engine` for a hint.

How `engine` votes by one word: tests/judge/test_one_word.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.errors import BusyError, JudgeError
from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, load_plugin
from nextstate.records import Json, NextState, Source, Vote

EVIDENCE = Evidence(
    (("user", "Name a river."),), "**Nile**", (NextState("t", Source.USER, "No bold.", 0.9),)
)


@dataclass
class Server:
    """A scripted OpenAI-compatible chat server."""

    content: str | None = '{"score": -1, "hint": "Do not use bold."}'
    status: int = 200
    finish_reason: str = "stop"
    refuses: str = "top_logprobs"
    """A field that the server refuses. By default it tells no log-probs: votes are written out."""
    also_refuses: str = ""
    requests: list[Json] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if refused := {self.refuses, self.also_refuses} & body.keys():
            said = f"{min(refused)} is not supported"
            return web.json_response({"error": {"message": said}}, status=400)
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
            | {"choices": [choice], "usage": usage}
        )


@asynccontextmanager
async def serving(server: Server) -> AsyncGenerator[Server]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield server
    finally:
        await runner.cleanup()


def asked(
    server: Server,
    kind: str,
    model: str,
    scene: Callable[[JudgeKind], Awaitable[Any]],
    **extra: Any,
) -> Any:
    async def whole() -> Any:
        async with serving(server):
            settings = JudgeSettings(
                model=model, base_url=server.url, api_key="k", timeout_s=10, extra=extra
            )
            judge: JudgeKind = load_plugin("judges", kind, settings)
            try:
                return await scene(judge)
            finally:
                await judge.close()

    return asyncio.run(whole())


def test_the_engine_judge_asks_for_a_schema_and_reads_the_vote() -> None:
    server = Server()
    vote = asked(server, "engine", "base", lambda judge: judge.vote(EVIDENCE, 7), priority=10)
    assert vote == Vote(-1, "Do not use bold.", tokens=2, written=1)
    body = server.requests[-1]
    assert (body["model"], body["priority"]) == ("base", 10)
    assert "seed" not in body  # vLLM on a CPU crashes when a seeded request meets a chunked prefill
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"]["enum"] == [1, 0, -1]
    assert "No bold." in body["messages"][-1]["content"]
    assert set(server.keys) == {"Bearer k"}


@pytest.mark.parametrize(
    "server",
    [
        Server(status=400),
        Server(status=503),
        Server(content=None),
        Server(content="word salad"),
        Server(finish_reason="length"),
    ],
    ids=lambda server: f"{server.status}-{server.content}-{server.finish_reason}"[:24],
)
def test_an_answer_without_a_vote_is_a_judge_error(server: Server) -> None:
    with pytest.raises(JudgeError):
        asked(server, "engine", "base", lambda judge: judge.vote(EVIDENCE, 1))


@pytest.mark.parametrize(("status", "busy"), [(429, True), (500, True), (503, True), (401, False)])
def test_a_busy_server_is_a_busy_error_and_a_refusal_is_not(status: int, busy: bool) -> None:
    for kind, model in (("engine", "base"), ("litellm", "openai/base")):
        with pytest.raises(JudgeError) as raised:
            asked(Server(status=status), kind, model, lambda judge: judge.vote(EVIDENCE, 1))
        assert isinstance(raised.value, BusyError) == busy


def test_a_server_that_refuses_a_schema_is_asked_without_one_afterwards() -> None:
    async def scene(judge: JudgeKind) -> list[Vote]:
        return [await judge.vote(EVIDENCE, seed) for seed in range(2)]

    server = Server(also_refuses="response_format")
    assert [vote.score for vote in asked(server, "engine", "base", scene)] == [-1, -1]
    written = [body for body in server.requests if "top_logprobs" not in body]
    assert ["response_format" in body for body in written] == [True, False, False]


def test_an_engine_that_is_down_is_a_judge_error() -> None:
    async def scene() -> None:
        settings = JudgeSettings(model="base", base_url="http://127.0.0.1:1/v1", timeout_s=5)
        judge: JudgeKind = load_plugin("judges", "engine", settings)
        try:
            with pytest.raises(JudgeError, match=r"127\.0\.0\.1:1"):
                await judge.vote(EVIDENCE, 1)
        finally:
            await judge.close()

    asyncio.run(scene())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("engine", "base"),
        ("litellm", "openai/base"),
        ("litellm", "hosted_vllm/base"),
        ("litellm", "anthropic/claude-3-5-haiku-latest"),
        ("litellm", "ollama_chat/base"),
    ],
)
def test_a_redirect_of_the_judges_server_is_not_followed(
    kind: str, model: str, status: int
) -> None:
    """A redirect could send the conversation, or the key, to another machine."""
    told: list[bytes] = []

    async def elsewhere(request: web.Request) -> web.Response:
        told.append(await request.read())
        return web.json_response({})

    async def scene() -> None:
        other, server = web.Application(), web.Application()
        other.router.add_route("*", "/{path:.*}", elsewhere)
        async with TestServer(other) as there:

            async def redirect(_: web.Request) -> web.Response:
                return web.Response(status=status, headers={"Location": str(there.make_url("/x"))})

            server.router.add_route("*", "/{path:.*}", redirect)
            async with TestServer(server) as here:
                settings = JudgeSettings(model, str(here.make_url("/v1")), "k")
                judge: JudgeKind = load_plugin("judges", kind, settings)
                with pytest.raises(JudgeError, match=rf"redirect \({status}\).*base_url"):
                    await judge.vote(EVIDENCE, 1)
                await judge.close()

    asyncio.run(scene())
    assert told == []


def test_the_litellm_judge_votes_through_the_real_package_and_wraps_its_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def scene(judge: JudgeKind) -> Vote:
        vote = await judge.vote(EVIDENCE, 3)
        server.status = 500
        with pytest.raises(JudgeError, match="openai/base"):
            await judge.vote(EVIDENCE, 4)
        return vote

    server = Server()
    assert asked(server, "litellm", "openai/base", scene) == Vote(
        -1, "Do not use bold.", tokens=2, written=1
    )
    assert [body["seed"] for body in server.requests] == [3, 4]
    assert server.requests[0]["model"] == "base"
    assert server.keys[0] == "Bearer k"
    assert not [record for record in caplog.records if "litellm" in record.name.lower()]


def test_litellm_is_imported_with_the_first_vote_only() -> None:
    code = (
        "import sys, json; from nextstate.hooks import JudgeSettings, load_plugin\n"
        "import judge.stage\n"
        "judge = load_plugin('judges', 'litellm', JudgeSettings(model='m'))\n"
        "print(json.dumps([m for m in ('litellm', 'openai', 'torch') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
