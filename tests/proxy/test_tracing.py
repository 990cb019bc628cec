"""Spans reach a collector that speaks OTLP: with ids and times, and no word of a conversation."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.tracing import ENDPOINT, Tracing, allow
from proxy.writer_process import WriterProcess
from tests.proxy.running_proxy import running
from tests.scripted_engine import Script, scripted_engine
from tests.store.test_records import turn

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
SAID, REPLIED = "My secret is walnut.", "almond"


class Received:
    """What a collector has received."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []

    def spans(self) -> list[dict[str, object]]:
        """Name, trace, id, parent, times, links and attributes of each span."""
        found: list[dict[str, object]] = []
        for body in self.bodies:
            for resource in collector.ExportTraceServiceRequest.FromString(body).resource_spans:
                (service,) = [
                    one.value.string_value
                    for one in resource.resource.attributes
                    if one.key == "service.name"
                ]
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        values = {
                            one.key.removeprefix("nextstate."): (
                                one.value.string_value or one.value.int_value
                            )
                            for one in span.attributes
                        }
                        found.append(
                            {
                                "service": service,
                                "name": span.name,
                                "trace": span.trace_id,
                                "id": span.span_id,
                                "parent": span.parent_span_id,
                                "took": span.end_time_unix_nano - span.start_time_unix_nano,
                                "links": [link.trace_id for link in span.links],
                                **values,
                            }
                        )
        return found


@asynccontextmanager
async def collecting(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Received]:
    received = Received()

    async def take(request: web.Request) -> web.Response:
        assert request.path == "/v1/traces"
        received.bodies.append(await request.read())
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    received.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    monkeypatch.setenv(ENDPOINT, received.url)
    try:
        yield received
    finally:
        await runner.cleanup()


def test_a_turn_is_one_trace_from_the_request_to_its_record(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with collecting(monkeypatch) as received:
            async with (
                scripted_engine() as engine,
                running(engine.url, store, tmp_path, writer=WriterProcess()) as proxy,
            ):
                engine.script = Script((REPLIED,))
                messages = [{"role": "user", "content": SAID}]
                status, _, headers = await proxy.chat(
                    {"model": "base", "messages": messages}, {"X-Session-Id": "talk"}
                )
                assert status == 200
            spans = {str(one["name"]): one for one in received.spans()}
            assert set(spans) == {"request", "engine", "recorded"}
            request = spans["request"]
            assert request["service"] == "nextstate-proxy"
            assert request["turn"] == headers["x-nextstate-turn"]
            assert request["session"] == "talk"
            assert request["version"] == 0
            assert request["parent"] == b""
            for name in ("engine", "recorded"):
                assert spans[name]["parent"] == request["id"]
                assert spans[name]["trace"] == request["trace"]
            took = [int(str(one["took"])) for one in spans.values()]
            assert int(str(request["took"])) == max(took)
            sent = b"".join(received.bodies)
            assert b"walnut" not in sent
            assert REPLIED.encode() not in sent

    asyncio.run(run())


def test_verdicts_are_in_the_trace_of_their_turn_and_updates_link_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        async with collecting(monkeypatch) as received:
            judge, learner, proxy = (Tracing(part) for part in ("judge", "learner", "proxy"))
            first = turn(0)
            started = time.time_ns()
            proxy.recorded([first])
            judge.judged(first, "rules", -1, started)
            version = PolicyVersion("main", 1, 0, None, None, 1, VersionState.CANDIDATE)
            learner.updated(version, [first.id], started)
            for one in (judge, learner, proxy):
                await asyncio.to_thread(one.close)
            spans = {str(one["name"]): one for one in received.spans()}
            request, verdict, update = (spans[name] for name in ("request", "judge", "update"))
            assert (verdict["trace"], verdict["parent"]) == (request["trace"], request["id"])
            assert (verdict["turn"], verdict["judge"]) == (first.id, "rules")
            assert verdict["score"] == -1
            assert update["links"] == [request["trace"]]
            assert update["trace"] != request["trace"]
            assert (update["version"], update["state"]) == (1, "candidate")

    asyncio.run(run())


def test_without_the_variable_nothing_is_made_or_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    off = Tracing("proxy")
    off.recorded([turn(0)])
    off.judged(turn(0), "rules", 1, 0)
    off.close()
    assert not hasattr(off, "_provider")


def test_a_collector_that_the_configuration_does_not_name_turns_tracing_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ENDPOINT, "https://collector.example:4318")
    allow(["collector.example"])
    assert ENDPOINT in os.environ
    allow([])
    assert ENDPOINT not in os.environ
    assert "name it in [privacy] allow_hosts" in caplog.text
    for malformed in ("collector:4318", "http://[", "http://"):
        monkeypatch.setenv(ENDPOINT, malformed)
        allow([])
        assert ENDPOINT not in os.environ
    monkeypatch.setenv(ENDPOINT, "http://localhost:4318")
    allow([])
    assert ENDPOINT in os.environ
