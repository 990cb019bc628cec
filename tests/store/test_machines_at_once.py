"""Two machines share a PostgreSQL that fails: nothing acknowledged is lost, nothing is twice.

Both record, judge and want to train the same lineage all the time.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nextstate.config import StoreConfig
from tests.postgresql_server import Server, needed, require_server
from tests.store.machine import Machine, check

psycopg = needed("psycopg")
pytestmark = pytest.mark.sqlite  # it brings its own server
_WRITERS = 0x6E657874
"""The advisory lock of all writes."""
_WAITS = "SELECT 1 FROM pg_locks WHERE locktype = 'relation' AND NOT granted"
HITS = 3
Machines = tuple[Machine, Machine]
Fault = Callable[[Server, str, Machines], None]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that tests may kill."""
    require_server()
    found = Server()
    yield found
    found.close()


def until(true: Callable[[], object], machines: Machines) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "it did not happen"
        assert not any(one.errors for one in machines), [one.errors for one in machines]
        time.sleep(0.01)


def killed(server: Server, _: str, __: Machines) -> None:
    server.kill()
    server.start()


def restarted(server: Server, _: str, __: Machines) -> None:
    server.restart()


def disconnected(server: Server, _: str, __: Machines) -> None:
    assert server.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'nextstate'"
    )


def timed_out(server: Server, url: str, machines: Machines) -> None:
    """Somebody holds a table for longer than a statement may take."""
    before = logged(server, "canceling statement due to statement timeout")
    with psycopg.connect(url) as other:
        other.execute("SET statement_timeout = 0")
        other.execute("LOCK TABLE turns, judgements, samples")
        until(lambda: logged(server, "due to statement timeout") > before, machines)


def deadlocked(server: Server, url: str, machines: Machines) -> None:
    """Each waits for the other; the machine's own server process notices it first."""
    before = logged(server, "ERROR:  deadlock detected")

    def hit() -> bool:
        with psycopg.connect(url) as other:
            other.execute("SET deadlock_timeout = '60s'")
            other.execute("SET lock_timeout = 0")
            other.execute("LOCK TABLE turns IN SHARE MODE")
            until(lambda: other.execute(_WAITS).fetchall(), machines)
            other.execute(f"SELECT pg_advisory_xact_lock({_WRITERS})")
        return logged(server, "ERROR:  deadlock detected") > before

    until(hit, machines)


def wrong_clock(_: Server, __: str, machines: Machines) -> None:
    """One is a minute ahead, the other one behind; then the other way."""
    ahead = 60.0 if machines[0].off_s <= 0 else -60.0
    machines[0].off_s, machines[1].off_s = ahead, -ahead


def logged(server: Server, text: str) -> int:
    return len(re.findall(text, (server.folder / "log").read_text()))


OPTIONS = {
    timed_out: "-c statement_timeout=300ms",
    deadlocked: "-c deadlock_timeout=1s -c lock_timeout=20s",
}
"""Of the machines' connections."""


class Progress:
    """Whether both have recorded, and judged and trained, since it was made."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._before = self._counts()

    def _counts(self) -> list[int]:
        had = [one.had for one in self._machines]
        recorded = [len(one.recorded) for one in had]
        judged, trained = sum(len(one.judged) for one in had), sum(len(one.trained) for one in had)
        return [*recorded, judged, trained]

    def __bool__(self) -> bool:
        more = [now - then for now, then in zip(self._counts(), self._before, strict=True)]
        return min(more) > 1 and more[0] > 4


@pytest.mark.parametrize(
    "fault", [killed, restarted, disconnected, timed_out, deadlocked, wrong_clock]
)
def test_nothing_acknowledged_is_lost_and_nothing_is_twice(
    server: Server, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = server.database(f"t{time.monotonic_ns()}")
    url = f"{plain}?options={quote(OPTIONS.get(fault, ''))}"
    config = StoreConfig(str(tmp_path), url)
    if fault is wrong_clock:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + random.choice((-60.0, 60.0)))
    machines = Machine(config, "a"), Machine(config, "b")
    try:
        for _ in range(HITS):
            until(Progress(machines).__bool__, machines)
            fault(server, plain, machines)
        until(Progress(machines).__bool__, machines)
    finally:
        for one in machines:
            one.stop()
    for one in machines:
        one.join()
    check(StoreConfig(str(tmp_path), plain), *(one.had for one in machines))
