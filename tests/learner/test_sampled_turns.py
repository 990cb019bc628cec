"""An update on turns that were drawn with temperature, penalties and truncation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.metrics import TokenStats, raw_drift
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.errors import LearnerError
from nextstate.records import Sample
from nextstate.sampling import PLAIN, Sampling
from tests.hugging_face_sampling import expected
from tests.learner.test_tiny_model import CONFIG, PROMPT, sample, save_tiny_model

USUAL = Sampling(temperature=0.7, top_p=0.8, top_k=20)
SETTINGS: dict[str, Sampling] = {
    "Qwen3's": USUAL,
    "penalties": Sampling(temperature=0.7, repetition_penalty=1.2, presence_penalty=0.5),
    "greedy": Sampling(temperature=0.0, top_p=0.1),
    "top-p at temperature 1": Sampling(top_p=0.8),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def drawn(model_path: str, sampling: Sampling, told: Sampling | None = None) -> list[Sample]:
    """Four turns whose tokens are likely ones, as an engine that `told` samples would tell them."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    samples = []
    for row in range(4):
        prompt, reply = (*PROMPT, 30 + row), list[int]()
        for step in range(5):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *reply]])).logits[0, -1]
            reply.append(int(logits.topk(2).indices[(row + step) % 2]))
        bare = replace(sample(str(row), prompt=prompt, reply=reply), session=str(row))
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *reply]])).logits[0]
        as_told = replace(bare, sampling=told or sampling, score=(1, -1)[row % 2])
        behaviour = tuple(expected(logits, as_told))
        samples.append(replace(as_told, behaviour_logprobs=behaviour, sampling=sampling))
    # What the sampler would have left out it cannot have drawn.
    return [s for s in samples if min(s.behaviour_logprobs) > -1e4]


def trainer_for(model_path: str, folder: Path, **changes: Any) -> PolicyTrainer:
    return build_trainer(replace(CONFIG, method="binary", **changes), model_path, folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_engine_and_learner_agree_and_the_ratio_is_1(
    model_path: str, tmp_path: Path, name: str
) -> None:
    samples = drawn(model_path, SETTINGS[name])
    assert len(samples) >= 2
    result = trainer_for(model_path, tmp_path).update(samples, {0: 0})
    assert result.metrics["drift/mean"] < 1e-5
    assert result.metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert result.metrics["kl/base"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["step/kl"] > 0


def test_the_gradient_is_that_of_the_distribution_that_was_sampled(
    model_path: str, tmp_path: Path
) -> None:
    """With unchanged weights it is -score · ∇ log(p / M), a mean over tokens, then over turns."""
    samples = drawn(model_path, USUAL)
    trainer = trainer_for(model_path, tmp_path)
    names = [name for name, _ in trainer.policy.named_parameters() if "lora_B" in name]
    trainer.gradient(samples, {0: 0})
    found = {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if n in names}
    trainer.model.zero_grad()
    loss = torch.zeros(())
    for one in samples:
        ids, start = [*one.prompt_ids, *one.completion_ids], len(one.prompt_ids)
        logits = trainer.policy(torch.tensor([ids])).logits[0, start - 1 : -1] / 0.7
        probabilities = logits.softmax(-1)
        kept = torch.zeros_like(probabilities, dtype=torch.bool)
        for row, by in enumerate(probabilities.detach()):
            order = by.argsort(descending=True)[:20]
            share = by[order] / by[order].sum()
            kept[row, order[share.cumsum(0) - share < 0.8]] = True
        reply = torch.tensor(one.completion_ids)[:, None]
        assert kept.gather(-1, reply).all()
        p = probabilities.gather(-1, reply).squeeze(-1)
        mass = (probabilities * kept).sum(-1)
        assert (mass < 0.99).any()
        loss = loss - one.score * (p / mass).log().mean() / len(samples)
    loss.backward()
    for name, weight in trainer.policy.named_parameters():
        if name in names:
            assert torch.allclose(found[name], weight.grad, atol=1e-5)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3


@pytest.mark.parametrize("name", ["Qwen3's", "penalties", "top-p at temperature 1"])
def test_raw_log_probs_of_shaped_turns_are_named_and_never_trained_on(
    model_path: str, tmp_path: Path, name: str
) -> None:
    samples = drawn(model_path, SETTINGS[name], told=PLAIN)
    trainer = trainer_for(model_path, tmp_path, drift_limit=99.0)  # the size of it does not matter
    with pytest.raises(LearnerError, match="--logprobs-mode processed_logprobs"):
        trainer.update(samples, {0: 0})


def test_defaults_that_the_engine_does_not_use_are_named(model_path: str, tmp_path: Path) -> None:
    other = replace(USUAL, temperature=1.3)
    with pytest.raises(LearnerError, match=r"generation_config\.json"):
        trainer_for(model_path, tmp_path).update(drawn(model_path, USUAL, told=other), {0: 0})


def stats(policy: list[float], raw: list[float], behaviour: list[float]) -> TokenStats:
    nothing, lags = torch.zeros(0), torch.zeros(len(policy), dtype=torch.long)
    told = (torch.tensor(x) for x in (policy, raw, behaviour))
    return TokenStats(*told, nothing, lags, nothing, None, None)


def test_rounding_does_not_make_right_log_probs_look_raw() -> None:
    policy, raw = [-1.0, -2.0, -0.5], [-1.2, -2.4, -0.6]  # 0.2, 0.4 and 0.1 apart
    assert raw_drift(stats(policy, raw, policy)) is None
    assert raw_drift(stats(policy, raw, raw)) == 0
    assert raw_drift(stats(policy, raw, [-1.09, -2.19, -0.54])) is None  # almost half-way
    assert raw_drift(stats(policy, policy, [-9.0, -9.0, -9.0])) is None  # plain: both are the same
