"""The simulated cluster: nothing is lost, queues are as worked by hand, and the seed decides."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cluster import MEASURED, changed, page, variants
from benchmarks.service_times import Times
from benchmarks.simulated_cluster import Cluster, simulate
from benchmarks.simulated_engine import Placing, Plan, Request
from nextstate.engine.client import SLOW_S
from proxy.intervals import INTERVALS

LINES = Times(
    [(100, 0, 1.0), (200, 0, 2.0), (50, 100, 0.5), (50, 200, 0.5)], [(1, 0.1), (2, 0.2), (3, 0.3)]
)
"""A new token of a prompt takes 10 ms, a token of a reply 100 ms for each reply at once."""
FEW = Plan(agents=12, engines=3, seconds=60.0, warm_up_s=0.0)


def alone(**more: float) -> Cluster:
    """One engine, and nobody who asks."""
    return Cluster(replace(Plan(agents=0, engines=1, system=0), **more), LINES)


def asked(cluster: Cluster, at: float, key: bytes, prompt: int, reply: int) -> Request:
    """A request at a moment, to the first engine."""
    request = Request(key, prompt, reply, at)
    cluster.at(at, cluster.engines[0].ask, request)
    return request


def seen(request: Request) -> tuple[float, float, float]:
    assert request.begun_at is not None
    assert request.first_at is not None
    assert request.ended_at is not None
    return request.begun_at, request.first_at, request.ended_at


def test_service_times_follow_what_was_measured_and_go_on_as_they_end() -> None:
    assert LINES.worst < 1e-6
    assert LINES.prefill_s(300, 500) == pytest.approx(3.0)
    assert [LINES.step_s(n) for n in (1, 2, 3, 5)] == pytest.approx([0.1, 0.2, 0.3, 0.5])
    between = Times([(1, 0, 1.0)], [(1, 0.1), (4, 0.4), (8, 0.4)])
    assert [between.step_s(n) for n in (2, 6, 10)] == pytest.approx([0.2, 0.4, 0.4])
    measured = Times.read(MEASURED)
    assert measured.worst < 0.5
    assert measured.step_s(1) < measured.step_s(32) < measured.step_s(128) < measured.step_s(256)


def test_one_engine_is_the_queue_that_was_worked_by_hand() -> None:
    cluster = alone()
    first = asked(cluster, 0.0, b"a", 100, 11)
    second = asked(cluster, 1.5, b"b", 200, 11)
    third = asked(cluster, 2.0, b"c", 100, 1)
    cluster.run()
    # 0 to 1: the first prompt. By 1.5 five of its ten steps are made. 1.5 to 3.5: the second
    # prompt; 3.5 to 4.5: the third, whose reply is one token. Then two replies at 0.2 s a step: the
    # first one's five steps end at 5.5, and the second goes on alone with five of 0.1 s.
    assert seen(first) == pytest.approx((0.0, 1.0, 5.5))
    assert seen(second) == pytest.approx((1.5, 3.5, 6.0))
    assert seen(third) == pytest.approx((3.5, 4.5, 4.5))


def test_what_an_engine_remembers_is_not_computed_again_until_its_memory_is_needed() -> None:
    cluster = alone(memory=300, context=250, longest_reply=200)
    requests = [
        asked(cluster, 0.0, b"a", 100, 10),
        asked(cluster, 10.0, b"a", 150, 10),  # 110 are known
        asked(cluster, 20.0, b"b", 180, 20),  # 200 of 300: of 160 the last 60 are dropped
        asked(cluster, 30.0, b"a", 150, 10),
    ]
    cluster.run()
    assert [request.cached for request in requests] == [0, 110, 0, 100]


def test_a_request_waits_until_there_is_room_for_it() -> None:
    cluster = alone(memory=300, context=250, longest_reply=200)
    first = asked(cluster, 0.0, b"a", 100, 101)
    second = asked(cluster, 1.0, b"b", 100, 1)
    cluster.run()
    assert seen(first) == pytest.approx((0.0, 1.0, 11.0))
    assert seen(second) == pytest.approx((11.0, 12.0, 12.0))


plans = st.builds(
    Plan,
    agents=st.integers(1, 20),
    engines=st.integers(1, 4),
    seconds=st.just(60.0),
    warm_up_s=st.just(0.0),
    seed=st.integers(0, 2**32),
    placing=st.sampled_from(["sticky", "hashed", "anywhere"]),
    mean_think_s=st.sampled_from([0.5, 5.0]),
    memory=st.sampled_from([2300, 20_000]),
    most_running=st.sampled_from([1, 3, 256]),
    flip_every_s=st.sampled_from([0.0, 5.0]),
    mean_life_s=st.sampled_from([0.0, 10.0, 100.0]),
    back_s=st.sampled_from([1.0, 30.0]),
    hold_s=st.sampled_from([5.0, 120.0]),
)


@settings(max_examples=40)
@given(plans)
def test_every_request_ends_or_fails_and_nothing_is_left_or_counted_twice(plan: Plan) -> None:
    cluster = Cluster(plan, LINES)
    found = cluster.run()
    assert len({id(request) for request in found.requests}) == len(found.requests)
    assert found.measured == found.requests
    done = sum(request.ok for request in found.requests)
    assert done + found.failed == len(found.requests)
    assert plan.mean_life_s or found.failed == 0
    for request in found.requests:
        assert request.ended_at is not None
        assert request.ended_at >= request.asked_at
        assert 0 <= request.cached < request.prompt <= plan.context - request.reply
        if request.ok:
            begun, first, ended = seen(request)
            assert request.asked_at <= begun <= first <= ended
    for engine in cluster.engines:
        assert (engine.running, [*engine.waiting], engine.cache.held) == (0, [], 0)
        assert engine.cache.size == sum(engine.cache.kept.values()) <= plan.memory
    assert sum(found.sent.values()) <= len(found.requests) + found.moved


@settings(max_examples=20)
@given(plans)
def test_the_seed_decides_everything(plan: Plan) -> None:
    def told(one: Plan) -> list[object]:
        found = simulate(one, LINES)
        return [
            *((r.key, r.asked_at, r.ended_at, r.ok, r.cached) for r in found.requests),
            (found.flips_s, found.moved, found.left_out, [*found.sent.items()]),
        ]

    assert told(plan) == told(plan)
    assert told(plan) != told(replace(plan, seed=plan.seed + 1))


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from(["sticky", "hashed"]))
def test_conversations_stay_where_they_are_while_nothing_happens(
    seed: int, placing: Placing
) -> None:
    at: dict[bytes, set[str]] = defaultdict(set)
    found = simulate(replace(FEW, seed=seed, placing=placing), LINES)
    for request in found.requests:
        assert request.engine is not None
        at[request.key].add(request.engine.name)
    assert all(len(names) == 1 for names in at.values())


def test_replies_of_an_engine_that_ends_fail_and_what_waits_there_moves_once() -> None:
    cluster = Cluster(replace(FEW, engines=2, most_running=1), LINES)
    engine, other = cluster.engines
    had: list[Request] = []

    def end() -> None:
        had.extend(one for one in cluster.found.requests if one.engine is engine and not one.ok)
        cluster.fail(engine, random.Random(0))

    cluster.plan = replace(cluster.plan, mean_life_s=1e9)
    cluster.at(20.0, end)
    cluster.run()
    began = [one for one in had if one.first_at is not None and one.first_at <= 20.0]
    assert [one.ok for one in began] == [False] * len(began)
    moved = [one for one in had if one not in began]
    assert moved
    assert all(one.ok and one.engine is other and one.died == 1 for one in moved)
    assert cluster.found.moved == len(moved)


def test_a_version_serves_without_an_engine_that_loads_it_late() -> None:
    cluster = Cluster(replace(FEW, agents=0, flip_every_s=50.0, load_s=0.0), LINES)
    late = cluster.engines[0]
    cluster.at(49.0, late.ask, Request(b"x", 10_000, 1, 49.0, agent=None))  # for 100 s
    cluster.run()
    wait = SLOW_S + INTERVALS.store_poll_s + INTERVALS.flip_s
    assert cluster.found.flips_s == pytest.approx([wait + 0.12])
    assert cluster.found.left_out == 1
    assert all("1" in engine.loaded for engine in cluster.engines)


def test_the_page_has_a_row_for_each_number_of_engines_and_each_variant() -> None:
    plan = changed(FEW, ["agents=20", "flip_every_s=20", "mean_life_s=50"])
    assert (plan.agents, plan.flip_every_s) == (20, 20.0)
    text = page(plan, LINES, (1, 2))
    assert text.count("\n| ") == 2 + 2 + len(variants(plan))
    with pytest.raises(ValueError, match="--set agent=1: expected NAME=VALUE with one of agents"):
        changed(plan, ["agent=1"])
    with pytest.raises(ValueError, match="context = 300: expected more than"):
        simulate(changed(plan, ["context=300"]), LINES)
