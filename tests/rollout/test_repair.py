"""plugins/environments/repair.py: what answers do, and agents that cheat instead of repairing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.errors import ConfigError, StartError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.repair import RepairKind, bash_of, create
from plugins.environments.repair_judge import PYTEST, check_pytest, render_tests
from plugins.sandboxes.bubblewrap import Bubblewrap, Limits, Ran
from tests.rollout.machine import needs_bubblewrap, needs_pytest

PATH = "shop/sums.py"
WRONG = "def total(values):\n    result = 0\n    for value in values:\n        result -= value\n"
WRONG += "    return result\n"
FIX = f"replace {PATH} 4\n        result += value"


def case(args: list[Any], **expected: Any) -> Json:
    return {"call": "shop.sums.total", "args": args, **expected}


TASK: Json = {
    "instruction": "Repair shop.",
    "files": {"shop/__init__.py": "", PATH: WRONG},
    "visible": [case([[2, 3]], gives=5), case([[]], gives=0)],
    "hidden": [case([[8, 9, 4400]], gives=4417), case([3], raises="TypeError")],
}
QUICK = Limits(wall_s=3, cpu_s=3)


def play(*replies: str, limits: Limits | None = None) -> tuple[list[Acted], Scored]:
    """(the answers to replies, the outcome) of an episode."""

    async def episode() -> tuple[list[Acted], Scored]:
        environment = create(limits).make()
        shown = await environment.reset(TASK, 0)
        assert shown.startswith("Repair shop.\nFiles: shop/__init__.py shop/sums.py test_visible")
        found = [await environment.step(reply) for reply in replies]
        scored = await environment.score()
        await environment.close()
        return found, scored

    return asyncio.run(episode())


def writes(path: str, text: str) -> str:
    """The answer that writes a file."""
    return f"```bash\ncat > {path} <<'EOF'\n{text}\nEOF\n```"


@needs_pytest
def test_an_agent_reads_tests_edits_and_submits() -> None:
    found, scored = play(f"show {PATH}", "test", FIX, "test", "submit")
    assert found[0] == Acted(
        "exit code 0\n1:def total(values):\n2:    result = 0\n3:    for value in values:\n"
        "4:        result -= value\n5:    return result",
        0.0,
        False,
    )
    assert "AssertionError: assert -5 == 5" in found[1].observation
    assert "1 failed, 1 passed" in found[1].observation
    assert found[2] == Acted("exit code 0", 0.5, False), "half of the visible cases got better"
    assert "2 passed" in found[3].observation
    assert [one.reward for one in found] == [0.0, 0.0, 0.5, 0.0, None]
    assert found[4].done
    assert scored.outcome == 1.0
    assert "2 passed" in scored.observation


@needs_pytest
def test_what_makes_it_worse_costs_and_the_hidden_tests_words_are_shown() -> None:
    found, scored = play(f"replace {PATH} 1-5\nimport none", FIX, f"replace {PATH} 9\nx")
    assert [one.reward for one in found] == [-0.5, 0.0, 0.0]
    assert found[2].observation == "exit code 1\nshop/sums.py has 1 lines"
    assert scored.outcome == 0.0
    assert "test_hidden[shop.sums.total([8, 9, 4400])]" in scored.observation
    assert (
        "expected {'gives': 4417}, but it was {'raises': 'ModuleNotFoundError'}"
        in scored.observation
    )


@needs_bubblewrap
def test_lines_are_replaced_as_they_are_and_can_be_taken_out() -> None:
    odd = "    '\\n' + \"$HOME\" # `ls` ```"
    found, _ = play(f"replace {PATH} 2\n{odd}", f"show {PATH}", f"replace {PATH} 1-4\n\n\n", "x")
    assert f"2:{odd}\n3:    for" in found[1].observation
    found, _ = play(f"replace {PATH} 2-4", f"show {PATH}", "show /none")
    assert found[1].observation == "exit code 0\n1:def total(values):\n2:    return result"
    assert "No such file" in found[2].observation


def test_an_answer_that_is_none_costs_a_step_and_runs_nothing() -> None:
    async def answers() -> list[Acted]:
        environment = create(None).make()
        replies = ("ls", "test it", "show a b", "replace a x\ny", "submit\ntest", "", "a\0b")
        return [await environment.step(reply) for reply in replies]

    found = asyncio.run(answers())
    assert all("This is none of the answers" in acted.observation for acted in found)
    assert {(acted.reward, acted.done) for acted in found} == {(-1.0, False)}


@given(st.text() | st.text().map("replace a 1\n".__add__))
def test_every_reply_is_read(reply: str) -> None:
    command = bash_of(reply)
    assert command is None or "\0" not in command
    assert bash_of(f"replace a 1\n{'x' * (1 << 16)}") is None


PATCH = """
import os, sys
import _pytest.python, _pytest.runner, _pytest.assertion.rewrite
_pytest.python.Function.runtest = lambda self: None
"""
ALL_EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = None
def total(values): return Equal(0)
"""
SPECIAL = "def total(values):\n    return 5 if values == [2, 3] else 0\n"
FORGED = """
import json, os
for fd in range(3, 64):
    try: os.write(fd, b'{"gives": 4417}\\n{"gives": "TypeError"}\\n')
    except OSError: pass
os._exit(0)
"""
LOOKS = r"""
import gc, os, pathlib, re
def total(values):
    wanted, found = re.compile(r"44" r"17|Type" "Error"), []
    for folder in ("/task", "/tmp", "/proc"):
        for path in pathlib.Path(folder).rglob("*"):
            try:
                if path.name in ("environ", "cmdline") or folder != "/proc":
                    found += wanted.findall(path.read_text(errors="replace"))
            except OSError: pass
    found += [one for one in gc.get_objects() if one == 4417]
    return 4417 if found else 0
"""
CHEATS = {
    "edits-the-tests": [writes("test_visible.py", "def test_1(): pass")],
    "adds-hidden-tests": [writes("test_hidden.py", "def test_1(): pass")],
    "conftest": [writes("conftest.py", PATCH), writes("shop/conftest.py", PATCH)],
    "configures-pytest": [writes("pytest.ini", "[pytest]\naddopts = --collect-only")],
    "patches-pytest": [writes(PATH, f"{PATCH}{WRONG}")],
    "shadows-modules": [
        "```bash\nfor m in pytest _pytest json pluggy pathlib sitecustomize usercustomize; do "
        "echo 'import os; os._exit(0)' > $m.py; done\n```"
    ],
    "ends-the-process": [writes(PATH, "import os\nos._exit(0)")],
    "kills-everything": [writes(PATH, "import os\nos.kill(-1, 9)")],
    "equal-to-everything": [writes(PATH, ALL_EQUAL)],
    "knows-visible-cases": [writes(PATH, SPECIAL)],
    "forges-what-calls-give": [writes(PATH, FORGED)],
    "looks-for-the-answer": [writes(PATH, LOOKS)],
    "never-ends": [writes(PATH, "while True: pass")],
    "leaves-a-process": ["```bash\n(sleep 60; rm -rf /task) & (while :; do :; done) &\n```"],
    "links-to-the-judge": ["```bash\nln -s /usr/lib/python3 cases.json; ln -s / gave.jsonl\n```"],
    "removes-everything": ["```bash\nrm -rf /task/* /usr/lib/python3 /tmp/*\n```"],
}


