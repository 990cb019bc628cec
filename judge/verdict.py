"""From votes to a verdict.

The score is the majority of the votes; a tie is 0. If the next states come only from tools or the
environment, praise must be unanimous, because strangers often wrote what a tool returns. What a
tool only fetched gives no score (`judge/strangers.py`).

A hint comes only from votes that agree with the score: a losing vote argues for something that the
others did not see. A hint must ask for something. It may not quote the reply, contain the answer
that a tool or a pasted block gave later, or repeat a secret. Of the remaining hints the one that
shares most words with the others is taken, and of equals the shortest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from judge.strangers import is_evidence
from nextstate.hooks import Evidence
from nextstate.records import NextState, Source, Verdict, Vote, majority

HINT_MIN_CHARS = 8
HINT_MAX_CHARS = 400
HINT_MAX_SENTENCES = 3
_QUOTED_SHARE = 0.8
"""A hint of several words quotes the reply if this share of them is one run of the reply."""
_QUOTE_WORDS = 5
_ANSWER_WORDS = 8
"""This many words in a row from a tool's text or a pasted block are the answer itself."""
_PERSON = (Source.USER, Source.FEEDBACK)

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
"""Phrases that fill the hint's place but ask for nothing."""
_PASTED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_LONG = re.compile(r"[\w+=-]{16,}")
_DIGIT, _LETTER = re.compile(r"\d"), re.compile(r"[A-Za-z]")
_NAMED_SECRET = re.compile(
    r"\b(?:password|passwd|passphrase|secret|token|api[ _-]?key|pin)\b[\"']?\s*(?:is|:|=)\s*"
    r"[\"'`]?([^\s\"'`,;]{4,})",
    re.IGNORECASE,
)


def verdict_of(turn: str, judge: str, votes: Sequence[Vote], evidence: Evidence) -> Verdict | None:
    """The verdict of valid `votes` on the turn that `evidence` shows; None without any vote.

    `judge` is named in it, unless the votes name the members of a chain that gave them.
    """
    if not votes:
        return None
    scores = tuple(vote.score for vote in votes)
    score = majority(scores)
    states = (*evidence.next_states, *evidence.later)
    doubtful = len(set(scores)) > 1 and not any(s.source in _PERSON for s in states)
    if (score > 0 and doubtful) or (states and not any(map(is_evidence, states))):
        score = 0
    hints = [
        hint
        for vote in votes
        if vote.score == score and vote.hint and (hint := checked_hint(vote.hint, evidence.reply))
    ]
    hints = [hint for hint in hints if not gives_away(hint, states, evidence.tail)]
    return Verdict(
        turn=turn,
        votes=scores,
        score=score,
        judge=",".join(dict.fromkeys(vote.judge or judge for vote in votes)),
        hint=best_hint(hints),
    )


def best_hint(hints: Sequence[str]) -> str | None:
    """The hint that shares most words with the others, and of equals the shortest; None of none."""
    words = [frozenset(_words(hint)) for hint in hints]

    def rank(position: int) -> tuple[float, int, int]:
        mine = words[position]
        shared = sum(_overlap(mine, w) for i, w in enumerate(words) if i != position)
        return -round(shared, 6), len(hints[position]), position

    return hints[min(range(len(hints)), key=rank)] if hints else None


def checked_hint(text: str, reply: str) -> str | None:
    """The tidied hint; None when it asks for nothing or simply quotes the reply."""
    hint = tidied_hint(text)
    if hint is None or _NOTHING.fullmatch(hint) or quotes(hint, reply):
        return None
    return hint


def tidied_hint(text: str) -> str | None:
    """The first three sentences on one line.

    None when they are too short or too long, have no letter, or contain a chat template's mark.
    """
    sentences = [s.strip() for s in _SENTENCE.split(_CONTROL.sub("", text).strip()) if s.strip()]
    hint = " ".join(sentences[:HINT_MAX_SENTENCES]).strip("\"“”' ")
    if not HINT_MIN_CHARS <= len(hint) <= HINT_MAX_CHARS or _TEMPLATE.search(hint):
        return None
    return hint if any(character.isalpha() for character in hint) else None


def unmarked(text: str) -> str | None:
    """A person's hint without what would break the prompt; None when nothing is left.

    It may have any form, and may quote the reply.
    """
    hint, marked = _CONTROL.sub("", text), ""
    while hint != marked:  # the text around a removed mark may form another one
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
    """Whether the hint contains what the policy could not know or must not learn by heart.

    That is eight words in a row from a tool's text or from a block that the user pasted, or a key,
    token or password that the request did not contain.
    """
    before = "\n".join(text for _, text in tail)
    mine = _words(hint)
    for state in states:
        text = state.text
        finished = _PASTED.findall(text) if state.source in _PERSON else [text]
        if any(_longest_run(mine, _words(part)) >= _ANSWER_WORDS for part in finished):
            return True
        named = (secret.rstrip(".!?)") for secret in _NAMED_SECRET.findall(text))
        secrets = {*_random(text), *named}
        if any(secret in hint and secret not in before for secret in secrets):
            return True
    return False


def _random(text: str) -> Iterator[str]:
    """Words that look like keys and tokens: long, with letters and digits."""
    return (word for word in _LONG.findall(text) if _DIGIT.search(word) and _LETTER.search(word))


def _longest_run(mine: Sequence[str], theirs: Sequence[str]) -> int:
    return SequenceMatcher(None, theirs, mine, autojunk=False).find_longest_match().size


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(mine: frozenset[str], theirs: frozenset[str]) -> float:
    return len(mine & theirs) / (len(mine | theirs) or 1)
