"""Whether training fits into memory: a short sum before loading, then one trial pass.

The sum counts what is certain to be held: the base, the adapter with gradients and AdamW's moments,
and the snapshots. It decides whether the ranks divide the base. It stops a learner that can only be
killed for memory, again after every restart. What a forward and backward pass needs is found out by
one pass over the largest batch, or on a CPU by a short one if that is enough to know.
"""
# pyright: basic

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from learner.config import LearnerConfig
from learner.divided import decoder_layers
from learner.model import (
    check_devices,
    check_quantization,
    lora_config,
    model_shape,
    pick_device,
    pick_dtype,
)
from learner.trainer import PolicyTrainer
from nextstate.errors import NoRoomError, StartError
from nextstate.free_memory import free_ram, kib

GB = 1e9
_TRAINED_BYTES = 4 * 4
"""Of one float32 adapter weight: itself, its gradient and AdamW's two moments."""
_SNAPSHOT_BYTES = 4 * 3
"""Of one adapter weight in a snapshot: itself and the two moments."""
_GATHERED = 3
"""Layers of a divided base that a pass holds as a whole: the one that computes, the buffer in which
it came from the other ranks, and the next one."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of one weight in 4 bits: its scales are a byte for 64 weights and 4 bytes for 256 of those."""
_SHORT_PASSES = (128, 1024)
"""Tokens of the passes whose memory is counted on a CPU: the first takes seconds, the second, which
tells more, a fraction of the largest one."""
_ALLOCATION = "[memory]"
"""The profiler's name for an allocation, and with a negative size for its end."""
_FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"
_UNFUSED = "aten::_scaled_dot_product_attention_math"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a model that is to be trained."""

    base: int
    """Bytes of the frozen base."""
    layers: int
    """Bytes of its layers, as far as ranks can divide them."""
    layer: int
    """Bytes of the largest of them."""
    adapter: int
    """The number of the adapter's weights."""

    def base_on(self, config: LearnerConfig) -> int:
        """Bytes of the base that each rank holds in a pass."""
        if not config.divided:
            return self.base
        return self.base - self.layers + self.layers // config.ranks + _GATHERED * self.layer


def require_memory(
    config: LearnerConfig, model_path: str, lineages: int = 1, engine_share: float = 0.0
) -> tuple[LearnerConfig, str]:
    """What weights, optimizer and snapshots need and what is free, in one line.

    Each rank holds all of it but the snapshots, of which others than the first hold one. If that
    does not fit, the ranks divide the base: the configuration that is returned says so.
    `engine_share` is the fraction of the first GPU that the engine takes. Raises StartError if it
    does not fit either way, with the numbers and the keys that reduce them, and StartError or
    ConfigError for a model that cannot be trained.
    """
    device = pick_device(config)
    sizes = _sizes(config, model_path, device)
    if device.type == "cuda":
        check_devices(config, device)
    try:
        return config, _required(config, sizes, device, lineages, engine_share)
    except StartError:
        if config.divided or config.ranks == 1 or not sizes.layers:
            raise
    config = replace(config, divided=True)
    return config, _required(config, sizes, device, lineages, engine_share)


def can_divide(config: LearnerConfig, model_path: str) -> bool:
    """Whether the ranks hold a whole base each, and could divide it."""
    can = config.ranks > 1 and not config.divided
    return can and _sizes(config, model_path, pick_device(config)).layers > 0


def _required(
    config: LearnerConfig, sizes: _Sizes, device: torch.device, lineages: int, engine_share: float
) -> str:
    """The line of `require_memory`. Raises StartError if it does not fit as configured."""
    count, base, ram = config.ranks, sizes.base_on(config), free_ram()
    adapter = sizes.adapter * _TRAINED_BYTES
    snapshots = sizes.adapter * _SNAPSHOT_BYTES * (count + (lineages if lineages > 1 else 0))
    in_ram = snapshots
    if device.type == "cuda":
        where = "on the GPU"
        if count > 1:
            how = "divide" if config.divided else "do not share"
            where = f"{where} of each of the {count} ranks, which {how} the base,"
        for rank in range(count):
            free, total = torch.cuda.mem_get_info(torch.device("cuda", rank))
            share = 0.0 if rank else engine_share
            _require(base + adapter, min(free, int(total * (1 - share))), where)
    else:
        in_ram += (base + adapter) * count
    if config.divided:  # each rank in its turn reads a whole base into the machine's memory
        others = 0 if device.type == "cuda" else base * (count - 1)
        in_ram = max(in_ram, sizes.base + others)
    _require(in_ram, ram, "in the machine's memory")
    known = "this system does not say what is free" if ram is None else f"{_gb(ram)} GB of RAM free"
    divided = f" that is divided, which has {_gb(sizes.base)} GB" if config.divided else ""
    return (
        f"needs {_gb(base)} GB for the base{divided}, {_gb(adapter)} GB for the adapter with "
        f"gradients and AdamW{', each for every rank' if count > 1 else ''}, "
        f"{_gb(snapshots)} GB for snapshots, and the passes; {known}"
    )


