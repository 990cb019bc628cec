"""The base model, its tokenizer and the adapter's shape, from this machine only."""
# pyright: basic

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from learner.config import ALL_LINEAR, LearnerConfig
from learner.divided import divide
from nextstate.errors import ConfigError, StartError


def load_model(config: LearnerConfig, model_path: str) -> PreTrainedModel:
    """The frozen base on its device, or this rank's share of it where `config.divided`.

    Raises StartError or ConfigError, naming the key to fix.
    """
    device = pick_device(config)
    check_quantization(config, device)
    dtype = pick_dtype(config, device)
    if config.quantization == "4bit":
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options: dict[str, Any] = {"quantization_config": four_bits, "device_map": {"": device}}
    else:
        options = {}
    model = _local(AutoModelForCausalLM, model_path, dtype=dtype, use_safetensors=True, **options)
    _check_targets(config, model)
    if config.divided:
        divide(model, device, config.ranks)
        return model
    return model if options else model.to(device)


def load_tokenizer(model_path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises StartError."""
    return _local(AutoTokenizer, model_path)


def model_shape(config: LearnerConfig, model_path: str) -> PreTrainedModel:
    """The model without its weights, on torch's `meta` device; raises like `load_model`."""
    model_config = _local(AutoConfig, model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    _check_targets(config, model)
    return model


def causal_model(policy: Any) -> Any:
    """The language model itself, with or without peft's layers around it."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


def model_folder(model_path: str) -> Path:
    """Where the files of a model lie: its folder, or that of the local model cache."""
    if Path(model_path).is_dir():
        return Path(model_path)
    found = try_to_load_from_cache(model_path, "config.json")
    if not isinstance(found, str):
        raise StartError(
            f"[engine] model = {model_path!r} is not in the local model cache any more"
        )
    return Path(found).parent


def lora_config(config: LearnerConfig) -> LoraConfig:
    """The adapter's shape."""
    targets = list(config.lora_targets)
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets if targets != [ALL_LINEAR] else ALL_LINEAR,
        task_type="CAUSAL_LM",
    )


def pick_device(config: LearnerConfig) -> torch.device:
    """The device that `[learner] device` means on this machine; raises StartError without it."""
    has_gpu = torch.cuda.is_available()
    if config.device == "auto":
        return torch.device("cuda", 0) if has_gpu else torch.device("cpu")
    if config.device == "cuda" and not has_gpu:
        raise StartError(
            '[learner] device = "cuda": this machine has no usable GPU; set it to auto'
        )
    return torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")


def check_devices(config: LearnerConfig, device: torch.device) -> None:
    """Raises StartError if several ranks cannot have a GPU each."""
    seen = torch.cuda.device_count() if device.type == "cuda" else config.ranks
    if config.ranks > max(seen, 1):
        raise StartError(
            f"[learner] ranks = {config.ranks}: each takes a GPU of its own, and the learner sees "
            f"{seen}: set ranks to at most {seen}, or name more in CUDA_VISIBLE_DEVICES"
        )


def pick_dtype(config: LearnerConfig, device: torch.device) -> torch.dtype:
    """The precision of the base: float32 if it is trained itself."""
    if config.trains_all:
        return torch.float32
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def _local(kind: Any, model_path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(model_path, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        remedy = "name a folder with weights and tokenizer"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model_path) and not Path(model_path).exists():
            remedy = f"run `nextstate fetch {model_path}` once, or name a folder with all its files"
        raise StartError(
            f"[engine] model = {model_path!r} cannot be loaded for training from local "
            f"files: {reason}; {remedy}"
        ) from error


def check_quantization(config: LearnerConfig, device: torch.device) -> None:
    """Raises StartError if the quantization cannot work."""
    if config.quantization == "none":
        return
    asked = f'quantization = "{config.quantization}"'
    if device.type != "cuda":
        raise StartError(
            f"{asked} needs an NVIDIA GPU, and training runs on {device}: set it to "
            '"none", or name a GPU in [learner] device'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StartError(
            f"{asked} needs the package bitsandbytes, which is not installed: "
            '`pip install bitsandbytes`, or set it to "none"'
        )


def _check_targets(config: LearnerConfig, model: PreTrainedModel) -> None:
    if config.trains_all:
        return
    head = model.get_output_embeddings()
    known = {
        name.rsplit(".", 1)[-1]: None
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }
    if not known:
        raise ConfigError(
            f"[engine] model is a {model.config.model_type}, which has no linear layers for LoRA: "
            "name another model"
        )
    missing = [name for name in config.lora_targets if name not in known and name != ALL_LINEAR]
    if missing:
        raise ConfigError(
            f"[learner] lora_targets names {', '.join(missing)}, which this model does not have: "
            f'name some of {", ".join(known)}, or ["{ALL_LINEAR}"]'
        )
