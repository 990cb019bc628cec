"""Episodes on the nodes of a real Ray, which is skipped where Ray is not installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from aiohttp.test_utils import TestServer

from nextstate import ray_cluster
from nextstate.config import StoreConfig
from nextstate.episodes import EpisodeState, EpisodeStatus, Split
from nextstate.errors import StartError
from nextstate.store import Store
from rollout import nodes
from rollout.proxy import Opened
from rollout.tasks import Task
from tests.proxy.running_proxy import running
from tests.rollout.coins import Holding, arguments, lines
from tests.rollout.machine import every_episode
from tests.scripted_engine import MODEL

ROOT = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: make ray"
)
needs_networks = pytest.mark.skipif(
    subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs network namespaces: unshare -rn",
)
CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "http://127.0.0.1:1"
model = "{model}"
[proxy]
port = {port}
"""


def environment(folder: Path) -> dict[str, str]:
    """Of a runner that has no token of Ray from elsewhere."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**others, "PYTHONPATH": str(ROOT), "HOME": str(folder), "PYTHONWARNINGS": "default"}


def kill_the_actor() -> None:
    """Kills -9 what plays: Ray calls the process after its class."""
    here = psutil.Process().children(recursive=True)
    (actor,) = [one for one in here if one.name().startswith("ray::Actor")]
    actor.kill()


def check_that_each_place_counts_once(store: Store, groups: int, lost: int) -> None:
    """Each group of two has two whole episodes, one for each place, beside those that were lost."""
    episodes = every_episode(store)
    whole = [one for one in episodes if one.status is EpisodeStatus.DONE]
    assert len(whole) == 2 * groups
    assert {*Counter(one.group for one in whole).values()} == {2}
    assert len({one.id.partition("~")[0] for one in whole}) == len(whole)
    for one in whole:
        assert (one.outcome, one.calls, len(store.episodes.turn_ids(one.id))) == (1.0, 2, 2)
    others = [one for one in episodes if one.status is not EpisodeStatus.DONE]
    assert {one.status for one in others} == {EpisodeStatus.ABORTED}
    assert {one.state for one in others} <= {EpisodeState.CLOSED, EpisodeState.DROPPED}
    assert len(others) >= lost


@needs_ray
@pytest.mark.timeout(900)
def test_the_episodes_of_a_killed_actor_are_run_again_and_none_counts_twice(
    store: Store, tmp_path: Path
) -> None:
    async def test() -> str:
        engine = Holding(waiting=4)
        engine.acts = [kill_the_actor, kill_the_actor]
        server = engine.server = TestServer(engine.app())
        await server.start_server()
        async with running(engine.url, store, tmp_path) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            config, tasks = tmp_path / "nextstate.toml", tmp_path / "tasks.jsonl"
            port = p.url.rpartition(":")[2]
            config.write_text(CONFIG.format(folder=tmp_path, model=MODEL, port=port))
            tasks.write_text(lines(8))
            more = arguments(tasks, "--ray", "--config", str(config))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "nextstate", *more),
                stdout=subprocess.PIPE,
                env=environment(tmp_path),
            )
            told, _ = await process.communicate()
            assert process.returncode == 0
            assert not engine.acts
        await server.close()
        return told.decode()

    told = [json.loads(line) for line in asyncio.run(test()).splitlines()]
    assert len(told) == 16
    assert {(one["status"], one["outcome"], one["calls"]) for one in told} == {("done", 1.0, 2)}
    assert {one["episode"] for one in told} >= {"night-7-0", "night-7-1"}
    check_that_each_place_counts_once(store, groups=8, lost=8)
    token = tmp_path / "state" / ray_cluster.TOKEN
    assert token.stat().st_mode & 0o077 == 0
    assert len(token.read_text()) == 64
    assert not (tmp_path / ".ray").exists()


@needs_ray
@needs_networks
@pytest.mark.timeout(1200)
def test_the_episodes_of_a_machine_that_is_gone_are_run_again_on_the_other(tmp_path: Path) -> None:
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    command += [sys.executable, "-m", "tests.rollout.two_machines", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["runner"] == 0
    assert found["calls from there"] >= 2
    assert "it has another token than" in found["with another token"]
    assert "runs anybody's code" in found["an open cluster"]
    with closing(Store(StoreConfig(dir=str(tmp_path / "state")))) as store:
        check_that_each_place_counts_once(store, groups=found["groups"], lost=1)


class _Lost(Exception):
    pass


class _Remote:
    """A method of an actor, called as Ray calls it."""

    def __init__(self, method: Callable[..., Awaitable[None]]) -> None:
        self.remote = method


def _node(play: Callable[..., Awaitable[None]], stop: Callable[..., Awaitable[None]]) -> Any:
    actor = SimpleNamespace(play=_Remote(play), stop=_Remote(stop))
    return nodes._Node("10.0.0.1", actor, ready=True)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("answers", [True, False])
def test_an_episode_that_does_not_end_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Its node plays on, unless it cannot end that episode either."""
    monkeypatch.setattr(nodes, "_EXTRA_S", 0.0)
    monkeypatch.setattr(nodes, "_STOP_S", 0.01)
    stopped: list[str] = []
    killed: list[Any] = []
    opened = [Opened(name, EpisodeState.OPEN, "", "") for name in ("a", "b")]

    class Proxy:
        async def ended(self, one: Opened, status: EpisodeStatus) -> dict[str, Any]:
            if one.episode == "b":
                return {"status": "done", "outcome": 1.0, "calls": 1}
            return {"status": status, "outcome": None, "calls": 1}

    async def play(one: Opened, *_: object) -> None:
        if one.episode == "a":
            await asyncio.Event().wait()

    async def stop(episode: str) -> None:
        stopped.append(episode)
        if not answers:
            await asyncio.Event().wait()

    async def test() -> None:
        ray: Any = SimpleNamespace(
            exceptions=SimpleNamespace(RayError=_Lost), kill=lambda actor, **_: killed.append(actor)
        )
        work: Any = SimpleNamespace(deadline_s=0.01)
        cluster: Any = nodes.Nodes(ray, work, Proxy())  # pyright: ignore[reportArgumentType]
        node = cluster._nodes["n"] = _node(play, stop)
        cluster._tasks.add(asyncio.current_task())
        task = Task("t", Split.TRAIN, {})
        lost, whole = await asyncio.gather(*(cluster.play(one, task, 0) for one in opened))
        assert (lost.status, whole.status) == ("aborted", "done")
        assert stopped == ["a"]
        assert (cluster._nodes == {"n": node}) is answers
        assert bool(killed) is not answers

    asyncio.run(test())


