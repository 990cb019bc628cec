"""The whole loop with SmolLM2-135M-Instruct: its judge is trained and votes, the watch withdraws.

`make soak` runs these tests; the model is downloaded where it is missing. They go on from each
other.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from demo import smollm2
from demo.course import MODEL
from judge.evaluation import LABELLED
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import BASE_KAPPA, HELD_OUT, KAPPA, judge_versions
from nextstate.engine.process import free_port
from tests.running_loop import Loop, run, write_config
from tests.whole.withdrawal import complain_until_withdrawn

pytestmark = [pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def real_loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """`nextstate up` with the real model, whose own judge, trained before, judges every turn."""
    port, folder = free_port(), tmp_path_factory.mktemp("real")
    config = write_config(folder, port=port, policy=smollm2.fetch(), context=2048)
    text = config.read_text().replace('kind = "rules"', 'kind = "engine"\nshare = 1.0')
    config.write_text(text)
    trained = run("judge", "train", "--config", str(config), timeout_s=5400)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    started = Loop(config, port)
    try:
        started.wait_ready()
        yield started
    finally:
        started.close()


def test_training_makes_a_judge_that_agrees_more_with_people(real_loop: Loop) -> None:
    (version,) = judge_versions(Settings.read(real_loop.config))
    worth = version.metrics
    print(f"κ {worth[KAPPA]:.2f}, the base {worth[BASE_KAPPA]:.2f}, on {worth[HELD_OUT]:.0f}")
    assert worth[KAPPA] > max(0.2, worth[BASE_KAPPA])


def test_the_trained_judge_votes_through_vllm(real_loop: Loop) -> None:
    printed = real_loop.command("judge", "eval", str(LABELLED), "--split", "test")
    print(printed)
    assert "votes of engine v1\n" in printed
    row = next(line for line in printed.splitlines() if line.startswith("all")).split()
    assert float(row[3]) > 0.2


def test_a_version_that_people_complain_about_is_withdrawn(real_loop: Loop) -> None:
    complained_about, serving = complain_until_withdrawn(real_loop, MODEL, within_s=3600)
    assert serving < complained_about
    assert "the mean score fell by" in real_loop.command("versions", str(complained_about))
    judges = {turn["verdict"]["judge"] for turn in real_loop.turns() if turn["verdict"]}
    assert judges == {"engine v1"}
