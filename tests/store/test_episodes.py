"""Episodes in the store: what a recorded step changes, and that texts are stored once."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.episodes import Episode, EpisodeStatus, Reward, RewardKind
from nextstate.errors import BudgetError, ConflictError, NoEpisodeError, RecordError
from nextstate.store import Store
from nextstate.store.episodes import Hold
from tests.store.rows import held_tokens
from tests.store.test_records import KEY, turn
from tests.store.test_texts import check

EPISODE = Episode("e-1", "main", "shell", "find the file", group="g", metadata={"row": 1})


def add_steps(store: Store, *versions: int | None) -> None:
    with store.recording() as recording:
        for step, version in enumerate(versions):
            added = turn(step, session="e-1", episode="e-1", step=step, policy_version=version)
            recording.add_turn(added, KEY, KEY, tokens=10)


def test_a_step_counts_its_tokens_and_the_versions_that_served_it(store: Store) -> None:
    store.episodes.open([EPISODE], None)
    add_steps(store, None, 3, 2, None, 5)
    found = store.episodes.get("e-1")
    assert found is not None
    assert (found.version_min, found.version_max, found.tokens) == (2, 5, 50)
    last = store.turns.get("turn_4")
    assert last is not None
    assert (last.episode, last.step) == ("e-1", 4)
    assert store.episodes.turn_ids("e-1") == [f"turn_{step}" for step in range(5)]


def test_a_turn_has_an_episode_and_a_step_or_neither() -> None:
    for wrong in ({"episode": "e-1"}, {"step": 0}):
        with pytest.raises(RecordError, match="episode"):
            turn(0, **wrong)


def test_attempts_at_one_task_share_its_text_and_its_key(store: Store) -> None:
    others = [replace(EPISODE, id=f"e-{n}") for n in range(2, 9)]
    store.episodes.open([EPISODE], None)
    before = check(store)
    store.episodes.open(others, None)
    assert check(store) == before
    assert {one.task_key for one in others} == {EPISODE.task_key}
    assert replace(EPISODE, environment="web").task_key != EPISODE.task_key


def test_an_observation_is_counted_as_a_text_and_judged(store: Store) -> None:
    store.episodes.open([EPISODE], None)
    add_steps(store, 0, 0)
    before = check(store)
    for _ in range(2):  # the same again changes nothing
        store.episodes.close("e-1", EpisodeStatus.DONE, 1.0, "all tests pass")
    assert check(store) == before + 1
    assert store.judging.lease(9, 60) == ["turn_1"]


def test_two_workers_share_the_budget(tmp_path: Path) -> None:
    here, there = (Store(StoreConfig(dir=str(tmp_path))) for _ in range(2))
    with closing(here), closing(there):
        here.episodes.open([replace(EPISODE, max_calls=3)], None)
        for store in (here, there, here):
            store.episodes.begin_call("e-1")
        with pytest.raises(BudgetError, match="used 3 of max_calls = 3"):
            there.episodes.begin_call("e-1")


@pytest.mark.parametrize("most", [None, 4])
def test_a_call_whose_beginning_was_told_to_nobody_begins_once(
    store: Store, most: int | None
) -> None:
    """PostgreSQL may have kept it although the link broke before it could say so."""
    store.episodes.open([replace(EPISODE, max_calls=1, max_tokens=9)], None)
    hold = Hold("c-0", "0", most)
    left = [store.episodes.begin_call("e-1", 2, 0, hold) for _ in range(2)]
    assert [one and one.tokens for one in left] == [9, most or 8]
    assert held_tokens(store, "e-1") == (most or 8)
    found = store.episodes.get("e-1")
    assert found is not None
    assert found.calls == 1


def test_a_closed_or_unknown_episode_begins_no_call_and_takes_no_reward(store: Store) -> None:
    store.episodes.open([EPISODE], None)
    store.episodes.close("e-1", EpisodeStatus.TRUNCATED, None, None)
    for name, expected in (("e-1", ConflictError), ("e-2", NoEpisodeError)):
        with pytest.raises(expected):
            store.episodes.begin_call(name)
        with pytest.raises(expected):
            store.episodes.reward([Reward(name, "tests", RewardKind.OUTCOME, 1.0)])
    assert store.episodes.rewards("e-1") == []


def test_opening_and_closing_tell_what_is_stored(store: Store) -> None:
    (opened,) = store.episodes.open([replace(EPISODE, deadline_s=5.0, seed=3)], 2)
    assert opened == store.episodes.get("e-1")
    add_steps(store, 0, 0)
    for _ in range(2):  # the last word counts
        store.episodes.reward([Reward("e-1", "exit", RewardKind.PROCESS, -1.0, "turn_0", "shell")])
    closed = store.episodes.close("e-1", EpisodeStatus.DONE, 0.5, "one test fails")
    assert closed == store.episodes.shown("e-1")
    assert closed.turns == ["turn_0", "turn_1"]
    assert [(one.turn, one.value) for one in closed.rewards] == [("turn_0", -1.0)]
    assert (closed.episode.status, closed.episode.outcome) == (EpisodeStatus.DONE, 0.5)


def test_an_episode_that_failed_takes_its_turns_out_of_judging_and_training(store: Store) -> None:
    store.episodes.open([EPISODE], None)
    add_steps(store, 0, 0)
    store.episodes.close("e-1", EpisodeStatus.FAILED, None, "the disk was full")
    assert store.judging.lease(9, 60) == []
    last = store.turns.get("turn_1")
    assert last is not None
    assert last.untrainable == "the episode was closed as failed"
