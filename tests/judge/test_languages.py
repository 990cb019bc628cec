"""How `rules` reads what people write in four languages and what tools print, and what it does not
know."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextstate.hooks import Evidence
from nextstate.records import TRUST, NextState, Source, Vote
from plugins.judges.lexicons import lexicon_for
from plugins.judges.lexicons.chinese import CHINESE
from plugins.judges.lexicons.english import ENGLISH
from plugins.judges.lexicons.german import GERMAN
from plugins.judges.lexicons.shape import Lexicon, fold, narrow
from plugins.judges.lexicons.spanish import SPANISH
from plugins.judges.results import content_of, read_result
from plugins.judges.rules import vote_on

ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "languages.jsonl").read_text().splitlines()
]
UNKNOWN = Vote(0, sure=False)


def state(text: str, source: Source = Source.USER) -> NextState:
    return NextState("t", source, text, TRUST[source])


def said(text: str, asked: str = "Name a river.", reply: str = "The Nile.") -> Vote:
    return vote_on(Evidence((("user", asked),), reply, (state(text),)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['language']}-{row['text'][:24]}")
def test_reactions_and_results_are_read(row: dict[str, Any]) -> None:
    """Rows of this test; the held-out labelled cases are different."""
    evidence = Evidence(
        (("user", row["asked"]),), row["reply"], (state(row["text"], Source(row["source"])),)
    )
    assert vote_on(evidence).score == row["score"]


def test_every_language_has_every_score() -> None:
    counts = Counter((row["language"], row["score"]) for row in ROWS)
    counted = [counts[name, score] for name in ("en", "de", "es", "zh") for score in (1, 0, -1)]
    assert min(counted) >= 8


@pytest.mark.parametrize(
    ("text", "context", "lexicon"),
    [
        ("this is not what you said", "", ENGLISH),
        ("das ist nicht, was du gesagt hast", "", GERMAN),
        ("eso no es lo que dijiste", "", SPANISH),
        ("不是这样", "", CHINESE),
        ("ok", "¿Cuál es la capital de Perú?", SPANISH),
        ("ok", "Wie heißt die Hauptstadt?", GERMAN),
        ("👍", "帮我查一下", CHINESE),
        ("404", "", ENGLISH),
    ],
)
def test_a_message_is_read_in_its_language_or_its_contexts(
    text: str, context: str, lexicon: Lexicon
) -> None:
    assert lexicon_for(text, context) is lexicon


def test_full_width_and_traditional_characters_read_like_the_others() -> None:
    wide = "\u8b1d\u8b1d\uff0c\u592a\u597d\u4e86\uff01"  # "thanks, great!" in traditional script
    assert narrow(wide).endswith("!")
    assert fold(wide) == "谢谢,太好了!"
    assert said(wide, "帮我查一下") == Vote(1)
    assert said("\u4e0d\u662f\u9019\u500b\uff0c\u91cd\u65b0\u4f86", "帮我查一下").score == -1


def test_thanks_before_a_but_are_only_polite() -> None:
    for text in (
        "Thanks, but we use another library here.",
        "Danke, aber wir nehmen hier eine andere Bibliothek.",
        "Gracias, pero aquí usamos otra biblioteca.",
        "谢谢,不过我们用的是另一个库",
    ):
        assert said(text).score == -1, text


def test_what_to_do_makes_a_hint_in_every_language() -> None:
    assert said("Bitte ohne Aufzählung.").hint == "Bitte ohne Aufzählung."
    assert said("Más corto, por favor.").hint == "Más corto, por favor."
    assert said("短一点", "帮我写个通知", "各位同事大家好").hint == "短一点"


def test_an_unknown_message_is_unsure_and_a_new_topic_is_sure() -> None:
    assert said("Zwölf Uhr mittags") == UNKNOWN
    assert said("", "x", "y") == UNKNOWN
    assert said("Anyway, what is the tallest mountain in Peru?") == Vote(0)
    assert said("Apropos: wie hoch ist der Brocken?") == Vote(0)
    assert vote_on(Evidence((), "r", (state("intro.md", Source.TOOL),))) == UNKNOWN


def test_a_step_is_judged_by_what_the_user_says_about_it_at_the_end_of_the_task() -> None:
    reply = '[calls edit({"path": "src/cart.py"})]'
    alone = Evidence((("user", "Fix the total."),), reply, (state("ok", Source.TOOL),))
    later = (state("That is wrong, cart.py lost its imports."),)
    assert vote_on(alone) == Vote(1)
    assert vote_on(replace(alone, later=later)).score == -1


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text", ["works but ", "the one is fine, ", "die geht, der ", "el va, la ", "一半", "12 ok, 3 "]
)
def test_long_repetition_is_read_quickly(text: str) -> None:
    evidence = Evidence((), "r", (state(text * 400), state(text * 400, Source.TOOL)))
    assert vote_on(evidence).score in (1, 0, -1)


def test_content_words_are_long_words_numbers_and_pairs_of_characters() -> None:
    assert content_of("to a file 42 窗帘关") == {"file", "42", "窗帘", "帘关"}


@pytest.mark.parametrize(
    ("output", "arguments", "vote"),
    [
        ("2024-05-01 12:00 ERROR db gone\n2024-05-01 12:01 FATAL", "tail log", Vote(1)),
        ("nothing found: error", 'grep x || echo "nothing found: error"', UNKNOWN),
        ("all done", 'echo "all done"', UNKNOWN),
        ("error: nothing found", "grep x", Vote(-1)),
        ("error: connection timed out", "curl x", Vote(0)),
        ("8 of 11 copied", "cp", Vote(0)),
        ("3 imported, 2 skipped", "load", Vote(0)),
        ("2 failed, 5 passed in 0.4s", "pytest", Vote(-1)),
        ("timeout_ms: 90", "cat x", UNKNOWN),
        ("living room: 20.0", 'set("living room", 20)', Vote(1)),
    ],
)
def test_outputs_are_read_by_what_they_state(output: str, arguments: str, vote: Vote) -> None:
    assert read_result(output, "do it", arguments) == vote
