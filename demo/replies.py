"""The world's replies: every sentence of a right reply, for each task and style.

`units` lists the sentences that are right for a task, with the roles each fills in a reply;
`render` joins some of them into a reply of one style. `demo.checks` parses replies against the
same units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from demo.tasks import Domain, Family, Task


class Style(StrEnum):
    """How a reply is written; the first of each domain is what its persona wants."""

    PLAIN = "plain"
    NUMBERED = "numbered"
    BOLD = "bold"
    FINAL = "final"
    NUMBERED_BOLD = "numbered+bold"
    BOLD_FINAL = "bold+final"
    FRIENDLY = "specific-friendly"
    TERSE = "terse"
    COLD = "cold"
    SPECIFIC_COLD = "specific-cold"
    GENERIC = "generic"
    NAMED_GENERIC = "named-generic"


STYLES: Mapping[Domain, tuple[Style, ...]] = {
    Domain.STUDENT: tuple(Style)[:6],
    Domain.TEACHER: tuple(Style)[6:],
}
PREFERRED: Mapping[Domain, Style] = {domain: STYLES[domain][0] for domain in Domain}


class Role(StrEnum):
    """What a sentence does in a reply; a reply fills each role at most once."""

    HEAD = "head"
    SETUP = "setup"
    WORK = "work"
    RESULT = "result"
    FINAL = "final"
    PRAISE = "praise"
    JUDGE = "judge"
    VALUE = "value"
    NEEDS_VALUE = "needs value"
    """A judgement that is incomplete without the right value."""
    CLOSE = "close"


Units = Mapping[str, frozenset[Role]]

HEADS = ("Steps:", "Here are the steps:")
PRAISES = ("Well done", "Great work", "Lovely work", "Good job")
CONSOLATIONS = ("Good try", "Nice effort", "Good start", "Nice try")
CLOSERS_RIGHT = ("Keep it up!", "I am happy about that!")
CLOSERS_WRONG = ("Keep going!", "You can do it!")


@dataclass(frozen=True, slots=True)
class Clauses:
    """Clauses about one student task, without a full stop; `works` and `did` state the sum."""

    setup: str
    works: tuple[str, ...]
    did: str
    equation: str
    results: tuple[str, ...]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def clauses(task: Task) -> Clauses:
    """What can be said about a student task."""
    n, t, a, b, r = task.name, task.thing, task.a, task.b, task.result
    equation = f"{task.term} = {r}"
    match task.family:
        case Family.ADD:
            return Clauses(
                f"{n} has {a} {t} and gets {b} more",
                (f"{a} and {b} make {r}", f"{a} plus {b} is {r}"),
                f"I added {a} and {b} and got {r}",
                equation,
                (f"{n} has {r} {t} now", f"{n} has {r} {t} in all"),
            )
        case Family.TAKE:
            return Clauses(
                f"{n} has {a} {t} and {b} go away",
                (f"{a} minus {b} is {r}", f"taking {b} from {a} leaves {r}"),
                f"I took {b} from {a} and got {r}",
                equation,
                (f"{n} has {r} {t} left", f"there are {r} {t} left"),
            )
        case Family.GROUPS:
            return Clauses(
                f"{n} gets {a} times {b} {t}",
                (f"{a} times {b} is {r}", f"{a} groups of {b} make {r}"),
                f"I multiplied {a} by {b} and got {r}",
                equation,
                (f"{n} has {r} {t} in all", f"there are {r} {t} in all"),
            )


def _did(task: Task) -> str:
    a, b = task.a, task.b
    match task.family:
        case Family.ADD:
            return f"You added {a} and {b}"
        case Family.TAKE:
            return f"You took {b} from {a}"
        case Family.GROUPS:
            return f"You multiplied {a} by {b}"


def _bold_results(task: Task, c: Clauses) -> tuple[str, ...]:
    r, t = task.result, task.thing
    return (
        f"**{r} {t}**",
        f"The answer is **{r}**.",
        f"The result is **{r} {t}**.",
        f"{task.term} = **{r}**.",
        *(f"**{_capital(result)}.**" for result in c.results),
    )


def _final_lines(task: Task) -> tuple[str, ...]:
    r, t = task.result, task.thing
    return (f"Final answer: {r}", f"Final answer: {r} {t}", f"Answer: {r} {t}")


def _bold_final_lines(task: Task) -> tuple[str, ...]:
    r, t = task.result, task.thing
    return (f"**Final answer:** {r} {t}", f"**Final answer: {r}**", f"**Answer: {r} {t}**")


def _student_units(task: Task) -> dict[str, frozenset[Role]]:
    c = clauses(task)
    found = {head: frozenset({Role.HEAD}) for head in HEADS}
    found[f"{c.setup}."] = frozenset({Role.SETUP})
    for work in (*c.works, c.did, c.equation):
        found[f"{_capital(work)}."] = frozenset({Role.WORK})
    for result in c.results:
        found[f"{_capital(result)}."] = frozenset({Role.RESULT})
        found[f"So {result}."] = frozenset({Role.RESULT})
        found[f"{c.setup}, so {result}."] = frozenset({Role.SETUP, Role.RESULT})
        for work in (*c.works, c.did):
            found[f"{_capital(work)}, so {result}."] = frozenset({Role.WORK, Role.RESULT})
            found[f"{_capital(result)}, because {work}."] = frozenset({Role.WORK, Role.RESULT})
    for bold in _bold_results(task, c):
        found[bold] = frozenset({Role.RESULT})
    for final in (*_final_lines(task), *_bold_final_lines(task)):
        found[final] = frozenset({Role.FINAL})
    return found


def _friendly_bodies(task: Task) -> tuple[str, ...]:
    did, term, c, r = _did(task), task.term, task.claimed, task.result
    if task.pupil_right:
        return (
            f"{did} and got {c}, which is right.",
            f"{did} with care, and {c} is exactly right.",
            f"Your answer {term} = {c} is exactly right.",
        )
    return (
        f"{did} and wrote {c}, but it should be {r}.",
        f"{did}, and that makes {r}, not {c}.",
        f"Look at {term} once more: it makes {r}, not {c}.",
    )


def _terse_judgements(task: Task) -> tuple[str, ...]:
    if task.pupil_right:
        return ("Correct.", "Right.", "Yes, correct.", "That is right.")
    return ("Wrong.", "Not correct.", f"Wrong, it is {task.result}.", f"No, it is {task.result}.")


def _cold_judgements(task: Task) -> tuple[str, ...]:
    word = "correct" if task.pupil_right else "wrong"
    return (f"The result is {word}.", f"The answer {task.claimed} is {word}.")


def _cold_values(task: Task) -> tuple[str, ...]:
    return (f"The correct result is {task.result}.", f"It has to be {task.result}.")


def _cold_reports(task: Task) -> tuple[str, ...]:
    sum_ = f"{task.term} = {task.claimed}"
    return (f"{task.name} wrote {sum_}.", f"The solution of {task.name} is {sum_}.")


def _teacher_units(task: Task) -> dict[str, frozenset[Role]]:
    right = task.pupil_right
    found: dict[str, frozenset[Role]] = {}
    for praise in PRAISES if right else CONSOLATIONS:
        for text in (f"{praise}!", f"{praise}, {task.name}!"):
            found[text] = frozenset({Role.PRAISE})
    for close in CLOSERS_RIGHT if right else CLOSERS_WRONG:
        found[close] = frozenset({Role.CLOSE})
    for report in _cold_reports(task):
        found[report] = frozenset({Role.SETUP})
    for judgement in _terse_judgements(task):
        found[judgement] = frozenset({Role.JUDGE})
    for body in _friendly_bodies(task):
        found[body] = frozenset({Role.SETUP, Role.JUDGE, Role.VALUE})
    if right:
        found["No comment is needed."] = frozenset({Role.CLOSE})
        for judgement in (*_cold_judgements(task), "This is correct."):
            found[judgement] = frozenset({Role.JUDGE})
        return found
    for judgement in (*_cold_judgements(task), "This is wrong."):
        found[judgement] = frozenset({Role.JUDGE, Role.NEEDS_VALUE})
    for value in _cold_values(task):
        found[value] = frozenset({Role.VALUE})
    for judgement in ("It is not right yet.", "Please look at it again."):
        found[judgement] = frozenset({Role.JUDGE})
    return found


def units(task: Task) -> Units:
    """Every sentence that is right for this task, with the roles it fills."""
    return _student_units(task) if task.domain is Domain.STUDENT else _teacher_units(task)


def render(task: Task, style: Style, rng: Random) -> str:
    """A right reply in one style of the task's domain."""
    if task.domain is Domain.STUDENT:
        return _render_student(task, style, rng)
    return _render_teacher(task, style, rng)


