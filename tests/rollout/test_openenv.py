"""plugins/environments/openenv.py and openenv_server.py: both ends of OpenEnv's wire.

NEXTSTATE_TEST_OPENENV=http://… also asks a server of the package openenv (its environment Echo is
in `test_a_server_of_the_package_itself_is_played`).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType, web

from nextstate.episodes import Split
from nextstate.errors import ConfigError, RolloutError, StartError
from nextstate.hooks import Acted
from nextstate.store import Store
from plugins.environments import tool_tasks
from plugins.environments.openenv import OpenEnvKind, create
from plugins.environments.openenv_server import OpenEnvServer, read_tasks
from plugins.environments.tools import ToolsKind
from rollout.reading import read_source
from rollout.runner import Plan, run
from tests.proxy.running_proxy import Running, both
from tests.rollout.test_runner import client, ignore
from tests.scripted_engine import Script, ScriptedEngine

FAMILIES = [*tool_tasks.FAMILIES]
GOT = web.AppKey("got", list[Any])
REAL = os.environ.get("NEXTSTATE_TEST_OPENENV", "")


@asynccontextmanager
async def served(app: web.Application) -> AsyncGenerator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield site.name
    finally:
        await runner.cleanup()


def tools(count: int = 6) -> OpenEnvServer:
    tasks: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for seed in range(count):
        for split, found in tasks.items():
            fields, _ = tool_tasks.task(FAMILIES[seed % 3], split, seed)
            fields.pop("split", None)
            found.append({**fields, "id": f"{split}-{seed}"})
    return OpenEnvServer("tools", ToolsKind(), tasks)


def with_server(app: web.Application, test: Callable[[str], Awaitable[None]]) -> None:
    async def go() -> None:
        async with served(app) as url:
            await test(url)

    asyncio.run(go())


def scripted(*answers: object) -> web.Application:
    """A server that answers each message with the next of these, and then ends the session."""

    async def session(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for answer in answers:
            message = await socket.receive()
            if message.type is not WSMsgType.TEXT:
                break
            request.app[GOT].append(json.loads(message.data))
            await socket.send_str(answer if isinstance(answer, str) else json.dumps(answer))
        await socket.close()
        return socket

    app = web.Application()
    app[GOT] = []
    app.router.add_get("/ws", session)
    return app


def observed(text: Any, reward: float | None = None, done: bool = False) -> dict[str, Any]:
    return {
        "type": "observation",
        "data": {"observation": text, "reward": reward, "done": done},
    }


def error(code: str, **more: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"code": code, "message": "told", **more}}


def play(
    app: web.Application, task: dict[str, Any], *replies: str
) -> tuple[str, list[Acted], float]:
    found: list[tuple[str, list[Acted], float]] = []

    async def test(url: str) -> None:
        kind = create(None)
        kind.check_task({**task, "url": url})
        environment = kind.make()
        try:
            shown = await environment.reset({**task, "url": url}, 3)
            acted = [await environment.step(reply) for reply in replies]
            found.append((shown, acted, (await environment.score()).outcome))
        finally:
            await environment.close()

    with_server(app, test)
    return found[0]


def test_tasks_of_a_server_are_listed_and_played_through_the_proxy(
    store: Store, tmp_path: Path
) -> None:
    """The family tools over the wire: the oracle solves each task, who only submits none."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        async with served(tools().app) as url, client(p) as proxy:
            source = f"{url}?action=text&show=text"
            kind = create(None)
            tasks = await asyncio.to_thread(read_source, source, "openenv", kind.check_task)
            assert [one.split for one in tasks] == [Split.TRAIN] * 6 + [Split.EVAL] * 6
            assert tasks[7].id == "eval-1"
            assert tasks[7].fields["reset"] == {"split": "eval", "index": 1}
            await kind.check_machine()
            for seed, task in enumerate(tasks[:6]):
                _, solution = tool_tasks.task(FAMILIES[seed % 3], "train", seed)
                engine.queue += [Script((reply,)) for reply in solution]
                plan = Plan("openenv", parallel=1, group_size=1, deadline_s=60)
                (attempt,) = await run(plan, [task], kind, proxy, ignore)
                assert (attempt.status, attempt.outcome) == ("done", 1.0), attempt.reason
                assert attempt.calls == len(solution)
            first = store.episodes.turn_ids(attempt.episode)[0]
            assert [one.value for one in store.episodes.rewards(attempt.episode)][:1] == [0.0]
            assert store.turns.next_states(first)
        await p.http.close()

    both(test, store, tmp_path)


