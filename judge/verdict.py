"""From votes to a verdict.

*Majority*: the score that most votes gave; a tie is 0. *Consensus* (`[judge] vote_rule`): each vote
weighs as much as the share of the others that agree with it, and the score is 0 unless it has more
than half of the weight that a unanimous jury would give it.

Praise that only tools or the environment bear witness to must be unanimous: what they return was
often written by strangers. The confidence is the weight behind the score times the trust of the
best source among the next states.

A hint comes only from votes that agree with the score, whatever its sign: a hint beside a vote that
lost argues for something the others did not see. It must ask for something, and may neither quote
the reply, nor hand over the answer that a tool or a pasted block gave later, nor repeat a secret.
Those left are ranked by how many of their words the other hints share, then the shorter first; the
learner may choose another than the first (`[judge] hints`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from judge.config import VoteRule
from nextstate.hooks import Evidence
from nextstate.records import HintedPrompt, NextState, Source, Verdict, Vote, majority

HINT_MIN_CHARS = 8
HINT_MAX_CHARS = 400
HINT_MAX_SENTENCES = 3
_QUOTED_SHARE = 0.8
"""A hint of several words that repeats this share of them in one run of the reply quotes it."""
_QUOTE_WORDS = 5
_ANSWER_WORDS = 8
"""So many words in a row out of a tool's text or a pasted block are the answer itself."""
_THEIRS = (Source.USER, Source.FEEDBACK)

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
_PASTED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_LONG = re.compile(r"[\w+=-]{16,}")
_DIGIT, _LETTER = re.compile(r"\d"), re.compile(r"[A-Za-z]")
_NAMED_SECRET = re.compile(
    r"\b(?:password|passwd|passphrase|secret|token|api[ _-]?key|pin)\b[\"']?\s*(?:is|:|=)\s*"
    r"[\"'`]?([^\s\"'`,;]{4,})",
    re.IGNORECASE,
)


def verdict_of(
    turn: str, judge: str, votes: Sequence[Vote], evidence: Evidence, rule: VoteRule = "majority"
) -> Verdict | None:
    """The verdict of valid `votes` on the turn that `evidence` shows; None without any vote."""
    if not votes:
        return None
    scores = tuple(vote.score for vote in votes)
    score, weight = RULES[rule](scores)
    states = (*evidence.next_states, *evidence.later)
    if score > 0 and len(set(scores)) > 1 and not any(s.source in _THEIRS for s in states):
        score, weight = 0, 0.0
    hints = [
        hint
        for vote in votes
        if vote.score == score and vote.hint and (hint := checked_hint(vote.hint, evidence.reply))
    ]
    hints = [hint for hint in hints if not gives_away(hint, states, evidence.tail)]
    ranked = ranked_hints(hints)
    return Verdict(
        turn=turn,
        votes=scores,
        score=score,
        judge=judge,
        hint=ranked[0] if ranked else None,
        others=tuple(map(HintedPrompt, ranked[1:])),
        confidence=weight * max((state.trust for state in states), default=1.0),
    )


def by_majority(scores: Sequence[int]) -> tuple[int, float]:
    """The score of most votes and their share; a tie is 0.

    >>> by_majority([1, 1, -1, 1]), by_majority([1, -1])
    ((1, 0.75), (0, 0.0))
    """
    score = majority(scores)
    return score, scores.count(score) / len(scores)


def by_consensus(scores: Sequence[int]) -> tuple[int, float]:
    """The score that more than half of all pairs of votes agree on, and their share; else 0.

    Each vote weighs as much as the share of the other votes that agree with it, so k of n votes
    have k (k - 1) of the n (n - 1) that a unanimous jury would have.

    >>> by_consensus([1, 1, 1]), by_consensus([1, 1, -1]), by_consensus([-1])
    ((1, 1.0), (0, 0.0), (-1, 1.0))
    >>> by_consensus([1, 1, 1, 1, -1]), by_consensus([1, 1, 1, 0, -1])
    ((1, 0.6), (0, 0.0))
    """
    count, score = len(scores), majority(scores)
    if count == 1:
        return score, 1.0
    weight = _pairs(scores.count(score)) / _pairs(count)
    return (score, weight) if 2 * weight > 1 else (0, _pairs(scores.count(0)) / _pairs(count))


