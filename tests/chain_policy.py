"""A policy for a real vLLM that answers any prompt with one of a few given replies.

Its layers add nothing, so the next token depends only on the last one: the weights hold a Markov
chain. Agents send prompts of 30 000 tokens, to which a small trained policy replies without an end.
This policy replies what it was given, and is cheap to serve. Everything else is real: the sampler,
the log-probs, the adapters, the chat template and the tool parser.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from demo.course import POLICY

CONTEXT = 98_304
_WIDTH = 128
_SURE = 24.0
"""The logit of the next token; other logits are about 0 ± 2."""
_START, _END = "\n", "<|im_end|>"
"""The last token of every prompt, and of every reply."""


def save_chain_policy(folder: Path, replies: Sequence[Sequence[str]]) -> None:
    """Writes a policy that draws one of `replies`, each a sequence of tokens, for every prompt."""
    import torch
    from transformers import AddedToken, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    known = tokenizer.get_vocab()
    pieces = sorted({piece for reply in replies for piece in reply} - known.keys())
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    tokenizer.save_pretrained(folder)
    shutil.copy(POLICY / "chat_template.jinja", folder)

    def token(piece: str) -> int:
        ids: list[int] = tokenizer.encode(piece, add_special_tokens=False)
        assert len(ids) == 1, f"{piece!r} is {len(ids)} tokens"
        return ids[0]

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            eos_token_id=token(_END),
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    steps = {step for reply in replies for step in pairwise((_START, *reply, _END))}
    with torch.no_grad():
        embedding = torch.randn(len(tokenizer), _WIDTH, generator=torch.Generator().manual_seed(0))
        embedding *= _WIDTH**0.5 / embedding.norm(dim=1, keepdim=True)
        layer = model.model.layers[0]
        for silent in (layer.self_attn.o_proj, layer.mlp.down_proj, model.lm_head):
            silent.weight.zero_()
        model.model.embed_tokens.weight.copy_(embedding)
        for before, after in sorted(steps):
            model.lm_head.weight[token(after)] += _SURE / _WIDTH * embedding[token(before)]
    model.save_pretrained(folder)
