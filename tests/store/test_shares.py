"""No session decides a version alone while others have something to say."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.records import Feedback, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.shares import LOOKED_AT, OWNER, SHARE, Waiting, allotted, fair_share, share_of
from nextstate.store.waiting import Patience
from tests.store.test_records import add, judge, turn


def ready(store: Store, *sessions: tuple[str, int, int]) -> dict[str, str]:
    """Puts ready samples of (session, how many, policy version) there; sessions by turn."""
    each = [(name, version) for name, count, version in sessions for _ in range(count)]
    turns = [turn(n, session=name, policy_version=v) for n, (name, v) in enumerate(each)]
    add(store, *turns)
    for number in range(len(turns)):
        judge(store, number, 1)
    return {one.id: one.session for one in turns}


def leased(store: Store, limit: int, batch: str = "b") -> list[str]:
    found = store.training.lease_samples("main", limit, batch, scored=True, hinted=True)
    return [sample.session for sample in found]


def test_a_session_gives_a_quarter_of_a_batch_or_half_if_others_have_too_few(
    store: Store,
) -> None:
    ready(store, ("flood", 30, 0), ("b", 1, 0), ("c", 2, 0), ("d", 1, 0))
    assert Counter(leased(store, 4, "b1")) == {"flood": 1, "b": 1, "c": 1, "d": 1}
    assert Counter(leased(store, 4, "b2")) == {"flood": 2, "c": 1}
    assert leased(store, 4, "b3") == ["flood"] * 4  # nobody else waits


def test_newer_versions_do_not_make_a_flood_more_than_half(store: Store) -> None:
    ready(store, ("b", 9, 1), ("flood", 30, 3))
    assert leased(store, 16) == ["flood"] * 8 + ["b"] * 8


def test_one_session_alone_trains_with_all_that_it_has(store: Store) -> None:
    turns = ready(store, ("mine", 20, 0))
    found = store.training.lease_samples("main", 16, "b", scored=True, hinted=True)
    assert [sample.turn for sample in found] == list(turns)[:16]
    assert store.counts()["samples/leased"] == 16


def test_few_samples_of_others_make_a_smaller_batch_once(store: Store) -> None:
    ready(store, ("mine", 30, 0), ("yesterday", 1, 0))
    assert Counter(leased(store, 16, "b1")) == {"mine": 8, "yesterday": 1}
    assert Counter(leased(store, 16, "b2")) == {"mine": 16}


def test_three_of_one_session_and_one_of_another_make_no_batch_of_four(store: Store) -> None:
    ready(store, ("loud", 3, 0), ("quiet", 1, 0))
    assert Counter(leased(store, 4)) == {"loud": 2, "quiet": 1}


def test_what_changes_while_it_is_looked_at_is_not_leased(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(store, ("a", 2, 0), ("b", 2, 0))

    def then_changed(waiting: Iterable[Waiting], limit: int) -> list[str]:
        chosen = fair_share(waiting, limit)
        store.training.drop_samples(["turn_1"], "gone")
        store.reviewing.give(Feedback("turn_2", 0), OWNER)
        return chosen

    monkeypatch.setattr("nextstate.store.training.fair_share", then_changed)
    assert leased(store, 4) == ["a", "b"]


def test_a_write_of_another_process_while_a_batch_is_chosen_makes_no_lease_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(dir=str(tmp_path / "state"))
    ours, other = (Store(config, patience=Patience(limit_s=0.0)) for _ in range(2))
    ready(ours, ("a", 30, 0), ("b", 30, 0))  # more than are read

    def meanwhile(waiting: Iterable[Waiting], limit: int) -> list[str]:
        chosen = fair_share(waiting, limit)
        other.training.drop_samples(["turn_9"], "gone")
        return chosen

    monkeypatch.setattr("nextstate.store.training.fair_share", meanwhile)
    assert leased(ours, 4) == ["a", "a", "b", "b"]
    ours.close()
    other.close()


@given(st.lists(st.sampled_from("aaaaaaabcd"), max_size=60), st.integers(1, 20))
def test_a_batch_is_fair_as_full_as_may_be_and_of_the_best(sessions: list[str], limit: int) -> None:
    waiting = [Waiting(f"{number}", session) for number, session in enumerate(sessions)]
    chosen = fair_share(waiting, limit)
    by_turn = {one.turn: one.session for one in waiting}
    given, wait = Counter(by_turn[turn] for turn in chosen), Counter(sessions)
    most = limit if len(wait) == 1 else max(1, limit // 2)
    assert len(chosen) == min(limit, sum(min(count, most) for count in wait.values()))
    for session, count in given.items():
        assert count <= most
        own = [turn for turn, its, *_ in waiting if its == session]
        assert own[:count] == [turn for turn in chosen if by_turn[turn] == session]


def ready_of(store: Store, client: str, count: int, session: str = "s", version: int = 0) -> None:
    """Puts ready samples of a client's turns there."""
    first = store.counts().get("turns/main", 0)
    numbers = range(first, first + count)
    made = {"session": session, "client": client, "policy_version": version}
    add(store, *(turn(number, **made) for number in numbers))
    for number in numbers:
        judge(store, number, 1)


