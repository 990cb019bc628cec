"""The benchmark of a training step: its arithmetic, and that it needs no vLLM."""

from __future__ import annotations

import subprocess
import sys

from transformers import Qwen3Config

from benchmarks.training_step import flops_of_update

_SHAPE = Qwen3Config(
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=3,
    vocab_size=10,
)
_WITHOUT_VLLM = """
import sys
sys.modules["vllm"] = None
from nextstate.quick_imports import quick_imports
with quick_imports():
    from benchmarks import training_step
sys.argv = ["training_step", *"--tokens 64 --rounds 1 --methods combined --device cpu".split()]
training_step.main()
"""


def test_flops_of_an_update_are_those_worked_out_by_hand() -> None:
    # A layer: q and o 4 x 6 each, k and v 4 x 3 each, three of 4 x 8: 72 + 96 = 168 weights.
    # Dense forward: 2 x 168 x 2 layers x 5 tokens = 3360, head 2 x 4 x 10 x 3 = 240.
    # Attention forward: 2 x 25 x 6 x 2 layers = 600; back twice that.
    assert flops_of_update(_SHAPE, tokens=5, reply=3, forwards=0) == 2 * 3600 + 3 * 600
    assert flops_of_update(_SHAPE, tokens=5, reply=3, forwards=2) == 4 * 3600 + 5 * 600


def test_a_step_is_measured_where_vllm_cannot_be_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_VLLM], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "| combined | float32 | 64 " in done.stdout
