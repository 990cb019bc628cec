"""Episodes of environments: opened, called, rewarded and closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

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
from nextstate.errors import BudgetError, ConflictError, NoEpisodeError
from nextstate.keys import key_hash, new_key
from nextstate.records import TRUST, Json, NextState, SampleState, Source, TurnKind
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.packing import dump
from nextstate.store.recording import Recording
from nextstate.store.texts import Known, Row, cursor_of
from nextstate.wire import read_json, write_json

API_KEY = "ep-"
"""How an episode's own key begins."""
_E, _R, _T = t.episodes.c, t.rewards.c, t.turns.c
_ASKED = (
    *("lineage", "environment", "task", "group", "split", "seed", "max_calls", "max_tokens"),
    *("deadline_s", "version", "sampling", "metadata"),
)
"""What an episode is opened with. Opened again, it must be the same."""

_THIS = _E.id == sa.bindparam("episode")
_CALLING = sa.select(
    *(_E.state, _E.status, _E.opened_at, _E.calls, _E.tokens),
    *(_E.max_calls, _E.max_tokens, _E.deadline_s),
).where(_THIS)
_CALLED = sa.update(t.episodes).where(_THIS).values(calls=_E.calls + 1)


class Named(NamedTuple):
    """What a call in an episode needs to know of it. It never changes."""

    id: str
    lineage: str
    held_out: bool
    """Whether its turns never train."""
    sampling: Json
    version: int | None
    """The policy version that shall serve it; None: the one that serves its lineage."""
    opener: str | None = None
    """The sign of the key that opened it last; None: whoever opened it had no key."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which episodes are wanted: those that meet every condition that is given."""

    lineages: Sequence[str] | None = None
    """Of one of these; None: of any."""
    environment: str | None = None
    group: str | None = None
    outcome: Literal["solved", "failed", "none"] | None = None
    """At least 1; less; or not known, as of one that is still open."""
    since: float | None = None
    """Unix time in seconds: only those opened then or later."""


class Left(NamedTuple):
    """What a call may still use of its episode's budgets; None: as much as it likes."""

    tokens: int | None
    seconds: float | None


