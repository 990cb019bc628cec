"""Two network namespaces as two machines: one of them is killed while it plays.

    unshare --user --map-root-user --net --mount python -m tests.rollout.two_machines FOLDER

The proxy, the head of Ray and the runner are on this one. Prints what it saw as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from aiohttp.test_utils import TestServer

from nextstate.engine.process import free_port
from nextstate.ray_cluster import TOKEN
from tests.rollout.coins import Holding, arguments, lines
from tests.scripted_engine import MODEL

HERE, THERE, PORT, OPEN_PORT = "10.77.0.1", "10.77.0.2", 6379, 6390
GROUPS = 60
CONFIG = """
[store]
dir = "{state}"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
[proxy]
host = "0.0.0.0"
port = {port}
api_key_env = "KEY"
"""
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
RAY += ["--num-cpus=1", "--object-store-memory=80000000"]
HEAD = ["--head", "--include-dashboard=false", f"--node-ip-address={HERE}", "--block"]


def start(command: list[str], log: IO[bytes], **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **variables})


class Other:
    """The other machine: its processes, its network and its own folder of Ray end at once."""

    def __init__(self, folder: Path, said: Path) -> None:
        own = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        code = f"mount -t tmpfs none {folder} && echo ready && read line && "
        code += f"ip link set lo up && ip address add {THERE}/24 dev there && ip link set there up"
        join = f"{' '.join(RAY)} --address={HERE}:{PORT} --node-ip-address={THERE} --block"
        code += f" && for _ in {{1..20}}; do {join} 1>&2 && break; done"
        with said.open("wb") as log:
            self._process = subprocess.Popen(
                [*own, "bash", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        assert self._process.stdout.readline() == b"ready\n"
        found = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        inner = found.split()[0]
        self.name = os.readlink(f"/proc/{inner}/ns/net")
        ip("link add here type veth peer name there")
        ip(f"link set there netns {inner}")
        ip(f"address add {HERE}/32 dev lo")  # it stays when the link goes with the other machine
        ip(f"address add {HERE}/24 dev here")
        ip("link set here up")

    def join(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


async def up(log: Path, again: Callable[[], None]) -> None:
    """Waits until Ray has started; `again` is called meanwhile."""
    async with asyncio.timeout(600):
        while b"Ray runtime started" not in await asyncio.to_thread(log.read_bytes):
            await asyncio.sleep(0.5)
            again()


async def runner(config: Path, *more: str, **variables: str) -> tuple[int | None, str]:
    """The exit code of a runner on the cluster, and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "nextstate"),
        *arguments(config.parent / "tasks.jsonl", "--config", str(config), *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **variables},
    )
    told = (await process.communicate())[1].decode()
    (config.parent / f"runner-{process.pid}.log").write_text(told)
    return process.returncode, told


async def play(folder: Path) -> dict[str, object]:
    ip("link set lo up")
    state = folder / "state"
    state.mkdir(mode=0o700)
    rays = Path(tempfile.mkdtemp(prefix="ray"))  # Ray's sockets need a short path
    token = state / TOKEN
    token.write_text("01" * 32)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "KEY": secrets.token_hex(32),
    }
    os.environ["PYTHONUNBUFFERED"] = "1"
    # The other machine does not say that it ends: Ray notices after ten seconds, not a minute.
    os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
    other = Other(rays, folder / "there.log")
    engine = Holding(waiting=4, where=other.name, patience_s=0.5)
    engine.acts = [other.kill]
    server = engine.server = TestServer(engine.app())
    await server.start_server()
    config, port = folder / "nextstate.toml", free_port()
    config.write_text(CONFIG.format(state=state, engine=engine.url, model=MODEL, port=port))
    (folder / "tasks.jsonl").write_text(lines(GROUPS))
    log = (folder / "proxy.log").open("wb")
    proxy = [sys.executable, "-P", "-m", "nextstate", "proxy", "--config", str(config)]
    children = [start(proxy, log)]
    try:
        head = [*RAY, *HEAD, f"--temp-dir={rays}", f"--port={PORT}"]
        children.append(start(head, log))

        def again() -> None:
            if children[-1].poll() is not None:  # on a busy machine Ray gives up after 30 s
                children[-1] = start(head, log)

        await up(folder / "proxy.log", again)
        other.join()
        await up(folder / "there.log", lambda: None)
        found: dict[str, object] = {"groups": GROUPS}
        wrong = folder / "wrong"
        wrong.write_text("02" * 32)
        where = ("--ray", f"{HERE}:{PORT}")
        found["with another token"] = (
            await runner(config, *where, RAY_AUTH_TOKEN_PATH=str(wrong))
        )[1]
        found["runner"], _ = await runner(config, *where)
        found["calls from there"] = sum(other.name in json.dumps(one) for one in engine.requests)
        unsafe = [*RAY, *HEAD, f"--temp-dir={rays / 'o'}", f"--port={OPEN_PORT}"]
        open_log = folder / "open.log"
        with open_log.open("wb") as said:
            children.append(start(unsafe, said, RAY_AUTH_MODE="disabled"))
        await up(open_log, lambda: None)
        deadline = time.monotonic() + 300
        while "no head" in (told := (await runner(config, "--ray", f"{HERE}:{OPEN_PORT}"))[1]):
            assert time.monotonic() < deadline, told
        found["an open cluster"] = told
        return found
    finally:
        other.kill()
        for child in children:
            child.terminate()
        for child in children:
            child.wait(60)
        await server.close()
        shutil.rmtree(rays, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(play(Path(sys.argv[1])))))
