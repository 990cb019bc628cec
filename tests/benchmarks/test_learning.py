"""The benchmark of learning in short: a loop without servers, the same each time."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import learning
from benchmarks.learning_loop import Plan, Point, Run
from demo.course import LEARNER
from learner import evaluator
from learner.config import LearnerConfig


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """To canaries: they would take a third of the time, and decide nothing here."""
    monkeypatch.setattr(evaluator, "REPLY_TOKENS", 8)


PLAN = Plan(LearnerConfig(**{**LEARNER, "epochs": 1, "batch_size": 4}), updates=1, questions=4)


def test_a_run_is_a_function_of_its_plan():
    first, again = learning.run(PLAN), learning.run(PLAN)
    assert first == again
    assert [point.update for point in first.points] == [0, 1]
    assert first.made == 1
    assert first.turns >= 4
    assert (first.rejected, first.rejected_served) == ([], 0)


def test_a_version_that_the_gate_rejects_is_counted_and_never_answers():
    strict = replace(PLAN.config, gate_weight_change=1e-9)
    found = learning.run(replace(PLAN, config=strict))
    assert found.made == len(found.rejected) > 0
    assert found.rejected_served == 0


def test_recorded_runs_are_shown_by_what_distinguishes_them(tmp_path):
    run = Run([Point(0, 0.25, 1.0, 0.5), Point(1, 0.5, 0.9, 0.5)], turns=32, made=1)
    better = Run([Point(0, 0.25, 1.0, 0.5), Point(1, 0.75, 1.0, 0.25)], turns=32, made=1)
    file = tmp_path / "runs.jsonl"
    wrong = replace(PLAN, flipped=0.2)
    lines = [(PLAN, run), (PLAN, better), (wrong, run)]
    file.write_text(
        "".join(json.dumps({"set": ["a=1"], **asdict(p), **asdict(r)}) + "\n" for p, r in lines)
    )
    found = learning.read([file])
    assert found == {"combined, a=1": [run, better], "combined, a=1, 20% flipped": [run]}
    columns = {str(c.header): list(c.cells) for c in learning.table(found).columns}
    assert columns["1"] == ["0.62 (0.50) 0.95", "0.50 (0.50) 0.90"]
    assert columns["right elsewhere"] == ["-0.125 (-0.250)", "+0.000 (+0.000)"]