def _pairs(count: int) -> int:
    return count * (count - 1)


RULES: Mapping[VoteRule, Callable[[Sequence[int]], tuple[int, float]]] = {
    "majority": by_majority,
    "consensus": by_consensus,
}


def ranked_hints(hints: Sequence[str]) -> list[str]:
    """The different hints: first what the others agree with most, then what is shortest."""
    words = [frozenset(_words(hint)) for hint in hints]

    def rank(position: int) -> tuple[float, int, int]:
        mine = words[position]
        shared = sum(_overlap(mine, w) for i, w in enumerate(words) if i != position)
        return -round(shared, 6), len(hints[position]), position

    different: dict[frozenset[str], str] = {}
    for place in sorted(range(len(hints)), key=rank):
        different.setdefault(words[place], hints[place])
    return list(different.values())


def checked_hint(text: str, reply: str) -> str | None:
    """The hint, tidied, or None when it would not help the reply that it is about.

    It must say something to do and not simply quote the reply.
    """
    hint = tidied_hint(text)
    if hint is None or _NOTHING.fullmatch(hint) or quotes(hint, reply):
        return None
    return hint


def tidied_hint(text: str) -> str | None:
    """The first three sentences on one line; None unless of a sensible length and of plain words.

    Marks of chat templates are not plain words.
    """
    sentences = [s.strip() for s in _SENTENCE.split(_CONTROL.sub("", text).strip()) if s.strip()]
    hint = " ".join(sentences[:HINT_MAX_SENTENCES]).strip("\"“”' ")
    if not HINT_MIN_CHARS <= len(hint) <= HINT_MAX_CHARS or _TEMPLATE.search(hint):
        return None
    return hint if any(character.isalpha() for character in hint) else None


def unmarked(text: str) -> str | None:
    """A person's hint as the teacher may read it; None when nothing is left of it.

    It may be of any form and quote the reply: only what would break the prompt is taken out.
    """
    hint, marked = _CONTROL.sub("", text), ""
    while hint != marked:  # what stood around a mark may be one
        marked, hint = hint, _TEMPLATE.sub("", hint)
    return hint.strip() or None


def quotes(hint: str, reply: str) -> bool:
    """Whether the hint only repeats words that stand together in the reply."""
    mine, theirs = _words(hint), _words(reply)
    if not mine or not theirs:
        return False
    run = _longest_run(mine, theirs)
    return run == len(mine) or (len(mine) >= _QUOTE_WORDS and run >= _QUOTED_SHARE * len(mine))


def gives_away(
    hint: str, states: Sequence[NextState], tail: Sequence[tuple[str, str]] = ()
) -> bool:
    """Whether the hint holds what the policy could not have known or must not learn by heart.

    That is eight words in a row of a tool's text or of a block that the user pasted, or a key,
    token or password that the request did not have yet.
    """
    before = "\n".join(text for _, text in tail)
    mine = _words(hint)
    for state in states:
        text = state.text
        finished = _PASTED.findall(text) if state.source in _THEIRS else [text]
        if any(_longest_run(mine, _words(part)) >= _ANSWER_WORDS for part in finished):
            return True
        named = (secret.rstrip(".!?)") for secret in _NAMED_SECRET.findall(text))
        secrets = {*_random(text), *named}
        if any(secret in hint and secret not in before for secret in secrets):
            return True
    return False


def _random(text: str) -> Iterator[str]:
    """What looks like keys and tokens: long, of letters and digits."""
    return (word for word in _LONG.findall(text) if _DIGIT.search(word) and _LETTER.search(word))


def _longest_run(mine: Sequence[str], theirs: Sequence[str]) -> int:
    return SequenceMatcher(None, theirs, mine, autojunk=False).find_longest_match().size


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(mine: frozenset[str], theirs: frozenset[str]) -> float:
    return len(mine & theirs) / (len(mine | theirs) or 1)
