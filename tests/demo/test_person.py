"""The person who talks to a real model: wishes, questions, and that the judge understands her."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

from demo.person import Conversation, react
from demo.personas import Kind
from demo.questions import Question, asked, questions
from demo.wishes import WISHES, sentences
from judge.verdict import verdict_of
from nextstate.hooks import Evidence
from nextstate.records import TRUST, NextState, Source
from plugins.judges.rules import vote_on

OSLO = Question("What is the capital of Norway?", ("Oslo",))


@pytest.mark.parametrize(
    ("wish", "reply", "satisfied"),
    [
        ("short", "Oslo is the capital of Norway.", True),
        ("short", "It is Dr. Jekyll by R. L. Stevenson.", True),
        ("short", "Oslo is the capital", False),  # not whole
        ("short", "Oslo.", False),  # no sentence
        ("short", "It is Oslo. It lies in the south.", False),
        ("short", "The capital of Norway is **Oslo**.", False),
        ("short", "1. The capital is Oslo.", False),
        ("short", "The capital\nis Oslo.", False),
        ("short", " ".join(["word"] * 16) + ".", True),
        ("short", " ".join(["word"] * 17) + ".", False),
        ("named", "It is Oslo, Mia. Have you been there?", True),
        ("named", "It is Oslo. Have you been there, Miami?", False),
        ("named", "Mia, it is Oslo.", False),
        ("cheerful", "It is lovely Oslo!", True),
        ("cheerful", "What a question! It is Oslo!", True),
        ("cheerful", "It is Oslo.", False),
        ("cheerful", "One! Two! Three!", False),
    ],
)
def test_a_wish_is_checked_by_the_text_alone(wish: str, reply: str, satisfied: bool) -> None:
    assert WISHES[wish].satisfied(reply) is satisfied


def test_an_abbreviation_and_an_initial_end_no_sentence() -> None:
    assert sentences("Mr. J. Smith lives in St. Ives. He is 3.5 feet tall") == 2


@pytest.mark.parametrize(
    ("reply", "right"),
    [("It is OSLO!", True), ("Oslofjord", False), ("", False), ("It is Bergen.", False)],
)
def test_a_keyword_counts_as_a_whole_word_in_any_case(reply: str, right: bool) -> None:
    assert OSLO.is_right(reply) is right


def test_no_question_is_in_two_parts_and_there_are_enough() -> None:
    practice, held_out, retention = (
        {q.question for q in questions(part)} for part in ("practice", "held_out", "retention")
    )
    assert len(practice) >= 100
    assert len(held_out) >= 60
    assert len(retention) >= 200
    assert not practice & held_out
    assert not (practice | held_out) & retention


@pytest.mark.parametrize("part", ["practice", "held_out", "retention"])
def test_every_question_has_keywords_and_stands_once(part: str) -> None:
    found = questions(part)  # type: ignore[arg-type]
    assert len({q.question for q in found}) == len(found)
    assert all(q.keywords and all(q.keywords) for q in found)
    assert not [q for q in found if part != "retention" and q.is_right(q.question)]


def test_every_practice_question_is_asked_before_one_comes_again() -> None:
    count = len(questions("practice"))
    drawn = list(islice(asked("0"), 2 * count))
    assert len(set(drawn[:count])) == len(set(drawn[count:])) == count


def test_a_conversation_ends_with_a_reaction_and_no_further_question() -> None:
    talk = Conversation(WISHES["short"], asked("0"), Random(0), exchanges=2)
    first = talk.open()
    assert (first.kind, talk.is_over) == (None, False)
    second = talk.answer("")
    assert (second.kind, talk.is_over) == (Kind.BROKEN, False)
    assert second.text.endswith("?")
    last = talk.answer("")
    assert (last.kind, talk.is_over) == (Kind.BROKEN, True)
    assert "?" not in last.text


GOOD = {
    "short": "The answer is {}.",
    "named": "Well, Mia, the answer to this is {}, would you like to know more?",
    "cheerful": "That is {}! How nice!",
}
LONG = "The answer is {}. It is known for many things, and people like it for its long history."


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("exchanges", [1, 2])
def test_the_linear_judge_reads_every_reaction_as_the_person_means_it(
    wish: str, exchanges: int
) -> None:
    rng = Random(wish)
    for question in questions("practice"):
        word = question.keywords[0]
        others = [text for name, text in GOOD.items() if name != wish]
        for text in (GOOD[wish], *others, LONG, "I do not know that.\n\n1. One\n2. Two", ""):
            reply = text.format(word)
            following = iter([question, *questions("practice")])
            talk = Conversation(WISHES[wish], following, rng, exchanges)
            talk.open()
            said = talk.answer(reply)
            evidence = Evidence(
                tail=(("user", question.question),),
                reply=reply,
                next_states=(NextState("t", Source.USER, said.text, TRUST[Source.USER]),),
            )
            verdict = verdict_of("t", "rules", [vote_on(evidence)], evidence)
            assert verdict is not None
            assert verdict.score == (1 if said.kind is Kind.THANKS else -1), said.text
            if said.kind is Kind.STYLE:
                assert verdict.hint in said.text
                assert verdict.hint.endswith(".")


def test_a_wrong_reply_is_corrected_with_the_right_answer() -> None:
    said = react(WISHES["short"], OSLO, "It is Bergen.", Random(0))
    assert said.kind is Kind.CORRECTION
    assert "Oslo" in said.text
    assert "sentence" not in said.text  # it was short enough
