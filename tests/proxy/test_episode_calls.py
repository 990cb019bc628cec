"""Calls in an episode over real HTTP: whose they are, what follows what, and when they end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nextstate.records import Source, Turn
from nextstate.store import Store
from proxy.lineages import Access
from tests.proxy.environment import Environment, call, refusal, said, user
from tests.proxy.running_proxy import Running, both, request, running
from tests.scripted_engine import MODEL, Script, ScriptedEngine, scripted_engine

TASK = user("find the file with the word")


def turn(store: Store, turn_id: str) -> Turn:
    found = store.turns.get(turn_id)
    assert found is not None
    return found


def followed(store: Store, turn_id: str) -> list[tuple[Source, str]]:
    return [(state.source, state.text) for state in store.turns.next_states(turn_id)]


def scripted(engine: ScriptedEngine, *replies: str) -> None:
    engine.queue += [Script((reply,)) for reply in replies]


def test_a_call_is_the_episodes_by_path_key_header_and_session_id(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        opened = await environment.open("e-1")
        v1 = f"{p.url}/v1"
        calls = [
            await call(p, opened["base_url"], TASK),
            await call(p, v1, TASK, key=opened["api_key"]),
            await call(p, v1, TASK, headers={"X-NextState-Episode": "e-1"}),
            await call(p, v1, TASK, headers={"X-Session-Id": "e-1"}),
        ]
        turns = [turn(store, turn_id) for turn_id, _ in calls]
        assert [(one.episode, one.step) for one in turns] == [("e-1", n) for n in range(4)]
        assert (await environment.get("e-1"))["turns"] == [one.id for one in turns]
        sent = {name.lower() for headers in engine.headers for name in headers}
        assert not any(name.startswith("x-nextstate") for name in sent)

    both(test, store, tmp_path)


def test_the_path_counts_more_than_the_key_and_the_key_more_than_a_header(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        one, two = await environment.open("one"), await environment.open("two")
        await environment.open("three")
        header = {"X-NextState-Episode": "three", "X-Session-Id": "three"}
        by_path, _ = await call(p, one["base_url"], TASK, key=two["api_key"], headers=header)
        by_key, _ = await call(p, f"{p.url}/v1", TASK, key=two["api_key"], headers=header)
        found = [turn(store, turn_id).episode for turn_id in (by_path, by_key)]
        assert found == ["one", "two"]

    both(test, store, tmp_path)


@pytest.mark.parametrize("name", ["e-2", "", "e 1", "e-1%2Fx", "~", "ü"])
def test_an_unknown_episode_is_a_404_and_reaches_no_engine(
    store: Store, tmp_path: Path, name: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await Environment(p).open("e-1")
        _, found = await call(p, f"{p.url}/episodes/{name}/v1", TASK, status=404)
        assert "There is no episode" in refusal(found)
        _, found = await call(p, f"{p.url}/v1", TASK, key="ep-unknown", status=401)
        assert "no episode has it" in refusal(found)
        headers = {"X-NextState-Episode": "e-3"}
        _, found = await call(p, f"{p.url}/v1", TASK, headers=headers, status=404)
        assert refusal(found) == "There is no episode 'e-3': open it by POST /v1/episodes."
        assert found["error"]["type"] == "NotFoundError"
        await p.http.get(f"{p.url}/episodes/{name}/metrics")
        assert (engine.requests, store.turns.ids()) == ([], [])

    both(test, store, tmp_path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [TASK]}),
        ("/v1/completions", {"prompt": "find the file"}),
        ("/v1/messages", {"messages": [TASK], "max_tokens": 9}),
        ("/v1/v1/messages", {"messages": [TASK], "max_tokens": 9}),
        ("/v1/responses", {"input": "find the file"}),
    ],
)
def test_the_base_url_serves_every_dialect_with_the_episodes_sampler(
    store: Store, tmp_path: Path, path: str, asked: dict[str, Any], stream: bool
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        opened = await Environment(p).open("e-1", sampling={"temperature": 1.0, "min_p": 0.05})
        url = opened["base_url"].removesuffix("/v1") + path
        body = {"model": MODEL, "temperature": 0.0, "stream": stream, **asked}
        answer = await p.http.post(url, json=body)
        assert answer.status == 200, await answer.text()
        await answer.read()
        found = turn(store, answer.headers["x-nextstate-turn"])
        assert (found.episode, found.step, found.trainable) == ("e-1", 0, True)
        (sent,) = engine.requests or engine.completions[-1:]
        for held in (sent, found.sampling):
            assert (held["temperature"], held["min_p"]) == (1.0, 0.05)
        refused = await p.http.post(f"{p.url}/episodes/none{path}", json=body)
        assert refused.status == 404
        is_messages = path.endswith("messages")
        assert (await refused.json()).get("type") == ("error" if is_messages else None)

    both(test, store, tmp_path)


def test_what_follows_a_reply_is_the_environments_word_whatever_role_it_has(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        scripted(engine, "ls", "cat a", "done")
        first, _ = await call(p, url, TASK)
        history = [TASK, said("ls"), user("a b"), {"role": "tool", "content": "$ "}]
        second, _ = await call(p, url, *history)
        last, _ = await call(p, url, *history, said("cat a"), {"role": "system", "content": "word"})
        closed = await environment.close("e-1", outcome=1.0, observation="all checks passed")
        assert (closed["state"], closed["outcome"]) == ("closed", 1.0)
        world = Source.ENVIRONMENT
        assert followed(store, first) == [(world, "a b"), (world, "$ ")]
        assert followed(store, second) == [(world, "word")]
        assert followed(store, last) == [(world, "all checks passed")]
        assert store.judging.lease(9, 60) == [first, second, last]

    both(test, store, tmp_path)


def test_a_malformed_reply_that_the_agent_drops_is_followed_by_what_it_was_told(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        scripted(engine, "I think", "Well,", "ls", "So", "cat a")
        format_error = user("Write one command.")
        dropped, _ = await call(p, url, TASK)
        again, _ = await call(p, url, TASK, format_error)
        good, _ = await call(p, url, TASK, format_error, format_error)
        history = [TASK, format_error, format_error, said("ls"), user("a b")]
        third, _ = await call(p, url, *history)
        fourth, _ = await call(p, url, *history, format_error)
        turns = [dropped, again, good, third, fourth]
        told = [[state.text for state in store.turns.next_states(one)] for one in turns]
        assert told == [["Write one command."]] * 2 + [["a b"], ["Write one command."], []]
        assert [turn(store, one).step for one in turns] == [0, 1, 2, 3, 4]
        assert {turn(store, one).session for one in turns} == {"e-1"}
        parents = [turn(store, one).parent for one in turns]
        assert parents == [None, dropped, again, good, third]

    both(test, store, tmp_path)


def test_the_same_request_again_gives_no_next_state(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        turns = [(await call(p, url, TASK))[0] for _ in range(3)]
        await environment.close("e-1", observation="timed out")
        assert [followed(store, one) for one in turns[:2]] == [[], []]
        assert followed(store, turns[2]) == [(Source.ENVIRONMENT, "timed out")]

    both(test, store, tmp_path)


def test_conversations_with_session_ids_of_their_own_do_not_follow_each_other(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        scripted(engine, "main: look", "sub: search", "main: end", "sub: end")
        main, sub = {"X-Session-Id": "main"}, {"X-Session-Id": "sub"}
        first, _ = await call(p, url, TASK, headers=main)
        second, _ = await call(p, url, user("search a"), headers=sub)
        await call(p, url, TASK, said("main: look"), user("found"), headers=main)
        await call(p, url, user("search a"), said("sub: search"), user("in b"), headers=sub)
        assert followed(store, first) == [(Source.ENVIRONMENT, "found")]
        assert followed(store, second) == [(Source.ENVIRONMENT, "in b")]

    both(test, store, tmp_path)


def test_a_strangers_chat_beside_an_episode_keeps_apart(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url, v1 = (await environment.open("e-1"))["base_url"], f"{p.url}/v1"
        scripted(engine, "ls", "ls", "x", "y", "z")
        theirs, _ = await call(p, url, TASK)
        chat, _ = await call(p, v1, TASK)
        history = [TASK, said("ls"), user("thanks")]
        after, _ = await call(p, v1, *history)
        step, _ = await call(p, url, *history)
        found = [turn(store, one) for one in (chat, after)]
        assert [(one.episode, one.step) for one in found] == [(None, None)] * 2
        assert turn(store, after).parent == chat
        assert turn(store, step).parent == theirs
        assert followed(store, chat) == [(Source.USER, "thanks")]
        assert followed(store, theirs) == [(Source.ENVIRONMENT, "thanks")]
        named, _ = await call(p, v1, TASK, headers={"X-Session-Id": "chat"})
        assert turn(store, named).session == "chat"
        refused = await environment.open("chat", 409)
        assert "recorded turns have a session of this name" in refusal(refused)

    both(test, store, tmp_path)


def test_a_request_that_names_no_episode_costs_no_look_into_the_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        looked: list[str] = []
        named = store.episodes.named
        monkeypatch.setattr(store.episodes, "named", lambda n: looked.append(n) or named(n))
        for _ in range(2):
            await p.chat(request(), {"X-Session-Id": "chat"})
            await p.chat(request())
        assert looked == []
        await Environment(p).open("e-1")
        for _ in range(3):
            await p.chat(request(), {"X-Session-Id": "chat"})
            await p.chat(request())
        assert looked == ["chat"]  # once a name, not once a turn

    both(test, store, tmp_path)


def test_calls_tokens_and_time_end_with_an_error_that_says_what_to_do(
    store: Store, tmp_path: Path
) -> None:
    budgets: list[dict[str, Any]] = [{"max_calls": 2}, {"max_tokens": 3}, {"deadline_s": 60}]

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        for budget in budgets:
            (name,) = budget
            episode = name.replace("_", "-")
            url = (await environment.open(episode, **budget))["base_url"]
            for _ in range(2):  # two tokens each
                await call(p, url, TASK)
            if name == "deadline_s":
                now = store.database.now
                store.database.now = lambda now=now: now() + 61
            _, found = await call(p, url, TASK, status=400)
            assert f"of {name} = {budget[name]}; close it as truncated" in refusal(found)
            assert found["error"]["type"] == "EpisodeBudgetError"
            assert (await environment.get(episode))["calls"] == 2
        assert len(engine.requests) == 6

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [TASK], "priority": 0}),
        ("completions", {"prompt": "go"}),
        ("messages", {"messages": [TASK], "max_tokens": 9}),
        ("responses", {"input": "go"}),
    ],
)
def test_a_call_of_an_episode_comes_after_peoples_whoever_plays_it(
    store: Store, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    """An agent program knows nothing of priorities; a person's request stays as it is."""

    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        for base in (url, f"{p.url}/v1"):
            answer = await p.http.post(f"{base}/{path}", json={"model": MODEL, **body})
            assert answer.status == 200, await answer.text()
        sent = [one.get("priority", 0) for one in engine.requests or engine.completions[-2:]]
        assert sent == [9, 0]
        (step,) = store.episodes.turn_ids("e-1")
        assert turn(store, step).trainable

    both(test, store, tmp_path, of_episodes={"priority": 9})


