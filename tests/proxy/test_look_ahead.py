"""A batch of turns asks the store at once, and is recorded as turns are that come one by one."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.episodes import Episode
from nextstate.records import Timings
from nextstate.store import Store, texts
from nextstate.store import recording as recorder
from nextstate.store import schema as t
from nextstate.store.database import Cursor
from proxy import exchange as proxy_exchange
from proxy.capture import Capture
from proxy.exchange import Exchange, amend_exchange, look_ahead, prepared, read_exchange, record
from tests.postgresql_server import dropped
from tests.proxy.conversations import PROFILE, Step, interleaved
from tests.proxy.generated_agents import FORKING, programs

DATABASES = True
"""Each test runs on both."""


def exchange(step: Step, session: str | None = None, **changes: Any) -> Exchange:
    """A request with its reply, as the recorder sends it."""
    capture = Capture()
    choice = {"index": 0, "message": step.reply, "finish_reason": None if step.cut else "stop"}
    capture.body({"model": "base", "choices": [choice]})
    request = {"model": "base", "messages": step.messages}
    timings = Timings(0.0, 0.0, 0.0)
    return Exchange(step.id, "main", session, request, capture, 0, timings, step.cut)._replace(
        **changes
    )


def commit(store: Store, batch: Sequence[Exchange], *, ahead: bool) -> None:
    """Records exchanges as the writer does, in one transaction."""
    read = [read_exchange(one, PROFILE) for one in batch]
    if ahead:
        read = prepared(store, read)
    with store.recording() as recording:
        if ahead:
            look_ahead(recording, read)
        for one in read:
            if not recording.holds(one.exchange.turn_id):
                record(recording, one)
            elif one.exchange.amends:
                amend_exchange(recording, one)


def rows(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that a store holds."""
    with store.database.read() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(sa.select(table))), key=repr)
            for table in t.metadata.sorted_tables
        }


def recorded(batches: Sequence[Sequence[Exchange]], *, ahead: bool) -> dict[str, Any]:
    """What a new store holds after these batches."""
    numbers = itertools.count()

    def new_id(kind: str) -> str:
        return f"{kind}_{next(numbers)}"

    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        dropped(),  # a database has 9 MB in memory
    ):
        patch.setattr(proxy_exchange, "new_id", new_id)
        store = Store(StoreConfig(dir=str(Path(folder) / "state")))
        for batch in batches:
            commit(store, batch, ahead=ahead)
        found = rows(store)
        assert store.ledger.problems() == []
        store.close()
    return found


@st.composite
def arrivals(draw: st.DrawFn) -> list[Exchange]:
    """Exchanges of agents that go on beside each other, some of which are sent again."""
    lanes = draw(programs(FORKING, unique=draw(st.booleans())))
    named, vague = draw(st.booleans()), draw(st.booleans())
    rng = draw(st.randoms(use_true_random=False))
    sent: list[Exchange] = []
    for lane, step in interleaved(lanes, rng):
        session = f"chat {lane % 2}" if named else None
        sent.append(exchange(step, session, vague_name=vague))
        if rng.random() < 0.2:
            again = rng.choice(sent)
            sent.append(again._replace(amends=rng.random() < 0.7, cut=True))
    return sent


def parted(sent: Sequence[Exchange], rng: Random) -> list[list[Exchange]]:
    """The same in batches."""
    left, batches = [*sent], list[list[Exchange]]()
    while left:
        size = rng.choice((1, 2, 5, 16))
        batches.append(left[:size])
        del left[:size]
    return batches


@settings(max_examples=12)
@given(arrivals(), st.randoms(use_true_random=False))
def test_a_batch_that_looks_ahead_leaves_the_same_rows_as_turns_one_by_one(
    sent: list[Exchange], rng: Random
) -> None:
    one_by_one = recorded([[one] for one in sent], ahead=False)
    assert recorded(parted(sent, rng), ahead=True) == one_by_one


