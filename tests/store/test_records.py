"""The store: what is recorded comes back the same, and work is leased and settled once."""

from __future__ import annotations

import itertools
import os
import random
import stat
from contextlib import closing, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.errors import RecordError, StoreError
from nextstate.records import (
    Json,
    NextState,
    PolicyVersion,
    Source,
    Timings,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
    majority,
)
from nextstate.store import Store, schema
from nextstate.store.waiting import Patience

KEY = b"k" * 16
_number = itertools.count()


def turn(number: int, **changes: object) -> Turn:
    values: dict[str, object] = {
        "id": f"turn_{number}",
        "session": "s",
        "index": number,
        "kind": TurnKind.MAIN,
        "lineage": "main",
        "policy_version": 0,
        "client_model": "m",
        "request": {"messages": [{"role": "user", "content": f"question {number}"}]},
        "reply": {"role": "assistant", "content": "answer"},
        "finish_reason": "stop",
        "prompt_ids": (1, 2, 3),
        "completion_ids": (4, 5),
        "behaviour_logprobs": (-0.1, -0.2),
        "sampling": {},
        "timings": Timings(1.0, 0.1, 0.2),
    }
    return Turn(**(values | changes))  # pyright: ignore[reportArgumentType]


def add(store: Store, *turns: Turn, next_state: str | None = "thanks") -> None:
    with store.recording() as recording:
        for added in turns:
            recording.add_turn(added, os.urandom(16), KEY)
            if next_state is not None:
                state = NextState(added.id, Source.USER, next_state, 0.9)
                recording.add_next_states(added.id, True, [state])


def judge(store: Store, number: int, score: int, hint: str | None = None) -> bool:
    hinted = (1, 2, 9) if hint else None
    return store.judging.settle_verdict(
        Verdict(f"turn_{number}", (score,), score, "rules", hint, hinted)
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=5),
    rest=st.dictionaries(st.text().filter(lambda k: k != "messages"), json_values, max_size=4),
    tools=st.none() | st.lists(st.dictionaries(st.text(), json_values), max_size=3),
    logprobs=st.lists(st.floats(-1000, 0), min_size=1, max_size=9),
)
def test_a_turn_comes_back_as_it_was_recorded(
    store: Store,
    messages: list[Json],
    rest: Json,
    tools: list[Json] | None,
    logprobs: list[float],
) -> None:
    request: Json = {"messages": messages, **rest}
    if tools is not None:
        request["tools"] = tools
    ids = tuple(range(2**32 - len(logprobs), 2**32))
    recorded = turn(
        next(_number), request=request, completion_ids=ids, behaviour_logprobs=tuple(logprobs)
    )
    add(store, recorded)
    assert store.turns.get(recorded.id) == recorded


def test_a_message_that_is_sent_again_is_stored_once(store: Store) -> None:
    long = {"role": "system", "content": "x" * 1000}
    add(store, *(turn(n, request={"messages": [long]}) for n in range(5)))
    with store.database.read() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(schema.texts))
        # The message, the reply, the prompt's ids, the empty rest of the request, the next state.
        assert count.scalar_one() == 5


def test_a_long_message_much_like_an_earlier_one_takes_little_room(tmp_path: Path) -> None:
    text = " ".join(f"rule {n * n % 9973}" for n in range(5000))
    prompts = [f"{text[:20000]} It is {hour} o'clock. {text[20000:]}" for hour in range(9)]
    recorded = [
        turn(n, request={"messages": [{"role": "system", "content": prompt}]})
        for n, prompt in enumerate(prompts)
    ]
    store = Store(StoreConfig(dir=str(tmp_path)))
    add(store, *recorded[:5])
    add(store, *recorded[5:])  # against a base that another transaction has stored
    with store.database.read() as connection:
        m = schema.texts.c
        query = sa.select(sa.func.length(m.stored)).where(m.base.is_not(None))
        small = connection.execute(query).scalars().all()
    assert len(small) == 8
    assert max(small) < 500 < len(prompts[0]) / 50
    again = Store(StoreConfig(dir=str(tmp_path)))
    assert [again.turns.get(expected.id) for expected in recorded] == recorded
    store.close()
    again.close()


def test_an_aborted_recording_leaves_nothing(store: Store) -> None:
    with suppress(ZeroDivisionError), store.recording() as recording:
        recording.add_turn(turn(0), KEY, KEY)
        raise ZeroDivisionError
    assert store.turns.ids() == []
    add(store, turn(0))  # its messages are not believed to be there already
    assert store.turns.get("turn_0") is not None


