"""The gate's decisions on hand-worked numbers, and what it measures on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner import evaluator as evaluator_module
from learner.config import LearnerConfig
from learner.evaluator import REPLY_TOKENS, Evaluator, canary_prompts, weight_change
from learner.gate import (
    Canaries,
    Measured,
    Ranking,
    is_broken,
    loop_share,
    objection,
    ranking,
    student_quantile,
)
from learner.kl import RATIO_CAP, kl_divergence
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
    ranking=Ranking(0.0, 0.001, 16),
    canaries=Canaries(4, 0, finite=True),
    parents_canaries=None,
)
GATE = LearnerConfig()


def test_a_candidate_with_nothing_wrong_may_serve():
    assert objection(FINE, GATE) is None


def test_what_was_not_measured_is_no_objection():
    assert objection(Measured(0.1, None, None, None, None, None), GATE) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight_change": 1.5}, r"1\.5, over \[learner\] gate_weight_change = 1"),
        ({"weight_change": math.nan}, "nan, over .*gate_weight_change"),
        ({"weight_change": math.inf}, "inf, over .*gate_weight_change"),
        ({"kl_parent": 0.2}, r"0\.2, over \[learner\] gate_kl_parent = 0\.1"),
        ({"kl_base": 3.0}, r"3, over \[learner\] gate_kl_base"),
        ({"kl_base": math.nan}, "gate_kl_base"),
        ({"canaries": Canaries(4, 0, finite=False)}, "logits that are not finite"),
    ],
)
def test_each_objection_names_the_value_and_the_key(change, expected):
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(objection(replace(FINE, **change), GATE))


def test_students_quantiles_are_those_of_the_tables():
    assert student_quantile(0.99, 7) == pytest.approx(2.998, abs=2e-3)
    assert student_quantile(0.99, 15) == pytest.approx(2.602, abs=1e-3)
    assert student_quantile(0.95, 7) == pytest.approx(1.895, abs=1e-3)
    assert student_quantile(0.999, 7) == pytest.approx(4.785, rel=0.02)
    assert student_quantile(0.5, 9) == pytest.approx(0.0, abs=1e-12)


def test_a_ranking_is_a_mean_over_sessions_worked_by_hand():
    # Session means 1 (of 0 and 2), then 3, and six of 2: mean 2, squared deviations 1 + 1,
    # s² = 2 / 7, standard error sqrt(2 / 7 / 8) = 0.18898.
    changes = [("a", 0.0), ("a", 2.0), ("b", 3.0), *((name, 2.0) for name in "cdefgh")]
    found = ranking(changes)
    assert (found.mean, found.sessions) == (2.0, 8)
    assert found.error == pytest.approx(0.18898, abs=1e-5)
    assert found.upper(0.01) == pytest.approx(2 + 2.998 * 0.18898, abs=1e-3)


def test_fewer_than_8_sessions_say_nothing_however_many_turns_they_have():
    assert ranking([(f"s{i % 7}", -5.0) for i in range(100)]) is None


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
    found = objection(replace(FINE, ranking=Ranking(mean, error, 16)), GATE)
    assert (found is not None) is rejected
    assert found is None or "gate_drop" in found


def test_noise_around_the_allowed_drop_is_rejected_as_rarely_as_the_level_says():
    # 2000 candidates just at the bound, 12 sessions each: 1 % of them, with a standard error of
    # sqrt(0.01 · 0.99 / 2000) = 0.22 %.
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(2000, 12, generator=draw, dtype=torch.float64) * 0.1 - GATE.gate_drop
    rejected = sum(
        objection(replace(FINE, ranking=ranking([(str(i), x) for i, x in enumerate(row)])), GATE)
        is not None
        for row in noise.tolist()
    )
    assert 0.003 < rejected / 2000 < 0.017


@pytest.mark.parametrize(
    ("broken", "parents", "rejected"),
    [
        (4, Canaries(4, 0, finite=True), True),
        (3, Canaries(4, 1, finite=True), True),
        (3, Canaries(4, 2, finite=True), False),
        (4, Canaries(4, 4, finite=True), False),  # the task's right answers are like that
        (2, None, False),  # not more than half: the parent was not even asked
    ],
)
def test_broken_replies_count_only_beyond_the_parents(broken, parents, rejected):
    found = replace(FINE, canaries=Canaries(4, broken, finite=True), parents_canaries=parents)
    assert (objection(found, GATE) is not None) is rejected


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ([5] * 8, 1.0),
        ([5] * 7, 0.0),  # too short to be a loop
        ([1, 2, 3] * 3 + [9], 0.9),
        ([9, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7], 0.75),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 0.0),  # twice is no loop
        (list(range(20)), 0.0),
        ([], 0.0),
    ],
)
def test_the_share_of_a_loop_is_counted_by_hand(reply, share):
    assert loop_share(reply or [0]) == pytest.approx(share)
    assert is_broken(reply) is (not reply or share >= 0.5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(3, 6))
def test_any_block_that_is_said_three_times_is_a_loop(block, times):
    reply = block * times
    assert loop_share(reply) == (1.0 if len(reply) >= 8 else 0.0)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_loops_share_is_a_share(ids):
    assert 0.0 <= loop_share(ids or [0]) <= 1.0


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


def test_held_out_sessions_are_a_tenth_and_always_the_same():
    names = [f"session-{i}" for i in range(4000)]
    held = [name for name in names if is_held_out("main", name, 0.1)]
    assert 0.085 < len(held) / 4000 < 0.115  # 3 standard errors of sqrt(0.1 · 0.9 / 4000)
    assert held == [name for name in names if is_held_out("main", name, 0.1)]
    assert set(held) <= {name for name in names if is_held_out("main", name, 0.2)}
    assert held != [name for name in names if is_held_out("other", name, 0.1)]
    assert not any(is_held_out("main", name, 0.0) for name in names)


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
    assert first.ranking == Ranking(0.0, 0.0, 10)
    assert objection(first, CONFIG) is None


def test_a_step_is_seen_on_turns_that_it_was_not_trained_on(examined):
    step = examined["step"]
    assert step.weight_change > 0
    assert step.kl_parent >= examined["metrics"]["step/kl"] > 0
    assert step.kl_base > 0
    assert step.ranking.sessions == 10
    assert step.ranking.mean > 0  # praised and blamed replies are those that it was trained on


def test_without_held_out_turns_the_batch_stands_in_for_the_divergences(examined):
    without = examined["without"]
    assert without.kl_parent == examined["metrics"]["step/kl"]
    assert without.kl_base == examined["metrics"]["kl/base"]
    assert without.ranking is None


def test_weights_that_are_not_numbers_are_noticed(examined):
    broken = examined["broken"]
    assert math.isnan(broken.weight_change)
    assert broken.canaries.finite is False
    assert "gate_weight_change" in objection(broken, CONFIG)


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
    norms = {}
    for _ in range(2):
        assert weight_change(trainer.policy, norms) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_canaries_are_answered_in_passes_of_the_learners_size_and_alike(tmp_path, monkeypatch):
    model_path = save_tiny_model(tmp_path / "model")
    turns = [sample(prompt=(5, 6, n)) for n in (7, 8, 9)]
    replies = []
    decode = evaluator_module.decode

    def kept(model, prompts, *given, **options):
        replies.append(decode(model, prompts, *given, **options))
        return replies[-1]

    monkeypatch.setattr(evaluator_module, "decode", kept)
    for prompts in (1, 3):
        tokens = 2 * prompts * (3 + REPLY_TOKENS)
        config = replace(CONFIG, gate_canaries=3, micro_batch_tokens=tokens)
        trainer = build_trainer(config, model_path, tmp_path / "work")
        evaluator = Evaluator(config, trainer)
        evaluator.prepare([], turns, 0)
        measured = evaluator.measure(UpdateResult(trainer.snapshot(), {}))
        assert measured.canaries.count == 6
    *ones, together = replies[:4]
    assert list(map(len, replies)) == [2, 2, 2, 6]
    assert [one[0] for one in ones] + [one[1] for one in ones] == together


def test_the_parent_answers_only_if_the_candidates_own_replies_look_bad(tmp_path, monkeypatch):
    trainer = build_trainer(CONFIG, save_tiny_model(tmp_path / "model"), tmp_path / "work")
    evaluator = Evaluator(CONFIG, trainer)
    batch = [sample(prompt=(5, 6, n)) for n in (7, 8)]
    evaluator.prepare([], batch, 0)
    before = trainer.snapshot()
    changed = {name: value + 0.5 for name, value in before.weights.items()}
    trainer.weights.put(changed)
    asked = []

    def decode(*_given, **_options):
        is_parent = all(
            torch.equal(v, before.weights[n]) for n, v in trainer.weights.copy().items()
        )
        asked.append(is_parent)
        return [[] if looks_bad and not is_parent else [5, 6]] * 4

    monkeypatch.setattr(evaluator_module, "decode", decode)
    for looks_bad in (False, True):
        asked.clear()
        found = evaluator.measure(UpdateResult(before, {}))
        assert asked == ([False, True] if looks_bad else [False])
        assert (found.parents_canaries is not None) == looks_bad
        assert all(torch.equal(v, changed[n]) for n, v in trainer.weights.copy().items())
    assert found.canaries.broken == 4
    assert found.parents_canaries.broken == 0


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
