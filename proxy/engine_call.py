"""The one call to the engine: every request under /v1/ gets its answer's head here.

A request waits while no engine is up. It is sent again if a kept connection was closed, if the
engine has lost the adapter, or in a plainer form if the engine refuses this one. If its engine goes
down before any byte of an answer, another engine gets it, once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import punctuation
from typing import Generic, TypeVar, cast
from urllib.parse import quote

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from nextstate.errors import WrongEngineError
from nextstate.file_descriptors import out_of_descriptors
from proxy.answers import Refused
from proxy.config import ProxyConfig
from proxy.intervals import Intervals
from proxy.replica import Replica
from proxy.serving import Direct, Passed, Serving
from proxy.upstream import Answer, HeadCut, NotHttp
from proxy.versions import Held, Versions

log = logging.getLogger(__name__)

_Form = TypeVar("_Form", bound=Serving)

_HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te"),
        *("trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect"),
    }
)
_SENT_ON = frozenset(
    {
        *("accept", "user-agent", "endpoint-load-metrics-format"),
        *("x-request-id", "x-session-id", "traceparent", "tracestate"),
    }
)
"""The headers that vLLM reads, without those that the proxy sets itself and those with which one
client could harm others: its priority, the rank that serves it, the key for the proxy."""
_NOT_SENT_BACK = _HOP_BY_HOP | {
    *("location", "content-location", "refresh", "link", "alt-svc"),  # the engine's own address
    # What an engine could do to the page, which has the same address as its answers.
    *("set-cookie", "set-cookie2", "clear-site-data", "strict-transport-security"),
    *("service-worker-allowed", "www-authenticate", "report-to", "nel", "reporting-endpoints"),
}
_PROXYS_OWN = ("access-control-", "x-nextstate-")
"""How headers begin that only the proxy may set."""
_NEVER_SHOWN = ("application/json", "text/event-stream")
"""Kinds of answers that no browser shows as a page or runs."""
_REFUSED = (400, 422)
_JSON = "application/json"
ATTEMPTS = 5
"""How often a request may find its connection broken: the request may be what breaks it."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What every call needs."""

    config: ProxyConfig
    versions: Versions
    out_of_files: Callable[[BaseException], Refused]
    """Counts that no connection to the engine can be opened, and returns what the client gets."""
    intervals: Intervals


