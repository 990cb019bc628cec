"""Retention: the oldest turns go by themselves, what is of use stays, and no byte is left."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from learner import watch
from nextstate.app.retention import Keep, read_keep, sweep, write_keep
from nextstate.config import StoreConfig
from nextstate.episodes import Episode, EpisodeStatus
from nextstate.errors import ConfigError, StoreError
from nextstate.records import (
    Feedback,
    Json,
    NextState,
    PolicyVersion,
    Source,
    Timings,
    Turn,
    VersionState,
)
from nextstate.store import Store, retention
from nextstate.store.forgetting import Wanted
from nextstate.store.retention import AT_ONCE, LOOKED_AT
from tests.encrypted import encrypt
from tests.store.test_growth import steps
from tests.store.test_records import KEY, judge, turn
from tests.store.test_texts import assert_uses_are_counted

DAY = 86_400.0
NOW = 1_000 * DAY


@pytest.fixture
def dated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store at a fixed time that keeps none for the watch."""
    monkeypatch.setattr(retention, "KEPT_JUDGED", 0)
    monkeypatch.setattr(retention, "KEPT_HELD", 0)
    monkeypatch.setattr("time.time", lambda: NOW)
    store = Store(StoreConfig(dir=str(tmp_path / "state")), clock=lambda: NOW)
    yield store
    store.close()


def secret(number: int) -> str:
    return f"word{number:05d}said"


def old(number: int, days: float, session: str | None = None, **changes: object) -> Turn:
    """A turn of so many days ago, with a text that no other one has."""
    said: list[Json] = [{"role": "user", "content": secret(number)}]
    values: dict[str, object] = {
        "session": session or f"s{number}",
        "timings": Timings(NOW - days * DAY, 0.1, 0.2),
        "request": {"messages": said},
        "reply": {"role": "assistant", "content": f"reply {secret(number)}"},
    }
    return turn(number, **(values | changes))


def record(store: Store, *turns: Turn, judged: bool = True) -> None:
    """Adds turns; what followed them is judged as good and trained, or settled without a use."""
    with store.recording() as recording:
        for one in turns:
            recording.add_turn(one, f"{one.id:16.16}".encode(), KEY)
            state = NextState(one.id, Source.USER, f"thanks {secret(one.index)}", 0.9)
            recording.add_next_states(one.id, judged, [state])
    for one in turns if judged else ():
        judge(store, one.index, 1)


def train(store: Store) -> int:
    """Trains all that waits; returns how many."""
    count = 0
    while found := store.training.lease_samples("main", 99, "b", scored=True, hinted=True):
        number = len(store.versions.all("main")) + 1
        store.versions.add(
            PolicyVersion("main", number, 0, "/a", "ff", 1, VersionState.CANDIDATE), "b"
        )
        count += len(found)
    return count


def left(store: Store) -> set[str]:
    return set(store.turns.ids())


def assert_whole(store: Store) -> None:
    assert store.verifying.problems(lambda read, total: None) == []
    assert store.ledger.problems() == []
    assert_uses_are_counted(store)


def test_turns_that_are_too_old_go_and_versions_that_learned_from_them_stay(dated: Store) -> None:
    record(dated, *(old(n, 100 - n) for n in range(60)))
    train(dated)
    before = dated.versions.all("main")
    done = sweep(dated, Keep(days=70.5))
    assert done.turns == 30
    assert left(dated) == {f"turn_{n}" for n in range(30, 60)}
    assert dated.versions.all("main") == before
    assert_whole(dated)
    told = [entry for entry in dated.ledger.newest(9) if entry.kind == "forgotten"]
    assert {turn for entry in told for turn in entry.content["turns"]} == {
        f"turn_{n}" for n in range(30)
    }
    assert {entry.content["by"] for entry in told} == {"retention: older than 70.5 days"}
    assert "said" not in str([entry.content for entry in told])


@pytest.mark.sqlite
def test_no_byte_of_what_went_is_left_without_writing_the_database_anew(dated: Store) -> None:
    big = "0123456789 " * 700
    record(
        dated,
        *(
            old(n, 100 - n, request={"messages": [{"role": "user", "content": big + secret(n)}]})
            for n in range(60)
        ),
    )
    train(dated)
    dated.database.checkpoint()
    stored = {
        n: bytes(found)
        for n in range(60)
        if (found := _stored(dated, f"thanks {secret(n)}".encode())) is not None
    }
    assert sweep(dated, Keep(days=70.5)).turns == 30
    dated.close()
    for file in dated.dir.glob("nextstate.sqlite3*"):
        data = file.read_bytes()
        for n in range(30):
            assert secret(n).encode() not in data
            assert stored[n] not in data, (file.name, n)
    assert any(stored[50] in f.read_bytes() for f in dated.dir.glob("nextstate.sqlite3*"))


