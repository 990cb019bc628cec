"""Log-probabilities under a sampler: numbers worked by hand, and Hugging Face's own processors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from learner import likelihood
from learner.divergence import Head
from learner.likelihood import completion_logprobs, log_kept
from learner.tensors import place
from nextstate.sampling import Sampling
from tests.learner.test_tiny_model import sample

P = (0.5, 0.3, 0.15, 0.05)


def kept(min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0, drawn: int = 0) -> float:
    """M over `P`."""
    column = torch.tensor([[0.0]], dtype=torch.float64)
    logprobs = torch.tensor([P], dtype=torch.float64).log()
    found = log_kept(
        logprobs, column + min_p, column.long() + top_k, column + top_p, torch.tensor([drawn])
    )
    return found.exp().item()


@pytest.mark.parametrize(
    ("settings_", "mass"),
    [
        ({}, 1.0),
        ({"top_p": 0.7}, 0.8),  # 0.5 is not enough, 0.5 + 0.3 is
        ({"top_p": 0.45}, 0.5),
        ({"top_p": 0.7, "drawn": 3}, 0.85),  # the drawn token is let in
        ({"top_k": 3}, 0.95),
        ({"min_p": 0.4}, 0.8),  # at least 0.4 · 0.5 = 0.2
        ({"top_k": 2, "top_p": 0.6}, 0.5),  # of 0.8 that is left, 0.6 is 0.48
        ({"min_p": 0.2, "top_p": 0.9}, 0.95),  # of 0.95 that is left, 0.9 is 0.855
        ({"top_k": 99, "top_p": 1e-9}, 0.5),
    ],
)
def test_the_mass_that_a_truncation_keeps(settings_: dict[str, Any], mass: float) -> None:
    assert kept(**settings_) == pytest.approx(mass, abs=1e-12)


def test_a_truncated_turn_has_the_ratio_1_and_no_gradient_for_a_constant_advantage() -> None:
    """With p = P and top-p 0.7 the sampler draws token 0 with 5/8 and token 1 with 3/8.

    The mean of ∇ log(p/M) over them is 0. That of ∇ log p is ∇ log M: for the logit of token 0 it
    is 5/8 - 1/2, and each token that is never drawn would be pushed by its probability.
    """
    logits = torch.tensor(P, dtype=torch.float64).log().requires_grad_()
    column = torch.ones(1, 1, dtype=torch.float64)

    def gradients(drawn: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        logprobs = logits.log_softmax(-1)
        mass = log_kept(
            logprobs[None], 0 * column, 0 * column.long(), 0.7 * column, torch.tensor([drawn])
        )
        sampled = logprobs[drawn] - mass[0]
        (ours,) = torch.autograd.grad(sampled, logits, retain_graph=True)
        (whole,) = torch.autograd.grad(logprobs[drawn], logits)
        return ours, whole, sampled.exp().item()

    (ours_0, whole_0, p_0), (ours_1, whole_1, p_1) = gradients(0), gradients(1)
    assert (p_0, p_1) == pytest.approx((0.625, 0.375))
    assert (p_0 * ours_0 + p_1 * ours_1).abs().max() < 1e-12
    biased = p_0 * whole_0 + p_1 * whole_1
    assert biased.tolist() == pytest.approx([0.125, 0.075, -0.15, -0.05])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-12, 12), min_size=5, max_size=40, unique=True),
    st.floats(0.05, 1.0),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_an_edge_that_lies_far_down_is_found_like_one_among_the_likeliest(
    logits: list[float], top_p: float, top_k: int, min_p: float
) -> None:
    column = torch.ones(1, 1, dtype=torch.float64)
    logprobs = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    given_ = (min_p * column, top_k * column.long(), top_p * column, logprobs.argmax(-1))
    expected = log_kept(logprobs, *given_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_LOOKED_AT", 2)
        assert log_kept(logprobs, *given_).item() == pytest.approx(expected.item(), abs=1e-12)
    lowest = math.log(max(top_p if not (top_k or min_p) else 0.0, 1e-300))
    assert lowest - 1e-9 <= expected.item() <= 0.0  # top-p alone keeps at least its share


VOCABULARY, WIDTH = 1500, 8
PROMPT, REPLY = (3, 5, 3, 900), (7, 3, 7, 7, 11, 1200)


class _Output:
    """The penalties of OpenAI's API, which transformers lacks."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for token in set(ids[0, len(PROMPT) :].tolist()):
            count = int((ids[0, len(PROMPT) :] == token).sum())
            scores[0, token] -= self.presence + self.frequency * count
        return scores


CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "hot": ({"temperature": 1.6}, [TemperatureLogitsWarper(1.6)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top-k": ({"top_k": 20}, [TopKLogitsWarper(20)]),
    "min-p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "Qwen3's": (
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ),
    "repetition": ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
    "presence": ({"presence_penalty": 0.8}, [_Output(0.8, 0)]),
    "frequency": ({"frequency_penalty": -0.6}, [_Output(0, -0.6)]),
    "bias": ({"logit_bias": {"7": 2.5}}, [SequenceBiasLogitsProcessor([[[7], 2.5]])]),
    "all": (
        {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.3},
        [
            RepetitionPenaltyLogitsProcessor(1.1),
            _Output(0.3, 0),
            TemperatureLogitsWarper(0.9),
            TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_setting_equals_hugging_faces_processors(case: str) -> None:
    torch.manual_seed(3)
    asked, processors = CASES[case]
    plain = sample(prompt=PROMPT, reply=REPLY)
    shaped = replace(plain, sampling=Sampling.read(asked), session="other")
    # Among the likeliest tokens, so that the sampler could have drawn them.
    states = torch.randn(2, len(PROMPT) + len(REPLY), WIDTH, dtype=torch.float64)
    states[1] = states[0]
    head = Head(torch.randn(VOCABULARY, WIDTH, dtype=torch.float64), None)
    for at, token in enumerate(REPLY, len(PROMPT) - 1):
        head.weight[token] += states[0, at]
    found = completion_logprobs(states, head, place([[plain], [shaped]]))
    raw = (states[0] @ head.weight.T)[None]
    ids = torch.tensor([PROMPT + REPLY])
    for step, token in enumerate(REPLY):
        before = len(PROMPT) + step
        scores = LogitsProcessorList(processors)(ids[:, :before], raw[:, before - 1].clone())
        expected = scores.log_softmax(-1)[0, token].item()
        if expected > -math.inf:
            assert found.sampled[1, step].item() == pytest.approx(expected, abs=1e-9)
        unshaped = raw[0, before - 1].log_softmax(-1)[token].item()
        assert found.raw[1, step].item() == pytest.approx(unshaped, abs=1e-9)
        assert found.sampled[0, step].item() == pytest.approx(unshaped, abs=1e-9)
    assert (found.sampled[1] - found.raw[1]).abs().max() > 1e-3


def test_a_greedy_turn_is_read_at_temperature_1_with_its_penalties() -> None:
    greedy = Sampling.read({"temperature": 0, "top_p": 0.1, "presence_penalty": 1.0})
    assert (greedy.divisor, greedy.truncates, greedy.edits_logits) == (1.0, False, True)
    assert Sampling.read({"temperature": 0.001}).divisor == 0.01