@pytest.mark.parametrize("reply", ["hello", "good day"])
def test_a_batch_sees_that_it_adds_or_replaces_what_was_asked_before(reply: str) -> None:
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and now?"},
    ]

    def turn(name: str, messages: int, said_back: str, *, cut: bool = False) -> Exchange:
        answer = {"role": "assistant", "content": said_back}
        return exchange(Step(name, said[:messages], answer, cut, None, [], ""))

    first = turn("turn_0", 1, "hello", cut=reply != "hello")
    batch = [turn("turn_1", 1, reply), turn("turn_2", 3, "bye")]
    one_by_one = recorded([[first], *([one] for one in batch)], ahead=False)
    assert recorded([[first], batch], ahead=True) == one_by_one


def test_a_batch_of_turns_that_go_on_asks_a_server_twice(
    store: Store, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(step: int) -> list[Exchange]:
        said = [
            [
                {"role": ("user", "assistant")[n % 2], "content": f"{n} of {chat}"}
                for n in range(2 * step + 2)
            ]
            for chat in range(16)
        ]
        return [
            exchange(Step(f"turn_{step}_{n}", all_[:-1], all_[-1], False, None, [], ""))
            for n, all_ in enumerate(said)
        ]

    commit(store, turns(0), ahead=True)
    asked: list[str] = []
    for name in ("first", "all"):
        ask = getattr(Cursor, name)

        def noted(self: Cursor, *args: Any, ask: Any = ask, **values: Any) -> Any:
            asked.append(str(args[0]))
            return ask(self, *args, **values)

        monkeypatch.setattr(Cursor, name, noted)
    commit(store, turns(1), ahead=True)
    if database == "postgresql":
        assert len(asked) == 2, asked
    parents = [store.turns.get(f"turn_1_{n}") for n in range(16)]
    assert [one and one.parent for one in parents] == [f"turn_0_{n}" for n in range(16)]


def test_a_step_replaces_cut_turns_only_where_there_are_some(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To replace one forgets all that the batch has asked for."""
    replaced: list[str] = []
    replace_cut = recorder.Recording.replace_cut

    def noted(self: recorder.Recording, place: bytes, turn: str) -> None:
        replaced.append(turn)
        replace_cut(self, place, turn)

    monkeypatch.setattr(recorder.Recording, "replace_cut", noted)
    store.episodes.open([Episode("e-1", "main", "shell", "go")], None)
    said = [{"role": "user", "content": "go"}]
    reply = {"role": "assistant", "content": "a reply"}
    for name, cut in (("turn_0", True), ("turn_1", False), ("turn_2", False)):
        step = exchange(Step(name, said, reply, cut, None, [], ""), episode="e-1")
        commit(store, [step], ahead=True)
    assert replaced == ["turn_1"]


def test_what_a_new_turn_is_stored_as_is_made_before_the_lock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "It is a long text that begins as others do. " * 200
    said = [{"role": "user", "content": f"{begun}{n}"} for n in range(2)]
    reply = {"role": "assistant", "content": "a reply"}
    first, second = (
        exchange(Step(f"turn_{n}", [one], reply, False, None, [], ""), defaults={"n": n})
        for n, one in enumerate(said)
    )
    commit(store, [first], ahead=True)
    read = prepared(store, [read_exchange(second, PROFILE)])

    def refused(*_: object) -> bytes:
        raise AssertionError("it is done under the lock")

    with monkeypatch.context() as patch:
        for module, name in (
            *((texts, name) for name in ("compress", "content_hash")),
            *((recorder, name) for name in ("content_hash", "id_runs", "pack_ids", "dump")),
        ):
            patch.setattr(module, name, refused)
        with store.recording() as recording:
            record(recording, read[0])
    turn = store.turns.get("turn_1")
    assert turn is not None
    assert (turn.request["messages"], turn.reply) == ([said[1]], reply)