class EngineCall(Generic[_Form]):
    """One request on its way to the engine.

    Raises ValueError if the request cannot be written as JSON because it is nested too deep.
    """

    def __init__(self, engine: Engine, request: web.Request, serving: _Form, held: Held) -> None:
        self.serving = serving
        """The form in which the request was sent last."""
        self.version = held.version
        """The version whose adapter is asked; None if the request names no model."""
        self._held = held
        self._cut_by: Replica | None = None
        """The engine that closed the connection last while it had the request."""
        self._died = 0
        """Engines that went down with the request."""
        self._engine = engine
        self._request = request
        self._body = b""
        self._write()

    def use(self, serving: _Form) -> None:
        """Asks in another form from now on."""
        self.serving = serving
        self._write()

    def _write(self) -> None:
        adapter = None if self.version is None else self.version.adapter_name
        self._body = self.serving.request(adapter or self._engine.versions.model)

    @property
    def replica(self) -> Replica:
        """The engine that is asked, or was asked last."""
        return self._held.replica

    async def open(self, tried: int = 0) -> Answer:
        """The engine's answer, once its head has come. Waits for an engine that is down.

        `tried` attempts were made before. Raises Refused if there is no answer to pass on.
        """
        deadline = time.monotonic() + self._engine.config.hold_s
        versions = self._engine.versions
        for attempt in range(tried, ATTEMPTS):
            if not versions.up:
                await self._wait_up(deadline)
            versions.place_again(self._held)
            if self._held.version is not self.version:
                self.version = self._held.version
                self._write()
            if (answer := await self.attempt(fresh=attempt > 0)) is not None:
                return answer
        raise Refused(503, f"The inference engine closed the connection {ATTEMPTS} times.")

    async def _wait_up(self, deadline: float) -> None:
        try:
            await self._engine.versions.wait_admitted(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Refused(
                503,
                "The inference engine is not available; the request was held and has timed out.",
            ) from None
        except WrongEngineError as error:
            raise Refused(503, f"The inference engine cannot be used: {error}.") from error

    async def attempt(self, *, fresh: bool) -> Answer | None:
        """One attempt; None if the request may be sent again. Raises Refused.

        After a kept connection failed it may be sent again on a fresh one, because the engine may
        have closed the kept one before. After a fresh one failed, only if the engine is down, and
        of several only if it is the first that went down with it. It is never sent again once a
        part of an answer has come.
        """
        path = self._request.path
        try:
            return await self._answer(fresh=fresh)
        except NotHttp as error:
            log.warning("%s: the engine's answer is not HTTP: %r", path, error)
            raise Refused(503, "The inference engine's answer is not HTTP.") from error
        except OSError as error:
            log.info("%s: the engine gave no answer: %r", path, error)
            if out_of_descriptors(error):
                raise self._engine.out_of_files(error) from error
            begun = isinstance(error, HeadCut)
            if isinstance(error, ConnectionResetError):
                self._cut_by = self.replica
            if fresh or begun:
                if await self.replica.is_well() or begun:
                    raise Refused(
                        503, "The inference engine closed the connection without an answer."
                    ) from error
                self._died += self._cut_by is self.replica
            elif self._cut_by is self.replica and not self.replica.up:  # it was taken from it
                self._died += 1
            if self._died > 1 and not self._engine.versions.alone:
                raise Refused(
                    503, "Two inference engines ended while they had this request."
                ) from error
            return None

    async def _answer(self, *, fresh: bool) -> Answer:
        versions = self._engine.versions
        version = self.version
        engine = self.replica.client
        if version is not None and version.adapter_name and not engine.abilities.adapters:
            # It became known while the request waited.
            self.version = self._held.version = version = versions.serves(version.lineage)
            self._write()
        answer = await self._send(fresh=fresh)
        if answer.status == 404 and version is not None and version.adapter_name is not None:
            unknown = version.adapter_name.encode() in await answer.peek()
            if unknown and await versions.restored(self.replica, version):
                answer.close()
                answer = await self._send()
        if answer.status != 200 and (plainer := self._plainer(answer.status)) is not None:
            answer.close()
            self.use(plainer)
            answer = await self._send()
            if answer.status == 200 and isinstance(plainer, Direct):
                self.replica.refuses_additions()
        if 300 <= answer.status < 400:  # no request of ours is conditional, so none gets a 304
            answer.close()
            raise Refused(  # nor must the client learn the address that its body may name
                502,
                f"The engine answers {self.serving.path} with a redirect ({answer.status}), which "
                "is not followed: [engine] url must be the address that it serves on.",
            )
        return answer

    def _plainer(self, status: int) -> _Form | None:
        """The form to ask in after an answer that is not 200; None if the answer stands."""
        told_tokens = self.replica.client.abilities.tells_tokens
        if isinstance(self.serving, Direct) and (status not in _REFUSED or told_tokens):
            return None  # the engine did not refuse it because of what was added
        return cast("_Form | None", self.serving.plainer())

    async def _send(self, *, fresh: bool = False) -> Answer:
        request = self._request
        headers = _engine_headers(request.headers)
        if not isinstance(self.serving, Passed):
            headers["Content-Type"] = _JSON
        elif "Content-Type" in request.headers:
            headers["Content-Type"] = request.headers["Content-Type"]
        target = self.serving.path
        if target == request.path:  # the path and query as the client wrote them
            target = str(request.rel_url)
            if not (target.isascii() and target.isprintable()):
                target = quote(target, safe=punctuation, errors="surrogateescape")
        replica = self.replica
        replica.sent += 1
        return await replica.upstream.ask(request.method, target, headers, self._body, fresh=fresh)


def _engine_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The client's headers that the engine gets. Not every server takes two user agents."""
    sent: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        known = name.lower()
        if known in _SENT_ON and not (known == "user-agent" and name in sent):
            sent.add(name, value)
    return sent


def client_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's headers that the client gets.

    The page has the same address, so an answer that a browser might show must not run in it.
    """
    sent = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if (low := name.lower()) not in _NOT_SENT_BACK and not low.startswith(_PROXYS_OWN)
    )
    kinds = sent.getall("Content-Type", [""])
    if any(kind.partition(";")[0].strip().lower() not in _NEVER_SHOWN for kind in kinds):
        sent["Content-Security-Policy"] = "sandbox; default-src 'none'"
        sent["X-Content-Type-Options"] = "nosniff"
    return sent
