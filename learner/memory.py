"""What an update needs at its peak, counted before any weight is loaded.

The model is built from its configuration with tensors that have a shape and no content, and one
training pass over the longest sequence runs on them: whatever architecture transformers knows is
counted by its own code, with TRL's own log-probabilities. The teacher's and the base's passes keep
nothing for a gradient, so they need less. Measured on a CPU, the sum is at most a fifth over what
a model with a usual vocabulary needs; one of fewer than 32768 tokens leaves up to half a gigabyte
of TRL's tile untouched.
"""
# pyright: basic

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import orjson
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from learner.config import LearnerConfig
from learner.machine import free_ram
from learner.model import check_quantization, lora_config, model_shape, pick_device, pick_dtype
from learner.trl_grpo import add_fused_lm_head
from nextstate.errors import StartError

log = logging.getLogger(__name__)

GB = 1e9

_ADAPTER_BYTES = 4 * 5
"""A float32 weight of the adapter, its gradient, Adam's two moments, its value before the step."""
_PARKED_BYTES = 4 * 3
"""Of a lineage that waits: the weight and Adam's two moments."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bits with its share of the scales: a byte for 64, 4 bytes for 256 of those."""
_OVERHEAD = 1.25
"""Of an allocator on activations, which come and go: measured, 1.2 with float32 on a CPU."""
_STEP_TOKENS = 256
"""To which a length that fits is rounded down."""
_SAMPLED_LAYERS = 4
"""Of a deep model two short ones are counted, of this many layers and of twice as many."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that the learner holds at the peak of an update."""

    weights: int
    """Of the frozen base."""
    adapter: int
    """With gradients, Adam's moments and the copy that bounds the step."""
    parked: int
    """On the learner's device, of the lineages that train in turn; 0 on a GPU, for they wait in the
    machine's memory."""
    activations: int | None
    """Of forward and backward over the longest micro-batch with its log-probabilities; None where
    what they are depends on the tokens, as with some mixtures of experts."""
    rows: int
    """Samples of that micro-batch."""
    tokens: int
    """Tokens of each of them, prompt and completion."""

    @property
    def total(self) -> int:
        """Of all parts that are known."""
        return self.weights + self.adapter + self.parked + (self.activations or 0)

    def __str__(self) -> str:
        unknown = self.activations is None
        activations = "unknown" if self.activations is None else _gb(self.activations)
        parked = f"lineages that wait {_gb(self.parked)}, " if self.parked else ""
        return (
            f"{'more than ' if unknown else ''}{_gb(self.total)} GB: base {_gb(self.weights)}, "
            f"adapter with gradients and Adam {_gb(self.adapter)}, {parked}activations of "
            f"{self.rows} x {self.tokens} tokens {activations}"
        )