def clients(store: Store, limit: int, batch: str) -> Counter[str]:
    """The clients of the samples of a batch, which then trains."""
    found = store.training.lease_samples("main", limit, batch, scored=True, hinted=True)
    turns = [store.turns.get(sample.turn) for sample in found]
    if found:
        number = len(store.versions.all("main")) + 1
        state = VersionState.CANDIDATE
        store.versions.add(PolicyVersion("main", number, 0, "/a", "ff", 1, state), batch)
    return Counter(one.client for one in turns if one)


@pytest.fixture
def now() -> list[float]:
    return [1_000_000.0]


@pytest.fixture
def dated(tmp_path: Path, now: list[float]) -> Iterator[Store]:
    store = Store(StoreConfig(dir=str(tmp_path / "dated")), clock=lambda: now[0])
    yield store
    store.close()


def test_a_client_gives_at_most_a_quarter_of_a_version_beside_the_owner(dated: Store) -> None:
    ready_of(dated, "key eve", 90, "e")
    ready_of(dated, "", 12, "o")
    assert clients(dated, 16, "b1") == {"": 12, "key eve": 4}
    assert clients(dated, 16, "b2") == {}  # the rest waits, although nothing else does


def test_what_is_held_back_trains_a_day_after_the_others_gave_something(
    dated: Store, now: list[float]
) -> None:
    ready_of(dated, "key eve", 90, "e")
    ready_of(dated, "", 3, "o")
    assert clients(dated, 16, "b1") == {"": 3, "key eve": 1}
    assert dated.training.held_back("main", 16, True, True) == {"key eve": 89}
    now[0] += 23 * 3600
    assert clients(dated, 16, "b2") == {}
    now[0] += 2 * 3600
    assert dated.training.held_back("main", 16, True, True) == {}
    assert clients(dated, 16, "b3") == {"key eve": 16}


def test_one_person_with_one_agent_never_meets_a_share(dated: Store, now: list[float]) -> None:
    """One key for the agent, and the owner's clicks at the page, also on another day."""
    ready_of(dated, "key laptop", 40, "yesterday")
    for number in range(3):
        dated.reviewing.give(Feedback(f"turn_{number}", -1), "")
        assert dated.reviewing.give(Feedback(f"turn_{number + 9}", 1), "key laptop").applied
    ready_of(dated, "key laptop", 40, "today")
    while (waits := dated.training.ready_samples("main", True, True)) >= 16:
        assert dated.training.allotted("main", 16, True, True) == {"key laptop": 16}
        assert clients(dated, 16, f"b{waits}") == {"key laptop": 16}
        now[0] += 60


def test_the_owner_is_never_held_back_by_others(dated: Store) -> None:
    ready_of(dated, "key eve", 1, "e")
    ready_of(dated, "", 40, "o")
    assert clients(dated, 16, "b1") == {"": 15, "key eve": 1}
    assert clients(dated, 16, "b2") == {"": 16}


def test_clients_are_counted_apart_in_each_lineage(dated: Store) -> None:
    ready_of(dated, "key eve", 16, "e")
    add(dated, turn(99, lineage="bob", client="key bob"))
    judge(dated, 99, 1)
    assert clients(dated, 16, "b1") == {"key eve": 16}


@pytest.mark.sqlite
def test_a_flood_of_one_client_hides_nobody(dated: Store) -> None:
    ready_of(dated, "key bob", 12, "b", version=0)
    ready_of(dated, "key ann", 4, "a", version=0)
    ready_of(dated, "", 4, "o", version=0)
    with sqlite3.connect(dated.dir / "nextstate.sqlite3") as database:  # newer, and very many
        ready_of(dated, "key eve", 1, "e", version=3)
        columns = "lineage, state, policy_version, score, hinted, client"
        (seq,) = database.execute("SELECT max(seq) FROM samples").fetchone()
        for number in range(16 * LOOKED_AT):
            database.execute(
                f"INSERT INTO turns SELECT NULL, 'flood_{number}', session, idx, kind, lineage, "
                "policy_version, client_model, messages, tools, rest, reply, finish_reason, "
                "prompt_ids, completion_ids, behaviour_logprobs, sampling, started_at, "
                "first_token_s, total_s, untrainable, parent, continued, chain_key, reply_key, "
                "client_session, place, replaced_by, context_key, episode, step, client, engine "
                "FROM turns WHERE seq = ?",
                (seq,),
            )
            database.execute(
                f"INSERT INTO samples (turn, seq, {columns}) "
                f"SELECT 'flood_{number}', ?, {columns} FROM samples WHERE seq = ?",
                (seq + number + 1, seq),
            )
    database.close()
    found = clients(dated, 16, "b1")
    assert found == {"": 4, "key ann": 4, "key bob": 4, "key eve": 4}


