"""`nextstate up --ray` on a real Ray, which is skipped where Ray is not installed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from demo.course import POLICY
from nextstate.app import ray_part
from nextstate.app.engine_access import (
    change_version,
    engine_access,
    engine_file,
    write_engine_file,
)
from nextstate.app.engine_children import check_versions
from nextstate.app.first_file import Answers, file_text
from nextstate.app.ray_part import stay_known
from nextstate.app.ray_stack import RayStack
from nextstate.app.settings import Settings
from nextstate.engine import process as vllm
from nextstate.engine.client import publish
from nextstate.engine.process import free_port
from nextstate.errors import ConfigError, StartError
from nextstate.offline import SWITCHES
from nextstate.private_files import make_state_folder
from nextstate.ray_cluster import TOKEN
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.engine.test_whole import add_version
from tests.postgresql_server import require_server
from tests.rollout.test_nodes import ROOT, environment, needs_ray
from tests.running_loop import UNTRAINED

CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "http://127.0.0.1:{engine}"
model = "{policy}"
served_model_name = "base"
[proxy]
port = {port}
[judge]
kind = "rules"
"""
ALONE = ("unshare", "--net", "--mount")


def write_config(folder: Path, engine: int, **more: str) -> Path:
    file = folder / "nextstate.toml"
    text = CONFIG.format(folder=folder, engine=engine, policy=POLICY, port=free_port())
    for old, new in more.items():
        text = text.replace(old, new)
    file.write_text(text)
    return file


def write_managed(folder: Path, **more: str) -> Path:
    """A configuration whose engines are ours."""
    file = write_config(folder, 1, **more)
    managed = file.read_text().replace('mode = "external"\nurl = "http://127.0.0.1:1"\n', "")
    file.write_text(managed)
    return file


def stand_in(folder: Path) -> str:
    """A scripted engine in the place of vLLM, also for a whole model; the PYTHONPATH for it."""
    program = folder / "stand-in" / "vllm" / "entrypoints" / "openai"
    program.mkdir(parents=True)
    (program / "api_server.py").write_text("from tests.app.stand_in import main\nmain()\n")
    for package in (program, *program.parents[:2]):
        (package / "__init__.py").touch()
    return f"{folder}/stand-in:{ROOT}"


@contextmanager
def engine_running() -> Generator[int]:
    """A scripted engine in a process of its own; the port."""
    port = free_port()
    command = [sys.executable, "-m", "tests.whole.three_machines", "--engine", "127.0.0.1"]
    process = subprocess.Popen([*command, str(port)], cwd=ROOT)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