def test_an_actor_ends_one_episode_and_plays_the_others() -> None:
    ended: list[str] = []
    gate = asyncio.Event()

    class Plays:
        async def play(self, one: Opened, *_: object) -> None:
            try:
                await gate.wait()
            finally:
                ended.append(one.episode)

    async def test() -> None:
        actor: Any = nodes.Actor(None)  # pyright: ignore[reportArgumentType]
        actor._here = Plays()
        opened = [Opened(name, EpisodeState.OPEN, "", "") for name in ("a", "b")]
        playing = [asyncio.ensure_future(actor.play(one, None, 0)) for one in opened]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await actor.stop("a")
        await actor.stop("none")
        assert ended == ["a"]
        gate.set()
        await asyncio.gather(*playing)
        assert ended == ["a", "b"]

    asyncio.run(test())


def test_without_ray_the_option_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StartError, match="run `make ray`"):
        ray_cluster.connect("", tmp_path)


def test_an_address_that_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    for address in ("terminal", "10.0.0.1", "ray://x:1/y", "a b:1"):
        with pytest.raises(StartError, match="expected HOST:PORT"):
            ray_cluster.connect(address, tmp_path)


@pytest.mark.parametrize("arguments", [["status"], ["rollout", "nothing", "--tasks", "none"]])
def test_nothing_imports_ray_that_was_not_asked_to(tmp_path: Path, arguments: list[str]) -> None:
    code = "import sys; from nextstate.app.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: assert 'ray' not in sys.modules; print('well')"
    command = [sys.executable, "-c", code, *arguments, "--config", str(tmp_path / "none.toml")]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert "well" in ended.stdout, ended.stderr