@given(
    st.dictionaries(st.sampled_from(["", "a", "b", "c", "d", "e"]), st.integers(0, 40)),
    st.sets(st.sampled_from(["", "a", "b", "f"])),
    st.integers(1, 32),
)
def test_no_client_but_the_owner_gets_more_than_its_share(
    available: dict[str, int], known: set[str], limit: int
) -> None:
    given = allotted(available, known, limit)
    size = sum(given.values())
    everybody = {*known, *(client for client, count in available.items() if count)}
    share = share_of(available, known)
    assert share <= SHARE or ("" not in everybody and share <= 1 / max(1, len(everybody)) + 1e-9)
    assert size <= min(limit, sum(available.values()))
    for client, count in given.items():
        assert count <= available[client]
        assert client == "" or count <= share * size + 1e-6
    if len(everybody) == 1 and not known - {*available}:
        assert size == min(limit, sum(available.values()))


def test_feedback_counts_as_a_sample_of_who_sent_the_turn(dated: Store) -> None:
    ready_of(dated, "", 12, "o")
    ready_of(dated, "key eve", 12, "e")
    for number in range(12, 24):
        dated.reviewing.give(Feedback(f"turn_{number}", -1), "key eve" if number % 2 else "")
    found = dated.training.lease_samples("main", 16, "b", scored=True, hinted=True)
    assert Counter(sample.score for sample in found) == {1: 12, -1: 4}


def held(store: Store, limit: int, per_session: int = 4) -> Counter[str]:
    """The clients of the turns that a candidate is checked on."""
    found = store.training.held_samples("main", limit, per_session)
    turns = [store.turns.get(sample.turn) for sample in found]
    return Counter(one.client for one in turns if one)


def test_a_client_fills_a_quarter_of_the_gates_turns_beside_the_owner(dated: Store) -> None:
    for session in range(9):
        ready_of(dated, "", 2, f"o{session}")
    for session in range(40):  # newer, and many
        ready_of(dated, "key eve", 4, f"e{session}")
    dated.training.hold_out("main", lambda _: True)
    assert held(dated, 32) == {"": 18, "key eve": 6}
    assert held(dated, 8) == {"": 6, "key eve": 2}


def test_clients_without_the_owner_fill_even_parts_of_the_gates_turns_and_one_alone_all(
    dated: Store,
) -> None:
    for session in range(9):
        ready_of(dated, "key eve", 4, f"e{session}")
    dated.training.hold_out("main", lambda _: True)
    assert held(dated, 32) == {"key eve": 32}
    ready_of(dated, "key ann", 3, "a")
    dated.training.hold_out("main", lambda _: True)
    assert held(dated, 32) == {"key ann": 3, "key eve": 3}


def watched(store: Store, limit: int = 40) -> list[str]:
    """The clients of the turns that the watch looks at."""
    return [turn.client for turn in store.versions.judged_turns("main", limit)]


def test_a_client_gives_the_watch_a_quarter_beside_the_owner_all_the_time(dated: Store) -> None:
    for version in range(3):
        ready_of(dated, "", 6, "o", version)
        ready_of(dated, "key eve", 50, "e", version)  # a flood would hide what others say
    found = watched(dated)
    assert Counter(found) == {"": 18, "key eve": 6}
    turns = dated.versions.judged_turns("main", 40)
    assert {turn.version for turn in turns if turn.client} == {0, 1, 2}


def test_a_client_that_is_alone_for_a_day_is_watched_whole(dated: Store, now: list[float]) -> None:
    ready_of(dated, "", 6, "o")
    ready_of(dated, "key eve", 30, "e")
    now[0] += 86_401
    assert Counter(watched(dated)) == {"": 6, "key eve": 2}  # nobody spoke
    ready_of(dated, "key eve", 4, "e", 1)
    assert watched(dated) == [""] * 40  # nobody else does: it is not limited, and no other one
    ready_of(dated, "key ann", 1, "a", 1)
    assert {*watched(dated)} == {"", "key ann", "key eve"}


def test_an_hour_and_what_only_tools_said_get_a_quarter_while_others_fill_the_batch() -> None:
    sessions = iter(range(999))

    def some(count: int, source: str, hour: int) -> list[Waiting]:
        return [
            Waiting(f"{source}{hour}", f"s{next(sessions)}", source, hour) for _ in range(count)
        ]

    tools = some(30, "tool", 1)
    people = [one for hour in (2, 3, 4) for one in some(4, "user", hour)]
    assert Counter(fair_share([*tools, *people], 16)) == {
        "tool1": 4, "user2": 4, "user3": 4, "user4": 4,
    }  # fmt: skip
    assert fair_share(tools, 16) == ["tool1"] * 16