class Up:
    """A running `nextstate up --ray`."""

    def __init__(
        self,
        config: Path,
        *more: str,
        ray: bool = True,
        program: Sequence[str] = ("-m", "nextstate"),
        **variables: str,
    ) -> None:
        self.config = config
        self.state = config.parent / "state"
        self.log = config.parent / "up.log"
        command = [sys.executable, "-P", *program, "up", "--config", str(config)]
        command += ["--ray"] * ray
        env = {**environment(config.parent), **variables}
        env.pop("OMP_NUM_THREADS", None)  # of the tests' own
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *more], stdout=log, stderr=log, env=env)

    def until(self, condition: Callable[[], Any], within_s: float = 300) -> Any:
        end = time.monotonic() + within_s
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return found

    def wait_ready(self) -> None:
        self.until(lambda: "ready: " in self.log.read_text())

    def answers(self) -> bool:
        """Whether the proxy lets requests through."""
        url = f"http://127.0.0.1:{self.port}/healthz"
        with suppress(OSError), urlopen(url, timeout=5) as answer:
            return json.load(answer)["engine"] == "up"
        return False

    @property
    def port(self) -> str:
        found = re.search(r"^port = (\d+)", self.config.read_text(), re.M)
        assert found is not None
        return found[1]

    def ask(self, text: str = "hi") -> int:
        """The version that answers a request; -1 if it fails."""
        said = {"model": "base", "messages": [{"role": "user", "content": text}]}
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        try:
            with urlopen(Request(url, json.dumps(said).encode(), headers), timeout=130) as reply:
                json.load(reply)
                return int(reply.headers["x-nextstate-version"])
        except OSError:
            return -1

    def engines(self) -> dict[str, psutil.Process]:
        """The engines beneath an actor of this machine, by the folder of their model."""
        found: dict[str, psutil.Process] = {}
        for one in psutil.process_iter(["cmdline"]):
            words: list[str] = one.info["cmdline"] or []
            if "--served-model-name" in words and actor_of(one) is not None:
                found[words[words.index("--model") + 1]] = one
        return found

    def parts(self) -> dict[str, psutil.Process]:
        """The processes of the stages by name, beneath the actors of this machine."""
        found: dict[str, psutil.Process] = {}
        for one in psutil.process_iter(["cmdline"]):
            words: list[str] = one.info["cmdline"] or []
            ours = words[-2:] == ["--config", str(self.config)] and words[3:4] == ["nextstate"]
            if ours and actor_of(one) is not None:
                found[words[4]] = one
        return found

    def back(self, name: str, victim: psutil.Process) -> float:
        """Kills -9; the seconds until the part has another process."""
        before, began = self.parts()[name], time.monotonic()
        victim.kill()
        self.until(lambda: self.parts().get(name, before) != before)
        return time.monotonic() - began

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.log.read_text()


def actor_of(part: psutil.Process) -> psutil.Process | None:
    """The actor that keeps a process; Ray calls it after its class."""
    with suppress(psutil.NoSuchProcess):
        parent = part.parent()
        if parent is not None and parent.name().startswith("ray::Part"):
            return parent
    return None


@needs_ray
@pytest.mark.timeout(900)
def test_parts_run_on_ray_come_back_and_end_with_the_command(tmp_path: Path) -> None:
    with engine_running() as engine:
        up = Up(write_config(tmp_path, engine))
        try:
            up.wait_ready()
            parts: dict[str, psutil.Process] = up.until(lambda: len(p := up.parts()) == 3 and p)
            assert {*parts} == {"proxy", "judge", "learner"}
            names = {name for part in parts.values() for name in part.environ()}
            assert {name for name in names if name.startswith("RAY_")} <= {*SWITCHES}
            assert "OMP_NUM_THREADS" not in names
            assert "--under-ray" in parts["learner"].cmdline()
            actor = actor_of(parts["proxy"])
            assert actor is not None
            for victim in (parts["proxy"], actor):
                print(f"back after {up.back('proxy', victim):.1f} s")  # benchmarks/results/ray.md
            up.until(up.answers)
            states = json.loads((up.state / "children.json").read_text())["children"]
            assert {*states} == {*parts}
        finally:
            up.end()
        assert not up.parts()
        assert not [part for part in parts.values() if part.is_running()]
    for name in ("proxy.key", "children.json"):
        assert not (up.state / name).exists()
    token = up.state / TOKEN
    assert token.stat().st_mode & 0o077 == 0
    assert not (tmp_path / ".ray").exists()
    for file in [up.log, *(up.state / "logs").iterdir()]:
        assert token.read_text() not in file.read_text()