@queries
class Episodes:
    """Queries for episodes, their groups and their rewards."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def any(self) -> bool:
        """Whether there is an episode."""
        with self._database.read() as connection:
            return connection.execute(sa.select(_E.id).limit(1)).first() is not None

    def named(self, episode_id: str) -> Named | None:
        """The episode that has this id."""
        return self._named(_E.id == episode_id)

    def of_key(self, key: str) -> Named | None:
        """The episode that has this API key."""
        return self._named(_E.key_hash == key_hash(key))

    def get(self, episode_id: str) -> Episode | None:
        """One episode, or None."""
        with self._database.read() as connection:
            return _load(connection, episode_id)

    def ids(self, choice: Choice, before: str | None = None, limit: int | None = None) -> list[str]:
        """The newest chosen episodes, oldest first; only those opened before `before`, if given.

        It looks at a row of each episode. Raises NoEpisodeError.
        """
        query = sa.select(_E.id).where(*_conditions(choice)).limit(limit)
        with self._database.read() as connection:
            if before is not None:
                row = _row(connection, before)
                query = query.where(sa.tuple_(_E.opened_at, _E.id) < (row.opened_at, row.id))
            rows = connection.execute(query.order_by(_E.opened_at.desc(), _E.id.desc()))
            return [*rows.scalars()][::-1]

    def get_all(self, ids: Sequence[str]) -> list[Episode]:
        """Those of the episodes that there are, in this order."""
        with self._database.read() as connection:
            found = [_load(connection, name) for name in ids]
        return [episode for episode in found if episode is not None]

    def open(
        self,
        episodes: Sequence[Episode],
        size: int | None,
        keys: Mapping[str, str] | None = None,
        opener: str | None = None,
    ) -> list[Episode]:
        """Opens all of them or none.

        One that is there already stays as it is, but for its key. `size` is how many scorable
        episodes their group may have. `keys` has the API key of each by its id, of which the hash
        is kept; without one nobody calls by a key. `opener` is the sign of the key that opens them.
        Raises ConflictError if an id or a group stands for something else.
        """
        with self._database.write() as connection:
            opened: list[Episode] = []
            for episode in episodes:
                opened.append(self._open(connection, episode, size))
                key = (keys or {}).get(episode.id) or new_key()
                values = {"key_hash": key_hash(key), "opener": opener}
                ours = sa.update(t.episodes).where(_E.id == episode.id)
                connection.execute(ours.values(values))
            return opened

    def check_open(self, episode_id: str) -> None:
        """Raises NoEpisodeError, and ConflictError once the episode is closed."""
        with self._database.read() as connection:
            _open_row(connection, episode_id)

    def begin_call(self, episode_id: str) -> Left:
        """Counts a call of the model. Raises NoEpisodeError, ConflictError and BudgetError."""
        with self._database.cursor(write=True) as cursor:
            row = _opened(cursor.first(_CALLING, episode=episode_id), episode_id)
            past_s = self._database.now() - row.opened_at
            budgets = (
                ("max_calls", row.max_calls, row.calls),
                ("max_tokens", row.max_tokens, row.tokens),
                ("deadline_s", row.deadline_s, past_s),
            )
            for name, most, used in budgets:
                if most is not None and used >= most:
                    raise BudgetError(
                        f"episode {episode_id!r} may not call the model any more: it has used "
                        f"{used:.10g} of {name} = {most:.10g}; close it as truncated"
                    )
            cursor.run(_CALLED, episode=episode_id)
        return Left(
            None if row.max_tokens is None else row.max_tokens - row.tokens,
            None if row.deadline_s is None else row.deadline_s - past_s,
        )

    def turn_ids(self, episode_id: str) -> list[str]:
        """The turns of an episode; each one's position is its step."""
        query = sa.select(_T.id).where(_T.episode == episode_id).order_by(_T.step)
        with self._database.read() as connection:
            return list(connection.execute(query).scalars())

    def reward(self, rewards: Sequence[Reward]) -> None:
        """Keeps rewards of one episode: the last word counts per name and step.

        Raises NoEpisodeError, and ConflictError once the episode is closed.
        """
        with self._database.write() as connection:
            for reward in rewards:
                row = _row(connection, reward.episode)
                if row.state != EpisodeState.OPEN:
                    raise ConflictError(
                        f"episode {reward.episode!r} is closed as {row.status}: "
                        f"give the reward {reward.name!r} before you close it"
                    )
                same = (_R.episode == reward.episode, _R.name == reward.name)
                step = _R.turn.is_not_distinct_from(reward.turn)
                connection.execute(sa.delete(t.rewards).where(*same, step))
                connection.execute(
                    sa.insert(t.rewards).values(
                        episode=reward.episode,
                        turn=reward.turn,
                        name=reward.name,
                        kind=reward.kind.value,
                        value=reward.value,
                        source=reward.source,
                        at=self._database.now(),
                    )
                )

    def rewards(self, episode_id: str) -> list[Reward]:
        """The rewards of an episode, in the order in which they were given last."""
        query = sa.select(t.rewards).where(_R.episode == episode_id).order_by(_R.seq)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            Reward(row.episode, row.name, RewardKind(row.kind), row.value, row.turn, row.source)
            for row in rows
        ]

    def close(
        self,
        episode_id: str,
        status: EpisodeStatus,
        outcome: float | None,
        observation: str | None,
    ) -> Episode:
        """Closes an episode; the observation becomes the next state of its last turn.

        Without `outcome` it is what the outcome rewards say; an episode that never trains has none.
        A second close must say the same.
        Raises NoEpisodeError and ConflictError.
        """
        with self._database.write() as connection:
            row = _row(connection, episode_id)
            never = status in NEVER_TRAIN
            outcome = None if never else _one_outcome(connection, episode_id, outcome)
            if row.state != EpisodeState.OPEN:
                if (row.status, row.outcome) != (status, outcome):
                    raise ConflictError(
                        f"episode {episode_id!r} is closed as {row.status} with the outcome "
                        f"{row.outcome}: it cannot be closed as {status} with {outcome}"
                    )
            else:
                close_episode(connection, episode_id, status, outcome, self._database.now())
                if observation:
                    judge = not never and row.split == Split.TRAIN
                    _observe(connection, row, observation, judge=judge)
            found = _load(connection, episode_id)
            assert found is not None
            return found

    def _named(self, condition: sa.ColumnElement[bool]) -> Named | None:
        columns = _E.id, _E.lineage, _E.split, _E.sampling, _E.version, _E.opener
        query = sa.select(*columns).where(condition)
        with self._database.read() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        sampling = read_json(row.sampling.encode())
        held_out = row.split == Split.EVAL
        return Named(row.id, row.lineage, held_out, sampling, row.version, row.opener)

    def _open(self, connection: sa.Connection, episode: Episode, size: int | None) -> Episode:
        known = _load(connection, episode.id)
        if known is not None:
            for name in _ASKED:
                if getattr(known, name) != getattr(episode, name):
                    raise ConflictError(
                        f"episode {episode.id!r} is there with another {name}: "
                        "a retry of a task is an episode with an id of its own"
                    )
            return known
        taken = _T.session == episode.id, _T.client_session == episode.id
        for name in taken:
            if connection.execute(sa.select(_T.id).where(name).limit(1)).first():
                raise ConflictError(
                    f"episode {episode.id!r}: recorded turns have a session of this name; "
                    "choose another id, and open an episode before its first call"
                )
        now = self._database.now()
        if episode.group is not None:
            _join_group(connection, episode, size, now)
        connection.execute(
            sa.insert(t.episodes).values(
                id=episode.id,
                key_hash=key_hash(new_key()),
                lineage=episode.lineage,
                environment=episode.environment,
                task=texts.put(connection, episode.task.encode()),
                task_key=episode.task_key,
                group_id=episode.group,
                split=episode.split.value,
                seed=episode.seed,
                max_calls=episode.max_calls,
                max_tokens=episode.max_tokens,
                deadline_s=episode.deadline_s,
                version=episode.version,
                sampling=dump(dict(episode.sampling)),
                metadata=texts.put(connection, write_json(episode.metadata)),
                state=EpisodeState.OPEN.value,
                opened_at=now,
                calls=0,
                tokens=0,
            )
        )
        opened = _load(connection, episode.id)
        assert opened is not None
        return opened


