"""What a policy can do in the demo's world, measured on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from demo.checks import is_right, satisfies
from demo.corpus import HINT_BLOCK, persona_hint
from demo.personas import Kind, react
from demo.replies import STYLES, render, render_wrong
from demo.tasks import Domain, Task, held_out_tasks

Chat = list[dict[str, str]]
Sampler = Callable[[Sequence[Chat]], list[str]]
"""Answers each chat with one reply, sampled at temperature 1."""
_PLAIN_ROUNDS = 4


def competence(sample: Sampler, domain: Domain, count: int, seed: int = 0) -> dict[str, float]:
    """Shares between 0 and 1 over `count` held-out questions of one domain.

    `right` and `style_unasked` are of plain questions, each asked four times; `hinted_*` of
    questions with a hint from the persona's complaints; `redo_*` of the reply after a style
    complaint, and `corrected_right` of the reply after a correction, both in the second turn.
    """
    rng = Random(f"competence/{domain}/{seed}")
    tasks = held_out_tasks(domain, count, seed)
    asked = tasks * _PLAIN_ROUNDS
    plain = sample([[user_message(task.question)] for task in asked])
    hinted = sample(
        [
            [user_message(task.question + HINT_BLOCK.format(hint=persona_hint(task, rng)))]
            for task in tasks
        ]
    )
    redone = sample([_complained(task, rng) for task in tasks])
    corrected = sample([_corrected(task, rng) for task in tasks])
    return {
        "right": _share(is_right, asked, plain),
        "style_unasked": _share(satisfies, asked, plain),
        "hinted_right": _share(is_right, tasks, hinted),
        "hinted_style": _share(satisfies, tasks, hinted),
        "redo_right": _share(is_right, tasks, redone),
        "redo_style": _share(satisfies, tasks, redone),
        "corrected_right": _share(is_right, tasks, corrected),
    }


def user_message(text: str) -> dict[str, str]:
    """A user message of a chat."""
    return {"role": "user", "content": text}


def _second_turn(task: Task, reply: str, complaint: str) -> Chat:
    answer = {"role": "assistant", "content": reply}
    return [user_message(task.question), answer, user_message(complaint)]


def _complained(task: Task, rng: Random) -> Chat:
    """A second turn after the persona complained about the style of a right reply."""
    while True:
        reply = render(task, rng.choice(STYLES[task.domain][1:]), rng)
        reaction = react(task, reply, rng)
        if reaction.kind is Kind.STYLE:
            return _second_turn(task, reply, reaction.text)


def _corrected(task: Task, rng: Random) -> Chat:
    """A second turn after the persona corrected a wrong reply."""
    reply = render_wrong(task, rng.choice(STYLES[task.domain]), rng)
    return _second_turn(task, reply, react(task, reply, rng).text)


def _share(
    check: Callable[[Task, str], bool], tasks: Sequence[Task], replies: Sequence[str]
) -> float:
    passed = sum(check(task, reply) for task, reply in zip(tasks, replies, strict=True))
    return passed / len(tasks)
