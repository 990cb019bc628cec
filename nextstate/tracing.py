"""OpenTelemetry spans: how long a request, a judgement and an update took, and of which turn.

Off unless the standard variable OTEL_EXPORTER_OTLP_ENDPOINT names a collector, which must be this
machine or stand in [privacy] allow_hosts. A span carries ids, kinds, numbers and times, never a
word of a conversation. All spans of a turn are one trace, whichever process reports them: its id is
made from the turn's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import time
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nextstate.egress import is_here

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext, Tracer

    from nextstate.records import PolicyVersion, Turn

log = logging.getLogger(__name__)

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TIMEOUT_S = 2.0
"""For one message to the collector: a process that ends waits so long for one that hangs."""
_MOST_LINKS = 128
_NS = 1_000_000_000


def endpoint_host() -> str | None:
    """The collector's host, or its whole address if that names none; None if tracing is off."""
    address = os.environ.get(ENDPOINT)
    try:
        return address and (urlsplit(address).hostname or address)
    except ValueError:
        return address


def allow(hosts: Collection[str]) -> None:
    """Turns tracing off in this process and its children if the collector is not one of `hosts`."""
    host = endpoint_host()
    if host is not None and not is_here(host) and host not in hosts:
        log.error(
            "%s names %.200r: nothing is traced; to allow it, name it in [privacy] allow_hosts",
            ENDPOINT,
            host,
        )
        del os.environ[ENDPOINT]


class _Ids:
    """Ids of traces and spans; those of a turn's first span are made from the turn's id."""

    def __init__(self) -> None:
        self._next: tuple[int, int] | None = None

    def next_is(self, turn_id: str) -> None:
        """The next span without a parent is the turn's."""
        self._next = _numbers(turn_id)

    def generate_trace_id(self) -> int:
        return random.getrandbits(128) or 1 if self._next is None else self._next[0]

    def generate_span_id(self) -> int:
        known, self._next = self._next, None
        return random.getrandbits(64) or 1 if known is None else known[1]

    def is_trace_id_random(self) -> bool:
        return False


class Tracing:
    """What one process reports; each method does nothing while tracing is off."""

    def __init__(self, part: str) -> None:
        self._ids: _Ids | None = None
        if os.environ.get(ENDPOINT):
            self._begin(part)

    def recorded(self, turns: Iterable[Turn]) -> None:
        """Reports turns that have just been committed: the request, the engine, the record."""
        if self._ids is None:
            return
        now = time.time_ns()
        for turn in turns:
            start = int(turn.timings.started_at * _NS)
            end = start + int(turn.timings.total_s * _NS)
            values = _of_turn(turn)
            self._ids.next_is(turn.id)
            root = self._tracer.start_span("request", start_time=start, attributes=values)
            context = self._under(root.get_span_context())
            engine = self._tracer.start_span("engine", context, start_time=start, attributes=values)
            if turn.timings.first_token_s is not None:
                first = start + int(turn.timings.first_token_s * _NS)
                engine.add_event("first token", timestamp=first)
            engine.end(end)
            kept = self._tracer.start_span("recorded", context, start_time=end, attributes=values)
            kept.end(max(now, end))
            root.end(max(now, end))

    def judged(self, turn: Turn, judge: str, score: int, started_ns: int) -> None:
        """Reports a verdict, in the trace of its turn."""
        if self._ids is None:
            return
        values = {**_of_turn(turn), "nextstate.judge": judge, "nextstate.score": score}
        context = self._under(_context(turn.id))
        span = self._tracer.start_span("judge", context, start_time=started_ns, attributes=values)
        span.end()

    def updated(self, version: PolicyVersion, turns: Collection[str], started_ns: int) -> None:
        """Reports an update with links to the traces of the turns that it used."""
        if self._ids is None:
            return
        from opentelemetry.trace import Link

        values: dict[str, Any] = {
            "nextstate.lineage": version.lineage,
            "nextstate.version": version.number,
            "nextstate.parent": version.parent,
            "nextstate.samples": version.samples,
            "nextstate.state": version.state.value,
        }
        links = [Link(_context(turn)) for turn in [*turns][:_MOST_LINKS]]
        span = self._tracer.start_span(
            "update", start_time=started_ns, attributes=values, links=links
        )
        span.end()

    def close(self) -> None:
        """Sends what is left."""
        if self._ids is not None:
            self._provider.shutdown()
            self._ids = None

    def _begin(self, part: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            log.error("%s is set and %s is missing: run `make env`", ENDPOINT, error)
            return
        self._ids = _Ids()
        resource = Resource.create({"service.name": f"nextstate-{part}"})
        self._provider = TracerProvider(
            resource=resource,
            id_generator=self._ids,  # pyright: ignore[reportArgumentType]: it has its methods
        )
        exporter = OTLPSpanExporter(timeout=_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("nextstate")

    def _under(self, parent: SpanContext) -> Any:
        from opentelemetry.trace import NonRecordingSpan, set_span_in_context

        return set_span_in_context(NonRecordingSpan(parent))


@lru_cache(maxsize=1)
def tracing(part: str) -> Tracing:
    """What this process reports; `part` is its name."""
    return Tracing(part)


def _of_turn(turn: Turn) -> Mapping[str, Any]:
    values = {
        "nextstate.turn": turn.id,
        "nextstate.session": turn.session,
        "nextstate.kind": turn.kind.value,
        "nextstate.lineage": turn.lineage,
        "nextstate.version": turn.policy_version,
        "nextstate.engine": turn.engine,
        "nextstate.trainable": turn.trainable,
        "nextstate.completion_tokens": turn.completion_ids and len(turn.completion_ids),
    }
    return {name: value for name, value in values.items() if value is not None}


def _numbers(turn_id: str) -> tuple[int, int]:
    """(trace id, span id of its root) of a turn; neither is 0."""
    digest = hashlib.blake2b(turn_id.encode(), digest_size=24).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:]) or 1


def _context(turn_id: str) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags

    trace, span = _numbers(turn_id)
    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
