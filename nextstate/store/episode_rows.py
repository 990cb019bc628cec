"""The rows of an episode, in a transaction that `nextstate/store/episodes.py` has begun.

The statements are prepared: many episodes are opened and closed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import sqlalchemy as sa

from nextstate.episodes import (
    NEVER_TRAIN,
    Episode,
    EpisodeState,
    EpisodeStatus,
    Reward,
    RewardKind,
    Split,
)
from nextstate.errors import ConflictError, NoEpisodeError
from nextstate.records import TRUST, Json, NextState, SampleState, Source, TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Cursor
from nextstate.store.packing import dump
from nextstate.store.recording import Recording
from nextstate.store.texts import Known, Writer, one
from nextstate.wire import read_json, write_json

_E, _R, _T = t.episodes.c, t.rewards.c, t.turns.c
_ASKED = (
    *("lineage", "environment", "task", "group", "split", "seed", "max_calls", "max_tokens"),
    *("deadline_s", "version", "sampling", "metadata"),
)
"""What an episode is opened with. Opened again, it must be the same."""

_G = t.groups.c
THIS = _E.id == sa.bindparam("episode")
_WHOLE = sa.select(t.episodes).where(THIS)
_ADD = sa.insert(t.episodes).values({c.name: sa.bindparam(c.name) for c in _E})
_UNKNOWN_YET = dict.fromkeys(c.name for c in _E if c.nullable)
_GIVE_KEY = (
    sa.update(t.episodes)
    .where(THIS)
    .values(key_hash=sa.bindparam("key"), opener=sa.bindparam("sign"))
)
_TAKEN = [
    sa.select(_T.id).where(of == sa.bindparam("name")).limit(1)
    for of in (_T.session, _T.client_session)
]
_GROUP = sa.select(t.groups).where(_G.id == sa.bindparam("group"))
_ADD_GROUP = sa.insert(t.groups).values({c.name: sa.bindparam(c.name) for c in _G})
_SIZE = sa.update(t.groups).where(_G.id == sa.bindparam("group")).values(size=sa.bindparam("size"))
_MEMBERS = sa.select(sa.func.count().label("count")).where(
    _E.group_id == sa.bindparam("group"), _E.state != EpisodeState.DROPPED.value
)
_CLOSE = (
    sa.update(t.episodes)
    .where(THIS)
    .values({name: sa.bindparam(name) for name in ("state", "status", "outcome", "reason")})
    .values(closed_at=sa.bindparam("at"))
)
_OURS = sa.select(_T.id).where(_T.episode == sa.bindparam("episode"))
_DROP = (
    sa.update(t.samples)
    .where(t.samples.c.turn.in_(_OURS), t.samples.c.state == SampleState.WAITING.value)
    .values(state=SampleState.DROPPED.value, reason=sa.bindparam("why")),
    sa.update(t.judgements)
    .where(t.judgements.c.turn.in_(_OURS))
    .values(state="done", lease_until=sa.null(), reason=sa.bindparam("why")),
    sa.update(t.turns)
    .where(_T.episode == sa.bindparam("episode"), _T.untrainable.is_(None))
    .values(untrainable=sa.bindparam("why")),
)
TURNS = sa.select(_T.id).where(_T.episode == sa.bindparam("episode")).order_by(_T.step)
_LAST = (
    sa.select(_T.id, _T.continued)
    .where(_T.episode == sa.bindparam("episode"), _T.kind == TurnKind.MAIN.value)
    .where(_T.replaced_by.is_(None))
    .order_by(_T.step.desc())
    .limit(1)
)
_REWARDS = sa.select(t.rewards).where(_R.episode == sa.bindparam("episode")).order_by(_R.seq)


class Shown(NamedTuple):
    """An episode with what belongs to it."""

    episode: Episode
    rewards: list[Reward]
    """In the order in which they were given last."""
    turns: list[str]
    """Each one's position is its step."""


def open_one(
    cursor: Cursor, episode: Episode, size: int | None, key: str, opener: str | None, now: float
) -> Episode:
    """Adds an episode with the hash of its key, or finds the same one. Raises ConflictError."""
    known = load(cursor, episode.id)
    if known is not None:
        for name in _ASKED:
            if getattr(known, name) != getattr(episode, name):
                raise ConflictError(
                    f"episode {episode.id!r} is there with another {name}: "
                    "a retry of a task is an episode with an id of its own"
                )
        cursor.send(_GIVE_KEY, episode=episode.id, key=key, sign=opener)
        return known
    if any(cursor.first(taken, name=episode.id) for taken in _TAKEN):
        raise ConflictError(
            f"episode {episode.id!r}: recorded turns have a session of this name; "
            "choose another id, and open an episode before its first call"
        )
    if episode.group is not None:
        _join_group(cursor, episode, size, now)
    writer = Writer(cursor, Known())
    texts = (episode.task.encode(), write_json(episode.metadata))
    task, metadata = (writer.put(text) for text in texts)
    writer.close()
    cursor.send(
        _ADD,
        **{
            **_UNKNOWN_YET,
            "id": episode.id,
            "key_hash": key,
            "lineage": episode.lineage,
            "environment": episode.environment,
            "task": task,
            "task_key": episode.task_key,
            "family": episode.family_key,
            "group_id": episode.group,
            "split": episode.split.value,
            "seed": episode.seed,
            "max_calls": episode.max_calls,
            "max_tokens": episode.max_tokens,
            "deadline_s": episode.deadline_s,
            "version": episode.version,
            "sampling": dump(dict(episode.sampling)),
            "metadata": metadata,
            "state": EpisodeState.OPEN.value,
            "opened_at": now,
            "calls": 0,
            "tokens": 0,
            "opener": opener,
        },
    )
    return replace(episode, opened_at=now)


