"""What the store counts is exact, and what it is asked often costs the same however full it is."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from nextstate.config import StoreConfig
from nextstate.records import Feedback, PolicyVersion, TurnKind, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.store.rows import select
from tests.store.test_records import KEY, add, judge, turn
from tests.store.test_texts import assert_uses_are_counted

LINEAGES = ("main", "bob")
SCORES = st.sampled_from((-1, 0, 1))
BATCH = {"scored": True, "hinted": True}


class Counting(RuleBasedStateMachine):
    """Everything that changes a record, in any order; the counts are those of the rows."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder or Path(tempfile.mkdtemp())
        url = os.environ.get("NEXTSTATE_TEST_URL", "")  # in a child process
        self.store = Store(StoreConfig(dir=str(self.folder), url=url))
        self.turns = self.versions = self.batches = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def any_turn(self, number: int) -> int:
        return number % max(self.turns, 1)

    @rule(
        lineage=st.sampled_from(LINEAGES),
        kind=st.sampled_from(TurnKind),
        version=st.sampled_from((None, 0, 1, 2)),
        reason=st.sampled_from((None, "cut")),
        followed=st.booleans(),
    )
    def record(
        self,
        lineage: str,
        kind: TurnKind,
        version: int | None,
        reason: str | None,
        followed: bool,
    ) -> None:
        values = {"lineage": lineage, "kind": kind, "policy_version": version}
        earlier = self.turns - 5
        values["parent"] = f"turn_{earlier}" if earlier >= 0 else None
        values["request"] = {"messages": [{"role": "user", "content": "go on"}] * (self.turns % 3)}
        new = turn(self.turns, session=f"s{self.turns % 5}", untrainable=reason, **values)
        add(self.store, new, next_state="thanks" if followed else None)
        self.turns += 1

    @rule()
    def retry(self) -> None:
        place = b"p" * 16
        with self.store.recording() as recording:
            for _ in range(2):
                recording.add_turn(turn(self.turns), KEY, KEY, place=place)
                recording.replace_cut(place, f"turn_{self.turns}")
                self.turns += 1

    @rule()
    def be_killed(self) -> None:
        with suppress(KeyboardInterrupt), self.store.recording() as recording:
            recording.add_turn(turn(self.turns), KEY, KEY)
            raise KeyboardInterrupt

    @rule(number=st.integers(0, 99), score=SCORES, hint=st.booleans())
    def vote(self, number: int, score: int, hint: bool) -> None:
        if self.turns:
            judge(self.store, self.any_turn(number), score, "Be brief." if hint else None)

    @rule(number=st.integers(0, 99), score=SCORES, hint=st.sampled_from((None, "Be kind.")))
    def say(self, number: int, score: int, hint: str | None) -> None:
        if self.turns:
            self.store.reviewing.give(Feedback(f"turn_{self.any_turn(number)}", score, hint), OWNER)

    @rule(limit=st.integers(1, 4))
    def lease_work(self, limit: int) -> None:
        for turn_id in self.store.judging.lease(limit, 60)[1:]:
            self.store.judging.defer(turn_id, 0.0, "later")

    @rule(lineage=st.sampled_from(LINEAGES), limit=st.integers(1, 4), kept=st.booleans())
    def train(self, lineage: str, limit: int, kept: bool) -> None:
        self.versions += 1
        batch = f"b{self.versions}"
        ready = self.store.training.ready_samples(lineage, **BATCH)
        leased = self.store.training.lease_samples(lineage, limit, batch, **BATCH)
        # Fewer where one session has more than half of them while another waits, too.
        assert min(limit, ready, 2) <= len(leased) <= min(limit, ready)
        state = VersionState.CANDIDATE if kept else VersionState.REJECTED
        version = PolicyVersion(lineage, self.versions, 0, "/a", "ff", 1, state)
        self.store.versions.add(version, batch)

    @rule(lineage=st.sampled_from(LINEAGES), batch=st.booleans())
    def give_up(self, lineage: str, batch: bool) -> None:
        self.store.training.lease_samples(lineage, 2, "x", scored=batch, hinted=True)
        self.store.training.release_samples(lineage)

    @rule(lineage=st.sampled_from(LINEAGES), number=st.integers(0, 9))
    def serve(self, lineage: str, number: int) -> None:
        self.store.versions.set_serving(lineage, number)

    @rule(lineage=st.sampled_from(LINEAGES), number=st.integers(0, 99))
    def drop(self, lineage: str, number: int) -> None:
        self.store.training.drop_samples([f"turn_{self.any_turn(number)}"], "too long")
        self.store.training.drop_stale(lineage, lambda version: "old" if version == 1 else None)
        self.store.training.hold_out(lineage, lambda session: session == f"s{number % 5}")

    @invariant()
    def counts_are_those_of_the_rows(self) -> None:
        def grouped(what: str) -> dict[Any, int]:
            query = f"SELECT x, count(*) FROM (SELECT {what}) AS found GROUP BY x"
            return {row[0]: row[1] for row in select(self.store, query)}

        expected: dict[str, int] = {}
        for area, what in (
            ("turns", "kind AS x FROM turns WHERE replaced_by IS NULL"),
            ("judgements", "state AS x FROM judgements"),
            ("verdicts", "score AS x FROM verdicts"),
            ("samples", "state AS x FROM samples"),
            ("versions", "state AS x FROM versions"),
        ):
            expected |= {f"{area}/{key}": count for key, count in grouped(what).items()}
        trainable = grouped("'turns/trainable' AS x FROM turns WHERE untrainable IS NULL")
        assert self.store.counts() == {"turns/trainable": 0} | expected | trainable
        pairs = select(
            self.store,
            "SELECT voted_judge, score, voted_score FROM feedback WHERE voted_judge IS NOT NULL",
        )
        found = self.store.judging.labels()
        flat = {(judge, *pair): n for judge, of in found.items() for pair, n in of.items()}
        assert flat == Counter(map(tuple, pairs))
        for lineage in LINEAGES:
            self.check_samples(lineage)
        assert_uses_are_counted(self.store)

    def check_samples(self, lineage: str) -> None:
        rows = select(
            self.store,
            "SELECT s.state, s.policy_version, v.score, s.hinted FROM samples s "
            "JOIN verdicts v ON v.turn = s.turn WHERE s.lineage = :lineage",
            lineage=lineage,
        )
        for scored, hinted in ((True, False), (False, True), (True, True)):
            ready = [(score, hint) for state, _, score, hint in rows if state == "ready"]
            usable = sum(bool((scored and score) or (hinted and hint)) for score, hint in ready)
            assert self.store.training.ready_samples(lineage, scored, hinted) == usable
        watched = Counter(
            (t.version, t.score) for t in self.store.versions.judged_turns(lineage, 999)
        )
        assert watched == Counter((v, score) for _, v, score, _ in rows if v is not None)


