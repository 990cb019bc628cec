"""Feedback among votes, renderings, training and repeats, in any order; and a process killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.records import (
    Feedback,
    NextState,
    PolicyVersion,
    Source,
    Verdict,
    VersionState,
)
from nextstate.store import Store, settling
from nextstate.store.shares import OWNER
from tests.proxy.test_feedback import rows
from tests.store.test_records import add, turn

TURN = "turn_0"
HINTS = st.sampled_from([None, "Be brief.", "Name the unit."])
SCORES = st.sampled_from([-1, 0, 1])


def rendered(hint: str | None) -> tuple[int, ...] | None:
    """Ids that tell whose hint is in the prompt."""
    return None if hint is None else tuple(hint.encode())


def by_feedback(feedback: Feedback) -> Verdict:
    """As the judge stage makes it."""
    hint = feedback.hint
    return Verdict(TURN, (), feedback.score, "feedback", hint, rendered(hint))


@dataclass
class Spoken:
    """One turn, on its way through the store while a person speaks of it."""

    store: Store
    clock: list[float]
    said: Feedback | None = None
    followed: bool = False
    leased: tuple[int, tuple[object, ...]] | None = None
    """The score, and (score, hinted) of the sample, when it was leased."""
    trained: bool = False
    under_way: list[Verdict] = field(default_factory=list)
    """What judges have come to; each is delivered at any time later, or more than once."""

    def sample(self) -> tuple[object, ...] | None:
        """(state, score, hinted) of the turn's sample."""
        found = [(row[2], row[4], bool(row[5])) for row in rows(self.store)["samples"]]
        assert len(found) <= 1
        return found[0] if found else None

    def settle(self, verdict: Verdict) -> None:
        """As the judge stage does."""
        if verdict.judge == "feedback":
            self.store.judging.add_hinted_prompt(verdict)
        else:
            self.store.judging.settle_verdict(verdict)

    def speak(self, score: int, hint: str | None, comment: str | None) -> None:
        self.said = Feedback(TURN, score, hint, comment)
        self.store.reviewing.give(self.said, OWNER)

    def repeat(self) -> None:
        """Says the same again."""
        if self.said is not None:
            first, before = self.store.reviewing.give(self.said, OWNER), rows(self.store)
            self.clock[0] += 1.0
            assert self.store.reviewing.give(self.said, OWNER) == first
            assert rows(self.store) == before

    def follow(self) -> None:
        if not self.followed:
            self.followed = True
            with self.store.recording() as recording:
                state = NextState(TURN, Source.USER, "thanks", 0.9)
                recording.add_next_states(TURN, True, [state])

    def judge(self, score: int, hint: str | None) -> None:
        """Takes the turn, if there is work, and comes to a verdict."""
        if self.store.judging.lease(1, 60.0):
            work = self.store.judging.judgement(TURN)
            assert work is not None
            votes = Verdict(TURN, (score,), score, "rules", hint, rendered(hint))
            said = work.feedback
            self.under_way.append(votes if said is None else by_feedback(said))

    def deliver(self, which: int) -> None:
        if self.under_way:
            self.settle(self.under_way[which % len(self.under_way)])

    def lease(self) -> None:
        taken = self.store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
        if taken:
            sample = self.sample()
            assert sample is not None
            self.leased = taken[0].score, sample[1:]

    def train(self) -> None:
        if self.leased is not None and not self.trained:
            self.trained = True
            version = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE)
            self.store.versions.add(version, "b")

    def give_up(self) -> None:
        if self.leased is not None and not self.trained:
            assert self.store.training.release_samples("main") == 1
            self.leased = None

    def settle_all(self) -> None:
        """Everybody does their work, after the leases of judges that never delivered."""
        self.give_up()
        self.clock[0] += 61.0
        while self.store.judging.lease(9, 60.0):
            work = self.store.judging.judgement(TURN)
            assert work is not None
            votes = Verdict(TURN, (1,), 1, "rules")
            said = work.feedback
            self.settle(votes if said is None else by_feedback(said))

    def check(self) -> None:
        """What holds at any time."""
        verdict, sample = self.store.judging.verdict(TURN), self.sample()
        assert self.store.judging.feedback(TURN) == self.said
        if verdict is not None and verdict.hinted_prompt_ids is not None:
            assert verdict.hinted_prompt_ids == rendered(verdict.hint)
        if self.leased is not None:  # a sample that is trained, or being trained, never changes
            assert verdict is not None
            assert verdict.score == self.leased[0]
            assert sample == ("trained" if self.trained else "leased", *self.leased[1])
        elif self.said is not None:  # else the last word is the verdict
            assert verdict is not None
            assert (verdict.judge, verdict.votes) == ("feedback", ())
            assert (verdict.score, verdict.hint) == (self.said.score, self.said.hint)
            hinted = verdict.hinted_prompt_ids is not None
            state = "ready" if hinted or self.said.score != 0 else "dropped"
            assert sample == (state, self.said.score, hinted)


