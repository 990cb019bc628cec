"""Adapter folders: whole or absent, checked, and without effect when they are to have none."""

import errno
import json
import os
import resource
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, Phi3Config

from learner.adapters import (
    Card,
    load_weights,
    main,
    save_adapter,
    save_zero_adapter,
)
from learner.checkpoint import Checkpoint, save_checkpoint
from learner.config import LearnerConfig
from learner.folders import version_path
from learner.model import check_quantization, load_model, load_tokenizer
from learner.trainer import PolicyTrainer
from nextstate.engine.adapter_files import folder_sha256, verify_adapter
from nextstate.errors import (
    AdapterError,
    ConfigError,
    DiskError,
    EngineError,
    LearnerError,
    StartError,
)
from nextstate.records import PolicyVersion, VersionState
from tests.learner.test_tiny_model import (
    CONFIG,
    GOOD,
    PROMPT,
    load_float64,
    logprobs,
    save_tiny_model,
)

CARD = Card("main", 1, 0, "combined", ["turn-1", "turn-2"], {"loss": 0.5})


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.lora_A.weight": torch.arange(6.0).reshape(2, 3), "a.lora_B.weight": torch.ones(3, 2)}


def test_a_saved_adapter_reads_back_with_its_card(tmp_path, weights):
    path = version_path(tmp_path, "main", 1)
    assert path == tmp_path / "versions" / "main" / "v000001"
    sha256 = save_adapter(path, weights, CONFIG, "some/model", CARD)
    assert sha256 == folder_sha256(path)
    card = json.loads((path / "card.json").read_text())
    assert card["turns"] == ["turn-1", "turn-2"]
    assert (card["number"], card["parent"], card["sha256"]) == (1, 0, sha256)
    assert json.loads((path / "adapter_config.json").read_text())["r"] == CONFIG.lora_rank
    loaded = load_weights(path, sha256)
    assert {n: t.tolist() for n, t in loaded.items()} == {n: t.tolist() for n, t in weights.items()}
    assert [p.name for p in path.parent.iterdir()] == ["v000001"]


def test_a_failed_save_leaves_nothing(tmp_path, weights, monkeypatch):
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = version_path(tmp_path, "main", 1)
    monkeypatch.setattr("learner.adapters.save_file", full_disk)
    with pytest.raises(LearnerError, match="No space left"):
        save_adapter(path, weights, CONFIG, "some/model", CARD)
    assert list(path.parent.iterdir()) == []


def test_a_disk_without_room_for_a_folder_is_a_disk_error(tmp_path, weights, monkeypatch):
    def full_disk(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learner.adapters.make_folder", full_disk)
    with pytest.raises(DiskError, match=r"No space left.*make room"):
        save_adapter(version_path(tmp_path, "main", 1), weights, CONFIG, "some/model", CARD)


def test_an_unregistered_folder_of_a_killed_learner_is_replaced(tmp_path, weights):
    path = version_path(tmp_path, "main", 1)
    path.mkdir(parents=True)
    (path / "leftover").touch()
    save_adapter(path, weights, CONFIG, "some/model", CARD)
    assert not (path / "leftover").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, weights, value):
    weights["a.lora_B.weight"][1, 1] = value
    with pytest.raises(LearnerError, match="not finite"):
        save_adapter(version_path(tmp_path, "main", 1), weights, CONFIG, "some/model", CARD)
    assert not (tmp_path / "versions").exists()


def test_a_changed_file_is_noticed(tmp_path, weights):
    path = version_path(tmp_path, "main", 1)
    sha256 = save_adapter(path, weights, CONFIG, "some/model", CARD)
    verify_adapter(path, sha256)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(AdapterError, match="changed on disk"):
            load_weights(path, sha256)
        (path / name).write_bytes(whole)
    load_weights(path, sha256)


@pytest.mark.parametrize("to", [".", "nowhere"])
def test_a_link_to_a_folder_or_to_nothing_is_noticed(tmp_path, weights, to):
    path = version_path(tmp_path, "main", 1)
    sha256 = save_adapter(path, weights, CONFIG, "some/model", CARD)
    (path / "more").symlink_to(to)
    with pytest.raises(AdapterError, match="more"):
        verify_adapter(path, sha256)


def test_a_folder_that_cannot_be_listed_for_now_has_not_changed(tmp_path, weights, monkeypatch):
    path = version_path(tmp_path, "main", 1)
    sha256 = save_adapter(path, weights, CONFIG, "some/model", CARD)

    def fails(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fails)
        with pytest.raises(EngineError, match="Permission denied"):
            verify_adapter(path, sha256)
    verify_adapter(path, sha256)


def test_a_file_whose_name_is_not_utf_8_is_noticed(tmp_path, weights):
    path = version_path(tmp_path, "main", 1)
    sha256 = save_adapter(path, weights, CONFIG, "some/model", CARD)
    Path(os.fsdecode(bytes(path / "caf") + b"\xe9")).touch()
    with pytest.raises(AdapterError, match="changed on disk"):
        verify_adapter(path, sha256)


def test_a_lineage_cannot_leave_its_folder(tmp_path):
    with pytest.raises(LearnerError, match="cannot name a folder"):
        version_path(tmp_path, "../etc", 1)


