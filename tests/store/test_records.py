"""The store: what is recorded comes back the same, and work is leased and settled once."""

from __future__ import annotations

import itertools
import math
import os
import random
import stat
from array import array
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.errors import RecordError, StoreError
from nextstate.records import (
    Feedback,
    Json,
    NextState,
    PolicyVersion,
    SampleState,
    ScoreCounts,
    Source,
    Timings,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
    majority,
)
from nextstate.store import rows, schema
from nextstate.store.migrations import migrate, scoped
from nextstate.store.store import Store

KEY = b"k" * 16


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
    return store.settle_verdict(Verdict(f"turn_{number}", (score,), score, "rules", hint, hinted))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=5),
    rest=st.dictionaries(st.text().filter(lambda k: k != "messages"), json_values, max_size=4),
    tools=st.none() | st.lists(st.dictionaries(st.text(), json_values), max_size=3),
    logprobs=st.lists(st.floats(-1000, 0), min_size=1, max_size=9),
)
def test_a_turn_comes_back_as_it_was_recorded(
    tmp_path_factory: pytest.TempPathFactory,
    messages: list[Json],
    rest: Json,
    tools: list[Json] | None,
    logprobs: list[float],
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path_factory.mktemp("store"))))
    request: Json = {"messages": messages, **rest}
    if tools is not None:
        request["tools"] = tools
    ids = tuple(range(2**32 - len(logprobs), 2**32))
    recorded = turn(0, request=request, completion_ids=ids, behaviour_logprobs=tuple(logprobs))
    add(store, recorded)
    assert store.turn("turn_0") == recorded
    store.close()


def test_a_message_that_is_sent_again_is_stored_once(store: Store) -> None:
    long = {"role": "system", "content": "x" * 1000}
    add(store, *(turn(n, request={"messages": [long]}) for n in range(5)))
    with sa.create_engine(f"sqlite:///{store.dir}/nextstate.sqlite3").connect() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(schema.messages))
        # The system message, the reply, the prompt's ids, and the empty rest of the request.
        assert count.scalar_one() == 4


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=6000),
    at=st.integers(0, 6000),
    inserted=st.lists(st.integers(0, 300), max_size=5),
)
def test_runs_of_token_ids_join_to_the_same_ids_and_survive_an_insertion(
    ids: list[int], at: int, inserted: list[int]
) -> None:
    def kept(tokens: list[int]) -> set[bytes]:
        runs = rows.id_runs(tokens)
        bodies = {rows.content_hash(run): run for run in runs}
        joined = rows.join_runs(b"".join(map(rows.content_hash, runs)), bodies)
        assert joined == tuple(tokens)
        assert all(len(run) <= 4 * 2048 for run in runs)
        return set(runs)

    changed = ids[:at] + inserted + ids[at:]
    before = rows.id_runs(ids[:at])
    assert set(before[:-1]) <= kept(changed)  # what stands before a change stays as it is


def test_a_prompt_changed_in_the_middle_shares_its_other_runs() -> None:
    ids = [(n * 7919 + n * n * 31) % 50_000 for n in range(20_000)]
    runs = set(rows.id_runs(ids))
    changed = set(rows.id_runs([*ids[:9_000], 5, 6, 7, *ids[9_010:]]))
    assert len(changed - runs) <= 2 < 40 < len(runs)


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
    with sa.create_engine(f"sqlite:///{tmp_path}/nextstate.sqlite3").connect() as connection:
        m = schema.messages.c
        query = sa.select(sa.func.length(m.body)).where(m.base.is_not(None))
        small = connection.execute(query).scalars().all()
    assert len(small) == 8
    assert max(small) < 500 < len(prompts[0]) / 50
    again = Store(StoreConfig(dir=str(tmp_path)))
    assert [again.turn(expected.id) for expected in recorded] == recorded
    store.close()
    again.close()


def test_an_aborted_recording_leaves_nothing(store: Store) -> None:
    with suppress(ZeroDivisionError), store.recording() as recording:
        recording.add_turn(turn(0), KEY, KEY)
        raise ZeroDivisionError
    assert store.turn_ids() == []
    add(store, turn(0))  # its messages are not believed to be there already
    assert store.turn("turn_0") is not None


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
    assert store.lease_judgements(9, lease_s=60) == ["turn_0", "turn_1"]
    assert store.lease_judgements(9, lease_s=60) == []
    now[0] = 61.0
    assert judge(store, 0, 1)
    assert store.lease_judgements(9, lease_s=60) == ["turn_1"]
    store.close()


