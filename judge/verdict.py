"""From votes to a verdict.

The score is the majority's; a tie is 0. A hint comes only from votes that agree with that score,
whatever its sign: a hint beside a vote that lost argues for something the majority did not see.
Among them wins the hint whose words the other hints share most, then the shorter one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from nextstate.records import Verdict, Vote, majority

HINT_MIN_CHARS = 8
HINT_MAX_CHARS = 400
HINT_MAX_SENTENCES = 3
_QUOTED_SHARE = 0.8
"""A hint of several words that repeats this share of them in one run of the reply quotes it."""
_QUOTE_WORDS = 5

_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n+")
_WORD = re.compile(r"\w+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_TEMPLATE = re.compile(r"<\||\|>|</?(?:think|tool_call|tool_response|s)>|\[/?INST\]|\[hint\]", re.I)
_NOTHING = re.compile(
    r"(?:no|none|null|nil|n/?a|nothing|not applicable|no (?:hint|change|improvement)s?\b.{0,30}|"
    r"(?:the |this )?(?:reply|answer|response) (?:is|was) (?:very )?"
    r"(?:good|fine|bad|wrong|correct|perfect|incorrect|poor|great))[.!]?",
    re.IGNORECASE,
)
"""Words that stand in the hint's place and ask for nothing."""


def verdict_of(turn: str, judge: str, votes: Sequence[Vote], reply: str) -> Verdict | None:
    """The verdict of valid `votes` on the turn that said `reply`; None without any vote."""
    if not votes:
        return None
    scores = tuple(vote.score for vote in votes)
    score = majority(scores)
    hints = [
        hint
        for vote in votes
        if vote.score == score and vote.hint and (hint := checked_hint(vote.hint, reply))
    ]
    return Verdict(turn=turn, votes=scores, score=score, judge=judge, hint=chosen_hint(hints))


def chosen_hint(hints: Sequence[str]) -> str | None:
    """The hint that the others agree with most, then the shortest; None without hints."""
    if not hints:
        return None
    words = [_words(hint) for hint in hints]

    def rank(position: int) -> tuple[float, int, int]:
        mine = set(words[position])
        shared = sum(_overlap(mine, set(w)) for i, w in enumerate(words) if i != position)
        return -round(shared, 6), len(hints[position]), position

    return hints[min(range(len(hints)), key=rank)]


def checked_hint(text: str, reply: str) -> str | None:
    """The hint, tidied, or None when it would not help the reply that it is about.

    Kept are its first three sentences. It must be of a sensible length, say something to do, hold
    no chat template marks, and not simply quote the reply.
    """
    sentences = [s.strip() for s in _SENTENCE.split(_CONTROL.sub("", text).strip()) if s.strip()]
    hint = " ".join(sentences[:HINT_MAX_SENTENCES]).strip("\"“”' ")
    if not HINT_MIN_CHARS <= len(hint) <= HINT_MAX_CHARS:
        return None
    if _TEMPLATE.search(hint) or _NOTHING.fullmatch(hint):
        return None
    if not any(character.isalpha() for character in hint) or quotes(hint, reply):
        return None
    return hint


def quotes(hint: str, reply: str) -> bool:
    """Whether the hint only repeats words that stand together in the reply."""
    mine, theirs = _words(hint), _words(reply)
    if not mine or not theirs:
        return False
    run = SequenceMatcher(None, theirs, mine, autojunk=False).find_longest_match().size
    return run == len(mine) or (len(mine) >= _QUOTE_WORDS and run >= _QUOTED_SHARE * len(mine))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(mine: set[str], theirs: set[str]) -> float:
    return len(mine & theirs) / (len(mine | theirs) or 1)
