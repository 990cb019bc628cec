"""`nextstate up --ray` on a real Ray, which is skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest

from demo.course import POLICY
from nextstate.engine.process import free_port
from nextstate.ray_cluster import TOKEN
from tests.rollout.test_nodes import ROOT, environment, needs_ray

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
BACK_S = 5.0


def write_config(folder: Path, engine: int, **more: str) -> Path:
    file = folder / "nextstate.toml"
    text = CONFIG.format(folder=folder, engine=engine, policy=POLICY, port=free_port())
    for old, new in more.items():
        text = text.replace(old, new)
    file.write_text(text)
    return file


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

    def __init__(self, config: Path, *more: str, **variables: str) -> None:
        self.config = config
        self.state = config.parent / "state"
        self.log = config.parent / "up.log"
        command = [sys.executable, "-P", "-m", "nextstate", "up", "--config", str(config), "--ray"]
        env = {**environment(config.parent), **variables}
        del env["OMP_NUM_THREADS"]  # of the tests' own
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
        port = re.search(r"^port = (\d+)", self.config.read_text(), re.M)
        assert port is not None
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port[1]}/healthz", timeout=5) as answer:
            return json.load(answer)["engine"] == "up"
        return False

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
            assert not [name for name in names if name.startswith("RAY_")]
            assert "OMP_NUM_THREADS" not in names
            actor = actor_of(parts["proxy"])
            assert actor is not None
            took = [up.back("proxy", parts["proxy"]), up.back("proxy", actor)]
            # On an idle machine both are back within 5 s; the tests' machine may be busy.
            assert max(took) <= BACK_S * max(1.0, os.getloadavg()[0] / 2), took
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
