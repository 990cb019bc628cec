"""One table of cues for each language, and the choice of a message's language."""

from __future__ import annotations

import re

from plugins.judges.lexicons.chinese import CHINESE
from plugins.judges.lexicons.english import ENGLISH
from plugins.judges.lexicons.german import GERMAN
from plugins.judges.lexicons.shape import Lexicon, fold
from plugins.judges.lexicons.spanish import SPANISH

SPACED = (ENGLISH, GERMAN, SPANISH)
_HAN = re.compile(r"[\u3400-\u9fff]")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def lexicon_for(text: str, context: str) -> Lexicon:
    """The lexicon of a message's language; if the message does not show it, of its context's.

    Chinese is found by its characters, the others by small words; otherwise it is English.
    """
    for shown in (text, context):
        if _HAN.search(shown):
            return CHINESE
        words = _WORD.findall(fold(shown).replace("’", "'"))
        counts = [sum(word in lexicon.signs for word in words) for lexicon in SPACED]
        if counts.count(max(counts)) == 1:
            return SPACED[counts.index(max(counts))]
    return ENGLISH
