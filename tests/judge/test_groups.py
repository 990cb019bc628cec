"""When a group of episodes is settled, and the advantages that its steps get, worked by hand."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from judge import groups
from judge.advantages import ALL_SOLVED
from judge.config import JudgeConfig
from judge.groups import CLOSING_S, EPISODE_S, JUDGING_S, MOST_APART, is_over, settle_over
from judge.stage import run
from nextstate.config import StoreConfig
from nextstate.episodes import Episode, EpisodeState, EpisodeStatus, Reward, RewardKind, Split
from nextstate.errors import ConflictError, RecordError, StoreError
from nextstate.records import Feedback, NextState, Source, Verdict, Vote
from nextstate.store import Store
from nextstate.store.groups import Member, Unsettled
from nextstate.store.shares import OWNER
from tests.judge.test_stage import ScriptedEngine, ScriptedJudge
from tests.store.test_records import turn

Votes = Sequence[int] | None
Step = tuple[str, Votes]
"""A turn's id, and the votes on it."""
STARTED_AT = 1_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = STARTED_AT

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with closing(Store(StoreConfig(dir=str(tmp_path / "state")), clock=clock)) as opened:
        yield opened


def open_episode(store: Store, name: str, size: int | None = None, **more: Any) -> None:
    values = {"group": "g", **more}
    store.episodes.open([Episode(name, "main", "shell", "find the file", **values)], size)


def take(store: Store, episode: str, *steps: Step, hint: str | None = None, **more: Any) -> None:
    """Records the steps of an episode, with a next state, and their votes."""
    with store.recording() as recording:
        for number, (name, _) in enumerate(steps):
            values = {"id": name, "session": episode, "episode": episode, "step": number}
            added = turn(number, **{**values, **more})
            recording.add_turn(added, os.urandom(16), b"k" * 16)
            state = NextState(name, Source.ENVIRONMENT, "no such file", 0.6)
            recording.add_next_states(name, True, [state])
    hinted = (1, 2, 9) if hint else None
    for name, votes in steps:
        if votes is not None:
            score = (sum(votes) > 0) - (sum(votes) < 0)
            store.judging.settle_verdict(Verdict(name, tuple(votes), score, "j", hint, hinted))


def close(store: Store, episode: str, outcome: float | None, status: str = "done") -> None:
    store.episodes.close(episode, EpisodeStatus(status), outcome, None)


def attempt(
    store: Store, episode: str, outcome: float | None, *steps: Step, size: int | None = None
) -> None:
    open_episode(store, episode, size)
    take(store, episode, *steps)
    close(store, episode, outcome)


def samples(store: Store) -> dict[str, tuple[str, float | None, str | None]]:
    return {
        name: sample
        for number in range(9)
        for name, sample in store.groups.advantages(f"e-{number}").items()
    }


def advantages(store: Store) -> dict[str, float | None]:
    return {name: advantage for name, (_, advantage, _) in samples(store).items()}


def four(store: Store) -> None:
    """Two of four solved, with one vote of each kind on a step of each."""
    attempt(store, "e-1", 1.0, ("a", [1]), size=4)
    attempt(store, "e-2", 0.0, ("b", [-1]))
    attempt(store, "e-3", 0.0, ("c", [1]))
    attempt(store, "e-4", 1.0, ("d", [-1]), ("e", None))
    store.judging.lease(9, 1.0)
    with store.database.write() as connection:  # nobody can judge the last one
        connection.exec_driver_sql("UPDATE judgements SET state = 'done'")


FOUR = {"a": 1.5, "b": -1.5, "c": -0.5, "d": 0.5, "e": 1.0}
"""z_outcome is ±1. So is z_process, which counts half because half is solved; 0 where nobody
voted."""


