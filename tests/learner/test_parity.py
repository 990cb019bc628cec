"""The trainer's loss and gradient against the formula, written out in double precision."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from learner.config import LearnerConfig, Method
from learner.kl import RATIO_CAP
from learner.step_size import step_bound
from learner.tensors import micro_batches, sequences_of
from learner.trainer import PolicyTrainer, build_trainer
from learner.trl_grpo import EPSILON, EPSILON_HIGH
from nextstate.errors import LearnerError
from nextstate.records import Sample
from tests.learner.test_tiny_model import (
    CONFIG,
    backbone_of,
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
LAGS = {-1: 1, 0: 0}


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


def written_out_loss(
    policy: torch.nn.Module,
    base: torch.nn.Module,
    teacher: torch.nn.Module,
    samples: list[Sample],
    config: LearnerConfig,
) -> torch.Tensor:
    """arXiv 2603.10165's combined loss with two-sided clipping, one turn at a time.

    What is learned is a mean over turns of people and over episodes, of each over its tokens.
    """
    w_rl, w_opd, w_topk = WEIGHTS[config.method]
    learned: dict[str, list[torch.Tensor]] = {}
    pulls: list[torch.Tensor] = []
    for s in samples:
        now = logprobs(policy, s.prompt_ids, s.completion_ids)
        behaviour = torch.tensor(s.behaviour_logprobs, dtype=torch.float64)
        signal = s.score if s.advantage is None else s.advantage
        advantage = torch.full_like(behaviour, w_rl * signal)
        distance = torch.zeros_like(behaviour)
        with torch.no_grad():
            reference = logprobs(base, s.prompt_ids, s.completion_ids)
        praised = w_rl != 0 and signal > 0
        if s.hinted_prompt_ids is not None and not praised:
            with torch.no_grad():
                wanted = distributions(teacher, s.hinted_prompt_ids, s.completion_ids)
                wanted = torch.log_softmax(wanted / config.teacher_temperature, dim=-1)
            hinted = wanted.gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0]
            limit = config.teacher_gap_clip
            advantage += w_opd * (hinted - behaviour).clamp(-limit, limit)
            ours = distributions(policy, s.prompt_ids, s.completion_ids)
            distance = reverse_kl(ours, wanted, config.topk)
        ratio = (now - behaviour).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON_HIGH)
        surrogate = torch.minimum(ratio.clamp(max=RATIO_CAP) * advantage, clipped * advantage)
        # Weighted by the ratio, as the reply was drawn from another policy: its gradient is then
        # that of KL(policy ‖ base), and no token that the policy has left makes it explode.
        kl = ratio * ((reference - now).exp() - (reference - now) - 1)
        pulls.append(config.kl_coef * kl.mean())
        unit = s.turn if s.advantage is None else s.session
        learned.setdefault(unit, []).append(-surrogate + w_topk * distance)
    means = [torch.cat(tokens).mean() for tokens in learned.values()]
    return torch.stack(means).mean() + torch.stack(pulls).mean()


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


@dataclass(frozen=True)
class Trained:
    """A trainer after one update from an adapter with an effect."""

    trainer: PolicyTrainer
    start: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]
    """The sums over the update's backward passes."""
    metrics: Mapping[str, float]


def trained_once(
    config: LearnerConfig, model_path: str, samples: list[Sample], work_dir: Path
) -> Trained:
    trainer = build_trainer(config, model_path, work_dir)
    torch.manual_seed(1)
    start = {n: 0.05 * torch.randn(v.shape) for n, v in trainer.weights.copy().items()}
    trainer.weights.put(start)
    gradients = {}

    def keep(name: str):
        def hook(gradient: torch.Tensor) -> None:
            gradients[name] = gradients.get(name, 0) + gradient.double().cpu()

        return hook

    for name, parameter in trainer.policy.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(keep(name))
    return Trained(trainer, start, gradients, trainer.update(samples, LAGS).metrics)


