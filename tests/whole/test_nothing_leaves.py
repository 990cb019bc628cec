"""No packet leaves the machine, whoever would send it: seen on a network of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole.alone import alone

ROOT = Path(__file__).parents[2]


def run_alone(log: Path, *command: str, timeout_s: float = 280) -> list[str]:
    """What left the machine while the command ran. Skips where there are no namespaces."""
    before = alone(log)
    if not before:
        pytest.skip("no network namespaces here")
    argv = [*before, *command]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    print(done.stdout[-3000:])
    return log.read_text().splitlines()


def test_a_connection_and_a_look_up_are_seen(tmp_path: Path) -> None:
    code = """
import socket
with socket.socket() as opened:
    opened.settimeout(0.5)
    try:
        opened.connect(("198.51.100.4", 443))
    except OSError:
        pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
    opened.sendto(b"x", ("198.51.100.5", 53))
"""
    seen = run_alone(tmp_path / "log", sys.executable, "-c", code)
    assert "protocol 6 to 198.51.100.4 port 443" in seen
    assert "protocol 17 to 198.51.100.5 port 53" in seen


def test_proxy_and_judge_send_nothing(tmp_path: Path) -> None:
    """That the learner sends nothing is seen in test_offline.py."""
    tests = (
        "tests/judge/test_stage.py::test_each_turn_gets_one_verdict_with_its_hinted_prompt",
        "tests/proxy/test_recording.py",
    )
    only = ("-k", "not postgresql", "-p", "no:cacheprovider")  # a server is its owner's
    command = (sys.executable, "-m", "pytest", "-q", *only, *tests)
    assert run_alone(tmp_path / "log", *command) == []


@pytest.mark.soak
@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_the_whole_demo_sends_nothing(tmp_path: Path) -> None:
    out = str(tmp_path / "demo")
    command = (sys.executable, "-P", "-m", "nextstate", "demo", "--out", out)
    assert run_alone(tmp_path / "log", *command, timeout_s=1500) == []
