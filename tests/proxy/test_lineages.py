"""Several lineages behind one proxy: who reaches which, and nothing passes between them."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.engine.client import publish
from nextstate.errors import ConflictError
from nextstate.records import PolicyVersion, Turn, Verdict, VersionState
from nextstate.store import Store
from proxy.lineages import Access
from tests.proxy.running_proxy import Running, both, request, running, until
from tests.scripted_engine import (
    MODEL,
    Script,
    ScriptedEngine,
    adapter,
    scripted_engine,
    write_weights,
)

MAIN, ALICE, BOB, CAROL = "main", "alice", "bob", "carol"
LINEAGES = {
    ALICE: Access("alice-model", "alice-key"),
    BOB: Access("bob-model", None),
    CAROL: Access(None, "carol-key"),
}
"""Alice has a key and a name, Bob a name, Carol a key; main has a key of its own."""
PATIENT: dict[str, Any] = {"record_timeout_s": 10.0}
OPEN: dict[str, Any] = {"key": "main-key", "access": LINEAGES, **PATIENT}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def add_version(store: Store, tmp_path: Path, lineage: str, number: int) -> PolicyVersion:
    folder = tmp_path / f"{lineage}-{number}"
    sha256 = write_weights(folder)
    candidate = VersionState.CANDIDATE
    version = PolicyVersion(lineage, number, number - 1, str(folder), sha256, 16, candidate)
    store.versions.add(version, None)
    return version


async def serve(store: Store, p: Running, tmp_path: Path, lineage: str, number: int) -> None:
    """Publishes a new version and returns when new requests take it."""
    await publish(store, p.proxy.engines, add_version(store, tmp_path, lineage, number))
    await until(lambda: p.proxy.versions.serving[lineage].number == number)


def name_of(lineage: str, number: int) -> str:
    """What `add_version` calls an adapter."""
    return adapter(lineage, number, f"{lineage}-{number}")


def turn_of(store: Store, headers: dict[str, str]) -> Turn:
    turn = store.turns.get(headers["x-nextstate-turn"])
    assert turn is not None
    return turn


APIS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "responses": {"input": "hi"},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", APIS)
def test_an_alias_reaches_its_lineage_and_replies_carry_it(
    store: Store, tmp_path: Path, path: str, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for number in (0, 1):
            if number:
                await serve(store, p, tmp_path, BOB, number)
            body = {"model": "bob-model", "stream": stream, **APIS[path]}
            url, key = f"{p.url}/v1/{path}", bearer("main-key")
            answer = await p.http.post(url, data=orjson.dumps(body), headers=key)
            data = await answer.read()
            assert answer.status == 200
            assert set(re.findall(rb'"model": ?"([^"]*)"', data)) == {b"bob-model"}
            assert b"-v0" not in data
            sent = (engine.completions if path == "completions" else engine.requests)[-1]
            assert sent["model"] == (name_of(BOB, 1) if number else MODEL)
            turn = turn_of(store, dict(answer.headers))
            assert (turn.lineage, turn.policy_version) == (BOB, number)
            assert (turn.client_model, turn.trainable) == ("bob-model", True)
            assert answer.headers["x-nextstate-version"] == str(number)

    both(test, store, tmp_path, **OPEN)


def test_other_paths_take_the_alias_too(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, ALICE, 1)
        for model in ("alice-model", MODEL):
            body = {"model": model, "input": 'say "model":"alice-v000001"'}
            answer = await p.http.post(f"{p.url}/v1/echo", json=body, headers=bearer("alice-key"))
            assert orjson.loads(await answer.read()) == body

    both(test, store, tmp_path, **OPEN)


@pytest.mark.parametrize(
    ("key", "model", "lineage"),
    [
        ("main-key", MODEL, MAIN),
        ("main-key", "bob-model", BOB),
        ("alice-key", MODEL, ALICE),
        ("alice-key", "alice-model", ALICE),
        ("alice-key", "", ALICE),
        ("carol-key", MODEL, CAROL),
    ],
)
@pytest.mark.parametrize("header", ["Authorization", "x-api-key"])
def test_a_key_and_a_name_lead_to_one_lineage(
    store: Store, tmp_path: Path, key: str, model: str, lineage: str, header: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for name in p.proxy.lineages.names:
            await serve(store, p, tmp_path, name, 1)
        sent = bearer(key) if header == "Authorization" else {header: key}
        status, data, headers = await p.chat({**request(), "model": model}, sent)
        assert status == 200
        assert orjson.loads(data)["model"] == (model or MODEL)
        assert engine.requests[-1]["model"] == name_of(lineage, 1)
        assert turn_of(store, headers).lineage == lineage
        assert key not in str(engine.headers[-1])

    both(test, store, tmp_path, **OPEN)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("alice-key", "bob-model"),
        ("carol-key", "alice-model"),
        ("carol-key", "bob-model"),
        ("main-key", "alice-model"),
        ("main-key", "carol"),
        ("main-key", "alice"),
        ("alice-key", "alice-v000001"),
        ("main-key", "alice-v000001"),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_model_name_of_another_caller_gets_the_engines_own_error(
    store: Store, tmp_path: Path, key: str, model: str, path: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await serve(store, p, tmp_path, ALICE, 1)
        body = orjson.dumps({"model": model, **APIS[path]})
        answer = await p.http.post(f"{p.url}/v1/{path}", data=body, headers=bearer(key))
        data = await answer.read()
        assert answer.status == 404
        assert f"The model `{model}` does not exist." in data.decode()
        assert store.turns.ids() == []
        if not p.proxy.versions.is_adapter(model):
            unasked = await p.http.post(f"{engine.url}/v1/{path}", data=body)
            assert (unasked.status, await unasked.read()) == (404, data)

    both(test, store, tmp_path, **OPEN)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"Authorization: Bearer wrong\r\n",
        b"Authorization: Bearer alice-key2\r\n",
        b"Authorization: Bearer \r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
        b"x-api-key: \xc3\xa9\xff\r\n",
        b"x-api-key: alice\r\n",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/feedback", "/metrics"])
def test_without_a_right_key_nothing_is_answered_where_main_has_one(
    store: Store, tmp_path: Path, sent: bytes, path: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert p.proxy.relay.counts.requests == 0
        host, port = p.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = orjson.dumps({**request(), "model": "bob-model"})
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        writer.write(head + sent + b"\r\n" + body)
        assert b" 401 " in await reader.readline()
        writer.close()
        assert engine.requests == []

    both(test, store, tmp_path, **OPEN)


def test_if_main_has_no_key_any_other_key_belongs_to_main(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for key, lineage in (("sk-whatever", MAIN), ("alice-key", ALICE), ("", MAIN)):
            status, _, headers = await p.chat(request(), bearer(key))
            assert (status, turn_of(store, headers).lineage) == (200, lineage)
        assert (await p.chat({**request(), "model": "alice-model"}))[0] == 404

    both(test, store, tmp_path, access=LINEAGES, **PATIENT)


def test_each_caller_is_shown_the_base_and_its_own_names(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for lineage in p.proxy.lineages.names:
            await serve(store, p, tmp_path, lineage, 1)
        assert len(engine.adapters) == 4
        for key, names in (
            ("main-key", [MODEL, "bob-model"]),
            ("alice-key", [MODEL, "alice-model"]),
            ("carol-key", [MODEL]),
        ):
            answer = await p.http.get(f"{p.url}/v1/models", headers=bearer(key))
            base, *others = orjson.loads(await answer.read())["data"]
            assert [base["id"], *(model["id"] for model in others)] == names
            assert all(model == {**base, "id": model["id"]} for model in others)

    both(test, store, tmp_path, **OPEN)


def test_feedback_on_a_turn_of_another_caller_finds_no_turn(store: Store, tmp_path: Path) -> None:
    keys = {MAIN: "main-key", ALICE: "alice-key", BOB: "main-key", CAROL: "carol-key"}

    async def test(engine: ScriptedEngine, p: Running) -> None:
        said: dict[str, str] = {}
        for lineage, key in keys.items():
            model = "bob-model" if lineage == BOB else MODEL
            _, _, headers = await p.chat({**request(), "model": model}, bearer(key))
            said[lineage] = headers["x-nextstate-turn"]
        for key in ("main-key", "alice-key", "carol-key"):
            for lineage, turn in said.items():
                before = store.judging.verdict(turn)
                body = {"turn_id": turn, "score": 1, "hint": f"by {key}"}
                answer = await p.http.post(f"{p.url}/v1/feedback", json=body, headers=bearer(key))
                if keys[lineage] == key:
                    verdict = store.judging.verdict(turn)
                    assert (answer.status, verdict and verdict.hint) == (200, f"by {key}")
                else:
                    unknown = {**body, "turn_id": "turn_unknown"}
                    none = await p.http.post(
                        f"{p.url}/v1/feedback", json=unknown, headers=bearer(key)
                    )
                    assert (answer.status, none.status) == (404, 404)
                    words = (await none.text()).replace("turn_unknown", turn)
                    assert await answer.text() == words  # it does not tell that there is one
                    assert store.judging.verdict(turn) == before

    both(test, store, tmp_path, **OPEN)


def test_adapters_of_one_lineage_unload_when_drained_and_of_no_other(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for lineage in (MAIN, ALICE, BOB):
            await serve(store, p, tmp_path, lineage, 1)
        engine.script.gate = asyncio.Event()
        held = asyncio.create_task(p.chat(request(stream=True), bearer("alice-key")))
        await until(lambda: bool(engine.requests))
        await serve(store, p, tmp_path, ALICE, 2)
        await serve(store, p, tmp_path, BOB, 2)
        await until(lambda: engine.unloaded == [name_of(BOB, 1)])
        _, _, headers = await p.chat(request(), bearer("alice-key"))
        assert turn_of(store, headers).policy_version == 2
        loaded = {name_of(*version) for version in ((MAIN, 1), (ALICE, 1), (ALICE, 2), (BOB, 2))}
        assert set(engine.adapters) == loaded
        engine.script.gate.set()
        status, data, headers = await held
        assert (status, data[-14:]) == (200, b"data: [DONE]\n\n")
        assert turn_of(store, headers).policy_version == 1
        await until(lambda: engine.unloaded == [name_of(BOB, 1), name_of(ALICE, 1)])
        assert set(engine.adapters) == loaded - {name_of(ALICE, 1)}
        base = store.versions.get(ALICE, 0)
        assert base is not None
        await publish(store, p.proxy.engines, base)
        await until(lambda: engine.unloaded[2:] == [name_of(ALICE, 2)])
        assert set(engine.adapters) == {name_of(MAIN, 1), name_of(BOB, 2)}

    both(test, store, tmp_path, **OPEN)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answers_as", ["bob-v000001", "main-v000002", "alice"])
def test_a_turn_that_another_lineages_adapter_answered_trains_nobody(
    store: Store, tmp_path: Path, answers_as: str, stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.script.answers_as = answers_as
        status, _, headers = await p.chat(request(stream=stream), bearer("alice-key"))
        turn = turn_of(store, headers)
        assert (status, turn.lineage, turn.policy_version) == (200, ALICE, None)
        store.judging.settle_verdict(Verdict(turn.id, (1,), 1, "test"))
        for lineage in p.proxy.lineages.names:
            assert store.training.lease_samples(lineage, 9, "b", scored=True, hinted=True) == []

    both(test, store, tmp_path, **OPEN)


@pytest.mark.parametrize("session", [None, "session"])
def test_a_cut_reply_is_not_tried_again_by_another_lineage(
    store: Store, tmp_path: Path, session: str | None
) -> None:
    named = {} if session is None else {"x-session-id": session}

    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue = [Script(("a", "b", "c"), cut_after=1)]
        with pytest.raises(aiohttp.ClientPayloadError):
            await p.chat(request(stream=True), {**bearer("main-key"), **named})
        (cut,) = store.turns.ids()
        _, _, headers = await p.chat(request(), {**bearer("alice-key"), **named})
        theirs = turn_of(store, headers)
        assert store.turns.ids() == [cut, theirs.id]  # it stands beside the cut one
        _, _, headers = await p.chat(request(), {**bearer("main-key"), **named})
        again = turn_of(store, headers)
        assert store.turns.ids() == [theirs.id, again.id]
        sessions = [store.turns.get(turn_id) for turn_id in (cut, theirs.id, again.id)]
        first, other, last = [turn.session for turn in sessions if turn is not None]
        assert (first == last, first == other) == (True, False)

    both(test, store, tmp_path, **OPEN)


# Traffic of three callers at once, of whom nothing but key and model name tells which is which.

Ask = tuple[Literal["ask"], str, bool, bool, str | None, str]
Publish = tuple[Literal["publish"], str]
ACCESS = {
    MAIN: ("main-key", (MODEL, MODEL)),
    ALICE: ("alice-key", (MODEL, "alice-model")),
    BOB: ("main-key", ("bob-model", "bob-model")),
}
asks = st.tuples(
    st.just("ask"),
    st.sampled_from(list(ACCESS)),
    st.booleans(),
    st.booleans(),
    st.sampled_from((None, "session", "session~2")),
    st.sampled_from(("new", "next", "next", "rewritten")),
)
publishes = st.tuples(st.just("publish"), st.sampled_from(list(ACCESS)))
rounds = st.lists(st.lists(asks | publishes, min_size=1, max_size=6), min_size=1, max_size=6)


class Traffic:
    """Asks in everyone's name, with the same words, and remembers who asked."""

    def __init__(self, store: Store, engine: ScriptedEngine, p: Running, folder: Path) -> None:
        self.store, self.engine, self.p, self.folder = store, engine, p, folder
        self.numbers: Counter[str] = Counter()
        self.asked: dict[str, str] = {}
        """Turn → who asked."""
        self.histories: defaultdict[tuple[str, str | None], list[Any]] = defaultdict(list)

    async def do(self, op: Ask | Publish) -> None:
        if op[0] == "ask":
            await self.ask(*op[1:])
        else:
            self.numbers[op[1]] += 1
            version = add_version(self.store, self.folder, op[1], self.numbers[op[1]])
            with suppress(ConflictError):  # another one was chosen while this one was loaded
                await publish(self.store, self.p.proxy.engines, version)

    async def ask(
        self, caller: str, stream: bool, by_alias: bool, session: str | None, how: str
    ) -> None:
        key, models = ACCESS[caller]
        history = list(self.histories[caller, session]) if how == "next" else []
        if how == "rewritten":
            history = [{"role": "assistant", "content": "What none of them was told."}]
        messages = [*history, {"role": "user", "content": "hi"}]
        mark = f"ask-{len(self.asked)}-{id(messages)}"
        headers = {**bearer(key), "x-request-id": mark}
        if session is not None:
            headers["x-session-id"] = session
        body = {"model": models[by_alias], "messages": messages, "stream": stream}
        status, data, told = await self.p.chat(body, headers)
        assert status == 200
        assert set(re.findall(rb'"model": ?"([^"]*)"', data)) == {models[by_alias].encode()}
        reply = {"role": "assistant", "content": "Hello"}
        self.histories[caller, session] = [*messages, reply]
        turn = turn_of(self.store, told)
        self.asked[turn.id] = caller
        served = [
            sent["model"]
            for sent, seen in zip(self.engine.requests, self.engine.headers, strict=True)
            if seen.get("X-Request-ID") == mark
        ]
        assert len(set(served)) == 1
        number = turn.policy_version
        assert served[0] == (name_of(caller, number) if number else MODEL)
        assert (turn.lineage, told["x-nextstate-version"]) == (caller, str(number))

    def check_store(self) -> None:
        """Turns, sessions, parents and samples each belong to who asked."""
        store, asked = self.store, self.asked
        assert set(store.turns.ids()) == set(asked)
        owners: defaultdict[str, set[str]] = defaultdict(set)
        for turn_id, caller in asked.items():
            turn = store.turns.get(turn_id)
            assert turn is not None
            owners[turn.session].add(caller)
            assert turn.parent is None or asked[turn.parent] == caller
            store.judging.settle_verdict(Verdict(turn_id, (1,), 1, "test"))
        assert all(len(callers) == 1 for callers in owners.values()), owners
        for caller in ACCESS:
            leased = store.training.lease_samples(caller, 999, "b", scored=True, hinted=False)
            assert {s.turn for s in leased} == {t for t, by in asked.items() if by == caller}


