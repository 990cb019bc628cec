"""The trainer's loss and gradient against the formula, written out in double precision."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from learner.batch import micro_batches, sequences_of
from learner.config import LearnerConfig, LossType, Method
from learner.trainer import PolicyTrainer, Update, build_trainer, step_bound
from nextstate.errors import ConfigError
from nextstate.records import Sample
from tests.learner.test_tiny_model import (
    CONFIG,
    distributions,
    load_float64,
    logprobs,
    sample,
    save_tiny_model,
)

WEIGHTS = {
    "binary": (1.0, 0.0, 0.0),
    "opd": (0.0, 1.0, 0.0),
    "combined": (1.0, 0.0, 1.0),
    "combined_sampled": (1.0, 1.0, 0.0),
    "opd_topk": (0.0, 0.0, 1.0),
}
STALE = replace(CONFIG, drift_limit=9.0)
"""Takes samples whose made-up log-probs no update could have moved so far."""
Level = Literal["token", "sequence"]


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


def conversation_samples(model_path: str) -> list[Sample]:
    """A conversation of three turns and a fork of it, among turns that stand alone."""
    base = load_float64(model_path)
    generator = torch.Generator().manual_seed(4)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 64, (count,), generator=generator).tolist()

    samples = off_policy_samples(model_path)[:4]
    history = tokens(3)
    for row, score in enumerate((1, -1, 1, -1)):
        reply = tokens(5 - row)
        with torch.no_grad():
            policy = logprobs(base, history, reply)
        shift = torch.randn(len(reply), generator=generator, dtype=torch.float64)
        samples.append(
            sample(
                f"c{row}",
                prompt=history,
                reply=reply,
                behaviour=(policy + 0.5 * shift).clamp(max=-1e-3).tolist(),
                score=score,
                hinted=[*tokens(2), *history] if row != 1 else None,
                version=-1,
            )
        )
        if row != 2:  # the last turn forks off the third
            history = [*history, *reply, *tokens(2)]
    return [replace(s, session=s.turn[0]) for s in samples]


def reverse_kl(policy: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """KL(policy ‖ teacher) (T,) over the teacher's top k and the rest, from log-probs (T, V)."""
    found = []
    for p, q in zip(policy.exp(), teacher.exp(), strict=True):
        top = q.argsort(descending=True)[:k]
        bins = [torch.cat([x[top], 1 - x[top].sum(0, keepdim=True)]) for x in (p, q)]
        found.append((bins[0] * (bins[0] / bins[1]).log()).sum())
    return torch.stack(found)


def policy_surrogate(
    config: LearnerConfig,
    now: torch.Tensor,
    ratio: torch.Tensor,
    turn_log_ratio: torch.Tensor,
    advantage: torch.Tensor,
) -> torch.Tensor:
    """What a turn's tokens (T,) are worth, with the constants that are TRL's defaults."""
    match config.loss_type:
        case "cispo":
            return ratio.detach().clamp(max=config.ratio_cap) * advantage * now
        case "sapo":  # temperatures 1 above 0 and 1.05 below
            tau = torch.where(advantage > 0, 1.0, 1.05)
            return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage
        case "vespo":  # e^λ w^k e^(−λw), w of the whole turn: k, λ are 2, 3 above 0 and 3, 2 below
            k = torch.where(advantage >= 0, 2.0, 3.0)
            rate = torch.where(advantage >= 0, 3.0, 2.0)
            w = turn_log_ratio.detach().exp()
            return (rate * (1 - w)).exp() * w**k * advantage * now
        case _:
            clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
            return torch.minimum(ratio.clamp(max=config.ratio_cap) * advantage, clipped * advantage)


