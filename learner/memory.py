"""Whether training fits into memory: a short sum before loading, then one trial pass.

The sum counts what is certain to be held: the base, the adapter with gradients and AdamW's moments,
and the snapshots. It stops a learner that can only be killed for memory, again after every restart.
What a forward and backward pass needs is found out by one pass over the largest batch, or on a CPU
by a short one if that is enough to know.
"""
# pyright: basic

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from learner.config import LearnerConfig
from learner.model import (
    check_devices,
    check_quantization,
    lora_config,
    model_shape,
    pick_device,
    pick_dtype,
)
from learner.trainer import PolicyTrainer
from nextstate.errors import StartError
from nextstate.free_memory import free_ram, kib

GB = 1e9
_TRAINED_BYTES = 4 * 4
"""Of one float32 adapter weight: itself, its gradient and AdamW's two moments."""
_SNAPSHOT_BYTES = 4 * 3
"""Of one adapter weight in a snapshot: itself and the two moments."""
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


def require_memory(
    config: LearnerConfig, model_path: str, lineages: int = 1, engine_share: float = 0.0
) -> str:
    """What weights, optimizer and snapshots need and what is free, in one line.

    Each rank holds all of it but the snapshots, of which others than the first hold one.
    `engine_share` is the fraction of the first GPU that the engine takes. Raises StartError if it
    does not fit, with the numbers and the keys that reduce them, and StartError or ConfigError for
    a model that cannot be trained.
    """
    device, where = pick_device(config), "on the GPU"
    if config.ranks > 1:
        where = f"{where} of each of the {config.ranks} ranks, which do not share the base,"
    weights, adapter = _sizes(config, model_path, device)
    snapshots = adapter * _SNAPSHOT_BYTES * (config.ranks + (lineages if lineages > 1 else 0))
    trained, ram = weights + adapter * _TRAINED_BYTES, free_ram()
    if device.type == "cuda":
        check_devices(config, device)
        for rank in range(config.ranks):
            free, total = torch.cuda.mem_get_info(torch.device("cuda", rank))
            share = 0.0 if rank else engine_share
            _require(trained, min(free, int(total * (1 - share))), where)
        _require(snapshots, ram, "in the machine's memory")
    else:
        _require(trained * config.ranks + snapshots, ram, "in the machine's memory")
    known = "this system does not say what is free" if ram is None else f"{_gb(ram)} GB of RAM free"
    return (
        f"needs {_gb(weights)} GB for the base, {_gb(adapter * _TRAINED_BYTES)} GB for the adapter "
        f"with gradients and AdamW{', each for every rank' if config.ranks > 1 else ''}, "
        f"{_gb(snapshots)} GB for snapshots, and the passes; {known}"
    )


def try_largest_batch(trainer: PolicyTrainer) -> tuple[int, int]:
    """Tries the largest batch before any sample is leased. Returns its rows and tokens.

    Raises StartError if memory is too small for it. On a CPU an allocation past what is free fails
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
        raise StartError(f"the largest possible batch does not fit: {reason}; {REMEDY}") from error


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


def _sizes(config: LearnerConfig, model_path: str, device: torch.device) -> tuple[int, int]:
    """Bytes of the frozen base, and the number of the adapter's weights."""
    check_quantization(config, device)
    base: Any = model_shape(config, model_path)
    head = base.get_output_embeddings()
    width = pick_dtype(config, device).itemsize
    weights = sum(p.numel() for p in base.parameters()) * width
    if config.quantization == "4bit":
        linear = [m.weight for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
        weights -= int(sum(p.numel() for p in linear) * (width - _NF4_BYTES))
    if config.trains_all:
        return weights, sum(p.numel() for p in base.parameters())
    with torch.device("meta"):
        model = get_peft_model(base, lora_config(config))
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad)


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
