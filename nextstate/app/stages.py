"""Each stage put together from the settings and run until it is told to stop.

Part of the composition root: with the command line and the settings, the only place in the spine
that knows the stages. What is slow to import is imported where it is used.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nextstate.app.settings import Settings
from nextstate.app.supervisor import RESTS_S, SHORT_RESTS_S, Part, Supervisor
from nextstate.config import secret
from nextstate.engine.client import (
    EngineClient,
    publish,
    publish_candidate,
    withdraw,
    zero_adapter_path,
)
from nextstate.engine.process import VOTE_PRIORITY, by_priority, gpu_share, port_is_free
from nextstate.errors import ConfigError, EngineError, StartError
from nextstate.hooks import load_judge, load_plugin
from nextstate.offline import switches
from nextstate.records import PolicyVersion
from nextstate.store.store import Store
from nextstate.store.waiting import Patience

if TYPE_CHECKING:
    from proxy.lineages import Lineages

log = logging.getLogger(__name__)

_STOP_S = 5.0
"""How long a stage that is to stop still waits for its store."""
_LOOK_S = 0.5
_COLLECT_AFTER = 10_000
"""Objects made before the garbage collector of the proxy looks at the young ones; after a hundred
such looks at all. With 256 streams the latter holds every one of them up for 30 ms."""


def stage_part(settings: Settings, stage: str, name: str, *arguments: str) -> Part:
    """A process that runs a stage with these settings, for a supervisor."""
    argv = [sys.executable, "-P", "-m", "nextstate", stage, *arguments]
    if settings.file.exists():
        argv += ["--config", str(settings.file.absolute())]
    log_file = settings.store.path / "logs" / f"{name}.log"
    return Part(
        name,
        argv,
        log_file,
        env={**os.environ, **switches(settings.privacy.external_metrics)},
        watched=(settings.file.absolute(),),
        follows=() if stage == "proxy" else ("engine",),
        rests_s=SHORT_RESTS_S if stage == "proxy" else RESTS_S,
    )


def engine_file(settings: Settings) -> Path:
    """Where a supervisor leaves the address and the key of the engine that it manages."""
    return settings.store.path / "engine.json"


def leave_engine(settings: Settings, url: str, key: str | None) -> None:
    """Tells the stages where the engine is; nobody but the owner can read it."""
    file = engine_file(settings)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump({"url": url, "key": key}, opened)
    draft.replace(file)


def engine_url(settings: Settings) -> str:
    """The engine's address: configured, or left by the running supervisor. Raises StartError."""
    return _left(settings)[0]


def engine_key(settings: Settings) -> str | None:
    """The engine's own key; None where it asks for none. Raises as `engine_url` does."""
    return _left(settings)[1]


def _left(settings: Settings) -> tuple[str, str | None]:
    if settings.engine.mode == "external":
        return settings.engine.url, secret(settings.engine.api_key_env, "[engine] api_key_env")
    try:
        left = json.loads(engine_file(settings).read_text())
        return str(left["url"]), left.get("key")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise StartError(
            f"no engine runs on [store] dir = {settings.store.dir!r}: start one with "
            '`nextstate up`, or set [engine] mode = "external" and url'
        ) from None


def engine_client(settings: Settings) -> EngineClient:
    """A client of the engine, with its key; inside a running event loop."""
    url, key = _left(settings)
    return EngineClient(url, settings.engine.name, key)


def zero_adapter(settings: Settings) -> Path:
    """Where the warm-up adapter of the configured model lies."""
    return zero_adapter_path(
        settings.store.path, settings.engine.model_path, settings.learner.lora_rank
    )