def change_for_ever(folder: Path, seed: int) -> None:
    """Changes records at random, with a line after each change, until it is killed."""
    machine, random = Counting(folder), Random(seed)
    machine.turns = machine.versions = 100_000 * seed

    def number() -> int:
        return random.randrange(100)

    changes: list[Callable[[], object]] = [
        lambda: machine.record("main", TurnKind.MAIN, random.choice((None, 0, 1)), None, True),
        machine.retry,
        lambda: machine.vote(number(), random.choice((-1, 0, 1)), random.random() < 0.5),
        lambda: machine.say(number(), random.choice((-1, 0, 1)), random.choice((None, "Be kind."))),
        lambda: machine.lease_work(3),
        lambda: machine.train("main", 3, random.random() < 0.5),
        lambda: machine.give_up("main", True),
        lambda: machine.serve("main", number()),
        lambda: machine.drop("main", number()),
    ]
    while True:
        random.choice(changes)()
        print(flush=True)


def change_in_forks(folder: Path) -> None:
    """For each number that is read, a fork that changes records; tells its id, and how it ended."""
    for seed in map(int, sys.stdin):
        child = os.fork()
        if not child:
            print(os.getpid(), flush=True)
            change_for_ever(folder, seed)
        _, status = os.waitpid(child, 0)
        print("ended", os.waitstatus_to_exitcode(status), flush=True)


def test_the_counts_are_exact_wherever_a_process_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    machine = Counting(folder)
    for number in range(100):
        machine.record(LINEAGES[number % 2], TurnKind.MAIN, 0, None, True)
    code = (
        "import sys, pathlib, tests.store.test_growth as t; "
        "t.change_in_forks(pathlib.Path(sys.argv[1]))"
    )
    argv = [sys.executable, "-c", code, str(folder)]
    env = {**os.environ, "NEXTSTATE_TEST_URL": machine.store.config.url}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, env=env, text=True, **pipes) as forking:
        assert forking.stdin is not None
        assert forking.stdout is not None
        for kill in range(1, 6):
            print(kill, file=forking.stdin, flush=True)
            child = int(forking.stdout.readline())
            for _ in range(40 + 17 * kill):
                assert forking.stdout.readline() == "\n"
            os.kill(child, signal.SIGKILL)
            while (told := forking.stdout.readline()) == "\n":
                pass
            assert told == f"ended {-signal.SIGKILL}\n"
            machine.counts_are_those_of_the_rows()
        forking.stdin.close()
    changed = machine.store.counts()
    assert changed["turns/main"] > 100
    assert changed["versions/retired"] > 0
    machine.store.close()


