"""plugins/environments/command.py: agent programs that call the model through the real proxy."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextstate.episodes import Split
from nextstate.errors import ConfigError
from nextstate.hooks import ModelAccess
from nextstate.records import Source
from nextstate.store import Store
from plugins.environments.command import CommandKind, create
from rollout.attempt import Attempt
from rollout.runner import Plan, run
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import needs_bubblewrap
from tests.rollout.test_runner import client, ignore
from tests.scripted_engine import Script, ScriptedEngine

pytestmark = pytest.mark.processes
PLAN = Plan("command", parallel=4, group_size=1, deadline_s=60)
PYTHON = shlex.quote(sys.executable)
OPENAI_AGENT = """\
import os, sys
from openai import OpenAI

messages = [{"role": "user", "content": os.environ["NEXTSTATE_INSTRUCTION"]}]
for _ in range(2):
    reply = OpenAI().chat.completions.create(model=os.environ["NEXTSTATE_MODEL"], messages=messages)
    said = reply.choices[0].message.content
    messages += [reply.choices[0].message, {"role": "user", "content": f"You said {said}."}]
print("the last was", said)
sys.exit(said != "7")
"""
ANTHROPIC_AGENT = """\
import os
from anthropic import Anthropic

messages = [{"role": "user", "content": "hi"}]
model = os.environ["NEXTSTATE_MODEL"]
print(Anthropic().messages.create(model=model, messages=messages, max_tokens=9).content[0].text)
"""
PLAIN_AGENT = """\
import json, os
from urllib.request import Request, urlopen


def ask(text):
    body = {"model": os.environ["NEXTSTATE_MODEL"], "messages": [{"role": "user", "content": text}]}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **key})
    with urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]
"""
CALLS = PLAIN_AGENT + "open('said', 'w').write(ask('hi'))\n"
ONCE = {"command": f"{PYTHON} agent.py", "files": {"agent.py": CALLS}}


def play(
    store: Store, tmp_path: Path, fields: dict[str, Any], *scripts: Script, plan: Plan = PLAN
) -> tuple[Attempt, ScriptedEngine]:
    """One episode of a task."""
    found: list[tuple[Attempt, ScriptedEngine]] = []

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += scripts
        kind = create(None)
        kind.check_task(fields)
        await kind.check_machine()
        async with client(p) as proxy:
            (attempt,) = await run(plan, [Task("t-1", Split.TRAIN, fields)], kind, proxy, ignore)
        found.append((attempt, engine))

    both(test, store, tmp_path)
    return found[0]


def test_an_unmodified_agent_learns_as_an_episode(store: Store, tmp_path: Path) -> None:
    fields = {
        "command": f"{PYTHON} agent.py",
        "instruction": "Say 7.",
        "files": {"agent.py": OPENAI_AGENT},
    }
    attempt, engine = play(store, tmp_path, fields, Script(("4",)), Script(("7",)))
    assert (attempt.status, attempt.outcome, attempt.calls) == ("done", 1.0, 2), attempt.reason
    assert engine.requests[0]["messages"][0]["content"] == "Say 7."
    first, second = store.episodes.turn_ids(attempt.episode)
    assert [state.text for state in store.turns.next_states(first)] == ["You said 4."]
    (last,) = store.turns.next_states(second)
    assert (last.source, last.text) == (Source.ENVIRONMENT, "exit code 0\nthe last was 7")


def test_an_agent_of_anthropic_reaches_the_model_too(store: Store, tmp_path: Path) -> None:
    fields = {"command": f"{PYTHON} agent.py", "files": {"agent.py": ANTHROPIC_AGENT}}
    attempt, _ = play(store, tmp_path, fields)
    assert (attempt.status, attempt.outcome, attempt.calls) == ("done", 1.0, 1), attempt.reason


def test_another_exit_code_is_a_task_that_is_not_solved(store: Store, tmp_path: Path) -> None:
    attempt, _ = play(store, tmp_path, {**ONCE, "command": f"{PYTHON} agent.py; exit 3"})
    assert (attempt.status, attempt.outcome, attempt.calls) == ("done", 0.0, 1)


def test_a_reward_file_tells_outcome_observation_and_what_steps_are_worth(
    store: Store, tmp_path: Path
) -> None:
    told = '{"outcome": 0.5, "observation": "1 of 2", "steps": [{"index": 0, "value": -1}]}'
    command = f"{PYTHON} agent.py; echo '{told}' > $NEXTSTATE_REWARD_FILE; exit 1"
    attempt, _ = play(store, tmp_path, {**ONCE, "command": command})
    assert (attempt.status, attempt.outcome) == ("done", 0.5)
    (turn,) = store.episodes.turn_ids(attempt.episode)
    assert [(one.turn, one.value) for one in store.episodes.rewards(attempt.episode)] == [
        (turn, -1)
    ]
    assert store.turns.next_states(turn)[0].text == "exit code 1\n1 of 2"


def test_a_reward_file_may_name_a_step_by_its_turn(store: Store, tmp_path: Path) -> None:
    """Its number would be another one if a call was sent twice."""
    agent = (
        PLAIN_AGENT.replace("return json", "return answer.headers['x-nextstate-turn'], json")
        + """
