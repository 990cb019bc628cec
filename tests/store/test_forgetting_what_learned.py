"""What learned from a turn, or is about to, when the turn is forgotten."""

from __future__ import annotations

import pytest

from nextstate.records import PolicyVersion, Verdict, VersionState
from nextstate.store import Store
from nextstate.store.forgetting import Wanted
from tests.store.test_forgetting import check, every_text, judge, record, said, train


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_judge_that_has_read_it_keeps_no_verdict_of_it(store: Store, at_the_end: bool) -> None:
    """Votes take seconds, and people forget what they have just said."""
    first = said(0, None)
    second, third = said(1, first), said(2, said(1, first))
    record(store, first, second, *([third] if at_the_end else []))
    if at_the_end:  # the third one's question ended the task of the first
        store.judging.settle_verdict(Verdict("turn_1", (1,), 1, "rules"), also_about=["turn_0"])
    work = store.judging.judgement("turn_0")
    assert work is not None
    assert bool(work.later) == at_the_end
    gone = third if at_the_end else second
    store.forgetting.forget(Wanted(turns=[gone.id]))
    hint = f"They said {gone.request['messages'][-1]['content']}."
    verdict = Verdict("turn_0", (-1,), -1, "model", hint, (9, 8))
    kept = store.judging.settle_verdict(verdict, task_end=work.task_end, read=work)
    assert not kept
    assert store.judging.verdict("turn_0") is None
    assert hint.encode() not in every_text(store)
    record(store, said(5, first))
    work = store.judging.judgement("turn_0")
    assert store.judging.settle_verdict(Verdict("turn_0", (1,), 1, "model"), read=work)
    check(store)


def test_a_version_that_failed_its_exam_and_gave_its_samples_back_is_withdrawn(
    store: Store,
) -> None:
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    store.training.hold_out("main", lambda _: False)
    store.training.lease_samples("main", 1, "b", scored=True, hinted=True)
    version = PolicyVersion("main", 1, 0, "/v1", "ff", 1, VersionState.CANDIDATE)
    store.versions.add(version, "b")
    assert store.versions.fail(version, "worse", give_back=[1])
    assert store.forgetting.forget(Wanted(turns=["turn_0"])).versions == {"main": (1,)}
    assert store.versions.set_serving("main", 1), "its adapter is there, so a person may choose it"
    plan = store.forgetting.plan(Wanted(turns=["turn_0"]))
    assert store.versions.set_serving("main", 0)
    assert store.forgetting.withdraw(plan)
    kept = store.versions.get("main", 1)
    assert kept is not None
    assert (kept.state, kept.path) == (VersionState.REJECTED, None)
    assert store.forgetting.forget(Wanted(turns=["turn_0"])).turns == ("turn_0", "turn_1")
    check(store)


def test_what_learned_from_a_turn_that_retention_took_is_withdrawn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextstate.store.retention.KEPT_JUDGED", 0)
    first = said(0, None)
    second = said(1, first)
    record(store, first, second)
    judge(store, first.id, second)
    assert train(store, 1, 0) == ["turn_0"]
    assert store.forgetting.unknown() == {}
    gone = store.retention.step(0, 1e12, "age").turns
    assert gone == ("turn_0", "turn_1")
    assert store.forgetting.unknown() == {"main": [1]}
    plan = store.forgetting.plan(Wanted(turns=["turn_0"]))
    assert (plan.turns, plan.versions) == ((), {"main": (1,)})
    assert store.forgetting.plan(Wanted(turns=["turn_9"])).is_empty
    assert store.versions.set_serving("main", 0)
    assert store.forgetting.withdraw(plan)
    assert store.forgetting.unknown() == {}
    done = store.forgetting.plan(Wanted(turns=["turn_0"]))
    assert (done.is_empty, done.learned) == (True, {"main": (1,)})
