"""Checks that engine and learner agree about the same weights, as far as precision allows."""

from __future__ import annotations

from learner.config import LearnerConfig

FULL, HALF = 0.02, 0.1
"""The limits if both compute in float32 and if one does not, in nats a token. On a model of 135 M
parameters, bfloat16 against bfloat16 of the same weights was measured to differ by 0.038 to 0.052:
single sequences and padded batches round differently. Larger models were not measured."""
_MORE_THAN_ROUNDING = 3.0
"""Above this many times the limit, precision is not the likeliest cause."""


def drift_limit(config: LearnerConfig, learner: str, engine: str) -> float:
    """The largest mean |policy - behaviour| at which a batch still trains.

    `learner` and `engine` are what the two compute in, such as `float32` or `auto`.
    """
    return config.drift_limit or (FULL if learner == engine == "float32" else HALF)


def drift_objection(
    measured: float,
    compared: str,
    raw: float | None,
    config: LearnerConfig,
    learner: str,
    engine: str,
) -> str | None:
    """Why a batch with this drift must not train, the likeliest cause first; None if it may train.

    `compared` says for which tokens the drift was measured. `raw` is the drift from the raw
    log-probs if it is clearly smaller (`raw_drift`). The batch does not train then, however small
    the drift is: it would not be rounding.
    """
    limit = drift_limit(config, learner, engine)
    if raw is not None and raw <= limit:
        return (
            "the engine's log-probabilities are those before temperature, penalties and truncation "
            f"({raw:.4f} nats a token from these, {measured:.4f} from what the turns' settings "
            "give): nothing was trained; start vLLM with --logprobs-mode processed_logprobs and "
            "without --generation-config vllm, as a managed engine is ([engine] args, or the "
            "command of an external engine)"
        )
    if raw is None and measured <= limit:
        return None
    sampling = (
        "sampling settings that the turns do not tell (an engine with another "
        "--generation-config or --override-generation-config than the generation_config.json of "
        "[engine] model, or logits processors of its own)"
    )
    precision = (
        f"precision (the learner computes in {learner}, the engine in {engine}: set [engine] and "
        "[learner] dtype to the same, or [learner] drift_limit to more)"
    )
    model = "another base ([engine] model, or an external engine's own, is not what is trained)"
    adapter = "an adapter, or its scale, that the engine reads differently"
    causes = [model, adapter, sampling, precision]
    if measured <= _MORE_THAN_ROUNDING * limit:
        causes = [precision, model, adapter, sampling]
    if raw is not None:
        causes = [sampling, model, adapter, precision]
    given = "" if config.drift_limit else f", the default between {learner} and {engine}"
    return (
        f"the learner's log-probabilities differ from the engine's by {measured:.4f} nats a token "
        f"{compared}, over [learner] drift_limit = {limit:g}{given}: nothing was trained; likely "
        f"causes, in this order: {'; '.join(causes)}"
    )
