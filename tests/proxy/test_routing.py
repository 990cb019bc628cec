"""Where conversations are placed: they stay, are spread evenly, and leave what is overloaded."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing import (
    KEPT_S,
    MOST_KEPT,
    SPILL_ABOVE,
    Places,
    conversation_key,
    first_of,
    overloaded,
)

NAMES = ("a", "b", "c", "d")
keys = st.binary(min_size=16, max_size=16)
many_keys = st.lists(keys, min_size=1, max_size=80, unique=True)
counts = st.integers(0, 200)
engines = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)


def idle(*names: str) -> dict[str, int]:
    return dict.fromkeys(names or NAMES, 0)


@given(many_keys, st.lists(st.tuples(counts, counts, counts, counts), max_size=20))
def test_a_conversation_stays_on_its_engine_unless_that_is_overloaded(
    conversations: list[bytes], loads: list[tuple[int, ...]]
) -> None:
    places, at = Places(), dict[bytes, str]()
    for load in [(0, 0, 0, 0), *loads]:
        running = dict(zip(NAMES, load, strict=True))
        for key in conversations:
            engine = places.place(key, running, 0.0)
            least = min(running.values())
            before = at.get(key)
            if before is not None and not overloaded(running[before], least):
                assert engine == before
            else:
                assert running[engine] == least
            at[key] = engine


@given(many_keys, engines)
def test_only_the_conversations_of_an_engine_that_leaves_move_and_nothing_moves_back(
    conversations: list[bytes], left: list[str]
) -> None:
    places = Places()
    before = {key: places.place(key, idle(), 0.0) for key in conversations}
    without = {key: places.place(key, idle(*left), 1.0) for key in conversations}
    assert all(without[key] == before[key] for key in conversations if before[key] in left)
    assert set(without.values()) <= set(left)
    assert {key: places.place(key, idle(), 2.0) for key in conversations} == without


@given(many_keys, engines)
def test_conversations_that_come_one_after_the_other_are_spread_evenly(
    conversations: list[bytes], names: list[str]
) -> None:
    places = Places()
    found = Counter(places.place(key, idle(*names), 0.0) for key in conversations)
    assert max(found.values()) - min(found[name] for name in names) <= 1


@given(keys, st.dictionaries(st.sampled_from(NAMES), counts, min_size=1))
def test_a_new_conversation_goes_to_the_engine_with_the_fewest_requests(
    key: bytes, running: dict[str, int]
) -> None:
    assert running[Places().place(key, running, 0.0)] == min(running.values())
    assert running[Places().place(None, running, 0.0)] == min(running.values())


@given(many_keys, st.integers(0, SPILL_ABOVE))
def test_proxies_that_cannot_ask_each_other_agree(conversations: list[bytes], more: int) -> None:
    one, other = Places(shared=True), Places(shared=True)
    for key in conversations:
        running = {**idle(), "a": more}
        assert one.place(key, idle(), 0.0) == other.place(key, running, 0.0)


@given(many_keys, engines)
def test_hashing_moves_only_the_keys_of_an_engine_that_leaves(
    conversations: list[bytes], left: list[str]
) -> None:
    for key in conversations:
        first = first_of(key, idle())
        assert first_of(key, idle(*left)) == first or first not in left


def test_an_overloaded_engine_keeps_no_conversation_until_the_load_is_even() -> None:
    places = Places()
    key = bytes(16)
    engine = places.place(key, idle("a", "b"), 0.0)
    other = "b" if engine == "a" else "a"
    assert places.place(key, {engine: SPILL_ABOVE, other: 0}, 0.0) == engine
    assert places.place(key, {engine: SPILL_ABOVE + 1, other: 0}, 0.0) == other
    assert places.place(key, {engine: 0, other: SPILL_ABOVE}, 0.0) == other
    assert not overloaded(1000 + SPILL_ABOVE + 1, 1000)  # a small part of much


def test_a_conversation_is_forgotten_after_its_time_and_the_oldest_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places, first, second = Places(), bytes(16), bytes([1] * 16)
    engine = places.place(first, idle("a", "b"), 0.0)
    other = "b" if engine == "a" else "a"
    assert places.place(first, {engine: 1, other: 0}, KEPT_S / 2) == engine
    assert places.place(first, {engine: 1, other: 0}, KEPT_S / 2 + KEPT_S) == other
    monkeypatch.setattr("proxy.routing.MOST_KEPT", 1)
    places.place(second, idle("a", "b"), 2 * KEPT_S)
    assert len(places._kept) == 1
    assert sum(places._conversations.values()) == 1
    assert MOST_KEPT > 1


def said(text: Any, **more: Any) -> dict[str, Any]:
    system = {"role": "system", "content": "You are an agent."}
    return {"messages": [system, {"role": "user", "content": text}], **more}


def key(body: dict[str, Any], lineage: str = "main", episode: str | None = None) -> bytes:
    return conversation_key({}, body, lineage, episode)


def test_the_turns_of_a_conversation_have_one_key() -> None:
    first = said("Fix it.")
    later = {"messages": [*first["messages"], {"role": "assistant", "content": "Done."}]}
    later["messages"].append({"role": "user", "content": "And now?"})
    assert key(first) == key(later)
    blocks = [{"type": "text", "text": "Fix it."}]
    assert key(said(blocks)) == key(said([*blocks]))
    prompt = {"prompt": "x" * 5000}
    assert key(prompt) == key({"prompt": "x" * 9000})
    assert key({"input": "Fix it."}) == key({"input": "Fix it."})
    assert key({"prompt": [*range(600)]}) == key({"prompt": [*range(700)]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (said("a"), said("b")),
        (said([{"type": "text", "text": "a"}]), said([{"type": "text", "text": "b"}])),
        (said("x" * 5000 + "a"), said("x" * 5000 + "b")),
        (
            said([{"type": "text", "text": "x" * 5000 + "a"}]),
            said([{"type": "text", "text": "x" * 5000 + "b"}]),
        ),
        (said("x" * 5000), said("x" * 6000)),
        (said("a", user="x"), said("b", user="x")),
        (said("a", session_id="x"), said("a", session_id="y")),
        ({"input": "a"}, {"input": "b"}),
        ({"input": [{"role": "user", "content": "a"}]}, {"input": [{"content": "b"}]}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"prompt": "a"}, {"messages": 5}),
    ],
)
def test_two_conversations_have_different_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(one) != key(other)


def test_a_named_session_an_episode_and_a_lineage_decide_before_what_is_said() -> None:
    named = {"x-session-id": "s"}
    of = conversation_key
    assert of(named, said("a"), "main", None) == of(named, said("b"), "main", None)
    assert of(named, said("a"), "main", None) != of(named, said("a"), "alice", None)
    assert key(said("a"), episode="e1") == key(said("b"), episode="e1")
    assert key(said("a"), episode="e1") != key(said("a"), episode="e2")
