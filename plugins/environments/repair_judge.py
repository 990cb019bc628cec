"""Judges a repaired package: its code never runs where the hidden tests are.

A *case* is a call and what it should give, as {"call": "shop.prices.total", "args": [[2, 3]],
"gives": 5}, or with "raises": "ValueError" in the place of "gives". Two sandboxes judge cases:

    1  the agent's files and the calls  ──>  what each call gave, as JSON
    2  these and what is expected       ──>  pytest

In the first, the agent's code may do what it likes to the interpreter: it can only change what the
calls give, and knows nothing of what they should. The second has no file and no code of the agent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from nextstate.errors import StartError
from nextstate.hooks import Scored
from nextstate.records import Json
from plugins.environments.terminal import archive_of, readable
from plugins.sandboxes.bubblewrap import Bubblewrap

PYTEST = "-m pytest -q --tb=short --no-header -p no:cacheprovider"
MOST_CALLS_CHARS = 48 << 10
"""Of the calls of some cases, which are an environment variable."""
_CALLS_S = 10.0
"""For all calls together; those that come after it gave nothing."""

_CALL = r"""
import importlib, json, os, sys
calls = json.loads(os.environ.pop("CALLS"))
told = os.fdopen(os.dup(1), "w")
nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(nowhere, 1), os.dup2(nowhere, 2)
sys.path.insert(0, "/task")
for name, args in calls:
    module, _, function = name.rpartition(".")
    try:
        gave = {"gives": getattr(importlib.import_module(module), function)(*args)}
        line = json.dumps(gave)
    except BaseException as error:
        line = json.dumps({"raises": type(error).__name__})
    print(line, file=told, flush=True)
"""
_HIDDEN = r"""
import json
import pathlib
import pytest

here = pathlib.Path(__file__).parent
cases = json.loads((here / "cases.json").read_text())
lines = (here / "gave.jsonl").read_text().split("\n")
names = [f"{case['call']}({', '.join(map(repr, case['args']))})"[:200] for case in cases]


@pytest.mark.parametrize("number", range(len(cases)), ids=names)
def test_hidden(number):
    expected = {key: cases[number][key] for key in ("gives", "raises") if key in cases[number]}
    gave = json.loads(lines[number]) if number < len(lines) and lines[number] else "nothing"
    if gave != expected:
        pytest.fail(f"expected {expected}, but it was {gave}"[:2000], pytrace=False)
"""


async def check_pytest(sandbox: Bubblewrap) -> None:
    """Raises StartError unless sandboxes have pytest."""
    ran = await sandbox.run("python3 -I -c 'import pytest'", b"")
    if ran.exit_code:
        raise StartError(
            "sandboxes have no pytest for /usr/bin/python3: install it, for example with "
            "`apt install python3-pytest`"
        )


async def judge(sandbox: Bubblewrap, files: bytes, cases: Sequence[Json]) -> Scored:
    """The outcome 1 if all cases hold for the package in `files`, and pytest's words."""
    found = await _call(sandbox, files, cases)
    given = {"test_hidden.py": _HIDDEN, "cases.json": json.dumps(cases), "gave.jsonl": found}
    ran = await sandbox.run(f"python3 -I {PYTEST}", archive_of(given))
    return Scored(float(ran.exit_code == 0), readable(ran.output))


async def count_right(sandbox: Bubblewrap, files: bytes, cases: Sequence[Json]) -> int:
    """How many of the cases hold, without pytest: for the visible ones, after each step."""
    found = (await _call(sandbox, files, cases)).split("\n")
    return sum(_holds(line, case) for line, case in zip(found, cases, strict=False))


def expected_of(case: Json) -> Json:
    """What a call should tell.

    >>> expected_of({"call": "shop.total", "args": [], "gives": 0})
    {'gives': 0}
    """
    return {key: case[key] for key in ("gives", "raises") if key in case}


def calls_of(cases: Sequence[Json]) -> str:
    """The calls of cases as the first sandbox gets them."""
    return json.dumps([[case["call"], case["args"]] for case in cases])


def render_tests(cases: Sequence[Json]) -> str:
    """A test file for people and agents to read, with one test for each case."""
    modules = sorted({case["call"].rpartition(".")[0] for case in cases})
    lines = ["import pytest", "", *(f"import {module}" for module in modules)]
    for number, case in enumerate(cases, 1):
        call = f"{case['call']}({', '.join(map(repr, case['args']))})"
        lines += ["", "", f"def test_{number}():"]
        if "raises" in case:
            lines += [f"    with pytest.raises({case['raises']}):", f"        {call}"]
        else:
            lines += [f"    assert {call} == {case['gives']!r}"]
    return "\n".join(lines) + "\n"


async def _call(sandbox: Bubblewrap, files: bytes, cases: Sequence[Json]) -> str:
    """What the calls gave, a line of JSON for each; it is hostile."""
    quick = replace(sandbox.limits, wall_s=min(_CALLS_S, sandbox.limits.wall_s))
    variables: Mapping[str, str] = {"CALLS": calls_of(cases), "CODE": _CALL}
    ran = await Bubblewrap(quick).run('exec python3 -I -c "$CODE"', files, variables)
    return ran.output.decode(errors="replace")


def _holds(line: str, case: Json) -> bool:
    try:
        found = cast(object, json.loads(line))
    except (ValueError, RecursionError):
        return False
    return found == expected_of(case)
