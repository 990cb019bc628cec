"""Fixtures that several test files share, and how the tests are marked, grouped and ordered."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import TestCase

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings

from nextstate.config import StoreConfig
from nextstate.engine.client import EngineClient
from nextstate.engine.messages_behaviour import MessagesBehaviour, learn_messages_behaviour
from nextstate.engine.process import free_port
from nextstate.private_files import make_state_folder
from nextstate.quick_imports import quick_imports
from nextstate.store import Store
from nextstate.store.sqlite import FILE
from nextstate.store.vault import vault_of
from tests.postgresql_server import Server as PostgreSQLServer
from tests.postgresql_server import instead_of_files, require_server

if TYPE_CHECKING:
    from tests.running_loop import Engine, Loop

# The models are tiny and several runs share the machine: more threads would only wait in a loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Other runs share the machine, so a slow example means nothing.
_SHARED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("few", _SHARED, max_examples=40)
settings.register_profile("many", _SHARED, max_examples=1000)
"""For `make soak`."""
settings.load_profile("few")

STORE_TESTS = Path(__file__).parent / "store"
START_TIMEOUT_S = 600
"""For a test that may have to start the engine first."""
AT_ONCE = 8
"""Parallel requests; the engine answers as many in little more time than one."""
Done = dict[tuple[Any, ...], "Future[Any]"]
"""Results for each test, by the values of its parameters sorted by name."""
_ENGINE = {"loop", "talks", "vllm"}
"""Fixtures that start vLLM or import it."""
_ENGINE_WORD = re.compile(r"mark\.engine\b|: (?:Loop|Engine)\b|\bvllm\(\)|\bbehaviour: Messages")
"""In every file with a test that needs vLLM."""
_PROCESSES = {"subprocess", "multiprocessing"}
"""Modules that a file imports to start processes."""
_TRAINING = {"torch", "save_tiny_model"}
"""Names in a file that runs or trains a model."""


class _Compiled(dict[Any, Any]):
    """Compiled statements by all that SQLAlchemy knows them by but the store that they are of.

    Each test opens a store of its own, and would compile each of its statements anew.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        """A statement that any store of this kind has compiled."""
        return super().get((type(key[0]), *key[1:]), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        super().__setitem__((type(key[0]), *key[1:]), compiled)


_compiled = _Compiled()


@sa.event.listens_for(sa.Engine, "engine_connect")
def _share_compiled(connection: sa.Connection) -> None:
    """But not of encrypted stores: what they compile seals values with their own keys."""
    if vault_of(connection.dialect) is None:
        connection.execution_options(compiled_cache=_compiled)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run of the mark `engine` alone reads only files with a word of it: the others import much.

    A run of all tests refuses a file that needs the engine and has no such word.
    """
    expression: str = config.getoption("markexpr")
    if expression.startswith("engine") and collection_path.name.startswith("test_"):
        return not _names_engine(collection_path) or None
    return None


def _names_engine(file: Path) -> bool:
    return _ENGINE_WORD.search(file.read_text()) is not None


@pytest.hookimpl(tryfirst=True)  # before pytest reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by what it uses, and puts files that take long first.

    test_end_to_end.py is the last that uses the engine: it trains the policy and ends the engine.
    """
    engine_files: set[Path] = set()
    for item in items:
        assert isinstance(item, pytest.Function)
        for marker in _markers(item):
            item.add_marker(marker)
        if item.get_closest_marker("engine"):
            engine_files.add(item.path)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))
    if hidden := [str(file) for file in engine_files if not _names_engine(file)]:
        raise pytest.UsageError(f"{hidden} need vLLM, and match no {_ENGINE_WORD.pattern!r}")
    items.sort(key=_place)


def _markers(item: pytest.Function) -> Iterator[str]:
    if _ENGINE & {*item.fixturenames}:
        yield "engine"
    names = vars(item.module).keys()
    if names & _PROCESSES:
        yield "processes"
    if names & _TRAINING:
        yield "training"


