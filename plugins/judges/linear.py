"""A judge without a model: a linear classifier over hashed features of what followed a reply.

`linear_training.py` makes its weights from the labelled next states of this repository. It gives
the probabilities that the reply was good, neither, or bad. Praise and blame need a clear
probability; anything less is an unsure 0, and so is a text that repeats itself over and over.

A user's words count first, then the output of tools. What speaks to a judge instead of to the
agent ("score this 1", a forged transcript) is cut off with everything after it. A hint is the
user's own sentences that say what to do, never a tool's text.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, is_wordless
from nextstate.records import Source, Vote
from plugins.judges import WithoutModel
from plugins.judges.features import BITS, Features, clipped, features, plain

WEIGHTS = Path(__file__).with_name("linear.npz")
SCORES = (1, 0, -1)
"""The scores of the table's first columns. The last column says whether a sentence is a hint."""
SURE = 0.55
"""The least probability of a vote; below it the judge abstains."""
HINT_SENTENCES = 3
_MAX_SENTENCES = 12
_LEAST_ROWS = 30
_SIGN = 0.3
"""The weight of a structural sign beside that of the whole text."""
UNKNOWN = Vote(0, sure=False)

_QUOTED = re.compile(r"```.*?(?:```|\Z)|^[ \t]*>[^\n]*", re.DOTALL | re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+|(?<=[。!?])|\n+")
_TO_A_JUDGE = re.compile(
    r"\b(?:scor(?:e[sd]?|ing)|reward|judges?|grad(?:e[rsd]?|ing)|evaluat\w{1,6}|verdict|raters?|"
    r"rat(?:e|ed|ing)|thumbs_up|hint|counted? as|user_\w{1,20})\b|"
    r"^\W{0,3}(?:user|assistant|system|human|ai)\s?:|<\||\|>|\[/?INST|[+-]1\b|评分|裁判",
    re.IGNORECASE | re.MULTILINE,
)


class Weights(NamedTuple):
    """The table of the classifier."""

    table: NDArray[np.float32]
    """(2 ** BITS, 4)."""
    bias: NDArray[np.float32]
    """(4,)."""


@lru_cache(1)
def weights() -> Weights:
    """The shipped weights."""
    with np.load(WEIGHTS) as file:
        table = np.zeros((1 << BITS, len(SCORES) + 1), np.float32)
        table[file["rows"]] = file["table"] * file["scale"]
        return Weights(table, file["bias"])


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry; it needs no settings."""
    weights()
    return WithoutModel("linear", vote_on)


def vote_on(evidence: Evidence) -> Vote:
    """The vote: by the user's words first, then by the output of tools."""
    asked = next((text for role, text in reversed(evidence.tail) if role == "user"), "")
    states = (*evidence.next_states, *evidence.later)
    heard = [s.text for s in states if s.source in (Source.USER, Source.FEEDBACK)]
    said = "\n".join(text for text in heard if not is_wordless(text))
    vote = read(said, asked, evidence.reply, "user")
    if vote.sure:
        return vote
    results = [
        read(state.text, asked, evidence.reply, "tool")
        for state in evidence.next_states
        if state.source in (Source.TOOL, Source.ENVIRONMENT)
    ]
    return min((r for r in results if r.sure), key=lambda result: result.score, default=vote)


def read(text: str, asked: str, reply: str, speaker: str) -> Vote:
    """The vote by one text after `reply` to `asked`; `speaker` is "user" or "tool"."""
    own = own_words(text, speaker)
    found = features(plain(own), asked, reply, speaker)
    if not own or found.repeats:
        return UNKNOWN
    chances = probabilities(logits(found))
    place = int(chances.argmax())
    if chances[place] < SURE:
        return UNKNOWN
    hint = hint_in(own, asked, reply) if (SCORES[place], speaker) == (-1, "user") else None
    return Vote(SCORES[place], hint)


def own_words(text: str, speaker: str) -> str:
    """The text's ends without quotes, code and what speaks to a judge; empty if nothing is left."""
    text = clipped(_QUOTED.sub("\n", text) if speaker == "user" else text).strip()
    if not _TO_A_JUDGE.search(plain(text)):
        return text
    kept = takewhile(lambda part: not _TO_A_JUDGE.search(plain(part)), sentences(text))
    return "\n".join(kept)


def logits(found: Features) -> NDArray[np.float32]:
    """The score columns' logits and the hint's, (4,)."""
    table, bias = weights()
    text = table[found.text].sum(0) / max(len(found.text), _LEAST_ROWS) ** 0.5
    return text + table[found.signs].sum(0) * _SIGN + bias


def probabilities(given: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities of +1, 0 and -1, (3,)."""
    raised = np.exp(given[: len(SCORES)] - given[: len(SCORES)].max())
    return raised / raised.sum()


def hint_in(text: str, asked: str, reply: str) -> str | None:
    """The sentences that say what the reply should be like, at most HINT_SENTENCES."""
    parts = [
        part
        for part in sentences(text)[:_MAX_SENTENCES]
        if logits(features(plain(part), asked, reply, "user"))[-1] > 0
    ]
    tidy = [part[0].upper() + part[1:] for part in dict.fromkeys(parts)]
    return " ".join(tidy[:HINT_SENTENCES]) or None


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [part for sentence in _SENTENCE.split(text) if (part := sentence.strip())]
