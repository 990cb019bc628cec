"""The gate's decisions on hand-worked numbers, and what it measures on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch

from demo.course import POLICY
from learner import evaluator as evaluator_module
from learner.canaries import Comparison
from learner.config import LearnerConfig
from learner.evaluator import (
    DRAWS,
    REPLY_TOKENS,
    Evaluator,
    canary_prompts,
    question_prompts,
)
from learner.gate import Measured, objection
from learner.kl import RATIO_CAP, kl_divergence
from learner.means import Mean, mean_over_groups
from learner.model import load_tokenizer
from learner.questions import QUESTIONS
from learner.selection import is_held_out
from learner.trainer import UpdateResult, build_trainer
from tests.learner.test_tiny_model import (
    BAD,
    GOOD,
    load_float64,
    logprobs,
    sample,
    save_tiny_model,
)
from tests.learner.test_tiny_model import WITH_CANARIES as CONFIG

FINE = Measured(
    weight_change=0.1,
    kl_parent=0.01,
    kl_base=0.1,
    ranking=Mean(0.0, 0.001, 16),
    replies=Comparison(6, 0, 0, None, None, 0.0, ""),
)
GATE = LearnerConfig()


def test_a_candidate_with_nothing_wrong_may_serve():
    assert objection(FINE, GATE) is None


def test_what_was_not_measured_is_no_objection():
    assert objection(Measured(0.1, None, None, None, None), GATE) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight_change": 1.5}, r"1\.5, over the bound of 1"),
        ({"weight_change": math.nan}, "nan, over the bound of 1"),
        ({"weight_change": math.inf}, "inf, over the bound of 1"),
        ({"kl_parent": 0.2}, r"parent.* 0\.2, over the bound of 0\.1"),
        ({"kl_base": 3.0}, r"base.* 3, over the bound of 1"),
        ({"kl_base": math.nan}, "base.* nan, over the bound"),
        ({"is_finite": False}, "logits that are not finite"),
        ({"replies": Comparison(6, 6, 0, None, None, 0.0, "")}, "6 of 6 replies of its own"),
    ],
)
def test_each_objection_names_the_value_and_the_bound(change, expected):
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(objection(replace(FINE, **change), GATE))


@pytest.mark.parametrize(
    ("mean", "error", "rejected"),
    [
        (-0.10, 0.02, True),  # at most -0.10 + 2.602 · 0.02 = -0.048 < -0.02
        (-0.06, 0.02, False),  # at most -0.008
        (-0.015, 0.0, False),  # sure, and too small to matter
        (-0.025, 0.0, True),
        (0.5, 0.1, False),
        (math.nan, 0.1, True),
    ],
)
def test_only_a_clear_drop_in_ranking_is_rejected(mean, error, rejected):
    found = objection(replace(FINE, ranking=Mean(mean, error, 16)), GATE)
    assert (found is not None) is rejected
    assert found is None or "below the bound of -0.02" in found


def test_noise_around_the_allowed_drop_is_rejected_as_rarely_as_the_level_says():
    # 2000 candidates just at the bound, 12 sessions each: 1 % of them, with a standard error of
    # sqrt(0.01 · 0.99 / 2000) = 0.22 %.
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(2000, 12, generator=draw, dtype=torch.float64) * 0.1 - GATE.gate_drop
    rejected = sum(
        objection(replace(FINE, ranking=mean_over_groups(enumerate(row))), GATE) is not None
        for row in noise.tolist()
    )
    assert 0.003 < rejected / 2000 < 0.017


def test_divergence_worked_by_hand():
    # exp(ln 2) - ln 2 - 1 = 0.306853 and exp(0) - 0 - 1 = 0, with weights 1 and 1.
    old, new = torch.tensor([-2.0, -1.0]), torch.tensor([-2.0 + math.log(2), -1.0])
    assert kl_divergence(old, new, drawn_by=old) == pytest.approx(0.306853 / 2, abs=1e-6)


def test_divergence_is_not_fooled_by_tokens_that_an_older_policy_drew():
    """All of two policies' distributions over 3 tokens, against the sum that defines KL."""
    p, q, drew = (
        torch.tensor(x).log() for x in ([0.02, 0.28, 0.7], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2])
    )
    exact = float((p.exp() * (p - q)).sum())
    counts = (drew.exp() * 1000).round().long()
    drawn = torch.repeat_interleave(torch.arange(3), counts)
    assert kl_divergence(p[drawn], q[drawn], drawn_by=drew[drawn]) == pytest.approx(exact, abs=1e-6)
    assert kl_divergence(p[drawn], q[drawn]) > 5 * exact
    assert float((p - drew).exp().max()) < RATIO_CAP


