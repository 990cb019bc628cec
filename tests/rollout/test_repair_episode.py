"""A repair through the runner and a real proxy: what the store has of it, and what trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from judge.groups import settle_over
from nextstate.episodes import Split
from nextstate.store import Store
from plugins.environments.repair import create
from plugins.environments.repair_tasks import task
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, both
from tests.rollout.machine import needs_pytest
from tests.rollout.test_runner import PLAN, play
from tests.scripted_engine import Script, ScriptedEngine

pytestmark = [needs_pytest, pytest.mark.processes]


def test_a_repaired_and_an_unrepaired_package_are_a_group_that_trains(
    store: Store, tmp_path: Path
) -> None:
    fields, answers = task("off-by-one", "train", 0)
    given = Task(fields.pop("id"), Split(fields.pop("split")), fields)
    kind = create(None)
    kind.check_task(fields)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += [Script((answer, "\n")) for answer in (*answers, "test", "submit")]
        plan = replace(PLAN, environment="repair", group_size=2, parallel=1)
        repaired, left = await play(p, kind, plan, [given])
        assert (repaired.outcome, repaired.calls) == (1.0, 4)
        assert (left.outcome, left.calls) == (0.0, 2)
        rewards = [one.value for one in store.episodes.rewards(repaired.episode)]
        assert rewards[0] == rewards[2] == 0.0, "who looks makes nothing better"
        assert rewards[1] > 0, "the edit does"
        (shown, *_), *_, (last, *_) = [
            store.turns.next_states(turn) for turn in store.episodes.turn_ids(repaired.episode)
        ]
        assert "1:def " in shown.text
        assert last.text.startswith("Submitted.\n")
        assert "passed" in last.text
        settle_over(store, 0, judging_s=-1)  # nobody judges here
        assert store.counts()["samples/ready"] == 6

    both(test, store, tmp_path)
