"""mini-swe-agent as it is on PyPI repairs a package, as an episode of a real proxy.

`make clients` installs it. It finds the episode by OPENAI_BASE_URL and OPENAI_API_KEY alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import sys
from asyncio import subprocess
from pathlib import Path
from typing import Any

import pytest

from judge.groups import settle_over
from nextstate.episodes import EpisodeState
from nextstate.records import Json, Source
from nextstate.store import Store
from plugins.environments import repair_folder
from plugins.environments.repair_judge import render_tests
from plugins.environments.repair_tasks import task
from tests.proxy.running_proxy import Running, both, request
from tests.rollout.machine import needs_pytest
from tests.scripted_engine import MODEL, Script, ScriptedEngine

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "environments.md"
INSTALLED = ROOT / ".clients" / "python"
needs_mini = pytest.mark.skipif(
    not (INSTALLED / "minisweagent").is_dir(), reason="needs mini-swe-agent: make clients"
)
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def runs(command: str) -> Script:
    """A reply that calls the agent's tool."""
    function = {"name": "bash", "arguments": json.dumps({"command": command})}
    call = {"id": f"call-{abs(hash(command))}", "type": "function", "function": function}
    return Script(("I", " try"), [call], "tool_calls")


def edit(answers: list[str]) -> str:
    """The solution's replacement of lines as a command."""
    head, _, text = next(one for one in answers if one.startswith("replace ")).partition("\n")
    _, path, places = head.split()
    first, _, last = places.partition("-")
    script = f"p = {path!r}; t = open(p).read().split('\\n'); "
    script += f"t[{int(first) - 1}:{int(last or first)}] = {text.split(chr(10))!r}; "
    script += "open(p, 'w').write('\\n'.join(t))"
    return f'python3 - <<"EOF"\n{script}\nEOF'


async def mini(opened: Json, folder: Path, home: Path, instruction: str) -> None:
    """Runs it in a folder until it has submitted, with the arguments of the document."""
    line = re.search(r"^\S*/mini (.*)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert line
    given = shlex.split(line[1])
    given[given.index("-t") + 1] = instruction
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "PYTHONPATH": str(INSTALLED),
        "OPENAI_BASE_URL": opened["base_url"],
        "OPENAI_API_KEY": opened["api_key"],
        "MSWEA_CONFIGURED": "true",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "minisweagent.run.mini"),
        *(word.replace("MODEL", MODEL) for word in given),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=env,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()[-3000:]


async def posted(p: Running, path: str, body: object) -> Json:
    answer = await p.http.post(f"{p.url}/v1/{path}", data=json.dumps(body))
    found: Any = await answer.json()
    assert answer.status == 200, found
    return found


@needs_mini
@needs_pytest
@pytest.mark.processes
@pytest.mark.timeout(600)
def test_its_turns_are_steps_of_an_episode_and_its_repair_is_the_outcome(
    store: Store, tmp_path: Path
) -> None:
    """The other attempt of its group repairs nothing; a reply without a call is a step as well."""
    fields, answers = task("operator", "train", 1)
    file = tmp_path / "task.json"
    file.write_text(json.dumps(fields))
    found = repair_folder.read_task(file)
    (tmp_path / "home").mkdir()

    async def close(p: Running, opened: Json, folder: Path) -> float:
        scored = await repair_folder.judge_folder(found, folder)
        end = {"outcome": scored.outcome, "observation": scored.observation, "status": "done"}
        await posted(p, f"episodes/{opened['episode']}/close", end)
        return scored.outcome

    async def test(engine: ScriptedEngine, p: Running) -> None:
        asked = {"environment": "repair", "task": fields["id"], "group": "g", "group_size": 2}
        first, second = (await posted(p, "groups", asked))["episodes"]
        for name in ("first", "second"):
            repair_folder.write_folder(found, tmp_path / name)
        engine.queue += [Script(("no", " call")), runs("cat */*.py"), runs(edit(answers))]
        engine.queue += [runs("python3 -I -m pytest -q"), runs(SUBMIT)]
        await mini(first, tmp_path / "first", tmp_path / "home", fields["instruction"])
        assert engine.queue == []
        answered, _, _ = await p.chat(request(), {"Authorization": f"Bearer {second['api_key']}"})
        assert answered == 200
        assert await close(p, first, tmp_path / "first") == 1.0
        assert await close(p, second, tmp_path / "second") == 0.0

        turns = store.episodes.turn_ids(first["episode"])
        assert len(turns) == 5
        followed = [store.turns.next_states(turn) for turn in turns]
        assert {one.source for states in followed for one in states} == {Source.ENVIRONMENT}
        texts = ["\n".join(one.text for one in states) for states in followed]
        assert "Tool call error" in texts[0], "the agent drops this reply from its history"
        assert '"returncode": 0' in texts[1]
        assert "passed" in texts[-1], "the hidden tests' words come with the close"
        settle_over(store, 0, judging_s=-1)  # nobody judges here
        episodes = [store.episodes.get(one["episode"]) for one in (first, second)]
        assert [one and (one.state, one.outcome) for one in episodes] == [
            (EpisodeState.SETTLED, 1.0),
            (EpisodeState.SETTLED, 0.0),
        ]
        assert store.counts()["samples/ready"] == 6

    both(test, store, tmp_path)


@needs_pytest
@pytest.mark.processes
def test_a_folder_is_written_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, answers = task("edge-case", "train", 0)
    folder = tmp_path / "work"
    file = folder / "task.json"
    (tmp_path / "task.json").write_text(json.dumps(fields))
    assert repair_folder.main(["write", str(tmp_path / "task.json"), str(folder)]) == 0
    assert (folder / "test_visible.py").read_text() == render_tests(fields["visible"])
    (tmp_path / "task.json").rename(file)
    assert repair_folder.main(["judge", str(file), str(folder)]) == 1
    assert "failed" in capsys.readouterr().out
    # What an agent may leave: links, pipes, files that nobody may read.
    (folder / "link").symlink_to(tmp_path)
    (folder / "secret").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe")
    head, _, text = next(one for one in answers if one.startswith("replace")).partition("\n")
    path, line = folder / head.split()[1], int(head.split()[2])
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[: line - 1], text, *lines[line:]]))
    assert repair_folder.main(["judge", str(file), str(folder)]) == 0


def test_the_file_with_the_answers_is_not_among_the_agents_files(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{}")
    (tmp_path / "a.py").write_text("x")
    read = repair_folder.texts_of(tmp_path, tmp_path / "task.json")
    assert dict(read) == {"a.py": "x"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["judge", "none.json", "."], "none.json: [Errno 2] No such file"),
        (["judge", "list.json", "."], "list.json: expected a JSON object"),
        (["judge", "empty.json", "."], "instruction = None: expected a text"),
        (["write", "task.json", "."], ".: File exists"),
        (["judge"], "expected: write TASK FOLDER, or judge TASK FOLDER"),
    ],
)
def test_a_wrong_argument_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("{}")
    Path("task.json").write_text(json.dumps(task("return", "train", 0)[0]))
    assert repair_folder.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_too_much_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 30)
    assert repair_folder.main(["judge", *two(tmp_path)]) == 2
    os.truncate(tmp_path / "large", 0)
    for number in range(2000):
        (tmp_path / str(number)).touch()
    assert repair_folder.main(["judge", *two(tmp_path)]) == 2


def two(folder: Path) -> list[str]:
    (folder / "task.json").write_text(json.dumps(task("return", "train", 0)[0]))
    return [str(folder / "task.json"), str(folder)]
