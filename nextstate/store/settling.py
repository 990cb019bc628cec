"""How a turn's score is settled: once by votes, or by a person, whose last word counts.

Every function works inside the caller's transaction: a verdict, its sample and the judge's work for
it change together or not at all. A sample that is trained, or in training, never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson
import sqlalchemy as sa

from nextstate.episodes import EpisodeState
from nextstate.errors import NoTurnError
from nextstate.records import FEEDBACK, Feedback, SampleState, Source, TurnKind, Verdict
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.packing import dump, id_runs, join_runs
from nextstate.store.shares import OWNER
from nextstate.store.texts import Row, Texts

_IN_TRAINING = (SampleState.LEASED, SampleState.TRAINED)


@dataclass(frozen=True, slots=True)
class Reception:
    """What became of a person's feedback."""

    turn: str
    session: str
    score: int
    applied: bool
    """Whether it is the turn's verdict now."""
    reason: str | None
    """Why it is not applied; None when it is. It is kept as a label either way."""


def settle_votes(
    connection: sa.Connection, verdict: Verdict, task_end: str | None, now: float
) -> bool:
    """See `Judging.settle_verdict`."""
    turn = _turn(connection, verdict.turn)
    known = load_verdict(connection, verdict.turn)
    if known is not None:
        if known.judge == FEEDBACK:
            _keep_late_votes(connection, verdict)
            return False
        if not _is_open(connection, verdict.turn):
            _close_work(connection, verdict.turn)
            return False
    _put_verdict(connection, verdict, now)
    _close_work(connection, verdict.turn)
    # The task may have ended while the judge voted.
    j = t.judgements.c
    missed = (j.turn == verdict.turn, j.task_end.is_distinct_from(task_end))
    connection.execute(sa.update(t.judgements).where(*missed).values(state="pending"))
    _put_sample(connection, turn, verdict)
    return True


def judge_again(connection: sa.Connection, turns: Sequence[str], task_end: str) -> None:
    """Puts turns back, to be judged with what followed `task_end` as new evidence."""
    j, s, v = t.judgements.c, t.samples.c, t.verdicts.c
    fixed = sa.union_all(
        sa.select(s.turn).where(s.turn.in_(turns), s.state.in_(_IN_TRAINING)),
        sa.select(v.turn).where(v.turn.in_(turns), v.judge == FEEDBACK),
    )
    unknown = j.task_end.is_distinct_from(task_end)
    connection.execute(
        sa.update(t.judgements)
        .where(j.turn.in_(turns), j.turn.not_in(fixed), unknown)
        .values(state="pending", task_end=task_end, attempts=0, not_before=0.0, lease_until=None)
    )


def add_hinted_prompt(connection: sa.Connection, verdict: Verdict, now: float) -> bool:
    """See `Judging.add_hinted_prompt`."""
    turn = _turn(connection, verdict.turn)
    feedback = load_feedback(connection, verdict.turn)
    if feedback is None or not _is_what_was_said(verdict, feedback):
        return False  # they have changed their mind, and the work is open again
    _close_work(connection, verdict.turn)
    known = load_verdict(connection, verdict.turn)
    if known is None or not _is_what_was_said(known, feedback):
        return False
    if known != verdict:
        _put_verdict(connection, verdict, now)
        _put_sample(connection, turn, verdict)
    return True


def give_feedback(
    connection: sa.Connection, feedback: Feedback, now: float, client: str = OWNER
) -> Reception:
    """Keeps what a person says about a turn and settles it, unless it is or was in training.

    The last word counts; the same again changes nothing. A hint opens the judge's work again,
    which renders the hinted prompt. Raises NoTurnError.
    """
    turn = _turn(connection, feedback.turn)
    _keep_feedback(connection, feedback, now, client)
    known = load_verdict(connection, feedback.turn)
    reason = None
    if known is None or not _is_what_was_said(known, feedback):
        reason = _apply(connection, turn, feedback, now)
    return Reception(feedback.turn, turn.session, feedback.score, reason is None, reason)


def settle_feedback(connection: sa.Connection, turn_id: str, now: float) -> None:
    """Settles what a person said while the turn was in training, once that came to nothing."""
    feedback = load_feedback(connection, turn_id)
    assert feedback is not None
    turn, known = _turn(connection, turn_id), load_verdict(connection, turn_id)
    if known is not None and _is_what_was_said(known, feedback):
        _put_sample(connection, turn, known)  # its hint may have been rendered meanwhile
    else:
        _apply(connection, turn, feedback, now)


def load_feedback(connection: sa.Connection, turn_id: str) -> Feedback | None:
    """What a person said last about a turn, or None."""
    row = connection.execute(sa.select(t.feedback).where(t.feedback.c.turn == turn_id)).first()
    if row is None:
        return None
    found = texts.get(connection, (row.hint, row.comment))
    return Feedback(row.turn, row.score, _text(row.hint, found), _text(row.comment, found))


