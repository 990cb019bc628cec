"""Each stage, put together from the settings and run until SIGINT or SIGTERM.

Imports that are slow or that need torch stand in the function that uses them.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import logging
import math
import os
import signal
import sys
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app import retention
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import (
    change_version,
    engine_access,
    engine_clients,
    engine_file,
    zero_adapter,
)
from nextstate.app.own_key import own_key_of, proxy_key, remove_own_key, write_own_key
from nextstate.app.part_environment import part_environment
from nextstate.app.progress import progress
from nextstate.app.settings import Settings
from nextstate.app.supervisor import Child, Supervisor
from nextstate.app.tls import proxy_connector, server_context
from nextstate.app.trained_judge import TrainedJudges
from nextstate.engine import client
from nextstate.engine.adapter_files import CARD_FILE
from nextstate.engine.process import (
    START_TIMEOUT_S,
    VOTE_PRIORITY,
    by_priority,
    check_model,
    gpu_share,
    port_is_free,
)
from nextstate.engine.several import Renderers, live_requests
from nextstate.engine.whole import UP, read_engines
from nextstate.errors import ConfigError, EngineError, StartError
from nextstate.hooks import EnvironmentKind, load_judge, load_plugin
from nextstate.keys import chosen_key, key_of_nodes
from nextstate.offline import switches
from nextstate.pace import Pace
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.quick_imports import quick_imports
from nextstate.records import Decisions, PolicyVersion
from nextstate.store import Store
from nextstate.store.waiting import Patience
from nextstate.store.workers import name_of

if TYPE_CHECKING:
    from proxy.lineages import Lineages
    from rollout.nodes import Nodes
    from rollout.proxy import ProxyClient

log = logging.getLogger(__name__)

_STOP_S = 5.0
"""How long a stage that is asked to stop still waits for its store."""
_COLLECT_AFTER = 10_000
"""New objects before the proxy's garbage collector runs. With Python's default and 256 streams,
each of its full runs held up every stream for 30 ms."""
_SHORT_PAUSES_S = 30.0, 30.0
"""Pauses of the proxy after an exit with code 2: agents wait for it."""


def stage_process(settings: Settings, stage: str, name: str, *arguments: str) -> Child:
    """A child process that runs a stage with these settings."""
    argv = [sys.executable, "-P", "-m", "nextstate", stage, *arguments]
    if settings.file.exists():
        argv += ["--config", str(settings.file.absolute())]
    child = Child(
        name,
        argv,
        settings.store.path / "logs" / f"{name}.log",
        env={
            **part_environment(settings, stage, os.environ),
            **switches(bool(settings.learner.wandb)),
        },
        retry_on_change=(settings.file.absolute(),),
    )
    if stage == "proxy":
        child.pauses_s = _SHORT_PAUSES_S
    else:
        child.retry_with = settings.engine.parts
    return child


async def run_proxy(
    settings: Settings, worker: int | None = None, *, under_up: bool = False
) -> None:
    """Serves; requests in progress end before it returns.

    With several `[proxy] workers` it starts them and keeps them running; `worker` is one of them.
    `under_up` and to a worker, another process of ours gives the key of our commands.
    """
    from nextstate.app.page.changes import AT_THE_PAGE
    from nextstate.app.page.routes import Page
    from proxy.app import Proxy
    from proxy.server import Site
    from proxy.writer_process import WriterProcess

    if settings.proxy.workers > 1 and worker is None:
        await _run_workers(settings, under_up)
        return
    # A request waits a limited time for the store; the start waits without a limit.
    tls = server_context(settings.proxy)
    alone = worker is None and not under_up
    own_key = own_key_of(settings)
    patience, at_start = Patience(), Patience(math.inf)
    stop = _stop_event(patience, at_start)
    (await asyncio.to_thread(Store, settings.store, patience=at_start)).close()
    store = Store(settings.store, patience=patience)
    require_key(settings, store)
    async with engine_clients(settings) as engines:
        proxy = Proxy(
            settings.proxy,
            store,
            engines,
            settings.agents.profile,
            writer=WriterProcess(
                settings.privacy.redactor,
                part_environment(settings, "writer", os.environ),
                settings.hosts,
            ),
            zero_adapter=zero_adapter(settings),
            record=settings.privacy.record,
            lineages=_lineages(settings),
            engine_key=engine_access(settings)[1],
            own_key=own_key,
            worker=name_of(worker, settings.store, settings.proxy.port),
            of_episodes=_after_people(settings),
        )
        proxy.pages = Page(
            settings,
            store,
            proxy.keys,
            functools.partial(client.publish, store, engines, by=AT_THE_PAGE),
            proxy.health_in_full,
            proxy.feedback.allowance,
            proxy.tries,
            proxy.requests,
        )
        runner = proxy.runner()
        await runner.setup()
        host, port = settings.proxy.host, settings.proxy.port
        try:
            shared = worker is not None or None
            await Site(runner, host, port, ssl_context=tls, reuse_port=shared).start()
        except OSError as error:
            await runner.cleanup()
            raise _cannot_listen(settings, error) from error
        if alone:
            write_own_key(settings, own_key)
        # The collector need not look at what exists now again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
        log.info("serving on %s", [site.name for site in runner.sites])
        try:
            await stop.wait()
            await runner.cleanup()
        finally:
            if alone:
                remove_own_key(settings, own_key)
    store.close()


def require_key(settings: Settings, store: Store) -> None:
    """Raises ConfigError if other machines can reach the proxy and it has no key."""
    proxy = settings.proxy
    if proxy.loopback or proxy.api_key_env or any(k.revoked_at is None for k in store.keys.all()):
        return
    raise ConfigError(
        f"[proxy] host = {proxy.host!r} is reachable from other machines and no key is asked for: "
        "make one with `nextstate keys create NAME`, or use 127.0.0.1"
    )


async def _run_workers(settings: Settings, under_up: bool) -> None:
    """Starts the proxy's workers, which share one port, and restarts those that end."""
    check_port(settings)
    server_context(settings.proxy)
    at_start = Patience(math.inf)
    stop = _stop_event(at_start)
    # The database is created here once, before all workers open it.
    store = await asyncio.to_thread(Store, settings.store, patience=at_start)
    require_key(settings, store)
    store.close()
    own_key = own_key_of(settings)
    write_own_key(settings, own_key)
    workers = [
        stage_process(settings, "proxy", f"proxy-{number}", "--worker", str(number))
        for number in range(settings.proxy.workers)
    ]
    try:
        await Supervisor(workers, stopping=stop).run()
    finally:
        if not under_up:
            remove_own_key(settings, own_key)


