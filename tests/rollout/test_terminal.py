"""plugins/environments/terminal.py: what the agent's replies do, and what it sees of outputs."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.errors import RolloutError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json
from plugins.environments.terminal import MOST_SHOWN, TerminalKind, command_of, create, readable
from plugins.sandboxes.bubblewrap import Limits
from tests.rollout.machine import needs_bubblewrap

TASK: Json = {
    "instruction": "Write the number of lines of a.txt to n.txt.",
    "files": {"a.txt": "x\ny\n", "src/b.txt": "z\n"},
    "check": "test $(cat n.txt) = 2",
}
SMALL = Limits(wall_s=1, output_bytes=20_000)


def block(command: str) -> str:
    return f"I try this.\n```bash\n{command}\n```\n"


def play(*replies: str, seed: int = 0, **task: object) -> tuple[list[Acted], Scored]:
    """(the answers to replies, the outcome) of an episode."""

    async def episode() -> tuple[list[Acted], Scored]:
        kind = create(SMALL)
        fields = {**TASK, **task}
        kind.check_task(fields)
        terminal = kind.make()
        assert str(fields["instruction"]) in await terminal.reset(fields, seed)
        found = [await terminal.step(reply) for reply in replies]
        scored = await terminal.score()
        await terminal.close()
        return found, scored

    return asyncio.run(episode())


@needs_bubblewrap
def test_a_solved_task_has_the_outcome_one() -> None:
    found, scored = play(block("ls *"), block("wc -l < a.txt > n.txt"), block("submit"))
    assert found == [
        Acted("exit code 0\na.txt\n\nsrc:\nb.txt", 0.0, False),
        Acted("exit code 0", 0.0, False),
        Acted("Submitted.", None, True),
    ]
    assert scored == Scored(1.0, "check: exit code 0")


@needs_bubblewrap
def test_a_wrong_answer_has_the_outcome_zero_and_the_checks_words() -> None:
    found, scored = play(block("cat none.txt"))
    assert found[0].reward == -1.0
    assert found[0].observation.startswith("exit code 1\ncat: none.txt: No such file")
    assert scored.outcome == 0.0
    assert "cat: n.txt: No such file" in scored.observation


@needs_bubblewrap
def test_setup_makes_files_from_the_seed_and_the_check_has_its_own() -> None:
    more = {"setup": "echo $SEED > a.txt", "check": "diff n.txt hidden/right"}
    hidden = {"check_files": {"hidden/right": "7\n"}}
    found, scored = play(block("cp a.txt n.txt; ls; echo $SEED"), seed=7, **more, **hidden)
    assert found[0].observation == "exit code 0\na.txt\nn.txt\nsrc"
    assert scored.outcome == 1.0
    _, scored = play(block("echo 8 > n.txt; mkdir -p hidden/right/x"), seed=7, **more, **hidden)
    assert scored.outcome == 0.0


@needs_bubblewrap
def test_a_setup_that_fails_is_no_failure_of_the_agent() -> None:
    with pytest.raises(RolloutError, match="setup of the task ended with exit code 3: 'why'"):
        play(setup="echo why; exit 3")


@needs_bubblewrap
def test_commands_that_break_off_are_answered() -> None:
    found, _ = play(
        block("echo kept > n.txt; sleep 9"),
        block("rm n.txt; kill -9 -1"),
        block("cat n.txt; yes"),
    )
    assert found[0].observation == "exit code 124\n(a command is ended after 1 seconds)"
    assert found[1].observation == (
        "exit code 137\n(the command broke the sandbox: /task is as it was before)"
    )
    assert found[2].observation.startswith("exit code 141\nkept\ny\ny\n")
    assert found[2].observation.endswith("\n(cut after 20000 bytes)")
    assert len(found[2].observation) < MOST_SHOWN + 200
    assert [acted.reward for acted in found] == [-1.0, -1.0, -1.0]


def test_a_reply_without_one_block_costs_a_step_and_runs_nothing() -> None:
    async def answers() -> list[Acted]:
        terminal = create(None).make()
        replies = ("ls", block("ls") * 2, "```python\n1\n```", "```bash\nls", block("a\0b"), "")
        return [await terminal.step(reply) for reply in replies]

    found = asyncio.run(answers())
    assert all("Expected exactly one block" in acted.observation for acted in found)
    assert {(acted.reward, acted.done) for acted in found} == {(-1.0, False)}


def test_the_languages_of_a_shell_are_taken() -> None:
    for mark in ("```", "```sh", " ```Bash ", "```shell"):
        assert command_of(f"{mark}\nls\npwd\n```") == "ls\npwd"


def test_an_output_becomes_text_without_control_characters() -> None:
    assert readable(b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07\r\n\t\xff\x00\n") == (
        "red \\x1b]0;title\\x07\n\t\N{REPLACEMENT CHARACTER}\\x00"
    )
    assert readable(b"a\rb") == "a\\x0db"


@given(st.binary(max_size=3 * MOST_SHOWN))
def test_every_output_is_readable(output: bytes) -> None:
    text = readable(output)
    text.encode()
    assert len(text) <= MOST_SHOWN + 100
    assert all(char in "\n\t" or char.isprintable() or ord(char) > 159 for char in text)


def test_what_is_left_out_of_a_long_output_is_said() -> None:
    text = readable(b"a" * 5000 + b"z" * 5000)
    assert text == f"{'a' * 2000}\n[6000 characters are left out]\n{'z' * 2000}"


@given(st.text())
def test_every_reply_is_read(reply: str) -> None:
    command_of(reply)
    assert command_of(block("ls") + reply.replace("`", "")) == "ls"


def test_the_kind_of_the_command_line_has_the_default_limits() -> None:
    assert isinstance(create(None), TerminalKind)