def written_out_loss(
    policy: torch.nn.Module,
    base: torch.nn.Module,
    teacher: torch.nn.Module,
    samples: list[Sample],
    config: LearnerConfig,
) -> torch.Tensor:
    """arXiv 2603.10165's combined loss with two-sided clipping, one turn at a time."""
    w_rl, w_opd, w_topk = WEIGHTS[config.method]
    turns: list[torch.Tensor] = []
    for s in samples:
        now = logprobs(policy, s.prompt_ids, s.completion_ids)
        behaviour = torch.tensor(s.behaviour_logprobs, dtype=torch.float64)
        advantage = torch.full_like(behaviour, w_rl * s.score)
        distance = torch.zeros_like(behaviour)
        with torch.no_grad():
            reference = logprobs(base, s.prompt_ids, s.completion_ids)
        if s.hinted_prompt_ids is not None:
            with torch.no_grad():
                hinted = logprobs(teacher, s.hinted_prompt_ids, s.completion_ids)
                wanted = distributions(teacher, s.hinted_prompt_ids, s.completion_ids)
            limit = config.teacher_gap_clip
            advantage += w_opd * (hinted - behaviour).clamp(-limit, limit)
            ours = distributions(policy, s.prompt_ids, s.completion_ids)
            distance = reverse_kl(ours, wanted, config.topk)
        log_ratio = now - behaviour
        turn_log_ratio = log_ratio.sum()
        if config.importance_sampling_level == "sequence":
            log_ratio = log_ratio.mean().expand_as(log_ratio)
        ratio = log_ratio.exp()
        surrogate = policy_surrogate(config, now, ratio, turn_log_ratio, advantage)
        # Weighted by the ratio, as the reply was drawn from another policy: its gradient is then
        # that of KL(policy ‖ base), and no token that the policy has left makes it explode.
        kl = ratio * ((reference - now).exp() - (reference - now) - 1)
        turns.append(-surrogate + config.kl_coef * kl + w_topk * distance)
    match config.loss_type:
        case "grpo" | "sapo":
            return torch.stack([turn.mean() for turn in turns]).mean()
        case "luspo":
            return torch.stack([turn.sum() for turn in turns]).mean()
        case "bnpo" | "dapo" | "cispo" | "vespo":
            return torch.cat(turns).mean()
        case "dr_grpo":
            return torch.cat(turns).sum() / (256 * len(turns))


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
            gradients[name] = gradients.get(name, 0) + gradient.double().cpu()

        return hook

    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(keep(name))
    trainer.start = start
    trainer.train_on([Update(samples, version=0)])
    return trainer, gradients


def assert_parity(
    config: LearnerConfig, model_path: str, samples: list[Sample], work_dir: Path
) -> PolicyTrainer:
    """One step's loss and gradient are those of the formula."""
    trainer, gradients = trained_once(config, model_path, samples, work_dir)
    policy = with_adapter(config, model_path, trainer.start)
    base = load_float64(model_path)
    # The average teacher begins as the policy.
    teacher = base if config.teacher == "base" else policy
    loss = written_out_loss(policy, base, teacher, samples, config)
    loss.backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}

    assert trainer.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert set(gradients) == set(expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 2e-5 * norm, name
    assert trainer.metrics["grad/norm"] == pytest.approx(norm.item(), rel=1e-4)
    return trainer


@pytest.mark.parametrize("method", sorted(WEIGHTS))
@pytest.mark.parametrize("micro_batch_tokens", [1000, 40])
def test_loss_and_gradient_equal_the_written_out_formula(
    tmp_path: Path, method: Method, micro_batch_tokens: int
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        STALE, method=method, micro_batch_tokens=micro_batch_tokens, kl_coef=0.3, topk=4
    )
    trainer = assert_parity(config, model_path, off_policy_samples(model_path), tmp_path)
    assert trainer.metrics["ratio/max"] > config.ratio_cap
    assert ("kl/teacher" in trainer.metrics) == (WEIGHTS[method][2] > 0)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_losses_without_the_clip_bound_far_ratios_in_their_own_way(
    tmp_path: Path, loss_type: LossType
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, method="combined_sampled", loss_type=loss_type)
    trainer = assert_parity(config, model_path, off_policy_samples(model_path), tmp_path)
    assert trainer.metrics["ratio/max"] > config.ratio_cap


@pytest.mark.parametrize(
    ("loss_type", "method", "level"),
    [
        (loss_type, method, level)
        for loss_type in get_args(LossType)
        # The divergence has no importance ratio.
        for method, level in (
            ("combined_sampled", "token"),
            ("combined_sampled", "sequence"),
            ("combined", "token"),
        )
        if (loss_type, level) != ("vespo", "sequence")
    ],
)
def test_turns_that_share_a_sequence_count_as_if_each_were_alone(
    tmp_path: Path, loss_type: LossType, level: Level, method: Method
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        STALE,
        method=method,
        loss_type=loss_type,
        importance_sampling_level=level,
        micro_batch_tokens=50,
        kl_coef=0.3,
    )
    samples = conversation_samples(model_path)
    assert sorted(map(len, sequences_of(samples))) == [1, 1, 1, 1, 1, 3]
    assert_parity(config, model_path, samples, tmp_path)


def test_an_update_of_shared_sequences_measures_what_separate_ones_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, learning_rate=0.3, step_kl=0.01)
    samples = conversation_samples(model_path)
    together, _ = trained_once(config, model_path, samples, tmp_path)
    monkeypatch.setattr("learner.batch.sequences_of", lambda found: [[s] for s in found])
    apart, _ = trained_once(config, model_path, samples, tmp_path)
    for trainer in (together, apart):
        assert trainer.metrics.pop("step/seconds") > 0
    assert together.metrics == pytest.approx(apart.metrics, rel=1e-3, abs=1e-6)
    assert together.metrics["step/length"] < 1


def test_computing_activations_twice_changes_no_number(tmp_path: Path) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, method="opd_topk", gradient_checkpointing=True, topk=4)
    assert_parity(config, model_path, conversation_samples(model_path), tmp_path)


