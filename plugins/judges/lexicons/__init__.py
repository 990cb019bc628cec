"""One table of cues a language, and the choice of the one that a message is written in."""

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
    """The lexicon of a message's language; a message that does not tell is in its context's.

    The script decides for Chinese, small words for the others; without any of them, English.
    """
    for shown in (text, context):
        if _HAN.search(shown):
            return CHINESE
        words = _WORD.findall(fold(shown).replace("’", "'"))
        counts = [sum(word in lexicon.signs for word in words) for lexicon in SPACED]
        if counts.count(max(counts)) == 1:
            return SPACED[counts.index(max(counts))]
    return ENGLISH
