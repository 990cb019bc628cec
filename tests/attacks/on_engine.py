"""A malicious engine, model or adapter: what its answers must not do to the client or the page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from nextstate.engine.client import publish
from nextstate.errors import NextStateError
from nextstate.keys import Scope
from nextstate.records import PolicyVersion, VersionState
from tests.attacks.lab import ENGINE_KEY, Attacker, Lab, condition
from tests.scripted_engine import MODEL, Script, write_weights

RUNS = "<script>fetch('/page')</script>"
Answering = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def answering(
    headers: dict[str, str] | None = None, body: bytes = b"{}", status: int = 200
) -> Answering:
    """An engine that gives everything but its own upkeep one answer."""

    async def answer(request: web.Request) -> web.StreamResponse | None:
        if request.path in ("/health", "/version") or "warm" in request.path:
            return None
        if request.path == "/v1/models" and "x-attack" not in request.query:
            return None
        return web.Response(status=status, body=body, headers=headers)

    return answer


async def asked(
    lab: Lab, answer: Answering, path: str = "/v1/models?x-attack=1", body: Any = None
) -> tuple[int, Any, bytes]:
    """(status, headers, body) that a client gets from the open door."""
    lab.engine.answer = answer
    method = "GET" if body is None else "POST"
    try:
        async with lab.http.request(
            method, lab.open.url + path, json=body, allow_redirects=False
        ) as found:
            try:
                return found.status, found.headers, await found.read()
            except aiohttp.ClientPayloadError:
                return found.status, found.headers, b""
    except aiohttp.ClientError:
        return 0, {}, b""
    finally:
        lab.engine.answer = None


def _headers(name: str, header: str, value: str) -> None:
    async def happens(lab: Lab) -> None:
        asked_for: Sequence[tuple[str, Any]] = (
            ("/v1/other?x-attack=1", None),
            ("/v1/chat/completions", {"model": MODEL, "messages": []}),
        )
        for path, body in asked_for:
            answer = answering({header: value, "Content-Type": "application/json"})
            _, headers, _ = await asked(lab, answer, path, body)
            assert value not in headers.getall(header, []), (path, header)

    happens.__name__ = f"the_engine_{name}"
    condition(Attacker.ENGINE)(happens)


for _name, _header, _value in (
    ("sets_a_login_of_its_own", "Set-Cookie", "nextstate-8080=" + "t" * 43 + "; Path=/"),
    ("sets_an_old_kind_of_cookie", "Set-Cookie2", "a=b"),
    ("clears_the_browsers_logins", "Clear-Site-Data", '"*"'),
    ("forbids_plain_http", "Strict-Transport-Security", "max-age=99999999"),
    ("widens_a_service_worker", "Service-Worker-Allowed", "/"),
    ("opens_the_answer_to_all_sites", "Access-Control-Allow-Origin", "http://evil.example"),
    ("allows_cookies_of_all_sites", "Access-Control-Allow-Credentials", "true"),
    ("allows_every_method", "Access-Control-Allow-Methods", "DELETE"),
    ("names_a_turn_that_is_not_ours", "X-NextState-Turn", "turn_" + "0" * 20),
    ("names_a_version_that_is_not_ours", "X-NextState-Version", "999"),
    ("moves_the_client", "Location", "http://169.254.169.254/latest"),
    ("moves_the_client_later", "Refresh", "0; url=http://evil.example"),
    ("names_another_server", "Alt-Svc", 'h2="evil.example:443"'),
    ("preloads_from_elsewhere", "Link", "<http://evil.example>; rel=preload"),
    ("has_reports_sent", "Report-To", '{"endpoints":[{"url":"http://evil.example"}]}'),
    ("has_errors_sent", "NEL", '{"report_to":"x"}'),
    ("asks_for_a_password", "WWW-Authenticate", "Basic"),
    ("switches_the_protocol", "Upgrade", "h2c"),
):
    _headers(_name, _header, _value)


def _kinds(name: str, kind: str | None) -> None:
    async def happens(lab: Lab) -> None:
        headers = {} if kind is None else {"Content-Type": kind}
        _, told, body = await asked(lab, answering(headers, RUNS.encode()), "/v1/x?x-attack=1")
        if RUNS.encode() in body:  # a browser that goes there must not run it as a page of ours
            assert "sandbox" in told.get("Content-Security-Policy", ""), told
            assert told.get("X-Content-Type-Options") == "nosniff", told

    happens.__name__ = f"the_engine_answers_with_a_page_as_{name}"
    condition(Attacker.ENGINE)(happens)


for _name, _kind in (
    ("html", "text/html"),
    ("xhtml", "application/xhtml+xml"),
    ("svg", "image/svg+xml"),
    ("xml", "text/xml; charset=utf-8"),
    ("nothing", None),
    ("plain_text", "text/plain"),
    ("no_kind", "x"),
    ("two_kinds", "application/json, text/html"),
    ("a_pdf", "application/pdf"),
):
    _kinds(_name, _kind)


def _redirects(status: int, to: str) -> None:
    async def happens(lab: Lab) -> None:
        answer = answering({"Location": to}, status=status)
        found, headers, _ = await asked(
            lab, answer, "/v1/chat/completions", {"model": MODEL, "messages": []}
        )
        assert found in (400, 502), found
        assert "Location" not in headers
        assert not any(path in ("/latest", "/moved") for path, _ in lab.engine.reached)

    happens.__name__ = f"the_engine_redirects_with_{status}_to_{to}"
    condition(Attacker.ENGINE)(happens)


for _status, _to in (
    (301, "/moved"),
    (302, "http://169.254.169.254/latest"),
    (303, "file:///etc/passwd"),
    (307, "//evil.example/"),
    (308, "gopher://127.0.0.1:25/x"),
    (300, "/moved"),
    (305, "/moved"),
):
    _redirects(_status, _to)

STREAMED = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
SSE = {"Content-Type": "text/event-stream"}


def _streams(name: str, body: bytes) -> None:
    async def happens(lab: Lab) -> None:
        for path in ("/v1/chat/completions", "/v1/messages"):
            status, _, told = await asked(
                lab, answering(SSE, body), path, STREAMED | {"max_tokens": 9}
            )
            assert status in (0, 200, 500, 502), status
            assert ENGINE_KEY.encode() not in told
            assert b"Traceback" not in told
        trained = lab.open.proxy.store.counts()
        assert trained.get("samples/ready", 0) == 0  # nothing of it may train

    happens.__name__ = f"the_engine_streams_{name}"
    condition(Attacker.ENGINE)(happens)


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _delta(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return _event(
        {"id": "c", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
    )


for _name, _body in (
    ("nothing", b""),
    ("nonsense", b"\xff\xfe\0" * 99),
    ("no_event", b"data: {" * 99),
    ("a_deep_event", b"data: " + b"[" * 100_000 + b"\n\n"),
    ("only_comments", b": x\n\n" * 999),
    ("a_line_of_2_MB", b"data: " + b"x" * (2 << 20)),
    ("a_number_too_large", _event({"choices": 10**30})),
    ("choices_without_end", _event({"choices": [{"index": n} for n in range(50_000)]})),
    ("an_index_of_a_billion", _event({"choices": [{"index": 10**9, "delta": {"content": "x"}}]})),
    ("a_tool_call_of_a_billion", _delta(tool_calls=[{"index": 10**9, "function": {"name": "x"}}])),
    ("a_negative_index", _delta(tool_calls=[{"index": -1, "function": {"arguments": "x"}}])),
    ("a_script", _delta(role="assistant", content=RUNS) + b"data: [DONE]\n\n"),
    ("a_role_that_is_a_list", _delta(role=["x"], content={"a": 1})),
    (
        "ids_that_are_texts",
        _event({"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": ["x"]}]}),
    ),
    (
        "ids_beyond_all_bounds",
        _event({"choices": [{"index": 0, "delta": {}, "token_ids": [2**70, -1]}]}),
    ),
    ("two_ends", b"data: [DONE]\n\n" * 2 + _delta(content="after")),
    ("half_a_letter", b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n'),
    ("an_event_of_another_kind", b"event: error\nid: 1\nretry: 1\ndata: x\n\n"),
    ("line_ends_in_a_text", _delta(content="a\r\n\r\nevent: x\ndata: y\n\n")),
):
    _streams(_name, _body)


def _bytes(name: str, data: bytes) -> None:
    async def happens(lab: Lab) -> None:
        async def answer(request: web.Request) -> web.StreamResponse | None:
            if request.path != "/v1/chat/completions":
                return None
            assert request.transport is not None
            request.transport.write(data)  # pyright: ignore[reportAttributeAccessIssue]
            request.transport.close()
            await asyncio.sleep(0)
            return web.Response()

        status, _, told = await asked(lab, answer, "/v1/chat/completions", STREAMED)
        assert status in (0, 200, 400, 500, 502, 503), status
        assert b"SECOND" not in told

    happens.__name__ = f"the_engine_answers_with_{name}"
    condition(Attacker.ENGINE)(happens)


_OK = b"HTTP/1.1 200 OK\r\n"
for _name, _data in (
    ("two_lengths", _OK + b"Content-Length: 1\r\nContent-Length: 9\r\n\r\n{SECOND}"),
    (
        "a_length_and_chunks",
        _OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nSECOND",
    ),
    ("a_negative_length", _OK + b"Content-Length: -1\r\n\r\nSECOND"),
    ("another_answer_behind_it", _OK + b"Content-Length: 2\r\n\r\n{}" + _OK + b"X: SECOND\r\n\r\n"),
    ("a_line_end_in_a_header", _OK + b"X-A: b\r\r\nX: SECOND\r\n\r\n"),
    ("a_head_of_1_MB", _OK + b"X: " + b"a" * (1 << 20)),
    ("thousands_of_headers", _OK + b"".join(b"X-%d: a\r\n" % n for n in range(20_000))),
    ("no_http", b"SSH-2.0-OpenSSH_9.6\r\n"),
    ("nothing_but_continue", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000),
    ("a_switch", b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\nSECOND"),
    ("a_status_of_0", b"HTTP/1.1 000 x\r\n\r\nSECOND"),
    (
        "a_body_that_is_packed",
        _OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08",
    ),
):
    _bytes(_name, _data)


@condition(Attacker.ENGINE)
async def a_model_that_writes_markup_is_shown_as_text(lab: Lab) -> None:
    lab.engine.script = Script((RUNS, "{{7*7}}", "\x1b[2J\u202e"))
    try:
        answer = await lab.http.post(f"{lab.open.url}/v1/chat/completions", json=STREAMED)
        await answer.read()
        turn = answer.headers["x-nextstate-turn"]
        for path in ("/page/turns", f"/page/turns/{turn}", "/page/sessions"):
            page = await (await lab.http.get(lab.open.url + path)).text()
            assert RUNS not in page
            assert not {"\x1b", "\u202e"} & {*page}
    finally:
        lab.engine.script = Script()


@condition(Attacker.ENGINE)
async def a_model_under_another_name_does_not_train(lab: Lab) -> None:
    lab.engine.queue.append(Script(answers_as="another-v000009"))
    answer = await lab.http.post(f"{lab.open.url}/v1/chat/completions", json=STREAMED)
    await answer.read()
    turn = lab.open.proxy.store.turns.get(answer.headers["x-nextstate-turn"])
    assert turn is not None
    assert turn.policy_version is None  # so no sample is made of it


@condition(Attacker.ENGINE)
async def the_engine_gets_no_key_of_a_client(lab: Lab) -> None:
    lab.engine.headers.clear()
    for header in ("Authorization", "x-api-key"):
        value = lab.words[Scope.CHAT]
        sent = {header: f"Bearer {value}" if header == "Authorization" else value}
        sent |= {"Cookie": f"a={value}", "X-NextState-Record": "off"}
        url = f"{lab.closed.url}/v1/chat/completions"
        assert (await lab.http.post(url, json=STREAMED, headers=sent)).status == 200
    for headers in lab.engine.headers:
        assert headers["Authorization"] == f"Bearer {ENGINE_KEY}"
        assert lab.words[Scope.CHAT] not in str(dict(headers.items()))


def _adapters(name: str, weights: Callable[[Any], None], registered: str | None = None) -> None:
    async def happens(lab: Lab) -> None:
        store, number = lab.closed.proxy.store, 100 + len(lab.words)
        lab.words[f"version-{name}"] = str(number)
        folder = store.dir.parent / f"adapter-{number}"
        sha256 = await asyncio.to_thread(write_weights, folder)
        weights(folder)
        version = PolicyVersion(
            "main", number, 0, str(folder), registered or sha256, 16, VersionState.CANDIDATE
        )
        store.versions.add(version, None)
        try:
            await publish(store, lab.closed.proxy.engines, version)
        except NextStateError:
            pass
        else:
            raise AssertionError("it was published")
        assert store.versions.serving("main").number == 0
        assert str(folder) not in lab.engine.adapters.values()

    happens.__name__ = f"an_adapter_{name}"
    condition(Attacker.ENGINE)(happens)


def _replaced(folder: Any) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"other weights")


def _pickle(folder: Any) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _link(folder: Any) -> None:
    file = folder / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to("/etc/passwd")


def _folder(folder: Any) -> None:
    file = folder / "adapter_model.safetensors"
    file.unlink()
    file.mkdir()


def _nothing(folder: Any) -> None:
    for file in folder.iterdir():
        file.unlink()


def _changed_by_a_bit(folder: Any) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


CHANGES: Sequence[tuple[str, Callable[[Any], None]]] = (
    ("whose_weights_were_replaced", _replaced),
    ("that_is_a_pickle", _pickle),
    ("that_is_a_link_to_another_file", _link),
    ("that_is_a_folder_in_a_folder", _folder),
    ("that_is_empty", _nothing),
    ("that_one_bit_was_changed_in", _changed_by_a_bit),
)
for _name, _change in CHANGES:
    _adapters(_name, _change)
_adapters("whose_hash_nobody_wrote_down", lambda _: None, registered="0" * 64)
