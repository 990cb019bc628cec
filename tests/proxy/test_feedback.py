"""`POST /v1/feedback` over real HTTP on a real store: what it answers, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextstate.records import (
    Feedback,
    NextState,
    PolicyVersion,
    Source,
    TurnKind,
    VersionState,
)
from nextstate.store import Store
from nextstate.store.settling import Reception
from nextstate.store.shares import OWNER
from proxy.lineages import Access
from tests.proxy.running_proxy import Running, both, request
from tests.scripted_engine import ScriptedEngine
from tests.store.rows import select
from tests.store.test_records import KEY, add, judge, turn

TURN = "turn_0"
KEEPS = {"main-key": "main", "alice-key": "alice"}


async def give(
    p: Running, body: object, status: int = 200, key: str = "unused", data: bytes | None = None
) -> dict[str, Any]:
    """Sends feedback and returns the answer, which must have the status."""
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{p.url}/v1/feedback"
    sent = {"json": body} if data is None else {"data": data}
    answer = await p.http.post(url, headers=headers, **sent)
    found = await answer.json()
    assert answer.status == status, found
    return found


def refusal(answer: dict[str, Any], status: int = 400) -> str:
    """The message of an error in the API's format."""
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    assert list(answer) == ["error"]
    assert answer["error"] == {
        "message": answer["error"]["message"], "type": kind, "param": None, "code": status,
    }  # fmt: skip
    return answer["error"]["message"]


