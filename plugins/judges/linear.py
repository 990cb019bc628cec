"""A judge without a model: a linear classifier over hashed features of what followed a reply.

`linear_training.py` makes its weights from the labelled next states of this repository. It gives
the probabilities that the reply was good, neither, or bad. Praise and blame need a clear
probability; anything less is an unsure 0.

A user's words count first, then the output of tools. A sentence that begins the next task ends
the reaction. What speaks to a judge instead of to the agent ("score this 1", a forged transcript)
is cut off with everything after it. A hint is the user's own sentences that say what to do, never
a tool's text.

A row's weights are packed into one integer, so that a text's weights are added in one sum.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import takewhile
from math import exp
from pathlib import Path
from typing import NamedTuple

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, is_wordless
from nextstate.records import Source, Vote
from plugins.judges import WithoutModel
from plugins.judges.features import Features, clipped, features, plain, row_of, token_rows

WEIGHTS = Path(__file__).with_name("linear.weights")
SCORES = (1, 0, -1)
"""The scores of the first columns."""
ORDER, TASK = 3, 4
"""The columns that say whether a sentence tells what to do, or begins the next task."""
COLUMNS = 5
SURE = 0.55
"""The least probability of a vote; below it the judge abstains."""
HINT_SENTENCES = 3
LEAST_FEATURES = 30
SIGN = 0.3
"""The weight of a structural sign beside that of the whole text."""
USER, TOOL = 1, 2
_MAX_SENTENCES = 12
_FIELD = 24
"""Bits of a column in a packed row: 127 times all features of a text fit in."""
_HALF, _MASK = 1 << (_FIELD - 1), (1 << _FIELD) - 1
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

    table: bytes
    """2 ** BITS rows of COLUMNS signed bytes."""
    scale: list[float]
    """What a column's unit is worth."""
    bias: list[float]


@cache
def weights() -> Weights:
    """The shipped weights."""
    head, _, packed = WEIGHTS.read_bytes().partition(b"\n")
    given = json.loads(head)
    return Weights(zlib.decompress(packed), given["scale"], given["bias"])


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
    vote = read(said, asked, evidence.reply, USER)
    if vote.sure:
        return vote
    results = [
        read(state.text, asked, evidence.reply, TOOL)
        for state in evidence.next_states
        if state.source in (Source.TOOL, Source.ENVIRONMENT)
    ]
    return min((r for r in results if r.sure), key=lambda result: result.score, default=vote)


def read(text: str, asked: str, reply: str, speaker: int) -> Vote:
    """The vote by one text after `reply` to `asked`."""
    parts = own_sentences(text, speaker)
    hints: list[str] = []
    if speaker == USER and len(parts) > 1:
        parts = list(before_next_task(parts, asked, reply))
    own = "\n".join(parts)
    if not own:
        return UNKNOWN
    chances = probabilities(logits(features(plain(own), asked, reply), speaker))
    place = chances.index(max(chances))
    if chances[place] < SURE:
        return UNKNOWN
    if SCORES[place] < 0 and speaker == USER:
        hints = [part for part in parts if kind_of(part, asked, reply) == ORDER]
    return Vote(SCORES[place], hint_of(hints))


def own_sentences(text: str, speaker: int) -> list[str]:
    """The sentences of a text's ends, without quotes, code and what speaks to a judge.

    A tool's output is one sentence.
    """
    text = clipped(_QUOTED.sub("\n", text) if speaker == USER else text).strip()
    if _TO_A_JUDGE.search(plain(text)):
        return list(takewhile(lambda part: not _TO_A_JUDGE.search(plain(part)), sentences(text)))
    return sentences(text) if speaker == USER else [text]


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    >>> sentences('No. "Why?" Do it again!')
    ['No.', '"Why?', 'Do it again!']
    """
    return [part for sentence in _SENTENCE.split(text) if (part := sentence.strip())]


def before_next_task(parts: list[str], asked: str, reply: str) -> Iterator[str]:
    """The first sentence and those after it up to the next task."""
    yield parts[0]
    for part in parts[1:_MAX_SENTENCES]:
        if kind_of(part, asked, reply) == TASK:
            return
        yield part


def kind_of(sentence: str, asked: str, reply: str) -> int:
    """ORDER, TASK or 0."""
    found = logits(features(plain(sentence), asked, reply), USER)
    best = ORDER if found[ORDER] > found[TASK] else TASK
    return best if found[best] > 0 else 0


def logits(found: Features, speaker: int) -> list[float]:
    """The logits of the columns, COLUMNS of them."""
    _, scale, bias = weights()
    counted = sum(_token(token, speaker) for token in found.tokens)
    counted += sum(_single(pair, speaker) for pair in found.pairs)
    *text, count = _unpacked(counted)
    signs = _unpacked(sum(_single(sign, speaker) for sign in found.signs))
    share = max(count, LEAST_FEATURES) ** -0.5
    return [
        (one * share + SIGN * two) * unit + base
        for one, two, unit, base in zip(text, signs, scale, bias, strict=False)
    ]


def probabilities(given: list[float]) -> list[float]:
    """The probabilities of +1, 0 and -1."""
    highest = max(given[: len(SCORES)])
    raised = [exp(logit - highest) for logit in given[: len(SCORES)]]
    return [one / sum(raised) for one in raised]


def hint_of(parts: Iterable[str]) -> str | None:
    """The user's own sentences as a hint, at most HINT_SENTENCES."""
    tidy = [part[0].upper() + part[1:] for part in dict.fromkeys(parts)]
    return " ".join(tidy[:HINT_SENTENCES]) or None


@lru_cache(1 << 14)
def _token(token: str, speaker: int) -> int:
    """The packed sum of a token's rows."""
    return sum(map(_packed, token_rows(token, speaker)))


@lru_cache(1 << 14)
def _single(name: str, speaker: int) -> int:
    """The packed row of a pair or a sign."""
    return _packed(row_of(name, speaker))


def _packed(row: int) -> int:
    """A row's weights and the count 1, each in its own bits of one integer."""
    start = row * COLUMNS
    total = 1 << (_FIELD * COLUMNS)
    for place, byte in enumerate(weights().table[start : start + COLUMNS]):
        total += (byte - 256 if byte > 127 else byte) << (_FIELD * place)
    return total


def _unpacked(total: int) -> list[int]:
    """The sums of the columns, then the count."""
    found: list[int] = []
    for _ in range(COLUMNS + 1):
        one = ((total + _HALF) & _MASK) - _HALF
        found.append(one)
        total = (total - one) >> _FIELD
    return found
