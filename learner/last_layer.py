"""The MLP of a model's last layer, run on what enters it at the end of a prompt, computed once.

A judge learns in this MLP alone (`learner/classifier.py`). Nothing reads its output but the head,
and only the last position's counts. So two rows of H numbers tell all that the layers below make of
a prompt: what enters the MLP, and what its output is added to. They are computed without a
gradient and kept in the CPU's memory, 5 kB a prompt where H = 576. Then an epoch takes seconds.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from learner.tensors import PAD_ID, pad_right
from learner.trainer import PolicyTrainer
from learner.trl_grpo import use_adapter

SMALL = 4
"""A model with at most so many layers is trained as a whole."""

_Prompt = tuple[int, ...]


class LastLayer:
    """The last layer of a trainer's policy, with what is known to enter its MLP."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self._trainer = trainer
        self._layers = _layers_of(trainer.policy)
        large = len(self._layers) > SMALL
        mlp = getattr(self._layers[-1], "mlp", None) if large else None
        self._mlp: nn.Module | None = mlp if _adapter(mlp) else None
        self._kept: dict[_Prompt, tuple[Tensor, Tensor]] = {}

    def freeze_others(self) -> None:
        """Lets only the MLP's adapter learn. No effect where the model is trained as a whole."""
        if self._mlp is not None:
            learning = {id(weight) for weight in _adapter(self._mlp)}
            for weight in self._trainer.policy.parameters():
                weight.requires_grad_(id(weight) in learning)

    @torch.no_grad()
    def suffices(self, prompt: Sequence[int]) -> bool:
        """True if the MLP and what enters it make of a prompt what the whole policy does.

        False for a model that is trained as a whole, one whose MLP's output is not simply added,
        and an adapter that changes what enters it.
        """
        if self._mlp is None:
            return False
        try:
            found = self.read([prompt])
            whole = self.read_whole([prompt])
            # Another output must make the same difference.
            with _hooked(self._mlp, lambda _mlp, _given, output: 2 * output):
                found = torch.cat([found, self.read([prompt])])
                whole = torch.cat([whole, self.read_whole([prompt])])
        except _UnknownLayer:
            return False
        return torch.allclose(found, whole, rtol=1e-3, atol=1e-3)

    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The policy's states (B, H) at the ends of B prompts, before the head."""
        rest, entering = self._entering([tuple(prompt) for prompt in prompts])
        device, dtype = self._trainer.args.device, entering.dtype
        with self._trainer.accelerator.autocast():
            made = self._mlp(entering.to(device)) if self._mlp is not None else None
        if not isinstance(made, Tensor):
            raise _UnknownLayer
        states = (rest.to(device) + made.float()).to(dtype)
        one = torch.full((len(prompts), 1), PAD_ID, device=device)
        with _replaced(self._layers, lambda *_, **__: states):
            return self._trainer.read(one, torch.ones_like(one)).last_hidden_state[:, 0]

    def read_whole(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The same by all layers."""
        ids, mask = pad_right(prompts, PAD_ID)
        device = self._trainer.args.device
        states = self._trainer.read(ids.to(device), mask.to(device)).last_hidden_state
        return _at_ends(states, prompts)

    def _entering(self, prompts: Sequence[_Prompt]) -> tuple[Tensor, Tensor]:
        """What the MLP's output is added to, and what enters it, both (B, 1, H)."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if missing:
            self._kept |= zip(missing, self._computed(missing), strict=True)
        rest, entering = zip(*(self._kept[prompt] for prompt in prompts), strict=True)
        return torch.stack(rest)[:, None], torch.stack(entering)[:, None]

    @torch.no_grad()
    def _computed(self, prompts: Sequence[_Prompt]) -> Iterator[tuple[Tensor, Tensor]]:
        seen: dict[str, Any] = {}

        def mlp(_layer: object, given: Any, output: Any) -> None:
            seen.update(entering=given[0] if given else None, made=output)

        def layer(_layer: object, _given: object, output: Any) -> None:
            seen.update(whole=output)

        assert self._mlp is not None
        with (
            use_adapter(self._trainer.policy, None),
            _hooked(self._mlp, mlp),
            _hooked(self._layers[-1], layer),
        ):
            self.read_whole(prompts)
        if not all(isinstance(one, Tensor) and one.dim() == 3 for one in seen.values()):
            raise _UnknownLayer
        ends = {name: _at_ends(states, prompts) for name, states in seen.items()}
        rest = ends["whole"].float() - ends["made"].float()
        return zip(rest.cpu(), ends["entering"].cpu(), strict=True)


class _UnknownLayer(Exception):
    """A layer hands on something else than one tensor of states."""


def _adapter(layer: nn.Module | None) -> list[nn.Parameter]:
    """The adapter's weights in a layer."""
    named = [] if layer is None else layer.named_parameters()
    return [weight for name, weight in named if ".lora_" in name]


def _at_ends(states: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The states (B, H) at the prompts' last tokens, of (B, L, H)."""
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=states.device)
    return states[torch.arange(len(prompts), device=states.device), ends]


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., Any]) -> Generator[None]:
    """Calls the hook with each output of the layer inside the block."""
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _layers_of(policy: Any) -> Sequence[nn.Module]:
    """The decoder's layers; empty if the model has no such list, or several."""
    count = getattr(policy.config.get_text_config(), "num_hidden_layers", None)
    named = {
        name: module
        for name, module in policy.get_base_model().base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [name for name in named if not any(name.startswith(f"{o}.") for o in named)]
    return list(named[outer[0]]) if len(outer) == 1 else []


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