def _stored(store: Store, text: bytes) -> bytes | None:
    """A text as the file holds it."""
    from nextstate.store.texts import content_hash

    with closing(sqlite3.connect(store.dir / "nextstate.sqlite3")) as connection:
        query = "SELECT stored FROM texts WHERE hash = ?"
        row = connection.execute(query, (content_hash(text),)).fetchone()
    return None if row is None else row[0]


def test_what_others_use_stays(dated: Store) -> None:
    """The later turn of the conversation sends the old words again."""
    shared: list[Json] = [{"role": "user", "content": "a shared beginning"}]
    first = old(0, 100, "s", request={"messages": shared})
    record(dated, first)
    more: list[Json] = [*shared, dict(first.reply), {"role": "user", "content": "go on"}]
    record(dated, old(1, 10, "s", request={"messages": more}, parent="turn_0"))
    record(dated, old(2, 100, request={"messages": [{"role": "user", "content": "x" * 9000}]}))
    record(dated, old(3, 10, request={"messages": [{"role": "user", "content": "x" * 9000 + "y"}]}))
    train(dated)
    assert sweep(dated, Keep(days=50)).turns == 2
    found = dated.turns.get("turn_1")
    assert found is not None
    assert (found.request["messages"], found.parent) == (more, None)
    based = dated.turns.get("turn_3")
    assert based is not None
    assert based.request["messages"][0]["content"] == "x" * 9000 + "y"
    assert_whole(dated)


@pytest.mark.sqlite
def test_a_text_that_was_compressed_against_one_that_went_is_sealed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "KEPT_JUDGED", 0)
    monkeypatch.setattr(retention, "KEPT_HELD", 0)
    monkeypatch.setattr("time.time", lambda: NOW)
    config = StoreConfig(dir=str(tmp_path / "state"))
    encrypt(config, monkeypatch)
    store = Store(config, clock=lambda: NOW)
    for number, days, text in ((0, 100, "x" * 9000), (1, 10, "x" * 9000 + "y")):
        record(store, old(number, days, request={"messages": [{"role": "user", "content": text}]}))
    train(store)
    assert sweep(store, Keep(days=50)).turns == 1
    left_over = store.turns.get("turn_1")
    assert left_over is not None
    assert left_over.request["messages"][0]["content"] == "x" * 9000 + "y"
    assert_whole(store)
    store.close()