def test_the_base_as_teacher_reads_the_hint_without_the_adapter(tmp_path: Path) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    samples = off_policy_samples(model_path)
    gaps = []
    for teacher in ("policy", "base"):
        config = replace(STALE, method="opd", teacher=teacher)
        trainer = assert_parity(config, model_path, samples, tmp_path)
        gaps.append(trainer.metrics["teacher_gap/mean"])
    assert gaps[0] != pytest.approx(gaps[1], abs=1e-4)


def test_the_average_teacher_follows_the_policy_slowly(tmp_path: Path) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, method="opd", teacher="average", teacher_decay=0.75)
    samples = off_policy_samples(model_path)
    trainer = build_trainer(config, model_path, tmp_path)
    seen, averages, gaps = [], [], []

    def two_steps() -> Iterator[Update]:
        for _ in range(2):
            seen.append(trainer.adapter_weights())
            yield Update(samples, version=0)
            gaps.append(trainer.metrics["teacher_gap/mean"])
            averages.append([v.to("cpu", copy=True) for v in trainer.training_state()["average"]])
        seen.append(trainer.adapter_weights())

    trainer.train_on(two_steps())
    names = [
        name.replace(".default", "")
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    ]
    expected = dict(seen[0])
    for step, found in enumerate(averages):
        expected = {n: 0.75 * v + 0.25 * seen[step + 1][n] for n, v in expected.items()}
        for name, value in zip(names, found, strict=True):
            assert torch.allclose(value, expected[name], atol=1e-7), name
    assert not all(torch.allclose(v, seen[2][n]) for n, v in zip(names, averages[1], strict=True))

    # The second step's teacher was the average after the first, not the policy.
    after_one = dict(zip(names, averages[0], strict=True))
    clipped = []
    for weights in (after_one, seen[1]):
        teacher = with_adapter(config, model_path, weights)
        with torch.no_grad():
            clipped.append(
                torch.cat(
                    [
                        (
                            logprobs(teacher, s.hinted_prompt_ids, s.completion_ids)
                            - torch.tensor(s.behaviour_logprobs)
                        ).clamp(-config.teacher_gap_clip, config.teacher_gap_clip)
                        for s in samples
                        if s.hinted_prompt_ids is not None
                    ]
                ).mean()
            )
    assert gaps[1] == pytest.approx(clipped[0].item(), abs=1e-5)
    assert abs(clipped[0] - clipped[1]) > 1e-4


def test_a_model_that_scales_its_logits_has_no_divergence_from_its_teacher(tmp_path: Path) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace("{", '{"final_logit_softcapping": 30.0,', 1))
    for method, instead in (("opd_topk", "opd"), ("combined", "combined_sampled")):
        expected = rf"'{method}'.*final_logit_softcapping = 30\.0.*set it to '{instead}'"
        with pytest.raises(ConfigError, match=expected):
            build_trainer(replace(CONFIG, method=method), model_path, tmp_path)


@pytest.mark.parametrize(("learning_rate", "shortened"), [(0.3, True), (1e-4, False)])
def test_an_update_changes_the_policy_by_no_more_than_it_may(tmp_path, learning_rate, shortened):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        CONFIG,
        learning_rate=learning_rate,
        epochs=2,
        step_kl=0.01,
        micro_batch_tokens=40,
        drift_limit=9,
    )
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
    assert trainer.metrics["step/epochs"] == (1 if shortened else 2), "none where it is reached"
    if shortened:
        assert change > config.step_kl / 4, "no shorter than it has to be"


@pytest.mark.parametrize(
    ("scores", "share"),
    [([-1, -1], 1.0), ([1, -1], 1.0), ([0, 0], 1.0), ([1, 1, 1, -1], 0.5), ([1, 1], 0.125)],
)
def test_an_update_with_less_to_correct_may_change_less(scores, share):
    config = replace(CONFIG, step_kl=0.04, step_kl_floor=0.125)
    assert step_bound(scores, config) == pytest.approx(0.04 * share)


def test_several_epochs_are_as_many_steps_on_the_same_samples(tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, method="binary", step_kl=9.0, micro_batch_tokens=40)
    samples = off_policy_samples(model_path)
    once = build_trainer(replace(config, epochs=3), model_path, tmp_path)
    passes = []
    monkeypatch.setattr(once, "_teach", lambda b, teach=once._teach: passes.append(b) or teach(b))
    once.train_on([Update(samples, version=0)])
    thrice = build_trainer(config, model_path, tmp_path)
    thrice.train_on([Update(samples, version=0)] * 3)

    assert once.state.global_step == thrice.state.global_step == 3
    expected = thrice.adapter_weights()
    for name, weight in once.adapter_weights().items():
        assert torch.equal(weight, expected[name]), name
    assert len(passes) == len(micro_batches(samples, 40)), "a teacher reads a reply once an update"
