"""Every text is stored once, counts its uses, and is deleted with the last of them."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.errors import WaitError
from nextstate.records import Feedback, Turn, Verdict
from nextstate.store import Store, texts
from nextstate.store.shares import OWNER
from nextstate.store.texts import Row, hashes
from nextstate.wire import write_json
from tests.store.rows import select
from tests.store.test_records import KEY, add, turn


def assert_uses_are_counted(store: Store) -> None:
    """Each text has as many uses as records refer to it, and none is without."""
    used = Counter[bytes]()
    turns = {row.id: row for row in select(store, "SELECT * FROM turns")}
    for row in turns.values():
        parent = turns.get(row.parent)
        used.update(of_turn(row) - (of_turn(parent) if parent else set()))
    for query in (
        "SELECT text FROM next_states",
        "SELECT base FROM texts WHERE base IS NOT NULL",
        "SELECT hint FROM feedback WHERE hint IS NOT NULL",
        "SELECT comment FROM feedback WHERE comment IS NOT NULL",
        "SELECT hint FROM reviews WHERE hint IS NOT NULL",
        "SELECT comment FROM reviews WHERE comment IS NOT NULL",
        "SELECT task FROM episodes",
        "SELECT metadata FROM episodes",
    ):
        used.update(row[0] for row in select(store, query))
    for hint, runs in select(store, "SELECT hint, hinted_prompt_ids FROM verdicts"):
        used.update({hint, *hashes(runs or b"")} - {None})
    assert {row.hash: row.uses for row in select(store, "SELECT hash, uses FROM texts")} == used


def of_turn(row: Row) -> set[bytes]:
    """The texts that a turn refers to."""
    single = {row.rest, row.reply, row.tools} - {None}
    return {*single, *hashes(row.messages), *hashes(row.prompt_ids or b"")}


def check(store: Store) -> int:
    """Checks the uses; returns how many texts there are."""
    assert_uses_are_counted(store)
    return select(store, "SELECT count(*) FROM texts")[0][0]


def test_a_conversation_counts_each_message_once(store: Store) -> None:
    said = [{"role": "user", "content": f"question {n}"} for n in range(40)]
    for number in range(40):
        parent = f"turn_{number - 1}" if number else None
        request = {"messages": said[: number + 1], "tools": [{"type": "function"}]}
        add(store, turn(number, request=request, parent=parent), next_state=None)
    check(store)
    assert {uses for (uses,) in select(store, "SELECT uses FROM texts")} == {1}


def test_what_two_conversations_of_a_transaction_share_is_counted_for_both(store: Store) -> None:
    messages = [{"role": "system", "content": "Be brief. " * 900}]
    with store.recording() as recording:
        for number in (1, 2):
            one = turn(number, session=f"s{number}", request={"messages": messages})
            recording.add_turn(one, b"chain %10d" % number, b"reply %10d" % number)
    assert_uses_are_counted(store)
    assert max(row.uses for row in select(store, "SELECT uses FROM texts")) == 2


def test_what_a_new_verdict_replaces_is_deleted(store: Store) -> None:
    add(store, turn(0))
    before = check(store)
    store.reviewing.give(Feedback("turn_0", -1, "Be brief.", "It was long."), OWNER)
    assert check(store) == before + 2
    ids = tuple(range(3000))
    store.judging.add_hinted_prompt(Verdict("turn_0", (), -1, "feedback", "Be brief.", ids))
    assert check(store) > before + 3
    store.reviewing.give(Feedback("turn_0", 1), OWNER)
    assert check(store) == before
    assert store.judging.feedback("turn_0") == Feedback("turn_0", 1)


def test_a_text_that_another_process_deleted_is_stored_again(tmp_path: Path) -> None:
    here, there = (Store(StoreConfig(dir=str(tmp_path))) for _ in range(2))
    add(here, turn(0, request={"messages": []}), next_state="first")
    key = texts.content_hash(b"first")
    with there.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM next_states")
        texts.release(connection, [key])
        assert texts.get(connection, [key]) == {}
    add(here, turn(1, request={"messages": []}), next_state="first")  # it remembers the text
    assert [state.text for state in here.turns.next_states("turn_1")] == ["first"]
    check(here)
    here.close()
    there.close()


def test_a_text_that_others_are_compressed_against_stays_until_they_go(store: Store) -> None:
    long = " ".join(f"rule {n * n % 9973}" for n in range(5000)).encode()
    with store.recording() as recording:
        keys = [recording._texts.put(long + end) for end in (b"", b"one", b"two")]  # pyright: ignore[reportPrivateUsage]
    with store.database.write() as connection:
        texts.release(connection, keys[:1])
        assert texts.get(connection, keys[1:])[keys[2]] == long + b"two"
        texts.release(connection, keys[1:])
        assert texts.get(connection, keys) == {}


def test_remembered_hashes_are_right_and_take_a_bounded_memory() -> None:
    known = texts.Known(most_hashed_bytes=5000)
    first = b"You are a helpful agent."
    for number in range(100):
        text = b"tool %d " % number * 50
        assert known.hash_of(first) == texts.content_hash(first)
        assert known.hash_of(text) == known.hash_of(text) == texts.content_hash(text)
        assert sum(map(len, known.hashed)) < known.hashed_bytes <= 5000
    assert first in known.hashed, "it was used all the time"
    assert known.hash_of(b"x" * 6000) == texts.content_hash(b"x" * 6000), "and one too large for it"


def told(number: int) -> Turn:
    """The turn of a long conversation after `number` exchanges in it."""
    said = [
        {"role": ("user", "assistant")[n % 2], "content": f"{n} " * 500}
        for n in range(2 * number + 1)
    ]
    ids = tuple(range(300 * number))
    parent = f"turn_{number - 1}"
    return turn(number, request={"messages": said}, prompt_ids=ids, parent=parent)


def commit(store: Store, one: Turn) -> int:
    """Adds a turn as the writer does; returns how many texts were compressed before the lock."""
    keys = [texts.content_hash(write_json(message)) for message in one.request["messages"]]
    (parts,) = store.prepare([(one, keys)])
    packed = len({key for key, _ in store._known.packed})  # pyright: ignore[reportPrivateUsage]
    with store.recording() as recording:
        recording.add_turn(one, KEY, KEY, parts=parts)
    return packed


@pytest.mark.parametrize("most_hashes", [4096, 16])
def test_a_writer_compresses_only_what_is_new_of_a_conversation_that_it_did_not_begin(
    tmp_path: Path, most_hashes: int
) -> None:
    config = StoreConfig(dir=str(tmp_path))
    with closing(Store(config)) as before:
        commit(before, told(100))
    with closing(Store(config)) as fresh:
        fresh._known.most_hashes = most_hashes  # pyright: ignore[reportPrivateUsage]
        for number in (101, 102):
            packed = commit(fresh, told(number))
            assert packed < 10, "its last two messages, its settings and reply, and a few ids"
        assert fresh.turns.get("turn_102") == told(102)
        check(fresh)


def test_a_text_that_the_turn_before_uses_is_remembered_as_stored(tmp_path: Path) -> None:
    config = StoreConfig(dir=str(tmp_path))
    with closing(Store(config)) as before:
        commit(before, told(5))
    with closing(Store(config)) as fresh:
        commit(fresh, told(6))
        known = fresh._known.hashes  # pyright: ignore[reportPrivateUsage]
        messages = told(6).request["messages"]
        assert {texts.content_hash(write_json(message)) for message in messages} <= known.keys()


def test_what_was_compressed_before_the_lock_is_kept_until_it_is_committed(store: Store) -> None:
    one = told(3)
    (parts,) = store.prepare([(one, [texts.content_hash(b"m")] * 7)])
    packed = store._known.packed  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(WaitError), store.recording():
        raise WaitError("the store is locked")
    assert packed, "the same batch is tried again"
    with store.recording() as recording:
        recording.add_turn(one, KEY, KEY, parts=parts)
    assert not packed, "a writer that waits for the next batch holds no text of this one"
