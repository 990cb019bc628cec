"""Sessions, links and next states of agents that interleave, retry, fork, reset and cut histories.

The store has to find out from the messages alone what the generated agents know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proxy.conversations import Step, recorded
from tests.proxy.generated_agents import FORKING, MOVES, PLAIN, crowds, programs

DATABASES = True
"""Each test runs on both."""
FEW = settings(max_examples=20)


def followed(lanes: Sequence[Sequence[Step]]) -> dict[str, list[str]]:
    """What followed each turn first: an agent's own steps keep their order."""
    found: dict[str, list[str]] = {}
    for step in (step for lane in lanes for step in lane):
        if step.parent is not None:
            found.setdefault(step.parent, step.states)
    return found


def grouped(names: dict[str, str]) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for turn, name in names.items():
        groups[name].add(turn)
    return {frozenset(group) for group in groups.values()}


@FEW
@given(programs(FORKING), st.randoms(use_true_random=False))
def test_every_request_finds_the_turn_that_it_continues_in_whatever_order_agents_interleave(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with recorded(lanes, rng) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}
        conversations = {name: step.conversation for name, step in truth.items()}
        assert grouped(found.sessions) == grouped(conversations)
        expected = followed(lanes)
        assert {name: found.states(name) for name in truth} == {
            name: expected.get(name, []) for name in truth
        }


@FEW
@given(programs(FORKING, unique=False), st.randoms(use_true_random=False))
def test_sessions_with_ids_of_their_own_never_mix(lanes: list[list[Step]], rng: Random) -> None:
    names = [f"session {number}" for number in range(len(lanes))]
    owner = {step.id: number for number, lane in enumerate(lanes) for step in lane}
    with recorded(lanes, rng, names) as found:
        for turn, number in owner.items():
            assert found.sessions[turn].partition("~")[0] == names[number]
            parent = found.parents[turn]
            assert parent is None or owner[parent] == number


@FEW
@given(programs(PLAIN, unique=False), st.randoms(use_true_random=False))
def test_agents_that_hear_the_same_replies_are_told_apart_by_what_was_said(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with recorded(lanes, rng) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}


@settings(FEW, max_examples=4)
@given(crowds(), st.integers(0, 2**32))
def test_so_are_more_of_them_than_are_looked_at(lanes: list[list[Step]], seed: int) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with recorded(lanes, Random(seed)) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}


@FEW
@given(
    programs(MOVES), st.randoms(use_true_random=False), st.sampled_from([None, "same", "different"])
)
def test_a_retried_turn_is_one_turn(lanes: list[list[Step]], rng: Random, ids: str | None) -> None:
    names = ids and [f"s{number if ids == 'different' else ''}" for number in range(len(lanes))]
    whole = {step.id for lane in lanes for step in lane if not step.cut}
    with recorded(lanes, rng, names or None) as found:
        assert set(found.store.turns.ids()) == whole
        assert found.store.counts().get("turns/main", 0) == len(whole)
        for turn in found.parents:
            assert found.store.turns.get(turn) is not None, "replaced turns can still be read"


@FEW
@given(programs(FORKING, unique=False), st.randoms(use_true_random=False))
def test_whatever_happens_a_turn_is_judged_at_most_once_and_by_what_really_followed(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with recorded(lanes, rng) as found:
        children: dict[str, list[Step]] = defaultdict(list)
        for turn, parent in found.parents.items():
            if parent is not None:
                children[parent].append(truth[turn])
        for turn in truth:
            states = found.states(turn)
            assert not states or states in [child.states for child in children[turn]]
        judged = [turn for turn in truth if found.states(turn)]
        assert sorted(found.store.judging.lease(1000, 60.0)) == sorted(judged)
