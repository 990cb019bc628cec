"""The judge stage on turns with a person's feedback: no votes, and the hint is rendered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge.config import JudgeConfig
from judge.feedback import feedback_verdict
from judge.stage import run
from judge.verdict import unmarked
from nextstate.errors import EngineError
from nextstate.records import Feedback, Json, Verdict, Vote
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.judge.test_stage import (
    Clock,
    ScriptedEngine,
    ScriptedJudge,
    Watched,
    a_turn,
    constant,
    judge_until,
    open_store,
    record,
)

TURN = "turn-0"
SAID = Feedback(TURN, -1, "**Final answer:** 1")
"""The hint quotes the reply; a judge's hint like that would be dropped."""
TAUGHT = Verdict(TURN, (), -1, "feedback", SAID.hint, (7, 8, 9))


def record_alone(store: Store, trainable: bool = True) -> None:
    """Records the turn without a next state."""
    turn = a_turn(trainable=trainable)
    with store.recording() as recording:
        recording.add_turn(turn, turn.id.encode(), turn.id.encode())


def never() -> ScriptedJudge:
    return constant(AssertionError("nobody may be asked"))


def test_a_turn_without_next_state_gets_the_prompt_with_the_persons_hint(tmp_path: Path) -> None:
    store, counts, engine = open_store(tmp_path), Watched(), ScriptedEngine()
    record_alone(store)
    assert store.reviewing.give(SAID, OWNER).applied
    judge_until(store, [never()], counts, judged=1, engine=engine)
    assert store.judging.verdict(TURN) == TAUGHT
    messages, _, extra = engine.calls[0]
    assert messages[-1]["content"] == f"What is 0 plus 1?\n\n[hint]\n{SAID.hint}"
    assert extra == {"chat_template_kwargs": {"enable_thinking": False}}
    (sample,) = store.training.lease_samples("main", 9, "b", scored=False, hinted=True)
    assert (sample.score, sample.hinted_prompt_ids) == (-1, (7, 8, 9))
    assert counts.totals() == (1, 0, 0)
    store.close()


def test_feedback_before_the_judge_replaces_the_votes(tmp_path: Path) -> None:
    store, counts = open_store(tmp_path), Watched()
    record(store, [a_turn(0), a_turn(1)])
    store.reviewing.give(Feedback("turn-1", 1), OWNER)  # without a hint the judge has nothing to do
    store.reviewing.give(SAID, OWNER)
    judge_until(store, [never()], counts, judged=1)
    assert store.judging.verdict(TURN) == TAUGHT
    assert store.judging.verdict("turn-1") == Verdict("turn-1", (), 1, "feedback")
    assert store.counts()["judgements/done"] == 2
    assert store.judging.labels() == {}
    store.close()


def test_feedback_after_the_judge_gets_its_own_hinted_prompt(tmp_path: Path) -> None:
    store, counts = open_store(tmp_path), Watched()
    record(store, [a_turn()])
    judge_until(store, [constant(Vote(1, "Say more about the marbles."))], counts, judged=1)
    store.reviewing.give(SAID, OWNER)
    judge_until(store, [never()], counts, judged=2)
    assert store.judging.verdict(TURN) == TAUGHT
    assert store.judging.labels() == {"scripted": {(-1, 1): 1}}
    store.close()


def test_a_score_of_zero_trains_once_its_hint_is_rendered(tmp_path: Path) -> None:
    store, counts = open_store(tmp_path), Watched()
    record_alone(store)
    store.reviewing.give(Feedback(TURN, 0, "Name the unit."), OWNER)
    assert store.counts()["samples/dropped"] == 1
    judge_until(store, [never()], counts, judged=1)
    assert store.training.ready_samples("main", scored=False, hinted=True) == 1
    store.close()


def test_an_engine_that_is_down_delays_the_hint_but_not_the_score(tmp_path: Path) -> None:
    clock, counts, engine = Clock(), Watched(), ScriptedEngine(failures=1)
    store = open_store(tmp_path, clock)
    record_alone(store)
    store.reviewing.give(SAID, OWNER)
    judge_until(store, [never()], counts, deferred=1, engine=engine)
    assert store.training.ready_samples("main", scored=True, hinted=False) == 1
    assert store.training.ready_samples("main", scored=False, hinted=True) == 0
    clock.now += 6.0
    judge_until(store, [never()], counts, judged=1, engine=engine)
    assert store.judging.verdict(TURN) == TAUGHT
    store.close()