def row_of(cursor: Cursor, episode_id: str) -> Any:
    """Its row. Raises NoEpisodeError."""
    row = cursor.first(_WHOLE, episode=episode_id)
    if row is None:
        raise missing(episode_id)
    return row


def missing(episode_id: str) -> NoEpisodeError:
    """The error for an episode that is not there."""
    return NoEpisodeError(f"there is no episode {episode_id!r}: open it first")


def opened(row: Any | None, episode_id: str) -> Any:
    """The row of an episode that is open. Raises NoEpisodeError and ConflictError."""
    if row is None:
        raise missing(episode_id)
    if row.state != EpisodeState.OPEN:
        raise ConflictError(
            f"episode {episode_id!r} is closed as {row.status}: "
            "open another one to try its task again"
        )
    return row


def load(cursor: Cursor, episode_id: str) -> Episode | None:
    """The episode, or None."""
    row = cursor.first(_WHOLE, episode=episode_id)
    if row is None:
        return None
    return Episode(
        id=row.id,
        lineage=row.lineage,
        environment=row.environment,
        task=one(cursor, row.task).decode(),
        group=row.group_id,
        split=Split(row.split),
        seed=row.seed,
        max_calls=row.max_calls,
        max_tokens=row.max_tokens,
        deadline_s=row.deadline_s,
        version=row.version,
        sampling=read_json(row.sampling.encode()),
        metadata=read_json(one(cursor, row.metadata)),
        state=EpisodeState(row.state),
        status=None if row.status is None else EpisodeStatus(row.status),
        outcome=row.outcome,
        opened_at=row.opened_at,
        closed_at=row.closed_at,
        version_min=row.version_min,
        version_max=row.version_max,
        calls=row.calls,
        tokens=row.tokens,
        reason=row.reason,
    )


def shown(cursor: Cursor, episode_id: str) -> Shown:
    """The episode with what belongs to it. Raises NoEpisodeError."""
    episode = load(cursor, episode_id)
    if episode is None:
        raise missing(episode_id)
    turns = [row.id for row in cursor.all(TURNS, episode=episode_id)]
    return Shown(episode, rewards_of(cursor, episode_id), turns)


def rewards_of(cursor: Cursor, episode_id: str) -> list[Reward]:
    """Its rewards, in the order in which they were given last."""
    return [
        Reward(row.episode, row.name, RewardKind(row.kind), row.value, row.turn, row.source)
        for row in cursor.all(_REWARDS, episode=episode_id)
    ]


def _join_group(cursor: Cursor, episode: Episode, size: int | None, now: float) -> None:
    """Makes the episode's group, or checks that the episode fits into it."""
    asked: Json = {"lineage": episode.lineage, "task_key": episode.task_key}
    asked |= {"split": episode.split.value}
    row = cursor.first(_GROUP, group=episode.group)
    if row is None:
        values = {**asked, "id": episode.group, "size": size, "state": "open", "opened_at": now}
        cursor.send(_ADD_GROUP, **values)
        return
    known: Json = row._asdict()
    if size is not None and row.size is not None:
        asked["size"] = size
    for name, value in asked.items():
        if known[name] != value:
            what = {"task_key": "task or environment", "size": "group_size"}.get(name, name)
            raise ConflictError(
                f"group {episode.group!r} is there with another {what}: "
                "a group compares attempts at one task; choose another group"
            )
    if row.state != "open":
        raise ConflictError(
            f"group {row.id!r} is settled: its steps have their advantages; choose another group"
        )
    if row.size is None:
        if size is not None:
            cursor.send(_SIZE, group=row.id, size=size)
        return
    members = cursor.first(_MEMBERS, group=row.id)
    if members is not None and members.count >= row.size:
        raise ConflictError(f"group {row.id!r} has its {row.size} episodes: choose another group")


def one_outcome(cursor: Cursor, episode_id: str, said: float | None) -> float | None:
    """The outcome of an episode, of what its close and its rewards say."""
    found = [one for one in rewards_of(cursor, episode_id) if one.kind is RewardKind.OUTCOME]
    values = {row.value for row in found}
    if said is None and len(values) < 2:
        return next(iter(values), None)
    if said is None or (len(values) == 1 and said not in values):
        told = ", ".join(f"{row.name} = {row.value:g}" for row in found[:4])
        raise ConflictError(
            f"episode {episode_id!r} has two different outcomes: its rewards say {told}"
            + (": name one as outcome" if said is None else f", and its close says {said:g}")
        )
    return said


def close_episode(
    cursor: Cursor,
    episode_id: str,
    status: EpisodeStatus,
    outcome: float | None,
    now: float,
    why: str | None = None,
) -> None:
    """Sets what closing sets; what never trains is taken out of judging and training.

    `why` says more about an episode that never trains.
    """
    dropped = status in NEVER_TRAIN
    state = EpisodeState.DROPPED if dropped else EpisodeState.CLOSED
    reason = f"the episode was closed as {status.value}" if dropped else None
    if dropped and why is not None:
        reason = f"{reason}: {why}"
    values = {"state": state.value, "status": status.value, "outcome": outcome, "reason": reason}
    cursor.send(_CLOSE, episode=episode_id, **values, at=now)
    if dropped:
        for statement in _DROP:
            cursor.send(statement, episode=episode_id, why=reason)


def observe(cursor: Cursor, episode: Any, observation: str, *, judge: bool) -> None:
    """Makes the observation the next state of the last turn, unless something followed it."""
    turn = cursor.first(_LAST, episode=episode.id)
    if turn is None or turn.continued:
        return
    recording = Recording(cursor, Known())
    state = NextState(turn.id, Source.ENVIRONMENT, observation, TRUST[Source.ENVIRONMENT])
    recording.add_next_states(turn.id, judge, [state])
    recording.close()