async def run_proxy(settings: Settings, worker: int | None = None) -> None:
    """Serves until SIGINT or SIGTERM; requests under way end first.

    With several `[proxy] workers` it starts them and keeps them running; `worker` is one of them.
    """
    from aiohttp import web

    from proxy.app import Proxy
    from proxy.writer_process import WriterProcess

    if settings.proxy.workers > 1 and worker is None:
        await _run_workers(settings)
        return
    # A request waits for a while, the start for as long as it takes.
    patience, at_start = Patience(), Patience(math.inf)
    stop = _stop_event(patience, at_start)
    (await asyncio.to_thread(Store, settings.store, patience=at_start)).close()
    store = Store(settings.store, patience=patience)
    async with engine_client(settings) as engine:
        proxy = Proxy(
            settings.proxy,
            store,
            engine,
            settings.agents.profile,
            writer=WriterProcess(),
            zero_adapter=zero_adapter(settings),
            record=settings.privacy.record,
            lineages=_doors(settings),
            engine_key=engine_key(settings),
            worker=None if worker is None else str(worker),
        )
        runner = proxy.runner()
        await runner.setup()
        host, port = settings.proxy.host, settings.proxy.port
        try:
            await web.TCPSite(runner, host, port, reuse_port=worker is not None or None).start()
        except OSError as error:
            await runner.cleanup()
            raise cannot_listen(settings, error) from error
        # What is there now stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
        log.info("serving on %s", [site.name for site in runner.sites])
        await stop.wait()
        await runner.cleanup()
    store.close()


async def _run_workers(settings: Settings) -> None:
    """Starts the proxy's workers on the one port and restarts those that end."""
    if not port_is_free(settings.proxy.host, settings.proxy.port):
        raise cannot_listen(settings, OSError(errno.EADDRINUSE, "in use"))
    at_start = Patience(math.inf)
    stop = _stop_event(at_start)
    # Made and brought up to date once, before they all open it.
    (await asyncio.to_thread(Store, settings.store, patience=at_start)).close()
    workers = range(settings.proxy.workers)
    supervisor = Supervisor(
        [stage_part(settings, "proxy", f"proxy-{n}", "--worker", str(n)) for n in workers]
    )
    supervisor.stopping = stop
    await supervisor.run()


def _doors(settings: Settings) -> Lineages:
    from proxy.lineages import Access, Lineages

    main_key = secret(settings.proxy.api_key_env, "[proxy] api_key_env")
    doors: dict[str, Access] = {}
    owners = {main_key: "[proxy]"}
    for name, lineage in settings.lineages.items():
        where = f"[lineages.{name}]"
        key = secret(lineage.api_key_env, f"{where} api_key_env")
        if key is not None and (other := owners.setdefault(key, where)) != where:
            raise ConfigError(f"{where} api_key_env holds the key of {other}: give it its own")
        doors[name] = Access(lineage.model or None, key)
    return Lineages(settings.engine.name, main_key, doors)


async def run_judge(settings: Settings) -> None:
    """Judges until SIGINT or SIGTERM."""
    from judge.config import plugin_settings
    from judge.pace import Counted, Pace
    from judge.stage import run

    patience = Patience(math.inf)
    stop = _stop_event(patience)
    store = await asyncio.to_thread(Store, settings.store, patience=patience)
    async with engine_client(settings) as engine:
        config = settings.judge
        priority = {"priority": VOTE_PRIORITY} if by_priority(settings.engine) else {}
        served, key = f"{engine.url}/v1", engine_key(settings)
        given = plugin_settings(config, settings.engine.name, served, priority, key)
        kind = load_judge(config.kinds, given)
        profile = load_plugin("agents", settings.agents.profile, None)
        polite = config.on_engine and config.share < 1
        pace = Pace(config.share, engine.live_requests) if polite else None
        judge = kind if pace is None else Counted(kind, pace)
        try:
            await run(store, config, judge, engine, stop, pace=pace, profile=profile)
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
    served, key = "", None
    if settings.judge.on_engine:
        served, key = f"{engine_url(settings)}/v1", engine_key(settings)
    given = plugin_settings(settings.judge, settings.engine.name, served, api_key=key)
    kind = load_judge(settings.judge.kinds, given)
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"{kind.name} judges", total=len(cases))
            done = await evaluate(cases, settings.judge, kind, lambda: progress.advance(bar))
    finally:
        await kind.close()
    return report(done)