def test_the_steps_of_a_group_get_their_advantages_and_train(store: Store) -> None:
    four(store)
    assert {state for state, _, _ in samples(store).values()} == {"waiting"}
    assert settle_over(store, 0) == 1
    assert advantages(store) == FOUR
    assert {state for state, _, _ in samples(store).values()} == {"ready"}
    leased = store.training.lease_samples("main", 9, "b", scored=True, hinted=False)
    found = {sample.turn: (sample.credit, sample.score, sample.outcome) for sample in leased}
    outcome = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 1.0}
    assert found == {
        name: (value, 1 if value > 0 else -1, outcome[name]) for name, value in FOUR.items()
    }
    assert store.versions.judged_turns("main", 9) == []  # nothing for the watch
    episode = store.episodes.get("e-4")
    assert episode is not None
    assert episode.state is EpisodeState.SETTLED


def test_a_group_with_more_steps_than_one_statement_takes_is_settled_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextstate.store.groups._AT_ONCE", 2)
    four(store)
    deleted: list[int] = []

    def note(_: object, __: object, statement: str, values: Any, *____: object) -> None:
        if statement.startswith("DELETE FROM samples"):
            deleted.append(len(values))

    sa.event.listen(store.database.engine, "before_cursor_execute", note)
    assert settle_over(store, 0) == 1
    assert advantages(store) == FOUR
    assert deleted == [4, 4, 3]  # two turns and two states, thrice