def load_verdict(connection: sa.Connection, turn_id: str) -> Verdict | None:
    """The settled verdict of a turn, or None."""
    row = connection.execute(sa.select(t.verdicts).where(t.verdicts.c.turn == turn_id)).first()
    return None if row is None else verdict_of(row, texts.get(connection, verdict_texts(row)))


def verdict_texts(row: Row) -> set[bytes]:
    """The hashes of the texts that a row of `verdicts` refers to."""
    runs = set(texts.hashes(row.hinted_prompt_ids or b""))
    return runs if row.hint is None else {*runs, row.hint}


def verdict_of(row: Row, found: Texts) -> Verdict:
    """The verdict in a row of `verdicts`."""
    return Verdict(
        turn=row.turn,
        votes=tuple(orjson.loads(row.votes)),
        score=row.score,
        judge=row.judge,
        hint=_text(row.hint, found),
        hinted_prompt_ids=join_runs(row.hinted_prompt_ids, found),
    )


def _turn(connection: sa.Connection, turn_id: str) -> Row:
    c = t.turns.c
    columns = c.seq, c.id, c.session, c.kind, c.lineage, c.policy_version, c.untrainable, c.episode
    query = sa.select(*columns, c.client)
    row = connection.execute(query.where(c.id == turn_id)).first()
    if row is None:
        raise NoTurnError(f"there is no turn {turn_id!r}: see `nextstate turns`")
    return row


def _is_what_was_said(verdict: Verdict, feedback: Feedback) -> bool:
    """True if a person gave the verdict, and it is what they said last."""
    said = (FEEDBACK, feedback.score, feedback.hint)
    return (verdict.judge, verdict.score, verdict.hint) == said


def _keep_feedback(connection: sa.Connection, feedback: Feedback, now: float, client: str) -> None:
    """Keeps the last word on a turn, and what the votes had come to before the first word."""
    known = load_feedback(connection, feedback.turn)
    if known == feedback:
        return
    said = {
        "score": feedback.score,
        "hint": _put_text(connection, feedback.hint),
        "comment": _put_text(connection, feedback.comment),
        "client": client,
    }
    if known is not None:
        ours = t.feedback.c.turn == feedback.turn
        before = connection.execute(sa.select(t.feedback).where(ours)).one()
        connection.execute(sa.update(t.feedback).where(ours).values(**said, updated_at=now))
        texts.release(connection, (before.hint, before.comment))
        return
    v = t.verdicts.c
    votes = sa.select(v.score, v.judge).where(v.turn == feedback.turn, v.judge != FEEDBACK)
    score, judge = connection.execute(votes).first() or (None, None)
    values = {**said, "created_at": now, "updated_at": now}
    values |= {"turn": feedback.turn, "voted_score": score, "voted_judge": judge}
    connection.execute(sa.insert(t.feedback).values(values))


def _keep_late_votes(connection: sa.Connection, verdict: Verdict) -> None:
    """Keeps the votes of a judge that a person overtook, if there were none before."""
    f = t.feedback.c
    connection.execute(
        sa.update(t.feedback)
        .where(f.turn == verdict.turn, f.voted_judge.is_(None))
        .values(voted_score=verdict.score, voted_judge=verdict.judge)
    )


def _apply(connection: sa.Connection, turn: Row, feedback: Feedback, now: float) -> str | None:
    """Makes the feedback the turn's verdict; returns why it could not."""
    if turn.kind == TurnKind.SIDE:
        return "a side turn is never judged or trained; the feedback is kept"
    if turn.kind == TurnKind.IMPORTED:
        return "an imported turn is never judged or trained; the feedback is kept"
    if _is_settled(connection, turn):
        return "the turn's episode is settled already; the feedback is kept"
    s = t.samples.c
    query = sa.select(s.state, s.trained_in).where(s.turn == feedback.turn)
    state, version = connection.execute(query).first() or (None, None)
    if state == SampleState.TRAINED:
        return f"version {version} has trained on this turn already; the feedback is kept"
    if state == SampleState.LEASED:
        return "the turn is being trained; the feedback is kept, and counts if that is given up"
    verdict = Verdict(feedback.turn, (), feedback.score, FEEDBACK, feedback.hint)
    _put_verdict(connection, verdict, now)
    _put_sample(connection, turn, verdict)
    if feedback.hint is not None and turn.untrainable is None:
        _open_work(connection, turn)
    else:
        _close_work(connection, feedback.turn)
    return None


def _put_verdict(connection: sa.Connection, verdict: Verdict, now: float) -> None:
    """Keeps a verdict in the place of any other on its turn."""
    ours = t.verdicts.c.turn == verdict.turn
    before = connection.execute(sa.select(t.verdicts).where(ours)).all()
    connection.execute(sa.delete(t.verdicts).where(ours))
    connection.execute(
        sa.insert(t.verdicts).values(
            turn=verdict.turn,
            votes=dump(verdict.votes),
            score=verdict.score,
            judge=verdict.judge,
            hint=_put_text(connection, verdict.hint),
            hinted_prompt_ids=_put_ids(connection, verdict.hinted_prompt_ids),
            created_at=now,
        )
    )
    for row in before:
        texts.release(connection, verdict_texts(row))


