"""Turns as OpenEnv's TrainingTrace v1: token ids, log-probs and masks."""

from __future__ import annotations

from collections.abc import Iterable

from nextstate.records import Json, Turn


def training_trace(turns: Iterable[Turn | None]) -> Json:
    """A trace of the turns whose tokens are known."""
    known = [turn for turn in turns if turn and turn.prompt_ids and turn.behaviour_logprobs]
    return {"schema_version": 1, "turns": [_traced(turn) for turn in known]}


def _traced(turn: Turn) -> Json:
    """One turn of a trace. The mask covers prompt and completion; 0: it does not train."""
    prompt, completion = turn.prompt_ids or (), turn.completion_ids or ()
    return {
        "node_id": turn.id,
        "prompt_token_ids": prompt,
        "completion_token_ids": completion,
        "per_token_logps": turn.behaviour_logprobs,
        "loss_mask": [0] * len(prompt) + [int(turn.trainable)] * len(completion),
        "metadata": {
            "step": turn.step,
            "policy_version": turn.policy_version,
            "finish_reason": turn.finish_reason,
            "untrainable": turn.untrainable,
        },
    }