def _lineages(settings: Settings) -> Lineages:
    from proxy.lineages import Access, Lineages

    main_key = chosen_key(settings.proxy.api_key_env, "[proxy] api_key_env")
    access: dict[str, Access] = {}
    owners = {main_key: "[proxy]"}
    for name, lineage in settings.lineages.items():
        where = f"[lineages.{name}]"
        key = chosen_key(lineage.api_key_env, f"{where} api_key_env")
        if key is not None and (other := owners.setdefault(key, where)) != where:
            raise ConfigError(f"{where} api_key_env holds the key of {other}: give it its own")
        access[name] = Access(lineage.model or None, key)
    return Lineages(settings.engine.name, main_key, access)


def check_port(settings: Settings) -> None:
    """Raises StartError if the proxy could not listen on its port."""
    if not port_is_free(settings.proxy.host, settings.proxy.port):
        raise _cannot_listen(settings, OSError(errno.EADDRINUSE, "in use"))


def _cannot_listen(settings: Settings, error: OSError) -> StartError:
    where = f"[proxy] host = {settings.proxy.host!r}, port = {settings.proxy.port}"
    if error.errno == errno.EADDRINUSE:
        return StartError(
            f"{where}: another program listens there; end it or set another [proxy] port"
        )
    return StartError(f"{where} cannot be bound: {error.strerror}; set another host or port")


async def run_judge(settings: Settings) -> None:
    """Judges turns, and deletes those that are too old or too many (`nextstate retain`)."""
    patience = Patience(math.inf)
    stop = _stop_event(patience)
    store = await asyncio.to_thread(Store, settings.store, patience=patience)
    sweeping = threading.Event()
    sweeper = threading.Thread(target=retention.run, args=(store, sweeping), name="retention")
    sweeper.start()
    try:
        await _judge(settings, store, stop)
    finally:
        sweeping.set()
        await asyncio.to_thread(sweeper.join)
    store.close()