def run_learner(settings: Settings, lineage: str | None = None) -> None:
    """Trains all lineages in turn, or one alone, until SIGINT or SIGTERM.

    The step under way ends first.
    """
    os.environ.update(switches(settings.privacy.external_metrics))

    from learner.adapters import save_zero_adapter
    from learner.memory import require_memory
    from learner.model import pick_device
    from learner.stage import run

    known = settings.all_lineages
    if lineage is not None and lineage not in known:
        raise StartError(
            f"there is no lineage {lineage!r}: known are {', '.join(known)}; see [lineages.NAME]"
        )
    lineages = known if lineage is None else (lineage,)
    stop, patience = threading.Event(), Patience(math.inf)

    def end(_number: int, _frame: object) -> None:
        stop.set()
        patience.end(_STOP_S)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    model_path = settings.engine.model_path
    share = gpu_share(settings.engine, os.environ)
    log.info("training %s", require_memory(settings.learner, model_path, len(lineages), share))
    if share and pick_device(settings.learner).type == "cuda":
        _wait_for_engine(settings, stop)
    store = Store(settings.store, patience=patience)
    path = zero_adapter(settings)
    if not path.exists():
        save_zero_adapter(model_path, settings.learner, path)

    def to_engine(version: PolicyVersion, withdraw: bool = False) -> None:
        act = withdraw_version if withdraw else publish_trained
        asyncio.run(act(settings, store, version))

    def live_requests() -> int:
        return asyncio.run(_live_requests(settings))

    if settings.learner.schedule == "idle":
        engine_url(settings)  # without an engine there is nothing to be asked
    run(
        store,
        settings.learner,
        model_path,
        lineages,
        to_engine,
        stop,
        live_requests,
        settings.engine.dtype if settings.engine.mode == "managed" else "auto",
    )
    store.close()


async def publish_version(settings: Settings, store: Store, version: PolicyVersion) -> None:
    """Brings a version that a person chose into service on the configured engine."""
    async with engine_client(settings) as engine:
        await publish(store, engine, version)


async def publish_trained(settings: Settings, store: Store, version: PolicyVersion) -> None:
    """Brings a new version into service on the configured engine, unless it was overtaken."""
    async with engine_client(settings) as engine:
        await publish_candidate(store, engine, version)


def _wait_for_engine(settings: Settings, stop: threading.Event) -> None:
    """Returns once the managed engine is up, if one runs, or the learner must end.

    vLLM measures what is free on its GPU while it starts: until then nothing else may take of it.
    """
    until = time.monotonic() + settings.engine.start_timeout_s
    while engine_file(settings).exists() and time.monotonic() < until:
        if asyncio.run(_is_healthy(settings)) or stop.wait(_LOOK_S):
            return


async def _is_healthy(settings: Settings) -> bool:
    async with engine_client(settings) as engine:
        try:
            return await engine.healthy()
        except EngineError as error:
            log.warning("%s", error)
            return False


async def _live_requests(settings: Settings) -> int:
    async with engine_client(settings) as engine:
        return await engine.live_requests()


async def withdraw_version(settings: Settings, store: Store, version: PolicyVersion) -> None:
    """Takes a version out of service on the configured engine, for its `reason`."""
    async with engine_client(settings) as engine:
        await withdraw(store, engine, version)


def cannot_listen(settings: Settings, error: OSError) -> StartError:
    """Why the proxy's address cannot be bound."""
    where = f"[proxy] host = {settings.proxy.host!r}, port = {settings.proxy.port}"
    if error.errno == errno.EADDRINUSE:
        return StartError(
            f"{where}: another program listens there; end it or set another [proxy] port"
        )
    return StartError(f"{where} cannot be bound: {error.strerror}; set another host or port")


def _stop_event(*patiences: Patience) -> asyncio.Event:
    """Set when the process is to stop; then nothing waits for the store much longer."""
    stop = asyncio.Event()

    def end() -> None:
        stop.set()
        for patience in patiences:
            patience.end(_STOP_S)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return stop
