"""rollout/reading.py: where --tasks may lead."""

from __future__ import annotations

import json
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from nextstate.errors import ConfigError
from nextstate.records import Json
from rollout.reading import read_source


def seen(fields: Json) -> None:
    if fields.get("level") == "bad":
        raise ConfigError("level = 'bad'")


def test_fields_after_a_question_mark_are_given_to_every_task(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"id": "a", "level": 1}\n{"id": "b"}')
    plain = read_source(str(file), "terminal", seen)
    assert [one.fields for one in plain] == [{"level": 1}, {}]
    given = read_source(f"{file}?sandbox=docker%3Atools&level=2&show=", "terminal", seen)
    expected = {"sandbox": "docker:tools", "level": "2", "show": ""}
    assert [one.fields for one in given] == [expected] * 2
    assert [one.split for one in given] == [one.split for one in plain]
    with pytest.raises(ConfigError, match=r"tasks\.jsonl, line 1: level = 'bad'"):
        read_source(f"{file}?level=bad", "terminal", seen)


class Dripping(BaseHTTPRequestHandler):
    """Answers with a byte at a time, and never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(b"[")
            while True:
                self.wfile.write(b" ")


class Long(BaseHTTPRequestHandler):
    """Has very many environments."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(["e"] * 1001).encode())


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (Dripping, "list_environments: it has not listed its tasks within 0.2 s"),
        (Long, "lists 1001 environments: expected at most 1000"),
    ],
)
def test_a_server_that_never_ends_does_not_hold_the_start(
    monkeypatch: pytest.MonkeyPatch, handler: type[BaseHTTPRequestHandler], told: str
) -> None:
    monkeypatch.setattr("rollout.reading._WHOLE_S", 0.2)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ConfigError, match=told):
                read_source(f"http://127.0.0.1:{server.server_port}", "openenv", seen)
        finally:
            server.shutdown()
            thread.join()


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tasks .*none\.jsonl: No such file"):
        read_source(f"{tmp_path}/none.jsonl", "terminal", seen)
