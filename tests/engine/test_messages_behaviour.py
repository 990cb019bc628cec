"""The behaviour of /v1/messages is found out from token counts, whatever the template is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web

from nextstate.engine.client import EngineClient
from nextstate.engine.messages_behaviour import MessagesBehaviour, learn_messages_behaviour
from nextstate.records import Json


@dataclass
class Template:
    """A server that counts what its template renders, as vLLM does."""

    merges: bool = False
    efforts: str = "switch"
    """"switch": thinking is on or off; "ignored"; "named": each effort is; "strict": named, and
    "none" is refused."""
    disabled: str | None = None
    """The effort that the server was told to take for disabled thinking."""
    shows_no_tools: bool = False
    counts: bool = True

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/tokenize", self.tokenize)
        if self.counts:
            app.router.add_post("/v1/messages/count_tokens", self.count)
        return app

    def render(self, messages: list[Json], effort: str | None) -> list[int]:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        if effort is not None and self.efforts == "switch":
            text += "<think></think>" if effort == "none" else "<think>"
        elif effort is not None and self.efforts in ("named", "strict"):
            text += f"[{effort:>6}]"
        return [*text.encode()]

    def refuses(self, effort: str | None) -> bool:
        return self.efforts == "strict" and effort == "none"

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        effort = body["chat_template_kwargs"]["reasoning_effort"]
        if self.refuses(effort):
            return web.json_response({}, status=400)
        return web.json_response({"tokens": self.render(body["messages"], effort)})

    async def count(self, request: web.Request) -> web.Response:
        body = await request.json()
        effort = None
        if body.get("thinking"):
            ignored = self.efforts in ("ignored", "strict")
            effort = self.disabled or ("low" if ignored else "none")
        messages = self.placed(body)
        tools = 5 if self.shows_no_tools and "tools" in body else 0
        return web.json_response({"input_tokens": len(self.render(messages, effort)) + tools})

    def placed(self, body: Json) -> list[Json]:
        start = body.get("system", "")
        messages: list[Json] = body["messages"]
        if self.merges:
            start += "".join(m["content"] for m in messages if m["role"] == "system")
            messages = [m for m in messages if m["role"] != "system"]
        return [{"role": "system", "content": start}, *messages] if start else messages


def learnt(template: Template) -> MessagesBehaviour:
    async def learn() -> MessagesBehaviour:
        async with served(template) as url, EngineClient(url, "m") as engine:
            return await learn_messages_behaviour(engine)

    return asyncio.run(learn())


@asynccontextmanager
async def served(template: Template) -> AsyncGenerator[str]:
    runner = web.AppRunner(template.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("shown", [False, True])
def test_behaviour_that_depends_on_the_template_is_found_out(merges: bool, shown: bool) -> None:
    behaviour = learnt(Template(merges=merges, shows_no_tools=shown))
    assert behaviour == MessagesBehaviour(merges, "none", shown)


@pytest.mark.parametrize(
    ("template", "effort"),
    [
        (Template(efforts="switch"), "none"),
        (Template(efforts="named"), "none"),
        (Template(efforts="ignored"), "low"),
        (Template(efforts="strict"), "low"),
        (Template(efforts="switch", disabled="low"), None),
    ],
)
def test_disabled_thinking_is_what_the_server_reads_it_as(
    template: Template, effort: str | None
) -> None:
    assert learnt(template).disabled_effort == effort


def test_the_behaviour_of_an_engine_that_counts_no_tokens_is_unknown() -> None:
    assert learnt(Template(counts=False)) == MessagesBehaviour()


def test_the_behaviour_of_an_engine_that_is_away_is_unknown() -> None:
    async def learn() -> MessagesBehaviour:
        async with EngineClient("http://127.0.0.1:9", "m") as engine:
            return await learn_messages_behaviour(engine)

    assert asyncio.run(learn()) == MessagesBehaviour()
