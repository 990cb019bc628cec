"""rollout/harbor.py: task folders in Harbor's format, played in real sandboxes."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from nextstate.episodes import Split
from nextstate.errors import ConfigError
from nextstate.hooks import Scored
from plugins.environments.terminal import TerminalKind
from rollout.reading import read_source
from rollout.tasks import Task
from tests.rollout.machine import needs_bubblewrap

TOML = '[metadata]\ndifficulty = "easy"\n[verifier]\ntimeout_sec = 60.0\n[environment]\n'
TEST = """\
#!/bin/bash
cmp /app/hello.txt /tests/wanted.txt && echo 1 > /logs/verifier/reward.txt && exit 0
echo {reward} > /logs/verifier/reward.{kind}
"""


def harbor(folder: Path, image: str = "", **test: str) -> Path:
    """A task folder as `harbor tasks init` lays it."""
    texts = {
        "task.toml": TOML + (f'docker_image = "{image}"\n' if image else ""),
        "instruction.md": "Write the words of words/a.txt to /app/hello.txt.\n",
        "environment/Dockerfile": "FROM debian:12\nWORKDIR /app\nCOPY . .\n",
        "environment/words/a.txt": "Hello!\n",
        "tests/test.sh": TEST.format(**{"reward": "0", "kind": "txt", **test}),
        "tests/wanted.txt": "Hello!\n",
        "solution/solve.sh": "cp words/a.txt hello.txt\n",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(source: str) -> list[Task]:
    return read_source(source, "terminal", TerminalKind().check_task)


def play(task: Task, *commands: str) -> tuple[str, list[str], Scored]:
    async def episode() -> tuple[str, list[str], Scored]:
        terminal = TerminalKind().make()
        shown = await terminal.reset(task.fields, 0)
        acted = [await terminal.step(f"```bash\n{command}\n```") for command in commands]
        return shown, [one.observation for one in acted], await terminal.score()

    return asyncio.run(episode())


@needs_bubblewrap
@pytest.mark.processes
def test_a_task_is_solved_by_its_solution_and_by_nothing_else(tmp_path: Path) -> None:
    folder = harbor(tmp_path / "hello")
    (task,) = read(f"{folder}?sandbox=bubblewrap")
    shown, (ran, listed), scored = play(
        task, (folder / "solution/solve.sh").read_text(), "pwd; ls -A; ls /tests /logs"
    )
    assert "You work in a bash shell in the folder /app." in shown
    assert ran == "exit code 0"
    assert listed.split("\n", 1)[1].startswith("/app\nhello.txt\nwords\n") or "No such" in listed
    assert scored.outcome == 1.0
    assert scored.observation == "check: exit code 0\nreward 1"
    assert play(task)[2].outcome == 0.0


@needs_bubblewrap
@pytest.mark.processes
@pytest.mark.parametrize("name", [".tests", "tests", ".check", "a"])
def test_no_file_of_the_agent_takes_part_in_the_tests(tmp_path: Path, name: str) -> None:
    """Neither in their place nor beside them, where pytest would load a conftest.py."""
    folder = harbor(tmp_path / "hello")
    test = "ls -A /tests; ls -A /logs; echo 0 > /logs/verifier/reward.txt"
    (folder / "tests/test.sh").write_text(test)
    (task,) = read(f"{folder}?sandbox=bubblewrap")
    forged = (
        "mkdir e; echo 'echo 1 > /logs/verifier/reward.txt' | tee e/test.sh > e/conftest.py; "
        f"chmod 555 e; ln -s e {name}; ln -s /tests tests2; ln -s /logs logs"
    )
    _, (acted,), scored = play(task, forged)
    assert acted == "exit code 0"
    shown = "check: exit code 1\ntest.sh\nwanted.txt\nverifier\nreward 0"
    assert scored == Scored(0.0, shown)


@needs_bubblewrap
@pytest.mark.processes
@pytest.mark.parametrize(
    ("reward", "kind", "outcome"),
    [
        ("0.99", "txt", 0.0),
        ("1.0", "txt", 1.0),
        ("10", "txt", 0.0),
        ("'{\"reward\": 1.0}'", "json", 1.0),
    ],
)
def test_a_reward_of_one_is_solved(tmp_path: Path, reward: str, kind: str, outcome: float) -> None:
    (task,) = read(f"{harbor(tmp_path, reward=reward, kind=kind)}?sandbox=bubblewrap")
    assert play(task)[2].outcome == outcome


def test_a_folder_of_tasks_is_read_and_the_image_is_the_sandbox(tmp_path: Path) -> None:
    for name in ("b", "a"):
        harbor(tmp_path / name, image=f"localhost/{name}:1")
    (tmp_path / "notes").mkdir()
    tasks = read(str(tmp_path))
    assert [one.id for one in tasks] == ["a", "b"]
    assert {*(one.split for one in tasks)} <= {*Split}
    assert [one.fields["sandbox"] for one in tasks] == [
        "docker:localhost/a:1",
        "docker:localhost/b:1",
    ]
    assert tasks[0].fields["files"] == {"words/a.txt": "Hello!\n"}
    assert sorted(tasks[0].fields["check_files"]) == ["/tests/test.sh", "/tests/wanted.txt"]


def test_a_task_without_an_image_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hello: .*docker build -t .*\?sandbox="):
        read(str(harbor(tmp_path / "hello")))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("task.toml", b"[", "task.toml: "),
        ("task.toml", b"environment = 1", "docker build"),
        ("task.toml", b"[environment]\ndocker_image = 1", "docker_image = 1: expected a name"),
        ("instruction.md", None, "instruction.md: No such file or directory"),
        ("instruction.md", b"\xff", "instruction.md: expected text in UTF-8"),
        ("instruction.md", b" ", "task hello: instruction is missing"),
        ("tests/test.sh", None, "expected tests/test.sh"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, name: str, data: bytes | None, told: str) -> None:
    folder = harbor(tmp_path / "hello", image="" if told == "docker build" else "i")
    file = folder / name
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read(str(folder))
    assert told in str(error.value)


@pytest.mark.parametrize(
    "link", ["environment/x", "environment/d", "tests/x", "instruction.md", "environment", "tests"]
)
def test_a_link_that_leads_out_of_a_task_is_not_followed(tmp_path: Path, link: str) -> None:
    """It may lead to a file of yours, which an agent would see."""
    secrets = tmp_path / "home"
    secrets.mkdir()
    for name in ("key", "test.sh"):
        (secrets / name).write_text("secret")
    folder = harbor(tmp_path / "hello", image="i")
    at = folder / link
    if at.is_dir():
        shutil.rmtree(at)
    at.unlink(missing_ok=True)
    at.symlink_to(secrets if link in ("environment", "tests") else secrets / "key")
    with pytest.raises(ConfigError, match="leads out of the task: put a copy in its place"):
        read(str(folder))


def test_a_link_within_a_task_is_followed(tmp_path: Path) -> None:
    folder = harbor(tmp_path / "hello", image="i")
    (folder / "environment/b.txt").symlink_to("words/a.txt")
    (folder / "environment/more").symlink_to(tmp_path)  # no folder is entered by a link
    (task,) = read(str(folder))
    assert task.fields["files"] == {"b.txt": "Hello!\n", "words/a.txt": "Hello!\n"}


def test_a_folder_without_tasks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a task\.toml in it or in its folders"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"work": "/usr/x"}, "'/usr/x': expected one as /app"),
        ({"work": "app"}, "'app': expected one as /app"),
        ({"check_folders": ["/tests", "/a/../b"]}, "'/a/../b': expected one as /app"),
        ({"check_folders": "/tests"}, "expected a list of folders"),
        ({"check_folders": ["/tests"], "check_files": {"/testsa": ""}}, "'/testsa': expected a"),
        ({"check_folders": ["/tests"], "check_files": {"/tests/../a": ""}}, "'/tests/../a': exp"),
        ({"check_folders": ["/tests"], "files": {"/tests/a": ""}}, "'/tests/a': expected a path"),
    ],
)
def test_a_folder_of_the_system_is_no_place_for_work(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        TerminalKind().check_task({"instruction": "go", "check": "true", **fields})
    assert told in str(error.value)