@pytest.mark.sqlite
def test_the_log_is_moved_into_the_database_when_it_is_large_and_small_again_then(
    tmp_path: Path,
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    log = tmp_path / "nextstate.sqlite3-wal"
    noise = random.Random(0)
    numbers = itertools.count()

    def add_a_large_turn() -> None:
        said = [{"role": "user", "content": noise.randbytes(250_000).hex()}]
        add(store, turn(next(numbers), request={"messages": said}), next_state=None)

    add_a_large_turn()
    store.checkpoint()
    written = log.stat().st_size
    assert written > 0  # too little to move
    while log.stat().st_size < 4 << 20:
        add_a_large_turn()
    store.checkpoint()
    add_a_large_turn()  # into the log's beginning
    assert log.stat().st_size < 2 * written
    store.close()


def test_files_are_for_their_owner_only(store: Store) -> None:
    assert stat.S_IMODE(store.dir.stat().st_mode) == 0o700
    for file in store.dir.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_lease_is_given_once_until_it_expires(tmp_path: Path) -> None:
    now = [0.0]
    store = Store(StoreConfig(dir=str(tmp_path)), clock=lambda: now[0])
    add(store, turn(0), turn(1))
    assert store.judging.lease(9, lease_s=60) == ["turn_0", "turn_1"]
    assert store.judging.lease(9, lease_s=60) == []
    now[0] = 61.0
    assert judge(store, 0, 1)
    assert store.judging.lease(9, lease_s=60) == ["turn_1"]
    store.close()


def test_a_turn_gets_one_verdict_and_one_sample(store: Store) -> None:
    add(store, turn(0))
    assert judge(store, 0, 1)
    assert not judge(store, 0, -1)
    verdict = store.judging.verdict("turn_0")
    assert verdict is not None
    assert verdict.score == 1
    assert store.counts()["samples/ready"] == 1


def test_untrainable_and_empty_verdicts_are_dropped_with_the_reason(store: Store) -> None:
    add(store, turn(0, untrainable="usage differs"), turn(1), turn(2, policy_version=None))
    for number, score in ((0, 1), (1, 0), (2, 1)):
        judge(store, number, score)
    assert store.counts()["samples/dropped"] == 3
    assert store.training.lease_samples("main", 9, "b", scored=True, hinted=True) == []


def test_a_batch_holds_only_what_its_method_can_use(store: Store) -> None:
    add(store, turn(0), turn(1), turn(2))
    judge(store, 0, 1)
    judge(store, 1, 0, hint="Be brief.")
    judge(store, 2, -1, hint="Be brief.")

    def usable(*, scored: bool, hinted: bool) -> list[str]:
        leased = store.training.lease_samples("main", 9, "b", scored=scored, hinted=hinted)
        store.training.release_samples("main")
        return [sample.turn for sample in leased]

    assert usable(scored=True, hinted=False) == ["turn_0", "turn_2"]
    assert usable(scored=False, hinted=True) == ["turn_1", "turn_2"]
    assert usable(scored=True, hinted=True) == ["turn_0", "turn_1", "turn_2"]
    assert store.training.ready_samples("main", scored=True, hinted=False) == 2


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"\[store\] dir"):
        Store(StoreConfig(dir=str(tmp_path / "file" / "state")))


def test_records_refuse_to_contradict_themselves() -> None:
    with pytest.raises(RecordError, match="1 behaviour log-probs for 2"):
        turn(0, behaviour_logprobs=(-0.1,))
    with pytest.raises(RecordError, match="not a log-probability"):
        turn(0, behaviour_logprobs=(0.5, -0.1))
    with pytest.raises(RecordError, match="without ids"):
        turn(0, completion_ids=None, behaviour_logprobs=None)
    with pytest.raises(RecordError, match="score"):
        Verdict("t", (), 2, "rules")


@pytest.mark.parametrize(
    ("votes", "expected"),
    [([1], 1), ([1, 1, -1], 1), ([1, -1], 0), ([1, 0, -1], 0), ([-1, -1, 0], -1), ([0, 0, 1], 0)],
)
def test_the_majority_wins_and_a_tie_is_zero(votes: list[int], expected: int) -> None:
    assert majority(votes) == expected


def test_a_verdict_and_why_a_version_ended_come_back(store: Store) -> None:
    add(store, turn(0))
    verdict = Verdict("turn_0", (1,), 1, "rules")
    store.judging.settle_verdict(verdict)
    assert store.judging.verdict("turn_0") == verdict
    version = PolicyVersion(
        "main", 1, 0, "/a", "ff", 1, VersionState.REJECTED, reason="held-out score fell"
    )
    store.versions.add(version, None)
    assert store.versions.all() == [version]


def test_held_out_samples_are_never_leased_and_the_newest_come_first(store: Store) -> None:
    for number in range(9):
        add(store, turn(number, session="abc"[number % 3]))
        judge(store, number, 1)
    assert store.training.hold_out("other", lambda _: True) == 0
    assert store.training.hold_out("main", lambda session: session in "ab") == 6
    assert store.training.hold_out("main", lambda session: session in "ab") == 0
    leased = store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
    assert {sample.session for sample in leased} == {"c"}
    assert store.counts()["samples/held"] == 6
    assert [s.turn for s in store.training.held_samples("main", 9, 9)] == [
        *("turn_7", "turn_6", "turn_4", "turn_3", "turn_1", "turn_0")
    ]
    assert [s.turn for s in store.training.held_samples("main", 3, 1)] == ["turn_7", "turn_6"]
    assert [s.turn for s in store.training.held_samples("main", 1, 9)] == ["turn_7"]
    assert store.training.held_samples("other", 9, 9) == []


def test_a_judge_without_work_waits_for_no_writer_and_holds_none_up(
    store: Store, tmp_path: Path
) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    other = Store(StoreConfig(dir=str(tmp_path / "state")), patience=Patience(0.1, pause_s=0.01))
    with closing(other), store.database.write():  # the one transaction that writes
        assert other.judging.lease(9, 60.0) == []
        assert other.groups.unsettled() == []


def test_what_a_learner_may_have_to_do_is_news(store: Store) -> None:
    add(store, turn(0), turn(1))
    nothing = store.training.news()
    assert store.training.news() == nothing
    judge(store, 0, 1)
    assert (ready := store.training.news()) != nothing
    store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
    assert store.training.news() != ready
    store.training.release_samples("main")
    assert store.training.news() == ready
    store.versions.add(PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE), None)
    assert (added := store.training.news()) != ready
    store.versions.pause("main", "me")
    assert store.training.news() != added