KEY = b"a secret"


def test_held_out_sessions_are_a_tenth_and_always_the_same():
    names = [f"session-{i}" for i in range(4000)]
    held = [name for name in names if is_held_out("main", name, 0.1, KEY)]
    assert 0.085 < len(held) / 4000 < 0.115  # 3 standard errors of sqrt(0.1 · 0.9 / 4000)
    assert held == [name for name in names if is_held_out("main", name, 0.1, KEY)]
    assert set(held) <= {name for name in names if is_held_out("main", name, 0.2, KEY)}
    assert held != [name for name in names if is_held_out("other", name, 0.1, KEY)]
    assert held != [name for name in names if is_held_out("main", name, 0.1, b"another one")]
    assert not any(is_held_out("main", name, 0.0, KEY) for name in names)


def test_canary_prompts_are_the_shortest_each_once():
    samples = [sample(prompt=p) for p in ((1, 2, 3), (4, 5), (1, 2, 3), (6, 7, 8, 9))]
    assert canary_prompts(samples, 2) == [(4, 5), (1, 2, 3)]
    assert canary_prompts(samples, 0) == []


HELD = [
    sample(f"h{i}", reply=GOOD if i % 2 else BAD, score=1 if i % 2 else -1, prompt=(5, 6, i + 8))
    for i in range(10)
]
HELD = [replace(s, session=s.turn) for s in HELD]


def on_base(model: torch.nn.Module, held=HELD):
    """The same samples with the base's own log-probabilities as behaviour."""
    return [
        replace(
            s,
            behaviour_logprobs=tuple(logprobs(model, s.prompt_ids, s.completion_ids).tolist()),
        )
        for s in held
    ]


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """What was measured before a step, after it, without held-out turns and of broken weights."""
    folder = tmp_path_factory.mktemp("examined")
    model_path = save_tiny_model(folder / "model")
    base = load_float64(model_path)
    trainer = build_trainer(CONFIG, model_path, folder / "work")
    evaluator = Evaluator(CONFIG, trainer)
    with torch.no_grad():
        held = on_base(base)
        batch = on_base(base, [sample("t", reply=GOOD), sample("u", reply=BAD, score=-1)])
    found = {}
    evaluator.prepare(held, batch, 0)
    found["first"] = evaluator.measure(UpdateResult(trainer.snapshot(), {}))
    result = trainer.update(batch, {0: 0})
    found["metrics"] = result.metrics
    found["step"] = evaluator.measure(result)
    evaluator.prepare([], batch, 0)
    found["without"] = evaluator.measure(result)
    with torch.no_grad():
        for module in trainer.policy.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight[0, 0] = math.nan
    found["broken"] = evaluator.measure(result)
    return found


def test_before_any_step_nothing_has_changed(examined):
    first = examined["first"]
    assert first.weight_change == 0.0
    assert first.kl_parent == pytest.approx(0, abs=1e-9)
    assert first.kl_base == pytest.approx(0, abs=1e-9)
    assert first.ranking == Mean(0.0, 0.0, 10)
    assert objection(first, CONFIG) is None


def test_a_step_is_seen_on_turns_that_it_was_not_trained_on(examined):
    step = examined["step"]
    assert step.weight_change > 0
    assert step.kl_parent >= examined["metrics"]["step/kl"] > 0
    assert step.kl_base > 0
    assert step.ranking.count == 10
    assert step.ranking.value > 0  # praised and blamed replies are those that it was trained on


def test_without_held_out_turns_the_batch_stands_in_for_the_divergences(examined):
    without = examined["without"]
    assert without.kl_parent == examined["metrics"]["step/kl"]
    assert without.kl_base == examined["metrics"]["kl/base"]
    assert without.ranking is None


def test_weights_that_are_not_numbers_are_noticed(examined):
    broken = examined["broken"]
    assert math.isnan(broken.weight_change)
    assert broken.is_finite is False
    assert "is nan, over the bound of 1" in objection(broken, CONFIG)