async def _judge(settings: Settings, store: Store, stop: asyncio.Event) -> None:
    from judge.config import plugin_settings
    from judge.pace import Counted
    from judge.stage import run

    async with engine_clients(settings) as engines:
        config = settings.judge
        priority = {"priority": VOTE_PRIORITY} if by_priority(settings.engine) else {}
        urls, key = engine_access(settings)
        hints, trained = settings.learner.method != "binary", TrainedJudges(settings, engines)
        given = plugin_settings(config, settings.engine.name, urls, priority, key, hints, trained)
        kind = load_judge(config.kinds, given)
        profile = load_plugin("agents", settings.agents.profile, None)
        polite = config.on_engine and config.share < 1
        live = functools.partial(live_requests, engines)
        if settings.learner.trains_all:  # agents' requests run on the versions' own engines
            live = functools.partial(_live_requests, settings)
        counted = Counted(kind, live)
        pace = Pace(config.share, counted.agents) if polite else None
        try:
            renderer = Renderers(engines)
            await run(store, config, counted, renderer, stop, pace=pace, profile=profile)
        finally:
            await kind.close()


async def run_rollout(settings: Settings, ray: Any = None) -> None:
    """Plays the environment of `[rollout]` through the proxy. Raises ConfigError without one.

    With `ray`, of `nextstate.ray_cluster.connect`, it is played on the nodes of a cluster.
    """
    import aiohttp

    from rollout.proxy import ProxyClient
    from rollout.sources import source_of
    from rollout.stage import run

    config = settings.rollout
    if not config.environment:
        raise ConfigError(
            "[rollout] environment is empty: name one there, or give `nextstate rollout` an "
            "ENVIRONMENT and --tasks FILE"
        )
    patience = Patience(math.inf)
    stop = _stop_event(patience)
    kind: EnvironmentKind = load_plugin("environments", config.environment, None)
    source = await asyncio.to_thread(source_of, config.tasks, config.name, kind)
    if ray is None:
        await kind.check_machine()
    # Agents run beneath this process: it gets no key to what people said.
    store = await asyncio.to_thread(Store, settings.store, patience=patience, with_key=False)
    folder = settings.store.path / "rollout"
    make_folder(folder)
    taken = f"[rollout] environment = {config.environment!r} is played"
    with ProcessLock(folder / "lock", taken, "end it, or set another [store] dir"):
        async with aiohttp.ClientSession(connector=proxy_connector(settings.proxy, 0)) as http:
            key = proxy_key(settings)
            name = settings.engine.name
            url, bounds = proxy_url(settings, ray), (config.max_calls, config.deadline_s)
            proxy = ProxyClient(http, url, key, name, config.deadline_s)
            nodes = nodes_for(settings, ray, config.environment, *bounds, proxy) if ray else None
            await run(config, kind, source, proxy, store, folder, stop, nodes)
    store.close()


def proxy_url(settings: Settings, ray: Any) -> str:
    """Where the proxy is reached, also by the nodes of Ray if it listens for other machines."""
    config = settings.proxy
    if ray is None or config.host not in ("0.0.0.0", "::"):
        return config.url
    from nextstate.ray_cluster import own_address

    return replace(config, host=own_address(ray)).url


def nodes_for(
    settings: Settings,
    ray: Any,
    environment: str,
    max_calls: int,
    deadline_s: float,
    proxy: ProxyClient,
) -> Nodes:
    """What plays on the nodes of Ray."""
    from rollout.nodes import Nodes, Work

    key = proxy_key(settings)
    work = Work(
        environment=environment,
        url=proxy_url(settings, ray),
        key=key and key_of_nodes(key),
        model=settings.engine.name,
        max_calls=max_calls,
        deadline_s=deadline_s,
        hosts=[*settings.hosts],
    )
    return Nodes(ray, work, proxy)


def _after_people(settings: Settings) -> dict[str, int]:
    """The fields of a request that a managed engine answers after people's and before votes."""
    return {"priority": VOTE_PRIORITY - 1} if by_priority(settings.engine) else {}


