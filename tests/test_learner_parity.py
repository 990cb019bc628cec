"""The trainer's loss and gradient against the formula, written out in double precision."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from learner.config import LearnerConfig, Method
from learner.trainer import PolicyTrainer, Update, build_trainer
from nextstate.records import Sample
from tests.test_learner_tiny import CONFIG, load_float64, logprobs, sample, save_tiny_model

WEIGHTS = {"binary": (1.0, 0.0), "opd": (0.0, 1.0), "combined": (1.0, 1.0)}


def off_policy_samples(model_path: str) -> list[Sample]:
    """Six samples of unequal lengths whose ratios reach both clips, the cap and 1."""
    base = load_float64(model_path)
    generator = torch.Generator().manual_seed(3)
    samples = []
    for row, shift in enumerate((-2.0, -0.3, 0.0, 0.1, 0.4, 1.9)):
        prompt = torch.randint(2, 64, (2 + row,), generator=generator).tolist()
        reply = torch.randint(2, 64, (7 - row,), generator=generator).tolist()
        hinted = torch.randint(2, 64, (9 - row,), generator=generator).tolist()
        with torch.no_grad():
            policy = logprobs(base, prompt, reply)
        noise = 0.1 * torch.randn(len(reply), generator=generator, dtype=torch.float64)
        behaviour = (policy - shift + noise).clamp(max=-1e-3)
        samples.append(
            sample(
                f"t{row}",
                prompt=prompt,
                reply=reply,
                behaviour=behaviour.tolist(),
                score=(1, -1, 0, 1, -1, -1)[row],
                hinted=hinted if row in (1, 2, 4) else None,
                version=-1,
            )
        )
    return samples


def written_out_loss(
    policy: torch.nn.Module, base: torch.nn.Module, samples: list[Sample], config: LearnerConfig
) -> torch.Tensor:
    """arXiv 2603.10165's combined loss with two-sided clipping, one sample at a time."""
    w_rl, w_opd = WEIGHTS[config.method]
    total = torch.zeros((), dtype=torch.float64)
    for s in samples:
        now = logprobs(policy, s.prompt_ids, s.completion_ids)
        behaviour = torch.tensor(s.behaviour_logprobs, dtype=torch.float64)
        advantage = torch.full_like(behaviour, w_rl * s.score)
        with torch.no_grad():
            reference = logprobs(base, s.prompt_ids, s.completion_ids)
            if s.hinted_prompt_ids is not None:
                teacher = logprobs(policy, s.hinted_prompt_ids, s.completion_ids)
                limit = config.teacher_gap_clip
                advantage += w_opd * (teacher - behaviour).clamp(-limit, limit)
        ratio = (now - behaviour).exp()
        clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
        surrogate = torch.minimum(
            ratio.clamp(max=config.ratio_cap) * advantage, clipped * advantage
        )
        kl = (reference - now).exp() - (reference - now) - 1
        total = total + (-surrogate + config.kl_coef * kl).mean()
    return total / len(samples)


def with_adapter(
    config: LearnerConfig, model_path: str, weights: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """The base with an adapter, in double precision."""
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    base = load_float64(model_path)
    policy = get_peft_model(base, lora, autocast_adapter_dtype=False).double().eval()
    set_peft_model_state_dict(policy, {n: v.double() for n, v in weights.items()})
    return policy


def trained_once(
    config: LearnerConfig, model_path: str, samples: list[Sample], work_dir
) -> tuple[PolicyTrainer, dict[str, torch.Tensor]]:
    """A trainer after one step from an adapter with an effect, and the step's gradients."""
    trainer = build_trainer(config, model_path, work_dir)
    torch.manual_seed(1)
    start = {n: 0.05 * torch.randn(v.shape) for n, v in trainer.adapter_weights().items()}
    trainer.load_adapter(start)
    gradients = {}

    def keep(name: str):
        def hook(gradient: torch.Tensor) -> None:
            gradients[name] = gradients.get(name, 0) + gradient.double()

        return hook

    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(keep(name))
    trainer.start = start
    trainer.train_on([Update(samples, version=0)])
    return trainer, gradients


@pytest.mark.parametrize("method", ["binary", "opd", "combined"])
@pytest.mark.parametrize("micro_batch_size", [16, 4])
def test_loss_and_gradient_equal_the_written_out_formula(
    tmp_path, method: Method, micro_batch_size: int
):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(CONFIG, method=method, micro_batch_size=micro_batch_size, kl_coef=0.3)
    samples = off_policy_samples(model_path)
    trainer, gradients = trained_once(config, model_path, samples, tmp_path)

    policy = with_adapter(config, model_path, trainer.start)
    loss = written_out_loss(policy, load_float64(model_path), samples, config)
    loss.backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}

    assert trainer.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert set(gradients) == set(expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-5 * norm, name
    assert trainer.metrics["grad/norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert trainer.metrics["ratio/max"] > config.ratio_cap


@pytest.mark.parametrize(("learning_rate", "shortened"), [(0.3, True), (1e-4, False)])
def test_a_step_changes_the_policy_by_no_more_than_it_may(tmp_path, learning_rate, shortened):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(CONFIG, learning_rate=learning_rate, step_kl=0.01, micro_batch_size=4)
    samples = off_policy_samples(model_path)
    trainer, _ = trained_once(config, model_path, samples, tmp_path)

    after = trainer.adapter_weights()
    moved = torch.stack([(after[n] - v).norm() for n, v in trainer.start.items()]).norm()
    differences = torch.cat(
        [
            logprobs(with_adapter(config, model_path, after), s.prompt_ids, s.completion_ids)
            - logprobs(
                with_adapter(config, model_path, trainer.start), s.prompt_ids, s.completion_ids
            )
            for s in samples
        ]
    ).detach()
    change = (differences.exp() - differences - 1).mean().item()

    assert trainer.metrics["step/kl"] == pytest.approx(change, rel=1e-2, abs=1e-6)
    assert 0 < change <= config.step_kl
    assert moved > 0
    assert (trainer.metrics["step/length"] < 1) == shortened
    if shortened:
        assert change > config.step_kl / 4, "no shorter than it has to be"
