"""What a browser's page may ask with and without a key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from nextstate.store import Store
from proxy.lineages import Access
from tests.attacks.from_pages import SITES
from tests.proxy.running_proxy import Running, both, request
from tests.proxy.test_edge import JSON, get, post
from tests.proxy.test_requests import ask
from tests.scripted_engine import ScriptedEngine

FOREIGN = [
    (("Origin: http://evil.example",), "localhost"),
    (("Sec-Fetch-Site: cross-site",), "localhost"),
    ((), "evil.example"),
]
"""One of each kind; `tests/attacks/from_pages.py` has every way to look like our own page."""


def test_another_sites_page_is_told_why_and_what_to_do(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for lines, host in FOREIGN:
            for raw in (
                post("/v1/chat/completions", JSON, *lines, host=host),
                get("/v1/models", *lines, host=host),
                get("/healthz", *lines, host=host),
            ):
                found = await ask(p.url, raw)
                assert (found.status, found.error["type"]) == (403, "PermissionDeniedError"), raw
                assert found.error["message"].split(":")[0] in ("Host", "Origin", "Sec-Fetch-Site")
                assert "[proxy] api_key_env" in found.error["message"]
                assert "access-control-allow-origin" not in found.headers
        assert engine.requests == []

    both(test, store, tmp_path)


OWN = [
    ((), "localhost:8080"),
    ((), "LOCALHOST."),
    ((), "127.0.0.1:1"),
    ((), "127.8.9.1"),
    ((), "[::1]:8080"),
    ((), "app.localhost"),
    ((), "0.0.0.0:8080"),
    ((), "192.168.1.7:8080"),
    ((), "host.docker.internal:8080"),
    ((), "nextstate:8080"),
    (("Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"), "localhost:8080"),
    (("Origin: http://127.0.0.1:5173", "Sec-Fetch-Site: cross-site"), "localhost:8080"),
    (("Origin: http://[::1]:3000",), "localhost"),
    (("Origin: https://chat.localhost",), "localhost"),
    (("Origin: app://obsidian.md",), "localhost"),
    (("Origin: tauri://localhost",), "localhost"),
    (("Sec-Fetch-Site: none",), "localhost"),
    (("Sec-Fetch-Site: same-origin",), "localhost"),
    (("Referer: http://evil.example", "User-Agent: Mozilla/5.0"), "localhost"),
]


@pytest.mark.parametrize(("lines", "host"), OWN)
def test_programs_and_this_machines_own_pages_need_no_key(
    store: Store, tmp_path: Path, lines: tuple[str, ...], host: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        found = await ask(p.url, post("/v1/chat/completions", JSON, *lines, host=host))
        assert found.status == 200
        origin = next((x[8:] for x in lines if x.startswith("Origin: ")), None)
        assert found.headers.get("access-control-allow-origin") == origin
        said = orjson.dumps({"turn_id": found.headers["x-nextstate-turn"], "score": 1})
        raw = post("/v1/feedback", JSON, *lines, host=host, body=said)
        assert (await ask(p.url, raw)).status == 200

    both(test, store, tmp_path)


def test_a_client_with_a_key_may_come_from_anywhere(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for lines, host in SITES:
            keyed = ("Authorization: Bearer secret", *lines)
            found = await ask(p.url, post("/v1/chat/completions", JSON, *keyed, host=host))
            assert found.status == 200
            if any(line.startswith("Origin:") for line in lines):
                assert found.headers["access-control-allow-origin"] == "*"
            bare = await ask(p.url, post("/v1/chat/completions", JSON, *lines, host=host))
            assert bare.status == 401

    both(test, store, tmp_path, key="secret")


def test_a_lineages_key_is_a_key(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        lines = (JSON, "Origin: http://evil.example")
        asks = "Access-Control-Request-Method: POST"
        preflight = get("/v1/chat/completions", lines[1], asks, method="OPTIONS")
        assert (await ask(p.url, preflight)).status == 204
        assert (await ask(p.url, post("/v1/chat/completions", *lines))).status == 403
        keyed = (*lines, "Authorization: Bearer hers")
        assert (await ask(p.url, post("/v1/chat/completions", *keyed))).status == 200

    both(test, store, tmp_path, access={"alice": Access("alice", "hers")})


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_preflight_needs_no_key(store: Store, tmp_path: Path, key: str | None) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        asks = (
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type",
        )
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/feedback", "/v1/models"):
            mine = await ask(
                p.url, get(path, "Origin: http://localhost:3000", *asks, method="OPTIONS")
            )
            assert mine.status == 204
            origin = mine.headers["access-control-allow-origin"]
            assert origin == ("*" if key else "http://localhost:3000")
            assert mine.headers["access-control-allow-headers"] == "authorization,content-type"
            assert mine.headers["access-control-allow-methods"] == "POST"
            other = await ask(
                p.url, get(path, "Origin: http://evil.example", *asks, method="OPTIONS")
            )
            assert other.status == (204 if key else 403)
        assert engine.requests == []

    both(test, store, tmp_path, key=key)


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"),
        *("", "application/json-patch+json"),
    ],
)
def test_feedback_is_json_only(store: Store, tmp_path: Path, kind: str) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        turn = (await p.chat(request()))[2]["x-nextstate-turn"]
        said = orjson.dumps({"turn_id": turn, "score": 1})
        for lines in ([f"Content-Type: {kind}"] if kind else [], [f"Content-Type: {kind};a=b"]):
            found = await ask(p.url, post("/v1/feedback", *lines, body=said))
            assert found.status == 415
            assert found.error["message"].startswith("Content-Type: ")
        assert store.judging.feedback(turn) is None
        raw = post("/v1/feedback", f"{JSON}; charset=utf-8", body=said)
        assert (await ask(p.url, raw)).status == 200

    both(test, store, tmp_path)


def test_healthz_names_a_lineage_only_to_callers_that_may_see_it(
    store: Store, tmp_path: Path
) -> None:
    access = {"alice": Access("alice", "hers"), "open": Access("open", None)}

    async def test(engine: ScriptedEngine, p: Running) -> None:
        async def seen(*lines: str) -> list[str] | None:
            found = json.loads((await ask(p.url, get("/healthz", *lines))).body)
            assert (found["proxy"], found["engine"]) == ("up", "up")
            return sorted(found["lineages"]) if "lineages" in found else None

        assert await seen() is None
        assert await seen("Authorization: Bearer wrong") is None
        assert await seen("Authorization: Bearer secret") == ["main", "open"]
        assert await seen("x-api-key: hers") == ["alice"]

    both(test, store, tmp_path, key="secret", access=access)


def test_a_page_reads_the_turn_of_a_streamed_reply(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with aiohttp.ClientSession() as http:
            headers = {"Origin": "http://localhost:3000"}
            body: dict[str, Any] = request(stream=True)
            async with http.post(
                f"{p.url}/v1/chat/completions", json=body, headers=headers
            ) as found:
                assert found.headers["Access-Control-Allow-Origin"] == headers["Origin"]
                assert "x-nextstate-turn" in found.headers["Access-Control-Expose-Headers"]

    both(test, store, tmp_path)
