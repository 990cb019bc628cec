"""Fixtures that several test files share, and how the tests are marked, grouped and ordered."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import TestCase

import pytest
from hypothesis import HealthCheck, settings

from nextstate.config import StoreConfig
from nextstate.engine.client import EngineClient
from nextstate.engine.messages_behaviour import MessagesBehaviour, learn_messages_behaviour
from nextstate.engine.process import free_port
from nextstate.store import Store
from tests.postgresql_server import Server as PostgreSQLServer
from tests.postgresql_server import instead_of_files, missing

if TYPE_CHECKING:
    from tests.running_loop import Engine, Loop

# The models are tiny and several runs share the machine: more threads would only wait in a loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Other runs share the machine, so a slow example means nothing.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")

START_TIMEOUT_S = 600
"""For a test that may have to start the engine first."""
AT_ONCE = 8
"""Parallel requests; the engine answers as many in little more time than one."""
Done = dict[tuple[Any, ...], "Future[Any]"]
"""Results for each test, by the values of its parameters sorted by name."""
_ENGINE = {"loop", "talks", "vllm"}
"""Fixtures that start vLLM or import it."""
_PROCESSES = {"subprocess", "multiprocessing"}
"""Modules that a file imports to start processes."""
_TRAINING = {"torch", "save_tiny_model"}
"""Names in a file that runs or trains a model."""


@pytest.hookimpl(tryfirst=True)  # before pytest reads the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by what it uses, and puts files that take long first.

    test_end_to_end.py is the last that uses the engine: it trains the policy and ends the engine.
    """
    for item in items:
        assert isinstance(item, pytest.Function)
        for marker in _markers(item):
            item.add_marker(marker)
        if item.get_closest_marker("engine") and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs the tests of the store, and of files that say `DATABASES`, on both databases."""
    of_store = metafunc.definition.path.parent == Path(__file__).parent / "store"
    if not (of_store or hasattr(metafunc.module, "DATABASES")):
        return
    only = metafunc.definition.get_closest_marker("sqlite") is not None
    if not only and not issubclass(metafunc.cls or object, TestCase):
        metafunc.parametrize("database", ["sqlite", "postgresql"], indirect=True)


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
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    server = PostgreSQLServer()
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store on disk. Whatever a test does with it, the ledger must tell it."""
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