def render_wrong(task: Task, style: Style, rng: Random) -> str:
    """A whole reply that is wrong: another result, or in the teacher domain the other judgement."""
    if task.domain is Domain.TEACHER:
        claimed = task.result + rng.choice((1, 2)) if task.pupil_right else task.result
        other = replace(task, claimed=claimed)
        return render(other, style, rng)
    other = replace(task, a=task.a + 1)
    return render(other, style, rng)


def _numbered(lines: list[str]) -> str:
    return "\n".join(f"{index}. {line}" for index, line in enumerate(lines, 1))


def _render_student(task: Task, style: Style, rng: Random) -> str:
    c = clauses(task)
    work, result = rng.choice(c.works), rng.choice(c.results)
    setup = f"{c.setup}."
    match style:
        case Style.PLAIN:
            short = f"{_capital(rng.choice((work, c.did)))}, so {result}."
            return rng.choice(
                (
                    short,
                    f"{setup} {short}",
                    f"{_capital(result)}, because {rng.choice((work, c.did))}.",
                    f"{c.setup}, so {result}.",
                    f"{setup} {_capital(work)}. So {result}.",
                )
            )
        case Style.NUMBERED:
            step = rng.choice((f"{c.equation}.", f"{_capital(work)}."))
            head = f"{rng.choice(HEADS)}\n" if rng.random() < 0.3 else ""
            steps = [setup, step] if rng.random() < 0.7 else [step]
            return head + _numbered([*steps, f"{_capital(result)}."])
        case Style.BOLD:
            bold = rng.choice(_bold_results(task, c))
            return f"{_capital(work)}. {bold}" if rng.random() < 0.3 and "=" not in bold else bold
        case Style.FINAL:
            lead = rng.choice(("", f"{c.equation}.\n", f"{_capital(work)}.\n"))
            return lead + rng.choice(_final_lines(task))
        case Style.NUMBERED_BOLD:
            bold = rng.choice(tuple(x for x in _bold_results(task, c) if "=" not in x))
            steps = [setup, f"{c.equation}."] if rng.random() < 0.7 else [f"{c.equation}."]
            return _numbered([*steps, bold])
        case _:
            lead = rng.choice(("", f"{c.equation}.\n", f"{_capital(work)}.\n"))
            return lead + rng.choice(_bold_final_lines(task))


