"""The measured servers as child processes: the mock engine and each server before it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import orjson
import psutil

from benchmarks.client import HOST, connect
from benchmarks.mock_engine import MODEL
from nextstate.engine.process import free_port

DIRECT, BARE, NGINX, LITELLM, OURS = "direct", "bare relay", "nginx", "LiteLLM", "NextState"
RLLM, CAPTURE = "rLLM gateway", "OpenEnv capture"
POSTGRESQL = "NextState on PostgreSQL"
START_TIMEOUT_S = 300.0
_OURS = """\
[store]
dir = "{folder}/state-{port}"
url = "{database}"
[engine]
mode = "external"
url = "http://{host}:{engine}"
model = "{model}"
[proxy]
port = {port}
"""
_NGINX = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  client_body_buffer_size 1m;
  keepalive_requests 1000000;
  upstream engine {{ server {host}:{engine}; keepalive 512; keepalive_requests 1000000; }}
  server {{
    listen {host}:{port} backlog=1024;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""
_LITELLM = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: openai/{model}
      api_base: http://{host}:{engine}/v1
      api_key: none
general_settings:
  dangerously_permit_weak_or_unset_master_key: true  # loopback, for minutes, without a real key
"""
_CAPTURE = """
import sys
import uvicorn
from openenv.core.harness.capture.server import create_app
engine, model, host, port = sys.argv[1:]
app = create_app(llm_url=engine, model=model, require_registered=False)  # it answers `_WARM`
uvicorn.run(app, host=host, port=int(port), log_level="warning")
"""
"""Its own command takes only registered keys, and every address of the machine."""
_WARM = orjson.dumps(
    {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Are you there?"}]}
)


@dataclass(frozen=True, slots=True)
class Server:
    """A child process that answers chat requests."""

    name: str
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far, with its own children."""
        used = [process.cpu_times() for process in self._all()]
        return sum(times.user + times.system for times in used)

    def rss_mb(self) -> float:
        """Resident memory in MB, with its own children."""
        return sum(process.memory_info().rss for process in self._all()) / 1e6

    def _all(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def add_nginx(parser: ArgumentParser) -> None:
    """The option that names nginx."""
    parser.add_argument(
        "--nginx",
        default=which("nginx"),
        metavar="FILE",
        help="nginx's executable (default: the one on PATH; left out without one)",
    )


@contextmanager
def running(
    nginx: str | None = None,
    litellm: Path | None = None,
    rllm: Path | None = None,
    capture: Path | None = None,
    *,
    bare: bool = True,
    postgresql: str | None = None,
) -> Generator[Mapping[str, Server]]:
    """The servers by name, the mock engine as `direct`; they end with the block.

    `postgresql` is the URL of a database for one more of ours.
    """
    with tempfile.TemporaryDirectory(prefix="nextstate-bench-") as name:
        folder = Path(name)
        names = (DIRECT, BARE, NGINX, LITELLM, RLLM, CAPTURE, OURS, POSTGRESQL)
        ports = {name: free_port() for name in names}
        commands = _commands(folder, ports, nginx, litellm, postgresql)
        if not bare:
            del commands[BARE]
        if rllm is not None:
            commands[RLLM] = [
                *(str(rllm / "bin" / "rllm-model-gateway"), "--host", HOST),
                *("--port", str(ports[RLLM]), "--db-path", str(folder / "rllm.sqlite3")),
                *("--worker", f"http://{HOST}:{ports[DIRECT]}/v1", "--log-level", "warning"),
            ]
        if capture is not None:
            where = (f"http://{HOST}:{ports[DIRECT]}/v1", MODEL, HOST, str(ports[CAPTURE]))
            commands[CAPTURE] = [str(capture / "bin" / "python"), "-c", _CAPTURE, *where]
        children: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name, command in commands.items():
                children[name] = _start(command, folder / f"{name}.log")
                _wait_up(name, ports[name], children[name], folder / f"{name}.log")
            yield {
                name: Server(name, ports[name], psutil.Process(child.pid))
                for name, child in children.items()
            }
        finally:
            for child in children.values():
                child.terminate()
            for child in children.values():
                try:
                    child.wait(15)
                except subprocess.TimeoutExpired:
                    child.kill()


def recorded(server: Server) -> str:
    """One sentence from /metrics: how many requests NextState relayed and recorded."""
    with urllib.request.urlopen(f"http://{HOST}:{server.port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    counts = {
        name.removeprefix("nextstate_").removesuffix("_total"): int(float(value))
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }
    return (
        f"NextState relayed {counts['requests']} requests and recorded {counts['turns_recorded']} "
        f"turns: {counts['turns_recorded_late']} after the reply's end, "
        f"{counts['turns_lost']} lost."
    )


def _commands(
    folder: Path,
    ports: Mapping[str, int],
    nginx: str | None,
    litellm: Path | None,
    postgresql: str | None,
) -> dict[str, Sequence[str]]:
    python, engine = sys.executable, ports[DIRECT]

    def write(name: str, text: str, port: int, database: str = "") -> str:
        file = folder / name
        values = {"folder": folder, "host": HOST, "engine": engine, "model": MODEL}
        values["database"] = database
        file.write_text(text.format(**values, port=port))
        return str(file)

    bare = [python, "-m", "benchmarks.bare_relay", str(ports[BARE]), f"http://{HOST}:{engine}"]
    ours = write("nextstate.toml", _OURS, ports[OURS])
    commands: dict[str, Sequence[str]] = {
        DIRECT: [python, "-m", "benchmarks.mock_engine", str(engine)],
        BARE: bare,
    }
    if nginx is not None:
        config = write("nginx.conf", _NGINX, ports[NGINX])
        commands[NGINX] = [nginx, "-p", str(folder), "-c", config]
    if litellm is not None:
        config = write("litellm.yaml", _LITELLM, ports[LITELLM])
        commands[LITELLM] = [
            *(str(litellm / "bin" / "litellm"), "--config", config, "--host", HOST),
            *("--port", str(ports[LITELLM]), "--num_workers", "1", "--telemetry", "False"),
        ]
    commands[OURS] = [python, "-m", "nextstate", "proxy", "--config", ours]
    if postgresql is not None:
        config = write("postgresql.toml", _OURS, ports[POSTGRESQL], postgresql)
        commands[POSTGRESQL] = [python, "-m", "nextstate", "proxy", "--config", config]
    return commands


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    more = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "LITELLM_LOG": "ERROR",
        "DISABLE_ADMIN_UI": "True",
    }
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **more})


def _wait_up(name: str, port: int, child: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the server answers a chat request; exits with its log if it does not."""

    async def ask() -> None:
        connection = await connect(port)
        async with asyncio.timeout(30):
            await connection.ask(_WARM)
        connection.close()

    deadline = time.monotonic() + START_TIMEOUT_S
    why = ""
    while child.poll() is None and time.monotonic() < deadline:
        try:
            asyncio.run(ask())
        except (OSError, TimeoutError) as error:
            why = str(error)
            time.sleep(0.2)
        else:
            return
    if child.poll() is not None:
        why = f"it ended with code {child.returncode}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    sys.exit(f"{name} did not start ({why}); its log ends:\n{tail}")
