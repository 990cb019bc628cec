"""The upper layers alone, on models of several families, random and tiny."""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from learner.classifier import Example, WordClassifier
from learner.trainer import PolicyTrainer, build_trainer
from learner.upper_layers import UPPER, UpperLayers
from tests.learner.test_tiny_model import CONFIG, VOCABULARY, save_tiny_model

LAYERS = UPPER + 2
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 3},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": LAYERS, "moe_intermediate_size": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
TARGETS = {
    "phi3": ("qkv_proj",), "gpt_neox": ("query_key_value",), "falcon": ("query_key_value",)
}  # fmt: skip
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20, 21, 22), (30, 31, 32, 33, 34))

Build = Callable[..., PolicyTrainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def built(kind: str, **shape: Any) -> PolicyTrainer:
        folder = tmp_path / kind
        save_tiny_model(folder)  # for its tokenizer
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | shape)))
        model.save_pretrained(folder)
        config = replace(CONFIG, lora_targets=TARGETS.get(kind, ("q_proj", "o_proj")))
        return build_trainer(config, str(folder), tmp_path / "work")

    return built


def change(trainer: PolicyTrainer, *layers: int) -> None:
    """Gives the adapters of some layers an effect."""
    with torch.no_grad():
        for name, weight in trainer.policy.named_parameters():
            if weight.requires_grad and any(f".{layer}." in name for layer in layers):
                weight.normal_(std=0.1)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_upper_layers_make_of_what_enters_them_what_the_whole_model_does(
    build: Build, kind: str
) -> None:
    trainer = build(kind, **FAMILIES[kind])
    upper = UpperLayers(trainer)
    assert upper.suffice(PROMPTS[0])
    change(trainer, LAYERS - 1, LAYERS - UPPER)
    assert upper.suffice(PROMPTS[0])
    for _ in range(2):  # computed, and kept
        found, whole = upper.read(PROMPTS), upper.read_whole(PROMPTS)
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(found[row, : len(prompt)], whole[row, : len(prompt)])


def test_only_the_upper_layers_get_a_gradient(build: Build) -> None:
    trainer = build("llama")
    upper = UpperLayers(trainer)
    change(trainer, *range(LAYERS - UPPER, LAYERS))
    upper.read(PROMPTS).sum().backward()
    taught = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, weight in trainer.policy.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }
    assert taught == set(range(LAYERS - UPPER, LAYERS))
    layers = trainer.policy.get_base_model().base_model.layers
    assert not any("forward" in vars(layer) for layer in layers)  # as they were


def test_a_classifier_learns_in_them_and_leaves_the_layers_below_as_they_were(build: Build) -> None:
    trainer = build("llama")
    classifier = WordClassifier(trainer, ["w40", "w50"])
    before = trainer.weights.copy()
    examples = [Example(prompt, place % 2) for place, prompt in enumerate(PROMPTS)] * 8
    losses = classifier.fit(examples, 40, lambda _: None)
    assert losses[-1] < losses[0] / 2
    found = classifier.logprobs(PROMPTS, lambda _: None)
    assert [max(range(2), key=values.__getitem__) for values in found] == [0, 1, 0]
    changed = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, weight in trainer.weights.copy().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == set(range(LAYERS - UPPER, LAYERS))


def test_what_enters_the_upper_layers_is_computed_once_and_kept_within_the_bound(
    build: Build,
) -> None:
    trainer = build("llama")
    bottom = trainer.policy.get_base_model().base_model.layers[0]
    rows: list[int] = []
    bottom.mlp.register_forward_hook(lambda _layer, given, _output: rows.append(len(given[0])))
    size = len(PROMPTS[0]) * 16 * 4

    all_kept = UpperLayers(trainer)
    first = all_kept.read(PROMPTS)
    torch.testing.assert_close(all_kept.read(PROMPTS), first)
    assert rows == [3]

    rows.clear()
    one_kept = UpperLayers(trainer, kept_bytes=size)
    for _ in range(2):
        torch.testing.assert_close(one_kept.read(PROMPTS), first)
    assert rows == [3, 2]


def test_a_model_that_is_small_or_has_other_layers_is_trained_as_a_whole(build: Build) -> None:
    small = build("llama", num_hidden_layers=UPPER)
    assert not UpperLayers(small).suffice(PROMPTS[0])
    pairs = build("falcon")  # its layers hand on attentions too
    assert not UpperLayers(pairs).suffice(PROMPTS[0])


def test_an_adapter_that_changes_lower_layers_is_read_as_a_whole(build: Build) -> None:
    trainer = build("llama")
    change(trainer, 0)
    assert not UpperLayers(trainer).suffice(PROMPTS[0])