def assert_parity(
    config: LearnerConfig, model_path: str, samples: list[Sample], work_dir: Path
) -> Mapping[str, float]:
    """One step's loss and gradient are those of the formula. Returns its metrics."""
    trained = trained_once(config, model_path, samples, work_dir)
    policy = with_adapter(config, model_path, trained.start)
    base = load_float64(model_path)
    teacher = base if config.teacher == "base" else policy
    loss = written_out_loss(policy, base, teacher, samples, config)
    loss.backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}

    assert trained.metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert set(trained.gradients) == set(expected)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (trained.gradients[name] - gradient).norm() < 2e-5 * norm, name
    assert trained.metrics["grad/norm"] == pytest.approx(norm.item(), rel=1e-4)
    return trained.metrics


@pytest.mark.parametrize("method", sorted(WEIGHTS))
@pytest.mark.parametrize("micro_batch_tokens", [1000, 40])
def test_loss_and_gradient_equal_the_written_out_formula(
    tmp_path: Path, method: Method, micro_batch_tokens: int
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        STALE, method=method, micro_batch_tokens=micro_batch_tokens, kl_coef=0.3, topk=4
    )
    metrics = assert_parity(config, model_path, off_policy_samples(model_path), tmp_path)
    assert metrics["ratio/max"] > RATIO_CAP
    assert ("kl/teacher" in metrics) == (WEIGHTS[method][2] > 0)


@pytest.mark.parametrize("method", ["binary", "combined"])
@pytest.mark.parametrize("micro_batch_tokens", [1000, 40])
def test_steps_train_with_their_advantages_and_each_episode_counts_once(
    tmp_path: Path, method: Method, micro_batch_tokens: int
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    samples = off_policy_samples(model_path)
    for place, session, advantage in (
        (0, "e", 2.5),
        (1, "e", -0.25),
        (3, "e", 0.5),
        (5, "f", -3.0),
    ):
        score = 1 if advantage > 0 else -1
        changes = {"session": session, "advantage": advantage, "score": score, "outcome": 0.0}
        samples[place] = replace(samples[place], **changes)
    config = replace(
        STALE, method=method, micro_batch_tokens=micro_batch_tokens, kl_coef=0.3, topk=4
    )
    metrics = assert_parity(config, model_path, samples, tmp_path / "work")
    # Two turns of people with the scores 0 and -1, and four steps with the outcome 0.
    assert metrics["score/mean"] == pytest.approx(-1 / 6)


@pytest.mark.parametrize("method", ["combined_sampled", "combined"])
def test_turns_that_share_a_sequence_count_as_if_each_were_alone(
    tmp_path: Path, method: Method
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, method=method, micro_batch_tokens=50, kl_coef=0.3)
    samples = conversation_samples(model_path)
    assert sorted(map(len, sequences_of(samples))) == [1, 1, 1, 1, 1, 3]
    assert_parity(config, model_path, samples, tmp_path)


def test_an_update_of_shared_sequences_measures_what_separate_ones_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(STALE, learning_rate=0.3, step_kl=0.003)
    samples = conversation_samples(model_path)
    together = dict(trained_once(config, model_path, samples, tmp_path).metrics)
    monkeypatch.setattr("learner.tensors.sequences_of", lambda found: [[s] for s in found])
    apart = dict(trained_once(config, model_path, samples, tmp_path).metrics)
    for metrics in (together, apart):
        assert metrics.pop("step/seconds") > 0
    assert together == pytest.approx(apart, rel=1e-3, abs=1e-6)
    assert together["step/length"] < 1


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
        metrics = assert_parity(config, model_path, samples, tmp_path)
        gaps.append(metrics["teacher_gap/mean"])
    assert gaps[0] != pytest.approx(gaps[1], abs=1e-4)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("learning_rate", [0.0, 0.3, 1e-4])
def test_an_update_changes_the_policy_by_as_much_as_it_may(tmp_path, learning_rate, epochs):
    """A rate that is given is only lowered; one that is found is right for the next update."""
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        CONFIG,
        learning_rate=learning_rate,
        epochs=epochs,
        step_kl=0.01,
        micro_batch_tokens=40,
        drift_limit=9,
    )
    samples = off_policy_samples(model_path)
    trained = trained_once(config, model_path, samples, tmp_path)

    after, metrics = trained.trainer.weights.copy(), trained.metrics
    differences, ratios = [], []
    for s in samples:
        old, new = (
            logprobs(with_adapter(config, model_path, weights), s.prompt_ids, s.completion_ids)
            for weights in (trained.start, after)
        )
        differences.append((new - old).detach())
        ratios.append((old - torch.tensor(s.behaviour_logprobs)).exp().clamp(max=RATIO_CAP))
    moved = torch.cat(differences)
    change = (torch.cat(ratios).detach() * (moved.exp() - moved - 1)).mean().item()

    assert metrics["step/kl"] == pytest.approx(change, rel=2e-2, abs=1e-6)
    assert 0 < change <= config.step_kl
    assert trained.trainer.rate == pytest.approx(learning_rate or metrics["step/rate"])
    if learning_rate == 1e-4:
        assert change < config.step_kl / 4
        assert metrics["step/length"] == 1
    else:
        assert change > config.step_kl / 4
    if learning_rate == 0:
        passes = []
        measure = trained.trainer._kl_since
        trained.trainer._kl_since = lambda micros: passes.append(1) or measure(micros)
        again = trained.trainer.update(samples, LAGS).metrics
        assert config.step_kl / 4 < again["step/kl"] <= config.step_kl
        assert len(passes) <= 3 * epochs, "the next search begins near its end"


