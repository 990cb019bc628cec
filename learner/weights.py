"""The weights that training changes: how they are copied, moved, saved and loaded.

`Weights` is what the rest of the learner knows about them: LoRA adapters, or all weights of the
model (`learner/full_weights.py`).
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from learner.adapters import Card, check_scale, load_weights, save_adapter
from learner.config import LearnerConfig
from learner.trl_grpo import use_adapter
from nextstate.engine.adapter_files import is_checkpoint
from nextstate.errors import LearnerError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the next update depends on, copied to the CPU.

    An update is measured against the snapshot taken before it, and goes back to it if it is
    rejected. A lineage waits as a snapshot while another one trains, and a checkpoint keeps the
    snapshot's `training` part on disk.
    """

    weights: Mapping[str, Tensor]
    """`Weights.copy`"""
    training: Mapping[str, Any]
    """Optimizer state, step counter and random number generators."""


class Weights(Protocol):
    """One form of trained weights."""

    _named: Mapping[str, torch.nn.Parameter]
    """The parameters by the names that the engine loads."""
    _other_shape: str
    """How to say that values have another shape."""

    def copy(self) -> dict[str, Tensor]:
        """A float32 copy on the CPU, by the names that the engine loads."""
        return {
            name: weight.detach().to("cpu", torch.float32, copy=True)
            for name, weight in self._named.items()
        }

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Continues from these values. Raises LearnerError if they have another shape."""
        expected = {name: weight.shape for name, weight in self._named.items()}
        if expected != {name: value.shape for name, value in values.items()}:
            raise LearnerError(self._other_shape)
        for name, weight in self._named.items():
            weight.copy_(values[name])

    def reset(self) -> None:
        """Continues from the base model."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Inside the block the model is the base. Only for passes without a gradient."""
        ...

    def change(self) -> float:
        """The largest change of a layer, relative to the layer's own norm; Frobenius norms."""
        ...

    @torch.no_grad()
    def scale_way(self, start: Mapping[str, Tensor], factor: float) -> None:
        """Makes the way from `start` to the present values `factor` times as long."""
        for name, weight in self._named.items():
            weight.copy_(torch.lerp(start[name].to(weight.device), weight, factor))

    def save(self, folder: Path, card: Card) -> str:
        """Writes the folder that the engine loads. Returns its `folder_sha256`.

        Raises DiskError if it cannot be written and LearnerError for values that are not finite.
        """
        ...

    def load(self, folder: Path, sha256: str | None) -> None:
        """Continues from a saved folder. Raises AdapterError if it is not what was saved."""
        ...


class LoraWeights(Weights):
    """The low-rank pairs of a peft model, in float32."""

    _other_shape = (
        "the adapter to continue from has other layers or another rank than [learner] lora_rank "
        "and lora_targets say: set them back, or start a new lineage"
    )

    def __init__(self, model: Any, config: LearnerConfig, *, autocast: bool = False) -> None:
        """`autocast`: passes compute in bfloat16."""
        for weight in model.parameters():
            if (
                weight.requires_grad
            ):  # of a 4-bit base TRL's are bfloat16: small steps would be lost
                weight.data = weight.data.float()
        for layer in model.modules():
            if autocast and isinstance(layer, LoraLayer):
                # Autocast rounds an adapter's input to bfloat16 anyway; peft would first widen it.
                layer.cast_input_dtype_enabled = False
        self._norms: dict[str, Tensor] = {}
        self._model = model
        self._config = config
        self._named = {
            name.replace(".default", ""): weight
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def reset(self) -> None:
        """See `Weights`: a new adapter that has no effect yet."""
        torch.manual_seed(self._config.seed)
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)

    def base(self) -> AbstractContextManager[None]:
        """See `Weights`."""
        return use_adapter(self._model, None)

    def change(self) -> float:
        """See `Weights`."""
        return weight_change(self._model, self._norms)

    def save(self, folder: Path, card: Card) -> str:
        """See `Weights`."""
        base = self._model.get_base_model().name_or_path
        return save_adapter(folder, self.copy(), self._config, base, card)

    def load(self, folder: Path, sha256: str | None) -> None:
        """See `Weights`."""
        if is_checkpoint(folder):
            raise LearnerError(
                f"{folder} is a whole model, and [learner] lora_rank = {self._config.lora_rank} "
                "trains adapters: set it to 0, or return to the base with `nextstate rollback 0`"
            )
        check_scale(folder, self._config)
        self.put(load_weights(folder, sha256))


def weight_change(model: torch.nn.Module, norms: dict[str, Tensor]) -> float:
    """Largest ‖scale · B·A‖ / ‖W‖ over the adapted layers, Frobenius norms.

    ‖B·A‖² is the sum of (BᵀB) ∘ (AAᵀ), whose size is the rank. It bounds how much a layer's output
    can change relative to the layer, for a model of any scale. `norms` caches ‖W‖ by layer: reading
    all of a large model takes seconds, and ‖W‖ never changes.
    """
    found = torch.zeros(())
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        a = layer.lora_A["default"].weight.detach().float()
        b = layer.lora_B["default"].weight.detach().float()
        product = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt() * layer.scaling["default"]
        if name not in norms:
            weight = dequantize_module_weight(layer.get_base_layer()).detach()
            norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
            # Of a divided base the ranks add up their shares of the sum.
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        found = torch.maximum(found, (product / norms[name]).cpu())  # keeps what is not a number
    return float(found)


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its tensors copied to the CPU: an optimizer changes its own in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), dict(state))
