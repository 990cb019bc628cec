"""The watch: exact probabilities, what it cannot be fooled by, false alarms and power."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.watch import World, alarm
from learner import watch
from learner.watch import Watch, chain_of, compare, probability, sessions
from nextstate.records import JudgedTurn, PolicyVersion, VersionState

SCORES = st.lists(st.sampled_from((-1, 0, 1)), min_size=1, max_size=3)


def turns(session: str, version: int, scores: Sequence[int], judge="rules") -> list[JudgedTurn]:
    return [JudgedTurn(session, version, score, judge) for score in scores]


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=2))
def test_the_probability_is_that_over_all_orders_of_each_session(drawn):
    before = [t for i, (old, _) in enumerate(drawn) for t in turns(f"s{i}", 0, old)]
    after = [t for i, (_, new) in enumerate(drawn) for t in turns(f"s{i}", 1, new)]
    sums = Counter({0: 1})
    for old, new in drawn:
        of_session = Counter(sum(order[: len(new)]) for order in permutations(old + new))
        sums = Counter(
            {
                s: sum(sums[a] * n for a in sums for b, n in of_session.items() if a + b == s)
                for s in range(-6, 7)
            }
        )
    observed = sum(sum(new) for _, new in drawn)
    expected = sum(n for s, n in sums.items() if s <= observed) / sum(sums.values())
    assert probability(sessions(before, after)) == pytest.approx(expected)


def test_a_change_is_measured_within_sessions():
    # An easy session that stays at 1, a hard one at -1 that falls no further, and one that falls.
    before = turns("easy", 0, [1] * 9) + turns("hard", 0, [-1]) + turns("both", 0, [1, 1])
    after = turns("hard", 1, [-1] * 9) + turns("both", 1, [-1, 1])
    found = compare(sessions(before, after), len(after))
    assert (found.turns, found.comparable) == (11, 11)
    # Weights 1·9/10 and 2·2/4; changes 0 and -1.
    assert found.weight == pytest.approx(1.9)
    assert found.change == pytest.approx(-1 / 1.9)


def test_harder_questions_in_new_sessions_say_nothing():
    before, after = turns("easy", 0, [1] * 200), turns("hard", 1, [-1] * 200)
    assert sessions(before, after) == []
    assert compare([], 200) == watch.Comparison(200, 0, 0.0, 0.0, 0.0)
    assert Watch().fall([0, 1], before + after, -1) is None


def test_another_judge_is_no_fall_and_each_judge_sees_one():
    """The rules praise most turns of a session; then a judge that abstains takes their place."""
    before = turns("s", 0, [1, 1, 1, 1, -1] * 60)
    after = turns("s", 1, [0] * 50, "engine")
    assert Watch().fall([0, 1], before + after, -1) is None
    both = turns("s", 0, [1, 1, 1, 1, -1] * 30, "engine") + before
    found = Watch().fall([0, 1], both + after, -1)
    assert found is not None
    assert found.found.comparable == 50


def test_equal_scores_are_no_fall():
    seen = turns("s", 0, [1] * 100) + turns("s", 1, [1] * 100)
    found = compare(sessions(seen[:100], seen[100:]), 100)
    assert (found.change, found.error, found.standing) == (0.0, 0.0, 0.0)
    assert Watch().fall([0, 1], seen, -1) is None


def test_a_fall_is_dated_to_the_version_with_which_it_began():
    seen = [t for v in range(10) for t in turns("s", v, [1, 1, 1, -1] * 4)]
    seen += [t for v in range(10, 14) for t in turns("s", v, [1, -1, -1, -1] * 4)]
    found = Watch().fall(list(range(14)), seen, -1)  # a learner that starts: all looks at once
    assert found is not None
    assert found.suspect == 10


def test_each_look_of_a_suspect_is_taken_once_and_on_exactly_so_many_turns(monkeypatch):
    taken = []
    monkeypatch.setattr(watch, "chance", lambda _, later, look: taken.append((len(later), look)))
    seen = turns("s", 0, [1] * 30) + turns("s", 1, [1] * 60)
    watched = Watch()
    for count in (20, 24, 49, 50, 60):
        watched.fall([0, 1], seen[: 30 + count], -1)
    assert taken == [(24, 24), (50, 50)]


def test_a_fall_is_counted_on_over_versions_and_names_the_first_that_is_worse():
    seen = [t for v in range(4) for t in turns("s", v, [1] * 16)]
    seen += [t for v in range(4, 8) for t in turns("s", v, [-1] * 6)]
    found = Watch().fall(list(range(8)), seen, -1)
    assert found is not None
    assert (found.suspect, found.found.change) == (4, pytest.approx(-2))
    assert str(found).startswith(
        "since version 4 the mean score fell by 2.00 within the same sessions (24 later verdicts; "
        "by chance in "
    )


def test_versions_that_a_person_accepted_are_no_suspects():
    seen = turns("s", 0, [1] * 50) + turns("s", 1, [-1] * 50) + turns("s", 2, [-1] * 50)
    assert Watch().fall([0, 1, 2], seen, 2) is None
    found = Watch().fall([0, 1, 2], seen, 0)
    assert found is not None
    assert found.suspect == 1


def test_pruning_keeps_what_the_watch_may_return_to_and_no_more():
    seen = [t for v in range(60) for t in turns("s", v, [1 if v < 52 else -1] * 16)]
    found = Watch().fall(list(range(60)), seen, -1)
    assert found is not None
    assert found.suspect == 52
    # 400 later turns are those of 25 versions; a person accepted up to 40; 59 has served nothing.
    assert watch.returns_to(list(range(61)), seen, -1) == set(range(34, 59))
    assert watch.returns_to(list(range(60)), seen, 40) == set(range(40, 59))
    assert watch.returns_to([0], seen, -1) == set()


def test_what_is_not_in_the_chain_does_not_count():
    seen = turns("s", 0, [1] * 50) + turns("s", 1, [-1] * 50) + turns("s", 2, [1] * 50)
    assert Watch().fall([0, 2], seen, -1) is None


def test_the_chain_leads_through_the_parents():
    versions = [
        PolicyVersion("main", n, parent, "/a", "ff", 1, VersionState.RETIRED)
        for n, parent in ((1, 0), (2, 1), (3, 1), (4, 3))
    ]
    assert chain_of(versions, 4) == [0, 1, 3, 4]
    assert chain_of([], 0) == [0]


def test_the_levels_of_all_tests_add_up_to_the_level():
    assert math.isclose(sum(watch.LOOKS.values()), 1.0)
    assert math.isclose(sum(watch.REFERENCES.values()), 1.0)


def test_a_fall_by_0_3_is_found_within_150_turns_in_one_long_session():
    world = World(live=1, turns=10_000)
    found = [alarm(Random(f"power/{run}"), world, fall=0.3) for run in range(16)]
    assert sum(at is not None for at in found) >= 11


@pytest.mark.parametrize("scores", [[1] * 40, [1, 1, 1, 0] * 10, [1, 1, 1, -1] * 10])
def test_the_fall_that_a_look_is_said_to_find_is_found_in_four_of_five_cases(scores):
    old = turns("s", 0, scores)
    look = watch.last_look(old, turns("s", 1, scores)[:26])
    assert look is not None
    assert (look.turns, look.reference) == (24, 640)
    assert look.level == pytest.approx(0.001 * 0.05 * 0.8)
    random, found = Random(1), 0
    lower = [sum(scores) / 40 - look.visible, scores.count(0) / 40]
    shares = [(1 - lower[0] - lower[1]) / 2, lower[1], (1 + lower[0] - lower[1]) / 2]
    for _ in range(200):
        new = turns("s", 1, random.choices((-1, 0, 1), shares, k=24))
        found += watch.chance(old, new, 24) is not None
    assert 0.7 < found / 200 < 0.95


def test_a_look_without_common_turns_finds_nothing_and_before_the_first_there_is_none():
    look = watch.last_look(turns("a", 0, [1] * 40), turns("b", 1, [1] * 24))
    assert look is not None
    assert look.visible == math.inf
    assert watch.last_look(turns("a", 0, [1] * 40), turns("a", 1, [1] * 23)) is None


def test_no_version_is_blamed_for_harder_questions_or_for_nothing():
    for world in (World(live=4, turns=40), World(live=4, turns=40, harder=0.6)):
        found = [alarm(Random(f"false/{run}"), world) for run in range(12)]
        assert sum(at is not None for at in found) <= 1


def by(client: str, session: str, version: int, scores: Sequence[int]) -> list[JudgedTurn]:
    return [JudgedTurn(session, version, score, "rules", client) for score in scores]


def fell(*seen: list[JudgedTurn]) -> bool:
    """Whether a fall is found; the sessions of each version are mixed."""
    joined = [turn for one in seen for turn in one]
    order = sorted(range(len(joined)), key=lambda at: (joined[at].version, at * 7919 % 1009))
    return Watch().fall([0, 1], [joined[at] for at in order], -1) is not None


def test_no_client_brings_a_version_down_alone_but_the_owner():
    steady = [by("", f"s{n}", v, [1, 1, 1, -1] * 3) for n in range(4) for v in (0, 1)]
    hostile = [by("key eve", f"e{n}", v, [1 - 2 * v] * 12) for n in range(8) for v in (0, 1)]
    assert not fell(*steady, *hostile)
    assert fell(*hostile)
    owners = [by("", turn[0].session, turn[0].version, [t.score for t in turn]) for turn in hostile]
    assert fell(*steady, *owners)
