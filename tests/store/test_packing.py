"""Token ids as runs: they come back the same, and a changed prompt shares most of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nextstate.store.packing import id_runs, join_runs
from nextstate.store.texts import content_hash


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=6000),
    at=st.integers(0, 6000),
    inserted=st.lists(st.integers(0, 300), max_size=5),
)
def test_runs_of_token_ids_join_to_the_same_ids_and_survive_an_insertion(
    ids: list[int], at: int, inserted: list[int]
) -> None:
    def kept(tokens: list[int]) -> set[bytes]:
        runs = id_runs(tokens)
        bodies = {content_hash(run): run for run in runs}
        joined = join_runs(b"".join(map(content_hash, runs)), bodies)
        assert joined == tuple(tokens)
        assert all(len(run) <= 4 * 2048 for run in runs)
        return set(runs)

    changed = ids[:at] + inserted + ids[at:]
    before = id_runs(ids[:at])
    assert set(before[:-1]) <= kept(changed)  # what stands before a change stays as it is


def test_a_prompt_changed_in_the_middle_shares_its_other_runs() -> None:
    ids = [(n * 7919 + n * n * 31) % 50_000 for n in range(20_000)]
    runs = set(id_runs(ids))
    changed = set(id_runs([*ids[:9_000], 5, 6, 7, *ids[9_010:]]))
    assert len(changed - runs) <= 2 < 40 < len(runs)
