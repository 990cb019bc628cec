"""`/v1/episodes` and `/v1/groups` over real HTTP on a real store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.records import Verdict
from nextstate.store import Store
from proxy.lineages import Access
from proxy.writer_process import WriterProcess
from tests.proxy.environment import TASK, Environment, call, refusal, said, user
from tests.proxy.running_proxy import Running, both
from tests.scripted_engine import Script, ScriptedEngine

FIELDS: dict[str, Any] = {
    "lineage": "main", "environment": "shell", "task": TASK["task"], "group": "g",
    "split": "train", "seed": 7, "max_calls": 3, "max_tokens": 90, "deadline_s": 60.0,
    "sampling": {"temperature": 1.0}, "metadata": {"row": 5, "tags": ["a"]},
}  # fmt: skip


def test_an_episode_comes_back_as_it_was_opened_called_and_closed(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        opened = await environment.open("e-1", **FIELDS, group_size=2)
        assert opened == {
            "episode": "e-1", "state": "open", "version": 0, "base_url": f"{p.url}/episodes/e-1/v1",
            "api_key": opened["api_key"],
        }  # fmt: skip
        turn_id, _ = await call(p, opened["base_url"], user("go"))
        tests = {"kind": "outcome", "name": "tests", "value": 1}
        step = {"kind": "process", "name": "tool", "value": -0.5, "index": 0, "source": "exit"}
        await environment.reward("e-1", tests, step)
        found = await environment.close("e-1")
        assert found == await environment.get("e-1")
        assert found.pop("opened_at") <= found.pop("closed_at")
        assert found == {
            **FIELDS, "episode": "e-1", "state": "closed", "status": "done", "outcome": 1.0,
            "version": None,
            "version_min": 0, "version_max": 0, "calls": 1, "tokens": 2, "reason": None,
            "turns": [turn_id],
            "rewards": [
                {"episode": "e-1", "turn": None, "index": None, "source": None, **tests},
                {"episode": "e-1", "turn": turn_id, **step},
            ],
        }  # fmt: skip
        counts = store.counts()
        assert (counts["episodes/closed"], counts["rewards/outcome"]) == (1, 1)
        page = await (await p.http.get(f"{p.url}/metrics")).text()
        assert 'nextstate_stored{record="episodes",state="closed"} 1' in page

    both(test, store, tmp_path)


def test_an_id_that_nobody_chose_is_new(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        found = [await environment.ask("POST", "episodes", TASK) for _ in range(2)]
        assert found[0]["episode"] != found[1]["episode"]
        assert found[0]["api_key"] != found[1]["api_key"]

    both(test, store, tmp_path)


@settings(max_examples=8)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=8),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    task=st.text(min_size=1, max_size=40).filter(lambda text: text.strip()),
)
def test_opens_that_race_and_repeat_make_one_episode_for_each_id(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], seed: int | None, task: str
) -> None:
    folder = tmp_path_factory.mktemp("opens")
    store = Store(StoreConfig(dir=str(folder / "state")))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        more = {"seed": seed, "task": task}
        found = await asyncio.gather(*(environment.open(name, **more) for name in names))
        by_name = {one["episode"]: one for one in found}
        assert all(by_name[one["episode"]] == one for one in found)
        assert len({one["api_key"] for one in found}) == len({*names})
        assert store.counts()["episodes/open"] == len({*names})

    both(test, store, folder)
    store.close()


def test_an_id_that_stands_for_something_else_is_a_conflict(store: Store, tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "lineage": "alice", "environment": "web", "task": "another", "group": "h",
        "split": "eval", "seed": 8, "max_calls": 4, "max_tokens": None, "deadline_s": 61,
        "sampling": {}, "metadata": {"row": 6},
    }  # fmt: skip

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        opened = await environment.open("e-1", **FIELDS)
        assert {*other} == {*FIELDS}
        for field in FIELDS:
            found = await environment.open("e-1", 409, **FIELDS | {field: other[field]})
            assert f"episode 'e-1' is there with another {field}" in refusal(found)
            assert found["error"]["type"] == "ConflictError"
        assert await environment.open("e-1", **FIELDS) == opened

    both(test, store, tmp_path, access={"alice": Access("alice-model", None)})


def test_a_group_opens_at_once_and_again_gives_the_same(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        body = {**TASK, "group": "g", "group_size": 3, "seed": 1}
        opened = await environment.ask("POST", "groups", body)
        assert opened["group"] == "g"
        assert [one["episode"] for one in opened["episodes"]] == ["g-0", "g-1", "g-2"]
        assert await environment.ask("POST", "groups", body) == opened
        full = await environment.open("g-3", 409, group="g")
        assert "group 'g' has its 3 episodes" in refusal(full)
        await environment.close("g-0", status="failed")  # what failed is tried again
        await environment.open("g-3", group="g")
        others: list[tuple[dict[str, Any], str]] = [
            ({"task": "another"}, "task or environment"),
            ({"split": "eval"}, "split"),
            ({"group_size": 4}, "group_size"),
        ]
        for more, what in others:
            found = await environment.open("g-9", 409, group="g", **more)
            assert f"group 'g' is there with another {what}" in refusal(found)
        await environment.ask("POST", "groups", body | {"group_size": 5}, 409)
        assert store.counts()["episodes/open"] == 3  # all or none
        found = await environment.ask("POST", "groups", TASK, 400)
        assert "group_size is missing" in refusal(found)

    both(test, store, tmp_path)


WRONG_OPENS: list[Any] = [
    (b"[]", "[] is no object: expected one with episode"),
    (b"{", "The body is no JSON"),
    ({"episodes": "e"}, "unknown field 'episodes'; did you mean 'episode'?"),
    ({"task": 5}, "task = 5: expected a text"),
    ({"task": " "}, "task has 1 characters: expected a text"),
    ({"task": None}, "task is missing"),
    ({"environment": None}, "environment is missing"),
    ({"environment": "a b"}, "environment = 'a b': expected 1 to 100 letters"),
    ({"episode": "../x"}, "episode = '../x': expected 1 to 100 letters"),
    ({"group": "g" * 101}, "expected 1 to 100 letters"),
    ({"split": "test"}, "split = 'test': expected train or eval"),
    ({"lineage": "bob"}, "lineage = 'bob': expected main"),
    ({"seed": 1 << 63}, "expected a number of 64 bits"),
    ({"seed": True}, "seed = True: expected a whole number"),
    ({"max_calls": 0}, "max_calls = 0: expected more than 0"),
    ({"max_tokens": 2.5}, "max_tokens = 2.5: expected a whole number"),
    ({"max_tokens": 1 << 31}, "below 2^31"),
    ({"deadline_s": "9"}, "deadline_s = '9': expected a number"),
    ({"deadline_s": float("nan")}, "deadline_s = nan: expected more than 0"),
    ({"group_size": 2}, "group_size = 2 without a group: name one"),
    ({"group_size": 0}, "group_size = 0: expected 1 to 1024"),
    ({"sampling": {"temperature": 9}}, "sampling.temperature = 9: expected 0 to 2"),
    ({"sampling": {"top_p": float("nan")}}, "sampling.top_p = nan: expected 1e-06 to 1"),
    ({"sampling": {"temperature": "1"}}, "sampling.temperature = 1: expected 0 to 2"),
    ({"sampling": {"temprature": 1}}, "expected one of temperature, top_p"),
    ({"metadata": {"x": "y" * 70_000}}, "metadata is longer than 65536 bytes"),
    (b'{"environment": "e", "task": "t", "metadata": {"x": NaN}}', "metadata cannot be kept: Out"),
    (b'{"environment": "e", "task": "t", "metadata": {"x": 1e999}}', "metadata cannot be kept"),
    (
        b'{"environment": "e", "task": "t", "metadata": {"x": %b%b}}' % (b"[" * 460, b"]" * 460),
        "metadata cannot be kept: it is nested deeper than 450 levels",
    ),
    (b'{"environment": "e", "task": "\\ud800"}', "is not valid Unicode"),
]


def test_a_body_that_is_wrong_is_refused_with_what_to_change(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        for body, expected in WRONG_OPENS:
            sent = body if isinstance(body, bytes) else {**TASK, **body}
            found = await Environment(p).ask("POST", "episodes", sent, 400)
            assert expected in refusal(found)
            assert len(refusal(found)) < 300
        assert not store.episodes.any()

    both(test, store, tmp_path)


WRONG_REWARDS: list[Any] = [
    (b'[{"kind": "outcome", "value": NaN}]', 400, "value = nan: expected a finite number"),
    (b'[{"kind": "outcome", "value": -Infinity}]', 400, "value = -inf: expected a finite"),
    (b'[{"kind": "outcome", "value": 1e999}]', 400, "value = inf: expected a finite"),
    (b'[{"kind": "outcome", "value": 1' + b"0" * 400 + b"}]", 400, "more than 300 digits"),
    (b"{}", 400, "The body is no list"),
    ([5], 400, "5 is no object"),
    ([{"kind": "outcome"}], 400, "value is missing"),
    ([{"value": 1}], 400, "kind = None: expected outcome or process"),
    ([{"kind": "result", "value": 1}], 400, "kind = 'result': expected outcome or process"),
    ([{"kind": "process", "value": 1}], 400, "names its turn or index"),
    ([{"kind": "outcome", "value": 1, "index": 0}], 400, "is of the whole episode"),
    ([{"kind": "process", "value": 1, "index": 0, "turn": "t"}], 400, "expected one"),
    ([{"kind": "process", "value": 1, "index": 1}], 404, "has 1 steps, and no index 1"),
    ([{"kind": "process", "value": 1, "index": -1}], 404, "no index -1"),
    ([{"kind": "process", "value": 1, "turn": "turn_x"}], 404, "has no turn 'turn_x'"),
    ([{"kind": "outcome", "value": 1, "name": "a b"}], 400, "name = 'a b': expected"),
    ([{"kind": "outcome", "value": True}], 400, "value = True: expected a number"),
    ([{"kind": "outcome", "val": 1}], 400, "did you mean 'value'?"),
]


def test_a_reward_that_is_wrong_is_refused_and_none_of_its_list_is_kept(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await call(p, (await environment.open("e-1"))["base_url"], user("go"))
        good = {"kind": "outcome", "name": "good", "value": 1}
        for reward, status, expected in WRONG_REWARDS:
            sent = [good, *reward] if isinstance(reward, list) else reward
            found = await environment.ask("POST", "episodes/e-1/rewards", sent, status)
            assert expected in refusal(found)
        assert (await environment.get("e-1"))["rewards"] == []

    both(test, store, tmp_path)


def test_rewards_have_a_bound_in_a_list_and_in_an_episode(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are written, no turn is recorded."""
    monkeypatch.setattr("nextstate.store.episodes.MOST_REWARDS", 3)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        many: list[dict[str, Any]] = [
            {"kind": "outcome", "name": f"n-{n}", "value": 1} for n in range(10_001)
        ]
        found = await environment.ask("POST", "episodes/e-1/rewards", many, 400)
        assert refusal(found) == "10001 rewards: expected at most 10000."
        await environment.reward("e-1", *many[:2])
        await environment.reward("e-1", *many[1:3])
        found = await environment.ask("POST", "episodes/e-1/rewards", many[3:4], 400)
        assert "would have 4 rewards: expected at most 3" in refusal(found)
        assert len((await environment.get("e-1"))["rewards"]) == 3

    both(test, store, tmp_path)