def test_what_is_of_use_stays(dated: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record(dated, old(0, 100), old(1, 99))
    train(dated)
    record(dated, old(2, 98))  # waits to train
    record(dated, old(3, 97), judged=False)
    record(dated, old(4, 96, "long"), old(5, 0.5, "long"))  # a conversation that goes on
    train_all = dated.training.lease_samples("main", 1, "now", scored=True, hinted=True)
    assert [sample.turn for sample in train_all] == ["turn_2"]  # an update uses it
    dated.reviewing.give(Feedback("turn_1", -1), "")
    dated.reviewing.give(Feedback("turn_1", 1), "key eve")  # somebody must look at it
    sweep(dated, Keep(days=30))
    assert left(dated) == {"turn_1", "turn_2", "turn_4", "turn_5"}
    dated.training.release_samples("main")
    train(dated)
    sweep(dated, Keep(days=30))
    assert left(dated) == {"turn_1", "turn_4", "turn_5"}
    assert_whole(dated)


def test_the_newest_judged_turns_stay_for_the_watch_and_the_gate(
    dated: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "KEPT_JUDGED", 5)
    record(dated, *(old(n, 100) for n in range(20)))
    train(dated)
    looked_at = dated.versions.judged_turns("main", 5)
    assert sweep(dated, Keep(days=30)).turns == 15
    assert dated.versions.judged_turns("main", 5) == looked_at
    assert sweep(dated, Keep(size=1 << 20)).turns == 0


def test_retention_keeps_as_many_judged_turns_as_the_watch_looks_at() -> None:
    assert retention.KEPT_JUDGED == watch.TURNS


def test_what_the_watch_looks_at_is_what_stays_whatever_is_judged_beside_it(
    dated: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of episodes are judged too, and the watch leaves them out."""
    monkeypatch.setattr(retention, "KEPT_JUDGED", 5)
    record(dated, *(old(n, 100) for n in range(10)))
    train(dated)
    record(dated, *(old(n, 100, "e", episode="e", step=n) for n in range(10, 20)))
    looked_at = dated.versions.judged_turns("main", 5)
    assert len(looked_at) == 5
    assert sweep(dated, Keep(days=30)).turns == 5
    assert dated.versions.judged_turns("main", 5) == looked_at


def test_what_waits_for_its_verdict_or_for_its_episodes_end_stays(dated: Store) -> None:
    dated.episodes.open([Episode(name, "main", "e", name) for name in ("e1", "e2")], None)
    record(dated, old(2, 100, "e1", episode="e1", step=0), judged=False)
    record(dated, old(3, 100, "e2", episode="e2", step=0), judged=False)
    dated.episodes.close("e2", EpisodeStatus.ABORTED, None, None)
    for one in (old(0, 6), old(1, 8)):
        with dated.recording() as recording:
            recording.add_turn(one, f"{one.id:16.16}".encode(), KEY)
            recording.add_next_states(one.id, True, [NextState(one.id, Source.USER, "so", 0.9)])
    sweep(dated, Keep(days=5))
    assert left(dated) == {"turn_0", "turn_2"}, "a week for a verdict, and any time for an episode"
    assert_whole(dated)


def test_the_newest_held_out_turns_stay_for_the_gate(
    dated: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "KEPT_HELD", 3)
    record(dated, *(old(n, 100) for n in range(9)))
    dated.training.hold_out("main", lambda _: True)
    assert sweep(dated, Keep(days=30)).turns == 6
    assert left(dated) == {"turn_6", "turn_7", "turn_8"}


def test_what_a_middle_turn_repeated_stays_with_the_one_that_continues_it(dated: Store) -> None:
    """The first one counted it for both of them."""
    messages: list[Json] = [{"role": "user", "content": "a shared beginning"}]
    for number, days in ((0, 100), (1, 99), (2, 10)):
        parent = f"turn_{number - 1}" if number else None
        one = old(number, days, "s", request={"messages": [*messages]}, parent=parent)
        record(dated, one, judged=number == 0)  # the first one waits to train
        messages += [dict(one.reply), {"role": "user", "content": f"go on {number}"}]
    assert sweep(dated, Keep(days=50)).turns == 1
    assert left(dated) == {"turn_0", "turn_2"}
    assert_whole(dated)
    dated.forgetting.forget(Wanted(turns=["turn_0"]))
    last = dated.turns.get("turn_2")
    assert last is not None
    assert last.request["messages"] == messages[:5]
    assert_whole(dated)


def test_an_old_episode_that_never_had_a_turn_goes(dated: Store) -> None:
    """Whoever opened it said what its task is."""
    now = [NOW - 100 * DAY]
    dated.database.now = lambda: now[0]  # pyright: ignore[reportAttributeAccessIssue]
    opened = [Episode(name, "main", "e", f"the task of {name}") for name in ("old", "open", "new")]
    dated.episodes.open(opened[:2], None)
    dated.episodes.close("old", EpisodeStatus.ABORTED, None, None)
    now[0] = NOW
    dated.episodes.open(opened[2:], None)
    dated.episodes.close("new", EpisodeStatus.ABORTED, None, None)
    sweep(dated, Keep(days=30))
    found = [dated.episodes.get(name) is not None for name in ("old", "open", "new")]
    assert found == [False, True, True]
    (told,) = dated.ledger.newest(1)
    assert (told.content["episodes"], told.content["turns"]) == (1, [])
    assert_whole(dated)


@pytest.mark.sqlite
def test_the_oldest_go_until_the_store_has_its_size(dated: Store) -> None:
    import random

    noise = random.Random(0)
    record(
        dated,
        *(
            old(
                n,
                10,
                request={"messages": [{"role": "user", "content": noise.randbytes(20_000).hex()}]},
            )
            for n in range(150)
        ),
    )
    train(dated)
    dated.compact()
    full = sum(dated.retention.used_bytes())
    keep = Keep(size=full // 2)
    done = sweep(dated, keep)
    assert 50 < done.turns < 120
    pages, _ = dated.retention.used_bytes()
    assert pages <= full // 2
    assert not done.too_large
    assert left(dated) == {f"turn_{n}" for n in range(done.turns, 150)}
    assert sweep(dated, keep).turns == 0
    file = dated.dir / "nextstate.sqlite3"
    size = file.stat().st_size
    texts = [noise.randbytes(9000).hex() for _ in range(40)]
    again = (
        old(200 + n, 5, request={"messages": [{"role": "user", "content": text}]})
        for n, text in enumerate(texts)
    )
    record(dated, *again)  # what became free is used again
    assert file.stat().st_size <= size
    assert_whole(dated)


@pytest.mark.sqlite
def test_a_kill_in_the_middle_loses_nothing_and_leaves_nothing_half(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    store = Store(StoreConfig(dir=str(folder)), clock=lambda: NOW)
    for start in range(0, 200, 100):
        record(store, *(old(n, 100) for n in range(start, start + 100)), judged=False)
    code = (
        "import sys; from nextstate.store import Store; from nextstate.config import StoreConfig;"
        "s = Store(StoreConfig(dir=sys.argv[1]), clock=lambda: float(sys.argv[2]));"
        "at = 0\n"
        "while at is not None:\n"
        "    at = s.retention.step(at, float(sys.argv[2]), 'retention').position\n"
        "    print(at, flush=True)"
    )
    for kill in (3, 11):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(NOW)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            for _ in range(kill):
                assert child.stdout.readline()
            child.kill()
        assert child.returncode == -signal.SIGKILL
        assert_whole(store)
        assert left(store)
    position: int | None = 0
    while position is not None:
        position = store.retention.step(position, NOW, "retention").position
    assert left(store) == set()
    assert_whole(store)
    store.close()


@pytest.mark.parametrize("forgotten", ["turn_0", "turn_1", "turn_2"])
def test_what_a_person_forgets_while_a_step_looks_is_no_harm(
    dated: Store, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    first = old(0, 100, session="s")
    record(dated, first, old(1, 100, session="s", parent="turn_0"), old(2, 100), judged=False)
    write, other = dated.database.write, Store(dated.config, clock=lambda: NOW)
    told: list[str] = []

    def forget_first() -> object:
        monkeypatch.setattr(dated.database, "write", write)
        told.extend(other.forgetting.forget(Wanted(turns=[forgotten])).turns)
        return write()

    monkeypatch.setattr(dated.database, "write", forget_first)
    told += dated.retention.step(0, NOW, "retention").turns
    other.close()
    assert sorted(told) == ["turn_0", "turn_1", "turn_2"]
    assert left(dated) == set()
    entries = [entry.content["turns"] for entry in dated.ledger.newest(None)]
    assert sorted(name for names in entries for name in names) == sorted(told), "each once"
    assert_whole(dated)


@pytest.mark.sqlite
def test_a_step_costs_the_same_in_a_large_store(tmp_path: Path) -> None:
    found: list[int] = []
    for count in (200, 2000):
        store = Store(StoreConfig(dir=str(tmp_path / str(count))), clock=lambda: NOW)
        for start in range(0, count, 100):
            record(store, *(old(n, 100) for n in range(start, start + 100)), judged=False)
        found.append(steps(store, lambda s: s.retention.step(0, NOW, "retention")))
        store.close()
    small, large = found
    assert large <= 1.5 * small + 300, found


def test_a_step_is_short(dated: Store) -> None:
    record(dated, *(old(n, 100) for n in range(200)), judged=False)
    step = dated.retention.step(0, NOW, "retention")
    assert (len(step.turns), step.position) == (AT_ONCE, AT_ONCE)
    assert AT_ONCE <= LOOKED_AT


def test_the_setting_is_read_back_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    assert str(read_keep(tmp_path)) == "everything"
    write_keep(tmp_path, Keep(90, 20 << 30))
    assert read_keep(tmp_path) == Keep(90, 20 << 30)
    assert (tmp_path / "retention.json").stat().st_mode & 0o077 == 0
    (tmp_path / "retention.json").write_text("[]")
    with pytest.raises(StoreError, match="nextstate retain"):
        read_keep(tmp_path)


def test_a_size_that_means_nothing_is_refused() -> None:
    from nextstate.app.retention import read_size

    for text in ("", "5", "1KB", "99MB", "-3GB", "many GB", "nanGB", "infGB"):
        with pytest.raises(ConfigError, match="20GB"):
            read_size(text)


def test_nothing_is_deleted_without_a_setting(dated: Store) -> None:
    record(dated, old(0, 900), judged=False)
    assert sweep(dated, Keep()).turns == 0
    assert left(dated) == {"turn_0"}
    with dated.database.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM ledger")).scalar() == 0
