"""The writer runs a person's own agent profile, and lets it reach what the configuration names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from proxy.writer import LENGTH, Answer
from proxy.writer_process import WriterProcess

_PROFILE = """
import socket
from pathlib import Path

def create(settings):
    for host in ("192.0.2.7", "198.51.100.4"):
        with socket.socket() as opened:
            opened.settimeout(0.01)
            try:
                opened.connect((host, 443))
            except PermissionError as error:
                tell(f"{type(error).__name__} {host}")
            except OSError:
                tell(f"tried {host}")

def tell(text):
    with (Path(__file__).parent / "told").open("a") as file:
        print(text, file=file)
"""


def test_a_profile_in_the_writer_reaches_the_hosts_of_the_configuration_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calling_profile.py").write_text(_PROFILE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    writer = WriterProcess(hosts=["192.0.2.7"])
    with writer.start(StoreConfig(str(tmp_path / "state")), "calling_profile:create") as recorder:
        recorder.settimeout(60)
        assert recorder.recv(1) == bytes([Answer.READY])
        recorder.sendall(LENGTH.pack(1) + b"x")
        assert recorder.recv(1) == bytes([Answer.LOST])
    writer.close()
    told = (tmp_path / "told").read_text().splitlines()
    assert told == ["tried 192.0.2.7", "EgressError 198.51.100.4"]
