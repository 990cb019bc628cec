"""A store that is locked or full makes a stage wait, a command give up, and neither one hang."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.errors import StoreError, WaitError
from nextstate.records import Feedback, PolicyVersion, Verdict, VersionState
from nextstate.store import Store, database
from nextstate.store.judging import Judging
from nextstate.store.shares import OWNER
from nextstate.store.sqlite import SQLite
from nextstate.store.training import Training
from nextstate.store.turns import Turns
from nextstate.store.versions import Versions
from nextstate.store.waiting import Patience
from nextstate.store.workers import Workers
from tests.proxy.running_proxy import Running, both, request
from tests.scripted_engine import ScriptedEngine
from tests.store.test_records import add, judge, turn

pytestmark = pytest.mark.sqlite

WORK: dict[str, Callable[[Store], object]] = {
    "lease_judgements": lambda s: s.judging.lease(1, 60),
    "settle_verdict": lambda s: judge(s, 1, 1),
    "give_feedback": lambda s: s.reviewing.give(Feedback("turn_0", -1), OWNER),
    "lease_samples": lambda s: s.training.lease_samples("main", 1, "b", scored=True, hinted=True),
    "add_version": lambda s: s.versions.add(
        PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE), None
    ),
    "set_serving": lambda s: s.versions.set_serving("main", 0),
    "beat": lambda s: s.workers.beat("w", [], {}),
    "spend": lambda s: s.judging.spend(1, 1),
}

LATER = os.EX_TEMPFAIL


QUICK = {"pause_s": 0.01, "lock_wait_s": 0.001}


@pytest.fixture
def waiting(tmp_path: Path) -> Generator[tuple[Store, Patience]]:
    patience = Patience(math.inf, **QUICK)
    store = Store(StoreConfig(dir=str(tmp_path / "state")), patience=patience)
    add(store, turn(0), turn(1))
    judge(store, 0, 1)
    yield store, patience
    store.close()


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Another process holds the database, for reading too."""
    with closing(sqlite3.connect(folder / "nextstate.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


class Started(threading.Thread):
    """Work in a thread of its own, and what came of it."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._work = work
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.error = error


def wait_for(caplog: pytest.LogCaptureFixture, text: str) -> None:
    for _ in range(4000):
        if text in caplog.text:
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"{text!r} was not logged")


@pytest.mark.parametrize("name", WORK)
def test_what_finds_the_store_locked_is_done_once_it_is_free(
    waiting: tuple[Store, Patience], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = waiting
    with locked(store.dir):
        work = Started(lambda: WORK[name](store))
        wait_for(caplog, "waits for the store: database is locked")
        assert work.is_alive()
    work.join(30)
    assert work.error is None


@pytest.mark.parametrize("customer", [Turns, Judging, Training, Versions, Workers])
def test_every_query_waits(customer: type) -> None:
    public = [m for n, m in vars(customer).items() if callable(m) and not n.startswith("_")]
    assert public
    assert all(hasattr(query, "__wrapped__") for query in public)


def test_on_a_full_disk_work_waits_and_nothing_is_done_in_part(
    waiting: tuple[Store, Patience], caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = waiting
    ids = tuple(random.Random(1).randrange(2**32) for _ in range(20_000))
    hinted = Verdict("turn_1", (-1,), -1, "rules", "Be brief.", ids)
    before = store.counts()
    size = (store.dir / "nextstate.sqlite3-wal").stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        work = Started(lambda: store.judging.settle_verdict(hinted))
        wait_for(caplog, "waits for the store: disk I/O error")
        assert (store.counts(), store.judging.verdict("turn_1")) == (before, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    work.join(30)
    assert (work.error, store.judging.verdict("turn_1")) == (None, hinted)


def test_a_command_gives_up_with_what_to_do(
    waiting: tuple[Store, Patience],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, _ = waiting
    monkeypatch.setattr(database, "Patience", lambda: Patience(0.05, **QUICK))
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{store.dir}"\n')
    with locked(store.dir):
        assert main(["feedback", "turn_0", "--score", "1", "--config", str(config)]) == LATER
        assert "cannot be used for now: database is locked; make room" in capsys.readouterr().err
        for command in ("status", "turns", "versions"):  # these only read
            assert main([command, "--config", str(config)]) == 0


def test_who_is_to_stop_waits_no_longer_for_a_locked_store(
    waiting: tuple[Store, Patience], caplog: pytest.LogCaptureFixture
) -> None:
    store, patience = waiting
    with locked(store.dir):
        work = Started(lambda: store.judging.spend(1, 1))
        wait_for(caplog, "waits for the store")
        patience.end(0.0)
        work.join(30)
        assert isinstance(work.error, WaitError)
        with pytest.raises(WaitError):
            store.judging.spend(1, 1)
    store.judging.spend(1, 1)  # what need not wait is done all the same


def test_what_does_not_pass_is_told_at_once(waiting: tuple[Store, Patience]) -> None:
    store, _ = waiting
    with pytest.raises(StoreError, match="no turn"):
        store.reviewing.give(Feedback("turn_x", 1), OWNER)
    with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as other:
        other.execute("DROP TABLE spending")
    with pytest.raises(StoreError, match="no whole SQLite database: no such table: spending"):
        store.judging.spend(1, 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EROFS, "read-only"), True),
        (PermissionError(errno.EACCES, "not yours"), False),
        (sqlite3.OperationalError("made by hand"), False),
        (ValueError("no"), False),
    ],
)
def test_which_errors_are_transient(error: Exception, expected: bool) -> None:
    assert SQLite(Path("any")).is_transient(error) == expected


@pytest.mark.parametrize("stage", ["judge", "learner"])
def test_a_stage_waits_for_a_locked_store_and_can_be_stopped_meanwhile(
    tmp_path: Path, stage: str
) -> None:
    database = tmp_path / "state" / "nextstate.sqlite3"
    database.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(database)) as file:  # it must be written when it is opened
        file.executescript("PRAGMA journal_mode=WAL; CREATE TABLE other (x)")
    config = tmp_path / "nextstate.toml"
    model = tmp_path / "model"
    model.mkdir()
    shape = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    (model / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 128}))
    config.write_text(
        f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmode = "external"\n'
        f'url = "http://127.0.0.1:9"\nmodel = "{model}"\n'
    )
    argv = [sys.executable, "-P", "-m", "nextstate", stage, "--config", str(config)]
    with locked(tmp_path / "state"), subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b"".join(iter_until(process.stderr, b"waits for the store"))
        assert process.poll() is None, said
        process.send_signal(signal.SIGTERM)
        assert b"cannot be used for now" in process.stderr.read()
        assert process.wait(60) == LATER  # not 2, after which it would rest


def iter_until(lines: Iterable[bytes], mark: bytes) -> Iterator[bytes]:
    for line in lines:
        yield line
        if mark in line:
            return


def test_feedback_on_a_locked_store_is_to_be_tried_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await p.chat(request())
        (turn_id,) = store.turns.ids()
        body = {"turn_id": turn_id, "score": 1}
        monkeypatch.setattr(store.database, "patience", Patience(0.05))
        with locked(store.dir):
            async with p.http.post(f"{p.url}/v1/feedback", json=body) as answer:
                assert answer.status == 503
                assert int(answer.headers["Retry-After"]) > 0
                assert (await answer.json())["error"]["message"]
        async with p.http.post(f"{p.url}/v1/feedback", json=body) as answer:
            assert answer.status == 200

    both(test, store, tmp_path)


def test_many_at_once_leave_the_others_their_connections(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as opened:
        for _ in range(15):
            opened.enter_context(store.database.cursor(write=False))
        pool = store.database.engine.pool
        monkeypatch.setattr(pool, "_timeout", 0.05)
        monkeypatch.setattr(store.database, "patience", Patience(0.1, pause_s=0.01))
        with pytest.raises(WaitError, match="QueuePool limit"):
            store.keys.all()
    for _ in range(4):
        assert store.keys.all() == []
    with ExitStack() as opened:
        for _ in range(12):
            opened.enter_context(store.database.read())