def test_a_turn_gets_one_verdict_and_one_sample(store: Store) -> None:
    add(store, turn(0))
    assert judge(store, 0, 1)
    assert not judge(store, 0, -1)
    verdict = store.verdict("turn_0")
    assert verdict is not None
    assert verdict.score == 1
    assert store.counts()["samples/ready"] == 1


def test_untrainable_and_empty_verdicts_are_dropped_with_the_reason(store: Store) -> None:
    add(store, turn(0, untrainable="usage differs"), turn(1), turn(2, policy_version=None))
    for number, score in ((0, 1), (1, 0), (2, 1)):
        judge(store, number, score)
    assert store.counts()["samples/dropped"] == 3
    assert store.lease_samples("main", 9, "b", 60, scored=True, hinted=True) == []


def test_a_batch_holds_only_what_its_method_can_use(store: Store) -> None:
    add(store, turn(0), turn(1), turn(2))
    judge(store, 0, 1)
    judge(store, 1, 0, hint="Be brief.")
    judge(store, 2, -1, hint="Be brief.")

    def usable(*, scored: bool, hinted: bool) -> list[str]:
        leased = store.lease_samples("main", 9, "b", 60, scored=scored, hinted=hinted)
        store.release_samples("main")
        return [sample.turn for sample in leased]

    assert usable(scored=True, hinted=False) == ["turn_0", "turn_2"]
    assert usable(scored=False, hinted=True) == ["turn_1", "turn_2"]
    assert usable(scored=True, hinted=True) == ["turn_0", "turn_1", "turn_2"]
    assert store.ready_samples("main", scored=True, hinted=False) == 2


def test_a_version_settles_its_batch_and_only_one_serves(store: Store) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    store.lease_samples("main", 9, "b1", 60, scored=True, hinted=True)
    for number in (1, 2):
        version = PolicyVersion("main", number, 0, "/a", "ff", 1, VersionState.CANDIDATE)
        store.add_version(version, "b1" if number == 1 else None)
        store.set_serving("main", number)
    assert store.counts()[f"samples/{SampleState.TRAINED}"] == 1
    assert [v.state for v in store.versions("main")] == ["retired", "serving"]
    store.set_serving("main", 0)
    assert store.serving("main").number == 0
    assert store.serving("main").adapter_name is None