STEPS = st.one_of(
    st.tuples(st.just("speak"), SCORES, HINTS, st.sampled_from([None, "Hm."])),
    st.tuples(st.just("judge"), SCORES, HINTS),
    st.tuples(st.just("deliver"), st.integers(0, 3)),
    *(st.just((name,)) for name in ("repeat", "follow", "lease", "lease", "train", "give_up")),
)


_EXAMPLES: list[list[tuple[Any, ...]]] = [
    [
        *(("follow",), ("judge", 1, None), ("deliver", 0), ("lease",)),
        *(("speak", -1, "Be brief.", None), ("give_up",), ("lease",), ("train",)),
        *(("speak", 1, None, None), ("repeat",)),
    ],
    [
        *(("speak", 0, "Be brief.", None), ("judge", 0, None), ("speak", 0, "Name it.", None)),
        *(("judge", 0, None), ("deliver", 0), ("deliver", 1), ("repeat",), ("lease",)),
    ],
    [
        *(("speak", 1, "Be brief.", None), ("lease",), ("speak", 1, "Name it.", None)),
        *(("judge", 0, None), ("deliver", 0), ("give_up",)),
    ],
    [
        *(("speak", 1, "Be brief.", None), ("judge", 0, None), ("lease",), ("deliver", 0)),
        *(("give_up",), ("judge", 0, None), ("follow",), ("repeat",), ("lease",), ("train",)),
    ],
]


def with_examples(test: Callable[..., None]) -> Callable[..., None]:
    """Tries, beside those that are drawn, the steps that once were wrong."""
    for steps in _EXAMPLES:
        test = example(steps=steps)(test)
    return test


@pytest.mark.sqlite
@settings(max_examples=25)
@given(steps=st.lists(STEPS, min_size=8, max_size=20))
@with_examples
def test_the_last_word_counts_in_any_order_and_what_has_trained_never_changes(
    steps: list[tuple[Any, ...]],
) -> None:
    clock = [1000.0]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(StoreConfig(dir=folder), clock=lambda: clock[0])
        add(store, turn(0), next_state=None)
        spoken = Spoken(store, clock)
        for name, *arguments in steps:
            clock[0] += 1.0
            getattr(spoken, name)(*arguments)
            spoken.check()
        spoken.settle_all()
        spoken.check()
        verdict = store.judging.verdict(TURN)
        if spoken.said is not None and not spoken.trained:
            assert verdict is not None
            assert verdict.hinted_prompt_ids == rendered(spoken.said.hint)
        store.close()


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@settings(max_examples=5)
@given(steps=st.lists(STEPS, min_size=8, max_size=20))
@with_examples
def test_the_last_word_counts_on_a_server_too(steps: list[tuple[Any, ...]]) -> None:
    """Fewer examples: each makes a database, and the statements are the same."""
    in_any_order = test_the_last_word_counts_in_any_order_and_what_has_trained_never_changes
    in_any_order.hypothesis.inner_test(steps)


@pytest.mark.parametrize("step", ["_keep_feedback", "_put_verdict", "_put_sample", "_open_work"])
def test_feedback_that_breaks_off_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    add(store, turn(0))
    store.judging.settle_verdict(Verdict(TURN, (1,), 1, "rules"))
    before = rows(store)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(settling, step, fail)
    with pytest.raises(OSError, match="no space"):
        store.reviewing.give(Feedback(TURN, -1, "Be brief."), OWNER)
    assert rows(store) == before


SPEAKER = """
import sys
from nextstate.config import StoreConfig
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.shares import OWNER

store = Store(StoreConfig(dir=sys.argv[1], url=sys.argv[2]))
for number in range(100_000):
    store.reviewing.give(Feedback("turn_0", number % 3 - 1, f"hint {number}"), OWNER)
    print(number, flush=True)
"""


@pytest.mark.parametrize("heard", [1, 7, 40])
def test_a_speaker_killed_at_any_time_leaves_one_whole_feedback(tmp_path: Path, heard: int) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    add(store, turn(0))
    command = [sys.executable, "-c", SPEAKER, str(tmp_path), store.config.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as speaker:
        assert speaker.stdout is not None
        told = [int(speaker.stdout.readline()) for _ in range(heard)]
        speaker.kill()
    said, verdict = store.judging.feedback(TURN), store.judging.verdict(TURN)
    assert said is not None
    assert said.hint is not None
    number = int(said.hint.removeprefix("hint "))
    assert number >= told[-1]
    assert said.score == number % 3 - 1
    assert verdict == Verdict(TURN, (), said.score, "feedback", said.hint)
    found = rows(store)
    assert [len(found[table]) for table in found] == [1, 1, 1, 1]
    assert found["samples"][0][4] == said.score
    assert store.judging.lease(9, 60) == [TURN]
    store.close()