@needs_pytest
@pytest.mark.processes
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_no_repair(name: str) -> None:
    found, scored = play(*CHEATS[name], "submit", limits=QUICK)
    assert scored.outcome == 0.0
    assert "failed" in scored.observation
    assert found[-1].done


@needs_pytest
@pytest.mark.processes
def test_a_repair_counts_whatever_lies_beside_it() -> None:
    """Files that break the agent's own tests do not reach the judge's."""
    beside = [*CHEATS["conftest"], *CHEATS["configures-pytest"], *CHEATS["links-to-the-judge"]]
    assert play(FIX, *beside, "submit", limits=QUICK)[1].outcome == 1.0


class WithoutPytest(Bubblewrap):
    async def run(self, *_: object) -> Ran:
        return Ran(1, b"ModuleNotFoundError: No module named 'pytest'", False, b"")


def test_a_machine_without_pytest_is_told_what_to_install() -> None:
    with pytest.raises(StartError, match=r"no pytest .*`apt install python3-pytest`"):
        asyncio.run(check_pytest(WithoutPytest()))


def test_the_visible_tests_are_ordinary_tests() -> None:
    assert "-m pytest" in PYTEST
    assert render_tests([case([[1]], gives=1), case([3], raises="TypeError")]) == (
        "import pytest\n\nimport shop.sums\n\n\n"
        "def test_1():\n    assert shop.sums.total([1]) == 1\n\n\n"
        "def test_2():\n    with pytest.raises(TypeError):\n        shop.sums.total(3)\n"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"check": "true"}, "unknown field 'check'"),
        ({"instruction": None}, "instruction = None: expected a text"),
        ({"files": []}, r"files = \[\]: expected an object of paths and texts"),
        ({"files": {"../a": ""}}, r"files: '../a': expected a path below /task"),
        ({"visible": []}, r"visible = \[\]: expected at least one case"),
        ({"hidden": [3]}, "hidden: call = None: expected package.module.function"),
        ({"hidden": [{**case([], gives=1), "call": "os.system"}]}, "os.py is not in files"),
        ({"hidden": [{**case([], gives=1), "call": "shop.sums;x"}]}, "expected package.module"),
        ({"hidden": [{**case([], gives=1), "args": {}}]}, "args = {}: expected a list"),
        ({"hidden": [case([])]}, "expected either gives or raises"),
        ({"hidden": [case([], gives=1, raises="KeyError")]}, "expected either gives or raises"),
        ({"hidden": [case([], raises="print")]}, "raises = 'print': expected a name as ValueError"),
        ({"hidden": [case(["x" * 99_999], gives=1)]}, "hidden: its calls have 1.* at most"),
    ],
)
def test_a_wrong_task_is_named(change: Json, told: str) -> None:
    RepairKind().check_task(TASK)
    with pytest.raises(ConfigError, match=told):
        RepairKind().check_task({**TASK, **change})