class Blueprint:
    """The model that `[learner]` would train, without its weights."""

    def __init__(self, config: LearnerConfig, model_path: str, lineages: int = 1) -> None:
        """Of a learner that so many lineages share.

        Raises StartError or ConfigError for a model that cannot be trained.
        """
        self.device = pick_device(config)
        self._dtype = pick_dtype(config, self.device)
        check_quantization(config, self.device)
        base: Any = model_shape(config, model_path)
        base.to(dtype=self._dtype)
        self._positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        self._weights = list({id(p): p for p in base.parameters()}.values())
        head = base.get_output_embeddings()
        self._linear = [
            module.weight
            for module in base.modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        add_fused_lm_head(base, outputs=("log_probs", "entropy"))
        with torch.device("meta"):
            self._model = get_peft_model(base, lora_config(config))
        self._adapter = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        copies = lineages if lineages > 1 else 0  # all wait while one is exchanged for another
        values = _PARKED_BYTES + (4 if config.teacher == "average" else 0)
        self.parked = copies * self._adapter * values
        """Bytes in the machine's memory of the lineages that wait."""
        self._model.train()
        self._model.enable_input_require_grads()

    def need(self, config: LearnerConfig) -> Need:
        """The peak with samples of `max_tokens`, or of as many as the model has positions."""
        tokens = min(config.max_tokens, self._positions or config.max_tokens)
        rows = max(1, min(config.batch_size, config.micro_batch_tokens // tokens))
        if config.gradient_checkpointing:
            options = {"use_reentrant": False}
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        else:
            self._model.gradient_checkpointing_disable()
        weights = sum(p.numel() for p in self._weights) * self._dtype.itemsize
        activations = self._activations(rows, tokens)
        if config.quantization == "4bit":
            compressed = sum(p.numel() for p in self._linear)
            weights -= int(compressed * (self._dtype.itemsize - _NF4_BYTES))
            if activations is not None:  # one layer at a time is unpacked
                activations += max(p.numel() for p in self._linear) * self._dtype.itemsize
        adapter = self._adapter * _ADAPTER_BYTES
        parked = self.parked if self.device.type == "cpu" else 0
        return Need(weights, adapter, parked, activations, rows, tokens)

    def _activations(self, rows: int, tokens: int) -> int | None:
        layers = _layers(self._model)
        depth = len(layers)
        few = _SAMPLED_LAYERS
        try:
            if depth <= 2 * few:
                return int(self._peak(rows, tokens) * _OVERHEAD)
            with _shortened(layers, few):
                short = self._peak(rows, tokens)
            with _shortened(layers, 2 * few):
                longer = self._peak(rows, tokens)
        except RuntimeError as error:  # an operation whose result's shape hangs on the tokens
            log.warning("the activations of this model cannot be counted: %s", error)
            return None
        return int((longer + (longer - short) * (depth / few - 2)) * _OVERHEAD)

    def _peak(self, rows: int, tokens: int) -> int:
        """Most bytes alive during a forward and backward pass, beside weights and gradients."""
        autocast = torch.autocast(
            "cpu",
            torch.bfloat16,
            enabled=self.device.type != "cpu" and self._dtype != torch.float32,
        )
        with FakeTensorMode():
            live = _LiveBytes(_without_content(self._model))
            ids = torch.zeros((rows, tokens), dtype=torch.long)
            mask = None if rows == 1 else torch.ones_like(ids)
            with live, _single_sequences():
                with autocast:
                    found = self._model(
                        input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True
                    )
                found.log_probs.sum().backward()
        return live.peak


def free_memory(device: torch.device, engine_share: float = 0.0) -> int | None:
    """Bytes that are free on the device now, or None where that is unknown.

    On a GPU of which vLLM takes `engine_share` of all, now or soon, no more than the rest.
    """
    if device.type != "cuda":
        return free_ram()
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(total * (1 - engine_share)))


def require_memory(
    config: LearnerConfig, model_path: str, lineages: int = 1, engine_share: float = 0.0
) -> str:
    """What training so many lineages needs and what there is, in one line.

    `engine_share` is `free_memory`'s. Raises StartError if it does not fit, with the numbers and
    the keys that would make it fit.
    """
    blueprint = Blueprint(config, model_path, lineages)
    device = blueprint.device
    ram = free_ram()
    if ram is not None and blueprint.parked > ram:
        raise StartError(
            f"the adapters and moments of {lineages} lineages that train in turn need "
            f"{_gb(blueprint.parked)} GB of the machine's memory, and {_gb(ram)} GB are free: set "
            f"[learner] lora_rank lower than {config.lora_rank}, or fewer [lineages.NAME]"
        )
    need = blueprint.need(config)
    free = free_memory(device, engine_share)
    budget = config.memory_gb * GB if config.memory_gb else None
    there = [value for value in (free, budget) if value is not None]
    if not there:
        return f"needs {need}; this system does not say what is free"
    limit = min(there)
    where = "allowed by [learner] memory_gb" if limit == budget else f"free on {device}"
    found = f"needs {need}; {_gb(limit)} GB are {where}"
    if need.total > limit:
        raise StartError(f"training {found}; {_remedies(blueprint, config, need, limit)}")
    return found


def _remedies(blueprint: Blueprint, config: LearnerConfig, need: Need, limit: float) -> str:
    """The settings that would make it fit, each with what would be needed then."""
    on_gpu = blueprint.device.type == "cuda"
    changes: list[dict[str, Any]] = []
    if not config.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if need.rows > 1:
        changes.append({"micro_batch_tokens": need.tokens})
    if on_gpu and config.quantization == "none":
        changes.append({"quantization": "4bit"})
    everything = {key: value for change in changes for key, value in change.items()}
    fitting: list[str] = []
    for change in changes:
        then = blueprint.need(replace(config, **change))
        if then.total <= limit:
            fitting.append(_settings(change, then))
    for change in ({}, everything) if everything else ({},):
        short = _shorter(blueprint, replace(config, **change), limit)
        if short is not None and short.tokens < need.tokens:
            fitting.append(_settings({**change, "max_tokens": short.tokens}, short))
    text = f"it fits with {' or '.join(fitting)}" if fitting else "no setting makes it fit"
    if on_gpu:
        text += '; a smaller "--gpu-memory-utilization" in [engine] args leaves more'
    return text


def _shorter(blueprint: Blueprint, config: LearnerConfig, limit: float) -> Need | None:
    """What the longest samples that fit need, about; None where no useful length fits."""
    whole = blueprint.need(config)
    half = blueprint.need(replace(config, max_tokens=whole.tokens // 2))
    slope = (whole.total - half.total) / (whole.tokens - half.tokens)
    if whole.total <= limit:
        return whole
    if slope <= 0:
        return None
    tokens = int(half.tokens + (limit - half.total) / slope) // _STEP_TOKENS * _STEP_TOKENS
    while tokens >= _STEP_TOKENS:
        need = blueprint.need(replace(config, max_tokens=tokens))
        if need.total <= limit:
            return need
        tokens = tokens // 2 // _STEP_TOKENS * _STEP_TOKENS
    return None


def _settings(change: dict[str, Any], need: Need) -> str:
    written = (
        f"{key} = {str(value).lower() if isinstance(value, bool) else orjson.dumps(value).decode()}"
        for key, value in change.items()
    )
    return f"[learner] {', '.join(written)} ({_gb(need.total)} GB)"


def _gb(count: float) -> str:
    return f"{count / GB:.2f}"


@contextmanager
def _single_sequences() -> Iterator[None]:
    """One row without padding needs no mask of tokens x tokens inside the block, as in training.

    There transformers sees it in the positions' values, which tensors without content do not have.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        """`others` are not counted, nor are the views of them that operations make."""
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:  # a view, or changed in place
            return
        self._known.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._now -= count


def _without_content(model: nn.Module) -> list[Tensor]:
    """Gives the model weights, buffers and gradients of the active fake mode, and returns them.

    They have a shape and a type only.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # holds the old ones too: ids must not be reused
    for module in model.modules():
        for tensors in (cast("dict[str, Any]", module._parameters), module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                        new.grad = torch.empty_like(new) if old.requires_grad else None
                    made[id(old)] = old, new
                tensors[name] = made[id(old)][1]
    new = [tensor for _, tensor in made.values()]
    return new + [tensor.grad for tensor in new if tensor.grad is not None]


def _layers(model: PeftModel) -> nn.ModuleList:
    """The decoder's layers, or an empty list where they are not found."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    return max(stacks, key=len, default=nn.ModuleList())


@contextmanager
def _shortened(layers: nn.ModuleList, kept: int) -> Iterator[None]:
    """Only the first layers inside the block."""
    rest = list(layers[kept:])
    del layers[kept:]
    try:
        yield
    finally:
        layers.extend(rest)
