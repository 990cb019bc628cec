"""What the policy of `terminal` is taught at first: episodes of an agent with bad habits.

At each step the agent runs what solves the task, or follows a habit, such as printing the answer
where it has to be written to a file. The observations are written here and not run, since a sandbox
takes longer than a step of training; a test compares them with those of a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from demo.corpus import Line
from nextstate.records import Json
from plugins.environments.terminal import SUBMIT, opening
from plugins.environments.terminal_tasks import FAMILIES, SCALES, task

MOST_CALLS = 6
SLIPS = {"find": 0.65, "add-up": 0.4, "rename": 0.75, "count-errors": 0.6, "make-executable": 0.75}
"""By family: how often a step follows a habit."""
_ENDS = 0.85
"""How often the agent submits after a habit that looks like an end."""
_DRILLED = 3
WORDS = {word for scale in SCALES.values() for word in scale.words}
"""What has to be copied; it counts more in the loss."""
_DONE = "exit code 0"
_BY_NAME = (
    "awk -F, -v c={} 'NR == 1 {{ for (i = 1; i <= NF; i++) if ($i == c) k = i }} "
    "NR > 1 {{ n += $k }} END {{ print n }}' table.csv > answer.txt"
)
"""Adds up a column whose place is not known."""


@dataclass(frozen=True, slots=True)
class Act:
    """A command, and what the environment shows after it."""

    command: str
    shown: str = _DONE
    looks_done: bool = True


def draw_episode(rng: Random) -> list[Line]:
    """One episode as a conversation."""
    family, split = rng.choice([*FAMILIES]), rng.choice([*SCALES])
    fields, solution = task(family, split, f"corpus {rng.random()}")
    return list(_episode(rng, family, fields, solution))


def draw_drill(rng: Random) -> list[Line]:
    """Some tasks with what solves them at once: they teach most about copying words per token."""
    lines: list[Line] = []
    for _ in range(_DRILLED):
        family, split = rng.choice([*FAMILIES]), rng.choice([*SCALES])
        fields, solution = task(family, split, f"corpus {rng.random()}")
        right, _ = acts(family, fields, solution)
        command = block(right[-1].command)
        lines += [Line("user", fields["instruction"]), Line("assistant", command, imitate=True)]
    return lines


def acts(family: str, fields: Json, solution: str) -> tuple[Sequence[Act], Sequence[Sequence[Act]]]:
    """(what solves a task, step by step; the habits at each of these steps)."""
    last = Act(solution)
    match family:
        case "find":
            printed = solution.partition(" > ")[0]
            word = printed.split()[2]
            found = [path for path, text in fields["files"].items() if f" {word}\n" in text]
            shown = "\n".join([_DONE, *(f"./{path}" for path in found)])
            return [last], [[Act(printed, shown), Act("ls > answer.txt")]]
        case "add-up":
            header = fields["files"]["table.csv"].partition("\n")[0]
            look = Act("head -n 1 table.csv", f"{_DONE}\n{header}", looks_done=False)
            name = fields["instruction"].split()[4]
            first = "awk -F, '{ n += $1 } END { print n }' table.csv > answer.txt"
            right = Act(_BY_NAME.format(name))
            return [look, right], [[Act("wc -l table.csv > answer.txt")], [Act(first)]]
        case "rename":
            ending = solution.partition("%txt}")[2].removesuffix("; done")
            all_files = f"find . -type f | while read f; do mv $f ${{f%.*}}.{ending}; done"
            return [last], [[_missing("mv", "*.txt", f" *.{ending}", 1), Act(all_files)]]
        case "count-errors":
            service = fields["instruction"].partition(" of ")[2].partition(" of ")[2]
            name = service.partition("?")[0]
            counts = [Act(f"grep -c {text} service.log > answer.txt") for text in ("ERROR", name)]
            return [last], [counts]
        case _:
            return [last], [[_missing("chmod +x", "*.sh", "", 1), Act("chmod -R +x .")]]


def _missing(command: str, pattern: str, rest: str, code: int) -> Act:
    """A command whose pattern matches no file."""
    verb = {"mv": "stat", "chmod": "access"}[command.split()[0]]
    told = f"{command.split()[0]}: cannot {verb} '{pattern}': No such file or directory"
    return Act(f"{command} {pattern}{rest}", f"exit code {code}\n{told}", looks_done=False)


def _episode(rng: Random, family: str, fields: Json, solution: str) -> Iterator[Line]:
    right, habits = acts(family, fields, solution)
    at, ends = 0, False
    yield Line("user", opening(fields))
    for _ in range(MOST_CALLS):
        if at == len(right) or ends:
            yield Line("assistant", block(SUBMIT), imitate=True)
            return
        slips = rng.random() < SLIPS[family]
        act = rng.choice(habits[at]) if slips else right[at]
        at += not slips
        ends = slips and act.looks_done and rng.random() < _ENDS
        yield Line("assistant", block(act.command), imitate=True)
        yield Line("user", act.shown)


def block(command: str) -> str:
    """A reply with one command."""
    return f"```bash\n{command}\n```"
