"""The arithmetic behind the tables about engine and learner on one machine."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch

from benchmarks.asking import Answered, Clients
from benchmarks.beside import tokens
from benchmarks.drift import coarser, differences, figures
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.records import Sample
from tests.learner.test_tiny_model import CONFIG, save_tiny_model

SAMPLE = Sample("t", "s", 0, (5, 6), (7, 8, 9), (-1.0, -2.0, -3.0), 1, None)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> PolicyTrainer:
    model_path = save_tiny_model(tmp_path_factory.mktemp("model"))
    config = replace(CONFIG, device="cpu")
    return build_trainer(config, model_path, tmp_path_factory.mktemp("work"))


def policy_logprobs(trainer: PolicyTrainer) -> torch.Tensor:
    """The log-probs of SAMPLE's completion from a forward pass of its own."""
    ids = torch.tensor([[*SAMPLE.prompt_ids, *SAMPLE.completion_ids]])
    logits = trainer.policy.get_base_model()(ids).logits[0, 1:-1]
    return logits.log_softmax(-1).gather(1, ids[0, 2:, None])[:, 0].detach()


def test_tokens_of_a_time_are_counted_over_all_replies(tmp_path: Path) -> None:
    clients = Clients(0, "m")
    for times in ([1.0, 2.0, 3.0], [2.5, 3.5]):
        clients.replies.append(Answered(0, "t", "", 0.0, times, times[-1]))
    assert tokens(clients, 2.0, 3.0) == 2


def test_the_figures_are_those_of_sizes_and_of_ratios() -> None:
    found = figures(torch.tensor([0.0, log(2), -log(2), 0.0]))
    assert found[0] == "4"
    assert found[1] == f"{log(2) / 2:.4f}"
    assert found[3] == f"{log(2):.4f}"
    assert found[4] == f"{(1 + 2 + 0.5 + 1) / 4:.4f}"
    assert found[5] == "50.0%"


def test_a_difference_is_policy_minus_behaviour_of_each_token(trainer: PolicyTrainer) -> None:
    expected = policy_logprobs(trainer) - torch.tensor(SAMPLE.behaviour_logprobs)
    torch.testing.assert_close(differences(trainer, [SAMPLE]), expected, atol=1e-5, rtol=1e-5)


def test_a_mistake_changes_the_differences_and_ends_with_its_block(trainer: PolicyTrainer) -> None:
    plain = differences(trainer, [SAMPLE])
    with coarser(trainer, 4):
        rough = (differences(trainer, [SAMPLE]) - plain).abs().max()
    with coarser(trainer, 12):
        fine = (differences(trainer, [SAMPLE]) - plain).abs().max()
    assert 0 < fine < rough
    assert torch.equal(differences(trainer, [SAMPLE]), plain)
