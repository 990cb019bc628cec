"""Bad requests and engine answers of every kind: the proxy survives them and leaks nothing.

Case N is made from N alone: NEXTSTATE_FUZZ_CASE=N runs it by itself. NEXTSTATE_FUZZ_CASES sets how
many the long form runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import sqlite3
import traceback
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from nextstate.config import StoreConfig
from nextstate.store import Store
from proxy.exchange import Exchange
from tests.proxy.nasty import (
    KEY,
    Answer,
    Case,
    NastyEngine,
    as_json,
    case,
    chat,
    chunks,
    http,
    sse,
)
from tests.proxy.running_proxy import Running, running, until

SHORT, LONG = 400, int(os.environ.get("NEXTSTATE_FUZZ_CASES", "100000"))
AT_ONCE = 16
CASE_TIMEOUT_S = 30.0
LEAK_MB = 64


# What came back


@dataclass
class Got:
    """A reply as a client reads it."""

    status: int | None
    body: bytes
    whole: bool
    raw: bytes = field(repr=False, default=b"")

    @property
    def turn(self) -> str:
        """The id of the turn, if the reply names one."""
        return self.raw.partition(b"x-nextstate-turn: ")[2][:25].decode()


def parsed(raw: bytes, to_head: bool) -> Got:
    """Reads one HTTP reply until the connection's end."""
    while raw.startswith(b"HTTP/1.1 100"):
        raw = raw.partition(b"\r\n\r\n")[2]
    start, found, body = raw.partition(b"\r\n\r\n")
    if not found:
        return Got(None, raw, False, raw)
    status = int(start.split(b" ")[1])
    headers = dict(line.lower().split(b": ", 1) for line in start.split(b"\r\n") if b": " in line)
    if to_head or status in (204, 304):
        return Got(status, b"", True, raw)
    if headers.get(b"transfer-encoding") != b"chunked":
        whole = b"content-length" not in headers or len(body) == int(headers[b"content-length"])
        return Got(status, body, whole, raw)
    data = b""
    while body:
        size_text, _, body = body.partition(b"\r\n")
        size = int(size_text, 16)
        if size == 0:
            return Got(status, data, True, raw)
        data, body = data + body[:size], body[size + 2 :]
    return Got(status, data, False, raw)


async def send(port: int, case: Case) -> Got | None:
    """The reply; None for a client that left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    raw = b""
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(case.request[: case.leaves_after])
            await writer.drain()
            if case.leaves_after is not None and case.leaves_after < len(case.request):
                return None
            while data := await reader.read(1 << 20):
                raw += data
                if case.leaves_after is not None:
                    return None
    finally:
        writer.transport.abort()
    return parsed(raw, case.request.startswith(b"HEAD "))


def complaint(case: Case, got: Got, reached: bool) -> str | None:
    """What the proxy did wrong, or None."""
    answer = case.answer
    if got.status is not None and got.status >= 500 and got.status != answer.status:
        unreachable = got.status == 503 and not answer.whole
        redirected = got.status == 502 and answer.status is not None and answer.status // 100 == 3
        if not (unreachable or redirected):
            return f"answered {got.status} of its own: {got.body[:80]!r}"
    if (
        not reached
        or not case.path.startswith(b"/v1/chat/completions")
        or got.status != answer.status
    ):
        return None
    if not case.request.startswith(b"POST"):
        return None
    if answer.whole != got.whole:
        return f"the engine's answer was whole = {answer.whole}, the client's {got.whole}"
    if answer.body is not None and answer.body != got.body:
        return f"changed {answer.body[:60]!r} to {got.body[:60]!r}"
    return None


class Errors(logging.Handler):
    """Keeps what asyncio and aiohttp's server report, except for requests that are not HTTP."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        not_http = isinstance(error, HttpProcessingError | web.RequestPayloadError)
        if isinstance(error, ConnectionResetError):  # aiohttp greets a client that has left
            frames = traceback.extract_tb(error.__traceback__)
            not_http = not any("proxy" in Path(frame.filename).parts for frame in frames)
        if record.levelno >= logging.ERROR and not not_http:
            self.found.append(f"{record.getMessage()}: {error!r:.300}")


@contextmanager
def listening() -> Iterator[Errors]:
    """Logs are heard here and nowhere else: pytest would keep them all."""
    errors = Errors()
    loggers = [logging.getLogger(name) for name in ("aiohttp", "asyncio", "proxy", "nextstate")]
    for logger in loggers:
        logger.propagate = False
        if logger.name in ("aiohttp", "asyncio"):
            logger.addHandler(errors)
        else:
            logger.addHandler(logging.NullHandler())
    try:
        yield errors
    finally:
        for logger in loggers:
            logger.propagate = True
            logger.removeHandler(errors)