def test_a_reply_is_the_action_itself_unless_the_task_names_its_field() -> None:
    app = scripted(observed({"a": 1}), observed("x", 0.5), observed([2], 1.0, True))
    shown, acted, outcome = play(app, {"instruction": "Go."}, '{"move": 1}', '{"move": 2}')
    assert shown == 'Go.\n\n{"a": 1}'
    assert acted == [Acted("x", 0.5, False), Acted("[2]", None, True)]
    assert outcome == 1.0
    assert app[GOT] == [
        {"type": "reset", "data": {"seed": 3}},
        {"type": "step", "data": {"move": 1}},
        {"type": "step", "data": {"move": 2}},
    ]
    app = scripted(observed({"text": "hi"}), observed({"text": "no"}, 0.25), observed({"text": ""}))
    task = {"action": "message", "show": "text", "outcome": "sum", "reset": {"index": 4}}
    shown, acted, outcome = play(app, task, "a", "b")
    assert (shown, acted[0].observation, outcome) == ("hi", "no", 0.25)
    assert app[GOT][:2] == [
        {"type": "reset", "data": {"seed": 3, "index": 4}},
        {"type": "step", "data": {"message": "a"}},
    ]


def test_an_action_that_is_none_or_is_refused_is_the_agents_mistake() -> None:
    app = scripted(observed(""), error("VALIDATION_ERROR", errors=[{"loc": ["move"]}]))
    _, acted, outcome = play(app, {}, "left", "[1]", '{"move": NaN}', "{}")
    assert [one.reward for one in acted] == [-1.0] * 4
    assert acted[3].observation == 'error: [{"loc": ["move"]}]'
    assert outcome == 0.0


def test_an_end_without_a_reward_is_no_failure_of_the_agent() -> None:
    with pytest.raises(RolloutError, match="ended the episode without a reward"):
        play(scripted(observed(""), observed("x", None, True)), {}, "{}")
    answers = observed(""), observed("x", 0.5), observed("y", None, True)
    assert play(scripted(*answers), {"outcome": "sum"}, "{}", "{}")[2] == 0.5
    with pytest.raises(RolloutError, match="ended the episode without a reward"):
        play(scripted(observed(""), observed("x", None, True)), {"outcome": "sum"}, "{}")


def test_the_reward_from_which_on_a_task_is_solved_can_be_named() -> None:
    answers = observed(""), observed("x", 150), observed("y", 50, True)
    task = {"outcome": "sum", "solved": "400"}
    assert play(scripted(*answers), task, "{}", "{}")[2] == 0.5


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([error("EXECUTION_ERROR")], "answered EXECUTION_ERROR: 'told'"),
        ([error("CAPACITY_REACHED")], "lower --parallel, or raise max_concurrent_envs"),
        (["no JSON"], "answered 'no JSON'"),
        ([{"type": "state", "data": {}}], 'answered \'{"type": "state"'),
        ([], "ended the session"),
        ([observed({"b": 1})], "show = 'a': the observation is {'b': 1}"),
    ],
)
def test_what_breaks_in_the_server_is_told(answers: list[Any], told: str) -> None:
    with pytest.raises(RolloutError) as raised:
        play(scripted(*answers), {"show": "a"})
    assert told in str(raised.value)


def test_a_long_observation_is_cut() -> None:
    shown, *_ = play(scripted(observed("x" * 20_000)), {})
    assert shown.endswith("x\n[4000 characters are left out]")


def test_a_server_that_is_away_is_named() -> None:
    kind = OpenEnvKind()
    kind.check_task({"url": "http://127.0.0.1:1"})
    with pytest.raises(StartError, match=r"no OpenEnv server at http://127.0.0.1:1: "):
        asyncio.run(kind.check_machine())
    with pytest.raises(ConfigError, match=r"--tasks http://127.0.0.1:1/list_environments: "):
        read_source("http://127.0.0.1:1", "openenv", kind.check_task)