def test_the_weight_change_is_that_of_the_whole_product(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    trainer = build_trainer(CONFIG, model_path, tmp_path / "work")
    torch.manual_seed(3)
    expected = 0.0
    for module in trainer.policy.modules():
        if hasattr(module, "lora_B"):
            b = torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1).detach()
            product = module.scaling["default"] * (b @ module.lora_A["default"].weight.detach())
            share = float(product.norm() / module.get_base_layer().weight.norm())
            expected = max(expected, share)
    for _ in range(2):
        assert trainer.weights.change() == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_canaries_are_answered_in_passes_of_the_learners_size_and_alike(tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    turns = [sample(prompt=(5, 6, n)) for n in (7, 8, 9)]
    replies = []
    decode = evaluator_module.decode

    def kept(model, prompts, *given, **options):
        replies.append(dict(enumerate(decode(model, prompts, *given, **options))))
        return [*replies[-1].values()]

    monkeypatch.setattr(evaluator_module, "decode", kept)
    for prompts in (1, 3):
        tokens = (1 + DRAWS) * prompts * (3 + REPLY_TOKENS)
        config = replace(CONFIG, gate_canaries=3, micro_batch_tokens=tokens)
        trainer = build_trainer(config, model_path, tmp_path / "work")
        evaluator = Evaluator(config, trainer)
        evaluator.prepare([], turns, 0)
        measured = evaluator.measure(UpdateResult(trainer.snapshot(), {}))
        assert measured.replies.count == 3 * (1 + DRAWS)
    *ones, together = replies[3:7]  # after those of the base
    assert list(map(len, replies)) == [3, 3, 3, 3, 3, 3, 9, 9]
    assert [one[draw] for draw in range(1 + DRAWS) for one in ones] == [*together.values()]


def test_the_base_answers_a_canary_once_and_without_the_adapter(tmp_path, monkeypatch):
    trainer = build_trainer(CONFIG, save_tiny_model(tmp_path / "model"), tmp_path / "work")
    evaluator = Evaluator(CONFIG, trainer)
    asked = []

    def decode(model, prompts, *_given, **_options):
        is_base = all(not m.merged and m.disable_adapters for m in lora_layers(model))
        asked.append((is_base, list(prompts)))
        return [[5, 6] if is_base else []] * ((1 + DRAWS) * len(prompts))

    monkeypatch.setattr(evaluator_module, "decode", decode)
    one, two, three = ((5, 6, n) for n in (7, 8, 9))
    for prompts in ((one, two), (two, three)):
        evaluator.prepare([], [sample(prompt=p) for p in prompts], 0)
        found = evaluator.measure(UpdateResult(trainer.snapshot(), {}))
        assert (found.replies.count, found.replies.broken, found.replies.bases_broken) == (6, 6, 0)
    assert asked == [
        (True, [one, two]),
        (False, [one, two]),
        (True, [three]),
        (False, [two, three]),
    ]


def lora_layers(model):
    return [module for module in model.modules() if hasattr(module, "lora_B")]


def test_questions_that_the_base_does_not_know_are_asked_once(tmp_path, monkeypatch):
    trainer = build_trainer(CONFIG, save_tiny_model(tmp_path / "model"), tmp_path / "work")
    questions = {(9, n): QUESTIONS[n] for n in range(8)}
    monkeypatch.setattr(evaluator_module, "question_prompts", lambda _: dict(questions))
    evaluator, asked = Evaluator(CONFIG, trainer), []

    def decode(_model, prompts, *_given, **_options):
        asked.append(len(prompts))
        return [[5, 6]] * ((1 + DRAWS) * len(prompts))

    monkeypatch.setattr(evaluator_module, "decode", decode)
    for _ in range(2):
        evaluator.prepare([], [sample(prompt=(5, 6, 7))], 0)
        found = evaluator.measure(UpdateResult(trainer.snapshot(), {}))
        assert found.replies.count == 1 + DRAWS
    assert asked == [9, 1, 1]


def test_the_built_in_questions_are_asked_in_the_models_own_chat_template():
    tokenizer = load_tokenizer(str(POLICY))
    prompts = question_prompts(tokenizer)
    assert [*prompts.values()] == [*QUESTIONS]
    for ids, question in prompts.items():
        text = tokenizer.decode(ids)
        assert text.endswith(f"user\n{question.text}<|im_end|>\n<|im_start|>assistant\n")
    tokenizer.chat_template = None
    assert question_prompts(tokenizer) == {}


def test_a_copy_of_the_weights_does_not_change_with_them(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    trainer = build_trainer(CONFIG, model_path, tmp_path / "work")
    before = trainer.weights.copy()
    name = next(name for name in before if "lora_B" in name)
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    assert before[name].abs().max() == 0
    trainer.weights.put(before)
    assert all(torch.equal(v, before[k]) for k, v in trainer.weights.copy().items())