def test_the_counts_are_exact_whatever_changes() -> None:
    run_state_machine_as_test(
        Counting, settings=settings(max_examples=10, stateful_step_count=25, deadline=None)
    )


def fill(store: Store, sessions: int, *, ready: int) -> None:
    """Sessions of twenty judged turns each, of which `ready` samples wait and the rest are over."""
    with store.recording() as recording:
        for number in range(20 * sessions):
            session = f"s{number // 20}"
            one = turn(number, session=session, index=number % 20, policy_version=number % 7)
            recording.add_turn(one, b"%016d" % number, b"%016d" % number, client_session=session)
    with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as connection:
        connection.executescript(
            f"""
            INSERT INTO judgements (turn, seq, state, not_before, attempts, lease_until)
            SELECT id, seq, CASE seq % 4 WHEN 0 THEN 'done' ELSE 'pending' END,
                CASE seq % 4 WHEN 2 THEN 1e12 WHEN 3 THEN 1.0 + seq ELSE 0.0 END, 0, NULL
            FROM turns;
            INSERT INTO verdicts (turn, votes, score, judge, created_at)
            SELECT id, '[1]', seq % 3 - 1, 'rules', 1.0 FROM turns;
            INSERT INTO samples
                (turn, seq, lineage, state, policy_version, score, hinted, trained_in)
            SELECT id, seq, 'main',
                CASE WHEN seq <= {ready} THEN 'ready' WHEN seq % 9 THEN 'trained' ELSE 'held' END,
                policy_version, seq % 3 - 1, seq % 2, seq / 16 FROM turns;
            INSERT INTO feedback (turn, score, created_at, updated_at, voted_score, voted_judge)
            SELECT id, 1, 1.0, 1.0, seq % 3 - 1, 'rules' FROM turns;
            INSERT INTO versions (lineage, number, samples, state, metrics, created_at)
            SELECT 'main', seq, 1, 'retired', '{{}}', 1.0 FROM turns WHERE seq <= 40;
            INSERT INTO groups (id, lineage, task_key, split, size, state, opened_at)
            SELECT 'g' || seq, 'main', 'k', 'train', 2,
                CASE WHEN seq <= 4 THEN 'open' ELSE 'settled' END, 1.0 FROM turns;
            INSERT INTO episodes
                (id, key_hash, lineage, environment, task, task_key, group_id, split, sampling,
                metadata, state, outcome, opened_at, calls, tokens, process, settled_at)
            SELECT 'e' || seq, 'ep-' || seq, 'main', 'shell', x'00', 'k', 'g' || seq, 'train',
                '{{}}', x'00', CASE WHEN seq <= 4 THEN 'open' ELSE 'settled' END,
                1.0, 1.0, 0, 0, 0.5, CASE WHEN seq > 4 THEN 1.0 + seq END FROM turns;
            """
        )
    connection.close()
    for number in (1, 2):
        store.versions.set_serving("main", number)


