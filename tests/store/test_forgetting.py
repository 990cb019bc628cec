"""Forgetting: no record and no byte of the files holds what a person wants gone; the rest stays."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.episodes import Episode, EpisodeStatus, Reward, RewardKind
from nextstate.errors import WaitError
from nextstate.records import (
    Feedback,
    Json,
    NextState,
    PolicyVersion,
    SampleState,
    Source,
    Timings,
    Turn,
    Verdict,
    VersionState,
)
from nextstate.store import Store, texts
from nextstate.store.forgetting import Plan, Wanted
from nextstate.store.shares import OWNER
from nextstate.store.waiting import Patience
from tests.store.rows import select
from tests.store.test_records import turn
from tests.store.test_texts import assert_uses_are_counted

LONG = " ".join(f"rule {n * n % 9973}" for n in range(2000))
"""A text that is much like others is compressed against one of them."""


def message(role: str, text: str) -> Json:
    return {"role": role, "content": text}


def said(number: int, parent: Turn | None, **changes: Any) -> Turn:
    """A turn that asks with a word of its own and is answered with another one."""
    before = [] if parent is None else [*parent.request["messages"], parent.reply]
    ids = tuple(range(1000 * number, 1000 * number + 300))
    return turn(
        number,
        request={
            "messages": [*before, message("user", f"ask<{number}>")],
            "tools": [{"name": "shared"}],
        },
        reply=message("assistant", f"say<{number}>"),
        prompt_ids=(*(() if parent is None else parent.prompt_ids or ()), *ids),
        completion_ids=(7, number),
        parent=None if parent is None else parent.id,
        timings=Timings(float(number), 0.1, 0.2),
        **{"session": f"s{number}" if parent is None else parent.session} | changes,
    )


def record(store: Store, *turns: Turn) -> None:
    """Records turns; what the first one asks that continues a turn is the next state of that."""
    for one in turns:
        followed = one.parent is not None and bool(store.turns.next_states(one.parent))
        with store.recording() as recording:
            recording.add_turn(one, one.id.encode().ljust(16), one.id.encode().ljust(16))
            if one.parent is not None and not followed:
                text = one.request["messages"][-1]["content"]
                state = NextState(one.parent, Source.USER, text, 0.9)
                recording.add_next_states(one.parent, True, [state])


def judge(store: Store, parent: str, child: Turn, score: int = -1) -> None:
    """A judge's verdict, whose hint quotes what followed."""
    hint = f"They said {child.request['messages'][-1]['content']}."
    store.judging.settle_verdict(
        Verdict(parent, (score,), score, "rules", hint, (9, 8, *range(300)))
    )


def train(store: Store, number: int, parent: int, limit: int = 1) -> list[str]:
    """Makes a version from a batch and puts it into service; returns the turns that it used."""
    store.training.hold_out("main", lambda _: False)
    leased = store.training.lease_samples("main", limit, f"b{number}", scored=True, hinted=True)
    version = PolicyVersion("main", number, parent, f"/v{number}", "ff", 1, VersionState.CANDIDATE)
    store.versions.add(version, f"b{number}")
    assert store.versions.serve_candidate(version)
    return [sample.turn for sample in leased]


def every_text(store: Store) -> bytes:
    with store.database.read() as connection:
        keys = connection.exec_driver_sql("SELECT hash FROM texts").scalars().all()
        found = b"\n".join(texts.get(connection, keys).values())
        return found + repr(connection.exec_driver_sql("SELECT * FROM turns").all()).encode()


def check(store: Store) -> None:
    """Uses and counts are those of what is stored, and every reference leads somewhere."""
    assert_uses_are_counted(store)
    assert not store.database.damage()
    query = "SELECT count(*) FROM turns WHERE replaced_by IS NULL AND kind = 'main'"
    ((main,),) = select(store, query)
    assert store.counts().get("turns/main", 0) == main


Moves = list[tuple[int, int, int, bool]]