def test_a_zero_adapter_has_no_effect(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    main(["zero", "--model", model_path, "--rank", "4", "--out", str(tmp_path / "zero")])
    base = load_float64(model_path)
    with torch.no_grad():
        before = logprobs(base, PROMPT, GOOD)
        adapted = PeftModel.from_pretrained(base, tmp_path / "zero")
        assert torch.equal(logprobs(adapted, PROMPT, GOOD), before)
    names = load_weights(tmp_path / "zero")
    assert len(names) == 2 * 7 * 2  # layers, projections, A and B


def test_a_zero_adapter_needs_no_weights(tmp_path):
    model_path = save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    save_zero_adapter(model_path, CONFIG, tmp_path / "zero")
    assert (tmp_path / "zero" / "adapter_model.safetensors").exists()


def test_a_missing_model_is_one_clear_message(tmp_path):
    with pytest.raises(StartError, match=r"\[engine\] model = .*cannot be loaded"):
        save_zero_adapter(str(tmp_path / "nowhere"), CONFIG, tmp_path / "zero")


@pytest.mark.parametrize("name", ["c_attn", "lm_head", "mlp", "all_linear"])
def test_a_layer_that_cannot_have_a_pair_is_refused_with_those_that_can(tmp_path, name):
    model_path = save_tiny_model(tmp_path / "model")
    config = LearnerConfig(lora_targets=("q_proj", name))
    with pytest.raises(ConfigError, match=rf"names {name}, .*q_proj, k_proj.*\[\"all-linear\"\]"):
        save_zero_adapter(model_path, config, tmp_path / "zero")


def test_another_architectures_layers_are_known_by_their_own_names(tmp_path):
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(tmp_path)
    fused = "o_proj, qkv_proj, gate_up_proj, down_proj"
    with pytest.raises(ConfigError, match=f"name some of {fused}, or"):
        save_zero_adapter(str(tmp_path), CONFIG, tmp_path / "zero")
    everything = replace(CONFIG, lora_targets=("all-linear",))
    save_zero_adapter(str(tmp_path), everything, tmp_path / "zero")
    names = load_weights(tmp_path / "zero")
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert layers == set(fused.split(", "))


def test_a_model_without_linear_layers_is_refused(tmp_path):
    GPT2Config(n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="is a gpt2, which has no linear layers"):
        save_zero_adapter(str(tmp_path), CONFIG, tmp_path / "zero")


@pytest.fixture
def vllm() -> tuple[Any, Any]:
    """vLLM's reader of adapters and its limits, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("vllm")
        from vllm.config.lora import LoRAConfig
        from vllm.lora.peft_helper import PEFTHelper
    return PEFTHelper, LoRAConfig(max_lora_rank=16)


def test_vllm_reads_the_scale_that_was_trained(tmp_path, vllm):
    model_path = save_tiny_model(tmp_path / "model")
    config = replace(CONFIG, lora_targets=("all-linear",))
    save_zero_adapter(model_path, config, tmp_path / "zero")
    reader, limits = vllm
    read = reader.from_local_dir(str(tmp_path / "zero"), max_position_embeddings=None)
    read.validate_legal(limits)
    assert read.vllm_lora_scaling_factor == config.lora_alpha / config.lora_rank == 2.0


def test_the_adapter_of_a_4_bit_base_is_float32(tmp_path):
    """TRL makes it bfloat16, of which small steps are lost."""
    model = load_model(CONFIG, save_tiny_model(tmp_path / "model"))
    model.is_loaded_in_4bit = True
    trainer = PolicyTrainer(CONFIG, model, load_tokenizer(str(tmp_path / "model")), tmp_path)
    assert {p.dtype for p in trainer.policy.parameters() if p.requires_grad} == {torch.float32}


def test_four_bits_without_a_gpu_or_the_package_are_refused(tmp_path, monkeypatch):
    config = replace(CONFIG, quantization="4bit", device="cpu")
    model_path = save_tiny_model(tmp_path / "model")
    with pytest.raises(StartError, match=r'quantization = "4bit" needs an NVIDIA GPU.* on cpu'):
        load_model(config, model_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartError, match="pip install bitsandbytes"):
        check_quantization(config, torch.device("cuda", 0))


def test_the_configuration_loads_without_torch():
    code = "import sys, learner.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_write_that_the_system_cuts_short_leaves_nothing_and_says_what_helps(tmp_path):
    """With a real limit on a file's size, which a write hits half-way."""
    folder = tmp_path / "versions"
    folder.mkdir()
    large = {"a.lora_A.weight": torch.ones(512, 512)}
    version = PolicyVersion("main", 1, 0, "p", "ff", 1, VersionState.CANDIDATE)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(DiskError) as adapter:
            save_adapter(folder / "v000001", large, LearnerConfig(), "some/model", CARD)
        with pytest.raises(DiskError) as checkpoint:
            save_checkpoint(folder, Checkpoint(version, "b", {"optimizer": large}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    for found, name in ((adapter, "v000001"), (checkpoint, "checkpoint.pt")):
        assert str(found.value).startswith(f"{folder}/{name} cannot be written: ")
        assert str(found.value).endswith("make room where [store] dir is, or move it")
    assert list(folder.iterdir()) == []
