"""The documents on environments: their tasks can be solved, and they are played as they say.

NEXTSTATE_TEST_VERIFIERS names an environment with the packages verifiers and uv, for its recipe.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextstate.app.cli import command_parser
from nextstate.store import Store
from plugins.environments.reward_file import read_reward
from plugins.environments.terminal import TerminalKind
from rollout.tasks import read_tasks
from tests.proxy.running_proxy import Running, both
from tests.rollout.machine import every_episode, needs_bubblewrap
from tests.rollout.test_command import ROOT, configured
from tests.rollout.test_openenv import served, tools
from tests.rollout.test_terminal import play
from tests.scripted_engine import Script, ScriptedEngine

TEXT = "".join(
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("environments.md", "other-harnesses.md")
)
RAY = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
BLOCKS: list[str] = re.findall(r"```sh\n(.*?)```", TEXT + RAY, re.DOTALL)
VERIFIERS = os.environ.get("NEXTSTATE_TEST_VERIFIERS", "")
needs_verifiers = pytest.mark.skipif(not VERIFIERS, reason="needs NEXTSTATE_TEST_VERIFIERS=/opt/…")
MODULES: dict[str, str] = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", TEXT, re.DOTALL))
TASKS: dict[str, dict[str, Any]] = {
    task["id"]: task for task in map(json.loads, re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
}


def played(
    store: Store, tmp_path: Path, environment: str, task: dict[str, Any] | str, *replies: str
) -> list[str]:
    """The lines of `nextstate rollout` in a folder with the document's modules."""
    for name, code in MODULES.items():
        (tmp_path / name).write_text(code)
    file = tmp_path / "own.jsonl"
    if not isinstance(task, str):
        file.write_text(json.dumps({**task, "split": "eval"}))
    lines: list[str] = []

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += [Script((reply,)) for reply in replies]
        config = configured(tmp_path, int(p.url.rpartition(":")[2]))
        source = task if isinstance(task, str) else str(file)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "nextstate", "rollout", environment, "--eval"),
            *("--config", str(config), "--tasks", source),
            stdout=asyncio.subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        )
        out, _ = await process.communicate()
        lines.extend(line.split("  ", 1)[-1] for line in out.decode().splitlines())

    both(test, store, tmp_path)
    return lines


@pytest.mark.processes
@pytest.mark.parametrize(
    ("environment", "name", "replies"),
    [
        ("guesses:create", "n-1", ["4", "7"]),
        ("gym", "w-1", ["bush", "tree"]),
        ("command", "a-1", ["7"]),
        pytest.param("command", "v-1", ["It is 7."], marks=needs_verifiers),
    ],
)
def test_an_environment_of_the_document_is_played(
    store: Store, tmp_path: Path, environment: str, name: str, replies: list[str]
) -> None:
    task = dict(TASKS[name])
    if environment == "command":
        task["command"] = task["command"].replace("/path/to", shlex.quote(str(tmp_path)))
        if name == "v-1":
            task["command"] = task["command"].replace("/opt/verifiers", VERIFIERS)
            names = [key for key in os.environ if key.startswith(("UV_", "SSL_"))]
            task["variables"] = {key: os.environ[key] for key in names}
        else:
            task["command"] = task["command"].replace("python", shlex.quote(sys.executable), 1)
    lines = played(store, tmp_path, environment, task, *replies)
    assert lines[0] == f"{name}  done  outcome 1  {len(replies)} calls"
    (episode,) = every_episode(store)
    assert (episode.environment, episode.outcome) == (environment.partition(":")[0], 1.0)


@pytest.mark.processes
def test_a_server_of_openenv_is_played_with_its_tasks(store: Store, tmp_path: Path) -> None:
    async def test() -> list[str]:
        async with served(tools(2).app) as url:
            source = f"{url}?action=text&show=text"
            call = '{"name": "submit", "arguments": {"value": 0}}'
            return await asyncio.to_thread(played, store, tmp_path, "openenv", source, call, call)

    lines = asyncio.run(test())
    assert sorted(lines[:2]) == [
        "eval-0  done  outcome 0  1 calls",
        "eval-1  truncated  outcome 0  10 calls",
    ]


