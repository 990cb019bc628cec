"""Requests that must not be recorded leave nothing, not even a hash."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from nextstate.redaction import Redactor
from nextstate.store import Store
from proxy.writer_process import WriterProcess
from tests.proxy.running_proxy import MODEL, Running, both, request
from tests.proxy.writer_thread import WriterThread
from tests.scripted_engine import ScriptedEngine

WORDS = "the zebra 4711 plays the violin in Ulm"
CHAT = "/v1/chat/completions"


def state_of(folder: Path) -> dict[str, bytes]:
    """All files of a state folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rows_of(store: Store) -> dict[str, list[Any]]:
    with store.database.read() as connection:
        tables = ("turns", "texts", "next_states", "judgements", "counts")
        return {
            name: [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name}")]
            for name in tables
        }


async def say(p: Running, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any, Any]:
    answer = await p.http.post(f"{p.url}{CHAT}", json=body, headers=headers)
    data = await (answer.text() if body.get("stream") else answer.json())
    return answer.status, data, answer.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["header", "model"])
@pytest.mark.parametrize("process", [WriterThread, WriterProcess])
def test_nothing_is_kept_of_a_request_that_opts_out(
    store: Store, tmp_path: Path, how: str, stream: bool, process: type[WriterProcess]
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await say(p, request("something else"), {})  # the store is not empty
        before = rows_of(store)
        headers = {"X-NextState-Record": "OFF"} if how == "header" else {}
        model = MODEL if how == "header" else f"{MODEL}:unrecorded"
        body = {**request(WORDS, stream=stream), "model": model}
        status, data, sent = await say(p, body, headers)
        assert status == 200
        if not stream:
            assert data["model"] == model
        assert "x-nextstate-turn" not in sent
        assert sent["x-nextstate-version"] == "0"
        assert WORDS in str(engine.requests[-1])
        assert p.proxy.relay.counts.unrecorded["recording_off"] == 1
        assert rows_of(store) == before

    both(test, store, tmp_path, writer=process(Redactor()))
    store.checkpoint()
    message = b'{"role":"user","content":"' + WORDS.encode() + b'"}'
    traces = [WORDS.encode(), *(word.encode() for word in WORDS.split() if len(word) > 4)]
    traces.append(hashlib.blake2b(message, digest_size=16).digest())
    for name, data in state_of(store.dir).items():
        for trace in traces:
            assert trace not in data, name


@pytest.mark.parametrize("process", [WriterThread, WriterProcess])
def test_a_proxy_that_records_nothing_leaves_nothing(
    store: Store, tmp_path: Path, process: type[WriterProcess]
) -> None:
    """`[privacy] record = false`; a request cannot ask for the contrary."""
    before = rows_of(store)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for headers in ({}, {"X-NextState-Record": "on"}, {"X-Session-Id": WORDS}):
            status, _, sent = await say(p, request(WORDS), headers)
            assert (status, "x-nextstate-turn" in sent) == (200, False)
        assert p.proxy.relay.counts.unrecorded["recording_off"] == 3

    both(test, store, tmp_path, writer=process(Redactor()), record=False)
    assert rows_of(store) == before
    store.checkpoint()
    for name, data in state_of(store.dir).items():
        assert not any(word.encode() in data for word in (WORDS, "zebra", "violin")), name


def test_a_side_turn_is_kept_and_neither_judged_nor_trained(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        first = request("a question")
        for kind in ("SIDE", "main"):
            headers = {"X-Turn-Type": kind, "X-Session-Id": kind}
            _, data, sent = await say(p, first, headers)
            turn = store.turns.get(sent["x-nextstate-turn"])
            assert turn is not None
            assert turn.kind == kind.lower()
            reply = data["choices"][0]["message"]
            more = {"role": "user", "content": "thanks, that is perfect"}
            body = {**first, "messages": [*first["messages"], reply, more]}
            await say(p, body, headers)
            judged = store.judging.lease(9, 60.0)
            assert judged == ([] if kind == "SIDE" else [turn.id])
            said = await p.http.post(f"{p.url}/v1/feedback", json={"turn_id": turn.id, "score": 1})
            told = await said.json()
            assert told["applied"] == (kind == "main"), told
        store.training.hold_out("main", lambda _: False)
        trained = store.training.lease_samples("main", 9, "b", scored=True, hinted=False)
        assert [sample.turn for sample in trained] == [turn.id], "the main turn alone"

    both(test, store, tmp_path)


def test_a_word_that_is_neither_on_nor_off_is_refused(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        status, data, _ = await say(p, request(), {"X-NextState-Record": "no"})
        assert status == 400
        assert "expected on or off" in str(data)
        status, _, sent = await say(p, request(), {"X-NextState-Record": "on"})
        assert status == 200
        assert store.turns.get(sent["x-nextstate-turn"]) is not None

    both(test, store, tmp_path)


OF_GROUP = {"environment": "e", "task": "go", "group_size": 2}


def test_no_byte_of_a_secret_is_in_the_state_folder(store: Store, tmp_path: Path) -> None:
    """Through a real proxy: request, session's name, feedback, episode."""
    key, mail = "ghp_a8Zk2LmQ9xYt3RvB7nPw5cDfH4jK6sTuV1eG", "ann.b@firma-nord.de"
    card = "4539-1488-0343-6467"

    async def test(engine: ScriptedEngine, p: Running) -> None:
        body = {**request(f"my key is {key}"), "user": mail}
        status, _, sent = await say(p, body, {"X-Session-Id": mail})
        assert status == 200
        hint = {"score": -1, "hint": f"Do not say {key}.", "comment": f"ask {mail}"}
        given = await p.http.post(f"{p.url}/v1/feedback", json={**hint, "session_id": mail})
        found = await given.json()
        assert (given.status, found["turn"]) == (200, sent["x-nextstate-turn"])
        opened = {"environment": "e", "task": f"write to {mail}", "metadata": {"key": key}}
        answer = await p.http.post(f"{p.url}/v1/episodes", json=opened)
        name = (await answer.json())["episode"]
        closed = {"status": "done", "observation": f"sent to {mail}"}
        answer = await p.http.post(f"{p.url}/v1/episodes/{name}/close", json=closed)
        assert answer.status == 200
        given = {"episode": card, "group": "g", "environment": "e", "task": "go"}
        for _ in range(2):  # opened again, it is the same
            answer = await p.http.post(f"{p.url}/v1/episodes", json=given)
            name = (await answer.json())["episode"]
            assert name.startswith("hidden-")
        for named in (card, name):
            call = request("in the episode")
            sent_to = f"{p.url}/episodes/{named}{CHAT}"
            assert (await p.http.post(sent_to, json=call)).status == 200
            reward = {"kind": "outcome", "value": 1.0, "name": card, "source": card}
            answer = await p.http.post(f"{p.url}/v1/episodes/{named}/rewards", json=[reward])
            assert answer.status == 200, await answer.text()
        assert len((await answer.json())["turns"]) == 2
        assert len((await answer.json())["rewards"]) == 1
        opened = await p.http.post(f"{p.url}/v1/groups", json={**OF_GROUP, "group": card})
        found = await opened.json()
        assert [one["episode"] for one in found["episodes"]] == [
            f"{found['group']}-0",
            f"{found['group']}-1",
        ]
        turn = store.turns.get(sent["x-nextstate-turn"])
        assert turn is not None
        assert turn.session.startswith("hidden-")
        kept = [data.decode("latin-1") for data in all_texts(store)]
        assert any("my key is [secret:api_key]" in text for text in kept)
        assert "Do not say [secret:api_key]." in kept
        assert "write to [secret:email]" in kept
        assert not any(key in text or mail in text for text in kept)

    both(test, store, tmp_path, writer=WriterThread(Redactor()))
    store.checkpoint()
    for name, data in state_of(store.dir).items():
        for secret in (key, mail, card):
            assert secret.encode() not in data, name
            assert hashlib.blake2b(secret.encode(), digest_size=16).digest() not in data, name


def all_texts(store: Store) -> list[bytes]:
    """Every text of the store, as it was before it was compressed."""
    from nextstate.store import texts

    with store.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT hash FROM texts").all()
        return list(texts.get(connection, [row[0] for row in rows]).values())
