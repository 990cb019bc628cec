"""A policy version as a whole model."""
# pyright: basic

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def merge_adapter(base: str, adapter: Path, folder: Path) -> None:
    """Writes `base` with an adapter merged into its weights, and its tokenizer, into `folder`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