ask("first")
turn, _ = ask("second")
told = {"outcome": 1, "steps": [{"turn": turn, "value": -1}]}
json.dump(told, open(os.environ["NEXTSTATE_REWARD_FILE"], "w"))
"""
    )
    attempt, _ = play(store, tmp_path, {**ONCE, "files": {"agent.py": agent}})
    assert (attempt.status, attempt.outcome) == ("done", 1.0), attempt.reason
    (reward,) = store.episodes.rewards(attempt.episode)
    assert reward.turn == store.episodes.turn_ids(attempt.episode)[1]


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("NaN", "expected it to be a finite number"),
        ("no", "expected a number or a JSON object"),
        ('{"score": 1}', "'score': expected the fields observation, outcome, steps"),
        ('{"steps": []}', "None: expected outcome to be a finite number"),
        ('{"outcome": true}', "True: expected outcome to be a finite number"),
        ('{"outcome": 1, "steps": [{"index": -1, "value": 1}]}', "expected steps like"),
        ('{"outcome": 1, "steps": [{"index": 7, "value": 1}]}', "no index 7"),
        ('{"outcome": 1, "steps": [{"turn": "turn_x", "value": 1}]}', "no turn 'turn_x'"),
        ('{"outcome": 1, "steps": [{"turn": 0, "value": 1}]}', "expected steps like"),
        ('{"outcome": 1, "steps": [{"turn": "t", "index": 0, "value": 1}]}', "expected steps like"),
    ],
)
def test_a_wrong_reward_file_fails_the_episode_and_names_the_part(
    store: Store, tmp_path: Path, written: str, told: str
) -> None:
    command = f"{PYTHON} agent.py; echo '{written}' > $NEXTSTATE_REWARD_FILE"
    attempt, _ = play(store, tmp_path, {**ONCE, "command": command})
    assert (attempt.status, attempt.outcome) == ("failed", None)
    assert told in (attempt.reason or "")


@pytest.mark.parametrize("place", [{}, pytest.param({"sandbox": []}, marks=needs_bubblewrap)])
def test_the_check_decides_alone(store: Store, tmp_path: Path, place: dict[str, Any]) -> None:
    """The agent sees neither the check's files nor where it could write a reward."""
    python = "python3" if "sandbox" in place else PYTHON
    fields = {
        "command": f"{python} agent.py; test ! -e hidden && test -z $NEXTSTATE_REWARD_FILE && "
        "echo 9 > .reward.json; echo 9 > ../.reward.json; exit 1",
        "files": {"agent.py": CALLS},
        "check": "test -e .reward.json -o -e ../.reward.json; cmp said hidden",
        "check_files": {"hidden": "7"},
        **place,
    }
    for said, outcome in (("7", 1.0), ("8", 0.0)):
        attempt, _ = play(store, tmp_path, fields, Script((said,)))
        assert (attempt.status, attempt.outcome) == ("done", outcome), attempt.reason
        (turn,) = store.episodes.turn_ids(attempt.episode)
        (shown,) = store.turns.next_states(turn)
        assert f"check: exit code {1 - int(outcome)}" in shown.text


