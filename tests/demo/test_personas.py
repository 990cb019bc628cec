"""The demo's world: what is right, what pleases a persona, and what personas say."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demo.checks import is_right, is_whole, satisfies
from demo.corpus import HINT_BLOCK, draw_conversation, persona_hint
from demo.personas import Conversation, Kind, classify, react
from demo.replies import PREFERRED, STYLES, Style, render, render_wrong
from demo.tasks import Domain, Task, draw_task, held_out_tasks, task_stream

SEEDS = st.integers(0, 2**32)
CASES = st.tuples(st.sampled_from(tuple(Domain)), st.integers(0, 5), SEEDS, st.booleans())


def case(drawn: tuple[Domain, int, int, bool]) -> tuple[Task, Style, str, Random]:
    domain, index, seed, held_out = drawn
    rng = Random(seed)
    task = draw_task(domain, rng, held_out=held_out)
    style = STYLES[domain][index]
    return task, style, render(task, style, rng), rng


@given(CASES)
def test_every_rendered_reply_is_right_and_only_the_preferred_style_satisfies(
    drawn: tuple[Domain, int, int, bool],
) -> None:
    task, style, reply, _ = case(drawn)
    assert is_right(task, reply)
    assert is_whole(task, reply)
    assert satisfies(task, reply) == (style is PREFERRED[task.domain])


@given(CASES, st.integers(1, 9))
def test_a_changed_number_is_never_right(drawn: tuple[Domain, int, int, bool], shift: int) -> None:
    task, _, reply, rng = case(drawn)
    numbers = list(re.finditer(r"\d+", reply))
    if not numbers:
        return
    hit = rng.choice(numbers)
    changed = f"{reply[: hit.start()]}{int(hit[0]) + shift}{reply[hit.end() :]}"
    assert not is_right(task, changed)


@given(CASES)
def test_a_reply_cut_inside_a_word_or_sentence_is_never_right(
    drawn: tuple[Domain, int, int, bool],
) -> None:
    task, _, reply, _ = case(drawn)
    assert not is_right(task, reply[:-1])
    for cut in range(1, len(reply)):
        if not reply[cut - 1].isspace() and is_right(task, reply[:cut]):
            # What is left must itself be whole: the cut fell between two sentences, or before an
            # optional unit after the number ("Final answer: 7" of "Final answer: 7 apples").
            assert reply[cut] in " \n"


def sentences(text: str) -> list[str]:
    return sorted(re.split(r"(?<=[.!?])\s+", " ".join(text.split())))


@given(CASES)
@example((Domain.TEACHER, 4, 109, True))  # "Great work! Keep it up!" the other way round
def test_word_salad_loops_and_echoes_are_never_right(
    drawn: tuple[Domain, int, int, bool],
) -> None:
    task, _, reply, rng = case(drawn)
    words = reply.split()
    shuffled = " ".join(rng.sample(words, len(words)))
    if sentences(shuffled) != sentences(reply):  # two sentences may change places
        assert not is_right(task, shuffled)
    assert not is_right(task, f"{reply} {reply}")
    assert not is_right(task, f"{reply}\n{reply}")
    assert not is_right(task, " ".join([words[0]] * 5))
    hint = persona_hint(task, rng)
    for broken in ("", " ", "\n", hint, f"{hint} {reply}", f"{reply} {hint}", task.question):
        assert not is_right(task, broken)
    assert not is_right(task, reply + HINT_BLOCK.format(hint=hint))


@given(CASES)
def test_the_other_judgement_or_result_is_whole_but_wrong(
    drawn: tuple[Domain, int, int, bool],
) -> None:
    task, style, _, rng = case(drawn)
    wrong = render_wrong(task, style, rng)
    assert not is_right(task, wrong)
    assert classify(task, wrong) is Kind.CORRECTION


@given(CASES)
def test_a_reply_to_another_task_is_not_right(drawn: tuple[Domain, int, int, bool]) -> None:
    task, style, reply, rng = case(drawn)
    other = draw_task(task.domain, rng, held_out=False)
    if {other.name, other.a, other.b} & {task.name, task.a, task.b}:
        return
    if task.name in reply or task.thing in reply.split():
        assert not is_right(other, reply) or style in (Style.TERSE, Style.GENERIC)


def test_a_cold_judgement_needs_the_right_value() -> None:
    task = next(t for t in task_stream(Domain.TEACHER, 1, held_out=False) if not t.pupil_right)
    assert not is_right(task, "The result is wrong.")
    assert is_right(task, f"The result is wrong. The correct result is {task.result}.")
    assert is_right(task, "Wrong.")
    assert not is_right(task, "Correct.")
    assert not is_right(task, f"Good try, {task.name}!")
    assert not is_right(task, "Wrong. Correct.")


def test_lists_count_up_from_one() -> None:
    task = next(task_stream(Domain.STUDENT, 1, held_out=False))
    reply = render(task, Style.NUMBERED, Random(1))
    assert is_right(task, reply)
    assert not is_right(task, reply.replace("2. ", "3. ", 1))
    assert not is_right(task, reply.replace("1. ", "", 1))


@pytest.mark.parametrize("domain", Domain)
def test_the_split_is_deterministic_disjoint_and_about_fifteen_percent(domain: Domain) -> None:
    held = held_out_tasks(domain, 300)
    assert held == held_out_tasks(domain, 300)
    assert len({task.key for task in held}) == 300
    trained = {task.key for task in islice(task_stream(domain, 1, held_out=False), 3000)}
    assert not trained & {task.key for task in held}
    assert all(task.held_out for task in held)


@given(SEEDS)
def test_reactions_fit_the_reply(seed: int) -> None:
    rng = Random(seed)
    for domain in Domain:
        task = draw_task(domain, rng, held_out=False)
        good = render(task, PREFERRED[domain], rng)
        other = render(task, rng.choice(STYLES[domain][1:]), rng)
        assert react(task, good, rng).kind in (Kind.THANKS, Kind.NEUTRAL)
        assert react(task, other, rng).kind in (Kind.STYLE, Kind.NEUTRAL)
        wrong = react(task, render_wrong(task, PREFERRED[domain], rng), rng)
        assert wrong.kind is Kind.CORRECTION
        for broken in ("", "the the the", good[: len(good) // 2]):
            if not is_right(task, broken):
                assert react(task, broken, rng).kind is Kind.BROKEN
        assert "{" not in wrong.text


def test_reactions_are_varied() -> None:
    rng = Random(3)
    seen: dict[tuple[Domain, Kind], set[str]] = {}
    for _ in range(3000):
        for domain in Domain:
            task = draw_task(domain, rng, held_out=False)
            reply = render(task, rng.choice(STYLES[domain]), rng)
            reaction = react(task, reply, rng)
            seen.setdefault((domain, reaction.kind), set()).add(reaction.text)
    for domain in Domain:
        assert len(seen[domain, Kind.STYLE]) > 500
        assert len(seen[domain, Kind.THANKS]) >= 15


def test_a_conversation_thanks_and_asks_the_next_question_in_one_message() -> None:
    rng = Random(5)
    for _ in range(200):
        tasks = task_stream(Domain.STUDENT, rng.randrange(10**6), held_out=False)
        talk = Conversation(tasks, rng)
        message = talk.open()
        following = talk.answer(render(message.task, Style.PLAIN, rng))
        assert following is not None
        assert following.task is not message.task
        assert following.text.endswith(following.task.question)
        assert following.reaction is not None
        assert following.text.startswith(following.reaction.text)


def test_a_conversation_asks_for_at_most_max_redos() -> None:
    rng = Random(6)
    tasks = task_stream(Domain.TEACHER, 6, held_out=False)
    talk = Conversation(tasks, rng, max_exchanges=6, max_redos=1)
    message = talk.open()
    asked = [message]
    while following := talk.answer(""):
        asked.append(following)
    assert [m.task.key for m in asked[:2]] == [message.task.key] * 2
    assert len(asked) == 6
    assert len({id(m.task) for m in asked}) == 3


def test_the_corpus_never_holds_a_held_out_question() -> None:
    rng = Random(9)
    corpus = "\n".join(line.content for _ in range(3000) for line in draw_conversation(rng))
    held = [task for domain in Domain for task in held_out_tasks(domain, 300)]
    assert not [task.question for task in held if task.question in corpus]


def test_conversations_of_the_corpus_imitate_only_right_replies_and_end_with_one() -> None:
    rng = Random(10)
    for _ in range(500):
        lines = draw_conversation(rng)
        assert lines[-1].role == "assistant"
        assert lines[-1].imitate
        roles = [line.role for line in lines if line.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