def test_a_side_turn_is_no_step_that_has_a_reward(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        side, _ = await call(p, url, user("a title"), headers={"X-Turn-Type": "side"})
        for named in ({"index": 0}, {"turn": side}):
            reward = [{"kind": "process", "value": 1, **named}]
            found = await environment.ask("POST", "episodes/e-1/rewards", reward, 400)
            assert f"turn '{side}' is a side turn" in refusal(found)

    both(test, store, tmp_path)


def test_the_last_word_counts_per_name_and_step(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        turns = [(await call(p, url, user(text)))[0] for text in ("a", "b")]
        step = {"kind": "process", "name": "tool"}
        await environment.reward(
            "e-1",
            {**step, "value": 1, "index": 0},
            {**step, "value": 2, "turn": turns[1]},
            {**step, "value": 3, "turn": turns[0]},
            {**step, "value": 4, "index": 0, "name": "other"},
            {"kind": "outcome", "value": 5, "name": "tool"},
        )
        found = (await environment.reward("e-1", {**step, "value": 6, "index": 1}))["rewards"]
        assert [(one["name"], one["index"], one["value"]) for one in found] == [
            ("tool", 0, 3.0), ("other", 0, 4.0), ("tool", None, 5.0), ("tool", 1, 6.0),
        ]  # fmt: skip

    both(test, store, tmp_path)


def test_a_closed_episode_takes_no_reward_and_no_other_end(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        closed = await environment.close("e-1", outcome=1)
        assert await environment.close("e-1", outcome=1.0) == closed
        found = await environment.end("e-1", 409, outcome=0)
        told = "closed as done with the outcome 1.0: it cannot be closed as done with 0.0"
        assert told in refusal(found)
        await environment.ask("POST", "episodes/e-1/close", {"status": "aborted"}, 409)
        reward = [{"kind": "outcome", "value": 1}]
        found = await environment.ask("POST", "episodes/e-1/rewards", reward, 409)
        assert "give the reward 'outcome' before you close it" in refusal(found)
        assert (await environment.open("e-1"))["state"] == "closed"

    both(test, store, tmp_path)


def test_two_different_outcomes_are_a_conflict_and_the_episode_stays_open(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        await environment.reward("e-1", {"kind": "outcome", "name": "tests", "value": 1})
        found = await environment.end("e-1", 409, outcome=0)
        told = "two different outcomes: its rewards say tests = 1, and its close says 0"
        assert told in refusal(found)
        await environment.reward("e-1", {"kind": "outcome", "name": "both", "value": 1})
        found = await environment.end("e-1", 409, outcome=0)
        assert "its rewards say tests = 1, both = 1, and its close says 0" in refusal(found)
        await environment.reward("e-1", {"kind": "outcome", "name": "both", "value": 0.5})
        found = await environment.end("e-1", 409)
        assert "tests = 1, both = 0.5: name one as outcome" in refusal(found)
        assert (await environment.get("e-1"))["state"] == "open"
        assert (await environment.close("e-1", outcome=0.75))["outcome"] == 0.75

    both(test, store, tmp_path)


@pytest.mark.parametrize("status", ["failed", "aborted"])
def test_what_failed_for_another_reason_than_the_policy_never_trains(
    store: Store, tmp_path: Path, status: str
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        engine.queue.append(Script(("ls",)))
        first, _ = await call(p, url, user("go"))
        second, _ = await call(p, url, user("go"), said("ls"), user("a b"))
        store.judging.settle_verdict(Verdict(first, (1,), 1, "rules"))
        assert store.counts()["samples/waiting"] == 1
        found = await environment.end("e-1", 400, status, outcome=0)
        assert f"closed as {status} has none" in refusal(found)
        found = await environment.end("e-1", 200, status, observation="the engine is gone")
        assert (found["state"], found["outcome"]) == ("dropped", None)
        assert found["reason"] == f"the episode was closed as {status}"
        assert store.judging.lease(9, 60) == []
        store.judging.settle_verdict(Verdict(second, (1,), 1, "rules"))
        counts = store.counts()
        assert ("samples/waiting" in counts, counts["samples/dropped"]) == (False, 2)
        assert counts["turns/trainable"] == 0

    both(test, store, tmp_path)


WRONG_ENDS: list[Any] = [
    ({}, "status = None: expected done or truncated or failed or aborted"),
    ({"status": "ok"}, "status = 'ok'"),
    ({"status": "done", "outcome": "1"}, "outcome = '1': expected a number"),
    (b'{"status": "done", "outcome": NaN}', "outcome = nan: expected a finite number"),
    ({"status": "done", "observation": ["x"]}, "observation = ['x']: expected a text"),
    ({"status": "done", "reward": 1}, "unknown field 'reward'"),
]


def test_a_close_that_is_wrong_leaves_the_episode_open(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        for body, expected in WRONG_ENDS:
            found = await environment.ask("POST", "episodes/e-1/close", body, 400)
            assert expected in refusal(found)
        assert (await environment.get("e-1"))["state"] == "open"

    both(test, store, tmp_path)


def test_a_trace_has_the_tokens_of_each_turn_and_masks_what_does_not_train(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        engine.queue += [Script(("l", "s")), Script(("x",), miscount=1)]
        engine.queue.append(Script(unknown_logprob=True))
        turns = [(await call(p, url, user(text)))[0] for text in "abc"]
        found = await environment.ask("GET", "episodes/e-1/trace")
        assert found["schema_version"] == 1
        first, second = found["turns"]  # the third has no log-probs
        assert second["metadata"]["untrainable"] is not None
        metadata = {"step": 0, "policy_version": 0, "finish_reason": "stop", "untrainable": None}
        assert first == {
            "node_id": turns[0], "prompt_token_ids": [1, 2, 3], "completion_token_ids": [100, 101],
            "per_token_logps": [-0.25, -0.5], "loss_mask": [0, 0, 0, 1, 1], "metadata": metadata,
        }  # fmt: skip
        assert (second["node_id"], second["loss_mask"]) == (turns[1], [0, 0, 0, 0])

    both(test, store, tmp_path)


def test_what_is_not_there_is_not_found(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        await environment.open("e-1")
        for method, path in (
            ("GET", "episodes/e-2"),
            ("GET", "episodes/e-2/trace"),
            ("POST", "episodes/e-2/close"),
            ("POST", "episodes/e-2/rewards"),
        ):
            body: Any = [] if path.endswith("rewards") else {"status": "done"}
            found = await environment.ask(method, path, body, 404)
            assert refusal(found) == "There is no episode 'e-2': open it by POST /v1/episodes."
        for name in ("%ED%B3%BC", "e%201", "%00"):
            assert "no episode" in refusal(
                await environment.ask("GET", f"episodes/{name}", None, 404)
            )
        assert "known are" in refusal(await environment.ask("GET", "episodes/e-1/x", None, 404))
        found = await environment.ask("DELETE", "episodes/e-1", None, 405)
        assert refusal(found) == "/v1/episodes/e-1 takes GET, not DELETE."
        assert "takes POST" in refusal(await environment.ask("GET", "episodes", None, 405))
        text = {"Content-Type": "text/plain"}
        answer = await p.http.post(f"{p.url}/v1/episodes", data=b"{}", headers=text)
        assert answer.status == 415

    both(test, store, tmp_path)


def test_another_sites_page_opens_no_episode(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        opened = await Environment(p).open("e-1")
        evil = {"Origin": "https://evil.example"}
        for path in ("episodes", "groups", "episodes/e-1/close"):
            answer = await p.http.post(f"{p.url}/v1/{path}", json={}, headers=evil)
            assert answer.status == 403
        answer = await p.http.post(f"{opened['base_url']}/chat/completions", json={}, headers=evil)
        assert answer.status == 403

    both(test, store, tmp_path)


def test_a_writer_that_is_killed_between_open_and_close_loses_no_step(
    store: Store, tmp_path: Path
) -> None:
    writer = WriterProcess()

    async def test(engine: ScriptedEngine, p: Running) -> None:
        environment = Environment(p)
        url = (await environment.open("e-1"))["base_url"]
        engine.queue.append(Script(("ls",)))
        await call(p, url, user("go"))
        (first,) = writer.processes
        first.kill()
        await call(p, url, user("go"), said("ls"), user("a b"))
        found = await environment.close("e-1", outcome=1, observation="passed")
        assert len(found["turns"]) == 2
        assert first not in writer.processes
        states = [store.turns.next_states(turn) for turn in found["turns"]]
        assert [[state.text for state in one] for one in states] == [["a b"], ["passed"]]

    # The next writer takes longer than this to start: the reply ends before its turn is stored.
    both(test, store, tmp_path, writer=writer, record_timeout_s=0.01)
