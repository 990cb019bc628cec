"""A frozen base whose layers are divided over the ranks, where a whole one does not fit a device.

Each rank holds a share of every layer. FSDP2 puts a layer together on all ranks when a pass comes
to it, and drops it afterwards. Embedding, head and what is trained stay whole on every rank. So a
pass of one rank needs all of them: where a rank has nothing to read, it reads a single token and
lends its shares that way (`Ranks.join_pass`). What it reads so counts nowhere.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of a causal language model; empty if it has no such list, or several."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    named = {
        name: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = [name for name in named if not any(name.startswith(f"{o}.") for o in named)]
    return list(named[outer[0]]) if len(outer) == 1 else []


def divide(model: Any, device: torch.device, count: int) -> None:
    """Leaves a `count`-th of each layer of a frozen base on this rank's device.

    One layer at a time is there as a whole. Every rank must do it, each with the whole base on the
    CPU, where a safetensors file of the same precision takes no memory.
    """
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (count,))
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    model.to(device)
    divided = {weight for layer in layers for weight in layer.parameters()}
    whole = {weight for weight in model.parameters() if weight not in divided}
    # With a root, even one without weights, a layer is fetched while the one before it computes.
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)


def join_passes(trainer: Any) -> None:
    """From now on each pass over the base of a `PolicyTrainer` is one of all its ranks."""
    token = torch.ones((1, 1), dtype=torch.long, device=trainer.args.device)

    def lend(with_gradient: bool) -> None:
        with torch.set_grad_enabled(with_gradient):
            states = trainer.read(token, token).last_hidden_state
            if with_gradient:  # it is left out of the weights' own
                torch.autograd.grad(states.sum(), trainer.trained, allow_unused=True)

    trainer.ranks.lend = lend
    backbone = trainer.policy.get_base_model().base_model
    backbone.register_forward_pre_hook(lambda *_: trainer.ranks.join_pass(), prepend=True)
    trainer.weights.change()  # reads the layers' norms, which all ranks must sum up together
