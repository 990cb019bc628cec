"""The divergence from the teacher: numbers worked by hand, plain formulas, and its memory."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from learner.divergence import (
    CHUNK_TOKENS,
    Head,
    binned_logprobs,
    head_logits,
    head_of,
    reverse_kl,
    top_tokens,
    topk_divergence,
)
from learner.trainer import build_trainer
from tests.learner.test_tiny_model import CONFIG, PROMPT, VOCABULARY, sample, save_tiny_model

POLICY = (0.5, 0.25, 0.125, 0.125)
TEACHER = (0.25, 0.5, 0.125, 0.125)


def at(*probabilities: float) -> torch.Tensor:
    """A state (1, V) whose logits under `plain_head` are these log-probabilities."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def plain_head(size: int) -> Head:
    return Head(torch.eye(size, dtype=torch.float64), None)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        # Token 1 alone: 0.25 ln(0.25 / 0.5) + 0.75 ln(0.75 / 0.5)
        (1, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        # Tokens 1 and 0, and a last bin of 0.25 in both: 0.25 ln(1/2) + 0.5 ln 2 + 0
        (2, 0.25 * math.log(2)),
        (3, 0.25 * math.log(2)),
        (99, 0.25 * math.log(2)),
    ],
)
def test_the_divergence_is_the_kl_over_the_teachers_top_tokens_and_the_rest(k, expected):
    teacher = top_tokens(at(*TEACHER), plain_head(4), k)
    found = topk_divergence(at(*POLICY), plain_head(4), teacher)
    assert found.tolist() == pytest.approx([expected], abs=1e-12)
    assert teacher.logprobs.exp().sum(-1).tolist() == pytest.approx([1.0])


def test_the_tokens_compared_are_the_teachers_not_the_policys():
    assert top_tokens(at(*TEACHER), plain_head(4), 1).ids.tolist() == [[1]]


def test_the_last_bin_keeps_its_digits_where_the_top_token_is_nearly_certain():
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    rest = binned_logprobs(logits, torch.tensor([[0]]))[0, -1]
    assert rest.item() == pytest.approx(math.log(2) - 60.0)


def test_a_surer_teacher_is_the_same_one_at_a_lower_temperature():
    """Probabilities 1/2, 1/4, 1/8, 1/8 at temperature 1/2 are their squares over 11/32."""
    surer = top_tokens(at(0.5, 0.25, 0.125, 0.125), plain_head(4), 2, temperature=0.5)
    assert surer.logprobs.exp()[0].tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Gemma2Config, {"final_logit_softcapping": 0.5, "head_dim": 8}),
        (GraniteConfig, {"logits_scaling": 8.0}),
        (CohereConfig, {"logit_scale": 0.25}),
    ],
)
def test_models_that_change_their_logits_after_the_head_are_read_as_they_are(kind, settings):
    torch.manual_seed(0)
    config = kind(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state[0]
        expected = model(ids).logits[0].log_softmax(-1)[torch.arange(4), ids[0]]
        logits = head_logits(states, head_of(model))
        found = logits.log_softmax(-1)[torch.arange(4), ids[0]]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


LOGITS = st.lists(st.floats(-30, 30), min_size=6, max_size=6)


@given(LOGITS, LOGITS, st.integers(1, 8))
def test_fewer_bins_never_say_more_than_the_whole_kl(policy, teacher, k):
    policy, teacher = torch.tensor([[policy], [teacher]], dtype=torch.float64)
    found = topk_divergence(policy, plain_head(6), top_tokens(teacher, plain_head(6), k))
    whole = reverse_kl(policy.log_softmax(-1), teacher.log_softmax(-1))
    assert -1e-9 <= found.item() <= whole.item() + 1e-9


def random_places(tokens: int, *, width: int = 8, vocabulary: int = 1000) -> tuple[Any, ...]:
    """(policy's states, teacher's states, head) in double precision."""
    torch.manual_seed(0)
    states = torch.randn(2, tokens, width, dtype=torch.float64)
    head = Head(
        torch.randn(vocabulary, width, dtype=torch.float64),
        torch.randn(vocabulary, dtype=torch.float64),
    )
    return states[0].requires_grad_(), states[1], head


def test_value_and_gradient_equal_the_plain_formula_over_several_chunks():
    policy, teacher, head = random_places(2 * CHUNK_TOKENS + 3)
    found = topk_divergence(policy, head, top_tokens(teacher, head, 5))
    (gradient,) = torch.autograd.grad(found.square().sum(), policy)

    ours, theirs = ((s @ head.weight.T + head.bias).softmax(-1) for s in (policy, teacher))
    expected = torch.zeros(len(policy), dtype=torch.float64)
    for place in range(len(policy)):
        top = theirs[place].argsort(descending=True)[:5]
        p, q = ours[place][top], theirs[place][top]
        p_rest, q_rest = 1 - p.sum(), 1 - q.sum()
        expected[place] = (p * (p / q).log()).sum() + p_rest * (p_rest / q_rest).log()
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), policy)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


class LargestLogits(TorchDispatchMode):
    """The most tokens for which one tensor held a number for every entry of the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = 0
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self._vocabulary,):
                self.tokens = max(self.tokens, tensor.numel() // self._vocabulary)
        return made


def test_no_pass_holds_logits_of_more_than_one_chunk():
    policy, teacher, head = random_places(5 * CHUNK_TOKENS, vocabulary=1009)
    with LargestLogits(1009) as largest:
        topk_divergence(policy, head, top_tokens(teacher, head, 5)).sum().backward()
    assert largest.tokens == CHUNK_TOKENS
    with LargestLogits(1009) as largest:
        torch.nn.functional.linear(policy, head.weight).logsumexp(-1).sum().backward()
    assert largest.tokens == 5 * CHUNK_TOKENS, "the count sees what it must not find"


def test_a_whole_step_holds_logits_of_one_chunk_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.divergence.CHUNK_TOKENS", 48)
    monkeypatch.setattr("learner.likelihood.CHUNK_TOKENS", 48)
    model_path = save_tiny_model(tmp_path / "model", intermediate_size=48)
    config = replace(CONFIG, method="opd_topk", drift_limit=99.0)
    samples = [sample(str(i), reply=[10 + i] * 30, score=-1, hinted=[9, *PROMPT]) for i in range(4)]
    trainer = build_trainer(config, model_path, tmp_path)
    with LargestLogits(VOCABULARY) as largest:
        result = trainer.update(samples, {0: 0})
    assert result.metrics["kl/teacher"] > 0
    assert largest.tokens == 48  # of 120 that are trained, in 132 places


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    kept = {}
    for vocabulary in (500, 5000):
        policy, teacher, head = random_places(3 * CHUNK_TOKENS, vocabulary=vocabulary)
        top = top_tokens(teacher, head, 5)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes, head: Head = head) -> torch.Tensor:
            if tensor.data_ptr() not in (head.weight.data_ptr(), head.bias.data_ptr()):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            topk_divergence(policy, head, top)
        kept[vocabulary] = sum(sizes)
    assert kept[500] == kept[5000]