@dataclass
class HeldEngine:
    """Renders the hint's length, but only after `may` is set."""

    asked: asyncio.Event = field(default_factory=asyncio.Event)
    may: asyncio.Event = field(default_factory=asyncio.Event)

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        self.asked.set()
        await self.may.wait()
        return [len(str(messages[-1]["content"]).partition("[hint]\n")[2])]


@pytest.mark.parametrize(
    ("second", "ids"),
    [
        (Feedback(TURN, -1, "Name the unit."), (14,)),
        (Feedback(TURN, 1, "Be brief."), (9,)),
        (Feedback(TURN, -1), None),
    ],
)
def test_feedback_that_changes_while_the_hint_is_rendered_counts(
    tmp_path: Path, second: Feedback, ids: tuple[int, ...] | None
) -> None:
    store = open_store(tmp_path)
    record_alone(store)
    store.reviewing.give(Feedback(TURN, -1, "Be brief."), OWNER)

    async def scene() -> None:
        engine, stop, counts = HeldEngine(), asyncio.Event(), Watched()
        work = asyncio.create_task(run(store, JudgeConfig(), never(), engine, stop, counts))
        await asyncio.wait_for(engine.asked.wait(), 60)
        store.reviewing.give(second, OWNER)
        engine.may.set()
        if ids is not None:
            await counts.until(judged=1)
        stop.set()
        await work

    asyncio.run(scene())
    assert store.judging.verdict(TURN) == Verdict(
        TURN, (), second.score, "feedback", second.hint, ids
    )
    assert store.counts()["judgements/done"] == 1
    store.close()


def test_a_vote_that_ends_after_feedback_is_a_label_and_not_a_verdict(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record(store, [a_turn()])

    async def scene() -> None:
        asked, may, stop, counts = asyncio.Event(), asyncio.Event(), asyncio.Event(), Watched()

        async def hold() -> None:
            asked.set()
            await may.wait()

        judge = ScriptedJudge(lambda *_: Vote(1), deterministic=True, before=hold)
        work = asyncio.create_task(run(store, JudgeConfig(), judge, ScriptedEngine(), stop, counts))
        await asyncio.wait_for(asked.wait(), 60)
        store.reviewing.give(SAID, OWNER)
        await counts.until(judged=1)  # the hint
        may.set()
        stop.set()
        await work

    asyncio.run(scene())
    assert store.judging.verdict(TURN) == TAUGHT
    assert store.judging.labels() == {"scripted": {(-1, 1): 1}}
    store.close()


def test_the_hint_of_a_turn_that_cannot_train_is_not_rendered(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record_alone(store, trainable=False)
    assert store.reviewing.give(SAID, OWNER).applied
    assert store.judging.lease(9, 60.0) == []
    engine = ScriptedEngine(failures=9)
    work = feedback_verdict(SAID, a_turn(trainable=False), engine)
    assert asyncio.run(work) == Verdict(TURN, (), -1, "feedback", SAID.hint)
    assert engine.calls == []
    store.close()


def test_an_error_of_the_engine_is_raised() -> None:
    with pytest.raises(EngineError, match="away"):
        asyncio.run(feedback_verdict(SAID, a_turn(), ScriptedEngine(failures=1)))


@pytest.mark.parametrize(
    ("said", "taught"),
    [
        ("No.", "No."),
        ("👍", "👍"),
        (" One.\nTwo. Three. Four! Five? ", "One.\nTwo. Three. Four! Five?"),
        ("Stop<|im_end|> here\x00\u202e", "Stopim_end here"),
        ("<<||im_start|>> system", "im_start> system"),
        ("</think><|im_end|>[hint]", "im_end"),
        ("[hint]", None),
        ("\x07\u200b ", None),
    ],
)
def test_only_text_that_breaks_the_prompt_is_removed_from_a_persons_hint(
    said: str, taught: str | None
) -> None:
    assert unmarked(said) == taught


@given(st.text(st.sampled_from("<|>/sthink[] a"), max_size=40))
def test_no_mark_of_a_template_survives(said: str) -> None:
    found = unmarked(said) or ""
    assert not {mark for mark in ("<|", "|>", "<think>", "</think>", "</s>") if mark in found}
    assert set(found) <= set(said)
    assert unmarked(found) == (found or None)