DRAWN: dict[str, st.SearchStrategy[Any]] = {
    "moves": st.lists(
        st.tuples(st.integers(-4, 9), st.integers(-1, 1), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=10,
    ),
    "chosen": st.sets(st.integers(0, 9), min_size=1, max_size=3),
    "before": st.none() | st.integers(0, 9),
}


@pytest.mark.sqlite
@settings(max_examples=40)
@given(**DRAWN)
def test_what_is_forgotten_is_in_no_record_and_the_rest_is_whole(
    tmp_path_factory: pytest.TempPathFactory, moves: Moves, chosen: set[int], before: int | None
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path_factory.mktemp("store"))))
    turns: list[Turn] = []
    for number, (place, score, remarks, retried) in enumerate(moves):
        parent = turns[place] if 0 <= place < len(turns) else None
        one = said(number, parent)
        turns.append(one)
        record(store, one)
        if parent is not None:
            judge(store, parent.id, one, score)
        if remarks:
            comment = f"remark<{number}>" if remarks > 1 else None
            store.reviewing.give(Feedback(one.id, score, f"hint<{number}>", comment), OWNER)
        if retried and parent is not None:
            with store.recording() as recording:
                recording.sessions.set_place(parent.id, parent.id.encode().ljust(16))
    names = {f"turn_{number}" for number in chosen}
    wanted = Wanted(turns=names) if before is None else Wanted(before=float(before))
    plan = store.forgetting.plan(wanted)
    assert store.forgetting.forget(wanted) == plan
    check(store)
    left = {one.id: one for one in turns if one.id not in plan.turns}
    for number, one in enumerate(turns):
        if one.id in left:
            assert store.turns.get(one.id) == replace(one, parent=_kept_parent(one, left))
        elif before is None:
            for word in (
                f"ask<{number}>",
                f"say<{number}>",
                f"hint<{number}>",
                f"remark<{number}>",
            ):
                assert word.encode() not in every_text(store)
    if before is None:
        assert {one.id for one in turns if one.parent in plan.turns} <= set(plan.turns)
        assert names & {one.id for one in turns} <= set(plan.turns)
    else:
        assert set(plan.turns) == {one.id for one in turns if one.timings.started_at < before}
    store.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@settings(max_examples=8)
@given(**DRAWN)
def test_what_is_forgotten_on_a_server_is_in_no_record_either(
    tmp_path_factory: pytest.TempPathFactory, **drawn: Any
) -> None:
    """Fewer examples: each makes a database, and the statements are the same."""
    test_what_is_forgotten_is_in_no_record_and_the_rest_is_whole.hypothesis.inner_test(
        tmp_path_factory, **drawn
    )


def _kept_parent(one: Turn, left: dict[str, Turn]) -> str | None:
    return one.parent if one.parent in left else None


@pytest.mark.sqlite
def test_nothing_of_it_is_left_in_the_files(store: Store) -> None:
    first = said(0, None)
    secret = said(1, first)
    secret = replace(
        secret,
        reply=message("assistant", "my secret " * 30),
        completion_ids=tuple(range(5000, 5400)),
        behaviour_logprobs=(-0.25,) * 400,
    )
    other = said(2, None)
    record(store, first, secret, other)
    judge(store, first.id, secret)
    store.reviewing.give(Feedback(secret.id, 1, None, "a private remark of some length"), OWNER)
    with store.database.read() as connection:
        before = {
            bytes(row[0])
            for query in (
                "SELECT stored FROM texts",
                "SELECT completion_ids FROM turns WHERE id = 'turn_1'",
            )
            for row in connection.exec_driver_sql(query)
        }
    store.forgetting.forget(Wanted(sessions=["s0"]))
    with store.database.read() as connection:
        kept = {bytes(row[0]) for row in connection.exec_driver_sql("SELECT stored FROM texts")}
    gone = {stored for stored in before - kept if len(stored) > 24}
    assert len(gone) > 4
    store.compact()
    files = [path.read_bytes() for path in store.dir.iterdir() if path.is_file()]
    assert len(files) > 1
    for content in files:
        assert not any(stored in content for stored in gone)
        # The ledger names what was forgotten by its id alone.
        assert content.count(b"turn_1") == content.count(b'{"turns":["turn_0","turn_1"]')
    assert store.turns.get(other.id) == other