@needs_ray
@pytest.mark.timeout(1200)
def test_whole_models_have_engines_beside_the_actor_of_the_base_and_come_back_with_it(
    tmp_path: Path,
) -> None:
    env = f'{{ CUDA_VISIBLE_DEVICES = "7", PYTHONPATH = "{stand_in(tmp_path)}" }}'
    config = write_managed(
        tmp_path,
        **{
            "[proxy]": f'dtype = "float32"\nenv = {env}\n[proxy]',
            "[judge]": "[learner]\nlora_rank = 0\n[judge]",
        },
    )
    up = Up(config, program=["-c", UNTRAINED])
    settings = Settings.read(up.config)
    try:
        up.wait_ready()
        store = Store(settings.store)
        first, second = (add_version(store, tmp_path, n, VersionState.RETIRED) for n in (1, 2))
        one, two = str(first.path), str(second.path)
        until, answered = threading.Event(), list[int]()

        def ask() -> None:
            while not until.is_set():
                answered.append(up.ask(f"{len(answered)} {threading.get_ident()}"))

        def serve(version: PolicyVersion) -> None:
            asyncio.run(change_version(settings, publish, store, version))
            up.until(lambda: up.ask() == version.number)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        serve(first)
        serve(second)
        began = up.engines()
        assert {*began} == {str(POLICY), one, two}
        assert {actor_of(engine) for engine in began.values()} == {actor_of(began[one])}
        assert not [e for e in began.values() if e.environ().get("CUDA_VISIBLE_DEVICES") == "7"]
        serve(first)  # its engine still lives
        assert up.engines() == began
        until.set()
        for thread in asking:
            thread.join()
        assert {*answered} == {0, 1, 2}
        told = json.loads((up.state / "children.json").read_text())["children"]
        assert told["engine-v000001"] == told["engine-v000002"] == told["engine"] == "up"
        actor = actor_of(began[one])
        assert actor is not None
        actor.kill()
        up.until(lambda: one in (now := up.engines()) and now[one] != began[one])
        up.until(lambda: up.ask() == 1)
        assert not [engine for engine in began.values() if engine.is_running()]
        began = up.engines()
        (state_file,) = (file for file in (up.state / "engines").iterdir())
        assert first.adapter_name == state_file.stem
        store.close()
    finally:
        up.end()
    assert not [
        engine for engine in [*up.engines().values(), *began.values()] if engine.is_running()
    ]


@needs_ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("cut_s", "rank"),
    [
        (0, 16),
        pytest.param(120, 16, marks=pytest.mark.soak),
        pytest.param(120, 0, marks=pytest.mark.soak),
    ],
)
def test_parts_of_a_node_that_is_cut_off_go_to_another_one_and_end_there(
    tmp_path: Path, cut_s: float, rank: int
) -> None:
    require_server()
    if os.geteuid() or subprocess.run([*ALONE, "ip", "link"], check=False).returncode:
        pytest.skip("network namespaces beside a PostgreSQL need root")
    ended = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.app.three_nodes", *map(str, (tmp_path, cut_s, rank))],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert "it has another token than" in found.pop("wrong token")
    assert "the cluster has 3 nodes" in found.pop("a file")
    print(found)  # benchmarks/results/ray.md
    version = ["version"] * (rank == 0)
    assert found["parts"] == ["engine", "judge", "learner", "proxy", *version]
    assert found["where it was"]
    assert found["same after a short cut"]
    assert found["versions"] == [int(rank == 0)]
    assert (found["lost"], found["twice"], found["verified"]) == ([], [], "ok")
    assert found["asked"] >= found["turns"] >= found["answered"] >= 6
    assert found["back there"] == []
    assert (found["up"], found["left"], found["told"]) == (0, [], [])
    if cut_s:
        assert found["cut for s"] >= cut_s
        assert found["judged"]


def test_an_actor_ends_once_the_engine_file_names_an_engine_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.read(write_managed(tmp_path))
    own, other = "http://10.0.0.1:1", "http://10.0.0.2:1"
    looks, ended = asyncio.Semaphore(0), list[int]()

    def looked(settings: Settings) -> tuple[list[str], str | None]:
        looks.release()
        return engine_access(settings)

    async def run() -> None:
        watching = asyncio.create_task(stay_known(settings, "engine", own))
        for urls in ([own], None, [own]):
            if urls is None:
                engine_file(settings).unlink()
            else:
                write_engine_file(settings, urls, "key")
            await looks.acquire()
            await looks.acquire()
        assert (ended, watching.done()) == ([], False)
        write_engine_file(settings, [other], "key")
        await watching

    make_state_folder(settings.store.path)
    monkeypatch.setattr(ray_part, "_LOOK_S", 0.01)
    monkeypatch.setattr(ray_part, "engine_access", looked)
    monkeypatch.setattr(os, "_exit", ended.append)
    asyncio.run(run())
    assert ended == [1]


