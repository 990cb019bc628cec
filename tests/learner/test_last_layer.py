"""The last layer's MLP alone, on models of several families, random and tiny."""
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
from learner.last_layer import SMALL, LastLayer
from learner.trainer import PolicyTrainer, build_trainer
from tests.learner.test_tiny_model import CONFIG, VOCABULARY, save_tiny_model

LAYERS = SMALL + 1
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
}
WHOLE: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 3},
    "mixtral": {"num_local_experts": LAYERS, "moe_intermediate_size": 8},
}
"""A norm changes what the MLP makes, or no adapter is in it."""
TARGETS = {
    "phi3": ("qkv_proj", "down_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "mixtral": ("q_proj",),
}
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
        config = replace(CONFIG, lora_targets=TARGETS.get(kind, ("q_proj", "up_proj", "down_proj")))
        return build_trainer(config, str(folder), tmp_path / "work")

    return built


def change(trainer: PolicyTrainer, *parts: str) -> None:
    """Gives the adapters whose names have one of the parts an effect."""
    with torch.no_grad():
        for name, weight in trainer.policy.named_parameters():
            if ".lora_" in name and any(part in name for part in parts):
                weight.normal_(std=0.1)


LAST_MLP = f".{LAYERS - 1}.mlp."


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_last_mlp_makes_of_what_enters_it_what_the_whole_model_does(
    build: Build, kind: str
) -> None:
    trainer = build(kind, **FAMILIES[kind])
    last = LastLayer(trainer)
    assert last.suffices(PROMPTS[0])
    change(trainer, LAST_MLP)
    assert last.suffices(PROMPTS[0])
    for _ in range(2):  # computed, and kept
        torch.testing.assert_close(last.read(PROMPTS), last.read_whole(PROMPTS))


def test_a_classifier_learns_in_it_alone(build: Build) -> None:
    trainer = build("llama")
    classifier = WordClassifier(trainer, ["w40", "w50"])
    before = trainer.weights.copy()
    examples = [Example(prompt, place % 2) for place, prompt in enumerate(PROMPTS)] * 8
    losses = classifier.fit(examples, examples[:3], 60, lambda _: None)
    assert min(losses) < losses[0] / 2
    found = classifier.logprobs(PROMPTS, lambda _: None)
    assert [max(range(2), key=values.__getitem__) for values in found] == [0, 1, 0]
    changed = {
        name for name, weight in trainer.weights.copy().items() if not weight.equal(before[name])
    }
    assert changed
    assert all(LAST_MLP in name for name in changed)
    layers = trainer.policy.get_base_model().base_model.layers
    assert not any("forward" in vars(layer) for layer in layers)  # as they were


def test_the_layers_below_read_a_prompt_once(build: Build) -> None:
    trainer = build("llama")
    bottom = trainer.policy.get_base_model().base_model.layers[0]
    rows: list[int] = []
    bottom.mlp.register_forward_hook(lambda _layer, given, _output: rows.append(len(given[0])))
    last = LastLayer(trainer)
    first = last.read(PROMPTS)
    torch.testing.assert_close(last.read(PROMPTS[1:]), first[1:])
    assert rows == [3]


@pytest.mark.parametrize("kind", WHOLE)
def test_where_the_mlp_does_not_suffice_the_whole_model_reads(build: Build, kind: str) -> None:
    assert not LastLayer(build(kind, **WHOLE[kind])).suffices(PROMPTS[0])


def test_a_small_model_and_an_adapter_that_changes_other_parts_are_read_as_a_whole(
    build: Build,
) -> None:
    assert not LastLayer(build("llama", num_hidden_layers=SMALL)).suffices(PROMPTS[0])
    trainer = build("qwen3")
    change(trainer, ".0.")
    assert not LastLayer(trainer).suffices(PROMPTS[0])
