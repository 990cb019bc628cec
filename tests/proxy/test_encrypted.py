"""A real proxy on an encrypted store: it records, links and forgets, and no word is on the disk."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.redaction import Redactor
from nextstate.store import Store
from nextstate.store.forgetting import Wanted
from proxy.writer_process import WriterProcess
from tests.encrypted import encrypt
from tests.proxy.running_proxy import Running, both, request
from tests.proxy.test_unrecorded import say, state_of
from tests.scripted_engine import ScriptedEngine

FIRST, SECOND = "the zebra plays violin", "the walrus plays cello"
THIRD = "the ostrich conducts"
HINT, COMMENT, TASK, SEEN = "Sing in Latin.", "too loud", "tune the harp", "harp is tuned"
SESSION = "concert-of-animals"


@pytest.mark.processes
def test_no_word_that_went_through_the_proxy_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(dir=str(tmp_path / "state"))
    encrypt(config, monkeypatch)
    replies: list[str] = []

    async def test(engine: ScriptedEngine, p: Running) -> None:
        status, first, sent = await say(p, {**request(FIRST), "stop": ["violoncello"]}, {})
        assert status == 200
        reply = first["choices"][0]["message"]
        replies.append(reply["content"])
        messages = [*request(FIRST)["messages"], reply, {"role": "user", "content": SECOND}]
        status, _, after = await say(p, {**request(""), "messages": messages}, {})
        assert status == 200
        turns = [store.turns.get(one["x-nextstate-turn"]) for one in (sent, after)]
        assert turns[0] is not None
        assert turns[1] is not None
        assert turns[1].parent == turns[0].id, "it was found by what it repeats"
        assert turns[1].session == turns[0].session
        assert [s.text for s in store.turns.next_states(turns[0].id)] == [SECOND]

        status, _, _ = await say(p, request(THIRD), {"X-Session-Id": SESSION})
        assert status == 200
        told = {"score": -1, "hint": HINT, "comment": COMMENT, "session_id": SESSION}
        given = await p.http.post(f"{p.url}/v1/feedback", json=told)
        assert given.status == 200
        opened = {"environment": "e", "task": TASK, "metadata": {"note": SEEN}}
        answer = await p.http.post(f"{p.url}/v1/episodes", json=opened)
        episode = (await answer.json())["episode"]
        closed = {"status": "done", "observation": SEEN}
        answer = await p.http.post(f"{p.url}/v1/episodes/{episode}/close", json=closed)
        assert answer.status == 200

        while_it_runs = b"".join(state_of(store.dir).values())
        assert [word for word in words() if word in while_it_runs] == []
        plan = store.forgetting.forget(Wanted(matching="walrus plays"))
        assert plan.turns == (turns[0].id, turns[1].id), "what followed the first holds it too"

    def words() -> list[bytes]:
        whole = [FIRST, SECOND, THIRD, HINT, COMMENT, TASK, SEEN, SESSION, "violoncello", *replies]
        parts = [word for text in whole for word in text.split() if len(word) > 4]
        hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in whole]
        return [*(text.encode() for text in (*whole, *parts) if text), *hashes]

    with closing(Store(config)) as store:
        both(test, store, tmp_path, writer=WriterProcess(Redactor()))
        store.checkpoint()
        assert store.verifying.problems(lambda *_: None) == []
    assert replies
    files = b"".join(state_of(config.path).values())
    assert [word for word in words() if word in files] == []
