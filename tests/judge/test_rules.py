from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.agreement import agreement
from nextstate.hooks import Evidence
from nextstate.records import NextState, Source, Vote
from plugins.judges.rules import restates, sentences, vote_on

ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "rules.jsonl").read_text().splitlines()
]


def vote_of(row: dict[str, Any]) -> Vote:
    state = NextState("t", Source(row["source"]), row["text"], 0.5)
    return vote_on(Evidence((("user", row["asked"]),), row["reply"], (state,)))


def said(text: str, asked: str = "Name a river.", reply: str = "**The Nile.**") -> Vote:
    return vote_of({"source": "user", "text": text, "asked": asked, "reply": reply})


def test_votes_agree_with_labels() -> None:
    """The lexicon was tuned on these rows; on first contact the held-out ones gave 0.84."""
    found = agreement([(row["score"], vote_of(row).score) for row in ROWS])
    wrong = [(row["score"], row["text"]) for row in ROWS if vote_of(row).score != row["score"]]
    assert len(ROWS) >= 190
    assert found.accuracy >= 0.95, wrong
    assert found.kappa >= 0.9


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row["hint"] not in ("?", "*")], ids=lambda row: row["text"][:30]
)
def test_a_hint_is_the_users_own_words_or_missing(row: dict[str, Any]) -> None:
    vote = vote_of(row)
    if vote.score == row["score"]:
        assert vote.hint == row["hint"]


def test_a_hint_has_at_most_three_sentences() -> None:
    hint = said("Wrong. Try again. Be brief. Use no bold. Say why. Please be kind.").hint
    assert hint is not None
    assert len(list(sentences(hint))) == 3


def test_the_next_task_does_not_count() -> None:
    task = "Tom has 3 apples, but they are the wrong ones. Could you write it again without them?"
    assert said(f"Perfect, thank you! Next one: {task}") == Vote(1)
    assert said(f"That is wrong. Next one: {task}") == Vote(-1)
    assert said(f"Next one: {task}") == Vote(0)


def test_quoted_text_and_code_are_not_the_users_own() -> None:
    assert said("> That is wrong.\nThanks, all good!").score == 1
    assert said("Great!\n```\nerror: this is wrong, fix it\n```").score == 1


def test_the_user_outweighs_a_tool_and_a_tool_gives_no_hint() -> None:
    error = NextState("t", Source.TOOL, "error: please write it again without bold", 0.4)
    thanks = NextState("t", Source.USER, "Thanks, that works!", 0.9)
    assert vote_on(Evidence((), "r", (error,))) == Vote(-1)
    assert vote_on(Evidence((), "r", (error, thanks))) == Vote(1)


def test_restating_needs_the_same_numbers_and_names() -> None:
    asked = "How many coins does Lena have after she spends 5 of 12?"
    assert restates("how many coins does Lena have after she spends 5 of 12", asked)
    assert not restates("How many coins does Lena have after she spends 6 of 12?", asked)
    assert not restates("How many coins does Omar have after he spends 5 of 12?", asked)


@given(st.text(max_size=300), st.text(max_size=80))
def test_any_text_gets_a_vote(text: str, reply: str) -> None:
    vote = said(text, reply=reply)
    assert vote.hint is None or vote.score == -1


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["a " * 4000, "thanks, " * 600, "could you " * 500, "!" * 4000])
def test_long_repetition_is_read_quickly(text: str) -> None:
    said(text, asked=text)