def test_a_closed_episode_calls_no_model_by_any_name(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        opened = await environment.open("e-1")
        await environment.close("e-1")
        v1 = f"{p.url}/v1"
        for answer in (
            await call(p, opened["base_url"], TASK, status=409),
            await call(p, v1, TASK, key=opened["api_key"], status=409),
            await call(p, v1, TASK, headers={"X-Session-Id": "e-1"}, status=409),
        ):
            assert "is closed as done" in refusal(answer[1])
        assert engine.requests == []

    both(test, store, tmp_path)


def test_the_episodes_sampler_takes_the_place_of_the_clients_and_the_record_says_so(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        sampling = {"temperature": 1.0, "top_k": 0}
        url = (await Environment(p).open("e-1", sampling=sampling))["base_url"]
        turn_id, _ = await call(p, url, TASK, temperature=0.0, top_k=5, top_p=0.9)
        expected = {"temperature": 1.0, "top_k": 0, "top_p": 0.9}
        assert {name: engine.requests[0][name] for name in expected} == expected
        found = turn(store, turn_id)
        assert {name: found.sampling[name] for name in expected} == expected
        assert found.request["temperature"] == 1.0
        assert found.trainable

    both(test, store, tmp_path)


@pytest.mark.parametrize("path", ["/chat/completions", "/messages", "/responses"])
def test_a_setting_that_an_episode_says_is_null_is_left_out_whatever_the_agent_sends(
    store: Store, tmp_path: Path, path: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        none = dict.fromkeys(("seed", "logit_bias", "min_tokens", "tool_choice", "temperature"))
        url = (await Environment(p).open("e-1", sampling=none))["base_url"]
        parameters = {"type": "object", "properties": {}}
        tool: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
        forced: Any = "required"
        if path == "/messages":
            tool, forced = {"name": "f", "input_schema": parameters}, {"type": "any"}
        if path == "/responses":
            tool = {"type": "function", "name": "f", "parameters": parameters}
        body: dict[str, Any] = {"model": MODEL, "tools": [tool], "tool_choice": forced}
        body |= {"input": "find"} if path == "/responses" else {"messages": [TASK]}
        body |= {"max_tokens": 9} if path == "/messages" else {}
        body |= {"seed": 42, "temperature": 0.0, "logit_bias": {"5": 9}, "min_tokens": 3}
        answer = await p.http.post(url + path, json=body)
        assert answer.status == 200, await answer.text()
        await answer.read()
        (sent,) = engine.requests
        assert {name: sent.get(name) for name in none} == {**none, "tool_choice": sent_choice(sent)}
        found = turn(store, answer.headers["x-nextstate-turn"])
        assert found.trainable, found.untrainable
        assert not {*none} & {*found.sampling}

    def sent_choice(sent: dict[str, Any]) -> str | None:
        return "auto" if sent.get("tool_choice") == "auto" else None

    both(test, store, tmp_path)


def test_turns_of_the_split_eval_are_never_judged_or_trained(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1", split="eval"))["base_url"]
        scripted(engine, "ls")
        first, _ = await call(p, url, TASK)
        second, _ = await call(p, url, TASK, said("ls"), user("a b"))
        await environment.close("e-1", outcome=0.0, observation="failed")
        for one, text in ((first, "a b"), (second, "failed")):
            assert turn(store, one).untrainable == (
                "its episode's split is eval: its turns never train"
            )
            assert followed(store, one) == [(Source.ENVIRONMENT, text)]
        assert store.judging.lease(9, 60) == []

    both(test, store, tmp_path)


def test_an_episode_trains_its_own_lineage_and_its_key_opens_nothing_else(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        alice = Environment(p, "alice-key")
        opened, other = await alice.open("e-1"), await alice.open("e-2")
        key, v1 = opened["api_key"], f"{p.url}/v1"
        turn_id, _ = await call(p, opened["base_url"], TASK, key=key)
        assert turn(store, turn_id).lineage == "alice"
        _, found = await call(p, other["base_url"], TASK, key=key, status=403)
        assert refusal(found) == "The key of episode 'e-1' is not that of 'e-2'."
        agent = Environment(p, key)
        for path in ("episodes/e-1/rewards", "episodes/e-1/close", "feedback", "episodes"):
            found = await agent.ask("POST", path, {}, 403)
            assert "calls the model only" in refusal(found)
        bob = Environment(p, "main-key")
        assert "no episode" in refusal(await bob.ask("GET", "episodes/e-1", None, 404))
        await call(p, opened["base_url"], TASK, key="main-key", status=404)
        await call(p, opened["base_url"], TASK, key="wrong", status=401)
        headers = {"X-Session-Id": "e-1"}
        chat, _ = await call(p, v1, TASK, key="main-key", headers=headers)
        assert turn(store, chat).episode is None

    access = {"alice": Access(None, "alice-key")}
    both(test, store, tmp_path, key="main-key", access=access)


def test_a_retry_after_a_cut_reply_replaces_that_turn(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        url = (await Environment(p).open("e-1"))["base_url"]
        scripted(engine, "ls")
        first, _ = await call(p, url, TASK)
        history = [TASK, said("ls"), user("a b")]
        engine.queue.append(Script(("cat", " a"), cut_after=1))
        body = {"model": MODEL, "messages": history, "stream": True}
        with pytest.raises(aiohttp.ClientPayloadError):
            await (await p.http.post(f"{url}/chat/completions", json=body)).read()
        retry, _ = await call(p, url, *history)
        assert turn(store, retry).parent == first
        assert store.turns.ids() == [first, retry]
        assert len(store.turns.next_states(first)) == 1

    both(test, store, tmp_path)


def test_an_episode_that_one_worker_opens_is_known_to_the_other_at_once(
    store: Store, tmp_path: Path
) -> None:
    async def run() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, store, tmp_path, worker="a") as a,
            running(engine.url, store, tmp_path, worker="b") as b,
        ):
            for p in (a, b):
                await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            opened = await Environment(a).open("e-1", max_calls=2)
            session = {"X-Session-Id": "e-1"}
            first, _ = await call(b, f"{b.url}/v1", TASK, headers=session)
            second, _ = await call(a, f"{a.url}/v1", TASK, key=opened["api_key"])
            assert [turn(store, one).step for one in (first, second)] == [0, 1]
            await call(b, f"{b.url}/v1", TASK, headers=session, status=400)
            await Environment(b).close("e-1")
            await call(a, f"{a.url}/v1", TASK, headers=session, status=409)

    asyncio.run(run())
