"""All weights as what is trained: `[learner] lora_rank = 0`."""

from __future__ import annotations

import json
import math
import shutil
import stat
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.adapters import Card
from learner.config import LearnerConfig
from learner.memory import require_memory
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.engine.adapter_files import MODEL_FILE, folder_sha256
from nextstate.engine.whole import PROBE_FILE
from nextstate.errors import AdapterError, ConfigError, DiskError, LearnerError, StartError
from nextstate.records import VersionState
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import (
    BAD,
    CONFIG,
    GOOD,
    PROMPT,
    WITH_CANARIES,
    Recorded,
    load_float64,
    logprobs,
    sample,
    save_tiny_model,
)

FULL = replace(CONFIG, lora_rank=0, learning_rate=0.0, epochs=2)
CARD = Card("main", 1, 0, "combined", ("t",), {})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("full") / "tiny")


@pytest.fixture
def trainer(model_path: str, tmp_path: Path) -> PolicyTrainer:
    return build_trainer(FULL, model_path, tmp_path / "work")


def batch(model_path: str) -> list:
    base = load_float64(model_path)
    found = []
    for at, (reply, score) in enumerate([(GOOD, 1), (BAD, -1)] * 2):
        with torch.no_grad():
            told = logprobs(base, PROMPT, reply).tolist()
        found.append(sample(f"t{at}", reply=reply, behaviour=told, score=score))
    return found


def reply_logprob(model: torch.nn.Module, reply: tuple[int, ...]) -> float:
    with torch.no_grad():
        return float(logprobs(model, PROMPT, reply).sum())