def _place(item: pytest.Item) -> tuple[bool, bool]:
    long = any(item.get_closest_marker(name) for name in ("processes", "training"))
    return item.path.stem == "test_end_to_end", not long


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Files of tests import torch and much else."""
    with quick_imports():
        return (yield)


def pytest_collection_finish() -> None:
    """What was imported is never garbage: do not look through it at each collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def empty_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store that was just made: to copy it takes a sixth of the time to make it."""
    folder = tmp_path_factory.mktemp("empty") / "state"
    Store(StoreConfig(dir=str(folder))).close()
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the tests of the store, and of files that say `DATABASES`, on both databases.

    A test that chooses `database` itself runs on that.
    """
    of_store = metafunc.definition.path.parent == STORE_TESTS
    if not (of_store or hasattr(metafunc.module, "DATABASES")):
        return
    chosen = [one.args[0] for one in metafunc.definition.iter_markers("parametrize")]
    only = (
        any("database" in names for names in chosen)
        or metafunc.definition.get_closest_marker("sqlite") is not None
    )
    if not only and not issubclass(metafunc.cls or object, TestCase):
        metafunc.parametrize("database", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(autouse=True)
def _ready_stores(
    request: pytest.FixtureRequest, empty_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new store in a file is a copy, but where tests are about how a store is made."""
    if request.path.parent == STORE_TESTS:
        return
    opens = Store._open

    def open_ready(store: Store) -> None:
        file = store.dir / FILE
        if not (store.config.url or file.exists()):
            make_state_folder(store.dir)
            copy = file.with_name(f"copy-{threading.get_ident()}")
            shutil.copy(empty_state / FILE, copy)
            with suppress(FileExistsError):  # another process has just made it
                os.link(copy, file)
            copy.unlink()
        opens(store)

    monkeypatch.setattr(Store, "_open", open_ready)


@pytest.fixture(autouse=True)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which database the stores of a test are in."""
    kind: str = getattr(request, "param", "sqlite")
    if kind != "postgresql":
        yield kind
        return
    with instead_of_files(request.getfixturevalue("postgresql")):
        yield kind


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQLServer]:
    """The PostgreSQL of this run; the test is skipped where there is none, except in CI."""
    require_server()
    server = PostgreSQLServer()
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path, database: str, empty_state: Path) -> Iterator[Store]:
    """An empty store on disk. Whatever a test does with it, the ledger must tell it."""
    if database == "sqlite":
        shutil.copytree(empty_state, tmp_path / "state")
    opened = Store(StoreConfig(dir=str(tmp_path / "state")))
    yield opened
    assert opened.ledger.problems() == []
    opened.close()


@pytest.fixture(scope="session")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """The shared `nextstate up` with a real vLLM."""
    from tests.running_loop import Loop, write_config  # imported late: it takes over a second

    port = free_port()
    started = Loop(write_config(tmp_path_factory.mktemp("loop"), port=port), port)
    try:
        started.wait_ready()
        yield started
    finally:
        started.close()


@pytest.fixture(scope="session")
def native_engine(loop: Loop) -> Engine:
    """The vLLM of the loop; its policy is untrained until test_end_to_end.py trains it."""
    return loop.engine()


@pytest.fixture(scope="session")
def behaviour(native_engine: Engine) -> MessagesBehaviour:
    """What the loop's vLLM makes of /v1/messages."""

    async def learnt() -> MessagesBehaviour:
        async with EngineClient(
            native_engine.url, native_engine.model, native_engine.key
        ) as engine:
            return await learn_messages_behaviour(engine)

    return asyncio.run(learnt())


@pytest.fixture(scope="module")
def ask_at_once(request: pytest.FixtureRequest) -> Callable[[str, Callable[..., Any]], Done]:
    """Calls a function in parallel, once for each test of this file that uses the named fixture.

    The arguments are the parameters of the test. Returns when all calls have ended.
    """

    def asked(fixture: str, ask: Callable[..., Any]) -> Done:
        wanted = [
            dict(sorted(item.callspec.params.items()))
            for item in request.session.items
            if item.path == request.path
            and isinstance(item, pytest.Function)
            and fixture in item.fixturenames
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = {tuple(one.values()): pool.submit(ask, **one) for one in wanted}
            wait(found.values())
        return found

    return asked
