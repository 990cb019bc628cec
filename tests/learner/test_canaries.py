"""What a candidate's own replies tell beside the base's, on hand-worked numbers."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.canaries import (
    RIGHT_DROP,
    SURPRISE_RISE,
    Comparison,
    Reply,
    compare,
    is_broken,
    knows,
    loop_share,
    script,
    surprise,
)
from learner.questions import QUESTIONS

FINE = Comparison(6, 0, 0, None, None, 0.0, "")


@pytest.mark.parametrize(
    ("broken", "bases", "rejected"),
    [
        (6, 0, True),
        (4, 2, True),
        (4, 3, False),
        (6, 6, False),  # the task's right answers are like that
        (3, 0, False),  # not more than half
    ],
)
def test_broken_replies_count_only_beyond_the_bases(broken, bases, rejected):
    found = replace(FINE, broken=broken, bases_broken=bases).objection()
    assert (found is not None) is rejected


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ([5] * 8, 1.0),
        ([5] * 7, 0.0),  # too short to be a loop
        ([1, 2, 3] * 3 + [9], 0.9),
        ([9, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7], 0.75),
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], 0.0),  # twice is no loop
        (list(range(20)), 0.0),
        ([], 0.0),
    ],
)
def test_the_share_of_a_loop_is_counted_by_hand(reply, share):
    assert loop_share(reply or [0]) == pytest.approx(share)
    assert is_broken(reply) is (not reply or share >= 0.5)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(3, 6))
def test_any_block_that_is_said_three_times_is_a_loop(block, times):
    reply = block * times
    assert loop_share(reply) == (1.0 if len(reply) >= 8 else 0.0)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_loops_share_is_a_share(ids):
    assert 0.0 <= loop_share(ids or [0]) <= 1.0


def replies(right=16, surprising=1.5, text="It is {}, of course.", questions=QUESTIONS):
    """One reply to each question, the first `right` of them right."""
    return [
        Reply(
            (at,),
            text.format(question.answers[0] if at < right else "so"),
            is_broken=False,
            surprise=surprising + 0.2 * (-1) ** at,
            question=question.text,
            is_right=at < right,
        )
        for at, question in enumerate(questions)
    ]


def test_a_version_that_answers_like_the_base_has_nothing_wrong():
    assert compare(replies(), replies(), "").objection() is None


def test_lost_answers_are_named_with_one_of_them():
    found = compare(replies(right=4), replies(right=14), "")
    # 10 of 16 are lost: mean -0.625, s = 0.5, standard error 0.125, t(15, 1 %) = 2.602: -0.30.
    assert found.right.value == pytest.approx(-0.625)
    assert found.right.upper(0.01) == pytest.approx(-0.30, abs=0.01)
    assert "fewer of 16 simple questions right" in found.objection()
    assert "'Who wrote Romeo and Juliet?' was answered 'It is so, of course.'" in found.objection()


def test_a_few_lost_answers_are_chance():
    assert compare(replies(right=11), replies(right=14), "").objection() is None
    assert RIGHT_DROP < 3 / 16


def test_a_base_knows_the_questions_from_a_quarter_on():
    assert [knows(replies(right=right)) for right in (3, 4)] == [False, True]


def test_babble_is_seen_although_the_answers_are_in_it():
    found = compare(replies(surprising=1.6 + SURPRISE_RISE), replies(surprising=1.5), "")
    assert found.surprise.value == pytest.approx(0.1 + SURPRISE_RISE)
    assert "look like babble to the base" in found.objection()
    assert compare(replies(surprising=1.4 + SURPRISE_RISE), replies(), "").objection() is None


def test_an_example_is_cut_and_never_from_a_recorded_prompt():
    recorded = Reply((99,), "somebody's secret", False, 50.0, None)
    ours = [*replies(right=0, text="x" * 500), recorded]
    said = compare(ours, [*replies(), replace(recorded, surprise=1.0)], "").objection()
    assert "x" * 200 in said
    assert "x" * 201 not in said
    assert "secret" not in said
    assert compare([recorded], [recorded], "").example == ""


def test_letters_of_a_script_that_nobody_used_are_seen():
    greek = replies(text="Το νερό βράζει στους βαθμούς {}")
    found = compare(greek, replies(), "")
    assert found.foreign > 0.7
    assert "of a script that neither the base nor any recorded turn uses" in found.objection()
    assert compare(greek, replies(), "Απάντησε στα ελληνικά, please.").objection() is None
    assert compare(replies(text="In that case it is {} ≈ λ"), replies(), "").objection() is None


@pytest.mark.parametrize(
    ("letter", "expected"),
    [("é", "LATIN"), ("я", "CYRILLIC"), ("京", "CJK"), ("ト", "CJK"), ("한", "CJK")],
)
def test_a_letters_script_is_that_of_its_name(letter, expected):
    assert script(letter) == expected


def test_a_few_surprising_tokens_are_style_and_many_are_babble():
    assert surprise([-12.0, -9.0, -9.0, *[-0.5] * 10]) == 0.5
    assert surprise([-12.0, -9.0, -9.0, *[-5.0] * 10]) == 5.0
    assert surprise([-4.0, -0.7]) == 0.0  # "Paris."
    assert surprise([-9.0, -9.0, -9.0, *[-4.0] * 4]) == 2.0  # 16 / 8


def test_a_measure_that_is_not_a_number_is_no_pass():
    ours = [replace(reply, surprise=math.nan) for reply in replies()]
    assert compare(ours, replies(), "").objection() is not None


@pytest.mark.parametrize(
    ("question", "reply", "right"),
    [
        (8, "Water is H₂O.", True),
        (8, "H2O2 is not water", False),
        (10, "A week has 7 days", True),
        (10, "A week has 17 days", False),
        (0, "PARIS!", True),
        (0, "Parisian food", False),
    ],
)
def test_a_right_reply_has_an_answer_as_a_whole_word(question, reply, right):
    assert QUESTIONS[question].is_right(reply) is right
