"""Serves an environment of this folder over OpenEnv's wire: WebSocket, health and Task API.

    python -m plugins.environments.openenv_server tools --tasks tasks.jsonl --port 8000

A session's reset takes `seed`, `split` and `index`, as OpenEnv's Task API names tasks. An action is
{"text": …}, an observation {"text": …}; the reward of the last step is the outcome.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from nextstate.errors import ConfigError, RolloutError
from nextstate.hooks import Environment, EnvironmentKind, load_plugin
from nextstate.records import Json

_TYPES = {"train": "train", "eval": "test"}
_MOST_MESSAGE_BYTES = 4 << 20
Tasks = Mapping[str, Sequence[Json]]
"""By split. Each has an `id` and the fields of its environment."""


class OpenEnvServer:
    """One environment with its tasks; each connection is an episode of its own."""

    def __init__(self, name: str, kind: EnvironmentKind, tasks: Tasks) -> None:
        for task in (one for some in tasks.values() for one in some):
            kind.check_task(_fields(task))
        self._name, self._kind, self._tasks = name, kind, tasks
        self.app = web.Application()
        self.app.add_routes(
            [
                web.get("/health", _healthy),
                web.get("/list_environments", self._list_environments),
                web.get("/{name}/splits", self._splits),
                web.post("/{name}/num_tasks", self._count),
                web.post("/{name}/task_range", self._range),
                web.get("/ws", self._session),
            ]
        )

    async def _list_environments(self, _: web.Request) -> web.Response:
        return web.json_response([self._name])

    async def _splits(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.json_response([{"name": name, "type": _TYPES[name]} for name in self._tasks])

    async def _count(self, request: web.Request) -> web.Response:
        return web.json_response({"num_tasks": len((await self._asked(request))[1])})

    async def _range(self, request: web.Request) -> web.Response:
        asked, tasks = await self._asked(request)
        start, stop = asked.get("start"), asked.get("stop")
        if not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
            raise web.HTTPBadRequest(text="start and stop: expected whole numbers")
        numbered = [{"id": task["id"], "index": index} for index, task in enumerate(tasks)]
        return web.json_response({"tasks": numbered[start:stop]})

    def _check(self, request: web.Request) -> None:
        if request.match_info["name"] != self._name:
            raise web.HTTPNotFound(text=f"the environment is {self._name}")

    async def _asked(self, request: web.Request) -> tuple[Json, Sequence[Json]]:
        """The body of a request about one split, and the tasks of that."""
        self._check(request)
        with suppress(ValueError, RecursionError):
            asked: object = await request.json()
            if isinstance(asked, dict):
                fields = cast(Json, asked)
                split: object = fields.get("split")
                if isinstance(split, str) and split in self._tasks:
                    return fields, self._tasks[split]
        raise web.HTTPBadRequest(text=f"split: expected {' or '.join(self._tasks)}")

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=_MOST_MESSAGE_BYTES)
        await socket.prepare(request)
        session = _Session(self._kind, self._tasks)
        try:
            async for message in socket:
                if message.type is not web.WSMsgType.TEXT:
                    break
                answer = await session.answer(cast(str, message.data))
                if answer is None:
                    break
                await socket.send_str(json.dumps(answer))
        finally:
            await session.close()
        return socket


class _Session:
    """The episodes of one connection, one after the other."""

    def __init__(self, kind: EnvironmentKind, tasks: Tasks) -> None:
        self._kind, self._tasks = kind, tasks
        self._episode: Environment | None = None

    async def answer(self, text: str) -> Json | None:
        """The answer to a message; None ends the session."""
        try:
            found: object = json.loads(text)
        except (ValueError, RecursionError):
            return _error("INVALID_JSON", "it is no JSON")
        message = cast(Json, found) if isinstance(found, dict) else {}
        data = cast(object, message.get("data", {}))
        given = cast(Json, data) if isinstance(data, dict) else {}
        try:
            match message.get("type"):
                case "reset":
                    return await self._reset(given)
                case "step":
                    return await self._step(given)
                case "close":
                    return None
                case _:
                    return _error("UNKNOWN_TYPE", "expected reset, step or close")
        except RolloutError as error:
            return _error("EXECUTION_ERROR", str(error))

    async def close(self) -> None:
        episode, self._episode = self._episode, None
        if episode is not None:
            await episode.close()

    async def _reset(self, given: Json) -> Json:
        split, index, seed = given.get("split", "train"), given.get("index", 0), given.get("seed")
        tasks = self._tasks.get(split, ()) if isinstance(split, str) else ()
        if not isinstance(index, int) or not 0 <= index < len(tasks):
            return _error("VALIDATION_ERROR", f"split {split!r:.80} has {len(tasks)} tasks")
        await self.close()
        made = self._kind.make()
        self._episode = cast(Environment, made)
        number = seed if isinstance(seed, int) else 0
        return _shown(await self._episode.reset(_fields(tasks[index]), number), None, False)

    async def _step(self, given: Json) -> Json:
        text: object = given.get("text")
        if not isinstance(text, str):
            return _error("VALIDATION_ERROR", 'expected an action as {"text": "…"}')
        if self._episode is None:
            return _error("EXECUTION_ERROR", "reset comes first")
        acted = await self._episode.step(text)
        if not acted.done:
            return _shown(acted.observation, acted.reward, False)
        scored = await self._episode.score()
        await self.close()
        told = "\n".join(filter(None, (acted.observation, scored.observation)))
        return _shown(told, scored.outcome, True)


def read_tasks(file: Path) -> dict[str, list[Json]]:
    """The tasks of a file with one JSON object a line. Raises ConfigError with the line."""
    tasks: dict[str, list[Json]] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                task: Any = json.loads(line)
                name, split = task["id"], task.pop("split", "train")
                if not isinstance(name, str) or split not in _TYPES:
                    raise ValueError
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                told = "expected a JSON object with an id, and the split train or eval"
                raise ConfigError(f"{file}, line {number}: {told}") from error
            tasks.setdefault(split, []).append(task)
    return tasks


def _fields(task: Json) -> Json:
    return {name: value for name, value in task.items() if name != "id"}


def _shown(text: str, reward: float | None, done: bool) -> Json:
    data = {"observation": {"text": text}, "reward": reward, "done": done}
    return {"type": "observation", "data": data}


def _error(code: str, message: str) -> Json:
    return {"type": "error", "data": {"message": message, "code": code}}


async def _healthy(_: web.Request) -> web.Response:
    return web.json_response({"status": "healthy"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m plugins.environments.openenv_server")
    parser.add_argument("environment", help="a file of plugins/environments/, as tools")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    kind: EnvironmentKind = load_plugin("environments", args.environment, None)
    server = OpenEnvServer(args.environment, kind, read_tasks(args.tasks))
    web.run_app(server.app, host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
