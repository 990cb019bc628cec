"""What the judge, the learner and the supervisor ask of several engines."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.app.doctor import checks
from nextstate.app.engine_access import engine_access, engine_clients, write_engine_file
from nextstate.app.settings import Settings
from nextstate.config import EngineConfig
from nextstate.engine import process
from nextstate.engine.client import EngineClient
from nextstate.engine.process import check_replicas, of_replica
from nextstate.engine.several import Renderers, live_requests
from nextstate.errors import AnswerError, BusyError, ConfigError, EngineError
from nextstate.hooks import Evidence, JudgeSettings
from nextstate.records import NextState, Source
from plugins.judges.engine import EngineJudge
from tests.scripted_engine import MODEL, scripted_engine

NOBODY = "http://127.0.0.1:1"
MESSAGES = [{"role": "user", "content": "hi"}]
EVIDENCE = Evidence((("user", "Go."),), "Gone.", (NextState("t", Source.USER, "No.", 0.9),))


def test_prompts_are_rendered_by_an_engine_that_answers() -> None:
    async def test() -> None:
        async with (
            scripted_engine() as engine,
            EngineClient(engine.url, MODEL) as up,
            EngineClient(NOBODY, MODEL) as down,
        ):
            renderers = Renderers([down, up])
            assert await renderers.tokenize(MESSAGES, None, {})
            assert renderers._engines[0] is up
            with pytest.raises(EngineError, match="failed"):
                await Renderers([down, down]).tokenize(MESSAGES, None, {})

    asyncio.run(test())


def test_the_requests_of_all_engines_that_answer_are_counted() -> None:
    async def metrics(_: web.Request) -> web.Response:
        text = "vllm:num_requests_running 2\nvllm:num_requests_waiting 1\n"
        return web.Response(text=text)

    async def test() -> None:
        app = web.Application()
        app.router.add_get("/metrics", metrics)
        async with TestServer(app) as server, AsyncExitStack() as opened:
            urls = [str(server.make_url("/")), str(server.make_url("/")), NOBODY]
            made = [await opened.enter_async_context(EngineClient(u, MODEL)) for u in urls]
            assert await live_requests(made) == 6
            with pytest.raises(EngineError, match="failed"):
                await live_requests(made[2:])

    asyncio.run(test())


def test_votes_go_to_each_engine_in_turn_and_past_one_that_is_down() -> None:
    asked: list[int] = []

    def app(number: int) -> web.Application:
        async def chat(_: web.Request) -> web.Response:
            asked.append(number)
            return web.json_response({"choices": [{"message": {"content": "x"}}]})

        made = web.Application()
        made.router.add_post("/v1/chat/completions", chat)
        return made

    async def test() -> None:
        async with TestServer(app(0)) as one, TestServer(app(1)) as two:
            urls = [f"{server.make_url('/v1')!s}" for server in (one, two)]
            judge = EngineJudge(JudgeSettings("m", urls[0], further_urls=(f"{NOBODY}/v1", urls[1])))
            for _ in range(4):
                await judge._ask({})
            assert asked == [0, 1, 0, 1]
            await judge.close()
        alone = EngineJudge(JudgeSettings("m", f"{NOBODY}/v1"))
        with pytest.raises(BusyError, match="failed"):
            await alone.vote(EVIDENCE, 0)
        await alone.close()

    asyncio.run(test())


def test_an_answer_that_refuses_is_no_engine_that_is_down() -> None:
    async def test() -> None:
        async with scripted_engine() as engine, AsyncExitStack() as opened:
            urls = [engine.url, engine.url]
            made = [await opened.enter_async_context(EngineClient(u, MODEL)) for u in urls]
            assert engine.server is not None
            engine.resets = 1
            assert await Renderers(made).tokenize(MESSAGES, None, {})

            async def refused(*_: object) -> list[int]:
                raise AnswerError("400", 400)

            made[0].tokenize = refused
            with pytest.raises(AnswerError):
                await Renderers(made).tokenize(MESSAGES, None, {})

    asyncio.run(test())


@pytest.mark.parametrize(("devices", "share"), [("0,1", ["0", "1"]), ("4, 5,6,7", ["4,5", "6,7"])])
def test_engines_on_gpus_divide_those_that_are_named(
    monkeypatch: pytest.MonkeyPatch, devices: str, share: list[str]
) -> None:
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    config = EngineConfig(replicas=2, env={"CUDA_VISIBLE_DEVICES": devices})
    check_replicas(config)
    found = [of_replica(config, number).env["CUDA_VISIBLE_DEVICES"] for number in range(2)]
    assert found == share
    assert of_replica(replace(config, replicas=1), 0).env == config.env


@pytest.mark.parametrize("env", [{}, {"CUDA_VISIBLE_DEVICES": "0,1,2"}])
def test_engines_that_cannot_divide_the_gpus_are_not_started(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    with pytest.raises(ConfigError, match=r"replicas = 2 divide the GPUs .*CUDA_VISIBLE_DEVICES"):
        check_replicas(EngineConfig(replicas=2, env=env))
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    check_replicas(EngineConfig(replicas=2, env=env))


def test_the_supervisors_names_and_addresses_reach_every_part(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}"\n[engine]\nreplicas = 2\n')
    settings = Settings.read(file)
    write_engine_file(settings, [NOBODY, "http://127.0.0.1:2"], "secret")
    assert engine_access(settings) == ([NOBODY, "http://127.0.0.1:2"], "secret")

    async def names() -> list[str]:
        async with engine_clients(settings) as made:
            return [one.name for one in made]

    assert asyncio.run(names()) == ["engine-0", "engine-1"]


def test_the_doctor_looks_at_each_engine(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"

    async def test() -> None:
        async with scripted_engine() as engine:
            file.write_text(
                f'[store]\ndir = "{tmp_path}"\n[engine]\nmode = "external"\n'
                f'served_model_name = "{MODEL}"\nurl = ["{engine.url}", "{NOBODY}"]\n'
            )
            found = await asyncio.to_thread(lambda: [*checks(file)])
            one, other = [check for check in found if check.name == "engine"]
            assert (one.problem, engine.url in one.found) == (None, True)
            assert f"{NOBODY!r} does not serve" in str(other.problem)

    asyncio.run(test())
