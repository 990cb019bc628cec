"""A machine that works on a shared store: it records, judges and trains one lineage until it ends.

    python -m tests.store.machine URL FOLDER NAME     # until its standard input ends

It keeps what was acknowledged to it; `check` compares that with what the store has.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nextstate.config import StoreConfig
from nextstate.errors import FencedError, TakenError, WaitError
from nextstate.records import NextState, PolicyVersion, Source, Verdict, VersionState
from nextstate.store import Store
from nextstate.store.ledger import Kind
from nextstate.store.waiting import Patience
from tests.store.rows import select
from tests.store.test_records import turn

ROLE = ("learner/main", "lineage 'main' is trained", "end it")
LEASE_S, PAUSE_S = 2.0, 0.01
DEFERRED = 0.1
"""The share of judgements that are put back at first."""


@dataclass
class Acknowledged:
    """What the store has told a machine that it has."""

    recorded: list[str] = field(default_factory=list[str])
    judged: list[str] = field(default_factory=list[str])
    trained: list[tuple[int, list[str]]] = field(default_factory=list[tuple[int, list[str]]])
    """The number of each version, with the turns of its batch."""
    roles: int = 0
    """How often it has begun to train."""
    fenced: int = 0
    """How often it was refused because another one trains."""
    longest_s: float = 0.0
    """The longest time from one acknowledged recording to the next."""


class Machine:
    """Threads with stores of their own; `off_s` is how far its clock is ahead."""

    def __init__(self, config: StoreConfig, name: str) -> None:
        self.had = Acknowledged()
        self.off_s = 0.0
        self.errors: list[BaseException] = []
        self._config, self._name = config, name
        self._stop = threading.Event()
        work = (self._record, self._judge, self._learn)
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets it end; `join` waits for that."""
        self._stop.set()

    def join(self) -> None:
        """Returns when it has ended; raises what went wrong."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        for error in self.errors:
            raise error

    def _run(self, work: Callable[[Store], None]) -> None:
        try:
            with closing(self._open()) as store:
                work(store)
        except BaseException as error:  # `join` raises it
            self.errors.append(error)

    def _open(self) -> Store:
        store = Store(self._config, patience=Patience(120.0, pause_s=0.02))
        now = store.database.now
        store.database.now = lambda: now() + self.off_s
        return store

    def _record(self, store: Store) -> None:
        """As the proxy's writer does: what may have been kept is asked for first."""
        last = time.monotonic()
        for number in range(1_000_000):
            one = turn(number, id=f"{self._name}_{number}", session=f"{self._name}_{number}")
            while True:
                if self._stop.is_set():
                    return
                try:
                    with store.recording() as recording:
                        if not recording.holds(one.id):
                            keys = random.randbytes(16), random.randbytes(16)
                            recording.add_turn(one, *keys)
                            said = NextState(one.id, Source.USER, "thanks", 0.9)
                            recording.add_next_states(one.id, True, [said])
                    break
                except WaitError:
                    time.sleep(PAUSE_S)
            self.had.recorded.append(one.id)
            now = time.monotonic()
            self.had.longest_s, last = max(self.had.longest_s, now - last), now
            time.sleep(PAUSE_S)

    def _judge(self, store: Store) -> None:
        while not self._stop.is_set():
            for name in store.judging.lease(4, LEASE_S):
                if random.random() < DEFERRED:
                    store.judging.defer(name, 0.0, "busy")
                    continue
                store.judging.spend(1, 1)
                if store.judging.settle_verdict(Verdict(name, (1,), 1, "rules", None, None)):
                    self.had.judged.append(name)
            time.sleep(PAUSE_S)

    def _learn(self, store: Store) -> None:
        """Has the role while it can, and tries again while another one has it."""
        while not self._stop.is_set():
            try:
                with store.roles.hold(*ROLE):
                    self.had.roles += 1
                    self._train(store)
            except (TakenError, WaitError):
                pass
            except FencedError:
                self.had.fenced += 1
            time.sleep(0.1)

    def _train(self, store: Store) -> None:
        store.training.release_samples("main")
        while not self._stop.is_set():
            number = 1 + max((one.number for one in store.versions.all("main")), default=0)
            batch = f"{self._name}-{number}-{random.getrandbits(64)}"
            leased = store.training.lease_samples("main", 4, batch, scored=True, hinted=True)
            if leased:
                state, metrics = VersionState.CANDIDATE, {"loss": random.random()}
                made = PolicyVersion(
                    "main", number, 0, "/a", "ff", len(leased), state, metrics=metrics
                )
                store.versions.add(made, batch)
                self.had.trained.append((number, [sample.turn for sample in leased]))
            time.sleep(PAUSE_S)


def check(config: StoreConfig, *machines: Acknowledged) -> None:
    """Nothing that was acknowledged is lost, and nothing is there twice."""
    with closing(Store(config)) as store:
        ids = store.turns.ids()
        for one in machines:
            recorded = {*one.recorded}
            assert [name for name in ids if name in recorded] == one.recorded
        most = sum(len(one.recorded) + 1 for one in machines)  # the last may have had no answer
        assert len(ids) <= most
        followed = [row.turn for row in select(store, "SELECT turn FROM next_states")]
        assert sorted(followed) == sorted(ids)
        judged = Counter(name for one in machines for name in one.judged)
        assert max(judged.values()) == 1
        assert all(store.judging.verdict(name) is not None for name in judged)
        batches = {
            version.number: {name for name, _ in store.versions.used_turns("main", version.number)}
            for version in store.versions.all("main")
        }
        entries = [one.content for one in store.ledger.newest(None) if one.kind == Kind.VERSION]
        used = Counter(turn for content in entries for turn, *_ in content["turns"])
        assert max(used.values()) == 1
        for one in machines:
            for number, turns in one.trained:
                assert batches[number] == {*turns}
        assert store.verifying.problems(lambda *_: None) == []
        assert store.ledger.problems() == []


def main(url: str, folder: str, name: str) -> None:
    """Prints what was acknowledged as a line of JSON."""
    config = StoreConfig(str(Path(folder)), url)
    machine = Machine(config, name)
    for _ in sys.stdin:
        print(json.dumps(asdict(machine.had)), flush=True)
    machine.stop()
    machine.join()
    print(json.dumps(asdict(machine.had)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
