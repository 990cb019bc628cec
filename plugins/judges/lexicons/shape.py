"""The one shape of every language's table of cues.

Patterns see one lower-case sentence, or one clause of it, without accents, typographic apostrophes
and the punctuation at its ends. Where cues contradict each other, `rules.py` weighs them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PLAIN = str.maketrans(
    "áéíóúàèìòùâêîôûäöüñ謝錯對這沒個來還說請給頭後問題寫過點兒們麼嗎讓試幫換繼續開關應該無實當發覺記會為麻煩簡單長",
    "aeiouaeiouaeiouaoun谢错对这没个来还说请给头后问题写过点儿们么吗让试帮换继续开关应该无实当发觉记会为麻烦简单长",
)


_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


def narrow(text: str) -> str:
    """The text with full-width punctuation, letters and digits as ASCII.

    >>> narrow("\\uff08\\uff11\\uff0c\\uff12\\uff09\\uff1f")
    '(1,2)?'
    """
    return text.translate(_NARROW)


def fold(text: str) -> str:
    """Narrow, in lower case, without accents; "schön" stays apart from "schon", ß is ss.

    The traditional characters of cues become simplified ones.

    >>> fold("Schön, größer, más, 謝謝")
    'schoen, grosser, mas, 谢谢'
    """
    return narrow(text).lower().replace("schön", "schoen").replace("ß", "ss").translate(_PLAIN)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """How people who write one language react to a reply."""

    signs: frozenset[str]
    """Frequent words that few other languages have: by them the language is known."""
    idioms: Sequence[tuple[int, re.Pattern[str]]]
    """Fixed phrases and what they say; earlier rows win and use up the text they match, so that
    "not bad" is praise before "bad" can be a complaint."""
    praise: re.Pattern[str]
    """The reply served: praise, acceptance, a problem gone."""
    thanks: re.Pattern[str]
    """Mere thanks."""
    complaint: re.Pattern[str]
    """The reply did not serve; whether a sentence also says what to do is `directive`'s matter."""
    directive: re.Pattern[str]
    """How the reply should have been: these sentences make a hint."""
    mockery: re.Pattern[str]
    """Plain sarcasm, in the whole message."""
    earnest: re.Pattern[str]
    """Says that the mockery was a joke."""
    undecided: re.Pattern[str]
    """Mixed, or put off: no verdict yet, unless the message also says what to do."""
    doubt: re.Pattern[str]
    """A soft correction: counts only where nothing else speaks."""
    negation: re.Pattern[str]
    """A mere "not": the same, outside questions."""
    new_task: re.Pattern[str]
    """Opens the next task whatever else the sentence says."""
    soft_transition: re.Pattern[str]
    """Opens the next task unless the sentence speaks about the reply."""
    reference: re.Pattern[str]
    """Words by which a sentence points at the reply."""
    no_reference: re.Pattern[str]
    """Phrases with such words that point at nothing."""
    pointed: re.Pattern[str]
    """Complaints that say what was amiss: they make a hint when nothing says what to do."""
    imperative: re.Pattern[str]
    """An order, or the right value, that belongs to the complaint before it."""
    order: re.Pattern[str]
    """An order; it is about the reply when it names what the turn named."""
    contrast: re.Pattern[str]
    """A "but" between two halves of a sentence, or at its beginning."""
    conjunction: re.Pattern[str]
    """Where a clause ends without punctuation."""
    answered: re.Pattern[str]
    """A yes or no at the beginning: the answer when the reply asked."""
    bare: frozenset[str]
    """An order made of these words alone asks for another try without saying what to change."""
    common: frozenset[str]
    """Words that say nothing about what a message is about, or speak of how a reply is written."""


def table(rows: Sequence[str], words: Mapping[str, str] | None = None) -> re.Pattern[str]:
    """One pattern that matches what any row matches; `{name}` stands for a list of `words`."""
    joined = "|".join(f"(?:{row})" for row in rows)
    for name, pattern in (words or {}).items():
        joined = joined.replace("{" + name + "}", pattern)
    return re.compile(joined, re.MULTILINE)


def words_of(text: str) -> frozenset[str]:
    """The words of a text, which is how long sets are written here."""
    return frozenset(fold(text).split())
