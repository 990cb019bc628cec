"""The checks of `nextstate doctor`: each says what was found, or what is wrong and fixes it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from nextstate.app.cores import BINDING, shared_cores
from nextstate.app.engine_access import engine_clients
from nextstate.app.settings import Settings
from nextstate.app.stages import check_port
from nextstate.app.tls import certificate
from nextstate.engine import process as vllm
from nextstate.engine.abilities import look, sampling_lacks
from nextstate.engine.adapter_files import in_memory
from nextstate.engine.client import Abilities
from nextstate.errors import (
    ConfigError,
    EngineError,
    NextStateError,
    StartError,
    WrongEngineError,
)
from nextstate.hooks import load_plugin
from nextstate.keys import chosen_key
from nextstate.quick_imports import quick_imports
from nextstate.store import Store
from nextstate.store_key import find_store_key

_RENEW_DAYS = 7
"""A certificate that ends within so many days is a problem."""
_MAX_MODELS = 8
"""Models of an external engine that are listed."""
_FOLDERS = ("proxy", "judge", "learner", "plugins")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    found: str
    problem: str | None = None


def checks(config: Path) -> Iterator[Check]:
    """Runs every check; an invalid configuration ends them."""
    yield Check("python", sys.version.split()[0])
    yield _checked("packages", _own_folders)
    try:
        settings = Settings.read(config)
    except ConfigError as error:
        yield Check("configuration", "", str(error))
        return
    yield Check("configuration", str(config) if config.exists() else "all defaults")
    yield _checked("state folder", lambda: _state_folder(settings))
    yield _checked("encryption", lambda: _encryption(settings))
    yield _checked("agent profile", lambda: _profile(settings))
    yield _checked("other hosts", lambda: _hosts(settings))
    if settings.engine.mode == "managed":
        yield _checked("vllm", lambda: _vllm(settings))
    else:
        yield from _engine(settings)
    yield _checked("model", lambda: _model(settings))
    yield _checked("keys", lambda: _keys(settings))
    if settings.proxy.tls_certificate:
        yield _checked("certificate", lambda: _certificate(settings))
    yield _checked("port", lambda: _port(settings))
    if cores := shared_cores(settings):
        chosen = "`[learner] threads`" if settings.learner.threads else "the default"
        yield Check("cores", f"{cores} ({chosen}; {BINDING} in [engine] env divides nothing)")
    yield _checked("training", lambda: _training(settings))


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, check())
    except NextStateError as error:
        return Check(name, "", str(error))


def _own_folders() -> str:
    root = Path(__file__).parents[2]
    for name in _FOLDERS:
        file = Path(importlib.import_module(name).__file__ or "")
        if root not in file.parents:
            raise StartError(
                f"`import {name}` finds {file}, not ours: another package shadows it; "
                "use a fresh environment (`make env`)"
            )
    return f"{', '.join(_FOLDERS)} are ours"


def _state_folder(settings: Settings) -> str:
    with closing(Store(settings.store)) as store:
        return f"{store.dir}; {store.database.about()}"


def _encryption(settings: Settings) -> str:
    store = Store(settings.store)
    store.close()
    if store.vault is None:
        if settings.store.url.startswith("postgres"):
            return "off: encrypt the disks of the server and of [store] dir; only a file can be"
        return "off: who can read the disk reads everything (`nextstate encrypt`)"
    key = find_store_key(store.dir)
    served = in_memory(store.dir.resolve())
    where = "" if key is None else f"; the key is in {key.where}"
    return f"on{where}; vLLM reads opened adapters from memory, {served}"


def _profile(settings: Settings) -> str:
    load_plugin("agents", settings.agents.profile, None)
    return settings.agents.profile


def _hosts(settings: Settings) -> str:
    return ", ".join(settings.hosts) or "none may be reached"


def _vllm(settings: Settings) -> str:
    vllm.check_package()
    vllm.check_system(settings.engine)
    vllm.check_replicas(settings.engine)
    vllm.managed_key(settings.engine)
    left_out = ", ".join(vllm.not_passed(settings.engine, os.environ))
    return f"installed; it does not get {left_out} of this shell" if left_out else "installed"


def _engine(settings: Settings) -> Iterator[Check]:
    """What answers at the addresses of external engines, and what learning lacks there."""
    for number, url in enumerate(settings.engine.urls):
        yield from _engine_at(settings, number, url)


def _engine_at(settings: Settings, number: int, url: str) -> Iterator[Check]:
    where = f"[engine] url = {url!r}"
    try:
        found = asyncio.run(_look(settings, number))
    except WrongEngineError as error:
        yield Check("engine", "", f"{where}: {error}")
        return
    except ConfigError as error:
        yield Check("engine", "", str(error))
        return
    except EngineError as error:
        yield Check("engine", "", f"{where} does not serve: {error}; start it, or set its address")
        return
    if found.served:
        served = ", ".join(found.served[:_MAX_MODELS])
        yield Check("engine", "", f"{where} lacks {found.lacks[0]}; it serves {served}")
        return
    yield Check("engine", f"{url} answers as {settings.engine.name}")
    for lack in found.lacks:
        problem = f"{where}: turns are recorded, but learning lacks {lack}"
        yield Check("engine for learning", "", problem)


async def _look(settings: Settings, number: int) -> Abilities:
    async with engine_clients(settings) as engines:
        engine = engines[number]
        if not await engine.healthy():
            raise EngineError(engine.trouble)
        found = await look(engine, adapters=True)
        if found.tells_tokens:
            found = replace(found, lacks=(*found.lacks, *await sampling_lacks(engine)))
        return found


def _model(settings: Settings) -> str:
    vllm.check_model(settings.engine)
    return settings.engine.model


def _training(settings: Settings) -> str:
    if importlib.util.find_spec("trl") is None:
        raise StartError(
            "the learner needs TRL and torch, which are not installed: run `make env`, or install "
            "nextstate with its extra cpu or cuda"
        )
    vllm.check_model(settings.engine)  # the import takes ten seconds
    with quick_imports():
        from learner.memory import require_memory

    lineages = len(settings.all_lineages)
    share = vllm.gpu_share(settings.engine, os.environ)
    return require_memory(settings.learner, settings.engine.model_path, lineages, share)[1]


def _keys(settings: Settings) -> str:
    chosen = [settings.proxy.api_key_env]
    chosen_key(settings.proxy.api_key_env, "[proxy] api_key_env")
    for name, lineage in settings.lineages.items():
        chosen_key(lineage.api_key_env, f"[lineages.{name}] api_key_env")
        chosen.append(lineage.api_key_env)
    store = Store(settings.store)
    known = store.keys.all()
    stored = [key for key in known if key.revoked_at is None]
    store.close()
    found = [f"${name}" for name in chosen if name] + [key.name for key in stored]
    if known and not found:
        return "all are revoked: nobody may use the proxy until `nextstate keys create`"
    return ", ".join(found) or "none: every program of this machine may use the proxy"


def _certificate(settings: Settings) -> str:
    found = certificate(settings.proxy)
    assert found is not None
    ends = time.strftime("%Y-%m-%d", time.gmtime(found.ends_at))
    if found.days_left < _RENEW_DAYS:
        raise ConfigError(
            f"[proxy] tls_certificate = {settings.proxy.tls_certificate!r} ends on {ends}, in "
            f"{found.days_left} days: put a new one there and restart the proxy"
        )
    return f"good until {ends}, {found.days_left} days"


def _port(settings: Settings) -> str:
    check_port(settings)
    proxy = settings.proxy
    return f"{proxy.port} on {proxy.host} is free ({proxy.url}/v1)"