def test_the_gradient_is_that_of_all_weights_and_of_the_tied_head_too(
    trainer: PolicyTrainer, model_path: str
) -> None:
    """For one turn and unchanged weights it is the gradient of -mean log p, times the credit."""
    quiet = replace(FULL, method="binary", kl_coef=0.0)
    trainer = build_trainer(quiet, model_path, Path(trainer.args.output_dir))
    base = load_float64(model_path)
    told = logprobs(base, PROMPT, GOOD)
    one = sample(reply=GOOD, behaviour=told.tolist())
    (-told.mean()).backward()
    trainer.gradient([one], {0: 0})
    expected = dict(base.named_parameters())
    found = dict(trainer.policy.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(
            weight.grad.double(), expected[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )


def test_an_update_moves_all_weights_by_no_more_than_its_bound(
    trainer: PolicyTrainer, model_path: str
) -> None:
    before = trainer.weights.copy()
    result = trainer.update(batch(model_path), {0: 0})
    assert 0 < result.metrics["step/kl"] <= FULL.step_kl
    after = trainer.weights.copy()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert reply_logprob(trainer.policy, GOOD) > reply_logprob(load_float64(model_path), GOOD)
    assert 0 < trainer.weights.change() < 1


def test_a_weight_with_a_small_gradient_moves_less_than_one_with_an_ordinary_one(
    trainer: PolicyTrainer,
) -> None:
    """The gradient has norm 1: one weight g = 0.8, one 0.001, all others the rest in equal parts.

    AdamW's first step is rate * g / (g + epsilon). With n weights epsilon is 10 / sqrt(n), and the
    others have 0.6 / sqrt(n): they move by 0.6 / 10.6 of the rate.
    """
    weights = list(trainer.policy.parameters())
    count = sum(weight.numel() for weight in weights)
    rest = math.sqrt((1 - 0.8**2 - 0.001**2) / (count - 2))
    for weight in weights:
        weight.grad = torch.full_like(weight, rest)
    of_first, first = weights[0].grad.view(-1), weights[0].detach().view(-1)
    of_first[:2] = torch.tensor([0.8, 0.001])
    before, trainer.rate = first[:3].clone(), 0.01
    assert trainer.optimizer_step() == pytest.approx(1.0, abs=1e-4)
    moved = (before - first[:3]).tolist()
    expected = [0.01 * g / (g + 10 * count**-0.5) for g in (0.8, 0.001, rest)]
    assert moved == pytest.approx(expected, rel=1e-3)


def test_the_base_is_read_as_it_was_and_the_policy_stays(
    trainer: PolicyTrainer, model_path: str
) -> None:
    trainer.update(batch(model_path), {0: 0})
    own = trainer.weights.copy()
    with torch.no_grad(), trainer.weights.base():
        read = reply_logprob(trainer.policy, GOOD)
    assert read == pytest.approx(reply_logprob(load_float64(model_path), GOOD), abs=1e-4)
    assert all(torch.equal(weight, own[name]) for name, weight in trainer.weights.copy().items())


def test_an_update_is_undone_exactly_and_a_reset_is_the_base(
    trainer: PolicyTrainer, model_path: str
) -> None:
    before = trainer.weights.copy()
    result = trainer.update(batch(model_path), {0: 0})
    moved = trainer.weights.copy()
    trainer.restore(result.before)
    assert all(torch.equal(weight, before[n]) for n, weight in trainer.weights.copy().items())
    trainer.weights.put(moved)
    trainer.weights.reset()
    assert all(torch.equal(weight, before[n]) for n, weight in trainer.weights.copy().items())
    assert trainer.weights.change() == 0.0


def test_a_saved_version_is_a_private_whole_model_that_says_what_the_learner_says(
    trainer: PolicyTrainer, model_path: str, tmp_path: Path
) -> None:
    trainer.update(batch(model_path), {0: 0})
    folder = tmp_path / "versions" / "v1"
    folder.parent.mkdir()
    sha256 = trainer.weights.save(folder, CARD)
    assert sha256 == folder_sha256(folder)
    names = {file.name for file in folder.iterdir()}
    assert {"card.json", "config.json", "tokenizer.json", MODEL_FILE, PROBE_FILE} <= names
    assert (folder / "config.json").read_bytes() == Path(model_path, "config.json").read_bytes()
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for one in json.loads((folder / PROBE_FILE).read_bytes())["probes"]:
        with torch.no_grad():
            logits = read(input_ids=torch.tensor([one["prompt"]])).logits[0, -1]
        found = logits.log_softmax(-1)[torch.tensor(one["tokens"])].tolist()
        assert found == pytest.approx(one["logprobs"], abs=1e-5)
    other = build_trainer(FULL, model_path, tmp_path / "other")
    other.weights.load(folder, sha256)
    ours = trainer.weights.copy()
    assert all(torch.equal(weight, ours[n]) for n, weight in other.weights.copy().items())


def test_a_file_that_was_changed_or_is_an_adapter_is_no_version(
    trainer: PolicyTrainer, model_path: str, tmp_path: Path
) -> None:
    sha256 = trainer.weights.save(tmp_path / "v1", CARD)
    with (tmp_path / "v1" / MODEL_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0" if file.read(1) != b"\0" else b"\1")
    before = trainer.weights.copy()
    with pytest.raises(AdapterError, match="has changed on disk"):
        trainer.weights.load(tmp_path / "v1", sha256)
    lora = build_trainer(CONFIG, model_path, tmp_path / "lora")
    adapter = lora.weights.save(tmp_path / "v2", CARD)
    with pytest.raises(LearnerError, match=r"is no whole model, and .*lora_rank = 0"):
        trainer.weights.load(tmp_path / "v2", adapter)
    with pytest.raises(LearnerError, match=r"is a whole model, and .*lora_rank = 4"):
        lora.weights.load(tmp_path / "v1", sha256)
    assert all(torch.equal(weight, before[n]) for n, weight in trainer.weights.copy().items())


def test_a_full_disk_is_noticed_before_a_version_is_written(
    trainer: PolicyTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(DiskError, match=r"a version needs 0\.00 GB and 0\.00 GB are free; make"):
        trainer.weights.save(tmp_path / "v1", CARD)
    assert not (tmp_path / "v1").exists()


def test_weights_that_are_not_finite_are_not_kept(trainer: PolicyTrainer, tmp_path: Path) -> None:
    with torch.no_grad():
        next(iter(trainer.policy.parameters())).view(-1)[0] = torch.nan
    with pytest.raises(LearnerError, match="not finite"):
        trainer.weights.save(tmp_path / "v1", CARD)


def test_the_stage_makes_versions_of_whole_models_through_the_gate_and_goes_on_from_them(
    model_path: str, tmp_path: Path
) -> None:
    recorded = Recorded(tmp_path / "state", model_path)
    config = replace(WITH_CANARIES, lora_rank=0, learning_rate=0.0, batch_size=4)
    recorded.add_mixed(4)
    train(recorded, model_path, FakeEngine(recorded.store), config)
    version = recorded.store.versions.serving("main")
    assert (version.number, version.is_whole_model) == (1, True)
    assert folder_sha256(Path(version.path or "")) == version.sha256
    assert {"gate/weight_change", "gate/kl_base"} <= version.metrics.keys()
    recorded.add_mixed(4)
    train(recorded, model_path, FakeEngine(recorded.store), config)
    newest = recorded.store.versions.all("main")[-1]
    assert (newest.number, newest.parent, newest.state) == (2, 1, VersionState.SERVING)
    assert set(recorded.trained_in().values()) == {1, 2}


def test_memory_counts_the_base_beside_all_weights_with_their_gradients_and_moments(
    model_path: str,
) -> None:
    model = load_float64(model_path)
    count = sum(weight.numel() for weight in model.parameters())
    _, line = require_memory(FULL, model_path)
    assert f"{4 * count / 1e9:.2f} GB for the base, {16 * count / 1e9:.2f} GB" in line


@pytest.mark.parametrize(
    ("other", "said"),
    [({"ranks": 2}, "ranks = 2"), ({"dtype": "bfloat16"}, "dtype = 'bfloat16'")],
)
def test_what_does_not_go_with_all_weights_is_refused(other: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora_rank = 0 trains all weights, and {said}"):
        LearnerConfig(lora_rank=0, **other)


def test_nothing_starts_for_adapters_while_a_whole_model_serves(
    model_path: str, tmp_path: Path
) -> None:
    recorded = Recorded(tmp_path / "state", model_path)
    config = replace(FULL, batch_size=4)
    recorded.add_mixed(4)
    train(recorded, model_path, FakeEngine(recorded.store), config)
    text = f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{model_path}"\n[proxy]\nport = 0'
    file = tmp_path / "nextstate.toml"
    file.write_text(text)
    with pytest.raises(StartError, match=r"version 1 serves and is a whole model: set .*rank = 0"):
        Stack(Settings.read(file)).check()
    file.write_text(f"{text}\n[learner]\nlora_rank = 0")
    Stack(Settings.read(file)).check()
