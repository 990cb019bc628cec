"""A user's words at the end of a task count for the steps that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge.config import JudgeConfig
from judge.credit import steps_meant, terms
from judge.stage import task_of
from nextstate.hooks import Evidence, load_plugin
from nextstate.records import Feedback, Json, NextState, Source, Verdict, Vote
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.judge.test_stage import ScriptedJudge, Watched, a_turn, judge_until, open_store

READ, REMOVE = ("read", "a/todo.md"), ("remove", "notes.txt")
CALLS = ['[calls read({"path": "a/todo.md"})]', '[calls remove({"path": "notes.txt"})]']


def calling(name: str, path: str) -> Json:
    function = {"name": name, "arguments": f'{{"path": "{path}"}}'}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Thanks, great!", []),
        ("Why did you delete notes.txt?", [1]),
        ("你为什么删除了notes.txt?", [1]),
        ("You should have looked at todo.md first, not at NOTES.", [0, 1]),
        ("Wrong path.", []),
        ("My folder is a mess now.", []),
    ],
)
def test_words_are_about_the_steps_whose_calls_they_name(said: str, meant: list[int]) -> None:
    assert steps_meant(said, CALLS, "Tidy up my folder") == meant


def test_a_name_from_the_request_does_not_point_at_a_step() -> None:
    assert steps_meant("notes.txt is gone!", CALLS, "Tidy up, but keep notes.txt") == []


def test_han_script_is_compared_by_pairs_of_characters() -> None:
    calls = ['[calls home({"name": "客厅窗帘"})]', '[calls home({"name": "卧室灯"})]']
    assert steps_meant("窗帘没关", calls, "太亮了") == [0]
    assert steps_meant("谢谢", calls, "太亮了") == []


@given(st.text(max_size=80), st.lists(st.text(max_size=40), max_size=5), st.text(max_size=40))
def test_every_meant_step_named_something_that_was_said(
    said: str, calls: list[str], request: str
) -> None:
    for position in steps_meant(said, calls, request):
        assert terms(calls[position]) & terms(said)


def test_a_task_is_what_came_after_the_users_last_message() -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Tidy up my folder"},
        calling(*READ),
        {"role": "tool", "content": "milk"},
    ]
    assert task_of({"messages": messages}) == ("Tidy up my folder", CALLS[:1])


def test_a_message_that_the_agent_wrote_does_not_begin_a_task() -> None:
    carrier = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> the time is ten"
    messages = [
        {"role": "user", "content": "Tidy up my folder"},
        calling(*READ),
        {"role": "tool", "content": "milk"},
        {"role": "user", "content": carrier},
    ]
    profile = load_plugin("agents", "openclaw", None)
    assert task_of({"messages": messages}, profile) == ("Tidy up my folder", CALLS[:1])


def record_task(store: Store, said: str) -> None:
    """Three turns: read, remove, and the reply that the user answers with `said`."""
    asked: Json = {"role": "user", "content": "Tidy up my folder"}
    history: list[Json] = [asked]
    replies = [calling(*READ), calling(*REMOVE), {"role": "assistant", "content": "All tidy."}]
    followed = [(Source.TOOL, "milk"), (Source.TOOL, "removed"), (Source.USER, said)]
    with store.recording() as recording:
        for number, (reply, (source, text)) in enumerate(zip(replies, followed, strict=True)):
            turn = a_turn(
                number,
                session="one",
                index=number,
                request={"messages": list(history)},
                reply=reply,
                parent=f"turn-{number - 1}" if number else None,
            )
            recording.add_turn(turn, turn.id.encode(), turn.id.encode())
            state = NextState(turn.id, source, text, 0.4 if source is Source.TOOL else 0.9)
            recording.add_next_states(turn.id, True, [state])
            history += [reply, {"role": "tool", "content": text}]


def angry(evidence: Evidence, _: int) -> Vote:
    """Votes -1 if the user complains, now or at the end of the task."""
    said = " ".join(s.text for s in (*evidence.next_states, *evidence.later))
    return Vote(-1 if "deleted" in said else 0)


def judged(store: Store, count: int) -> list[int | None]:
    counts = Watched()
    judge = ScriptedJudge(angry, deterministic=True)
    judge_until(store, [judge], counts, judged=count, config=JudgeConfig(parallel=1))
    verdicts = [store.judging.verdict(f"turn-{number}") for number in range(3)]
    return [verdict and verdict.score for verdict in verdicts]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def test_a_step_that_the_user_names_is_judged_anew_with_what_the_user_said(store: Store) -> None:
    record_task(store, "You deleted notes.txt, I needed it!")
    assert judged(store, 4) == [0, -1, -1]
    work = store.judging.judgement("turn-1")
    assert work is not None
    assert [state.text for state in work.later] == ["You deleted notes.txt, I needed it!"]
    assert store.counts()["verdicts/-1"] == 2
    assert store.counts()["samples/ready"] == 2
    assert store.judging.lease(9, 60.0) == []


def test_general_words_count_only_for_the_reply_that_they_answer(
    store: Store,
) -> None:
    record_task(store, "You deleted too much!")
    assert judged(store, 3) == [0, 0, -1]
    assert store.judging.lease(9, 60.0) == []


def test_the_earlier_steps_of_a_task_end_where_the_user_last_spoke(store: Store) -> None:
    record_task(store, "Thanks.")
    assert store.judging.earlier_steps("turn-2") == ["turn-1", "turn-0"]
    with store.recording() as recording:
        turn = a_turn(3, session="one", index=3, parent="turn-2")
        recording.add_turn(turn, b"3", b"3")
    assert store.judging.earlier_steps("turn-3") == []


def settle(
    store: Store,
    turn: str,
    score: int,
    *,
    task_end: str | None = None,
    meant: Sequence[str] = (),
) -> bool:
    verdict = Verdict(turn, (score,), score, "rules")
    return store.judging.settle_verdict(verdict, task_end=task_end, also_about=meant)


def lease_all(store: Store) -> Sequence[str]:
    return store.judging.lease(9, 60.0)


def test_a_step_under_judgement_while_its_task_ends_is_judged_once_more(store: Store) -> None:
    record_task(store, "You deleted notes.txt!")
    assert len(lease_all(store)) == 3
    assert settle(store, "turn-2", -1, meant=["turn-1"])
    assert settle(store, "turn-1", 0)  # an answer without knowing
    assert lease_all(store) == ["turn-1"]
    assert settle(store, "turn-1", -1, task_end="turn-2")
    verdict = store.judging.verdict("turn-1")
    assert verdict is not None
    assert verdict.score == -1
    assert lease_all(store) == []


def test_a_step_that_trained_or_that_a_person_judged_keeps_its_verdict(store: Store) -> None:
    record_task(store, "You deleted notes.txt and todo.md!")
    lease_all(store)
    store.reviewing.give(Feedback("turn-0", 1), OWNER)
    settle(store, "turn-1", 1)
    batch = store.training.lease_samples("main", 9, "batch", scored=True, hinted=False)
    assert {sample.turn for sample in batch} == {"turn-0", "turn-1"}
    settle(store, "turn-2", -1, meant=["turn-0", "turn-1"])
    assert lease_all(store) == []


def test_a_step_that_goes_into_training_while_it_is_judged_anew_keeps_its_verdict(
    store: Store,
) -> None:
    record_task(store, "You deleted notes.txt!")
    lease_all(store)
    settle(store, "turn-1", 1)
    settle(store, "turn-2", -1, meant=["turn-1"])
    assert lease_all(store) == ["turn-1"]
    store.training.lease_samples("main", 9, "batch", scored=True, hinted=False)
    assert not settle(store, "turn-1", -1, task_end="turn-2")
    verdict = store.judging.verdict("turn-1")
    assert verdict is not None
    assert verdict.score == 1
    assert store.counts()["judgements/done"] == 2