def test_a_newer_store_is_refused_and_an_older_one_is_brought_up(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    store.close()
    engine = sa.create_engine(f"sqlite:///{tmp_path}/nextstate.sqlite3")
    with engine.begin() as connection:
        migrate(
            connection,
            target=schema.VERSION + 1,
            steps={
                schema.VERSION + 1: lambda c: (
                    c.exec_driver_sql("CREATE TABLE newer (x INTEGER)") and None
                )
            },
        )
        assert sa.inspect(connection).has_table("newer")
    engine.dispose()
    with pytest.raises(StoreError, match="schema version"):
        Store(StoreConfig(dir=str(tmp_path)))


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


def undo_versions_4_to_6(connection: sa.Connection) -> None:
    triggers = sa.text("SELECT name FROM sqlite_master WHERE type = 'trigger'")
    for trigger in connection.execute(triggers).scalars().all():
        connection.execute(sa.text(f"DROP TRIGGER {trigger}"))
    connection.execute(sa.text("DROP TABLE counts"))
    for index in ("judgements_by_due", "samples_by_kind", "samples_by_age"):
        connection.execute(sa.text(f"DROP INDEX {index}"))
    for index in ("samples_by_training", "versions_by_state"):
        connection.execute(sa.text(f"DROP INDEX {index}"))
    for table, columns in (("judgements", "state, not_before"), ("samples", "lineage, state")):
        connection.execute(sa.text(f"ALTER TABLE {table} DROP COLUMN seq"))
        connection.execute(sa.text(f"CREATE INDEX {table}_by_state ON {table} ({columns})"))
    connection.execute(sa.text("DROP INDEX turns_by_said"))
    connection.execute(sa.text("ALTER TABLE turns DROP COLUMN said_key"))
    for table in ("feedback", "spending", "other_hints"):
        connection.execute(sa.text(f"DROP TABLE {table}"))
    connection.execute(sa.text("ALTER TABLE verdicts DROP COLUMN confidence"))
    connection.execute(sa.text("ALTER TABLE versions DROP COLUMN reason"))
    connection.execute(sa.text("ALTER TABLE judgements DROP COLUMN task_end"))


def shape(folder: Path) -> dict[str, tuple[set[str], set[str | None], int, set[str]]]:
    """The columns, the indexes, the number of foreign keys and the triggers of each table."""
    database = sa.create_engine(f"sqlite:///{folder / 'nextstate.sqlite3'}")
    found = sa.inspect(database)
    with database.connect() as connection:
        query = sa.text("SELECT tbl_name, sql FROM sqlite_master WHERE type = 'trigger'")
        triggers = connection.execute(query).all()
    return {
        table: (
            {f"{c['name']} {c['type']} {c['nullable']}" for c in found.get_columns(table)},
            {index["name"] for index in found.get_indexes(table)},
            len(found.get_foreign_keys(table)),
            {sql for of, sql in triggers if of == table},
        )
        for table in found.get_table_names()
    }


def test_a_store_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    old = sa.create_engine(f"sqlite:///{tmp_path / 'nextstate.sqlite3'}")
    new = {"client_session", "place", "replaced_by"}
    later = {*new, "said_key"}
    kept = [c.name for c in schema.turns.columns if c.name not in later]
    ids = tuple(range(1000))
    expected = turn(0, session="s", prompt_ids=ids, request={"messages": [], "seed": 1})

    def packed(*numbers: int) -> bytes:
        return rows.compress(array("I", numbers).tobytes())

    with old.begin() as connection:
        schema.metadata.create_all(connection)
        for index in ("turns_by_client_session", "turns_by_place"):
            connection.execute(sa.text(f"DROP INDEX {index}"))
        for column in new:
            connection.execute(sa.text(f"ALTER TABLE turns DROP COLUMN {column}"))
        connection.execute(sa.text("ALTER TABLE messages DROP COLUMN base"))
        connection.execute(sa.text("DROP TABLE workers"))
        undo_versions_4_to_6(connection)
        connection.execute(sa.insert(schema.schema_version).values(version=1))
        reply = orjson.dumps(expected.reply)
        connection.execute(
            sa.text("INSERT INTO messages VALUES (:hash, :body)"),
            {"hash": rows.content_hash(reply), "body": rows.compress(reply)},
        )
        row = dict.fromkeys(kept) | {
            **{"id": "turn_0", "session": "s", "idx": 0, "kind": "main", "lineage": "main"},
            **{"client_model": "m", "sampling": "{}", "started_at": 1.0, "total_s": 0.2},
            **{"continued": False, "seq": 1, "messages": b"", "policy_version": 0},
            **{"rest": rows.compress(b'{"seed":1}'), "prompt_ids": packed(*ids)},
            **{"reply": rows.content_hash(reply)},
            **{"completion_ids": packed(4, 5), "finish_reason": "stop"},
            **{"behaviour_logprobs": rows.compress(array("d", (-0.1, -0.2)).tobytes())},
            **{"chain_key": KEY, "reply_key": KEY, "first_token_s": 0.1},
        }
        values = ", ".join(f":{name}" for name in kept)
        connection.execute(sa.text(f"INSERT INTO turns ({', '.join(kept)}) VALUES ({values})"), row)
        connection.execute(
            sa.text(
                "INSERT INTO verdicts VALUES ('turn_0', '[1]', 1, 'rules', 'Be brief.', :ids, 2)"
            ),
            {"ids": packed(*ids, 7)},
        )
    old.dispose()
    fresh = Store(StoreConfig(dir=str(tmp_path / "fresh")))
    store = Store(StoreConfig(dir=str(tmp_path)))
    assert shape(tmp_path) == shape(fresh.dir)
    assert store.turn("turn_0") == expected
    hinted = (*ids, 7)
    assert store.verdict("turn_0") == Verdict("turn_0", (1,), 1, "rules", "Be brief.", hinted)
    with store.recording() as recording:
        found = recording.with_chain_key(scoped(KEY, "main", "s"))
    assert [row.id for row in found] == ["turn_0"]


def test_a_store_of_version_3_keeps_its_verdicts_and_versions(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    add(store, turn(0))
    judge(store, 0, -1, hint="Be brief.")
    version = PolicyVersion("main", 1, 0, "/a", "ff", 1, VersionState.CANDIDATE, {"loss": 0.5})
    store.add_version(version, None)
    verdict, counts = store.verdict("turn_0"), store.counts()
    store.close()
    old = sa.create_engine(f"sqlite:///{tmp_path / 'nextstate.sqlite3'}")
    with old.begin() as connection:
        undo_versions_4_to_6(connection)
        connection.execute(sa.update(schema.schema_version).values(version=3))
    old.dispose()
    again = Store(StoreConfig(dir=str(tmp_path)))
    fresh = Store(StoreConfig(dir=str(tmp_path / "fresh")))
    assert shape(tmp_path) == shape(fresh.dir)
    assert verdict is not None
    assert again.verdict("turn_0") == verdict
    assert again.versions() == [version]
    assert again.counts() == counts
    assert again.lease_judgements(9, 60) == []
    leased = again.lease_samples("main", 9, "b", 60, scored=True, hinted=True)
    assert [sample.turn for sample in leased] == ["turn_0"]


def test_how_sure_a_verdict_is_and_why_a_version_ended_come_back(store: Store) -> None:
    add(store, turn(0))
    sure = Verdict("turn_0", (1,), 1, "rules", confidence=0.75)
    store.settle_verdict(sure)
    assert store.verdict("turn_0") == sure
    version = PolicyVersion(
        "main", 1, 0, "/a", "ff", 1, VersionState.REJECTED, reason="held-out score fell"
    )
    store.add_version(version, None)
    assert store.versions() == [version]
    for confidence in (-0.1, 1.1, math.nan):
        with pytest.raises(RecordError, match="confidence"):
            Verdict("turn_0", (1,), 1, "rules", confidence=confidence)


def test_held_out_samples_are_never_leased_and_the_newest_come_first(store: Store) -> None:
    for number in range(9):
        add(store, turn(number, session="abc"[number % 3]))
        judge(store, number, 1)
    assert store.hold_out("other", lambda _: True) == 0
    assert store.hold_out("main", lambda session: session in "ab") == 6
    assert store.hold_out("main", lambda session: session in "ab") == 0
    leased = store.lease_samples("main", 9, "b", 60, scored=True, hinted=True)
    assert {sample.session for sample in leased} == {"c"}
    assert store.counts()["samples/held"] == 6
    assert [s.turn for s in store.held_samples("main", 9, 9)] == [
        *("turn_7", "turn_6", "turn_4", "turn_3", "turn_1", "turn_0")
    ]
    assert [s.turn for s in store.held_samples("main", 3, 1)] == ["turn_7", "turn_6"]
    assert [s.turn for s in store.held_samples("main", 1, 9)] == ["turn_7"]
    assert store.held_samples("other", 9, 9) == []


def test_a_rejected_version_drops_its_batch_with_the_reason(store: Store) -> None:
    add(store, turn(0), turn(1))
    for number in range(2):
        judge(store, number, 1)
    store.lease_samples("main", 1, "b1", 60, scored=True, hinted=True)
    rejected = PolicyVersion(
        "main", 1, 0, None, None, 1, VersionState.REJECTED, {"gate/rank": -1.0}, "too far"
    )
    store.add_version(rejected, "b1")
    assert store.counts()["samples/dropped"] == 1
    assert store.versions("main") == [rejected]
    assert store.serving("main").number == 0
    (used,) = store.used_turns("main", 1)
    assert (used[0], used[1].score) == ("turn_0", 1)
    assert store.used_turns("main", 2) == []


def add_versions(store: Store, count: int) -> None:
    """A chain of which the last serves."""
    for number in range(1, count + 1):
        candidate = VersionState.CANDIDATE
        store.add_version(PolicyVersion("main", number, number - 1, "/a", "ff", 1, candidate), None)
        store.set_serving("main", number)


def test_a_withdrawn_version_keeps_its_reason_and_only_while_it_serves(store: Store) -> None:
    add_versions(store, 3)
    rejected = replace(store.serving("main"), reason="worse")
    assert [v.number for v in store.ancestors(rejected)] == [2, 1, 0]
    assert store.replace_serving(rejected, 2)
    states = [(v.state.value, v.reason) for v in store.versions("main")]
    assert states == [("retired", None), ("serving", None), ("rejected", "worse")]
    store.set_serving("main", 1)  # a person
    assert not store.replace_serving(replace(rejected, number=2), 0)
    assert store.serving("main").number == 1
    store.set_serving("main", 3)
    assert store.serving("main").reason == "worse"  # so that one sees that it was rejected once


def test_a_version_can_be_withdrawn_for_the_base(store: Store) -> None:
    add_versions(store, 1)
    assert store.replace_serving(replace(store.serving("main"), reason="worse"), 0)
    assert store.serving("main").number == 0
    assert store.ancestors(store.serving("main")) == []


def test_verdicts_are_counted_by_the_version_that_served_the_turn(store: Store) -> None:
    served = {0: (1, 1, -1), 1: (0, -1), 2: (1,)}
    number = 0
    for version, scores in served.items():
        for score in scores:
            add(store, turn(number, policy_version=version))
            judge(store, number, score)
            number += 1
    assert store.score_counts("main", [0, 1, 9]) == {
        0: ScoreCounts(2, 0, 1),
        1: ScoreCounts(0, 1, 1),
        9: ScoreCounts(),
    }
    store.give_feedback(Feedback("turn_0", -1))
    assert store.score_counts("main", [0]) == {0: ScoreCounts(1, 0, 2)}
    assert store.score_counts("other", [0]) == {0: ScoreCounts()}