@pytest.mark.sqlite
def test_what_was_deleted_before_and_not_overwritten_is_gone_too(store: Store) -> None:
    """By an earlier program of ours, or by a person's own tool: SQLite's default is to leave it."""
    file = store.dir / "nextstate.sqlite3"
    words = b"words that nobody overwrote"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("PRAGMA secure_delete=OFF")
        connection.execute("CREATE TABLE old (text)")
        connection.execute("INSERT INTO old VALUES (?)", (words * 300,))
        connection.execute("DROP TABLE old")
    store.compact()
    assert not any(words in path.read_bytes() for path in store.dir.glob("nextstate.sqlite3*"))


def test_a_text_that_others_are_compressed_against_goes_and_they_stay(store: Store) -> None:
    turns = [
        turn(n, session=f"s{n}", request={"messages": [message("user", f"{LONG} {n}")]})
        for n in range(3)
    ]
    record(store, *turns)
    with store.database.read() as connection:
        bases = "SELECT count(*) FROM texts WHERE base IS NOT NULL"
        assert connection.exec_driver_sql(bases).scalar() == 2
    store.forgetting.forget(Wanted(turns=["turn_0"]))
    check(store)
    assert f"{LONG} 0".encode() not in every_text(store)
    assert [store.turns.get(one.id) for one in turns] == [None, *turns[1:]]


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("ASK<0>", {"turn_0", "turn_1"}),
        ("say<1>", {"turn_1"}),
        ('a "quoted"\nline', {"turn_3"}),
        ("Straße", {"turn_3"}),
        ("only in a remark", {"turn_2"}),
        ("the client's name", {"turn_4"}),
        ("never said", set[str]()),
    ],
)
def test_a_text_is_found_wherever_it_was_said(store: Store, text: str, taken: set[str]) -> None:
    first = said(0, None)
    quoted = turn(
        3, session="q", request={"messages": [message("user", 'STRASSE: a "quoted"\nline')]}
    )
    record(store, first, said(1, first), said(2, None), quoted)
    with store.recording() as recording:
        named = said(4, None)
        recording.add_turn(named, b"4" * 16, b"4" * 16, client_session="the client's name")
    store.reviewing.give(Feedback("turn_2", 1, None, "It is only in a remark."), OWNER)
    assert set(store.forgetting.plan(Wanted(matching=text)).turns) == taken


@pytest.mark.parametrize(
    "text", ["Müller", "MÜLLER", "Mu\u0308ller", '"name": "Mül', "one\ntwo", "C:\\new\\file", "🙂"]
)
def test_a_text_is_found_however_a_client_escaped_it(store: Store, text: str) -> None:
    """The arguments of a call are JSON within a message's JSON."""
    arguments = json.dumps({"name": "Müller", "file": "C:\\new\\file", "a": "one\ntwo 🙂"})
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    reply = {"role": "assistant", "content": None, "tool_calls": [called]}
    record(store, turn(0, reply=reply), said(1, None))
    assert store.forgetting.plan(Wanted(matching=text)).turns == ("turn_0",)


@pytest.mark.parametrize("text", ["bob", "network", "temp", "C:\\Users\\bob", "\\\\server\\net"])
def test_a_text_is_found_behind_a_backslash_that_is_no_escape(store: Store, text: str) -> None:
    """`\\b`, `\\n` and `\\t` also begin names of folders."""
    words = "see C:\\Users\\bob\\notes, C:\\temp and \\\\server\\network"
    told = turn(0, request={"messages": [message("user", words)]})
    record(store, told, said(1, None))
    assert store.forgetting.plan(Wanted(matching=text)).turns == ("turn_0",)


