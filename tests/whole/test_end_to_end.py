"""The whole loop with a real vLLM; these tests train its policy and end it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import psutil
import pytest

from benchmarks.asking import Clients
from demo.course import MODEL, POLICY
from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.engine.client import publish
from nextstate.engine.process import free_port
from nextstate.records import VersionState
from nextstate.store import Store
from tests.running_loop import Loop, run, wait_for, write_config
from tests.same_answer import answer_of, assert_same
from tests.whole.withdrawal import complain_until_withdrawn

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def ask(loop: Loop, **more: Any) -> Any:
    with openai.OpenAI(base_url=f"{loop.url}/v1", api_key="x", max_retries=0) as client:
        return client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Tom has 3 apples and gets 4 more. How many?"}],
            max_tokens=40,
            **more,
        )


def test_the_store_holds_the_ids_and_log_probs_that_vllm_returned(loop: Loop) -> None:
    raw = ask(loop, logprobs=True, extra_body={"return_token_ids": True})
    reply = json.loads(raw.content)
    choice = reply["choices"][0]
    store = Store(Settings.read(loop.config).store)
    turn = store.turns.get(raw.headers["x-nextstate-turn"])
    store.close()
    assert turn is not None
    assert turn.trainable
    assert list(turn.prompt_ids or ()) == reply["prompt_token_ids"]
    assert list(turn.completion_ids or ()) == choice["token_ids"]
    assert list(turn.behaviour_logprobs or ()) == [
        entry["logprob"] for entry in choice["logprobs"]["content"]
    ]
    assert turn.policy_version == 0


def test_the_loop_trains_adapters_that_vllm_serves_without_a_failed_request(loop: Loop) -> None:
    assert loop.talk_until(version=2, seed=1) == 0
    versions = loop.versions()
    assert [v["number"] for v in versions][:2] == [1, 2]
    for version in versions:
        files = sorted(path for path in Path(version["path"]).iterdir() if path.name != "card.json")
        assert "adapter_model.safetensors" in [file.name for file in files]
        printed = subprocess.check_output(
            ["sha256sum", *(file.name for file in files)], cwd=version["path"]
        )
        assert hashlib.sha256(printed).hexdigest() == version["sha256"]
        assert 8 < version["samples"] <= 16  # fewer where one session has more than half
    assert [v["state"] for v in versions].count("serving") == 1
    drifts = [v["metrics"]["drift/mean"] for v in versions if "drift/mean" in v["metrics"]]
    print("drift between engine and learner, nats a token:", drifts)
    assert drifts
    assert max(drifts) < 0.02
    turns = loop.turns()
    served = {turn["version"] for turn in turns}
    assert {0, 1} <= served
    judged = [turn for turn in turns if turn["verdict"]]
    assert {turn["verdict"]["score"] for turn in judged} >= {1, -1}
    assert any(turn["verdict"]["hint"] for turn in judged)
    assert all(turn["next_state"] for turn in judged)


def test_a_version_that_people_complain_about_is_withdrawn_by_the_watch(loop: Loop) -> None:
    complained_about, serving = complain_until_withdrawn(loop, MODEL, within_s=240)
    assert serving < complained_about
    assert "the mean score fell by" in loop.command("versions", str(complained_about))


def whole(loop: Loop) -> list[int]:
    """The versions that have an adapter: one that the gate has rejected has none."""
    return sorted(version["number"] for version in loop.versions() if version["path"])


def test_the_adapter_changes_the_reply_and_a_rollback_brings_the_old_one_back(loop: Loop) -> None:
    newest = whole(loop)[-1]

    def logprobs() -> list[float]:
        reply = ask(loop, logprobs=True, temperature=0).parse()
        return [entry.logprob for entry in reply.choices[0].logprobs.content]

    trained = logprobs()
    loop.command("rollback", "0")
    wait_for(lambda: ask(loop).headers["x-nextstate-version"] == "0", 60)
    base = logprobs()
    assert base != trained
    loop.command("rollback", str(newest))
    wait_for(lambda: ask(loop).headers["x-nextstate-version"] == str(newest), 60)


def test_no_request_fails_while_versions_change_under_load(loop: Loop) -> None:
    two = whole(loop)[-2:]
    settings = Settings.read(loop.config)
    store = Store(settings.store)
    clients = Clients(loop.port, MODEL)

    async def change() -> None:
        async with clients.asking(8):
            for number in two * 3:
                version = store.versions.get("main", number)
                assert version is not None
                await change_version(settings, publish, store, version)
                await clients.reply_by(number, since=time.perf_counter())

    asyncio.run(asyncio.wait_for(change(), 120))
    store.close()
    assert clients.failures == []
    assert {*two} <= {reply.version for reply in clients.replies}


SAID = [{"role": "user", "content": "Tom has 3 apples and gets 4 more."}]
ROUTES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 8, "logprobs": True},
    "/v1/completions": {"prompt": "Tom has", "max_tokens": 8},
    "/v1/messages": {"messages": SAID, "max_tokens": 8},
    "/v1/responses": {"input": "Tom has", "max_output_tokens": 8, "truncation": "auto"},
    "/v1/messages/count_tokens": {"messages": SAID},
}
"""One request of each kind: extended, translated, relayed natively, passed on."""


@pytest.fixture
def one_version(loop: Loop) -> Iterator[int]:
    """The number of the version that serves until the test ends: nothing trains meanwhile."""
    store = Store(Settings.read(loop.config).store)
    store.versions.pause("main", "a test")

    def is_busy() -> bool:
        return store.training.leased_count("main") > 0 or any(
            version["state"] == VersionState.CANDIDATE for version in loop.versions()
        )

    wait_for(lambda: not is_busy(), 120)
    (number,) = (v["number"] for v in loop.versions() if v["state"] == VersionState.SERVING)
    wait_for(lambda: ask(loop).headers["x-nextstate-version"] == str(number), 60)
    yield number
    store.versions.resume("main")
    store.close()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("path", ROUTES)
def test_an_adapters_answers_are_those_of_vllm_under_the_clients_name(
    loop: Loop, one_version: int, path: str, stream: bool
) -> None:
    engine = loop.engine()
    assert one_version > 0
    body = {"model": MODEL, "temperature": 0, "cache_salt": "-", **ROUTES[path], "stream": stream}
    listed = answer_of(engine.url, "/v1/models", None, method="GET", key=engine.key)
    names = [model["id"] for model in json.loads(listed.body)["data"]]
    [adapter] = [name for name in names if name.startswith(f"main-v{one_version:06d}-")]
    answer = assert_same(engine, path, body, adapter)
    assert answer.status == 200
    assert adapter.encode() not in answer.body


@pytest.mark.parametrize("name", ["proxy", "judge", "learner"])
def test_a_killed_stage_comes_back_and_the_loop_goes_on(loop: Loop, name: str) -> None:
    before = loop.part(name).pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: _pid(loop, name) not in (before, None), 30)
    if name == "proxy":
        wait_for(lambda: '"engine": "up"' in _healthz(loop), 60)
    newest = max(v["number"] for v in loop.versions())
    if name == "learner":
        assert loop.talk_until(version=newest + 1, seed=2) == 0


def test_requests_wait_for_a_killed_engine_and_its_version_is_loaded_again(loop: Loop) -> None:
    version = ask(loop).headers["x-nextstate-version"]
    assert version != "0"
    before = loop.part("engine")
    workers = before.children(recursive=True)
    os.kill(before.pid, signal.SIGKILL)
    with openai.OpenAI(base_url=f"{loop.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], stream=True, timeout=240
        )
        assert [c.choices[0].finish_reason for c in stream.parse() if c.choices][-1] is not None
    # The learner may have made another one meanwhile.
    assert int(ask(loop).headers["x-nextstate-version"]) >= int(version)
    assert loop.part("engine").pid != before.pid
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


def test_what_a_version_learned_from_is_forgotten_while_it_serves(loop: Loop) -> None:
    store = Store(Settings.read(loop.config).store)
    serving = store.versions.serving("main")
    turn = store.versions.used_turns("main", serving.number)[0][0]
    assert serving.path is not None
    said = loop.command("forget", turn, "--yes")
    assert re.search(rf"withdrew .*\b{serving.number}\b.* of main; version \d+ serves", said)
    assert store.turns.get(turn) is None
    assert not Path(serving.path).exists()
    withdrawn = store.versions.get("main", serving.number)
    assert withdrawn is not None
    assert (withdrawn.state, withdrawn.path) == (VersionState.REJECTED, None)
    served = int(ask(loop).headers["x-nextstate-version"])
    now = store.versions.get("main", served)
    store.close()
    assert now is not None
    assert now.can_serve
    assert serving.number not in {served, now.parent}
    assert '"engine": "up"' in _healthz(loop)


def test_status_shows_every_part(loop: Loop) -> None:
    status = json.loads(loop.command("status", "--json"))
    assert status["proxy"] == status["engine"] == "up"
    assert status["counts"]["turns/main"] > 0
    assert "counts/turns/main" in loop.command("status")


def test_a_second_loop_on_the_same_port_is_refused_with_the_key(loop: Loop, tmp_path: Path) -> None:
    done = run("up", "--config", str(write_config(tmp_path, port=loop.port)))
    assert_clear(done, "[proxy] ", f"port = {loop.port}")


def test_a_second_loop_on_the_same_folder_is_refused_with_the_key(loop: Loop) -> None:
    config = loop.config.with_name("second.toml")
    config.write_text(loop.config.read_text().replace(str(loop.port), str(free_port())))
    assert_clear(run("up", "--config", str(config)), "[store] dir")


def test_ctrl_c_ends_everything(loop: Loop) -> None:
    family = psutil.Process(loop.process.pid).children(recursive=True)
    assert len(family) >= 5  # the server, its engine, and three stages
    loop.process.send_signal(signal.SIGINT)
    assert loop.process.wait(60) == 0
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_vllm_that_dies_at_start_is_one_clear_message(tmp_path: Path) -> None:
    config = write_config(tmp_path, port=free_port(), args=("--no-such-option",))
    done = run("up", "--config", str(config), trains=False)
    assert_clear(done, "--no-such-option", "[engine] model and args")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((f'model = "{POLICY}"', 'model = "nobody/nothing"'), "nextstate fetch nobody/nothing"),
        ((f'model = "{POLICY}"', 'model = "/"'), "config.json"),
        (("port = ", "prot = "), "did you mean 'port'?"),
    ],
)
def test_what_is_missing_or_misspelt_is_one_clear_message(
    tmp_path: Path, change: tuple[str, str], expected: str
) -> None:
    config = write_config(tmp_path, port=free_port())
    config.write_text(config.read_text().replace(*change))
    assert_clear(run("up", "--config", str(config)), expected)


def assert_clear(done: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2 and one line that names what fixes it."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert all(words in lines[0] for words in expected), lines[0]


def _pid(loop: Loop, name: str) -> int | None:
    try:
        return loop.part(name).pid
    except (AssertionError, psutil.Error):
        return None


def _healthz(loop: Loop) -> str:
    async def get() -> str:
        try:
            async with aiohttp.ClientSession() as http, http.get(f"{loop.url}/healthz") as answer:
                return await answer.text()
        except aiohttp.ClientError:
            return ""

    return asyncio.run(get())
