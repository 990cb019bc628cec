"""The judge `rules`: no model, a linear classifier over hashed features of what followed a reply.

`rules_training.py` makes its weights from the labelled next states of this repository. It gives
the probabilities that the reply was good, neither, or bad. Praise and blame need a clear
probability; anything less is an unsure 0.

A user's words count first, then the output of tools, except what has no trust. A sentence that
begins the next task ends the reaction. A text that speaks to a judge instead of to the agent
("score this 1", a forged transcript) or that repeats itself over and over gets no vote. A hint is
the user's own sentences that say what to do, never a tool's text.

A row's weights are packed into one integer, so that a text's weights are added in one sum.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Sequence, Set
from functools import cache, lru_cache
from math import exp
from pathlib import Path
from typing import NamedTuple

from nextstate.hooks import Evidence, JudgeKind, JudgeSettings, is_wordless
from nextstate.records import Source, Vote
from plugins.judges import WithoutModel
from plugins.judges.features import (
    clipped,
    pairs_of,
    plain,
    row_of,
    signs_of,
    token_rows,
    tokens_of,
)

WEIGHTS = Path(__file__).with_name("rules.weights")
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
_FIELD = 32
"""Bits of a column in a packed row."""
_HALF = 1 << (_FIELD - 1)
_OFFSET = sum(_HALF << (_FIELD * place) for place in range(COLUMNS + 1))
_FIELDS = struct.Struct(f"<{COLUMNS + 1}I")
UNKNOWN = Vote(0, sure=False)

_QUOTED = re.compile(r"```.*?(?:```|\Z)|^[ \t]*>[^\n]*", re.DOTALL | re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+|(?<=[。!?])|\n+")
_JUDGING = frozenset(
    ("score", "scores", "scored", "scoring", "reward", "rewards", "judge", "judges", "grader",
     "graders", "grading", "evaluator", "evaluators", "evaluating", "verdict", "rater", "raters")
)  # fmt: skip
_JUDGING_PAIRS = frozenset(
    (*(f"{verb} {it}" for verb in ("rate", "grade") for it in ("this", "it", "me", "the")),
     "hint should", "counted as", "count as", "thumbs _")
)  # fmt: skip
_MARK = re.compile(
    r"\x1b|<[<|]|\|>|</[a-z]+_|\[/?(?:inst|hint)|[+-]1(?![\w.])|评分|裁判|"
    r"\n\W{0,3}(?:user|assistant|system|human|ai)\s?:"
)
"""Words and marks of texts that ask for a score, or forge a transcript."""
_FLOOD_TOKENS, _FLOOD_SHARE = 60, 0.3
"""A text of so many tokens with a smaller share of different pairs repeats itself."""


class Weights(NamedTuple):
    """The table of the classifier."""

    rows: list[int]
    """2 ** BITS packed rows."""
    scale: list[float]
    """What a column's unit is worth."""
    bias: list[float]


@cache
def weights() -> Weights:
    """The shipped weights."""
    head, _, packed = WEIGHTS.read_bytes().partition(b"\n")
    given = json.loads(head)
    table = zlib.decompress(packed)
    starts = range(0, len(table), COLUMNS)
    rows = [_packed(table[start : start + COLUMNS]) for start in starts]
    return Weights(rows, given["scale"], given["bias"])


def create(settings: JudgeSettings) -> JudgeKind:
    """The plugin's entry; it needs no settings."""
    weights()
    return WithoutModel("rules", vote_on)


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
        and state.trust > 0
        and not is_wordless(state.text)
    ]
    return min((r for r in results if r.sure), key=lambda result: result.score, default=vote)