@asynccontextmanager
async def between(store: Store, tmp_path: Path) -> AsyncGenerator[tuple[NastyEngine, Running]]:
    engine = NastyEngine()
    await engine.start()
    settings: dict[str, Any] = {"hold_s": 0.05, "record_timeout_s": 30.0, "max_body_mb": 1}
    try:
        async with running(engine.url, store, tmp_path, KEY, **settings) as proxy:
            await asyncio.wait_for(proxy.proxy.versions.wait_up(), 60)
            yield engine, proxy
    finally:
        await engine.close()


async def ask(engine: NastyEngine, port: int, case: Case, ended: list[str]) -> str | None:
    """Runs one case; what went wrong with it. Notes the turn that has to be in the store now."""
    engine.answers[str(case.number)] = case.answer
    try:
        got = await asyncio.wait_for(send(port, case), CASE_TIMEOUT_S)
    except TimeoutError:
        wrong: str | None = f"no end after {CASE_TIMEOUT_S} s"
    else:
        reached = str(case.number) in engine.reached
        wrong = got and complaint(case, got, reached)
        if got is not None and case.sound and got.status == 200:
            ended.append(got.turn)
    del engine.answers[str(case.number)]
    engine.reached.discard(str(case.number))
    return wrong and f"case {case.number} ({case.kind}): {wrong}"


async def run(numbers: range, store: Store, tmp_path: Path) -> None:
    """All cases, then: everything as it was before."""
    memory = psutil.Process()
    wrong: list[str] = []
    ended: list[str] = []
    rss_mb: dict[int, float] = {}
    with listening() as errors:
        async with between(store, tmp_path) as (engine, p):
            port = int(p.url.rpartition(":")[2])
            tasks = len(asyncio.all_tasks())
            for start in range(numbers.start, numbers.stop, AT_ONCE):
                batch = [case(n) for n in range(start, min(start + AT_ONCE, numbers.stop))]
                # An engine that answers nothing counts as down, for all.
                alone = [c for c in batch if c.answer.kind == "nothing"]
                others = [c for c in batch if c.answer.kind != "nothing"]
                heard = len(errors.found)
                found = await asyncio.gather(*(ask(engine, port, c, ended) for c in others))
                for lonely in alone:
                    found.append(await ask(engine, port, lonely, ended))
                    await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
                wrong += [complaint for complaint in found if complaint]
                wrong += [f"logged among {batch[0].number}+: {e}" for e in errors.found[heard:]]
                done = 100 * (start + AT_ONCE - numbers.start) // len(numbers)
                if done // 10 > max(rss_mb, default=0) // 10 or len(wrong) > 100:
                    gc.collect()
                    rss_mb[done] = memory.memory_info().rss / 2**20
                    print(f"{done} %, RSS {rss_mb[done]:.0f} MB, {len(wrong)} complaints")
                if len(wrong) > 100:
                    break
            gc.collect()
            wrong += [f"reached the engine: {harm}" for harm in engine.harm]
            wrong += [f"turn {turn} is lost" for turn in ended if store.turns.get(turn) is None]
            assert not wrong, "\n".join([f"{len(wrong)} complaints", *wrong[:100]])
            status, _, _ = await p.chat(chat(Random(0), False), {"Authorization": f"Bearer {KEY}"})
            assert status == 200, "the proxy does not serve any more"
            await until(lambda: engine.under_way == 0)
            assert not +p.proxy.versions.running
            upstream = p.proxy.versions.replicas[0].upstream
            in_use = upstream._connections.difference(upstream._free)  # pyright: ignore[reportPrivateUsage]
            assert not in_use
            await p.http.close()
            await engine.close_connections()
            await until(lambda: len(asyncio.all_tasks()) <= tasks)
            counts = p.proxy.recorder.counts
            print(f"{counts.recorded} turns recorded, {counts.lost} lost")
            assert counts.lost == 0
            assert counts.recorded > len(numbers) // 20
            assert len(ended) > len(numbers) // 200
    late = [mb for done, mb in rss_mb.items() if done >= 30]
    if len(numbers) == LONG:
        assert late[-1] - late[0] < LEAK_MB, f"memory grows: {rss_mb}"


