"""The table of cues that every language has.

A pattern sees one sentence or clause in lower case, without accents, typographic apostrophes and
the punctuation at its ends. If cues contradict each other, `rules.py` weighs them.
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
    """The text narrow, in lower case and without accents; "schön" becomes "schoen", ß becomes ss.

    Traditional characters of cues become simplified ones.

    >>> fold("Schön, größer, más, 謝謝")
    'schoen, grosser, mas, 谢谢'
    """
    return narrow(text).lower().replace("schön", "schoen").replace("ß", "ss").translate(_PLAIN)


@dataclass(frozen=True, slots=True)
class Lexicon:
    """How people who write one language react to a reply."""

    signs: frozenset[str]
    """Frequent words that few other languages have; they show the language."""
    idioms: Sequence[tuple[int, re.Pattern[str]]]
    """Fixed phrases and their values. Earlier rows win and remove the text that they match, so that
    "not bad" is praise before "bad" can be a complaint."""
    praise: re.Pattern[str]
    """The reply was good: praise, acceptance, a solved problem."""
    thanks: re.Pattern[str]
    """Mere thanks."""
    complaint: re.Pattern[str]
    """The reply was bad; `directive` finds out whether a sentence also says what to do."""
    directive: re.Pattern[str]
    """How the reply should be; such sentences make a hint."""
    mockery: re.Pattern[str]
    """Plain sarcasm, in the whole message."""
    earnest: re.Pattern[str]
    """The mockery was a joke."""
    undecided: re.Pattern[str]
    """Mixed or postponed: no verdict yet, unless the message also says what to do."""
    doubt: re.Pattern[str]
    """A soft correction: counts only if nothing else does."""
    negation: re.Pattern[str]
    """A "not": counts only if nothing else does, and not in a question."""
    new_task: re.Pattern[str]
    """Begins the next task, whatever else the sentence says."""
    soft_transition: re.Pattern[str]
    """Begins the next task unless the sentence is about the reply."""
    reference: re.Pattern[str]
    """Words that point at the reply."""
    no_reference: re.Pattern[str]
    """Phrases with such words that do not point at the reply."""
    pointed: re.Pattern[str]
    """Complaints that say what was wrong: they make a hint if nothing says what to do."""
    imperative: re.Pattern[str]
    """An order, or the right value, that belongs to the complaint before it."""
    order: re.Pattern[str]
    """An order; it is about the reply when it names what the turn named."""
    contrast: re.Pattern[str]
    """A "but" between two halves of a sentence, or at its beginning."""
    conjunction: re.Pattern[str]
    """The end of a clause without punctuation."""
    answered: re.Pattern[str]
    """A yes or no at the beginning: the answer to the reply's question."""
    bare: frozenset[str]
    """An order with only these words asks for another try and does not say what to change."""
    common: frozenset[str]
    """Words that do not tell a message's subject, or that are about how a reply is written."""


def table(rows: Sequence[str], words: Mapping[str, str] | None = None) -> re.Pattern[str]:
    """One pattern that matches what any row matches; `{name}` stands for an entry of `words`."""
    joined = "|".join(f"(?:{row})" for row in rows)
    for name, pattern in (words or {}).items():
        joined = joined.replace("{" + name + "}", pattern)
    return re.compile(joined, re.MULTILINE)


def words_of(text: str) -> frozenset[str]:
    """The folded words of a text; long sets are written this way."""
    return frozenset(fold(text).split())