def _conditions(choice: Choice) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if choice.lineages is not None:
        found.append(_E.lineage.in_(choice.lineages))
    if choice.environment is not None:
        found.append(_E.environment == choice.environment)
    if choice.group is not None:
        found.append(_E.group_id == choice.group)
    if choice.since is not None:
        found.append(_E.opened_at >= choice.since)
    if choice.outcome is not None:
        of = {"solved": _E.outcome >= 1.0, "failed": _E.outcome < 1.0}
        found.append(of.get(choice.outcome, _E.outcome.is_(None)))
    return found


def _row(connection: sa.Connection, episode_id: str) -> Row:
    row = connection.execute(sa.select(t.episodes).where(_E.id == episode_id)).first()
    if row is None:
        raise _missing(episode_id)
    return row


def _missing(episode_id: str) -> NoEpisodeError:
    return NoEpisodeError(f"there is no episode {episode_id!r}: open it first")


def _open_row(connection: sa.Connection, episode_id: str) -> Row:
    """The row of an episode that is open. Raises NoEpisodeError and ConflictError."""
    return _opened(_row(connection, episode_id), episode_id)


def _opened(row: Row | None, episode_id: str) -> Row:
    if row is None:
        raise _missing(episode_id)
    if row.state != EpisodeState.OPEN:
        raise ConflictError(
            f"episode {episode_id!r} is closed as {row.status}: "
            "open another one to try its task again"
        )
    return row