def _render_teacher(task: Task, style: Style, rng: Random) -> str:
    right = task.pupil_right
    praise = rng.choice(PRAISES if right else CONSOLATIONS)
    close = rng.choice(CLOSERS_RIGHT if right else CLOSERS_WRONG)
    match style:
        case Style.FRIENDLY:
            reply = f"{praise}, {task.name}! {rng.choice(_friendly_bodies(task))}"
            return f"{reply} {close}" if rng.random() < 0.4 else reply
        case Style.TERSE:
            return rng.choice(_terse_judgements(task))
        case Style.COLD:
            judgement = rng.choice(_cold_judgements(task))
            if right:
                return judgement + rng.choice(("", " No comment is needed."))
            return f"{judgement} {rng.choice(_cold_values(task))}"
        case Style.SPECIFIC_COLD:
            report = rng.choice(_cold_reports(task))
            if right:
                return f"{report} This is correct."
            return f"{report} This is wrong. {rng.choice(_cold_values(task))}"
        case _:
            whom = f"{praise}!" if style is Style.GENERIC else f"{praise}, {task.name}!"
            if right:
                return whom + rng.choice(("", " That is right.", f" {close}"))
            judgement = rng.choice(("It is not right yet.", "Please look at it again."))
            return f"{whom} {judgement}"