def test_a_hint_that_quotes_it_goes_with_it(store: Store) -> None:
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    assert store.forgetting.plan(Wanted(turns=["turn_1"])).touched == ("turn_0",)
    store.forgetting.forget(Wanted(turns=["turn_1"]))
    assert store.turns.next_states("turn_0") == ()
    assert store.judging.verdict("turn_0") is None
    assert store.counts().get("samples/ready", 0) == 0
    record(store, said(5, first))  # it can be continued, judged and trained again
    judge(store, "turn_0", said(5, first))
    assert store.counts()["samples/ready"] == 1
    check(store)


def test_what_a_person_said_of_an_earlier_turn_stays(store: Store) -> None:
    first = said(0, None)
    record(store, first, said(1, first))
    store.reviewing.give(Feedback("turn_0", -1, "Be brief."), OWNER)
    store.forgetting.forget(Wanted(turns=["turn_1"]))
    verdict = store.judging.verdict("turn_0")
    assert verdict is not None
    assert (verdict.judge, verdict.hint) == ("feedback", "Be brief.")
    check(store)


def test_versions_that_trained_on_it_are_withdrawn_with_those_after_them(store: Store) -> None:
    for number in range(4):
        one = said(2 * number, None)
        after = said(2 * number + 1, one)
        record(store, one, after)
        judge(store, one.id, after)
    used = {number: train(store, number, number - 1) for number in (1, 2, 3)}
    wanted = Wanted(turns=used[2])
    plan = store.forgetting.forget(wanted)
    assert plan.versions == {"main": (2, 3)}
    assert store.turns.get(used[2][0]) is not None  # nothing goes before the versions do
    assert not store.forgetting.withdraw(plan)  # version 3 serves
    assert store.versions.set_serving("main", 1)
    assert store.forgetting.withdraw(plan)
    done = store.forgetting.forget(wanted)
    assert done == replace(plan, versions={})
    states = {v.number: (v.state, v.path is None) for v in store.versions.all("main")}
    assert states == {
        1: (VersionState.SERVING, False),
        2: (VersionState.REJECTED, True),
        3: (VersionState.REJECTED, True),
    }
    ready = store.training.lease_samples("main", 9, "again", scored=True, hinted=True)
    assert {sample.turn for sample in ready} == {"turn_0", "turn_2", "turn_4", "turn_6"} - {
        *used[1],
        *used[2],
    }
    check(store)


@pytest.mark.parametrize(
    "wanted",
    [Wanted(matching="my LOCKER opens"), Wanted(sessions=["e1"]), Wanted(before=1e12)],
    ids=["matching", "session", "before"],
)
def test_an_episode_that_never_had_a_turn_is_found_and_goes(store: Store, wanted: Wanted) -> None:
    store.episodes.open([Episode("e1", "main", "terminal", "my locker opens with 4711")], None)
    plan = store.forgetting.forget(wanted)
    assert (plan.turns, plan.episodes) == ((), ("e1",))
    assert store.episodes.get("e1") is None
    assert b"locker" not in every_text(store)
    (told,) = store.ledger.newest(1)
    assert told.content["episodes"] == 1
    assert store.ledger.problems() == []
    check(store)


@pytest.mark.parametrize("text", ["of-anna", "said-by-anna", "anna-liked-it", "e-anna"])
def test_an_episode_is_found_by_each_name_that_its_environment_chose(
    store: Store, text: str
) -> None:
    others = Episode("e2", "main", "terminal", "task")
    store.episodes.open([Episode("e-anna", "main", "terminal", "task", group="of-anna")], None)
    store.episodes.open([others], None)
    store.episodes.reward(
        [Reward("e-anna", "anna-liked-it", RewardKind.OUTCOME, 1.0, None, "said-by-anna")]
    )
    plan = store.forgetting.forget(Wanted(matching=text.upper()))
    assert plan.episodes == ("e-anna",)
    for table in ("episodes", "groups", "rewards", "ledger"):
        assert "anna" not in repr(select(store, f"SELECT * FROM {table}"))
    check(store)