@given(rounds)
@settings(max_examples=20)
@example(
    [
        [("ask", MAIN, False, False, "session", "new")],
        [("ask", ALICE, False, False, "session", "rewritten")],
        [("ask", MAIN, False, False, "session", "next")],
    ]
)
@example(
    [
        [("ask", ALICE, False, False, "session~2", "new")],
        *[[("ask", MAIN, False, False, "session", "new")]] * 2,
    ]
)
@example(
    [
        *[[("ask", MAIN, False, False, "session", "new")]] * 2,
        [("ask", ALICE, False, False, "session~2", "new")],
    ]
)
@example(
    [
        [("ask", caller, True, False, "session", "new") for caller in ACCESS],
        [("publish", caller) for caller in ACCESS],
        [("ask", caller, False, True, "session", "next") for caller in ACCESS] * 2,
    ]
)
def test_nothing_of_one_lineage_gets_into_another(traffic: list[list[Ask | Publish]]) -> None:
    async def run(folder: Path, store: Store) -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, store, folder, **OPEN) as p,
        ):
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            done = Traffic(store, engine, p, folder)
            for at_once in traffic:
                async with asyncio.TaskGroup() as tasks:
                    for op in at_once:
                        tasks.create_task(done.do(op))
            serving = p.proxy.versions.serving
            for caller in ACCESS:
                number = store.versions.serving(caller).number
                await until(lambda name=caller, number=number: serving[name].number == number)
                await done.ask(caller, True, True, None, "new")
                version = store.versions.serving(caller)
                assert engine.requests[-1]["model"] == (version.adapter_name or MODEL)
            done.check_store()

    with tempfile.TemporaryDirectory() as name:
        store = Store(StoreConfig(dir=f"{name}/state"))
        asyncio.run(run(Path(name), store))
        store.close()