BACKLOG = 160
ASKED: dict[str, Callable[[Store], object]] = {
    "counts": lambda s: s.counts(),
    "labels": lambda s: s.judging.labels(),
    "ready_samples": lambda s: s.training.ready_samples("main", True, True),
    "judged_turns": lambda s: s.versions.judged_turns("main", 12),
    "newest_versions": lambda s: s.versions.newest("main", 3),
    "chain": lambda s: s.versions.chain("main", 11, 9),
    "decisions": lambda s: s.versions.decisions("main"),
    "lease_judgements": lambda s: s.judging.lease(16, 60),
    "defer_judgement": lambda s: s.judging.defer("turn_5", 1.0, "later"),
    "judgement": lambda s: s.judging.judgement("turn_5"),
    "earlier_steps": lambda s: s.judging.earlier_steps("turn_9"),
    "settle_verdict": lambda s: judge(s, 3, 1),
    "give_feedback": lambda s: s.reviewing.give(Feedback("turn_7", -1, "Be brief."), OWNER),
    "lease_samples": lambda s: s.training.lease_samples("main", 16, "b", **BATCH),
    "leased_count": lambda s: s.training.leased_count("main"),
    "allotted": lambda s: s.training.allotted("main", 16, True, True),
    "held_back": lambda s: s.training.held_back("main", 16, True, True),
    "review": lambda s: s.reviewing.give(Feedback("turn_7", -1, "Be brief."), "key eve"),
    "reviews": lambda s: (s.reviewing.counts(), s.reviewing.waiting()),
    "retention": lambda s: s.retention.step(0, 0.5, "retention"),
    "release_samples": lambda s: s.training.release_samples("main"),
    "drop_samples": lambda s: s.training.drop_samples(["turn_1", "turn_2"], "too long"),
    "drop_stale": lambda s: s.training.drop_stale("main", lambda version: None),
    "held_samples": lambda s: s.training.held_samples("main", 8, 2),
    "used_turns": lambda s: s.versions.used_turns("main", 11),
    "newest_turn": lambda s: s.turns.newest(["s3", "s4"], ["main"]),
    "turn_ids": lambda s: s.turns.ids(9, newest_first=True),
    "serving": lambda s: s.versions.serving("main"),
    "serving_versions": lambda s: s.versions.serving_of(["main", "bob"]),
    "turn": lambda s: s.turns.get("turn_9"),
    "next_states": lambda s: s.turns.next_states("turn_9"),
    "spend": lambda s: s.judging.spend(1, 2),
    "unsettled_groups": lambda s: s.groups.unsettled(),
    "unjudged_steps": lambda s: [s.groups.unjudged(group) for group in s.groups.unsettled()],
    "begin_call": lambda s: s.episodes.begin_call("e3"),
    "episode": lambda s: s.episodes.named("e3"),
    "episode_of_key": lambda s: s.episodes.of_key("ep-3"),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """A store of 200 turns and one of twenty times as many, with the same backlog."""
    found = [Store(StoreConfig(dir=str(tmp_path_factory.mktemp("store")))) for _ in range(2)]
    for store, sessions in zip(found, (10, 200), strict=True):
        fill(store, sessions, ready=BACKLOG)
    return found


def steps(store: Store, work: Callable[[Store], object]) -> int:
    """How many steps SQLite's machine takes for what is done, to the nearest ten."""
    taken = 0

    def step() -> int:
        nonlocal taken
        taken += 10
        return 0

    def watch(connection: sqlite3.Connection, *_: object) -> None:
        connection.set_progress_handler(step, 10)

    engine = store.database.engine
    store.close()  # so that every connection is opened under our eyes
    sa.event.listen(engine, "connect", watch)
    try:
        work(store)
    finally:
        sa.event.remove(engine, "connect", watch)
        store.close()
    return taken


@pytest.mark.sqlite
@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_often_costs_the_same_in_a_large_store(
    stores: list[Store], name: str
) -> None:
    small, large = (steps(store, ASKED[name]) for store in stores)
    assert large <= 1.5 * small + 300, (small, large)


@pytest.mark.sqlite
def test_samples_that_the_learner_has_looked_at_are_not_looked_at_again(tmp_path: Path) -> None:
    found: list[int] = []
    for sessions in (10, 200):
        store = Store(StoreConfig(dir=str(tmp_path / str(sessions))))
        fill(store, sessions, ready=20 * sessions)
        assert store.training.hold_out("main", lambda session: session == "s3") == 20
        found.append(steps(store, lambda s: s.training.hold_out("main", lambda _: True)))
        store.training.begin_holding_out("main")
        assert store.training.hold_out("main", lambda _: True) == 20 * (sessions - 1)
    small, large = found
    assert large <= 1.5 * small + 300, found


@pytest.mark.sqlite
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_a_backlog_is_not_sorted_before_some_of_it_is_leased(
    tmp_path: Path, wanted: tuple[bool, bool]
) -> None:
    scored, hinted = wanted
    found: list[tuple[int, int]] = []
    for sessions in (10, 200):
        store = Store(StoreConfig(dir=str(tmp_path / str(sessions))))
        fill(store, sessions, ready=20 * sessions)

        def lease(store: Store = store) -> None:
            leased = store.training.lease_samples("main", 8, "b", scored=scored, hinted=hinted)
            assert [s.policy_version for s in leased] == [6] * 8

        work = steps(store, lambda store: store.judging.lease(8, 60))
        found.append((work, steps(store, lambda _: lease())))
    small, large = found
    assert large[0] <= 1.5 * small[0] + 300, found
    assert large[1] <= 1.5 * small[1] + 300, found


def test_work_is_given_out_oldest_first_whether_it_was_put_back_or_not(tmp_path: Path) -> None:
    now = [100.0]
    store = Store(StoreConfig(dir=str(tmp_path)), clock=lambda: now[0])
    add(store, *(turn(number) for number in range(6)))
    assert store.judging.lease(2, 10) == ["turn_0", "turn_1"]
    store.judging.defer("turn_1", 5, "busy")
    assert store.judging.lease(2, 100) == ["turn_2", "turn_3"]
    now[0] = 120.0  # turn_0's lease is over, and turn_1 may be tried again
    assert store.judging.lease(3, 100) == ["turn_0", "turn_1", "turn_4"]
    assert store.judging.lease(9, 100) == ["turn_5"]
    store.close()