def _put_text(connection: sa.Connection, text: str | None) -> bytes | None:
    return None if text is None else texts.put(connection, text.encode())


def _text(key: bytes | None, found: Texts) -> str | None:
    return None if key is None else found[key].decode()


def _put_ids(connection: sa.Connection, ids: Sequence[int] | None) -> bytes | None:
    """Stores token ids in runs, each distinct one once; returns the hashes of the runs in order."""
    if ids is None:
        return None
    runs = id_runs(ids)
    for run in set(runs):
        texts.put(connection, run)
    return b"".join(map(texts.content_hash, runs))


def _open_work(connection: sa.Connection, turn: Row) -> None:
    """Lets the judge take the turn, whether or not it has done so before."""
    values = {"state": "pending", "lease_until": None, "not_before": 0.0, "attempts": 0}
    work = sa.update(t.judgements).where(t.judgements.c.turn == turn.id)
    if not connection.execute(work.values(**values, reason=None)).rowcount:
        connection.execute(sa.insert(t.judgements).values(turn=turn.id, seq=turn.seq, **values))


def _is_open(connection: sa.Connection, turn_id: str) -> bool:
    """True if a turn with votes is to be judged again, and nothing has trained on it."""
    j, s = t.judgements.c, t.samples.c
    work = sa.select(j.state).where(j.turn == turn_id)
    sample = sa.select(s.state).where(s.turn == turn_id)
    return (
        connection.execute(work).scalar() != "done"
        and connection.execute(sample).scalar() not in _IN_TRAINING
    )


def _close_work(connection: sa.Connection, turn_id: str) -> None:
    work = sa.update(t.judgements).where(t.judgements.c.turn == turn_id)
    connection.execute(work.values(state="done", lease_until=None, reason=None))


def _is_settled(connection: sa.Connection, turn: Row) -> bool:
    """Whether the turn is a step whose sample does not change any more."""
    if turn.episode is None:
        return False
    e = t.episodes.c
    state = connection.execute(sa.select(e.state).where(e.id == turn.episode)).scalar()
    return state in (EpisodeState.SETTLED, EpisodeState.DROPPED)


def _put_sample(connection: sa.Connection, turn: Row, verdict: Verdict) -> None:
    reason = turn.untrainable
    if reason is None and turn.policy_version is None:
        reason = "served by a model that is not a version of this lineage"
    in_episode = turn.episode is not None
    if reason is None and _is_settled(connection, turn):
        return
    if reason is None and not (in_episode or verdict.score or verdict.hinted_prompt_ids):
        reason = "score 0 without a hinted prompt teaches nothing"
    state = SampleState.WAITING if in_episode else SampleState.READY
    if reason is not None:
        state = SampleState.DROPPED
    values = {
        "lineage": turn.lineage,
        "state": state,
        "policy_version": turn.policy_version,
        "score": verdict.score,
        "hinted": verdict.hinted_prompt_ids is not None,
        "reason": reason,
        "screened": None,
        "client": OWNER if in_episode else _decided_by(connection, turn, verdict),
        "source": None if in_episode else _source_of(connection, verdict),
    }
    s = t.samples.c
    before = connection.execute(sa.select(s.state).where(s.turn == verdict.turn)).scalar()
    if before is None:
        connection.execute(sa.insert(t.samples).values(turn=turn.id, seq=turn.seq, **values))
    elif before not in _IN_TRAINING:
        # One that was held out is ready until the learner looks, which it does before it leases.
        connection.execute(sa.update(t.samples).where(s.turn == verdict.turn).values(**values))


def _decided_by(connection: sa.Connection, turn: Row, verdict: Verdict) -> str:
    """The client whose share a sample takes: whose feedback it is, or else who sent the turn.

    The owner's word on a client's turn is no other client's, or a person who clicks on a reply of
    their own agent would compete with it.
    """
    if verdict.judge != FEEDBACK:
        return turn.client
    f = t.feedback.c
    said = sa.select(f.client).where(f.turn == turn.id)
    return connection.execute(said).scalar() or turn.client


def _source_of(connection: sa.Connection, verdict: Verdict) -> Source:
    """The most trusted source of what a verdict is about."""
    if verdict.judge == FEEDBACK:
        return Source.FEEDBACK
    n, j = t.next_states.c, t.judgements.c
    end = sa.select(j.task_end).where(j.turn == verdict.turn).scalar_subquery()
    query = sa.select(n.source).where(sa.or_(n.turn == verdict.turn, n.turn == end)).distinct()
    found = {*connection.execute(query).scalars()}
    return next((source for source in Source if source in found), Source.TOOL)