def test_a_program_that_never_called_the_model_has_failed(store: Store, tmp_path: Path) -> None:
    attempt, _ = play(store, tmp_path, {"command": "echo no key; exit 0"})
    assert (attempt.status, attempt.outcome) == ("failed", None)
    assert attempt.reason == ("the agent's program did not call the model: 'exit code 0\\nno key'")


def test_a_program_that_is_not_there_has_failed(store: Store, tmp_path: Path) -> None:
    attempt, _ = play(store, tmp_path, {"command": "no-such-agent"})
    assert (attempt.status, attempt.outcome) == ("failed", None)
    assert "bash could not run a program (exit code 127)" in (attempt.reason or "")


@pytest.mark.parametrize("place", [{}, pytest.param({"sandbox": []}, marks=needs_bubblewrap)])
@pytest.mark.parametrize(
    "left", ["", "echo 'exit 0' > answer.sh;", "echo '#!/none' > answer.sh; chmod 755 answer.sh;"]
)
def test_a_check_that_cannot_be_run_is_a_failure_of_the_agent(
    store: Store, tmp_path: Path, left: str, place: dict[str, Any]
) -> None:
    """It was to write the program: if it did not, others of its group are compared with it."""
    python = "python3" if "sandbox" in place else PYTHON
    fields = {**ONCE, "command": f"{left} {python} agent.py", "check": "./answer.sh", **place}
    attempt, _ = play(store, tmp_path, fields)
    assert (attempt.status, attempt.outcome) == ("done", 0.0), attempt.reason


@pytest.mark.parametrize("files", [{}, {"check_files": {"a": ""}}])
def test_a_folder_that_was_removed_is_a_failure_of_the_agent(
    store: Store, tmp_path: Path, files: dict[str, Any]
) -> None:
    remove = 'rm -rf "$PWD"; echo > "$PWD"'
    fields = {**ONCE, "command": f"{PYTHON} agent.py; {remove}", "check": "true", **files}
    attempt, _ = play(store, tmp_path, fields)
    assert (attempt.status, attempt.outcome) == ("done", 0.0), attempt.reason