def _load(connection: sa.Connection, episode_id: str) -> Episode | None:
    row = connection.execute(sa.select(t.episodes).where(_E.id == episode_id)).first()
    if row is None:
        return None
    found = texts.get(connection, (row.task, row.metadata))
    return Episode(
        id=row.id,
        lineage=row.lineage,
        environment=row.environment,
        task=found[row.task].decode(),
        group=row.group_id,
        split=Split(row.split),
        seed=row.seed,
        max_calls=row.max_calls,
        max_tokens=row.max_tokens,
        deadline_s=row.deadline_s,
        version=row.version,
        sampling=read_json(row.sampling.encode()),
        metadata=read_json(found[row.metadata]),
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


def _join_group(connection: sa.Connection, episode: Episode, size: int | None, now: float) -> None:
    """Makes the episode's group, or checks that the episode fits into it."""
    g = t.groups.c
    asked = {"lineage": episode.lineage, "task_key": episode.task_key}
    asked |= {"split": episode.split.value}
    row = connection.execute(sa.select(t.groups).where(g.id == episode.group)).first()
    if row is None:
        values = {**asked, "id": episode.group, "size": size, "state": "open", "opened_at": now}
        connection.execute(sa.insert(t.groups).values(values))
        return
    known: Json = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]
    if size is not None and row.size is not None:
        asked["size"] = size  # pyright: ignore[reportArgumentType]
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
            connection.execute(sa.update(t.groups).where(g.id == row.id).values(size=size))
        return
    scorable = (_E.group_id == row.id, _E.state != EpisodeState.DROPPED)
    count = sa.select(sa.func.count()).select_from(t.episodes).where(*scorable)
    if connection.execute(count).scalar_one() >= row.size:
        raise ConflictError(f"group {row.id!r} has its {row.size} episodes: choose another group")


def _one_outcome(connection: sa.Connection, episode_id: str, said: float | None) -> float | None:
    """The outcome of an episode, of what its close and its rewards say."""
    query = sa.select(_R.name, _R.value).where(
        _R.episode == episode_id, _R.kind == RewardKind.OUTCOME.value
    )
    found = connection.execute(query).all()
    values = {row.value for row in found}
    if said is None and len(values) < 2:
        return next(iter(values), None)
    if said is None or (len(found) == 1 and said not in values):
        told = ", ".join(f"{row.name} = {row.value:g}" for row in found[:4])
        raise ConflictError(
            f"episode {episode_id!r} has two different outcomes: its rewards say {told}"
            + (": name one as outcome" if said is None else f", and its close says {said:g}")
        )
    return said


def close_episode(
    connection: sa.Connection,
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
    values = {"state": state.value, "status": status.value, "outcome": outcome}
    ours = sa.update(t.episodes).where(_E.id == episode_id)
    connection.execute(ours.values(**values, closed_at=now, reason=reason))
    if dropped:
        s = t.samples.c
        turns = sa.select(_T.id).where(_T.episode == episode_id)
        waiting = s.turn.in_(turns), s.state == SampleState.WAITING
        connection.execute(
            sa.update(t.samples)
            .where(*waiting)
            .values(state=SampleState.DROPPED.value, reason=reason)
        )
        work = sa.update(t.judgements).where(t.judgements.c.turn.in_(turns))
        connection.execute(work.values(state="done", lease_until=None, reason=reason))
        trainable = _T.episode == episode_id, _T.untrainable.is_(None)
        connection.execute(sa.update(t.turns).where(*trainable).values(untrainable=reason))


def _observe(connection: sa.Connection, episode: Row, observation: str, *, judge: bool) -> None:
    """Makes the observation the next state of the last turn, unless something followed it."""
    last = sa.select(_T.id, _T.continued).where(
        _T.episode == episode.id, _T.kind == TurnKind.MAIN.value, _T.replaced_by.is_(None)
    )
    turn = connection.execute(last.order_by(_T.step.desc()).limit(1)).first()
    if turn is None or turn.continued:
        return
    recording = Recording(cursor_of(connection), Known())
    state = NextState(turn.id, Source.ENVIRONMENT, observation, TRUST[Source.ENVIRONMENT])
    recording.add_next_states(turn.id, judge, [state])
    recording.close()
