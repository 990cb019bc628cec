"""What is needed is never deleted."""

from hypothesis import given
from hypothesis import strategies as st

from learner.pruning import prunable
from nextstate.records import PolicyVersion, VersionState

RETIRED, REJECTED = VersionState.RETIRED, VersionState.REJECTED


def chain(*states: VersionState) -> list[PolicyVersion]:
    return [
        PolicyVersion("main", n, n - 1, f"/v{n}", f"{n:064x}", 1, state)
        for n, state in enumerate(states, 1)
    ]


def numbers(versions: list[PolicyVersion]) -> list[int]:
    return [version.number for version in versions]


def test_the_newest_stay_and_older_ones_go():
    versions = chain(*[RETIRED] * 5, VersionState.SERVING)
    assert numbers(prunable(versions, 6, (), (), keep=3)) == [1, 2, 3]
    assert prunable(versions, 6, (), (), keep=6) == []


def test_what_never_had_an_adapter_or_lost_it_is_nothing_to_delete():
    versions = chain(RETIRED, RETIRED, VersionState.SERVING)
    gone = PolicyVersion("main", 1, 0, None, "ff", 1, RETIRED)
    refused = PolicyVersion("main", 4, 3, None, None, 1, REJECTED)
    assert prunable([gone, *versions[1:], refused], 3, (), (), keep=2) == []


@given(
    st.lists(st.sampled_from((RETIRED, REJECTED)), min_size=3, max_size=12),
    st.data(),
)
def test_nothing_that_is_needed_goes(states, data):
    number = st.integers(1, len(states))
    serving, waiting, current, pinned, used = (data.draw(number) for _ in range(5))
    states[serving - 1] = VersionState.SERVING
    if waiting != serving:
        states[waiting - 1] = VersionState.CANDIDATE
    versions = chain(*states)
    name = versions[used - 1].adapter_name
    assert name is not None
    gone = set(numbers(prunable(versions, current, (pinned,), (name,), keep=2)))
    parents = {serving - 1, current - 1}
    needed = {serving, waiting, current, pinned, used, len(states), len(states) - 1, *parents}
    assert not gone & needed
