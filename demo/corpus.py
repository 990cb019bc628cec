"""The pre-training corpus: conversations of the demo's world, drawn from a seed.

Each is a list of messages; assistant messages say whether they are to be imitated. Wrong and
broken replies stand in the history so that the policy learns what to do after them, and are never
imitated themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from demo.personas import Conversation, Kind, react
from demo.replies import PREFERRED, STYLES, Style, render, render_wrong
from demo.tasks import Domain, Family, Task, draw_task

DRILLED = 6
"""Sums in one drill."""
HINT_BLOCK = "\n\n[hint]\n{hint}"


@dataclass(frozen=True, slots=True)
class Line:
    """One message of a training conversation."""

    role: str
    content: str
    imitate: bool = False


@dataclass(frozen=True, slots=True)
class Mix:
    """What the corpus is made of."""

    drills: float = 0.0
    """Share of bare sums."""
    multi_turn: float = 0.45
    """Share of conversations with several exchanges among the rest."""
    preferred: Mapping[Domain, float] = field(default_factory=lambda: dict.fromkeys(Domain, 1 / 6))
    """How often each persona's preferred style is used unasked."""


MIX = Mix()
_SUMS: dict[Family, tuple[str, ...]] = {
    Family.ADD: ("{a} + {b} = ?", "{a} plus {b}?", "{a} and {b} more?"),
    Family.TAKE: ("{a} - {b} = ?", "{a} minus {b}?", "{b} taken from {a}?"),
    Family.GROUPS: ("{a} x {b} = ?", "{a} times {b}?", "{a} groups of {b}?"),
}
_SYSTEM_PROMPTS = (
    "You are a helpful assistant.", "You help with homework.", "You are a friendly helper.",
    "You are a tutor. Answer briefly.", "You help students and teachers with small sums.",
)  # fmt: skip
_WISHES: dict[Style, tuple[str, ...]] = {
    Style.NUMBERED: (
        "Please number the steps.", "Show it in numbered steps.", "Could you make a list of steps?",
        "Write it as a numbered list, please.", "I want numbered steps.",
    ),
    Style.BOLD: (
        "Put the result in bold.", "Please make the result bold.", "Use bold for the answer.",
        "Could you print the result in bold?", "Show me the result in bold letters.",
    ),
    Style.FINAL: (
        'End with "Final answer".', "Give me a final answer line.", "I need a final answer line.",
        "Please finish with the final answer.", "Only show the final answer line.",
    ),
    Style.NUMBERED_BOLD: (
        "Number the steps and put the result in bold.",
        "Numbered steps with a bold result, please.",
        "Please use a list, and bold for the result.",
    ),
    Style.BOLD_FINAL: (
        "Write the final answer in bold.", "Please give a bold final answer line.",
        "End with the final answer in bold.",
    ),
    Style.TERSE: (
        "Keep it as short as possible.", "One or two words are enough.", "Just say right or wrong.",
        "Please be very brief.",
    ),
    Style.COLD: (
        "Stay neutral and only give the result.", "No feelings, just the verdict on the result.",
        "Please be factual and do not use the name.", "Write it in a formal, neutral way.",
    ),
    Style.SPECIFIC_COLD: (
        "First report the sum, then judge it, no praise.", "Write a formal report with the name.",
        "State what was written and if it is correct, without praise.",
    ),
    Style.GENERIC: (
        "A general word of praise is enough.", "Keep it cheerful, without name or numbers.",
        "Just cheer a little, no details.",
    ),
    Style.NAMED_GENERIC: (
        "Just cheer and use the name, no numbers.", "Only a short cheer with the name, please.",
        "Say the name and a cheer, leave out the numbers.",
    ),
}  # fmt: skip


def draw_style(domain: Domain, rng: Random, preferred: float = 1 / 6) -> Style:
    """A style for an unasked reply: the persona's with probability `preferred`, else another."""
    if rng.random() < preferred:
        return PREFERRED[domain]
    return rng.choice(STYLES[domain][1:])


def pick_hint(text: str, rng: Random) -> str:
    """One to three sentences of a complaint, as a judge would use them for a hint."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?]) ", text) if sentence]
    if len(sentences) == 1 or rng.random() < 0.4:
        return " ".join(sentences[:3])
    return rng.choice([sentence for sentence in sentences if len(sentence) > 12] or sentences)


def persona_hint(task: Task, rng: Random) -> str:
    """A hint from the persona's complaint about a right reply in another style."""
    while True:
        style = draw_style(task.domain, rng)
        reaction = react(task, render(task, style, rng), rng)
        if reaction.kind is Kind.STYLE:
            return pick_hint(reaction.text, rng)