def rows(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """All that feedback may change, as it is stored."""
    tables = ("feedback", "verdicts", "samples", "judgements")
    queries = {table: f"SELECT * FROM {table} ORDER BY turn" for table in tables}
    return {table: [(*row,) for row in select(store, query)] for table, query in queries.items()}


def test_feedback_decides_and_the_same_again_changes_nothing(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        _, _, headers = await p.chat(request(), {"X-Session-Id": "my-chat"})
        turn_id = headers["x-nextstate-turn"]
        said = {"turn_id": turn_id, "score": -1, "hint": " Be brief. ", "comment": "Too long."}
        first = await give(p, said)
        assert first == {
            "turn": turn_id, "session": "my-chat", "score": -1, "applied": True, "reason": None,
        }  # fmt: skip
        verdict = store.judging.verdict(turn_id)
        assert verdict is not None
        assert (verdict.score, verdict.hint, verdict.judge) == (-1, "Be brief.", "feedback")
        assert store.judging.feedback(turn_id) == Feedback(turn_id, -1, "Be brief.", "Too long.")
        assert store.training.ready_samples("main", scored=True, hinted=False) == 1
        before = rows(store)
        assert await give(p, said) == first
        assert rows(store) == before
        await give(p, {"turn_id": turn_id, "score": 1, "hint": None, "comment": ""})
        assert store.judging.feedback(turn_id) == Feedback(turn_id, 1)
        assert [row[5] > row[4] for row in rows(store)["feedback"]] == [True]  # updated, created

    both(test, store, tmp_path)


def test_a_session_means_its_newest_main_turn(store: Store, tmp_path: Path) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        turns: list[str] = []
        for _ in range(2):  # the same name for two conversations
            _, _, headers = await p.chat(request(), {"X-Session-Id": "my-chat"})
            turns.append(headers["x-nextstate-turn"])
        with store.recording() as recording:
            side = turn(9, session="my-chat~2", kind=TurnKind.SIDE)
            recording.add_turn(side, KEY, KEY, client_session="my-chat")
        for name in ("my-chat", "my-chat~2"):
            found = await give(p, {"session_id": name, "score": 1})
            assert (found["turn"], found["session"]) == (turns[1], "my-chat~2")
        _, _, headers = await p.chat(request("unnamed"))
        unnamed = store.turns.get(headers["x-nextstate-turn"])
        assert unnamed is not None
        assert (await give(p, {"session_id": unnamed.session, "score": 1}))["turn"] == unnamed.id
        long = "n" * 300  # the store keeps 200 characters of a name
        _, _, headers = await p.chat(request(), {"X-Session-Id": long})
        found = await give(p, {"session_id": long, "score": 1})
        assert found["turn"] == headers["x-nextstate-turn"]

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "score is missing"),
        ({"turn_id": TURN}, "score is missing"),
        ({"turn_id": TURN, "score": 2}, "score = 2: expected 1, 0 or -1"),
        ({"turn_id": TURN, "score": True}, "score = True: expected 1, 0 or -1"),
        ({"turn_id": TURN, "score": 1.0}, "score = 1.0: expected 1, 0 or -1"),
        ({"turn_id": TURN, "score": "up"}, "score = 'up': expected 1, 0 or -1"),
        ({"turn_id": TURN, "score": None}, "score = None: expected 1, 0 or -1"),
        ({"turn_id": TURN, "score": "9" * 500}, "score = '999"),
        ({"score": 1}, "either turn_id"),
        ({"turn_id": None, "session_id": " ", "score": 1}, "neither is there"),
        ({"turn_id": TURN, "session_id": "s", "score": 1}, "both are there"),
        ({"turn_id": 5, "score": 1}, "turn_id = 5: expected a text"),
        ({"turn_id": TURN, "score": 1, "hint": ["x"]}, "hint = ['x']: expected a text"),
        ({"turn_id": TURN, "score": 1, "comment": {}}, "comment = {}: expected a text"),
        ({"turn_id": TURN, "score": 1, "hint": "x" * 1001}, "hint has 1001 characters"),
        ({"turn_id": TURN, "score": 1, "comment": "x" * 4001}, "comment has 4001 characters"),
        ({"turn": TURN, "score": 1}, "unknown field 'turn'; did you mean 'turn_id'?"),
        ({"turn_id": TURN, "score": 1, "coment": "x"}, "did you mean 'comment'?"),
        ({"zzzzzzzz": 1}, "known: turn_id, session_id, score, hint, comment"),
    ],
)
def test_a_body_that_is_wrong_is_refused_with_what_to_change(
    store: Store, tmp_path: Path, body: dict[str, Any], expected: str
) -> None:
    add(store, turn(0))

    async def test(engine: ScriptedEngine, p: Running) -> None:
        message = refusal(await give(p, body, 400))
        assert expected in message
        assert len(message) < 300
        assert store.judging.feedback(TURN) is None

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"1", b'{"score": NaN}', b"\xff\xfe", b"[" * 9999]
)
def test_a_body_that_is_no_json_object_is_refused(
    store: Store, tmp_path: Path, data: bytes
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        assert "not a JSON object" in refusal(await give(p, None, 400, data=data))

    both(test, store, tmp_path)


def test_the_longest_hint_and_comment_are_kept_whole(store: Store, tmp_path: Path) -> None:
    add(store, turn(0))
    longest = Feedback(TURN, 1, "ü" * 1000, "ü" * 4000)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        body = {"turn_id": TURN, "score": 1, "hint": longest.hint, "comment": longest.comment}
        assert (await give(p, body))["applied"]
        assert store.judging.feedback(TURN) == longest

    both(test, store, tmp_path)


def test_what_is_not_there_is_not_found(store: Store, tmp_path: Path) -> None:
    with store.recording() as recording:
        recording.add_turn(turn(0, session="side", kind=TurnKind.SIDE), KEY, KEY)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        none = await give(p, {"turn_id": "turn_x", "score": 1}, 404)
        assert refusal(none, 404) == "There is no turn 'turn_x'."
        for name in ("nobody", "side", TURN):
            none = await give(p, {"session_id": name, "score": 1}, 404)
            assert refusal(none, 404) == f"There is no turn in {name!r}."

    both(test, store, tmp_path)


def test_a_key_reaches_no_session_of_another_lineage(store: Store, tmp_path: Path) -> None:
    with store.recording() as recording:
        for number, lineage in enumerate(KEEPS.values()):
            own = turn(number, session=f"chat~{number}", lineage=lineage)
            recording.add_turn(own, KEY, KEY, client_session="chat")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for number, key in enumerate(KEEPS):
            found = await give(p, {"session_id": "chat", "score": 1}, key=key)
            assert found["turn"] == f"turn_{number}"
            theirs = f"chat~{1 - number}"
            none = await give(p, {"session_id": theirs, "score": -1}, 404, key=key)
            assert refusal(none, 404) == f"There is no turn in {theirs!r}."
            await give(p, {"turn_id": f"turn_{1 - number}", "score": -1}, 404, key=key)
        await give(p, {"session_id": "chat", "score": 1}, 401, key="nobody's")
        assert [row[1] for row in rows(store)["feedback"]] == [1, 1]

    access = {"alice": Access(None, "alice-key")}
    both(test, store, tmp_path, key="main-key", access=access)


def test_a_side_turn_is_never_judged_but_what_was_said_is_kept(
    store: Store, tmp_path: Path
) -> None:
    with store.recording() as recording:
        recording.add_turn(turn(0, kind=TurnKind.SIDE), KEY, KEY)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for _ in range(2):
            found = await give(p, {"turn_id": TURN, "score": -1, "hint": "Be brief."})
            assert not found["applied"]
            assert "side turn" in found["reason"]
        left = rows(store)
        assert (len(left["feedback"]), left["verdicts"], left["samples"]) == (1, [], [])
        assert left["judgements"] == []

    both(test, store, tmp_path)


def test_a_cut_turn_is_settled_by_its_id_and_a_session_means_the_retry(
    store: Store, tmp_path: Path
) -> None:
    with store.recording() as recording:
        cut = turn(0, finish_reason=None, untrainable="the reply was cut")
        recording.add_turn(cut, KEY, KEY, place=KEY)
        recording.add_turn(turn(1), KEY, KEY)
        recording.replace_cut(KEY, "turn_1")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        found = await give(p, {"turn_id": TURN, "score": -1, "hint": "Be brief."})
        assert (found["applied"], found["reason"]) == (True, None)
        assert store.counts()["samples/dropped"] == 1
        assert store.judging.lease(9, 60) == []  # nothing to render for what cannot train
        assert (await give(p, {"session_id": "s", "score": 1}))["turn"] == "turn_1"

    both(test, store, tmp_path)


def test_feedback_after_training_changes_neither_verdict_nor_sample(
    store: Store, tmp_path: Path
) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    store.training.lease_samples("main", 9, "b", scored=True, hinted=True)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        body = {"turn_id": TURN, "score": -1, "hint": "Be brief."}
        before = rows(store)
        found = await give(p, body)
        assert not found["applied"]
        assert "being trained" in found["reason"]
        version = PolicyVersion("main", 7, 0, "/a", "ff", 1, VersionState.CANDIDATE)
        store.versions.add(version, "b")
        found = await give(p, {**body, "score": 0})
        assert (found["score"], found["applied"]) == (0, False)
        assert "version 7 has trained on this turn" in found["reason"]
        after = rows(store)
        assert after["verdicts"] == before["verdicts"]
        assert store.counts()["samples/trained"] == 1
        assert store.judging.feedback(TURN) == Feedback(TURN, 0, "Be brief.")
        assert store.judging.labels() == {"rules": {(0, 1): 1}}

    both(test, store, tmp_path)


def test_feedback_during_training_counts_once_the_batch_is_given_up(store: Store) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
    assert not store.reviewing.give(Feedback(TURN, -1, "Be brief."), OWNER).applied
    assert store.training.release_samples("main") == 1
    (sample,) = store.training.lease_samples("main", 9, "b2", scored=True, hinted=True)
    assert sample.score == -1
    assert store.judging.lease(9, 60) == [TURN]
    assert store.reviewing.give(Feedback(TURN, -1, "Be brief."), OWNER).applied


def test_the_result_of_the_votes_is_kept_with_the_feedback(store: Store) -> None:
    add(store, turn(0), turn(1), turn(2))
    judge(store, 0, 1)
    for said in (0, -1):
        store.reviewing.give(Feedback(TURN, said), OWNER)
    assert store.judging.labels() == {"rules": {(-1, 1): 1}}
    store.reviewing.give(Feedback("turn_1", 1), OWNER)
    assert store.judging.labels() == {"rules": {(-1, 1): 1}}
    assert not judge(store, 1, -1)  # it voted while the person spoke
    assert store.judging.labels() == {"rules": {(-1, 1): 1, (1, -1): 1}}
    verdict = store.judging.verdict("turn_1")
    assert verdict is not None
    assert (verdict.score, verdict.judge) == (1, "feedback")


def test_feedback_before_any_next_state_is_settled_and_its_next_state_is_kept(store: Store) -> None:
    add(store, turn(0), turn(1), next_state=None)
    said = Feedback(TURN, -1, "Be brief.")
    assert store.reviewing.give(said, OWNER) == Reception(TURN, "s", -1, True, None)
    store.reviewing.give(Feedback("turn_1", 1), OWNER)
    with store.recording() as recording:
        for number in range(2):
            said_next = NextState(f"turn_{number}", Source.USER, "too long", 0.9)
            recording.add_next_states(f"turn_{number}", True, [said_next])
    assert [state.text for state in store.turns.next_states(TURN)] == ["too long"]
    assert store.judging.lease(9, 60) == [TURN, "turn_1"]
    work = store.judging.judgement(TURN)
    assert work is not None
    assert (work.feedback, work.attempts) == (said, 1)
