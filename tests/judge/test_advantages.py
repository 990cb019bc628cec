"""Credit: numbers worked by hand, what it does not depend on, and the switch of the judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judge.advantages import (
    ALL_SOLVED,
    ENOUGH,
    LIMIT,
    NO_DIFFERENCE,
    NO_OUTCOME,
    SAME_AT_STEP,
    WINDOW,
    CreditMethod,
    EpisodeScores,
    JudgedEpisode,
    StepScore,
    group_credit,
    judge_auc,
    process_weight,
)
from nextstate.episodes import FAMILY
from nextstate.errors import RecordError

METHODS: tuple[CreditMethod, ...] = ("combined", "outcome", "step_sum")
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VOTES = st.sampled_from((-1.0, 0.0, 1.0))


def episode(name: str, outcome: float | None, *process: float | None) -> EpisodeScores:
    """Its turns are called a0, a1, and so on."""
    steps = tuple(StepScore(f"{name}{index}", value) for index, value in enumerate(process))
    return EpisodeScores(name, outcome, steps)


def groups(
    outcomes: st.SearchStrategy[float], process: st.SearchStrategy[float], most: int = 6
) -> st.SearchStrategy[list[EpisodeScores]]:
    """Up to `most` episodes of at most 5 steps, some without an outcome or a process reward."""
    drawn = st.tuples(st.none() | outcomes, st.lists(st.none() | process, max_size=5))
    return st.lists(drawn, max_size=most).map(
        lambda found: [episode(f"e{i}-", o, *steps) for i, (o, steps) in enumerate(found)]
    )


# Numbers worked by hand


@pytest.mark.parametrize(("weight", "half"), [(1.0, 0.5), (0.5, 0.25), (0.0, 0.0)])
def test_outcome_and_faded_process_rewards_add_up(weight: float, half: float) -> None:
    # outcomes 1 1 0 0: mean 1/2, deviation 1/2, so z = 1 1 -1 -1; success 1/2
    # process, four of +1 and four of -1: mean 0, deviation 1, so z = the reward
    group = [
        episode("a", 1, 1, 1),
        episode("b", 1, 1, -1),
        episode("c", 0, 1, -1),
        episode("d", 0, -1, -1),
    ]
    found = group_credit(group, weight=weight)
    assert found.dropped == {}
    assert found.advantages == {
        "a0": 1 + half,
        "a1": 1 + half,
        "b0": 1 + half,
        "b1": 1 - half,
        "c0": -1 + half,
        "c1": -1 - half,
        "d0": -1 - half,
        "d1": -1 - half,
    }


def test_process_rewards_are_pooled_over_steps_and_an_unjudged_step_has_none() -> None:
    # outcomes 1 -1: z = 1 -1; success 1/2. Process 3 1 1 3: mean 2, deviation 1, so z = 1 -1 -1 1
    found = group_credit([episode("a", 1, 3, None), episode("b", -1, 1, 1, 3)])
    assert found.advantages == {"a0": 1.5, "a1": 1.0, "b0": -1.5, "b1": -1.5, "b2": -0.5}


@pytest.mark.parametrize("outcome", [0.0, -1.0, 0.9])
def test_where_all_fail_alike_the_judge_speaks_alone(outcome: float) -> None:
    # z_outcome = 0, success 0; process 1 -1 1 -1: z = 1 -1 1 -1
    found = group_credit([episode("a", outcome, 1, -1), episode("b", outcome, 1, -1, None)])
    assert found.advantages == {"a0": 1.0, "a1": -1.0, "b0": 1.0, "b1": -1.0, "b2": 0.0}


def test_a_group_that_is_all_solved_is_dropped_with_the_reason() -> None:
    tenths = sum([0.1] * 10)  # 0.9999999999999999
    found = group_credit([episode("a", 1.0, 1, -1), episode("b", tenths, 1)])
    assert found.advantages == {}
    assert found.dropped == dict.fromkeys(("a0", "a1", "b0"), ALL_SOLVED)


@pytest.mark.parametrize("process", [(None, None), (1, 1)])
def test_a_group_without_any_difference_is_dropped_with_the_reason(process) -> None:
    found = group_credit([episode("a", 0, *process), episode("b", 0, *process)])
    assert found.advantages == {}
    assert set(found.dropped.values()) == {NO_DIFFERENCE}


def test_an_episode_without_an_outcome_counts_nowhere() -> None:
    # its process reward of 100 would move the mean of the others, its failure the success
    group = [episode("a", 1, 1), episode("b", 0, -1)]
    found = group_credit([*group, episode("c", None, 100, None)])
    assert found.advantages == group_credit(group).advantages == {"a0": 1.5, "b0": -1.5}
    assert found.dropped == {"c0": NO_OUTCOME, "c1": NO_OUTCOME}


def test_success_is_the_share_of_episodes_that_are_solved() -> None:
    # outcomes 3 1: z = 1 -1. Solved from 2 on: success 1/2; from 1 on: all; never: 0
    group = [episode("a", 3, 1), episode("b", 1, -1)]
    assert group_credit(group, solved=2).advantages == {"a0": 1.5, "b0": -1.5}
    assert group_credit(group, solved=1).advantages == pytest.approx({"a0": 1, "b0": -1})
    assert group_credit(group, solved=math.inf).advantages == {"a0": 2.0, "b0": -2.0}


def test_an_advantage_is_at_most_the_limit() -> None:
    # one success of 17: mean 1/17, deviation 4/17, so z = 4 and -1/4
    found = group_credit([episode("a", 1, None), *(episode(f"b{i}-", 0, None) for i in range(16))])
    assert found.advantages["a0"] == LIMIT
    assert found.advantages["b0-0"] == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("earlier", "outcome", "expected"),
    [
        ([0, 0, 0], 1, 4 / 3**0.5),  # 1 - 0; all four: mean 1/4, deviation sqrt(3)/4
        ([1, 0], 1, 0.75 * 2**0.5),  # 1 - 1/2; all three: mean 2/3, deviation sqrt(2)/3
        ([1, 1, 1], 0, -4 / 3**0.5),
        ([9.0] + [1.0, 0.0] * (FAMILY // 2), 0.5, 0.0),  # the 9 is too old to count
    ],
)
def test_an_episode_alone_is_compared_with_earlier_ones_of_its_family(
    earlier: list[float], outcome: float, expected: float
) -> None:
    group = [episode("a", outcome, None), episode("broken", None)]
    found = group_credit([*group, episode("b", None)], "outcome", earlier=earlier)
    assert found.advantages.get("a0", 0.0) == pytest.approx(expected)


def test_the_judge_fades_with_the_success_of_the_family_for_an_episode_alone() -> None:
    # z_outcome = 0.75 sqrt(2) as above; success of the earlier ones 1/2; process 1 -1
    found = group_credit([episode("a", 1, 1, -1)], earlier=[1, 0])
    outcome = 0.75 * 2**0.5
    assert found.advantages == pytest.approx({"a0": outcome + 0.5, "a1": outcome - 0.5})


def test_the_first_episode_of_a_family_has_only_its_judge() -> None:
    assert group_credit([episode("a", 1, 1, -1)]).advantages == {"a0": 1.0, "a1": -1.0}
    assert group_credit([episode("a", 1, 1)]).dropped == {"a0": NO_DIFFERENCE}


def test_outcome_only_gives_all_steps_of_an_episode_one_number() -> None:
    found = group_credit([episode("a", 5, 1, -1), episode("b", 3, 1)], "outcome")
    assert found.advantages == pytest.approx({"a0": 1, "a1": 1, "b0": -1})


def test_the_step_sum_compares_steps_of_equal_index_with_the_originals_quirks() -> None:
    # step 0: 1+1, -1+1, -1+1 = 2 0 0: mean 2/3, deviation sqrt(8)/3: z = sqrt(2), -1/sqrt(2) twice
    # step 1: 1-1, -1+1 = 0 0: constant, dropped
    # step 2: no verdict counts as 0: 1+0, -1-1 = 1 -2: z = 1 -1
    # step 3: one survivor keeps the raw sum 1+1
    group = [episode("a", 1, 1, -1, None, 1), episode("b", -1, 1, 1, -1), episode("c", -1, 1)]
    found = group_credit(group, "step_sum")
    assert found.dropped == {"a1": SAME_AT_STEP, "b1": SAME_AT_STEP}
    expected = {"a0": 2**0.5, "b0": -(0.5**0.5), "c0": -(0.5**0.5), "a2": 1, "b2": -1, "a3": 2}
    assert found.advantages == pytest.approx(expected, rel=1e-5)


# What holds for every group


@given(groups(FINITE, FINITE), st.lists(FINITE, max_size=4), st.sampled_from(METHODS))
def test_each_turn_gets_a_finite_advantage_or_a_reason(group, earlier, method) -> None:
    found = group_credit(group, method, earlier=earlier)
    turns = sorted(step.turn for e in group for step in e.steps)
    assert sorted([*found.advantages, *found.dropped]) == turns
    assert all(map(math.isfinite, found.advantages.values()))
    if method != "step_sum":
        assert all(abs(value) <= LIMIT for value in found.advantages.values())


@given(groups(FINITE, FINITE), st.data(), st.sampled_from(METHODS))
def test_the_order_of_episodes_changes_nothing(group, data, method) -> None:
    other = data.draw(st.permutations(group))
    assert group_credit(other, method) == group_credit(group, method)


@given(groups(st.integers(-3, 3).map(float), VOTES), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_the_scales_of_outcomes_and_of_process_rewards_change_nothing(group, of_o, of_p) -> None:
    scaled = [
        episode(
            e.episode,
            None if e.outcome is None else e.outcome * of_o,
            *(None if s.process is None else s.process * of_p for s in e.steps),
        )
        for e in group
    ]
    found = group_credit(scaled, solved=2 * of_o)
    expected = group_credit(group, solved=2)
    assert found.dropped == expected.dropped
    assert found.advantages == pytest.approx(expected.advantages, abs=1e-9)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9))
def test_the_outcome_terms_of_a_group_sum_to_zero_with_a_mean_square_of_one(outcomes) -> None:
    group = [episode(f"e{i}-", outcome, None) for i, outcome in enumerate(outcomes)]
    found = list(group_credit(group, "outcome", solved=10).advantages.values())
    assert math.fsum(found) == pytest.approx(0, abs=1e-9)
    assert math.fsum(a * a for a in found) == pytest.approx(len(found))


@given(st.lists(st.lists(VOTES, max_size=2), min_size=2, max_size=5))
def test_the_process_terms_of_a_group_sum_to_zero_over_its_judged_steps(votes) -> None:
    group = [episode(f"e{i}-", 0, *steps) for i, steps in enumerate(votes)]
    found = group_credit(group).advantages.values()
    assert math.fsum(found) == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 6), FINITE, st.sampled_from(METHODS))
def test_a_constant_group_teaches_nothing(size, outcome, method) -> None:
    group = [episode(f"e{i}-", outcome, None) for i in range(size)]
    assert group_credit(group, method, solved=math.inf).advantages == {}


@pytest.mark.parametrize("largest", [1e308, 1e-308])
@pytest.mark.parametrize("method", METHODS[:2])
def test_huge_and_tiny_values_are_compared_like_others(largest: float, method) -> None:
    found = group_credit([episode("a", largest, None), episode("b", -largest, None)], method)
    assert found.advantages == {"a0": 1.0, "b0": -1.0}


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(RecordError, match=r"episode a: outcome is .*, expected a finite number"):
        episode("a", value)
    with pytest.raises(RecordError, match="turn a0: process reward is"):
        episode("a", 1, value)
    with pytest.raises(RecordError, match="an earlier outcome is"):
        group_credit([], earlier=[value])


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_its_range_is_refused(weight: float) -> None:
    with pytest.raises(RecordError, match=r"weight is .*, expected 0 to 1"):
        group_credit([], weight=weight)


def test_a_turn_in_two_steps_is_refused() -> None:
    with pytest.raises(RecordError, match="turn a0 is 2 steps"):
        group_credit([episode("a", 1, 1), episode("a", None, 1)])


def test_a_solved_outcome_that_is_no_number_is_refused() -> None:
    with pytest.raises(RecordError, match="solved is nan"):
        group_credit([], solved=math.nan)


# Does the judge predict outcomes?


def judged(outcomes: Sequence[float], process: Sequence[float], group: str = "g"):
    return [JudgedEpisode(group, o, p) for o, p in zip(outcomes, process, strict=True)]


def test_the_auc_of_numbers_worked_by_hand() -> None:
    # solved 1 0, failed 0 -1: 1 beats both, 0 ties with 0 and beats -1: (2 + 1.5) / 4
    assert judge_auc(judged([1, 1, 0, 0], [1, 0, 0, -1])) == 3.5 / 4
    assert judge_auc(judged([1, 1], [1, -1])) is None
    assert judge_auc([]) is None
    assert judge_auc(judged([1, sum([0.1] * 10)], [1, -1])) is None  # equal but for rounding


EPISODES = st.lists(
    st.builds(JudgedEpisode, st.sampled_from("gh"), st.sampled_from((-1.0, 0.5, 1.0)), VOTES)
)


@given(EPISODES)
def test_the_auc_is_the_share_of_pairs_in_the_right_order(episodes) -> None:
    pairs = [
        (a, b) for a, b in permutations(episodes, 2) if a.group == b.group and a.outcome > b.outcome
    ]
    right = sum(1.0 if a.process > b.process else 0.5 * (a.process == b.process) for a, b in pairs)
    assert judge_auc(episodes) == (right / len(pairs) if pairs else None)


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), max_size=12))
def test_the_auc_of_one_group_is_the_area_under_the_curve(drawn) -> None:
    solved = [score for is_solved, score in drawn if is_solved]
    failed = [score for is_solved, score in drawn if not is_solved]
    found = judge_auc(judged([s for s, _ in drawn], [p for _, p in drawn]))
    if not solved or not failed:
        assert found is None
        return
    curve = [
        (sum(f >= t for f in failed) / len(failed), sum(s >= t for s in solved) / len(solved))
        for t in range(4, -5, -1)
    ]
    area = sum((x - left) * (y + low) / 2 for (left, low), (x, y) in pairwise(curve))
    assert found == pytest.approx(area)


@given(EPISODES)
def test_an_opposite_judge_has_the_opposite_auc(episodes) -> None:
    auc = judge_auc(episodes)
    other = judge_auc([JudgedEpisode(e.group, e.outcome, -e.process) for e in episodes])
    assert other == (None if auc is None else pytest.approx(1 - auc))


def mixed(process: Sequence[float], count: int) -> list[JudgedEpisode]:
    """Groups of two, one solved and one failed with these process rewards, `count` episodes."""
    return [e for n in range(count // 2) for e in judged([1, 0], process, f"{process}{n}")]


def test_a_judge_that_predicts_outcomes_keeps_its_weight_and_another_loses_it() -> None:
    assert process_weight(mixed([1, -1], WINDOW)) == 1.0
    assert process_weight(mixed([1, 1], WINDOW)) == 0.0
    assert process_weight(mixed([-1, 1], WINDOW)) == 0.0


def test_few_judged_episodes_decide_nothing() -> None:
    assert process_weight([]) == 1.0
    assert process_weight(mixed([-1, 1], ENOUGH - 2)) == 1.0
    assert process_weight(mixed([-1, 1], ENOUGH)) == 0.0


def test_only_the_newest_episodes_of_mixed_groups_decide() -> None:
    good, bad = mixed([1, -1], WINDOW), mixed([-1, 1], WINDOW)
    alike = [JudgedEpisode(f"s{n}", 1.0, -1.0) for n in range(WINDOW)]
    assert process_weight([*good, *bad, *alike]) == 0.0
    assert process_weight([*bad, *good, *alike]) == 1.0
