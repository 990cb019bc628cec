"""What does a training step cost on this machine: seconds, memory, and how busy the chip is?

A model of a given shape gets random weights, so nothing is downloaded and no vLLM is needed. The
learner loads it as it loads any, and its own trainer takes updates of one made-up turn and one step
each; the optimizer and the check of the step's size are included, the gate and the saving are not.

Model FLOP utilisation is what the passes need in theory over what the chip could do meanwhile: for
P weights and T tokens a pass forward takes 2 P T, its way back through frozen weights as much
again, attention 2 T² · heads · head size a layer forward and twice that back (arXiv 2204.02311,
appendix B, with a causal mask). The head counts for the policy's own tokens only, and activations
that are computed twice to save memory count once.
"""
# pyright: basic

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from trl.trainer.utils import get_peak_flops

from learner.config import LearnerConfig
from learner.memory import GB
from learner.model import pick_device, pick_dtype
from learner.trainer import build_trainer
from nextstate.records import Sample

_POLICY = Path(__file__).parent.parent / "demo" / "policy"
SHAPES = {
    "qwen3-4b": Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "tiny": Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=2048,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
}
_FIRST_WORD = 8
_COLUMNS = ("tokens", "s a step", "tokens/s", "TFLOP/s", "MFU", "peak, GB")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one update of one turn."""

    seconds: float
    """Median over the rounds."""
    flops: int
    """By the module's formula."""
    memory: int
    """Bytes at the peak; on a CPU of the whole process."""


def turn(tokens: int, reply: int, vocabulary: int, hinted: bool, seed: int) -> Sample:
    """A made-up turn of `tokens` tokens, the last `reply` of them the policy's."""
    draw = Random(seed)
    ids = tuple(draw.randrange(_FIRST_WORD, vocabulary) for _ in range(tokens))
    prompt, said = ids[: tokens - reply], ids[tokens - reply :]
    uniform = -float(torch.tensor(float(vocabulary)).log())
    return Sample(
        turn=f"t{seed}",
        session=f"s{seed}",
        policy_version=0,
        prompt_ids=prompt,
        completion_ids=said,
        behaviour_logprobs=(uniform,) * reply,
        score=draw.choice((-1, 1)),
        hinted_prompt_ids=prompt if hinted else None,
    )


def flops_of_update(shape: Qwen3Config, tokens: int, reply: int, forwards: int) -> int:
    """FLOPs of one pass forward and back over `tokens`, and of `forwards` more forward.

    The head makes logits for `reply` of them.
    """
    size = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads or 0
    width, key_width = heads * size, key_heads * size
    projections = shape.hidden_size * (2 * width + 2 * key_width)
    layer = projections + 3 * shape.hidden_size * shape.intermediate_size
    dense = 2 * layer * shape.num_hidden_layers * tokens
    dense += 2 * shape.hidden_size * shape.vocab_size * reply
    attention = 2 * tokens**2 * width * shape.num_hidden_layers
    return (1 + forwards) * (dense + attention) + dense + 2 * attention


def save_random_model(shape: Qwen3Config, folder: Path) -> None:
    """A model of that shape with random bfloat16 weights, and the demo's tokenizer."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(_POLICY).save_pretrained(folder)


def measure(
    model_path: Path, shape: Qwen3Config, config: LearnerConfig, tokens: int, rounds: int
) -> Cost:
    """The cost of an update of one turn of `tokens` tokens, after one that is not counted."""
    gc.collect()  # a trainer refers to itself, and would keep the model of the last measurement
    device = pick_device(config)
    hinted, reply = config.method != "binary", tokens // 8
    samples = [turn(tokens, reply, shape.vocab_size, hinted, seed) for seed in range(rounds + 1)]
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, str(model_path), Path(folder))
        seconds: list[float] = []
        for sample in samples:
            started = _now(device)
            trainer.update([sample], {0: 0})
            seconds.append(_now(device) - started)
    # The base's log-probabilities, the teacher's, and how far the step went.
    forwards = (config.kl_coef > 0) + hinted + 1
    flops = flops_of_update(shape, tokens, reply, forwards)
    return Cost(median(seconds[1:]), flops, _peak_memory(device))


def peak_flops(config: LearnerConfig) -> float | None:
    """FLOPs a second that the chip is made for in this precision; None where TRL knows none."""
    device = pick_device(config)
    if device.type != "cuda":
        return None
    precision = str(pick_dtype(config, device)).removeprefix("torch.")
    return get_peak_flops(torch.cuda.get_device_name(device), precision)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step",
        description=__doc__,
        epilog="example: python -m benchmarks.training_step --shape qwen3-4b",
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--methods", nargs="+", default=["binary", "combined"])
    parser.add_argument("--quantization", nargs="+", default=["none"], help="as [learner] has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", help="as [learner] device")
    parser.add_argument("--no-checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--dir", type=Path, help="room for the weights, 8 GB of a qwen3-4b")
    given = parser.parse_args()
    made = Table(box=box.MARKDOWN)
    for heading in ("method", "base", *_COLUMNS):
        made.add_column(heading)
    with tempfile.TemporaryDirectory(dir=given.dir) as folder, Progress(transient=True) as progress:
        save_random_model(SHAPES[given.shape], Path(folder))
        cells = list(product(given.quantization, given.methods, given.tokens))
        for quantization, method, tokens in progress.track(cells, description="measuring"):
            config = LearnerConfig(
                method=method,
                epochs=1,
                quantization=quantization,
                device=given.device,
                drift_limit=100.0,
                step_kl=100.0,
                max_tokens=tokens,
                micro_batch_tokens=tokens,
                gradient_checkpointing=not given.no_checkpointing,
            )
            cost = measure(Path(folder), SHAPES[given.shape], config, tokens, given.rounds)
            base = str(pick_dtype(config, pick_device(config))).removeprefix("torch.")
            row = [method, base if quantization == "none" else quantization, str(tokens)]
            row += _figures(cost, tokens, peak_flops(config))
            made.add_row(*row)
            progress.console.print(" ".join(row))  # what was measured is seen if the rest fails
    Console(width=120).print(made)


def _figures(cost: Cost, tokens: int, most: float | None) -> list[str]:
    rate = cost.flops / cost.seconds
    return [
        f"{cost.seconds:.2f}",
        f"{tokens / cost.seconds:.0f}",
        f"{rate / 1e12:.2f}",
        f"{rate / most:.0%}" if most else "–",
        f"{cost.memory / GB:.1f}",
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