def test_the_deadline_ends_the_whole_group_and_the_check_counts(
    store: Store, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    command = (
        f"{PYTHON} agent.py; for i in 1 2; do (echo $BASHPID >> {pids}; sleep 99) & done; wait"
    )
    fields = {**ONCE, "command": command, "check": "test -e said"}
    attempt, _ = play(store, tmp_path, fields, plan=replace(PLAN, deadline_s=8))
    assert (attempt.status, attempt.outcome, attempt.calls) == ("truncated", 1.0, 1), attempt.reason
    left = [Path(f"/proc/{pid}/cmdline") for pid in pids.read_text().split()]
    assert len(left) == 2

    async def gone() -> None:  # of a zombie the command line is empty
        await until(lambda: not any(one.exists() and one.read_bytes() for one in left))

    asyncio.run(gone())


@needs_bubblewrap
def test_a_sandbox_that_ends_its_program_truncates_the_episode(
    store: Store, tmp_path: Path
) -> None:
    """What it has reached counts, as where the deadline ends a program without a sandbox."""
    fields = {**ONCE, "command": "python3 agent.py; sleep 99", "check": "test -e said"}
    plan = replace(PLAN, deadline_s=8)
    attempt, _ = play(store, tmp_path, {**fields, "sandbox": []}, plan=plan)
    assert (attempt.status, attempt.outcome, attempt.calls) == ("truncated", 1.0, 1), attempt.reason
    fields |= {"command": "python3 agent.py; timeout 0.1 sleep 9"}
    attempt, _ = play(store, tmp_path, {**fields, "sandbox": []}, plan=plan)
    assert attempt.status == "done", "it ended something itself"


def test_a_cancelled_program_may_remove_what_it_started(tmp_path: Path) -> None:
    async def cancelled() -> None:
        program = create(None).make()
        command = (
            f"trap 'touch {tmp_path}/removed; exit' TERM; touch {tmp_path}/began; sleep 99 & wait"
        )
        access = ModelAccess("http://127.0.0.1:1/v1", "ep-1", "m", 60)
        playing = asyncio.create_task(program.play({"command": command}, 0, access))
        await until(lambda: (tmp_path / "began").exists())
        playing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await playing
        await program.close()
        assert (tmp_path / "removed").exists()

    asyncio.run(cancelled())


def test_a_program_gets_none_of_our_secrets_and_its_folder_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ENGINE_KEY", "secret")
    access = ModelAccess("http://127.0.0.1:1/v1", "ep-1", "m", 60)

    async def shown() -> str:
        program = create(None).make()
        fields = {"command": "env; pwd", "variables": {"MODE": "fast"}}
        try:
            return await program.play(fields, 3, access)
        finally:
            await program.close()

    told = asyncio.run(shown())
    assert "MODE=fast\n" in told
    assert "NEXTSTATE_SEED=3\n" in told
    assert "ANTHROPIC_BASE_URL=http://127.0.0.1:1\n" in told
    assert "secret" not in told
    assert not os.path.exists(told.splitlines()[-1])


@needs_bubblewrap
def test_a_program_in_the_sandbox_reaches_the_model_and_nothing_else(
    store: Store, tmp_path: Path
) -> None:
    agent = (
        PLAIN_AGENT
        + """\
from urllib.error import HTTPError
base = os.environ["OPENAI_BASE_URL"]
for path in ("/v1/episodes", "/healthz", "/v1/../v1/groups"):
    try:
        urlopen(Request(base.removesuffix("/v1") + path, b"[]"))
    except HTTPError as error:
        print(path, error.code)
print(ask("hi"), sorted(os.listdir("/")), os.environ["OPENAI_API_KEY"])
"""
    )
    fields = {"command": "python3 agent.py", "files": {"agent.py": agent}, "sandbox": []}
    attempt, _ = play(store, tmp_path, fields, Script(("7",)))
    assert (attempt.status, attempt.outcome, attempt.calls) == ("done", 1.0, 1), attempt.reason
    (turn,) = store.episodes.turn_ids(attempt.episode)
    lines = store.turns.next_states(turn)[0].text.splitlines()
    assert lines == [
        "exit code 0",
        "/v1/episodes 404",
        "/healthz 404",
        "/v1/../v1/groups 404",
        "7 ['bin', 'dev', 'etc', 'lib', 'lib64', 'proc', 'task', 'tmp', 'usr'] sandbox",
    ]


@needs_bubblewrap
def test_a_program_in_the_sandbox_reads_the_folders_that_it_was_given(
    store: Store, tmp_path: Path
) -> None:
    folder = Path("/usr/share")  # others would have to be readable for everybody
    command = f"python3 agent.py; ls {folder} | wc -l; touch {folder}/x && exit 1; "
    command += "echo 0.25 > $NEXTSTATE_REWARD_FILE"
    fields = {**ONCE, "command": command, "sandbox": [str(folder)]}
    attempt, _ = play(store, tmp_path, fields)
    assert (attempt.status, attempt.outcome) == ("done", 0.25), attempt.reason


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "command is missing"),
        ({"command": "a\0b"}, "command: expected at most 32768 bytes"),
        ({"command": ["python", "a"]}, "expected a text"),
        ({"command": "a", "run": 1}, "unknown field 'run'"),
        ({"command": "a", "files": {"../a": ""}}, "files: '../a'"),
        ({"command": "a", "check_files": {}}, "check_files are there without a check"),
        ({"command": "a", "variables": {"A": 1}}, "variables: 'A' = 1: expected a text"),
        ({"command": "a", "sandbox": ["opt"]}, "sandbox: 'opt': expected a folder"),
        ({"command": "a", "sandbox": ["/"]}, "sandbox: '/': expected a folder"),
        ({"command": "a", "sandbox": ["/tmp/"]}, "sandbox: '/tmp/': expected a folder"),
        ({"command": "a", "sandbox": ["/none"]}, "sandbox: '/none': there is no such folder"),
    ],
)
def test_a_wrong_task_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        CommandKind().check_task(fields)
    assert told in str(error.value)
