"""The key check in a real vLLM: which routes answer without the key, and where the key is."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import psutil
import pytest

from tests.running_loop import Engine, Loop
from tests.same_answer import answer_of

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/adapters"),
        ("DELETE", "/adapters/main"),
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ],
)
def test_no_route_of_vllm_but_its_health_answers_without_the_key(
    native_engine: Engine, method: str, path: str
) -> None:
    body = {"name": "x", "src": "/x", "model": native_engine.model, "prompt": "hi"}
    for key in (None, "wrong"):
        answer = answer_of(native_engine.url, path, body, method=method, key=key)
        assert answer.status == 401
    known = answer_of(native_engine.url, path, body, method=method, key=native_engine.key)
    assert known.status != 401
    assert answer_of(native_engine.url, "/health", None, method="GET").status == 200


def test_the_key_is_in_vllms_environment_and_on_no_command_line(
    loop: Loop, native_engine: Engine
) -> None:
    engine = loop.part("engine")
    assert engine.environ()["VLLM_API_KEY"] == native_engine.key
    asked_for = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS", "VLLM_API_KEY"}
    asked_for.add("VLLM_CPU_KVCACHE_SPACE")
    vllms = {name for name in engine.environ() if name.startswith("VLLM_")}
    assert vllms - asked_for <= {name for name in vllms if name not in os.environ}
    stages = psutil.Process(loop.process.pid).children(recursive=True)
    assert not any(native_engine.key in " ".join(stage.cmdline()) for stage in stages)
    assert "VLLM_API_KEY" not in loop.part("proxy").environ() or os.environ.get("VLLM_API_KEY")
    mode = (loop.state / "engine.json").stat().st_mode
    assert mode & 0o077 == 0


def test_the_log_shows_no_key(loop: Loop, native_engine: Engine) -> None:
    logs: list[Path] = [*(loop.state / "logs").iterdir()]
    assert logs
    for log in logs:
        assert native_engine.key.encode() not in log.read_bytes()
    versions = orjson.dumps(loop.versions())
    assert native_engine.key.encode() not in versions
