"""Starts `nextstate up` with the demo's policy; all tests of a run share it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from demo.course import MODEL, POLICY
from demo.talk import Talk, client_for
from demo.tasks import Domain
from demo.world import persona_world
from nextstate.app.cli import main

NEXTSTATE = (sys.executable, "-P", "-m", "nextstate")
UNTRAINED = """
import sys
from nextstate.__main__ import main
from nextstate.app import stack
stack.STAGES = ("rollout", "proxy", "judge")
sys.exit(main())
"""
"""`nextstate up` without its learner, which takes as much of the CPU to start as vLLM does."""
_IN_ONE_PROCESS = ("--distributed-executor-backend", "uni")
"""vLLM computes in its engine's process: half the CPU time a request, and none while it is idle."""
_ARGS = (
    *("--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    "--enable-prompt-tokens-details",
)
_CONFIG = """
[store]
dir = "{dir}/state"
[engine]
model = "{policy}"
served_model_name = "{model}"
dtype = "float32"
max_model_len = {context}
args = [{args}]
env = {{ TORCHDYNAMO_DISABLE = "1", VLLM_CPU_KVCACHE_SPACE = "1", \
OMP_NUM_THREADS = "1", VLLM_CPU_OMP_THREADS_BIND = "nobind", VLLM_ENABLE_V1_MULTIPROCESSING = "0" }}
[proxy]
port = {port}
[judge]
kind = "rules"
[learner]
learning_rate = 1e-3
gradient_checkpointing = false
threads = 1
"""


def write_config(
    folder: Path,
    *,
    port: int,
    args: tuple[str, ...] = _ARGS,
    policy: Path = POLICY,
    context: int = 1024,
) -> Path:
    file = folder / "nextstate.toml"
    quoted = ", ".join(f'"{arg}"' for arg in (*args, *_IN_ONE_PROCESS))
    values = {"dir": folder, "policy": policy, "model": MODEL, "port": port, "context": context}
    file.write_text(_CONFIG.format(args=quoted, **values))
    return file


@dataclass(frozen=True)
class Engine:
    """A running vLLM and its proxy."""

    url: str
    proxy_url: str
    model: str
    key: str
    """vLLM's API key; only `/health` answers without it."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request that goes to vLLM directly."""
        return {"Authorization": f"Bearer {self.key}"}


class Loop:
    """A running `nextstate up`."""

    def __init__(self, config: Path, port: int, *, trains: bool = True) -> None:
        self.config = config
        self.port = port
        self.state = config.parent / "state"
        self.output = (config.parent / "up.log").open("w+")
        self.process = subprocess.Popen(
            [*program(trains), "up", "--config", str(config)],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            cwd=config.parent,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self, within_s: float = 300) -> None:
        wait_for(lambda: "ready: " in self.log() or self.process.poll() is not None, within_s)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text()

    def engine(self) -> Engine:
        """Its vLLM, which listens on another port after a restart."""
        state = json.loads((self.state / "engine.json").read_text())
        return Engine(state["url"], self.url, MODEL, state["key"])

    def close(self) -> None:
        """Ends the process, unless a test has ended it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.output.close()

    def command(self, *arguments: str) -> str:
        """What a command prints; it runs in this process."""
        with redirect_stdout(io.StringIO()) as printed:
            assert main([*arguments, "--config", str(self.config)]) == 0
        return printed.getvalue()

    def versions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.command("versions", "--json").splitlines()]

    def turns(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.command("turns", "--json").splitlines()]

    def part(self, name: str) -> psutil.Process:
        """The process of a stage or of vLLM's server."""
        wanted = "vllm.entrypoints.openai.api_server" if name == "engine" else name
        for child in psutil.Process(self.process.pid).children():
            if wanted in child.cmdline():
                return child
        raise AssertionError(f"no process for {name}")

    def talk_until(self, version: int, seed: int, within_s: float = 240) -> int:
        """Lets personas talk until `version` serves; returns how many requests failed."""
        return asyncio.run(asyncio.wait_for(self._talk_until(version, seed), within_s))

    async def _talk_until(self, version: int, seed: int) -> int:
        async with client_for(f"{self.url}/v1") as client, aiohttp.ClientSession(self.url) as http:
            talk = Talk(client, MODEL, persona_world(Domain.STUDENT, seed), parallel=6)
            talking = asyncio.create_task(talk.run())
            while await serving(http) < version:
                assert not talking.done()
                await asyncio.sleep(0.1)
            talk.pause()
            await asyncio.sleep(0)
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)
            return talk.talked.failed


def program(trains: bool) -> tuple[str, ...]:
    """What runs our commands."""
    return NEXTSTATE if trains else (sys.executable, "-P", "-c", UNTRAINED)


def run(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 240, trains: bool = True
) -> subprocess.CompletedProcess[str]:
    # Some tests import vLLM, which sets environment variables.
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return subprocess.run(
        [*program(trains), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=cwd,
        env=env,
    )


def wait_for(condition: Callable[[], object], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


async def serving(http: aiohttp.ClientSession) -> int:
    async with http.get("/healthz") as answer:
        return int((await answer.json())["version"])