def try_largest_batch(trainer: PolicyTrainer) -> tuple[int, int]:
    """Tries the largest batch before any sample is leased. Returns its rows and tokens.

    Raises NoRoomError if memory is too small for it. On a CPU an allocation past what is free fails
    here, where Linux would otherwise kill the process later. There a whole pass may take minutes,
    so it is left out if a shorter one shows that memory is far from full. A tenth stays free:
    without it the kernel takes its page cache from vLLM and everybody else, and the machine stands
    still.
    """
    rows, tokens = largest_batch(trainer)
    free = free_ram() if trainer.args.device.type == "cpu" else None
    if free is not None:
        free //= trainer.ranks.count  # all ranks try at once
    try:
        with _allocations_limited_to(free and int(_USABLE * free)):
            if free is None or not _clearly_fits(trainer, rows * tokens, free):
                trainer.try_batch(rows, tokens)
            return rows, tokens
    except (RuntimeError, MemoryError) as error:
        reason = str(error).strip().split("\n")[0]
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and (
            "allocate memory" not in reason
        ):
            raise
        raise NoRoomError(f"the largest possible batch does not fit: {reason}; {REMEDY}") from error


def largest_batch(trainer: PolicyTrainer) -> tuple[int, int]:
    """Rows, and tokens of each, of the largest micro-batch that samples can make."""
    config, text = trainer.config, trainer.policy.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    tokens = min(config.max_tokens, positions or config.max_tokens)
    return max(1, min(config.batch_size, config.micro_batch_tokens // tokens)), tokens


_USABLE = 0.9
"""The share of the free memory that a trial pass may take."""
REMEDY = (
    "lower [learner] max_tokens, micro_batch_tokens or lora_rank, set gradient_checkpointing = "
    'true or, on a GPU, quantization = "4bit", or lower "--gpu-memory-utilization" in [engine] args'
)


def _clearly_fits(trainer: PolicyTrainer, tokens: int, free: int) -> bool:
    """True if a pass over `tokens` tokens on the CPU needs at most half of the `free` bytes.

    What a pass holds grows with its tokens, and some of it is constant. So a short pass holds at
    least as much for each token as a long one: its peak in proportion is a bound. That is not true
    of attention that computes a matrix of all pairs of tokens, so only fused attention counts.
    """
    for short in _SHORT_PASSES:
        if tokens <= short:
            break
        peak, names = held_by_pass(trainer, 1, short)
        bound = peak * tokens // (short - 1)  # its first token is the prompt, without logits
        if _FUSED not in names or _UNFUSED in names:
            break
        log.info(
            "a pass over %d tokens holds %s GB, so one over %d at most %s GB of %s GB free",
            *(short, _gb(peak), tokens, _gb(bound), _gb(free)),
        )
        if 0 < 2 * bound <= free:
            log.info("it fits")
            return True
    log.info("a pass over %d tokens is tried, which may take minutes", tokens)
    return False


def held_by_pass(trainer: PolicyTrainer, rows: int, tokens: int) -> tuple[int, set[str]]:
    """The bytes that a pass holds at its peak on the CPU, and the names of its operations."""
    gc.collect()  # what is freed during the pass would be taken off its peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.try_batch(rows, tokens)
    results: Any = seen.profiler
    events = results.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == _ALLOCATION]
    return max(accumulate(changes), default=0), {event.name() for event in events}


def _sizes(config: LearnerConfig, model_path: str, device: torch.device) -> _Sizes:
    check_quantization(config, device)
    base: Any = model_shape(config, model_path)
    head = base.get_output_embeddings()
    width = pick_dtype(config, device).itemsize
    weights = sum(p.numel() for p in base.parameters()) * width
    if config.quantization == "4bit":
        linear = [m.weight for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
        weights -= int(sum(p.numel() for p in linear) * (width - _NF4_BYTES))
    if config.trains_all:
        return _Sizes(weights, 0, 0, sum(p.numel() for p in base.parameters()))
    whole = decoder_layers(base) if config.quantization == "none" else ()
    layers = [sum(p.numel() for p in layer.parameters()) * width for layer in whole]
    with torch.device("meta"):
        model = get_peft_model(base, lora_config(config))
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _Sizes(weights, sum(layers), max(layers, default=0), adapter)


def _require(needed: float, free: int | None, where: str) -> None:
    if free is not None and needed > free:
        raise StartError(
            f"training needs {_gb(needed)} GB {where} for weights, optimizer and snapshots "
            f"alone, and {_gb(free)} GB are free: {REMEDY}; "
            "fewer [lineages.NAME] need fewer snapshots"
        )


def _gb(count: float) -> str:
    return f"{count / GB:.2f}"


@contextmanager
def _allocations_limited_to(free: int | None) -> Iterator[None]:
    """Inside the block the process can allocate `free` more bytes; no limit where None."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if free is not None:
        held = kib(Path("/proc/self/status").read_text(), "VmData")
        limits = [held + free, *(x for x in (soft, hard) if x != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
