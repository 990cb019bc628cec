"""Runner, proxy, judge and learner killed within groups: no episode is half, none trains twice.

Each runs as a process of its own; only the engine is scripted. A kill hits one of the four at a
moment that a seed and the scheduler choose, and it is started again at once. In the end the runner
stops, and what it has played is settled and trained.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.episodes import EpisodeState, EpisodeStatus
from nextstate.store import Store
from tests.learner.test_tiny_model import load_float64, logprobs, save_tiny_model
from tests.rollout.machine import every_episode
from tests.scripted_engine import MODEL, Script, ScriptedEngine

ROOT = Path(__file__).parents[2]
STAGES = ("rollout", "proxy", "judge", "learner")
RIGHT, WRONG = (10, 11), (20, 21, 22)
CONFIG = """
[store]
dir = "{state}"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
served_model_name = "{served}"
[proxy]
port = {port}
[judge]
kind = "outcome"
[learner]
method = "binary"
batch_size = 16
drift_limit = 1000
lora_rank = 4
threads = 1
device = "cpu"
[rollout]
environment = "coins:create"
parallel = 4
"""
COINS = '''
from nextstate.hooks import Acted, Scored

class Coin:
    """Two steps; the last reply decides."""
    async def reset(self, task, seed):
        self.steps, self.right = 0, False
        return f"Coin {seed}?"
    async def step(self, action):
        self.steps, self.right = self.steps + 1, "right" in action
        return Acted("Once more.", None, self.steps == 2)
    async def score(self):
        return Scored(float(self.right))
    async def close(self):
        pass

class Coins:
    def check_task(self, task):
        pass
    async def check_machine(self):
        pass
    def make(self):
        return Coin()
    def generate(self, split, number):
        return {"id": f"{split}-{number}", "split": split}

def create(settings):
    return Coins()
'''


class Tossing(ScriptedEngine):
    """Answers right or wrong by chance, after a moment, with the base's own log-probs."""

    def __init__(self, model_path: str, seed: int) -> None:
        super().__init__()
        base = load_float64(model_path)
        with torch.no_grad():
            self._scripts = [
                Script(words, tokens=list(zip(ids, map(float, found), strict=True)))
                for words, ids, found in (
                    (words, ids, logprobs(base, (1, 2, 3), ids))
                    for words, ids in ((("right", "."), RIGHT), (("wrong", ".", "."), WRONG))
                )
            ]
        self._rng = Random(seed)
        self.replies = 0
        self.replied = asyncio.Event()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.05 * self._rng.random())
        self.script = self._rng.choice(self._scripts)
        self.replies += 1
        self.replied.set()
        return await super()._chat(request)


class Processes:
    """The four stages."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, stage: str) -> None:
        command = [sys.executable, "-P", "-m", "nextstate", stage, "--config", str(self._config)]
        path = f"{ROOT}:{self._config.parent}"
        with (self._config.parent / f"{stage}.log").open("ab") as log:
            self._running[stage] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
            )

    def kill(self, stage: str) -> None:
        self._running[stage].kill()
        self._running[stage].wait(30)

    def end(self, stage: str) -> None:
        self._running[stage].terminate()
        self._running[stage].wait(60)

    def keep(self) -> None:
        """Starts again what has ended by itself, as a supervisor does."""
        for stage, process in self._running.items():
            if process.poll() is not None:
                self.start(stage)


async def live_through(folder: Path, model_path: str, store: Store, kills: int) -> None:
    engine, rng = Tossing(model_path, kills), Random(kills)
    server = engine.server = TestServer(engine.app())
    await server.start_server()
    (folder / "coins.py").write_text(COINS)
    config = folder / "nextstate.toml"
    config.write_text(
        CONFIG.format(
            state=folder / "state",
            engine=engine.url,
            model=model_path,
            served=MODEL,
            port=free_port(),
        )
    )
    processes = Processes(config)
    try:
        for stage in STAGES:
            processes.start(stage)
        for killed in range(kills):
            for _ in range(rng.randrange(20, 60)):
                engine.replied.clear()
                await asyncio.wait_for(engine.replied.wait(), 120)
            victim = STAGES[killed % len(STAGES)]
            processes.kill(victim)
            processes.start(victim)
            processes.keep()
        async with asyncio.timeout(400):  # the learner imports torch at its start
            while not store.versions.all("main") or not any(
                one.group for one in every_episode(store)
            ):
                processes.keep()
                await asyncio.sleep(0.5)
        processes.end("rollout")
        for one in every_episode(store):  # opened, and not begun
            if one.state is EpisodeState.OPEN:
                store.episodes.close(one.id, EpisodeStatus.ABORTED, None, None)
        async with asyncio.timeout(300):  # a minute for groups that the stop has left with gaps
            while store.groups.unsettled():
                await asyncio.sleep(0.5)
        for stage in STAGES[1:]:
            processes.end(stage)
    finally:
        for stage in STAGES:
            processes.kill(stage)
        await server.close()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kills", [4, pytest.param(40, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_no_episode_is_half_and_none_trains_twice_whatever_is_killed(
    tmp_path: Path, kills: int
) -> None:
    model_path = save_tiny_model(tmp_path / "model")
    with closing(Store(StoreConfig(dir=str(tmp_path / "state")))) as store:
        asyncio.run(live_through(tmp_path, model_path, store, kills))
        episodes = every_episode(store)
        trained = [one for one in episodes if (one.group or "").startswith("train.")]
        assert {one.state for one in trained} <= {EpisodeState.SETTLED, EpisodeState.DROPPED}
        # What counts has been played to its end: two steps, each of which is one turn.
        whole = [one for one in trained if one.state is EpisodeState.SETTLED]
        assert whole
        for one in whole:
            assert (one.status, one.calls) == (EpisodeStatus.DONE, 2)
            assert len(store.episodes.turn_ids(one.id)) == 2
            assert one.outcome in (0.0, 1.0)
        seeds = [(one.group, one.seed) for one in trained]
        assert len({*seeds}) == len({seed for _, seed in seeds}) == len({g for g, _ in seeds})
        ids = [one.id.partition("~")[0] for one in whole]
        assert len({*ids}) == len(ids)  # one counts for each place of a group
    file = sqlite3.connect(tmp_path / "state" / "nextstate.sqlite3")
    with closing(file):
        (doubles,) = file.execute(
            "SELECT count(*) FROM (SELECT turn FROM samples GROUP BY turn HAVING count(*) > 1)"
        ).fetchone()
        (half,) = file.execute(
            "SELECT count(*) FROM samples JOIN turns ON turns.id = samples.turn "
            "JOIN episodes ON episodes.id = turns.episode "
            "WHERE samples.state IN ('ready', 'trained') AND episodes.state != 'settled'"
        ).fetchone()
        used = file.execute(
            "SELECT trained_in, count(*) FROM samples WHERE state = 'trained' GROUP BY 1"
        ).fetchall()
        versions = dict(file.execute("SELECT number, samples FROM versions"))
    assert (doubles, half) == (0, 0)
    assert used
    assert all(versions[number] == count for number, count in used)
