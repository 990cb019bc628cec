"""The judge killed with SIGKILL at random moments: one verdict for each turn, none lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.config import StoreConfig
from nextstate.records import Json
from nextstate.store import Store
from tests.judge.test_stage import a_turn, record
from tests.postgresql_server import url_of

DATABASES = True
"""Each test runs on both."""
TURNS_BETWEEN_KILLS = 12
CONFIG = """
[store]
dir = "{state}"
url = "{database}"
[engine]
mode = "external"
url = "{url}"
model = "policy"
[judge]
timeout_s = 0.4
"""


class JudgesModel:
    """An OpenAI-compatible model that answers -1 with a hint after a moment; it fails sometimes."""

    def __init__(self, seed: int) -> None:
        self.votes = 0
        self.voted = asyncio.Event()
        self._rng = Random(seed)

    async def vote(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        await asyncio.sleep(0.02 * self._rng.random())
        self.votes += 1
        self.voted.set()
        if self._rng.random() < 0.1:
            return web.json_response({"error": {"message": "try later"}}, status=500)
        answer = orjson.dumps({"score": -1, "hint": "Answer in plain sentences."}).decode()
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"id": "c", "model": body["model"], "choices": [choice]})

    async def tokenize(self, _: web.Request) -> web.Response:
        await asyncio.sleep(0.01 * self._rng.random())
        return web.json_response({"tokens": [7, 8, 9], "count": 3, "max_model_len": 4096})


@asynccontextmanager
async def answering(model: JudgesModel) -> AsyncGenerator[str]:
    """The model's address."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.vote)
    app.router.add_post("/tokenize", model.tokenize)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


def spawn(config: Path) -> subprocess.Popen[bytes]:
    """The judge as a process of its own."""
    command = [sys.executable, "-m", "nextstate", "judge", "--config", str(config)]
    with (config.parent / "judge.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


async def judge_through_kills(folder: Path, store: Store, kills: int) -> None:
    """Records turns and kills the judge `kills` times, then lets it finish."""
    rng, turns = Random(kills), 0
    model = JudgesModel(kills)
    async with answering(model) as url:
        config = folder / "nextstate.toml"
        state = folder / "state"
        config.write_text(CONFIG.format(state=state, database=url_of(state), url=url))
        for killed in range(kills + 1):
            more = [a_turn(turns + number) for number in range(TURNS_BETWEEN_KILLS)]
            turns += len(more)
            await asyncio.to_thread(record, store, more)
            process = spawn(config)
            try:
                async with asyncio.timeout(60):
                    if killed == kills:
                        while store.counts().get("judgements/done", 0) < turns:
                            await asyncio.sleep(0.05)
                    for _ in range(rng.randrange(1, 2 * TURNS_BETWEEN_KILLS)):
                        if killed < kills:
                            model.voted.clear()
                            await model.voted.wait()
                await asyncio.sleep(0.03 * rng.random())
            finally:
                process.kill()
                process.wait(60)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
)
def test_a_judge_killed_at_any_moment_leaves_one_verdict_for_each_turn(
    tmp_path: Path, kills: int
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    asyncio.run(judge_through_kills(tmp_path, store, kills))
    turns = (kills + 1) * TURNS_BETWEEN_KILLS
    assert store.database.damage() == []
    assert store.verifying.problems(lambda *_: None) == []
    assert store.counts()["verdicts/-1"] == store.counts()["samples/ready"] == turns
    verdicts = [store.judging.verdict(turn) for turn in store.turns.ids(limit=turns)]
    assert [bool(one and one.hinted_prompt_ids) for one in verdicts] == [True] * turns
    store.close()