@needs_bubblewrap
def test_the_task_of_terminal_can_be_solved(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps(TASKS["count-1"]))
    (task,) = read_tasks(tmp_path / "tasks.jsonl", "terminal", TerminalKind().check_task)
    _, scored = play("```bash\nwc -l < a.txt > n.txt\n```", **task.fields)
    assert scored.outcome == 1.0


def lines_of(program: str) -> list[list[str]]:
    """The arguments of each command of a program in the documents, without comments."""
    shown = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
    shown += re.findall(r"`([^`\n]+)`", TEXT + RAY)
    words = [shlex.split(line, comments=True) for line in shown if line.startswith(f"{program} ")]
    return [line for line in words if "…" not in line]


def test_every_command_of_nextstate_in_the_documents_has_these_options() -> None:
    found = lines_of("nextstate")
    assert len(found) > 8
    assert ["nextstate", "rollout", "--ray", "10.0.0.1:6379"] in found
    for words in found:
        try:
            command_parser().parse_args([{"N": "1"}.get(word, word) for word in words[1:]])
        except SystemExit as end:  # also of --help
            if end.code:
                pytest.fail(f"{shlex.join(words)}: nextstate has no such arguments")


def test_every_command_of_ray_in_the_documents_has_these_options() -> None:
    ray = pytest.importorskip("ray.scripts.scripts", reason="needs Ray: make ray")
    found = [words for words in lines_of("ray") if any(word.startswith("-") for word in words)]
    read = set[str]()
    for _, *words in found:
        command = ray.cli
        while words and words[0] in getattr(command, "commands", ()):
            command, *words = command.commands[words[0]], *words[1:]
        command.make_context(command.name, words)  # it reads them, and starts nothing
        read.add(command.name)
    assert read == {"start", "submit", "stop"}


HARBOR = """\
#!{python}
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
run = parser.add_subparsers(required=True).add_parser("run", allow_abbrev=False)
run.add_argument("--path", type=pathlib.Path, required=True)
for name in ("--agent", "--model", "--base-url", "--api-key-name", "--jobs-dir"):
    run.add_argument(name, required=True)
run.add_argument("--max-retries", type=int)
run.add_argument("--quiet", action="store_true")
given = parser.parse_args()
assert os.environ[given.api_key_name] == "ep-1", given
assert (given.model, given.base_url) == ("openai/m", "http://p/v1"), given
folder = pathlib.Path(given.jobs_dir) / "job" / "trial"
folder.mkdir(parents=True)
result = {{"verifier_result": {{"rewards": {{"reward": 0.5}}}}}}
(folder / "result.json").write_text(json.dumps(result))
"""
"""Takes the options of Harbor 0.26 that the document names, and leaves what it leaves."""


def test_the_recipe_of_harbor_reads_its_result_as_the_reward(tmp_path: Path) -> None:
    (block,) = [one for one in BLOCKS if one.startswith("harbor run")]
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "harbor").write_text(HARBOR.format(python=sys.executable))
    (programs / "harbor").chmod(0o755)
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OPENAI_BASE_URL": "http://p/v1",
        "OPENAI_API_KEY": "ep-1",
        "NEXTSTATE_MODEL": "m",
        "NEXTSTATE_REWARD_FILE": str(tmp_path / "reward"),
    }
    subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=variables, check=True)
    assert read_reward((tmp_path / "reward").read_bytes()).outcome == 0.5


def test_an_own_environment_has_at_most_thirty_lines() -> None:
    assert set(MODULES) == {"guesses.py", "words.py", "agent.py", "verifiers_agent.py"}
    for name in ("guesses.py", "words.py", "agent.py"):
        lines = [line for line in MODULES[name].splitlines() if line.strip()]
        assert len(lines) <= 30, name


def test_the_reward_file_of_the_document_is_one() -> None:
    (text,) = re.findall(r'`(\{"outcome": 0\.5.*?\]\})`', TEXT)
    scored = read_reward(text.encode())
    assert (scored.outcome, scored.steps) == (0.5, {0: -1.0})