def test_a_batch_that_teaches_nothing_is_not_amplified(tmp_path):
    """Without scores and hints only the pull to the base is left, which no bound asks for."""
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(CONFIG, method="binary", learning_rate=0.0, drift_limit=9, kl_coef=0.1)
    silent = [replace(s, score=0) for s in off_policy_samples(model_path)]
    trained = trained_once(config, model_path, silent, tmp_path)
    assert trained.metrics["step/length"] <= 1
    assert trained.metrics["step/kl"] < config.step_kl / 10


@pytest.mark.parametrize(
    ("scores", "share"),
    [([-1, -1], 1.0), ([1, -1], 1.0), ([0, 0], 1.0), ([1, 1, 1, -1], 0.5), ([1, 1], 0.125)],
)
def test_an_update_with_less_to_correct_may_change_less(scores, share):
    config = replace(CONFIG, step_kl=0.04, step_kl_floor=0.125)
    assert step_bound(scores, config) == pytest.approx(0.04 * share)


def test_several_epochs_are_as_many_steps_on_the_same_samples(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(
        STALE, method="combined_sampled", teacher="base", step_kl=99.0, micro_batch_tokens=40
    )
    samples = off_policy_samples(model_path)
    once, thrice = (
        build_trainer(replace(config, epochs=epochs), model_path, tmp_path) for epochs in (3, 1)
    )
    passes = {once: 0, thrice: 0}

    def count(layers: object, _: object) -> None:
        passes[once if layers is backbone_of(once) else thrice] += 1

    for trainer in passes:
        backbone_of(trainer).register_forward_pre_hook(count)
    once.update(samples, LAGS)
    thrice.update(samples, LAGS)
    # One for the gradient and one for the size of the step: the teacher reads a reply once.
    assert passes[once] - passes[thrice] == 2 * 2 * len(micro_batches(samples, 40))
    for _ in range(2):
        thrice.update(samples, LAGS)

    assert once.state.global_step == thrice.state.global_step == 3
    expected = thrice.weights.copy()
    for name, weight in once.weights.copy().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_refused_update_changes_nothing_and_a_snapshot_undoes_one_that_was_taken(
    tmp_path: Path, epochs: int
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    samples = off_policy_samples(model_path)
    trainer = build_trainer(replace(CONFIG, epochs=epochs), model_path, tmp_path)
    start = trainer.snapshot()
    with pytest.raises(LearnerError, match="nothing was trained"):
        trainer.update(samples, LAGS)  # the made-up log-probs are far from the model's
    trainer.config = replace(trainer.config, drift_limit=9.0)
    first = trainer.update(samples, LAGS)
    after = trainer.weights.copy()
    assert all(torch.equal(first.before.weights[n], v) for n, v in start.weights.items())
    assert not all(torch.equal(after[n], v) for n, v in start.weights.items())
    for _ in range(2):  # a snapshot can be restored more than once
        trainer.restore(first.before)
        assert trainer.state.global_step == 0
        again = trainer.update(samples, LAGS)
        assert again.metrics["loss"] == first.metrics["loss"]
        assert all(torch.equal(after[n], v) for n, v in trainer.weights.copy().items())
