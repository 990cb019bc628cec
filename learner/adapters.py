"""Adapters as folders: written completely or not at all, and checked before use.

A folder holds what peft and vLLM read (`adapter_config.json`, `adapter_model.safetensors` in
float32) and `card.json`, which says where the adapter comes from. As a command this module makes
the adapter without effect that warms vLLM up:

    python -m learner.adapters zero --model MODEL --rank 16 --out DIR
"""
# pyright: basic

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from learner.config import LearnerConfig
from learner.model import lora_config, model_shape
from nextstate import sealed_files
from nextstate.engine.adapter_files import (
    CARD_FILE,
    WEIGHTS_FILE,
    folder_sha256,
    unreadable,
    verify_adapter,
)
from nextstate.errors import DiskError, LearnerError, SealError
from nextstate.private_files import make_folder


@dataclass(frozen=True, slots=True)
class Card:
    """Where an adapter comes from."""

    lineage: str
    number: int
    parent: int | None
    method: str
    turns: Sequence[str]
    """Ids of the turns that its update used."""
    metrics: Mapping[str, float]


def save_adapter(
    path: Path, weights: Mapping[str, Tensor], config: LearnerConfig, model_path: str, card: Card
) -> str:
    """Writes the folder `path` in one step and returns its `folder_sha256`.

    An existing folder was never registered (its learner was killed) and is replaced. Raises
    LearnerError for weights that are not finite.
    """
    require_finite(weights, card)

    def fill(folder: Path) -> str:
        sha256 = _write_adapter(folder, weights, config, model_path)
        write_card(folder, card, sha256)
        return sha256

    return write_folder(path, fill)


def write_card(folder: Path, card: Card, sha256: str) -> None:
    """Writes where the weights in a folder come from."""
    text = orjson.dumps({**asdict(card), "sha256": sha256}, option=orjson.OPT_INDENT_2)
    (folder / CARD_FILE).write_bytes(text)


def save_zero_adapter(model_path: str, config: LearnerConfig, path: Path) -> str:
    """Writes an adapter without any effect and returns its `folder_sha256`.

    Needs the model's configuration only: its weights are never read.
    """
    with torch.device("meta"):
        shape = get_peft_model(model_shape(config, model_path), lora_config(config))
    state = get_peft_model_state_dict(shape, save_embedding_layers=False)
    weights = {name: torch.zeros(v.shape) for name, v in state.items()}
    card = Card("warm-up", 0, None, "zero", (), {})
    return save_adapter(path, weights, config, model_path, card)


def load_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The adapter's tensors. Raises AdapterError if the file is missing, broken or not `sha256`.

    Raises EngineError if it cannot be read for now.
    """
    try:
        if sha256 is not None:
            verify_adapter(path, sha256)
        if sealed_files.is_sealed(path / WEIGHTS_FILE):
            return load(sealed_files.read(path / WEIGHTS_FILE))
        return load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError, SealError) as error:
        raise unreadable(path, f"the adapter in {path} cannot be read: {error}", error) from error


def check_scale(path: Path, config: LearnerConfig) -> None:
    """Raises LearnerError if the adapter was trained for another scale than `config`'s."""
    try:
        saved = orjson.loads((path / "adapter_config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise unreadable(path, f"the adapter in {path} cannot be read: {error}", error) from error
    if saved["lora_alpha"] != config.lora_alpha:
        raise LearnerError(
            "the adapter to continue from was trained with lora_alpha = "
            f"{saved['lora_alpha']}, and its weights mean something else with "
            f"{config.lora_alpha}: set it back, or start a new lineage"
        )


def write_folder(path: Path, fill: Callable[[Path], str]) -> str:
    """`fill` writes a new folder beside `path`; it is made durable and moved there.

    If that fails, raises DiskError and leaves nothing.
    """
    parent = path.parent
    draft = parent / f".{path.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        make_folder(draft)
        result = fill(draft)
        for file in sorted(draft.iterdir()):
            file.chmod(0o600)
            sync(file)
        sync(draft)
        if path.exists():
            shutil.rmtree(path)
        draft.rename(path)
        sync(parent)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def disk_error(path: Path, error: Exception) -> DiskError:
    """The error for a `path` that could not be written, with what helps."""
    return DiskError(
        f"{path} cannot be written: {error}; make room where [store] dir is, or move it"
    )


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_adapter(
    folder: Path, weights: Mapping[str, Tensor], config: LearnerConfig, model_path: str
) -> str:
    shape = lora_config(config)
    # The names themselves: the engine may read a word like "all-linear" differently.
    shape.target_modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights})
    shape.base_model_name_or_path = model_path
    shape.inference_mode = True
    shape.save_pretrained(str(folder))
    file, about = folder / WEIGHTS_FILE, {"format": "pt"}
    if sealed_files.is_encrypted(file):  # no plain byte of it may reach the disk
        sealed_files.write(file, save(dict(weights), metadata=about))
    else:
        save_file(dict(weights), file, metadata=about)
    return folder_sha256(folder)


def require_finite(weights: Mapping[str, Tensor], card: Card) -> None:
    """Raises LearnerError for weights that are not finite."""
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise LearnerError(
            f"version {card.number} of {card.lineage} has weights that are not finite, first in "
            f"{broken[0]}: it is not kept; lower [learner] step_kl"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m learner.adapters")
    commands = parser.add_subparsers(dest="command", required=True)
    zero = commands.add_parser("zero", help="write an adapter without any effect")
    zero.add_argument("--model", required=True)
    zero.add_argument("--rank", type=int, default=LearnerConfig().lora_rank)
    zero.add_argument("--targets", nargs="+", default=LearnerConfig().lora_targets)
    zero.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    config = LearnerConfig(lora_rank=given.rank, lora_targets=tuple(given.targets))
    save_zero_adapter(given.model, config, given.out)


if __name__ == "__main__":
    main()
