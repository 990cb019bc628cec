"""No packet leaves the machine, whoever would send it: seen on a network of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nextstate.offline import switches
from tests.whole.alone import SERVER, WATCH, alone

ROOT = Path(__file__).parents[2]


def run_alone(log: Path, *command: str, timeout_s: float = 280, tries: bool = True) -> list[str]:
    """What left the machine while the command ran, or was tried (`tries`): also what was refused.

    Skips where there are no namespaces.
    """
    before, tried = alone(log), log.with_name("tried")
    if not before:
        pytest.skip("no network namespaces here")
    argv = [*before, *command]
    site = log.with_name("site")
    site.mkdir()
    (site / "sitecustomize.py").write_text(WATCH)
    paths = os.pathsep.join((str(site), str(ROOT)))
    env = os.environ | {"PYTHONPATH": paths, "WATCHED": str(tried)}
    done = subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(done.stdout[-3000:])
    attempts = tried.read_text().splitlines()
    assert "armed" in attempts
    packets = log.read_text().splitlines()
    return [*packets, *(one for one in attempts if one != "armed")] if tries else packets


def test_a_connection_and_a_look_up_are_seen(tmp_path: Path) -> None:
    code = """
import ctypes, socket
with socket.socket() as opened:
    opened.settimeout(0.5)
    try:
        opened.connect(("198.51.100.4", 443))
    except OSError:
        pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
    opened.sendto(b"x", ("198.51.100.5", 53))
ctypes.CDLL(None).getaddrinfo(b"native.test", None, None, ctypes.byref(ctypes.c_void_p()))
from nextstate.egress import EgressError, guard
guard(())
try:
    socket.getaddrinfo("refused.test", 80)
except EgressError:
    pass
"""
    seen = run_alone(tmp_path / "log", sys.executable, "-c", code)
    assert "protocol 6 to 198.51.100.4 port 443" in seen
    assert "protocol 17 to 198.51.100.5 port 53" in seen
    assert f"protocol 17 to {SERVER} port 53" in seen  # by a look-up that Python does not see
    assert "socket.connect ('198.51.100.4', 443)" in seen
    assert "socket.getaddrinfo refused.test" in seen


def test_proxy_judge_and_rollout_try_nothing(tmp_path: Path) -> None:
    """That the learner does not is seen in test_offline.py."""
    tests = (
        "tests/app/test_part_environment.py::test_real_processes_have_only_their_own_secrets",
        "tests/rollout/test_command.py::test_an_environment_without_a_sandbox_needs_none",
        "tests/judge/test_stage.py::test_each_turn_gets_one_verdict_with_its_hinted_prompt",
        "tests/proxy/test_unrecorded.py",
        "tests/rollout/test_runner.py::test_the_environment_gets_replies_without_thoughts",
    )
    only = ("-k", "not postgresql", "-p", "no:cacheprovider")  # a server is its owner's
    command = (sys.executable, "-m", "pytest", "-q", *only, *tests)
    assert run_alone(tmp_path / "log", *command) == []


_PLUGIN = """
import os, socket
from nextstate.offline import switches


def create(settings=None):
    off = [name for name, value in switches(False).items() if os.environ.get(name) != value]
    if off:
        with open(os.environ["TRIED"], "a") as out:
            out.write(f"may report: {off}\\n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        try:
            opened.sendto(b"x", ("198.51.100.4", 9))
        except OSError as error:
            outcome = type(error).__name__
        else:
            outcome = "LEFT"
    with open(os.environ["TRIED"], "a") as out:
        out.write(outcome + "\\n")
    os._exit(7)
"""
"""Whatever loads it says which switches are not set, tries to send something, says what came of it,
and ends."""
_CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "http://127.0.0.1:9"
model = "no-such-model"
[proxy]
port = {port}
[judge]
kind = "sends:create"
[rollout]
environment = "sends:create"
"""
_WRITER = """
import sys
from nextstate.config import StoreConfig
from nextstate.egress import guard
from proxy.writer_process import WriterProcess

guard(["allowed.test"])
writer = WriterProcess()
with writer.start(StoreConfig(dir=sys.argv[1]), "sends:create") as opened:
    opened.sendall(b"\\x01\\0\\0\\0x")  # it looks for its plugin once something came
    sys.exit(writer.processes[0].wait(60))
"""
_WITHOUT = """
import atexit, sends
from nextstate.app.cli import main

atexit.register(sends.create)
main()
"""
"""A command without plugins tries at its end. That comes soon: its port is taken, or its lineage is
nobody's."""
PARTS = {
    "proxy": ("-c", _WITHOUT, "proxy"),
    "writer": ("-c", _WRITER, "state"),
    "judge": ("-m", "nextstate", "judge"),
    "learner": ("-c", _WITHOUT, "learner", "--lineage", "nobody"),
    "rollout": ("-m", "nextstate", "rollout"),
}


@pytest.mark.parametrize("part", PARTS)
def test_no_part_lets_a_plugin_send_anything(tmp_path: Path, part: str) -> None:
    """Nor does a library report by itself: its switch is set, whatever the shell says."""
    (tmp_path / "sends.py").write_text(_PLUGIN)
    tried = tmp_path / "tried"
    env = os.environ | dict.fromkeys(switches(sends_metrics=False), "by the shell")
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRIED": str(tried)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = _CONFIG.format(folder=tmp_path, port=taken.getsockname()[1])
        (tmp_path / "nextstate.toml").write_text(config)
        done = subprocess.run(
            [sys.executable, "-P", *PARTS[part]],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    assert done.returncode == 7, (done.stdout + done.stderr)[-2000:]
    assert tried.read_text() == "EgressError\n"


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_the_whole_demo_sends_nothing(tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    command = (sys.executable, "-P", "-m", "nextstate", "demo", "--out", out)
    # vLLM asks the kernel for the address by which others would be reached: no packet
    assert run_alone(tmp_path / "log", *command, timeout_s=1500, tries=False) == []
