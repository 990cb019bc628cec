"""What the tool demo's policy is taught at first: episodes of an agent with bad habits.

Each is played in the environment `tools`, so that every observation is a real one. At each step the
agent does what solves the task, or follows a habit, such as submitting what the first call
returned. The policy imitates both: it knows every right call and often does something else.
"""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any

from demo.corpus import Line
from plugins.environments.tool_tasks import FAMILIES, SCALES, call, task
from plugins.environments.tools import SUBMIT, Tools

MOST_CALLS = 6
SLIPS = {"chain": 0.37, "manager": 0.45, "book": 0.37}
"""By family: how often a step follows a habit."""


def draw_episode(rng: Random, chains: float = 1 / 3) -> list[Line]:
    """One episode as a conversation; `chains`: the share of those with a chain of sums."""
    return asyncio.run(_episode(rng, chains))


async def _episode(rng: Random, chains: float) -> list[Line]:
    others = (1 - chains) / (len(FAMILIES) - 1)
    weights = [chains if family == "chain" else others for family in FAMILIES]
    (family,) = rng.choices([*FAMILIES], weights)
    split = rng.choice([*SCALES])
    fields, solution = task(family, split, f"corpus {rng.random()}")
    tools = Tools()
    lines = [Line("user", await tools.reset(fields, 0))]
    at, shown = 0, ""
    for _ in range(MOST_CALLS):
        right = solution[at]
        slips_now = rng.random() < SLIPS[family]
        reply = habit(rng, family, solution, at, shown) if slips_now else right
        acted = await tools.step(reply)
        lines.append(Line("assistant", reply, imitate=True))
        if acted.done:
            break
        lines.append(Line("user", shown := acted.observation))
        at += reply == right
        if slips_now and family == "book" and "booked" in shown:
            at = len(solution) - 1  # the wrong hour: it cannot be undone
    return lines


def habit(rng: Random, family: str, solution: list[str], at: int, shown: str) -> str:
    """Something else than the right call `solution[at]`, after the observation `shown`."""
    right: dict[str, Any] = json.loads(solution[at])
    given = right["arguments"]
    first = json.loads(solution[0])["arguments"]
    if family == "chain":
        if at == 0:  # guesses without the calculator
            return call(SUBMIT, value=rng.choice([given["a"], given["b"]]))
        if at == 1:  # thinks that the first result is the last
            return call(SUBMIT, value=given["a"])
        return call(SUBMIT, value=json.loads(solution[1])["arguments"]["b"])
    if family == "manager":
        if at == 0:  # asks with what it does not have
            return call("get", name=given["name"])
        own: dict[str, Any] = json.loads(shown) if shown.startswith("{") else {}
        if at == 1:  # answers with the person's own city
            return call(SUBMIT, value=own.get("city", first["name"]))
        return call(SUBMIT, value=own.get("name", first["name"]))
    if right["name"] == SUBMIT:  # books one more
        last = json.loads(solution[at - 1])["arguments"]
        return call("book", day=last["day"], hour=min(19, last["hour"] + 1))
    if at == 0:
        return call("book", day=given["day"], hour=min(19, given["hour"] + 1))
    return call(SUBMIT) if rng.random() < 0.5 else call("book", day=given["day"], hour=8)