def test_a_version_that_is_made_from_a_withdrawn_one_never_serves(store: Store) -> None:
    for number in (0, 2):
        one = said(number, None)
        after = said(number + 1, one)
        record(store, one, after)
        judge(store, one.id, after)
    (used,) = train(store, 1, 0)
    (other,) = store.training.lease_samples("main", 1, "late", scored=True, hinted=True)
    plan = store.forgetting.plan(Wanted(turns=[used]))
    assert store.versions.set_serving("main", 0)
    assert store.forgetting.withdraw(plan)
    store.forgetting.forget(Wanted(turns=[used]))
    late = PolicyVersion("main", 2, 1, "/v2", "ff", 1, VersionState.CANDIDATE)
    assert store.versions.add(late, "late", decided=0) is VersionState.REJECTED
    kept = store.versions.get("main", 2)
    assert kept is not None
    assert kept.path is None
    (again,) = store.training.lease_samples("main", 9, "again", scored=True, hinted=True)
    assert again.turn == other.turn
    check(store)


def test_a_version_that_trained_on_the_turn_before_is_withdrawn_too(store: Store) -> None:
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)  # its hint quotes the second turn
    assert train(store, 1, 0) == ["turn_0"]
    assert store.forgetting.plan(Wanted(turns=["turn_1"])).versions == {"main": (1,)}


def test_nothing_is_forgotten_while_an_update_uses_it(store: Store) -> None:
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    store.training.hold_out("main", lambda _: False)
    store.training.lease_samples("main", 1, "b", scored=True, hinted=True)
    plan = store.forgetting.forget(Wanted(turns=["turn_0"]))
    assert plan.in_training == 1
    assert store.turns.get("turn_0") is not None
    store.training.release_samples("main")
    assert store.forgetting.forget(Wanted(turns=["turn_0"])).in_training == 0
    assert store.turns.get("turn_0") is None


def test_an_episode_goes_whole(store: Store) -> None:
    asked = Episode("e1", "main", "terminal", "a private goal", group="g")
    store.episodes.open([asked], 1)
    steps = [said(0, None, session="e1", episode="e1", step=0)]
    steps.append(said(1, None, session="e1", episode="e1", step=1))
    record(store, *steps)
    store.episodes.reward([Reward("e1", "tests", RewardKind.OUTCOME, 1.0, None, None)])
    store.episodes.close("e1", EpisodeStatus.DONE, 1.0, "the tests pass")
    plan = store.forgetting.forget(Wanted(turns=["turn_0"]))
    assert (plan.turns, plan.episodes) == (("turn_0", "turn_1"), ("e1",))
    assert store.episodes.get("e1") is None
    assert b"a private goal" not in every_text(store)
    assert not any(store.counts().get(area, 0) for area in ("groups/open", "rewards/outcome"))
    check(store)


def test_old_turns_go_and_later_ones_of_the_same_conversation_stay(store: Store) -> None:
    first = said(0, None)
    second = said(1, first)
    third = said(2, second)
    record(store, first, second, third)
    assert store.forgetting.forget(Wanted(before=1.0)).turns == ("turn_0",)
    assert store.turns.get("turn_1") == replace(second, parent=None)
    assert store.turns.get("turn_2") == third
    check(store)


def test_the_database_is_written_anew_once_nobody_reads_the_old_one(tmp_path: Path) -> None:
    config = StoreConfig(dir=str(tmp_path))
    store = Store(config, patience=Patience(limit_s=0.0, lock_wait_s=0.05))
    record(store, said(0, None))
    with store.database.read() as reader:
        reader.exec_driver_sql("SELECT count(*) FROM turns").all()
        store.forgetting.forget(Wanted(turns=["turn_0"]))
        with pytest.raises(WaitError):
            store.compact()
    store.compact()
    assert store.forgetting.plan(Wanted(turns=["turn_0"])) == Plan((), (), (), {}, 0)
    store.close()


def test_forgetting_a_sample_leaves_no_state_of_it(store: Store) -> None:
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    store.forgetting.forget(Wanted(turns=["turn_0"]))
    assert all(store.counts().get(f"samples/{state}", 0) == 0 for state in SampleState)
    assert store.counts().get("verdicts/-1", 0) == 0