@pytest.mark.parametrize("error", [StoreError("too many values"), RecordError("no"), ValueError()])
def test_a_group_that_cannot_be_settled_does_not_stop_the_others(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    attempt(store, "e-1", 1.0, ("a", None), size=1)
    open_episode(store, "e-2", 1, group="h")
    close(store, "e-2", 1.0)
    settle = store.groups.settle

    def breaks(group: Unsettled, decide: Any) -> bool:
        if group.name == "g":
            raise error
        return settle(group, decide)

    monkeypatch.setattr(store.groups, "settle", breaks)
    monkeypatch.setattr(store.groups, "unjudged", lambda _: 0)
    assert settle_over(store, 0) == 1
    assert [one.name for one in store.groups.unsettled()] == ["g"]


def test_settling_twice_gives_the_same(store: Store) -> None:
    four(store)
    (group,) = store.groups.unsettled()
    assert settle_over(store, 0) == 1
    before = samples(store)
    again = groups.settlement([], [], "combined")
    assert not store.groups.settle(group, lambda *_: again)
    assert settle_over(store, 0) == 0
    assert samples(store) == before


def test_verdicts_and_feedback_after_the_settling_change_no_sample(store: Store) -> None:
    four(store)
    settle_over(store, 0)
    before = samples(store)
    late = Verdict("e", (-1,), -1, "j", "Look twice, please.", (1, 2, 9))
    assert store.judging.settle_verdict(late)
    assert store.judging.verdict("e") == late
    reception = store.reviewing.give(Feedback("a", -1), OWNER)
    assert (reception.applied, reception.reason) == (
        False,
        "the turn's episode is settled already; the feedback is kept",
    )
    assert samples(store) == before


def test_an_episode_trains_whole_and_people_as_before(store: Store) -> None:
    attempt(store, "e-1", 1.0, *((f"a{n}", [1]) for n in range(5)), size=2)
    attempt(store, "e-2", 0.0, *((f"b{n}", [-1]) for n in range(3)))
    settle_over(store, 0)
    with store.recording() as recording:
        for number in range(3):
            recording.add_turn(turn(number, session="chat"), os.urandom(16), b"k" * 16)
    for number in range(3):
        store.judging.settle_verdict(Verdict(f"turn_{number}", (1,), 1, "j"))
    first = store.training.lease_samples("main", 2, "1", scored=True, hinted=False)
    assert sorted(s.turn for s in first) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    second = store.training.lease_samples("main", 2, "2", scored=True, hinted=False)
    assert [s.turn for s in second] == ["turn_0", "turn_1"]


def test_what_the_environment_declares_counts_more_than_votes(store: Store) -> None:
    open_episode(store, "e-1", 2)
    take(store, "e-1", ("a", [1]), ("b", [1, 1, -1]))
    for name, value in (("parse", -1.0), ("exit", 0.0)):
        store.episodes.reward([Reward("e-1", name, RewardKind.PROCESS, value, "a")])
    close(store, "e-1", 0.0)
    attempt(store, "e-2", 0.0, ("c", [1]))
    settle_over(store, 0)
    # a: -1/2, b: 1/3, c: 1; none is solved, so only the process rewards speak
    mean = (-0.5 + 1 / 3 + 1) / 3
    deviation = (((-0.5 - mean) ** 2 + (1 / 3 - mean) ** 2 + (1 - mean) ** 2) / 3) ** 0.5
    expected = {n: (v - mean) / deviation for n, v in (("a", -0.5), ("b", 1 / 3), ("c", 1.0))}
    assert advantages(store) == pytest.approx(expected)


def test_a_person_who_speaks_before_the_settling_takes_the_place_of_votes(store: Store) -> None:
    open_episode(store, "e-1", 2)
    take(store, "e-1", ("a", [1]), ("b", [1]))
    assert store.reviewing.give(Feedback("a", -1), OWNER).applied
    close(store, "e-1", 0.0)
    attempt(store, "e-2", 0.0)
    settle_over(store, 0)
    assert advantages(store) == {"a": -1.0, "b": 1.0}


@pytest.mark.parametrize(("newest", "compared"), [(MOST_APART, True), (MOST_APART + 1, False)])
def test_a_group_that_versions_far_apart_have_served_is_not_compared(
    store: Store, newest: int, compared: bool
) -> None:
    for number, version in enumerate((0, newest)):
        name = f"e-{number}"
        open_episode(store, name, size=2)
        take(store, name, (f"t-{number}", [1]), policy_version=version)
        close(store, name, float(number))
    settle_over(store, 0)
    if compared:
        assert advantages(store) == {"t-0": -1.0, "t-1": 1.0}
        return
    found = samples(store)
    assert {(state, advantage) for state, advantage, _ in found.values()} == {("dropped", None)}
    assert all("served by the versions 0 to 5" in (why or "") for _, _, why in found.values())
    episode = store.episodes.get("e-1")
    assert episode is not None
    assert episode.state is EpisodeState.SETTLED  # its outcome still counts as one of its task


def test_a_group_that_is_solved_teaches_nothing_and_says_so(store: Store) -> None:
    attempt(store, "e-1", 1.0, ("a", [1]), size=2)
    attempt(store, "e-2", 1.0, ("b", [-1]))
    settle_over(store, 0)
    assert samples(store) == dict.fromkeys("ab", ("dropped", None, ALL_SOLVED))
    assert store.counts()["episodes/settled"] == 2


def test_a_step_that_only_a_hint_tells_apart_is_distilled(store: Store) -> None:
    open_episode(store, "e-1", 1)
    take(store, "e-1", ("a", [-1]), hint="Look into the other folder.")
    close(store, "e-1", 0.0)
    settle_over(store, 0)
    assert samples(store) == {"a": ("ready", 0.0, None)}
    assert store.training.lease_samples("main", 9, "b", scored=True, hinted=False) == []
    (leased,) = store.training.lease_samples("main", 9, "b", scored=False, hinted=True)
    assert (leased.credit, leased.hinted_prompt_ids) == (0.0, (1, 2, 9))


def test_one_alone_whose_task_names_no_family_is_compared_with_its_environment(
    store: Store, clock: Clock
) -> None:
    outcomes = [0.0, 1.0, 0.0, 1.0, 1.0]
    for number, outcome in enumerate(outcomes):
        clock.now += 1
        open_episode(store, f"e-{number}", group=None)
        take(store, f"e-{number}", (f"t{number}", None))
        close(store, f"e-{number}", outcome)
        assert settle_over(store, 0, judging_s=0) == 1
    found = samples(store)
    assert found["t0"][0] == "dropped"  # nothing to compare with
    mean, deviation = 0.6, (0.6 * 0.4) ** 0.5
    assert found["t4"] == ("ready", pytest.approx((1 - mean) / deviation * 1.25), None)


def test_one_alone_is_compared_with_its_family_of_tasks_however_many_others_there_are(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextstate.store.groups._MOST_EARLIER", 1)
    outcomes = {"find-1": 1.0, "find-2": 1.0, "find-3": 0.0, "add-up-1": 0.0, "find-4": 1.0}
    for number, (task, outcome) in enumerate(outcomes.items()):
        clock.now += 1
        store.episodes.open([Episode(f"e-{number}", "main", "shell", task)], None)
        take(store, f"e-{number}", (f"t{number}", None))
        close(store, f"e-{number}", outcome)
        assert settle_over(store, 0, judging_s=0) == 1
    found = samples(store)
    assert found["t3"][0] == "dropped"  # the first one of its family
    mean, deviation = 0.75, (0.75 * 0.25) ** 0.5
    assert found["t4"] == ("ready", pytest.approx((1 - mean) / deviation * 4 / 3), None)


def test_untrainable_steps_are_scored_and_do_not_train(store: Store) -> None:
    open_episode(store, "e-1", 2)
    take(store, "e-1", ("a", [1]), untrainable="usage disagrees")
    close(store, "e-1", 1.0)
    open_episode(store, "e-2")
    take(store, "e-2", ("b", [-1]), policy_version=None)
    close(store, "e-2", 0.0)
    settle_over(store, 0)
    assert samples(store) == {
        "a": ("dropped", None, "usage disagrees"),
        "b": ("dropped", None, "served by a model that is not a version of this lineage"),
    }


def test_evaluation_is_never_settled(store: Store) -> None:
    open_episode(store, "e-1", 1, split=Split.EVAL)
    close(store, "e-1", 1.0)
    assert settle_over(store, 0) == 0
    assert store.groups.unsettled() == []


def group_of(
    size: int | None, *members: tuple[str, float, float | None, float | None]
) -> Unsettled:
    """Members as (state, opened at, deadline, closed at)."""
    found = tuple(
        Member(str(n), EpisodeState(state), opened_at, deadline_s, closed_at)
        for n, (state, opened_at, deadline_s, closed_at) in enumerate(members)
    )
    return Unsettled("g", False, "main", "shell", None, size, found)


CLOSED, OPEN, DROPPED = ("closed", 0, 10, 5), ("open", 0, 10, None), ("dropped", 0, 10, 7)


@pytest.mark.parametrize(
    ("group", "over_at"),
    [
        (group_of(2, CLOSED, CLOSED), 0),
        (group_of(2, CLOSED, CLOSED, DROPPED), 0),
        (group_of(2, CLOSED, DROPPED), 7 + CLOSING_S),  # it may be tried again
        (group_of(2, CLOSED), 10 + CLOSING_S),  # its runner may have died
        (group_of(2, CLOSED, OPEN), 10 + CLOSING_S),
        (group_of(2, DROPPED, DROPPED), 7 + CLOSING_S),
        (group_of(None, CLOSED, CLOSED), 10 + CLOSING_S),
        (group_of(2, ("open", 3, None, None), CLOSED), 3 + EPISODE_S + CLOSING_S),
    ],
)
def test_a_group_is_over_when_nothing_more_can_come(group: Unsettled, over_at: float) -> None:
    assert is_over(group, over_at)
    assert not over_at or not is_over(group, over_at - 0.1)


def test_an_episode_that_nobody_closes_is_dropped_at_its_groups_deadline(
    store: Store, clock: Clock
) -> None:
    attempt(store, "e-1", 1.0, ("a", [1]), size=3)
    attempt(store, "e-2", 0.0, ("b", [-1]))
    open_episode(store, "e-3")
    take(store, "e-3", ("c", [-1]))
    clock.now += EPISODE_S
    assert settle_over(store, 0) == 0
    clock.now += CLOSING_S
    assert settle_over(store, 0) == 1
    found = samples(store)
    assert advantages(store) == {"a": 1.5, "b": -1.5, "c": None}
    reason = "the episode was closed as aborted: it was still open when its group's deadline"
    assert found["c"] == ("dropped", None, f"{reason} had passed")
    with pytest.raises(ConflictError, match="closed as aborted"):
        close(store, "e-3", 1.0)
    with pytest.raises(ConflictError, match="group 'g' is settled"):
        open_episode(store, "e-4")


def test_steps_are_waited_for_as_long_as_the_judge_has(store: Store, clock: Clock) -> None:
    attempt(store, "e-1", 1.0, ("a", [1]), size=2)
    attempt(store, "e-2", 0.0, ("b", None))
    began = clock.now
    clock.now += JUDGING_S - 1
    assert settle_over(store, 0) == 0
    clock.now += 1
    assert settle_over(store, began + 100) == 0  # the judge was not there before
    assert settle_over(store, began) == 1
    assert advantages(store) == {"a": 1.0, "b": -1.0}  # the only process reward differs from none


def test_a_group_settles_when_its_last_step_is_judged(store: Store) -> None:
    attempt(store, "e-1", 1.0, ("a", [1]), size=2)
    attempt(store, "e-2", 0.0, ("b", None))
    assert settle_over(store, 0) == 0
    store.judging.settle_verdict(Verdict("b", (-1,), -1, "j"))
    assert settle_over(store, 0) == 1
    assert advantages(store) == {"a": 1.5, "b": -1.5}


def test_another_attempt_that_is_opened_meanwhile_is_waited_for(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(store, "e-1", 1.0, ("a", [1]), size=2)
    open_episode(store, "e-2")
    close(store, "e-2", None, "failed")
    clock.now += CLOSING_S
    unjudged = store.groups.unjudged

    def opened_meanwhile(group: Unsettled) -> int:
        open_episode(store, "e-3")
        return unjudged(group)

    monkeypatch.setattr(store.groups, "unjudged", opened_meanwhile)
    assert settle_over(store, 0) == 0
    assert samples(store)["a"][0] == "waiting"


KILLED = """
import os, signal, sys
from judge import groups
from nextstate.config import StoreConfig
from nextstate.store import Store

def die(*given):
    os.kill(os.getpid(), signal.SIGKILL)

store = Store(StoreConfig(dir=sys.argv[1]), clock=lambda: 1e6)
if sys.argv[2] == "deciding":
    groups.settlement = die
else:
    import nextstate.store.groups as written
    write = written._settle_steps
    written._settle_steps = lambda *given: (write(*given), die())
groups.settle_over(store, 0)
"""


@pytest.mark.parametrize("moment", ["deciding", "writing"])
def test_a_judge_killed_while_it_settles_leaves_the_group_whole(store: Store, moment: str) -> None:
    four(store)
    before = samples(store)
    command = [sys.executable, "-c", KILLED, str(store.dir), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert samples(store) == before
    assert settle_over(store, 0) == 1
    assert advantages(store) == FOUR


def test_the_stage_judges_the_steps_of_a_group_and_settles_it(store: Store) -> None:
    open_episode(store, "e-1", 2)
    open_episode(store, "e-2")
    take(store, "e-1", ("a", None))
    take(store, "e-2", ("b", None))
    close(store, "e-1", 1.0)
    close(store, "e-2", 0.0)
    votes: Mapping[int, int] = {1: 1, 2: 1}
    judge = ScriptedJudge(lambda _, call: Vote(votes[call]), deterministic=True)

    async def test() -> None:
        stop = asyncio.Event()
        config = JudgeConfig(votes=1, look_s=0.01)
        stage = asyncio.create_task(run(store, config, judge, ScriptedEngine(), stop))
        await until(lambda: "samples/ready" in store.counts())
        stop.set()
        await stage

    asyncio.run(test())
    assert advantages(store) == {"a": 1.0, "b": -1.0}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("combined", 1.5), ("outcome", 1.0), ("step_sum", (2.0 - 0.5) / 1.118034)],
)
def test_the_method_can_be_chosen(store: Store, method: Any, expected: float) -> None:
    four(store)
    settle_over(store, 0, method)
    assert advantages(store)["a"] == pytest.approx(expected, abs=1e-5)