class Cluster:
    """What the plan of a cluster asks Ray for."""

    def __init__(self, nodes: int, **resources: float) -> None:
        self._nodes, self._resources = nodes, resources
        self.util = self

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}] * self._nodes + [{"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def get_node_ip_address(self) -> str:
        return "10.0.0.1"


@pytest.mark.parametrize(
    ("nodes", "old", "new", "message"),
    [
        (2, "", "", "the cluster has 2 nodes, and \\[store\\] url = '' is a file of one machine"),
        (2, "[engine]", 'url = "postgresql://db/x"\n[engine]', 'set "0.0.0.0"'),
        (2, 'dir = "/', 'url = "postgresql://db/x"\ndir = "', "name the whole path of a folder"),
    ],
)
def test_what_does_not_go_with_a_cluster_is_refused(
    tmp_path: Path, nodes: int, old: str, new: str, message: str
) -> None:
    file = write_managed(tmp_path, **({old: new} if old else {}))
    stack = RayStack(Settings.read(file), Cluster(nodes))
    with pytest.raises(ConfigError, match=message):
        stack.check()


def test_the_file_that_up_writes_for_several_gpus_works_and_the_gpus_are_those_of_ray(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    file = tmp_path / "nextstate.toml"
    text = file_text(Answers(model=str(POLICY)), ["0", "1"])
    assert 'env = { CUDA_VISIBLE_DEVICES = "1" }' in text
    file.write_text(re.sub(r"^dir = .*", f'dir = "{tmp_path}/state"', text, flags=re.M))
    RayStack(Settings.read(file), Cluster(1)).check()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("[engine] env: CUDA_VISIBLE_DEVICES = '1' is left out")
    engine = Settings.read(file).engine
    assert vllm.without_gpus(engine).env == {}
    # Of the learner that Ray gave the GPU 1 of another machine.
    assert vllm.gpu_share(vllm.on_other_gpus(engine), {"CUDA_VISIBLE_DEVICES": "1"}) == 0


def test_whole_models_are_refused_where_their_engines_would_not_fit_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_managed(tmp_path, **{"[judge]": "[learner]\nlora_rank = 0\n[judge]"})
    RayStack(Settings.read(file), Cluster(1)).check()
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    for env in ("", 'env = { CUDA_VISIBLE_DEVICES = "1" }\n'):
        file.write_text(file.read_text().replace("[proxy]", f"{env}[proxy]"))
        with pytest.raises(StartError, match=r"each takes 0\.92 of its GPU"):
            RayStack(Settings.read(file), Cluster(1)).check()
        with pytest.raises(StartError, match=r"each takes 0\.92 of its GPU"):
            check_versions(Settings.read(file))


def test_a_part_goes_where_its_name_is_and_gets_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    file = write_managed(tmp_path)
    text = file.read_text()
    more = 'args = ["--tensor-parallel-size", "2"]\nreplicas = 2\n[proxy]'
    file.write_text(text.replace("[proxy]", more) + "[learner]\nranks = 4\n")
    stack = RayStack(Settings.read(file), Cluster(1, **{"nextstate-engine": 1.0}))
    placed = stack.placed()
    assert {*placed} == {"proxy", "judge", "learner", "engine-0", "engine-1"}
    assert {name: needs.get("GPU", 0) for name, needs in placed.items()} == {
        **dict.fromkeys(("proxy", "judge"), 0),
        **{"learner": 4, "engine-0": 2, "engine-1": 2},
    }
    named = [name for name, needs in placed.items() if "nextstate-engine" in needs]
    assert named == ["engine-0", "engine-1"]
    assert all("node:10.0.0.1" in needs for needs in placed.values())  # the store is a file
