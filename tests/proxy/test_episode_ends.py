"""Where an episode's budgets cut a call, what comes after its end, and which version serves it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import orjson
import pytest

from nextstate.records import PolicyVersion, Source, Turn, VersionState
from nextstate.store import Store
from tests.proxy.environment import Environment, call, refusal, user
from tests.proxy.running_proxy import V1, V2, Running, add_version, both, serve, until
from tests.scripted_engine import MODEL, Script, ScriptedEngine

TASK = user("find the file with the word")
CUT = "its episode's deadline_s passed before the end"
OVER = "The episode's deadline_s has passed during this call"


def turn(store: Store, turn_id: str) -> Turn:
    found = store.turns.get(turn_id)
    assert found is not None
    return found


async def ask(p: Running, url: str, body: dict[str, Any]) -> tuple[int, bytes]:
    data = io.BytesIO(orjson.dumps({"model": MODEL, **body}))
    answer = await p.http.post(url, data=data)
    return answer.status, await answer.read()


def remove_files(version: PolicyVersion) -> None:
    assert version.path is not None
    for file in Path(version.path).iterdir():
        file.unlink()


def test_a_reply_that_streams_at_the_deadline_is_cut_with_an_error(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue.append(Script(gate=asyncio.Event()))
        url = (await Environment(p).open("e-1", deadline_s=0.3))["base_url"]
        body = {"messages": [TASK], "stream": True}
        status, sent = await ask(p, f"{url}/chat/completions", body)
        last = orjson.loads(sent.rstrip().rpartition(b"data: ")[2])
        assert (status, last["error"]["type"]) == (200, "EpisodeBudgetError")
        assert last["error"]["message"].startswith(OVER)
        assert b"Hel" in sent
        await asyncio.wait_for(engine.aborted.wait(), 60)
        await until(lambda: len(store.turns.ids()) == 1)
        found = turn(store, store.turns.ids()[0])
        assert (found.untrainable, found.step, found.reply["content"]) == (CUT, 0, "Hel")

    both(test, store, tmp_path)


def test_a_reply_in_one_body_that_is_late_is_an_error(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue.append(Script(body_gate=asyncio.Event()))
        environment = Environment(p)
        url = (await environment.open("e-1", deadline_s=0.3))["base_url"]
        _, found = await call(p, url, TASK, status=400)
        assert refusal(found).startswith(OVER)
        assert found["error"]["type"] == "EpisodeBudgetError"
        assert (await environment.close("e-1", status="truncated", outcome=0))["turns"] == []

    both(test, store, tmp_path)


def test_a_reply_that_ends_before_the_deadline_is_whole(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1", deadline_s=60))["base_url"]
        turn_id, _ = await call(p, url, TASK)
        assert turn(store, turn_id).trainable

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("path", "body", "sent"),
    [
        ("chat/completions", {"messages": [TASK]}, {"max_tokens": 3}),
        ("chat/completions", {"messages": [TASK], "max_tokens": 2}, {"max_tokens": 2}),
        (
            "chat/completions",
            {"messages": [TASK], "max_completion_tokens": 9},
            {"max_completion_tokens": 3, "max_tokens": None},
        ),
        ("messages", {"messages": [TASK], "max_tokens": 9}, {"max_tokens": 3}),
        ("responses", {"input": "go"}, {"max_tokens": 3}),
        ("responses", {"input": "go", "max_output_tokens": 9}, {"max_tokens": 3}),
    ],
)
def test_no_reply_is_longer_than_what_is_left_of_the_tokens(
    store: Store, tmp_path: Path, path: str, body: dict[str, Any], sent: dict[str, Any]
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1", max_tokens=3))["base_url"]
        status, found = await ask(p, f"{url}/{path}", body)
        assert status == 200, found
        got = engine.requests[0]
        length = got.get("max_completion_tokens") or got.get("max_tokens")
        wanted = sent.get("max_completion_tokens") or sent["max_tokens"]
        assert length == wanted

    both(test, store, tmp_path)


def test_a_reply_that_ends_after_the_close_never_trains_and_says_so(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        gate = asyncio.Event()
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        first, _ = await call(p, url, TASK)
        engine.queue.append(Script(body_gate=gate))
        late = asyncio.create_task(call(p, url, TASK, user("a b")))
        await until(lambda: len(engine.requests) == 2)
        await environment.close("e-1", outcome=1.0, observation="done")
        gate.set()
        second, _ = await late
        found = turn(store, second)
        assert found.untrainable == "its episode was closed before the turn was recorded"
        assert (found.episode, found.step) == ("e-1", 1)
        assert [state.text for state in store.turns.next_states(first)] == ["done"]

    both(test, store, tmp_path)


def test_of_a_prompt_that_grows_only_what_follows_the_reply_is_new(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        engine.script = Script(("l", "s"))
        prompt = "Task: find the file.\n> "
        for observation in ("a b", "no such file", ""):
            assert (await ask(p, f"{url}/completions", {"prompt": prompt}))[0] == 200
            prompt += f"ls\n{observation}\n> "
        found = [store.turns.next_states(turn_id) for turn_id in store.turns.ids()]
        told = [[(state.source, state.text) for state in states] for states in found]
        environment = Source.ENVIRONMENT
        assert told == [[(environment, "a b\n>")], [(environment, "no such file\n>")], []]

    both(test, store, tmp_path)


def test_a_transcript_in_one_message_is_not_taken_for_something_new(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        engine.script = Script(("ls",))
        system = {"role": "system", "content": "Answer with a command."}
        first, _ = await call(p, url, system, user("Find it."))
        second, _ = await call(p, url, system, user("Find it.\nls\na b"))
        await call(p, url, system, user("Something else."))
        assert [s.text for s in store.turns.next_states(first)] == ["a b"]
        assert [s.text for s in store.turns.next_states(second)] == ["Something else."]

    both(test, store, tmp_path)


def test_an_episode_may_name_the_version_that_serves_it(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await serve(store, p, tmp_path, 1)
        add_version(store, tmp_path, 2)
        opened = {
            number: await environment.open(f"e-{number}", split="eval", version=number)
            for number in (0, 1, 2)
        }
        opened[None] = await environment.open("e-any")
        assert [one["version"] for one in opened.values()] == [0, 1, 2, 1]
        served = [await call(p, one["base_url"], TASK) for one in opened.values()]
        assert [request["model"] for request in engine.requests] == [MODEL, V1, V2, V2, V1]
        # The engine did not have it at first.
        assert [turn(store, turn_id).policy_version for turn_id, _ in served] == [0, 1, 2, 1]
        found = await environment.get("e-2")
        assert (found["version"], found["version_min"], found["version_max"]) == (2, 2, 2)
        assert store.versions.all("main")[1].state is VersionState.CANDIDATE
        assert V2 in p.proxy.versions.in_use()
        answer = await environment.open("e-9", 400, version=9)
        assert "lineage 'main' has no such version" in refusal(answer)

    both(test, store, tmp_path)


def test_a_version_whose_adapter_is_gone_stops_only_its_episode(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await serve(store, p, tmp_path, 1)
        version = add_version(store, tmp_path, 2)
        opened = await environment.open("e-2", version=2)
        remove_files(version)
        await call(p, opened["base_url"], TASK, status=404)
        assert p.proxy.versions.up
        await p.chat({"model": MODEL, "messages": [TASK]})

    both(test, store, tmp_path)
