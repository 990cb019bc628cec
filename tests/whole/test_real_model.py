"""The whole loop with SmolLM2-135M-Instruct: a bad version is withdrawn, and a judge is trained.

`make soak` runs these tests, in this order; the model is downloaded where it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from demo import smollm2
from demo.course import MODEL
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import BASE_KAPPA, HELD_OUT, KAPPA, judge_versions
from nextstate.engine.process import free_port
from plugins.judges.rules_training import read_phrases
from tests.running_loop import Loop, run, write_config
from tests.whole.withdrawal import complain_until_withdrawn

pytestmark = [pytest.mark.engine, pytest.mark.soak, pytest.mark.timeout(7200)]

PHRASES = 300
EVALUATED = 30
"""Of them; vLLM reads each twice."""


@pytest.fixture(scope="module")
def real_loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """`nextstate up` with the real model."""
    port, folder = free_port(), tmp_path_factory.mktemp("real")
    config = write_config(folder, port=port, policy=smollm2.fetch(), context=2048)
    # One pass over the default 8192 tokens takes minutes and 22 GB; the conversations are short.
    # What an update learns does not matter here.
    shorter = "[learner]\nmicro_batch_tokens = 2048\nepochs = 1\n"
    config.write_text(config.read_text().replace("[learner]\n", shorter))
    started = Loop(config, port)
    try:
        started.wait_ready(within_s=1800)
        yield started
    finally:
        started.close()


def short_reactions() -> list[str]:
    """Labelled next states as JSON: what English speakers say in a few words, and nothing else."""
    english = [one for one in read_phrases()[0] if one.language == "en"]
    by_label = [[one.text for one in english if one.label == label] for label in (1, -1, 0)]
    mixed = [
        (label, text)
        for texts in zip(*by_label, strict=False)
        for label, text in zip((1, -1, 0), texts, strict=True)
    ]
    rivers = cycle(["Nile", "Rhine", "Amazon", "Danube", "Volga", "Niger", "Loire"])
    return [
        json.dumps(
            {
                "id": f"phrase {number}",
                "tail": [["user", f"Name river {number}."]],
                "reply": f"The {river} is one.",
                "next_states": [{"source": "user", "text": text}],
                "label": label,
            }
        )
        for number, (river, (label, text)) in enumerate(
            zip(rivers, islice(mixed, PHRASES), strict=False)
        )
    ]


def test_a_version_that_people_complain_about_is_withdrawn(real_loop: Loop) -> None:
    complained_about, serving = complain_until_withdrawn(real_loop, MODEL, within_s=3600)
    assert serving < complained_about
    assert "the mean score fell by" in real_loop.command("versions", str(complained_about))


def test_a_judge_is_trained_and_votes_through_vllm(real_loop: Loop, tmp_path: Path) -> None:
    file, config = tmp_path / "reactions.jsonl", tmp_path / "nextstate.toml"
    file.write_text("\n".join(short_reactions()))
    # vLLM reads eight turns' votes in one step, which is slow with an adapter on a CPU.
    patient = 'kind = "engine"\ntimeout_s = 600'
    config.write_text(real_loop.config.read_text().replace('kind = "rules"', patient))
    wanted = (str(file), "--examples", str(PHRASES), "--epochs", "5", "--config", str(config))
    trained = run("judge", "train", *wanted, timeout_s=5400)
    print(trained.stdout, trained.stderr)
    assert trained.returncode == 0
    (version,) = judge_versions(Settings.read(config))
    worth = version.metrics
    print(f"κ {worth[KAPPA]:.2f}, the base {worth[BASE_KAPPA]:.2f}, on {worth[HELD_OUT]:.0f}")
    assert worth[KAPPA] > 0.4
    file.write_text("\n".join(short_reactions()[:EVALUATED]))
    evaluated = run("judge", "eval", str(file), "--config", str(config), timeout_s=3600)
    print(evaluated.stdout)
    assert "votes of engine v1\n" in evaluated.stdout
    row = next(line for line in evaluated.stdout.splitlines() if line.startswith("all")).split()
    assert float(row[3]) > 0.4