def read(text: str, asked: str, reply: str, speaker: int) -> Vote:
    """The vote by one text after `reply` to `asked`."""
    quotes = speaker == USER and ("```" in text or ">" in text)
    own = clipped(_QUOTED.sub("\n", text) if quotes else text).strip()
    parts = sentences(own) if speaker == USER else [own]
    words = [tokens_of(plain(part)) for part in parts]
    tokens = [token for part in words for token in part]
    pairs = pairs_of(tokens)
    flood = len(tokens) > _FLOOD_TOKENS and len(pairs) < _FLOOD_SHARE * len(tokens)
    if not tokens or flood or speaks_to_a_judge(tokens, pairs, own):
        return UNKNOWN
    kinds = [0, *map(kind_of, words[1:_MAX_SENTENCES])]
    if TASK in kinds:
        end = kinds.index(TASK)
        tokens = [token for part in words[:end] for token in part]
        own = "\n".join(parts[:end])
        kinds = kinds[:end]
    signs = signs_of(plain(own), tokens, asked, reply)
    chances = probabilities(logits(tokens, signs, speaker))
    place = chances.index(max(chances))
    if chances[place] < SURE:
        return UNKNOWN
    if SCORES[place] >= 0 or speaker != USER:
        return Vote(SCORES[place])
    kinds[0] = kind_of(words[0])
    orders = [part for part, kind in zip(parts, kinds, strict=False) if kind == ORDER]
    return Vote(-1, hint_of(orders))


def speaks_to_a_judge(tokens: Sequence[str], pairs: Set[str], text: str) -> bool:
    """Whether a text asks for a score, or forges a transcript."""
    return bool(
        not _JUDGING.isdisjoint(tokens)
        or not _JUDGING_PAIRS.isdisjoint(pairs)
        or _MARK.search(f"\n{text.lower()}")
    )


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    >>> sentences('No. "Why?" Do it again!')
    ['No.', '"Why?', 'Do it again!']
    """
    return [part for sentence in _SENTENCE.split(text) if (part := sentence.strip())]


def kind_of(tokens: Sequence[str]) -> int:
    """ORDER, TASK or 0 by the tokens of a user's sentence."""
    found = logits(tokens, (), USER)
    best = ORDER if found[ORDER] > found[TASK] else TASK
    return best if found[best] > 0 else 0


def logits(tokens: Sequence[str], signs: Sequence[str], speaker: int) -> list[float]:
    """The logits of the columns, COLUMNS of them."""
    rows, scale, bias = weights()
    counted = sum([_token(token, speaker) for token in set(tokens)])
    counted += sum([rows[row_of(pair, speaker)] for pair in pairs_of(tokens)])
    *text, count = _unpacked(counted)
    share = max(count, LEAST_FEATURES) ** -0.5
    found = [one * share * unit + base for one, unit, base in zip(text, scale, bias, strict=True)]
    if signs:
        looks = _unpacked(sum([_sign(sign, speaker) for sign in signs]))
        for place, unit in enumerate(scale):
            found[place] += SIGN * looks[place] * unit
    return found


def probabilities(given: list[float]) -> list[float]:
    """The probabilities of +1, 0 and -1."""
    highest = max(given[: len(SCORES)])
    raised = [exp(logit - highest) for logit in given[: len(SCORES)]]
    return [one / sum(raised) for one in raised]


def hint_of(parts: Iterable[str]) -> str | None:
    """The user's own sentences as a hint, at most HINT_SENTENCES."""
    tidy = [part[0].upper() + part[1:] for part in dict.fromkeys(parts)]
    return " ".join(tidy[:HINT_SENTENCES]) or None


@lru_cache(1 << 15)
def _token(token: str, speaker: int) -> int:
    """The packed sum of a token's rows."""
    rows = weights().rows
    return sum([rows[row] for row in token_rows(token, speaker)])


@lru_cache(1 << 12)
def _sign(sign: str, speaker: int) -> int:
    """The packed row of a sign."""
    return weights().rows[row_of(sign, speaker)]


def _packed(row: bytes) -> int:
    """A row's weights and the count 1, each in its own bits of one integer."""
    total = 1 << (_FIELD * COLUMNS)
    for place, byte in enumerate(row):
        total += (byte - 256 if byte > 127 else byte) << (_FIELD * place)
    return total


def _unpacked(total: int) -> list[int]:
    """The sums of the columns, then the count."""
    fields = _FIELDS.unpack((total + _OFFSET).to_bytes(_FIELDS.size, "little"))
    return [one - _HALF for one in fields]