@pytest.mark.parametrize(
    "count",
    [SHORT, pytest.param(LONG, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])],
    ids=["short", "long"],
)
def test_no_request_and_no_answer_brings_the_proxy_down(
    store: Store, tmp_path: Path, count: int
) -> None:
    one = os.environ.get("NEXTSTATE_FUZZ_CASE")
    numbers = range(count) if one is None else range(int(one), int(one) + 1)
    asyncio.run(run(numbers, store, tmp_path))


def test_an_engine_that_answers_our_own_questions_with_nonsense_is_asked_again(
    store: Store, tmp_path: Path
) -> None:
    async def test(models: bytes) -> None:
        engine = NastyEngine()
        sound, engine.models = engine.models, models
        await engine.start()
        try:
            async with running(engine.url, store, tmp_path) as p:
                await until(lambda: engine.asked > 1)
                engine.models = sound
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
        finally:
            await engine.close()

    with listening():
        for models in (b"", b"[]", b'{"data": 5}', b'{"data": [{}]}', b"\xff"):
            asyncio.run(test(models))


def test_a_stream_without_a_finish_reason_is_recorded_before_its_end_too(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with between(store, tmp_path) as (engine, p):
            events = [*chunks(Random(0))[:2], {"error": {"message": "out of memory"}}]
            body = sse(Random(0), events, b"data: [DONE]\n\n")
            engine.answers["1"] = Answer("error", http(Random(1), 200, body, b"text/event-stream"))
            record, received, before = p.proxy.recorder.record, bytearray(), bytearray()

            async def slow(exchange: Exchange) -> None:
                await asyncio.sleep(0.1)  # time for [DONE] to arrive, if it was sent
                before.extend(received)
                await record(exchange)

            monkeypatch.setattr(p.proxy.recorder, "record", slow)
            headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "1"}
            headers["Content-Type"] = "application/json"
            asked = as_json(chat(Random(0), True))
            async with p.http.post(
                f"{p.url}/v1/chat/completions", data=asked, headers=headers
            ) as answer:
                async for data in answer.content.iter_any():
                    received.extend(data)
            assert b"out of memory" in received
            assert b"[DONE]" in received
            assert b"[DONE]" not in before

    with listening():
        asyncio.run(test())


ODD = [
    {"model": 5},
    {"usage": []},
    {"prompt_token_ids": "ab"},
    {"prompt_token_ids": [-1]},
    {"choices": [{"index": "0"}]},
    {"choices": [{"index": 0, "finish_reason": {}, "message": {"content": 5}}]},
    {"choices": [{"finish_reason": 5, "token_ids": [2**40], "message": {"content": "x"}}]},
    {"choices": [{"token_ids": [1.5], "logprobs": {"content": [{}]}, "message": {}}]},
    {"choices": [{"token_ids": [1], "logprobs": {"content": [{"logprob": 0.5}]}}]},
    {"choices": [{"message": {"tool_calls": [{"index": [], "function": {"name": 1}}]}}]},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_turn_whose_reply_is_malformed_is_kept_and_says_that_it_must_not_train(
    store: Store, tmp_path: Path, odd: dict[str, Any]
) -> None:
    async def test() -> None:
        async with between(store, tmp_path) as (engine, p):
            engine.answers["1"] = Answer("odd", http(Random(1), 200, as_json(odd)))
            headers = {"Authorization": f"Bearer {KEY}", "x-request-id": "1"}
            status, body, answered = await p.chat(chat(Random(0), False), headers)
            assert (status, json.loads(body).keys()) == (200, odd.keys())
            turn = store.turns.get(answered["x-nextstate-turn"])
            assert turn is not None
            assert turn.untrainable is not None

    with listening():
        asyncio.run(test())


def test_a_store_that_is_gone_is_logged_and_fails_no_reply(tmp_path: Path) -> None:
    broken = Store(StoreConfig(dir=str(tmp_path / "state")))

    async def test() -> None:
        async with between(broken, tmp_path) as (_, p):
            p.http.headers["Authorization"] = f"Bearer {KEY}"
            with sqlite3.connect(tmp_path / "state" / "nextstate.sqlite3") as file:
                for table in ("next_states", "judgements", "verdicts", "samples", "turns"):
                    file.execute(f"DROP TABLE {table}")
            file.close()
            assert (await p.chat(chat(Random(0), False)))[0] == 200
            assert p.proxy.recorder.counts.lost == 1
            vote = {"turn_id": "turn_x", "score": 1}
            assert (await p.http.post(f"{p.url}/v1/feedback", json=vote)).status == 503
            answer = await p.http.get(f"{p.url}/metrics")
            assert (answer.status, "turns_lost_total 1\n" in await answer.text()) == (200, True)

    with listening():
        asyncio.run(test())
    broken.close()