async def evaluate_judge(settings: Settings, file: Path, split: str | None) -> str:
    """How the configured judge agrees with a file of labelled next states, as a table."""
    from judge.config import plugin_settings
    from judge.evaluation import evaluate, read_cases, report

    cases = read_cases(file, split)
    async with AsyncExitStack() as opened:
        given = plugin_settings(settings.judge, settings.engine.name, hints=False)
        if settings.judge.on_engine:
            urls, key = engine_access(settings)
            engines = await opened.enter_async_context(engine_clients(settings))
            trained = TrainedJudges(settings, engines)
            given = plugin_settings(
                settings.judge, settings.engine.name, urls, None, key, False, trained
            )
        kind = load_judge(settings.judge.kinds, given)
        opened.push_async_callback(kind.close)
        with progress() as step:
            what = f"{kind.name} judges"
            done = await evaluate(
                cases, settings.judge, kind, lambda judged: step(what, judged, len(cases))
            )
    return report(done)


def run_learner(settings: Settings, lineage: str | None = None) -> None:
    """Trains all lineages in turn, or only one; the step in progress ends before it returns."""
    known = settings.all_lineages
    if lineage is not None and lineage not in known:
        raise StartError(
            f"there is no lineage {lineage!r}: known are {', '.join(known)}; see [lineages.NAME]"
        )
    lineages = known if lineage is None else (lineage,)
    check_model(settings.engine)  # before what takes seconds to import
    cores = shared_cores(settings) if engine_file(settings).exists() else None
    if cores is not None:
        os.sched_setaffinity(0, cores.learner)  # before torch chooses its number of threads
        log.info("the machine's cores are divided: %s", cores)

    with quick_imports():
        from learner.adapters import save_zero_adapter
        from learner.memory import require_memory
        from learner.model import pick_device
        from learner.stage import run

    stop, patience = threading.Event(), Patience(math.inf)

    def end(_number: int, _frame: object) -> None:
        stop.set()
        patience.end(_STOP_S)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    model_path, config = settings.engine.model_path, settings.learner
    if longest := settings.engine.max_model_len:  # no reply is longer, so no pass need be
        config = replace(config, max_tokens=min(config.max_tokens, longest))
    share = gpu_share(settings.engine, os.environ)
    config, needs = require_memory(config, model_path, len(lineages), share)
    log.info("training %s", needs)
    if share and pick_device(config).type == "cuda":
        wait_for_engine(settings, stop)
    store, path = Store(settings.store, patience=patience), zero_adapter(settings)
    if not ((path / CARD_FILE).exists() or config.trains_all):
        save_zero_adapter(model_path, config, path)

    def to_engine(version: PolicyVersion, withdraw: Decisions | None = None) -> None:
        change = client.publish_candidate
        if withdraw:
            change = functools.partial(client.withdraw, decisions=withdraw)
        asyncio.run(change_version(settings, change, store, version))

    if config.schedule == "idle":
        engine_access(settings)  # raises here if there is no engine whose requests to count
    run(
        store,
        config,
        model_path,
        lineages,
        to_engine,
        stop,
        functools.partial(_count_live_requests, settings),
        settings.engine.dtype if settings.engine.mode == "managed" else "auto",
        examined=[settings.rollout.lineage] if settings.rollout.environment else [],
    )
    store.close()


def wait_for_engine(settings: Settings, stop: threading.Event, poll_s: float = 0.5) -> None:
    """Returns once the managed engines are up, if any run, or when `stop` is set.

    While it starts, vLLM measures the free memory of its GPU: nothing else may take any then.
    """
    until = time.monotonic() + START_TIMEOUT_S
    while engine_file(settings).exists() and time.monotonic() < until:
        if asyncio.run(_is_healthy(settings)) or stop.wait(poll_s):
            return


async def _is_healthy(settings: Settings) -> bool:
    async with engine_clients(settings) as engines:
        try:
            return all([await engine.healthy() for engine in engines])
        except EngineError as error:
            log.warning("%s", error)
            return False


def _count_live_requests(settings: Settings) -> int:
    return asyncio.run(_live_requests(settings))


async def _live_requests(settings: Settings) -> int:
    async with engine_clients(settings) as engines, AsyncExitStack() as opened:
        found = read_engines(settings.store.path).values()
        whole = [engines[0].twin(one.url, one.name) for one in found if one.state == UP]
        for engine in whole:
            await opened.enter_async_context(engine)
        return await live_requests([*engines, *whole])


def _stop_event(*patiences: Patience) -> asyncio.Event:
    """An event that SIGINT and SIGTERM set; from then on the store is waited for only briefly."""
    stop = asyncio.Event()

    def end() -> None:
        stop.set()
        for patience in patiences:
            patience.end(_STOP_S)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return stop
