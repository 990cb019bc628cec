"""What recording asks the store, and what it remembers of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from nextstate.config import StoreConfig
from nextstate.records import Json, Timings, new_id
from nextstate.store import Store
from nextstate.store.texts import Known
from plugins.agents.profile import GENERIC, Profile
from proxy.capture import Capture
from proxy.exchange import Exchange, record_exchange

DATABASES = True
"""Each test runs on both."""
PROFILE = Profile(GENERIC)
IDS = [(n * n * 7919) % 50_000 for n in range(20_000)]
"""Token ids of a long prompt, which are stored as some eighty runs."""


def said(step: int) -> Json:
    return {"role": "assistant", "content": f"I look at part {step}."}


def exchange(index: int) -> Exchange:
    """The turn at `index` of one conversation, whose prompt holds all before it."""
    messages: list[Json] = [{"role": "system", "content": "You are careful."}]
    for step in range(index + 1):
        messages += [said(step - 1)] if step else []
        messages.append({"role": "user", "content": f"And part {step}?"})
    prompt = IDS[: 400 * (index + 1)]
    entry = {"logprob": -0.5}
    choice = {"index": 0, "message": said(index), "finish_reason": "stop", "stop_reason": None}
    capture = Capture()
    capture.body(
        {
            "model": "base",
            "choices": [choice | {"logprobs": {"content": [entry]}, "token_ids": [5]}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1},
            "prompt_token_ids": prompt,
        }
    )
    return Exchange(
        turn_id=new_id("turn"),
        lineage="main",
        explicit_session=None,
        request={"model": "base", "messages": messages, "temperature": 1.0},
        capture=capture,
        policy_version=0,
        timings=Timings(1.0, 0.1, 0.2),
    )


def record(store: Store, index: int) -> str:
    with store.recording() as opened:
        return record_exchange(opened, exchange(index), PROFILE).id


@contextmanager
def statements() -> Generator[list[str]]:
    """All that SQLite is asked by connections that are opened meanwhile."""
    seen: list[str] = []

    def watch(connection: sqlite3.Connection, _: object) -> None:
        connection.set_trace_callback(seen.append)

    event.listen(sa.pool.Pool, "connect", watch)
    try:
        yield seen
    finally:
        event.remove(sa.pool.Pool, "connect", watch)


def asked_for(folder: Path, index: int) -> list[str]:
    """What one turn asks of a store that holds all before it, by a process that knows nothing."""
    earlier = Store(StoreConfig(dir=str(folder)))
    for before in range(index):
        record(earlier, before)
    earlier.close()
    with statements() as seen:
        store = Store(StoreConfig(dir=str(folder)))
        seen.clear()  # the migrations
        record(store, index)
        store.close()
    return [statement.split(" VALUES ")[0] for statement in seen]


@pytest.mark.sqlite
def test_a_turn_asks_as_much_after_forty_turns_as_after_two(tmp_path: Path) -> None:
    short, long = asked_for(tmp_path / "2", 2), asked_for(tmp_path / "40", 40)
    bodies = [len([s for s in asked if "INTO texts" in s]) for asked in (short, long)]
    # The reply that came back, the next question with its text as a next state, what was said now,
    # and up to four runs of ids.
    assert max(bodies) <= 8
    others = [[s for s in asked if "INTO texts" not in s] for asked in (short, long)]
    assert len(others[0]) == len(others[1])


def test_workers_that_take_turns_at_a_conversation_store_it_whole(tmp_path: Path) -> None:
    workers = [Store(StoreConfig(dir=str(tmp_path))) for _ in range(3)]
    kept = [record(worker, index) for index, worker in zip(range(12), cycle(workers), strict=False)]
    for index, turn_id in enumerate(kept):
        turn = workers[0].turns.get(turn_id)
        assert turn is not None
        expected = exchange(index)
        assert turn.request == expected.request
        assert turn.prompt_ids == tuple(IDS[: 400 * (index + 1)])
        assert turn.parent == (kept[index - 1] if index else None)
        assert turn.index == index
    for worker in workers:
        worker.close()


def test_what_is_remembered_is_bounded_and_what_was_used_last_stays() -> None:
    known = Known(most_hashes=100)
    known.add(b"prompt")
    for number in range(1000):
        known.add(b"%d" % number)
        assert known.has(b"%d" % number)
        assert known.has(b"prompt")  # which is used each time
        assert len(known.hashes) == min(number + 2, 100)
    assert not known.has(b"0")


def test_long_bodies_to_compress_against_take_eight_megabytes_at_most() -> None:
    known = Known()
    for number in range(20):
        known.add_base(b"%d" % number, b"%03d" % number + bytes(1 << 20))
    assert sum(len(body) for _, body in known.bases.values()) <= 8 << 20
    assert [key for key, _ in known.bases.values()] == [b"%d" % n for n in range(13, 20)]
    known.add_base(b"huge", bytes(9 << 20))
    assert not known.bases