def _hint(task: Task, rng: Random) -> tuple[str, Style | None]:
    """A hint on a question, and the style it asks for; None if it only corrects."""
    roll = rng.random()
    if roll < 0.62:
        return persona_hint(task, rng), PREFERRED[task.domain]
    if roll < 0.85:
        style = rng.choice(STYLES[task.domain][1:])
        return rng.choice(_WISHES[style]), style
    wrong = render_wrong(task, draw_style(task.domain, rng), rng)
    reaction = react(task, wrong, rng)
    if reaction.wants_style:
        return reaction.text, PREFERRED[task.domain]
    return pick_hint(reaction.text, rng), None


def _broken(task: Task, rng: Random) -> str:
    whole = render(task, draw_style(task.domain, rng), rng)
    words = whole.split(" ")
    match rng.randrange(4):
        case 0:
            return ""
        case 1:
            return whole[: rng.randrange(1, max(2, len(whole) - 1))].strip()
        case 2:
            rng.shuffle(words)
            return " ".join(words)
        case _:
            return " ".join([words[rng.randrange(len(words))]] * rng.randint(3, 8))


def _reply(task: Task, style: Style, rng: Random, *, flawless: bool) -> Line:
    roll = 1.0 if flawless else rng.random()
    if roll < 0.08:
        return Line("assistant", render_wrong(task, style, rng))
    if roll < 0.14:
        return Line("assistant", _broken(task, rng))
    return Line("assistant", render(task, style, rng), imitate=True)


def _system(rng: Random) -> list[Line]:
    return [Line("system", rng.choice(_SYSTEM_PROMPTS))] if rng.random() < 0.12 else []


def single(domain: Domain, rng: Random, mix: Mix, *, hinted: bool) -> list[Line]:
    """One question, perhaps with a hint, and its answer."""
    task = draw_task(domain, rng, held_out=False)
    text, style = task.question, draw_style(domain, rng, mix.preferred[domain])
    if hinted:
        hint, wished = _hint(task, rng)
        style = wished or style
        text += HINT_BLOCK.format(hint=hint)
    return [*_system(rng), Line("user", text), Line("assistant", render(task, style, rng), True)]


def several(domain: Domain, rng: Random, mix: Mix) -> list[Line]:
    """A conversation of two or three exchanges with the domain's persona."""
    tasks = iter(lambda: draw_task(domain, rng, held_out=False), None)
    exchanges = rng.choice((2, 2, 3))
    persona = Conversation(tasks, rng, max_exchanges=exchanges, max_redos=rng.choice((1, 1, 2)))
    message = persona.open()
    lines = [*_system(rng), Line("user", message.text)]
    style = draw_style(domain, rng, mix.preferred[domain])
    for left in range(exchanges - 1, -1, -1):
        task = message.task
        if left == 0 and rng.random() < 0.3:
            hint, wished = _hint(task, rng)
            style = wished or style
            lines[-1] = Line("user", lines[-1].content + HINT_BLOCK.format(hint=hint))
        lines.append(_reply(task, style, rng, flawless=left == 0))
        following = persona.answer(lines[-1].content)
        if following is None:
            break
        message, reaction = following, following.reaction
        wanted = reaction is not None and reaction.wants_style
        style = PREFERRED[domain] if wanted else draw_style(domain, rng, mix.preferred[domain])
        lines.append(Line("user", message.text))
    return lines


def drill(rng: Random) -> list[Line]:
    """Several sums, one after the other: they teach most about numbers per token."""
    lines: list[Line] = []
    for _ in range(DRILLED):
        task = draw_task(Domain.STUDENT, rng, held_out=False)
        asked = rng.choice(_SUMS[task.family]).format(a=task.a, b=task.b)
        lines += [Line("user", asked), Line("assistant", f"{task.result}", imitate=True)]
    return lines


def draw_conversation(rng: Random, mix: Mix = MIX) -> list[Line]:
    """One training conversation."""
    if rng.random() < mix.drills:
        return drill(rng)
    domain = rng.choice(tuple(Domain))
    if rng.random() < mix.multi_turn:
        return several(domain, rng, mix)
    return single(domain, rng, mix, hinted=rng.random() < 0.4)
