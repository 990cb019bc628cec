"""What a candidate's own replies tell beside the base's replies to the same prompts.

The prompts, the canaries, are the built-in questions and a few recorded ones. A learned style
changes a few tokens of a reply. Babble changes most of them: the base finds it surprising all
along, right answers get lost, or letters of another script appear.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from learner.means import Mean, mean_over_groups

CANARY_LEVEL = 0.01
"""How often a version exactly at an allowed change is rejected for it."""
RIGHT_DROP = 0.15
"""The share of right answers may fall by this much below the base's."""
SURPRISE_RISE = 1.0
"""A reply's surprise may rise by this much above the base's, in nats a token."""
FOREIGN_SHARE = 0.2
"""This share of the letters may be of scripts that nobody used before."""
_BROKEN_SHARE = 0.5
_SHORTEST_LOOP = 8
_OF_STYLE, _FEWEST_TOKENS = 3, 8
_RARE = 0.02
_KNOWN_SHARE = 0.25
_QUOTED_CHARS = 200
_EAST_ASIAN = {"HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "HALFWIDTH"}


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a version to a canary."""

    prompt: tuple[int, ...]
    text: str
    is_broken: bool
    """True if it is empty or runs in a loop (`is_broken`)."""
    surprise: float | None
    """See `surprise`; None for an empty reply."""
    question: str | None
    """The built-in question that it answers; None for a recorded prompt."""
    is_right: bool = False
    """True for a right answer to a built-in question."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate's replies beside the base's to the same prompts."""

    count: int
    """Replies of each."""
    broken: int
    """The candidate's that are broken."""
    bases_broken: int
    right: Mean | None
    """How the share of right answers has changed; None without the built-in questions."""
    surprise: Mean | None
    """How the replies' surprise has changed, in nats a token; None with few canaries."""
    foreign: float
    """The share of the candidate's letters in scripts that nobody used before."""
    example: str
    """A built-in question and the candidate's worst reply to it; empty without any."""

    def metrics(self) -> dict[str, float | None]:
        """Numbers with `gate/what` names."""
        return {
            "gate/replies": self.count,
            "gate/replies_broken": self.broken,
            "gate/right_change": self.right and self.right.value,
            "gate/surprise_change": self.surprise and self.surprise.value,
            "gate/foreign_letters": self.foreign,
        }

    def objection(self) -> str | None:
        """What is wrong with the replies, with an example; None if nothing is."""
        said = self._complaint()
        return said and said + (f"; for example {self.example}" if self.example else "")

    def _complaint(self) -> str | None:
        if 2 * self.broken > self.count and self.broken >= 2 * self.bases_broken:
            return (
                f"{self.broken} of {self.count} replies of its own are empty or run in a loop, "
                f"{self.bases_broken} of the base's"
            )
        right, surprise = self.right, self.surprise
        if right is not None and not right.upper(CANARY_LEVEL) >= -RIGHT_DROP:
            return (
                f"it answers fewer of {right.count} simple questions right than the base: the "
                f"share fell by {-right.value:.2f}, surely by more than {RIGHT_DROP:g}"
            )
        if surprise is not None and not surprise.lower(CANARY_LEVEL) <= SURPRISE_RISE:
            return (
                "its own replies look like babble to the base: they are by "
                f"{surprise.value:.2f} nats a token less likely than the base's own, surely by "
                f"more than {SURPRISE_RISE:g}"
            )
        if self.foreign > FOREIGN_SHARE:
            return (
                f"{self.foreign:.0%} of the letters in its own replies are of a script that "
                "neither the base nor any recorded turn uses"
            )
        return None


def compare(ours: Sequence[Reply], bases: Sequence[Reply], recorded: str) -> Comparison:
    """Compares a candidate's replies with the base's; `recorded` is text of recorded turns."""
    known = _scripts(r.text for r in bases) | _scripts([recorded])
    letters = Counter(script(c) for reply in ours for c in reply.text if c.isalpha())
    foreign = sum(count for name, count in letters.items() if name not in known)
    return Comparison(
        count=len(ours),
        broken=sum(reply.is_broken for reply in ours),
        bases_broken=sum(reply.is_broken for reply in bases),
        right=_change(_right(ours), _right(bases)),
        surprise=_change(_surprise(ours), _surprise(bases)),
        foreign=foreign / max(1, letters.total()),
        example=_example(ours),
    )


def knows(bases: Sequence[Reply]) -> bool:
    """True if a base answers enough built-in questions right for them to tell anything of it."""
    right = [reply.is_right for reply in bases if reply.question is not None]
    return sum(right) >= _KNOWN_SHARE * len(right)


def surprise(logprobs: Sequence[float]) -> float:
    """How surprising a reply is all along: the mean of -log p of its tokens, in nats.

    The three most surprising tokens do not count: a learned style decides few. A short reply's sum
    is divided by 8, so that a terse answer is no babble.

    >>> surprise([-9.0] * 3 + [-2.0] * 10), surprise([-4.0, -1.0, -9.0, -5.0])
    (2.0, 0.125)
    """
    rest = sorted(logprobs)[_OF_STYLE:]
    return -sum(rest) / max(len(rest), _FEWEST_TOKENS)


def is_broken(reply: Sequence[int]) -> bool:
    """True if a reply, without its end, is empty or at least half of it is a loop."""
    return not reply or loop_share(reply) >= _BROKEN_SHARE


def loop_share(ids: Sequence[int]) -> float:
    """Fraction of the reply in the longest run of one block, repeated at least three times.

    A run of fewer than 8 tokens does not count.

    >>> loop_share([9, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7])
    0.75
    """
    longest = 0
    for period in range(1, len(ids) // 3 + 1):
        equal = 0
        for at in range(period, len(ids)):
            equal = equal + 1 if ids[at] == ids[at - period] else 0
            if equal >= 2 * period:
                longest = max(longest, equal + period)
    return longest / len(ids) if longest >= _SHORTEST_LOOP else 0.0


def script(letter: str) -> str:
    """The script of a letter, by its name in Unicode; those of East Asia count as one.

    >>> script("é"), script("я"), script("京"), script("ト")
    ('LATIN', 'CYRILLIC', 'CJK', 'CJK')
    """
    name = unicodedata.name(letter, "UNNAMED").split()[0]
    return "CJK" if name in _EAST_ASIAN else name


def _scripts(texts: Iterable[str]) -> set[str]:
    """The scripts of the letters, without those that are rare."""
    letters = Counter(script(c) for text in texts for c in text if c.isalpha())
    return {name for name, count in letters.items() if count >= _RARE * letters.total()}


def _right(replies: Sequence[Reply]) -> list[tuple[tuple[int, ...], float]]:
    return [(r.prompt, float(r.is_right)) for r in replies if r.question is not None]


def _surprise(replies: Sequence[Reply]) -> list[tuple[tuple[int, ...], float]]:
    return [(r.prompt, r.surprise) for r in replies if r.surprise is not None]


def _change(
    ours: list[tuple[tuple[int, ...], float]], bases: list[tuple[tuple[int, ...], float]]
) -> Mean | None:
    """The mean over prompts of the candidate's mean less the base's."""
    by_prompt = {prompt: [value for p, value in bases if p == prompt] for prompt, _ in bases}
    return mean_over_groups(
        [(p, value - statistics.fmean(by_prompt[p])) for p, value in ours if p in by_prompt]
    )


def _example(replies: Sequence[Reply]) -> str:
    """The worst reply to a built-in question, quoted: nobody's conversation is in it."""
    built_in = [reply for reply in replies if reply.question is not None]
    if not built_in:
        return ""
    worst = max(built_in, key=lambda r: (not r.is_right, r.surprise or 0.0))
    return f"{worst.question!r} was answered {worst.text[:_QUOTED_CHARS]!r}"
