"""A request to generate is answered by the serving version and recorded, or gets an error."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.engine.client import publish
from nextstate.store import Store
from tests.proxy.running_proxy import Running, add_version, both, request, running, until
from tests.scripted_engine import MODEL, ScriptedEngine

TEXT = '{"model": "base", "messages": [{"role": "user", "content": "héllo"}], "x": %s}'
BODIES = {
    "byte order mark": b"\xef\xbb\xbf" + (TEXT % "1").encode(),
    "UTF-16": (TEXT % "1").encode("utf-16"),
    "UTF-16, big end first": (TEXT % "1").encode("utf-16-be"),
    "UTF-32": (TEXT % "1").encode("utf-32"),
    "NaN": (TEXT % "NaN").encode(),
    "infinity": (TEXT % '{"a": [-Infinity, 1e999]}').encode(),
    "beyond 64 bits": (TEXT % "[18446744073709551617, -99999999999999999999]").encode(),
    "lone surrogate": (TEXT % '"\\ud83d and \\udc00"').encode(),
    "lone surrogate said": (TEXT % "1").replace("héllo", "h\\ud83dllo").encode(),
    "lone surrogate in a name": (TEXT % '{"\\udfff": 1}').encode(),
    "nested deep": (TEXT % ("[" * 400 + "]" * 400)).encode(),
    "nested as deep as it may be": (TEXT % ('{"a":' * 449 + "1" + "}" * 449)).encode(),
    "twice": (TEXT % '1, "model": "base", "x": 2').encode(),
    "no model": (TEXT % "1").replace('"model": "base", ', "").encode(),
}
UNREADABLE = {
    "not JSON": b"{nonsense",
    "nothing": b"",
    "a list": b'[{"model": "base"}]',
    "a text": b'"base"',
    "deeper than anyone reads": b'{"model": "base", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "more digits than Python reads": b'{"model": "base", "x": ' + b"7" * 5000 + b"}",
    "no UTF-8": b'{"model": "base", "x": "\xff"}',
    "more than one": b'{"model": "base", "messages": []} {}',
}


async def serve(store: Store, p: Running, tmp_path: Path) -> str:
    """Puts a version into service; returns its name at the engine."""
    version = add_version(store, tmp_path, 1)
    await publish(store, p.proxy.engines, version)
    await until(lambda: p.proxy.versions.serving["main"].number == 1)
    return str(version.adapter_name)


@pytest.mark.parametrize("stream", [False, True])
def test_every_body_that_the_engine_reads_is_served_by_the_version_and_recorded(
    store: Store, tmp_path: Path, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        adapter = await serve(store, p, tmp_path)
        for name, data in BODIES.items():
            data = (
                data if not stream else data.replace(b'"messages"', b'"stream": true, "messages"')
            )
            sent = json.loads(data)
            answer = await p.http.post(f"{p.url}/v1/chat/completions", data=data)
            assert (answer.status, await answer.read() != b"") == (200, True), name
            got = engine.requests[-1]
            assert got.pop("model") == adapter, name
            assert repr({key: got[key] for key in sent if key != "model"}) == repr(
                {key: value for key, value in sent.items() if key != "model"}
            ), name
            turn = store.turns.get(answer.headers["x-nextstate-turn"])
            assert turn is not None, name
            assert turn.policy_version == 1
            assert repr(turn.request["x"]) == repr(sent["x"]), name
        page = await (await p.http.get(f"{p.url}/metrics")).text()
        assert re.findall(r"unrecorded_total\{.*\} [^0]", page) == []

    both(test, store, tmp_path)


def test_other_routes_get_the_serving_version_too(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        adapter = await serve(store, p, tmp_path)
        for name, data in BODIES.items():
            for kind in ("application/json", "text/plain"):
                headers = {"Content-Type": kind}
                answer = await p.http.post(f"{p.url}/v1/score", data=data, headers=headers)
                assert (answer.status, (await answer.json())["model"]) == (200, MODEL), name
                assert engine.requests[-1]["model"] == adapter, name

    both(test, store, tmp_path)


def test_a_form_is_not_answered_by_the_base_model_in_place_of_a_version(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        data = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--x--\r\n'
        path = f"{p.url}/v1/audio/transcriptions"
        answer = await p.http.post(path, data=data, headers=headers)
        assert answer.status == 404  # the engine's own: it has no such route
        await serve(store, p, tmp_path)
        answer = await p.http.post(path, data=data, headers=headers)
        assert answer.status == 400
        assert "takes a form" in (await answer.json())["error"]["message"]
        page = await (await p.http.get(f"{p.url}/metrics")).text()
        assert 'nextstate_requests_unrecorded_total{reason="route"} 2\n' in page

    both(test, store, tmp_path)


def test_a_body_that_cannot_be_read_gets_an_error_and_is_counted(
    store: Store, tmp_path: Path
) -> None:
    """Also from an engine that would take it."""

    async def lax(request: web.Request) -> web.Response:
        return web.json_response({"data": [], "model": MODEL, "choices": [{"text": "x"}]})

    async def run() -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", lax)
        async with (
            TestServer(app) as server,
            running(str(server.make_url("")), store, tmp_path) as p,
        ):
            await p.proxy.versions.wait_up()
            path = f"{p.url}/v1/chat/completions"
            for name, data in UNREADABLE.items():
                answer = await p.http.post(path, data=data)
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, 400), name
            good = json.dumps({"model": MODEL, "messages": []})
            for kind in ("text/plain", "application/octet-stream", "multipart/form-data"):
                answer = await p.http.post(path, data=good, headers={"Content-Type": kind})
                assert answer.status == 400
                assert kind in (await answer.json())["error"]["message"]
            for model in ("other", 5, ["base"]):
                answer = await p.http.post(path, json={"model": model, "messages": []})
                assert answer.status == 400
                assert str(model) in (await answer.json())["error"]["message"]
            await p.http.post(f"{path}/batch", json={"model": MODEL, "messages": []})
            page = await (await p.http.get(f"{p.url}/metrics")).text()
            for reason, count in (("body", 8), ("content_type", 3), ("model", 3), ("route", 1)):
                counted = f'nextstate_requests_unrecorded_total{{reason="{reason}"}} {count}\n'
                assert counted in page
            assert page.count("# TYPE nextstate_requests_unrecorded_total counter\n") == 1

    asyncio.run(run())


def test_a_schema_that_could_end_the_engine_does_not_reach_it_in_any_spelling(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        schema = {"type": "array", "minItems": 123_456_789}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        text = json.dumps({"model": MODEL, "messages": [], "response_format": form})
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            for path in ("chat/completions", "completions", "chat/completions/batch"):
                answer = await p.http.post(f"{p.url}/v1/{path}", data=text.encode(encoding))
                message = (await answer.json())["error"]["message"]
                assert (answer.status, "minItems = 123456789" in message) == (400, True)
        assert engine.requests == []

    both(test, store, tmp_path)


def test_the_engine_gets_the_headers_it_reads_and_none_that_harms_others(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        mine = {"X-Vllm-Priority": "-5", "X-data-parallel-rank": "1", "X-Forwarded-For": "::1"}
        mine |= {"Cookie": "a=b", "X-Anything": "else", "api-key": "secret"}
        read = {"X-Request-ID": "r-1", "traceparent": "00-a-b-01", "X-Session-ID": "s"}
        for path in ("chat/completions", "chat/completions/batch"):
            await p.http.post(
                f"{p.url}/v1/{path}", json=request(priority=-7), headers={**mine, **read}
            )
        got = {name.lower(): value for name, value in engine.headers[-1].items()}
        assert not {name.lower() for name in mine} & set(got)
        assert {name: got.get(name.lower()) for name in read} == read
        assert engine.requests[-1]["priority"] == 0

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", ["chat/completions", "completions", "messages", "responses"])
def test_what_the_proxy_itself_refuses_is_counted(store: Store, tmp_path: Path, path: str) -> None:
    """A body that nests 500 levels was served, and its turn was lost."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Hi",
        "input": "Hi",
        "messages": [],
        "max_tokens": 5,
    }
    plain = {"Content-Type": "application/json"}

    def with_(value: str) -> bytes:
        return (json.dumps(body)[:-1] + f', "x": {value}}}').encode()

    refused = {
        "an array too deep": (with_("[" * 450 + "]" * 450), plain, 400, "450 levels"),
        "objects too deep": (with_('{"a":' * 600 + "1" + "}" * 600), plain, 400, "450 levels"),
        "too many choices": (with_('1, "n": 100000'), plain, 400, "at most 1024 choices"),
        "too many arrays": (with_("[" + "[]," * 300_000 + "1]"), plain, 400, "arrays"),
        "an adapter": (with_('1, "model": "main-v000001"'), plain, 404, "does not exist"),
        "too large": (with_('"' + "x" * (2 << 20) + '"'), plain, 413, "larger than 1 MB"),
        "compressed": (with_("1"), {**plain, "Content-Encoding": "gzip"}, 415, "uncompressed"),
    }

    async def test(engine: ScriptedEngine, p: Running) -> None:
        page = ""
        for count, (name, case) in enumerate(refused.items(), 1):
            data, headers, status, words = case
            url = f"{p.url}/v1/{path}"
            async with p.http.post(url, data=io.BytesIO(data), headers=headers) as answer:
                assert (answer.status, words in await answer.text()) == (status, True), name
            page = await (await p.http.get(f"{p.url}/metrics")).text()
            counted = f'nextstate_requests_unrecorded_total{{reason="refused"}} {count}\n'
            assert counted in page, name
        assert engine.requests == []
        assert "nextstate_turns_lost_total 0\n" in page

    both(test, store, tmp_path, max_body_mb=1)
