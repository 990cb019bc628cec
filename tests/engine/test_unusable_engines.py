"""An engine that is missing, wrong or not ready: what requests, the log and commands say."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.app.doctor import checks
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.status import status
from nextstate.engine.client import EngineClient
from nextstate.errors import StartError
from nextstate.store import Store
from proxy import replica, versions
from proxy.intervals import Intervals
from proxy.versions import Versions
from tests.engine.foreign_engines import (
    COMPLETIONS,
    ENGINES,
    QUICK,
    WRONG,
    Foreign,
    configured,
    html,
    relayed,
    serving,
)
from tests.proxy.running_proxy import request, running, until
from tests.scripted_engine import MODEL, Script, ScriptedEngine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_a_clear_503_at_once_and_one_log_line(
    store: Store,
    tmp_path: Path,
    name: str,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, why = WRONG[name]
    seen: list[None] = []
    looked = versions.look

    async def look(*args: Any, **more: Any) -> Any:
        seen.append(None)
        return await looked(*args, **more)

    monkeypatch.setattr(versions, "look", look)

    async def test() -> None:
        async with relayed(make(), store, tmp_path, intervals=QUICK, hold_s=1e6) as p:
            for path in ("chat/completions", "score"):
                body = request(stream=stream)
                answer = await p.http.post(f"{p.url}/v1/{path}", json=body)
                told = (await answer.json())["error"]["message"]
                assert answer.status == 503
                assert re.search(why, told)
            looks = len(seen)
            await until(lambda: len(seen) > looks + 3)
            found = await (await p.http.get(f"{p.url}/healthz")).json()
            assert re.search(why, found["engine_problem"])

    asyncio.run(test())
    lines = [record for record in caplog.records if record.name == "proxy.replica"]
    assert [record.levelno for record in lines] == [logging.WARNING]


def test_an_engine_that_cannot_serve_yet_is_waited_for_with_one_log_line(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    class Loading(ScriptedEngine):
        looks = 0

        async def _models(self, request: web.Request) -> web.Response:
            self.looks += 1
            if self.looks < 6:
                return web.json_response({"error": {"message": "Loading model"}}, status=503)
            return await super()._models(request)

    async def test() -> None:
        async with relayed(Loading(), store, tmp_path, intervals=QUICK) as p:
            assert (await p.chat(request()))[0] == 200

    asyncio.run(test())
    lines = [record for record in caplog.records if record.name == "proxy.replica"]
    assert [record.levelno for record in lines] == [logging.WARNING, logging.INFO]
    assert "Loading model" in lines[0].getMessage()


def test_an_engine_that_is_not_there_is_one_log_line(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loud = Intervals(quiet_start_s=0.0, down_poll_s=0.01)
    looks: list[None] = []
    healthy = EngineClient.healthy

    async def looked(engine: EngineClient) -> bool:
        looks.append(None)
        return await healthy(engine)

    monkeypatch.setattr(EngineClient, "healthy", looked)

    async def test() -> None:
        async with running("http://127.0.0.1:1", store, tmp_path, intervals=loud):
            await until(lambda: len(looks) > 5)

    asyncio.run(test())
    [line] = [record for record in caplog.records if record.name == "proxy.replica"]
    assert "the engine is not there, requests wait" in line.getMessage()
    assert "http://127.0.0.1:1" in line.getMessage()


def test_the_pause_grows_while_an_engine_answers_and_cannot_serve(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def wait_for(waiting: Coroutine[Any, Any, bool], pause: float) -> None:
        waiting.close()
        pauses.append(pause)
        if len(pauses) == 8:
            raise asyncio.CancelledError

    async def test() -> None:
        async with serving(html(200)) as url, EngineClient(url, MODEL) as engine:
            watched = Versions(store, [engine], ["main"], tmp_path / "none")
            monkeypatch.setattr(replica.asyncio, "wait_for", wait_for)
            with pytest.raises(asyncio.CancelledError):
                await watched.replicas[0].watch(watched)

    asyncio.run(test())
    assert pauses == [0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]


DOCTOR: dict[str, tuple[Any, list[str]]] = {
    "a vLLM": (ScriptedEngine, []),
    "a vLLM that tells raw log-probs": (
        lambda: ScriptedEngine(Script(raw_logprobs=True)),
        [r"learning lacks the sampler's log-probs .*--logprobs-mode processed_logprobs"],
    ),
    "a vLLM with other defaults": (
        lambda: ScriptedEngine(Script(temperature=0.3)),
        [r"learning lacks the sampling defaults of its model, none"],
    ),
    "ollama": (
        lambda: Foreign(**ENGINES["ollama"][0]),
        [r"learning lacks /v1/completions", "log-probs", "token ids", "runtime adapters"],
    ),
    "no model": (lambda: Foreign(names=("a", "b")), [r"lacks the model 'base'.*it serves a, b"]),
    "a web page": (lambda: html(200), ["no OpenAI server"]),
    "one without a list": (
        lambda: Foreign(lists=False, tells_ids=False),
        ["learning lacks token ids", "runtime adapters"],
    ),
    "a locked one": (lambda: Foreign(key="k"), [r"refuses our key \(401\).*api_key_env"]),
    "one that loads": (lambda: html(503), [r"does not serve: .*503"]),
}


@pytest.mark.parametrize("name", DOCTOR)
def test_the_doctor_says_of_an_external_engine_what_is_wrong_in_a_line_each(
    tmp_path: Path, name: str
) -> None:
    make, expected = DOCTOR[name]
    (tmp_path / "state").mkdir()

    async def test() -> list[str]:
        async with serving(make()) as url:
            file = configured(tmp_path, url)
            return await asyncio.to_thread(lambda: engine_problems(file))

    found = asyncio.run(test())
    assert len(found) == len(expected)
    for problem, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, problem)
        assert "\n" not in problem


def test_the_doctor_names_an_address_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    [problem] = engine_problems(configured(tmp_path, "http://127.0.0.1:1/v1"))
    assert "http://127.0.0.1:1" in problem
    [problem] = engine_problems(configured(tmp_path, "127.0.0.1:1"), "configuration")
    assert "expected http://HOST:PORT" in problem


def engine_problems(file: Path, name: str = "engine") -> list[str]:
    found = [check for check in checks(file) if check.name.startswith(name)]
    return [check.problem for check in found if check.problem is not None]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not speak HTTP"),
        (b"-ERR unknown command 'GET'\r\n", "does not speak HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "does not speak HTTP; is it https://"),
        (b"", "does not serve: Server disconnected"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 6\r\n\r\na\n\nb\nc", "does not serve: .*502"),
        (b"HTTP/1.1 429 X\r\nContent-Length: 6\r\n\r\na\n\nb\nc", "does not serve: .*429: a b"),
    ],
)
def test_whatever_answers_the_doctor_and_status_say_it_in_one_line(
    store: Store, tmp_path: Path, said: bytes, expected: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(said)
        writer.close()

    async def test() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with running(url, store, tmp_path, intervals=QUICK) as p:
                watched = p.proxy.versions
                await until(lambda: bool(watched.wrong or watched.trouble))
                file = configured(tmp_path, url, port=int(p.url.rpartition(":")[2]))
                [problem] = await asyncio.to_thread(lambda: engine_problems(file))
                seen = (await status(Settings.read(file)))["engine"]
            alone = (await status(Settings.read(file)))["engine"]
        for line in (problem, seen):
            assert re.search(expected, line)
            assert "\n" not in line
            assert len(line) < 200
        assert alone.startswith("up" if b"429" in said else ("down: ", "unusable: "))

    asyncio.run(test())


def test_another_server_in_the_engines_place_is_noticed_and_logged_once(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    async def test() -> None:
        often = Intervals(health_poll_s=0.01, down_poll_s=0.01, slowest_poll_s=0.01)
        engine = ScriptedEngine()
        async with relayed(engine, store, tmp_path, intervals=often, hold_s=5) as p:
            watched = p.proxy.versions
            await asyncio.wait_for(watched.wait_up(), 60)
            assert engine.server is not None
            port = engine.server.port
            await engine.server.close()
            async with await asyncio.start_server(answer, "127.0.0.1", port):
                await until(lambda: watched.wrong is not None)
                assert (await p.chat(request()))[0] == 503
                assert "does not speak HTTP" in (watched.wrong or "")

    asyncio.run(test())
    lines = [r.getMessage() for r in caplog.records if r.name == "proxy.replica"]
    assert len([line for line in lines if "does not speak HTTP" in line]) == 1


def test_https_to_a_server_without_tls_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()

    async def test() -> list[str]:
        async with serving(ScriptedEngine()) as url:
            file = configured(tmp_path, url.replace("http:", "https:"))
            return await asyncio.to_thread(lambda: engine_problems(file))

    [problem] = asyncio.run(test())
    assert "is it http://?" in problem


def test_status_says_what_learning_lacks(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine) -> str:
        async with relayed(engine, store, tmp_path) as p:
            versions_ = p.proxy.versions
            await until(lambda: versions_.up or versions_.wrong is not None)
            port = int(p.url.rpartition(":")[2])
            file = configured(tmp_path, engine.url, port=port)
            return (await status(Settings.read(file)))["engine"]

    said = asyncio.run(test(Foreign(**ENGINES["ollama"][0])))
    assert said.startswith(f"up; learning lacks {COMPLETIONS}")
    assert asyncio.run(test(ScriptedEngine())) == "up"
    assert "no OpenAI server" in asyncio.run(test(html(200)))


def test_status_says_as_much_for_a_proxy_with_a_key(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENTS", "secret")

    async def test() -> None:
        engine = Foreign(key="engine-key", **ENGINES["ollama"][0])
        async with relayed(engine, store, tmp_path, key="secret") as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            keyed = {"Authorization": "Bearer secret"}
            await p.http.post(f"{p.url}/v1/completions", data=b"no JSON", headers=keyed)
            port = int(p.url.rpartition(":")[2])
            file = configured(tmp_path, engine.url, 'api_key_env = "ENGINES"', port)
            file.write_text(file.read_text() + 'api_key_env = "CLIENTS"\n')
            found = await status(Settings.read(file))
            assert (found["proxy"], found["unrecorded"]) == ("up", {"body": 1})
            # The engine's key need not be known here: the proxy has asked.
            assert found["engine"].startswith(f"up; learning lacks {COMPLETIONS}")
            for other in ("wrong", ""):
                monkeypatch.setenv("CLIENTS", other)
                found = await status(Settings.read(file))
                assert found["engine"].startswith("up; learning lacks")
                assert "[proxy] api_key_env = 'CLIENTS'" in found["unrecorded"]

    asyncio.run(test())
    down = asyncio.run(status(Settings.read(configured(tmp_path, "http://h", 'api_key_env = "E"'))))
    assert (down["proxy"], down["unrecorded"]) == ("down", {})
    assert "the environment variable E is not set" in down["engine"]


def test_status_follows_no_redirect_of_what_stands_in_the_proxys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENTS", "secret")
    asked: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=307, headers={"Location": "/moved"})

    async def test() -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", redirect)
        async with TestServer(app) as server:
            file = configured(tmp_path, "http://h", port=server.port or 0)
            file.write_text(file.read_text() + 'api_key_env = "CLIENTS"\n')
            return (await status(Settings.read(file)))["proxy"]

    assert asyncio.run(test()) == "answers 307"
    assert set(asked) == {"/healthz", "/metrics"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_status_counts_replies_that_went_out_without_a_record(
    store: Store, tmp_path: Path, record: bool, stream: bool
) -> None:
    async def test() -> None:
        async with relayed(ScriptedEngine(), store, tmp_path, record=record) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            port = int(p.url.rpartition(":")[2])
            settings = Settings.read(configured(tmp_path, "http://h", port=port))
            for _ in range(2):
                assert (await p.chat(request(stream=stream)))[0] == 200
            p.proxy.recorder.counts.lost = 3
            off = {} if record else {"recording_off": 2}
            assert (await status(settings))["unrecorded"] == {"lost": 3, **off}

    asyncio.run(test())


def test_up_ends_at_once_where_only_a_person_can_help(store: Store, tmp_path: Path) -> None:
    async def test() -> None:
        engine = Foreign(key="other")
        async with relayed(engine, store, tmp_path) as p:
            port = int(p.url.rpartition(":")[2])
            stack = Stack(Settings.read(configured(tmp_path, engine.url, port=port)))
            forever = asyncio.create_task(asyncio.Event().wait())
            with pytest.raises(StartError, match="refuses our key"):
                await asyncio.wait_for(stack.wait_ready(forever), 10)  # pyright: ignore
            forever.cancel()

    asyncio.run(test())
