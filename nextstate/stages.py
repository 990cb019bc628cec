"""Each stage put together from the settings and run until it is told to stop.

Part of the composition root: with the command line and the settings, the only place in the spine
that knows the stages. What is slow to import is imported where it is used.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import signal
import threading
from pathlib import Path

from nextstate.config import secret
from nextstate.engine import EngineClient, publish, zero_adapter_path
from nextstate.errors import StartError
from nextstate.hooks import load_plugin
from nextstate.records import MAIN_LINEAGE, PolicyVersion
from nextstate.settings import Settings
from nextstate.store import Store

log = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0


def engine_file(settings: Settings) -> Path:
    """Where a supervisor leaves the address of the engine that it manages."""
    return settings.store.path / "engine.json"


def engine_url(settings: Settings) -> str:
    """The engine's address: configured, or left by the running supervisor. Raises StartError."""
    if settings.engine.mode == "external":
        return settings.engine.url
    try:
        return str(json.loads(engine_file(settings).read_text())["url"])
    except (OSError, ValueError, KeyError):
        raise StartError(
            f"no engine runs on [store] dir = {settings.store.dir!r}: start one with "
            '`nextstate up`, or set [engine] mode = "external" and url'
        ) from None


def engine_client(settings: Settings) -> EngineClient:
    """A client of the engine, with its key; inside a running event loop."""
    return EngineClient(engine_url(settings), settings.engine.name, engine_key(settings))


def engine_key(settings: Settings) -> str | None:
    """The engine's own key."""
    return secret(settings.engine.api_key_env, "[engine] api_key_env")


def zero_adapter(settings: Settings) -> Path:
    """Where the warm-up adapter of the configured model lies."""
    return zero_adapter_path(
        settings.store.path, settings.engine.model_path, settings.learner.lora_rank
    )


async def run_proxy(settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM; requests under way end first."""
    from aiohttp import web

    from proxy.app import Proxy

    stop = _stop_event()
    store = Store(settings.store)
    profile = load_plugin("agents", settings.agents.profile, None)
    async with engine_client(settings) as engine:
        proxy = Proxy(
            settings.proxy,
            store,
            engine,
            profile,
            zero_adapter=zero_adapter(settings),
            record=settings.privacy.record,
            client_key=secret(settings.proxy.api_key_env, "[proxy] api_key_env"),
            engine_key=engine_key(settings),
        )
        runner = web.AppRunner(
            proxy.app(), handler_cancellation=True, access_log=None, shutdown_timeout=_SHUTDOWN_S
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, settings.proxy.host, settings.proxy.port).start()
        except OSError as error:
            await runner.cleanup()
            raise cannot_listen(settings, error) from error
        log.info("serving on %s", [site.name for site in runner.sites])
        await stop.wait()
        await runner.cleanup()
    store.close()


async def run_judge(settings: Settings) -> None:
    """Judges until SIGINT or SIGTERM."""
    from judge.config import plugin_settings
    from judge.stage import run

    stop = _stop_event()
    store = Store(settings.store)
    async with engine_client(settings) as engine:
        given = plugin_settings(settings.judge, settings.engine.name, f"{engine.url}/v1")
        kind = load_plugin("judges", settings.judge.kind, given)
        try:
            await run(store, settings.judge, kind, engine, stop)
        finally:
            await kind.close()
    store.close()


async def evaluate_judge(settings: Settings, file: Path, split: str | None) -> str:
    """How the configured judge agrees with a file of labelled next states, as a table."""
    from rich.console import Console
    from rich.progress import Progress

    from judge.config import plugin_settings
    from judge.evaluation import evaluate, read_cases, report

    cases = read_cases(file, split)
    served = f"{engine_url(settings)}/v1" if settings.judge.kind == "engine" else ""
    given = plugin_settings(settings.judge, settings.engine.name, served)
    kind = load_plugin("judges", settings.judge.kind, given)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"{kind.name} judges", total=len(cases))
            done = await evaluate(cases, settings.judge, kind, lambda: progress.advance(bar))
    finally:
        await kind.close()
    return report(done)


def run_learner(settings: Settings) -> None:
    """Trains until SIGINT or SIGTERM; the step under way ends first."""
    from learner.adapters import save_zero_adapter
    from learner.stage import run

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    store = Store(settings.store)
    path = zero_adapter(settings)
    if not path.exists():
        save_zero_adapter(settings.engine.model_path, settings.learner, path)

    def to_engine(version: PolicyVersion) -> None:
        asyncio.run(publish_version(settings, store, version))

    run(store, settings.learner, settings.engine.model_path, MAIN_LINEAGE, to_engine, stop)
    store.close()


async def publish_version(settings: Settings, store: Store, version: PolicyVersion) -> None:
    """Brings a version into service on the configured engine."""
    async with engine_client(settings) as engine:
        await publish(store, engine, version)


def cannot_listen(settings: Settings, error: OSError) -> StartError:
    """Why the proxy's address cannot be bound."""
    where = f"[proxy] host = {settings.proxy.host!r}, port = {settings.proxy.port}"
    if error.errno == errno.EADDRINUSE:
        return StartError(
            f"{where}: another program listens there; end it or set another [proxy] port"
        )
    return StartError(f"{where} cannot be bound: {error.strerror}; set another host or port")


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop
