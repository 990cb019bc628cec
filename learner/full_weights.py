"""All weights of a model as what is trained: each version is a whole model in a folder.

The folder holds what transformers and vLLM read: the weights in one safetensors file in float32,
and copies of the base's other files, so that the engine treats a version as it treats the base. A
tied head is one tensor. Beside them lie the card and the log-probs that an engine must agree with
before it serves the version (`nextstate/engine/whole.py`).
"""
# pyright: basic

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from learner.adapters import Card, disk_error, require_finite, write_card, write_folder
from learner.config import LearnerConfig
from learner.model import model_folder
from learner.weights import Weights
from nextstate import sealed_files
from nextstate.engine.adapter_files import (
    folder_sha256,
    is_checkpoint,
    verify_adapter,
)
from nextstate.engine.whole import PROBE_FILE
from nextstate.errors import AdapterError, LearnerError

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_COPIED_BYTES = 64 << 20
"""The largest other file of a base that is copied: tokenizers have some megabytes."""
_DISK_BYTES = 4 * 3
"""Of one weight: itself in the version's folder, and AdamW's two moments in the checkpoint."""
_PROMPTS, _PROMPT_TOKENS, _LIKELIEST = 8, 12, 5
"""Of the probe: prompts, tokens of each, and compared tokens after each."""


class FullWeights(Weights):
    """All weights of a model in float32.

    The base stays in memory beside them, on the same device.
    """

    _other_shape = (
        "the version to continue from has other layers than [engine] model: set it back, or start "
        "a new lineage"
    )

    def __init__(self, model: Any, config: LearnerConfig, *, autocast: bool = False) -> None:
        """`autocast` does not matter: passes compute in float32."""
        self._model = model
        self._config = config
        self._named = dict(model.named_parameters())
        for weight in self._named.values():
            weight.requires_grad_(True)
        self._base = {name: weight.detach().clone() for name, weight in self._named.items()}

    def reset(self) -> None:
        """See `Weights`."""
        self.put(self._base)

    @contextmanager
    def base(self) -> Generator[None]:
        """See `Weights`. The tensors change places; nothing is copied."""
        own = {name: weight.data for name, weight in self._named.items()}
        try:
            for name, weight in self._named.items():
                weight.data = self._base[name]
            yield
        finally:
            for name, weight in self._named.items():
                weight.data = own[name]

    @torch.no_grad()
    def change(self) -> float:
        """See `Weights`. Of matrices: a vector of a norm may be near zero in the base."""
        found = torch.zeros(())
        for name, weight in self._named.items():
            if weight.dim() < 2:
                continue
            moved = torch.linalg.vector_norm(weight.detach() - self._base[name])
            norm = torch.linalg.vector_norm(self._base[name])
            found = torch.maximum(found, (moved / norm).cpu())  # keeps what is not a number
        return float(found)

    def save(self, folder: Path, card: Card) -> str:
        """See `Weights`. Raises DiskError before it writes if there is no room."""
        require_finite({name: weight.detach() for name, weight in self._named.items()}, card)
        if sealed_files.is_encrypted(folder):
            raise LearnerError(
                "whole models cannot be encrypted yet, and this store is: set [learner] lora_rank "
                "to 1 or more, or run `nextstate encrypt --off`"
            )
        source = model_folder(self._model.name_or_path)
        self._require_room(folder)

        def fill(draft: Path) -> str:
            disable_progress_bar()  # the log is no terminal
            # transformers knows the names that a checkpoint has, which may differ from ours.
            self._model.save_pretrained(draft, max_shard_size="1000TB")
            for file in source.iterdir():
                small = file.is_file() and file.stat().st_size <= _COPIED_BYTES
                if small and not file.name.endswith(_WEIGHT_FILES):
                    shutil.copyfile(file, draft / file.name)
            (draft / PROBE_FILE).write_bytes(orjson.dumps({"probes": self._probe()}))
            sha256 = folder_sha256(draft)
            write_card(draft, card, sha256)
            return sha256

        return write_folder(folder, fill)

    def load(self, folder: Path, sha256: str | None) -> None:
        """See `Weights`."""
        if folder.is_dir() and not is_checkpoint(folder):
            raise LearnerError(
                f"{folder} is no whole model, and [learner] lora_rank = 0 trains all weights: set "
                "lora_rank back, or return to the base with `nextstate rollback 0`"
            )
        if sha256 is not None:
            verify_adapter(folder, sha256)
        try:
            saved = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise AdapterError(f"the model in {folder} cannot be read: {error}") from error
        self.put(dict(saved.named_parameters()))

    def _require_room(self, folder: Path) -> None:
        needed = _DISK_BYTES * sum(weight.numel() for weight in self._named.values())
        place = next(parent for parent in folder.parents if parent.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            reason = f"a version needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
            raise disk_error(folder, OSError(reason))

    @torch.no_grad()
    def _probe(self) -> list[dict[str, Any]]:
        """The likeliest tokens after fixed prompts of token ids, with their log-probs in nats."""
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        chosen = torch.Generator().manual_seed(0)
        # From the middle: the first tokens of a vocabulary are special, the last may be unused.
        low, high = vocabulary // 8, max(vocabulary // 2, vocabulary // 8 + 1)
        ids = torch.randint(low, high, (_PROMPTS, _PROMPT_TOKENS), generator=chosen)
        was_training = self._model.training
        self._model.eval()
        try:
            logits = self._model(input_ids=ids.to(self._model.device), use_cache=False).logits
        finally:
            self._model.train(was_training)
        top = logits[:, -1].float().log_softmax(-1).topk(min(_LIKELIEST, vocabulary))
        return [
            {"prompt": prompt, "tokens": tokens, "logprobs": logprobs}
            for prompt, tokens, logprobs in zip(
                ids.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
            )
        ]