@pytest.mark.parametrize(
    ("path", "answer", "told"),
    [
        ("/list_environments", {"a": 1}, "expected a list of names"),
        ("/e/splits", ["train"], "expected a list of objects"),
        ("/e/num_tasks", {"num_tasks": -1}, "expected num_tasks"),
        ("/e/task_range", {"tasks": 3}, "expected a list of objects"),
    ],
)
def test_a_server_that_lists_no_tasks_is_named(path: str, answer: object, told: str) -> None:
    answers = {
        "/list_environments": ["e"],
        "/e/splits": [{"name": "train", "type": "train"}],
        "/e/num_tasks": {"num_tasks": 1},
        "/e/task_range": {"tasks": [{}]},
        path: answer,
    }

    async def answered(request: web.Request) -> web.Response:
        return web.json_response(answers[request.path])

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answered)

    async def test(url: str) -> None:
        with pytest.raises(ConfigError, match=told):
            await asyncio.to_thread(read_source, url, "openenv", lambda _: None)

    with_server(app, test)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("no", "INVALID_JSON"),
        ("[]", "UNKNOWN_TYPE"),
        ('{"type": "state"}', "UNKNOWN_TYPE"),
        ('{"type": "step", "data": {"text": "x"}}', "EXECUTION_ERROR"),
        ('{"type": "step", "data": {"text": 1}}', "VALIDATION_ERROR"),
        ('{"type": "reset", "data": {"index": 99}}', "VALIDATION_ERROR"),
        ('{"type": "reset", "data": {"split": ["a"]}}', "VALIDATION_ERROR"),
    ],
)
def test_our_server_names_a_wrong_message_as_openenv_does(message: str, code: str) -> None:
    async def test(url: str) -> None:
        async with ClientSession() as http, http.ws_connect(f"{url}/ws") as socket:
            await socket.send_str(message)
            answer = await socket.receive_json()
            assert (answer["type"], answer["data"]["code"]) == ("error", code)

    with_server(tools(2).app, test)


def test_our_server_names_a_wrong_line_of_its_tasks(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    for line in ('{"id": 1}', "[]", "no", '{"id": "a", "split": "test"}'):
        file.write_text(line)
        with pytest.raises(ConfigError, match="line 1: expected a JSON object with an id"):
            read_tasks(file)


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({}, "url = '': expected a server"),
        ({"url": "ftp://a"}, "url = 'ftp://a': expected a server"),
        ({"url": "http://[a"}, "url = 'http://[a': expected a server"),
        ({"url": "http://a", "reset": 1}, "reset = 1: expected an object"),
        ({"url": "http://a", "outcome": "mean"}, "outcome = 'mean': expected last or sum"),
        ({"url": "http://a", "port": 1}, "unknown field 'port'"),
    ],
)
def test_a_wrong_task_is_named(task: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        OpenEnvKind().check_task(task)
    assert told in str(raised.value)


@pytest.mark.skipif(not REAL, reason="needs NEXTSTATE_TEST_OPENENV=http://…")
def test_a_server_of_the_package_itself_is_played() -> None:
    """Its environment wants the message SPLIT-INDEX, in three steps, and breaks at `crash`."""
    kind = OpenEnvKind()
    source = f"{REAL}?action=message&show=text"
    tasks = read_source(source, "openenv", kind.check_task)
    assert [(one.id, one.split) for one in tasks] == [
        *((f"train-{index}", Split.TRAIN) for index in range(3)),
        *((f"test-{index}", Split.EVAL) for index in range(3)),
    ]

    async def episode(index: int) -> None:
        environment = kind.make()
        try:
            shown = await environment.reset(tasks[index].fields, 5)
            assert shown == f"Say {tasks[index].id}. seed 5"
            assert await environment.step("no") == Acted("you said no", -0.5, False)
            acted = await environment.step(tasks[index].id)
            assert acted == Acted(f"you said {tasks[index].id}", None, True)
            assert (await environment.score()).outcome == 1.0
        finally:
            await environment.close()

    async def breaks() -> None:
        environment = kind.make()
        fields = {name: value for name, value in tasks[0].fields.items() if name != "action"}
        try:
            await environment.reset(fields, 0)
            (acted := await environment.step('{"word": 1}'))
            assert acted.reward == -1.0
            with pytest.raises(RolloutError, match="answered EXECUTION_ERROR: 'no disk'"):
                await environment.step('{"message": "crash"}')
        finally:
            await environment.close()

    async def test() -> None:
        await kind.check_machine()
        await asyncio.gather(*(episode(index) for index in range(6)))
        await breaks()

    asyncio.run(test())
