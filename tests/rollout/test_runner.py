"""The runner over a real proxy and a scripted engine, with bash in real sandboxes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from judge.groups import settle_over
from nextstate.app.cli import command_parser
from nextstate.engine.process import free_port
from nextstate.episodes import EpisodeState, EpisodeStatus, RewardKind, Split
from nextstate.errors import RefusedError, RolloutError
from nextstate.hooks import Acted, Scored
from nextstate.records import Json, Source
from nextstate.store import Store
from plugins.environments.terminal import create
from rollout.attempt import Attempt
from rollout.attempt import play as attempt_at
from rollout.proxy import ProxyClient
from rollout.runner import Plan, run, summary
from rollout.tasks import Task
from tests.proxy.running_proxy import Running, both, until
from tests.rollout.machine import every_episode, needs_bubblewrap
from tests.scripted_engine import MODEL, Script, ScriptedEngine

COUNT = Task(
    "count-1",
    Split.TRAIN,
    {
        "instruction": "Write the number of lines of a.txt to n.txt.",
        "files": {"a.txt": "x\ny\n"},
        "check": "test $(cat n.txt) = 2",
    },
)
PLAN = Plan("terminal", parallel=4, group_size=1, deadline_s=60)


def says(*commands: str) -> list[Script]:
    """Replies that run these commands."""
    return [Script(("```bash\n", command, "\n```")) for command in commands]


@asynccontextmanager
async def client(p: Running, key: str | None = None) -> AsyncIterator[ProxyClient]:
    async with aiohttp.ClientSession() as http:
        yield ProxyClient(http, p.url, key, MODEL, 60)


class Shown:
    """An environment without a machine: it shows what it is told, and ends after some steps."""

    def __init__(self, kind: ShownKind) -> None:
        self.kind = kind
        self.steps = 0

    async def reset(self, task: Json, seed: int) -> str:
        self.kind.seeds.append(seed)
        await self.kind.at_reset()
        return "begin"

    async def step(self, action: str) -> Acted:
        self.kind.actions.append(action)
        self.kind.playing += 1
        self.kind.most_playing = max(self.kind.most_playing, self.kind.playing)
        await self.kind.at_step()
        self.kind.playing -= 1
        self.steps += 1
        return Acted(f"shown {self.steps}", 0.5, self.steps == self.kind.ends_after)

    async def score(self) -> Scored:
        await self.kind.at_score()
        return Scored(1.0)

    async def close(self) -> None:
        self.kind.closed += 1
        if self.kind.breaks_at_close:
            raise KeyError("text")


async def nothing() -> None:
    await asyncio.sleep(0)


class ShownKind:
    def __init__(
        self,
        at_step: Callable[[], Awaitable[None]] = nothing,
        at_reset: Callable[[], Awaitable[None]] = nothing,
        ends_after: int = 1,
        at_score: Callable[[], Awaitable[None]] = nothing,
    ) -> None:
        self.at_score, self.breaks_at_close = at_score, False
        self.at_step, self.at_reset, self.ends_after = at_step, at_reset, ends_after
        self.seeds: list[int] = []
        self.actions: list[str] = []
        self.playing = self.most_playing = self.closed = 0

    def check_task(self, task: Json) -> None:
        pass

    async def check_machine(self) -> None:
        pass

    def make(self) -> Shown:
        return Shown(self)


def tasks(count: int) -> list[Task]:
    return [Task(f"task-{number}", Split.TRAIN, {}) for number in range(count)]


def ignore(_: Attempt) -> None:
    pass


async def play(
    p: Running, kind: Any, plan: Plan = PLAN, given: Sequence[Task] = (COUNT,)
) -> list[Attempt]:
    async with client(p) as proxy:
        return await run(plan, given, kind, proxy, ignore)


@needs_bubblewrap
def test_a_solved_task_is_an_episode_with_steps_rewards_and_an_outcome(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += says("cat b.txt", "wc -l < a.txt > n.txt", "submit")
        (attempt,) = await play(p, create(None))
        assert (attempt.status, attempt.outcome, attempt.calls) == ("done", 1.0, 3)
        episode = store.episodes.get(attempt.episode)
        assert episode is not None
        assert (episode.environment, episode.task, episode.seed) == ("terminal", "count-1", 0)
        assert (episode.state, episode.status, episode.outcome) == ("closed", "done", 1.0)
        turns = store.episodes.turn_ids(attempt.episode)
        rewards = store.episodes.rewards(attempt.episode)
        assert [(one.turn, one.value, one.kind) for one in rewards] == [
            (turns[0], -1.0, RewardKind.PROCESS),
            (turns[1], 0.0, RewardKind.PROCESS),
        ]
        followed = [store.turns.next_states(turn) for turn in turns]
        assert {state.source for states in followed for state in states} == {Source.ENVIRONMENT}
        assert [states[0].text for states in followed] == [
            "exit code 1\ncat: b.txt: No such file or directory",
            "exit code 0",
            "Submitted.\ncheck: exit code 0",
        ]
        assert [len(request["messages"]) for request in engine.requests] == [1, 3, 5]

    both(test, store, tmp_path)


@pytest.mark.parametrize("most", [None, 50])
def test_a_reply_is_as_long_as_the_engine_lets_it_be_unless_the_plan_bounds_it(
    store: Store, tmp_path: Path, most: int | None
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        await play(p, ShownKind(), replace(PLAN, max_tokens=most))
        (request,) = engine.requests
        assert {request.get("max_tokens"), request.get("max_completion_tokens")} - {None} == (
            set() if most is None else {most}
        )

    both(test, store, tmp_path)


def test_the_sampler_of_a_run_is_that_of_its_episodes(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        command = ["rollout", "command", "--sampling", '{"temperature": 0.5, "seed": null}']
        given = command_parser().parse_args(command).sampling
        await play(p, ShownKind(), replace(PLAN, sampling=given))
        assert engine.requests[0]["temperature"] == 0.5
        (episode,) = every_episode(store)
        assert episode.sampling == {"temperature": 0.5, "seed": None}
        with pytest.raises(SystemExit):
            command_parser().parse_args([*command[:3], "0.5"])

    both(test, store, tmp_path)


@needs_bubblewrap
def test_a_group_is_settled_and_its_steps_are_ready_to_train(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        engine.queue += says("echo 2 > n.txt", "submit", "echo 3 > n.txt", "submit")
        plan = replace(PLAN, group_size=2, parallel=1)
        attempts = await play(p, create(None), plan)
        assert [one.outcome for one in attempts] == [1.0, 0.0]
        settle_over(store, 0, judging_s=-1)  # nobody judges here
        states = [store.episodes.get(one.episode) for one in attempts]
        assert [one and one.state for one in states] == [EpisodeState.SETTLED] * 2
        assert store.counts()["samples/ready"] == 4

    both(test, store, tmp_path)


@pytest.mark.parametrize("parallel", [3, pytest.param(64, marks=pytest.mark.soak)])
def test_no_more_episodes_than_places_run_at_once_and_each_is_closed(
    store: Store, tmp_path: Path, parallel: int
) -> None:
    count = 4 * parallel

    async def test(_: ScriptedEngine, p: Running) -> None:
        async def full() -> None:
            while kind.playing < parallel and kind.closed < count - parallel:
                await asyncio.sleep(0.01)

        kind = ShownKind(at_step=full)
        plan = replace(PLAN, parallel=parallel, group_size=2, seed=5)
        attempts = await play(p, kind, plan, tasks(count // 2))
        assert (kind.most_playing, kind.closed) == (parallel, count)
        assert sorted(kind.seeds) == sorted([*range(5, 5 + count // 2)] * 2)
        groups = [store.episodes.get(one.episode) for one in attempts]
        assert {*Counter(one and one.group for one in groups).values()} == {2}
        assert store.counts()["episodes/closed"] == count

    both(test, store, tmp_path)


def test_a_budget_ends_an_episode_that_keeps_what_it_reached(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        kind = ShownKind(ends_after=99)
        by_calls = replace(PLAN, max_calls=3)
        by_tokens = replace(PLAN, max_tokens=4)  # the scripted reply has two
        for plan, calls in ((by_calls, 3), (by_tokens, 2)):
            (attempt,) = await play(p, kind, plan)
            assert (attempt.status, attempt.outcome, attempt.calls) == ("truncated", 1.0, calls)
        engine.queue += [Script(), Script(status=400)]  # messages beyond the engine's context
        (attempt,) = await play(p, kind)
        assert (attempt.status, attempt.calls, kind.closed) == ("truncated", 1, 3)

    both(test, store, tmp_path)


def test_a_deadline_ends_a_step(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        in_time = replace(PLAN, deadline_s=2)
        (attempt,) = await play(p, ShownKind(at_step=forever), in_time)
        assert (attempt.status, attempt.outcome, attempt.calls) == ("truncated", 1.0, 1)
        (attempt,) = await play(p, ShownKind(at_reset=forever), in_time)
        assert (attempt.status, attempt.reason) == (
            "failed",
            "the model did not reply within 2 s",
        )
        (attempt,) = await play(p, ShownKind(at_score=forever), in_time)
        assert (attempt.status, attempt.outcome) == ("failed", None)
        assert attempt.reason == "the outcome was not known after 2 s"

    both(test, store, tmp_path)


def test_what_breaks_beside_the_policy_is_a_failed_episode(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        async def breaks() -> None:
            raise RolloutError("no disk")

        async def wrong() -> None:
            raise KeyError("secret text")

        engine.queue += [Script(status=400)]  # at once: nothing of it is the agent's

        async def late() -> None:
            raise TimeoutError

        kinds = [ShownKind(), ShownKind(at_step=breaks), ShownKind(at_reset=wrong)]
        kinds.append(ShownKind(at_step=late))
        reasons: list[str] = []
        for kind in kinds:
            (attempt,) = await play(p, kind)
            assert (attempt.status, attempt.outcome, kind.closed) == ("failed", None, 1)
            reasons.append(attempt.reason or "")
            episode = store.episodes.get(attempt.episode)
            assert episode is not None
            assert (episode.state, episode.status) == ("dropped", "failed")
        assert reasons == [
            "the proxy answered 400: scripted",
            "no disk",
            "the environment raised KeyError",
            "the environment raised TimeoutError",
        ]

    both(test, store, tmp_path)


def test_an_environment_that_cannot_be_closed_costs_no_outcome(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        kind = ShownKind()
        kind.breaks_at_close = True
        (attempt,) = await play(p, kind)
        assert (attempt.status, attempt.outcome) == ("done", 1.0)
        assert "an environment was not closed" in caplog.text

    both(test, store, tmp_path)


def test_the_environment_gets_replies_without_thoughts(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        kind = ShownKind(ends_after=2)
        engine.queue += [Script(("<think>```ls```", "</think>", "7")), Script(("8",))]
        await play(p, kind)
        assert kind.actions == ["7", "8"]
        assert engine.requests[1]["messages"][1]["content"] == "<think>```ls```</think>7"

    both(test, store, tmp_path)


def test_a_run_ends_when_everything_fails(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async def breaks() -> None:
            raise RolloutError("no disk")

        kind = ShownKind(at_reset=breaks)
        with pytest.raises(RolloutError, match="the last 4 episodes failed: no disk"):
            await play(p, kind, replace(PLAN, parallel=2, group_size=3), tasks(100))
        assert 4 <= kind.closed <= 6
        assert "episodes/open" not in {k for k, v in store.counts().items() if v}

    both(test, store, tmp_path)


def test_a_stopped_run_aborts_what_is_open(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async def forever() -> None:
            await asyncio.Event().wait()

        kind = ShownKind(at_step=forever)
        plan = replace(PLAN, parallel=2, group_size=3)
        running = asyncio.create_task(play(p, kind, plan))
        await until(lambda: kind.playing == 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert kind.closed == 2
        found = every_episode(store)
        assert [one.status for one in found] == [EpisodeStatus.ABORTED] * 3

    both(test, store, tmp_path)


def test_an_episode_without_the_time_to_begin_is_aborted(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async with client(p) as proxy:
            (opened,) = await proxy.open_group(
                environment="terminal", task="count-1", group_size=1, deadline_s=9
            )
            assert await proxy.can_begin(opened, 5)
            assert not await proxy.can_begin(opened, 10)
        episode = store.episodes.get(opened.episode)
        assert episode is not None
        assert episode.status == "aborted"

    both(test, store, tmp_path)


def test_an_episode_whose_budget_was_used_up_before_it_began_has_failed(
    store: Store, tmp_path: Path
) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async with client(p) as proxy:
            asked = {"environment": "terminal", "task": "count-1", "group_size": 1, "max_calls": 1}
            (opened,) = await proxy.open_group(**asked)
            await proxy.call(opened, [{"role": "user", "content": "hi"}])
            attempt = await attempt_at(proxy, opened, Shown(ShownKind()), COUNT, 0, 9, 60)
        assert (attempt.status, attempt.outcome) == ("failed", None)

    both(test, store, tmp_path)


def test_the_proxys_words_are_told_when_it_opens_no_group(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        with pytest.raises(RefusedError, match="answered 400: lineage = 'other': expected main"):
            await play(p, ShownKind(), replace(PLAN, lineage="other"))
        with pytest.raises(RefusedError, match="answered 400: version = 9"):
            await play(p, ShownKind(), replace(PLAN, version=9))
        await p.http.close()

    both(test, store, tmp_path)


def test_a_proxy_that_does_not_run_is_named() -> None:
    async def test() -> None:
        async with aiohttp.ClientSession() as http:
            proxy = ProxyClient(http, f"http://127.0.0.1:{free_port()}", None, MODEL, 9)
            with pytest.raises(RolloutError, match=r"no answer from the proxy .*`nextstate up`"):
                await run(PLAN, [COUNT], ShownKind(), proxy, ignore)

    asyncio.run(test())


def test_eval_episodes_neither_train_nor_are_judged(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        (attempt,) = await play(p, ShownKind(), given=[replace(COUNT, split=Split.EVAL)])
        episode = store.episodes.get(attempt.episode)
        assert episode is not None
        assert (episode.split, episode.outcome) == ("eval", 1.0)
        assert store.judging.lease(9, 60) == []

    both(test, store, tmp_path)


def test_a_key_is_sent(store: Store, tmp_path: Path) -> None:
    async def test(_: ScriptedEngine, p: Running) -> None:
        async with client(p, "the-key") as proxy:
            attempts = await run(PLAN, [COUNT], ShownKind(), proxy, ignore)
        assert [one.outcome for one in attempts] == [1.0]
        with pytest.raises(RefusedError, match="answered 401"):
            await play(p, ShownKind())

    both(test, store, tmp_path, key="the-key")


def test_the_summary_counts_what_was_solved_with_its_confidence() -> None:
    attempts = [
        Attempt("e-1", COUNT, EpisodeStatus.DONE, 1.0, 2, 1.0, 0.5),
        Attempt("e-2", COUNT, EpisodeStatus.TRUNCATED, 0.0, 2, 3.0, 0.1),
        Attempt("e-3", COUNT, EpisodeStatus.FAILED, None, 0, 0.5, 0.0),
    ]
    assert summary(attempts, 2.0).splitlines() == [
        "3 episodes in 2.0 s: solved 1 of 2 (50%; with 90 % confidence 12% to 88%), "
        "1 truncated, 1 failed",
        "an episode waits 1.50 s for the model, 0.20 s for its environment",
    ]
    assert summary([], 0.0) == "0 episodes in 0.0 s: solved 0 of 0"


def test_the_summary_has_a_line_for_each_family_if_there_are_a_few() -> None:
    def solved(name: str, outcome: float) -> Attempt:
        return Attempt("e", Task(name, Split.EVAL, {}), EpisodeStatus.DONE, outcome)

    attempts = [solved("add-up-eval-0", 1.0), solved("add-up-eval-1", 0.0), solved("find-3", 1.0)]
    assert summary(attempts, 2.0).splitlines()[1:] == [
        "  add-up: 1 of 2 (50%; with 90 % confidence 12% to 88%)",
        "  find: 1 of 1 (100%; with 90 % confidence 27% to 100%)",
    ]
    many = [solved(f"task{number}x", 1.0) for number in range(21)]
    assert len(summary(many, 2.0).splitlines()) == 1
