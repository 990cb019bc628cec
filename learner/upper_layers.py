"""A model's upper layers, run on what the layers below them make of a prompt, computed once.

Only the upper layers' adapters are trained (`learner/classifier.py`), so what enters them stays the
same. It is computed without the adapter and without a gradient, and kept for the next time. Then
a step costs the upper layers alone: of 30 layers 4, forwards and backwards.

What is kept takes H numbers of the model's precision a token: 0.2 MB for a prompt of 100 tokens
where H = 576 in float32, 0.8 MB where H = 4096 in bfloat16. It lies in the CPU's memory, at most
`KEPT_BYTES` of it. What does not fit is computed again each time.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner.divided import decoder_layers
from learner.tensors import PAD_ID, pad_right
from learner.trainer import PolicyTrainer
from learner.trl_grpo import use_adapter

UPPER = 4
"""Layers that are trained. A model that has no more is trained as a whole."""
KEPT_BYTES = 2 * 10**9

_Prompt = tuple[int, ...]


class UpperLayers:
    """The last `UPPER` layers of a trainer's policy, with what is known to enter them."""

    def __init__(self, trainer: PolicyTrainer, kept_bytes: int = KEPT_BYTES) -> None:
        self._trainer = trainer
        self._layers = decoder_layers(trainer.policy.get_base_model())
        self._first = max(len(self._layers) - UPPER, 0)
        self._kept: dict[_Prompt, Tensor] = {}
        self._free = kept_bytes

    @torch.no_grad()
    def suffice(self, prompt: Sequence[int]) -> bool:
        """True if they make of a prompt what the whole policy does.

        False for a model whose layers cannot be told, or hand on more than one tensor (B, L, H),
        and for an adapter that changes lower layers.
        """
        if not self._first:
            return False
        try:
            found = self.read([prompt])
        except _UnknownLayer:
            return False
        return torch.allclose(found, self.read_whole([prompt]), rtol=1e-3, atol=1e-3)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The policy's last states (B, L, H), before the head, of B prompts padded on the right."""
        ids, mask = self._padded(prompts)
        states = self._entering([tuple(prompt) for prompt in prompts]).to(ids.device)
        with _replaced(self._layers[: self._first], lambda *_, **__: states):
            return self._trainer.read(ids, mask).last_hidden_state

    def read_whole(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The same by all layers."""
        return self._trainer.read(*self._padded(prompts)).last_hidden_state

    def _entering(self, prompts: Sequence[_Prompt]) -> Tensor:
        """What enters the upper layers, (B, L, H)."""
        found = {prompt: self._kept[prompt] for prompt in prompts if prompt in self._kept}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            states = self._computed(missing)
            for prompt, row in zip(missing, states, strict=True):
                found[prompt] = row[: len(prompt)].to("cpu", copy=True)
                size = found[prompt].nbytes
                if size <= self._free:
                    self._free -= size
                    self._kept[prompt] = found[prompt]
        return nn.utils.rnn.pad_sequence([found[prompt] for prompt in prompts], batch_first=True)

    @torch.no_grad()
    def _computed(self, prompts: Sequence[_Prompt]) -> Tensor:
        ids, mask = self._padded(prompts)
        handle = self._layers[self._first - 1].register_forward_hook(_stop)
        try:
            with use_adapter(self._trainer.policy, None):
                self._trainer.read(ids, mask)
        except _Reached as reached:
            (states,) = reached.args
        else:
            raise _UnknownLayer
        finally:
            handle.remove()
        if not isinstance(states, Tensor) or states.shape[:2] != ids.shape:
            raise _UnknownLayer
        return states

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids, mask = pad_right(prompts, PAD_ID)
        return ids.to(self._trainer.args.device), mask.to(self._trainer.args.device)


class _UnknownLayer(Exception):
    """A layer hands on something else than one tensor of states."""


class _Reached(Exception):
    """The pass has come to the upper layers; holds what enters them."""


def _stop(_layer: object, _given: object, output: object) -> None:
    raise _Reached(output)


@contextmanager
def _replaced(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Generator[None]:
    """Gives the layers another forward pass inside the block."""
    own = [(vars(layer), vars(layer).get("forward")) for layer in layers]
    for values, _ in own:
        values["forward"] = forward
    try:
        yield
    finally:
        for values, before in own:
            if before is None:
                del values["forward"]
            else:
                values["forward"] = before
