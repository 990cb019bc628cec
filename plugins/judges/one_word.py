"""The question that a model answers with one word, and the reading of that word's log-probs.

The model writes one token. What counts is how likely it finds each of the three words, so a vote is
one forward pass. Others wrote everything that the model sees: every line of it stands behind a
quotation mark of its own, without control characters and chat template marks, so no text can close
its block or open a turn of its own. The two orders of a question change the places of the evidence
and of the words, so that the mean of both does not depend on them.

A model that was not made for this prefers some words whatever it reads, and may understand nothing.
So its answers to a few obvious questions are looked at first (`OBVIOUS`): how often it says each
word is taken off its answers, and the less it understands, the flatter they are made. Without any
understanding no vote is sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from nextstate.hooks import Calibration, Evidence
from nextstate.records import TRUST, Json, NextState, Source
from plugins.judges.prompting import SOURCES, cleaned

WORDS = {1: "good", -1: "bad", 0: "neutral"}
"""By score. No word begins like another one, so any first token tells which one is meant."""
ORDERS = (0, 1)
SURE = 0.55
"""A vote is sure if its word has at least this probability."""
TOP_LOGPROBS = 20
"""The most that vLLM tells; the words have 14 beginnings in all."""
OPTIONS: Json = {
    "max_tokens": 1,
    "temperature": 1.0,
    "logprobs": True,
    "top_logprobs": TOP_LOGPROBS,
    "structured_outputs": {"choice": list(WORDS.values())},
    # A model that thinks first would need many tokens.
    "chat_template_kwargs": {"enable_thinking": False},
}
"""The fields of a chat request for one word."""

_LEAST_MASS = 0.05
"""If the words have less probability than this in all, the model does not answer the question."""
_MOST_TEMPERATURE = 64.0
_MEANINGS = {
    1: "accepted, thanked, it worked",
    -1: "criticised, corrected, asked again, failed",
    0: "nothing tells",
}


def _obvious() -> tuple[tuple[Evidence, int], ...]:
    asked, replied = (("user", "Name a river in Africa."),), "The Nile is a river in Africa."
    said = {
        1: ("Thanks, that is exactly what I needed!", "Perfect.", "Yes, great answer, thank you.",
            "That works, thanks a lot."),
        -1: ("No, that is wrong.", "That is not what I asked for. Try again.",
             "This is useless, do it properly.", "Wrong again. Please fix it."),
        0: ("What time is it in Tokyo?", "Now write me a poem about autumn.",
            "I will be away until Monday.", "Next question: how do plants grow?"),
    }  # fmt: skip
    trust = TRUST[Source.USER]
    return tuple(
        (Evidence(asked, replied, (NextState("", Source.USER, text, trust),)), score)
        for score, texts in said.items()
        for text in texts
    )


OBVIOUS = _obvious()
"""Questions that every judge must be able to answer, each score as often as the others."""


def word_question(evidence: Evidence, order: int) -> list[Json]:
    """The chat messages of the question in one of `ORDERS`."""
    said = [_quoted(role, text) for role, text in evidence.tail]
    said.append(_quoted("reply", evidence.reply))
    states = [(f"next, {SOURCES[s.source]}", s.text) for s in evidence.next_states]
    states += [(f"at the task's end, {SOURCES[s.source]}", s.text) for s in evidence.later]
    followed = [_quoted(title, text) for title, text in states]
    way = -1 if order else 1
    words = [f"{word} ({_MEANINGS[score]})" for score, word in WORDS.items()][::way]
    asked = f"By what came next, was the reply {words[0]}, {words[1]} or {words[2]}?"
    return [
        {"role": "system", "content": asked},
        {
            "role": "user",
            "content": "\n".join([*said, *followed] if way > 0 else [*followed, *said]),
        },
    ]


def _quoted(title: str, text: str) -> str:
    title = " ".join(cleaned(title).split())  # a client names the roles
    return "\n".join([f"{title}:", *(f"> {line}" for line in cleaned(text).split("\n"))])


def word_logprobs(answer: Mapping[str, Any]) -> dict[int, float] | None:
    """The log-prob of each word, by score, in a chat completion; None if it tells none.

    They are normalised over the words. All are equal if the words have little probability.
    """
    try:
        told = cast("Mapping[str, Any]", answer["choices"][0]["logprobs"]["content"][0])
        tokens = [told, *told["top_logprobs"]]
        found = {str(token["token"]): float(token["logprob"]) for token in tokens}
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    mass = dict.fromkeys(WORDS, 0.0)
    for token, logprob in found.items():
        for score, word in WORDS.items():
            if token and word.startswith(token) and not math.isnan(logprob):
                mass[score] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    if total < _LEAST_MASS:
        return dict.fromkeys(WORDS, -math.log(len(WORDS)))
    return {score: math.log(max(value / total, 1e-30)) for score, value in mass.items()}


def probabilities(
    orders: Sequence[Mapping[int, float]], calibration: Calibration
) -> dict[int, float]:
    """The calibrated probability of each score: the mean over the orders."""
    each = [_calibrated(logprobs, calibration) for logprobs in orders]
    return {score: sum(one[score] for one in each) / len(each) for score in WORDS}


def calibrated_on(
    answers: Sequence[tuple[Sequence[Mapping[int, float]], int]], *, balanced: bool = False
) -> Calibration:
    """The calibration that makes these (log-probs by order, right score) likeliest.

    One temperature; if the right scores are `balanced`, also what each word is favoured by.
    """
    bias = dict.fromkeys(WORDS, 0.0)
    if balanced:
        every = [one for orders, _ in answers for one in orders]
        bias = {score: sum(one[score] for one in every) / len(every) for score in WORDS}

    def loss(temperature: float) -> float:
        tried = Calibration(temperature, bias)
        return -sum(math.log(probabilities(orders, tried)[right]) for orders, right in answers)

    steps = range(-8, 4 * round(math.log2(_MOST_TEMPERATURE)) + 1)
    return Calibration(min((2 ** (step / 4) for step in steps), key=loss), bias)


def _calibrated(logprobs: Mapping[int, float], calibration: Calibration) -> dict[int, float]:
    bias = calibration.bias
    weights = {s: (logprobs[s] - bias.get(s, 0.0)) / calibration.temperature for s in WORDS}
    most = max(weights.values())
    shares = {score: math.exp(max(weight - most, -60.0)) for score, weight in weights.items()}
    return {score: share / sum(shares.values()) for score, share in shares.items()}
