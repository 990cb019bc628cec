"""One process has a role at a time, and one that was cut off and replaced writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nextstate.config import StoreConfig
from nextstate.errors import FencedError, TakenError
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.postgresql_server import Server
from tests.store.test_records import add, judge, turn

ROLE = ("learner/main", "lineage 'main' is trained", "end it")


def candidate(number: int) -> PolicyVersion:
    return PolicyVersion("main", number, 0, "/a", "ff", 1, VersionState.CANDIDATE)


@pytest.fixture
def two(tmp_path: Path, postgresql: Server) -> Iterator[list[Store]]:
    """Two machines' stores in one database."""
    url = postgresql.database(f"roles_{abs(hash(tmp_path))}")
    found = [Store(StoreConfig(str(tmp_path / name), url)) for name in ("here", "there")]
    yield found
    for store in found:
        store.close()


@pytest.mark.sqlite
def test_a_role_that_another_machine_has_is_refused_until_it_ends(two: list[Store]) -> None:
    here, there = two
    with here.roles.hold(*ROLE):
        with pytest.raises(TakenError, match=r"is trained by process .* on .*: end it"):
            there.roles.hold(*ROLE).__enter__()
        with there.roles.hold("learner/other", *ROLE[1:]):
            assert there.versions.add(candidate(1), None) == VersionState.CANDIDATE
        here.versions.reject("main", 1, "worse")
    with there.roles.hold(*ROLE):
        there.versions.add(candidate(2), None)


@pytest.mark.sqlite
def test_who_was_cut_off_and_replaced_writes_nothing_later(
    two: list[Store], postgresql: Server
) -> None:
    here, there = two
    add(here, turn(0))
    judge(here, 0, 1)
    with ExitStack() as opened:
        opened.enter_context(here.roles.hold(*ROLE))
        leased = here.training.lease_samples("main", 1, "b", scored=True, hinted=True)
        assert [sample.turn for sample in leased] == ["turn_0"]
        postgresql.run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        with there.roles.hold(*ROLE):
            assert there.training.release_samples("main") == 1
            for write in (
                lambda: here.versions.add(candidate(1), "b"),
                lambda: here.training.release_samples("main"),
                lambda: here.versions.serve_candidate(candidate(1)),
                lambda: add(here, turn(1)),
            ):
                with pytest.raises(FencedError, match="has been taken by process"):
                    write()
            assert there.versions.add(candidate(1), None) == VersionState.CANDIDATE
    assert here.turns.ids() == ["turn_0"]


@pytest.mark.sqlite
def test_who_was_cut_off_but_not_replaced_goes_on(two: list[Store], postgresql: Server) -> None:
    here, _ = two
    with here.roles.hold(*ROLE):
        postgresql.run("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        assert here.versions.add(candidate(1), None) == VersionState.CANDIDATE


def test_in_a_file_of_one_machine_a_role_costs_no_statement(store: Store, database: str) -> None:
    with store.roles.hold(*ROLE):
        assert bool(store.database.epochs) == (database == "postgresql")
        store.versions.add(candidate(1), None)
