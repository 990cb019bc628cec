"""Episodes of environments: opened, called, rewarded and closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import sqlalchemy as sa

from nextstate.episodes import (
    MOST_REWARDS,
    NEVER_TRAIN,
    Episode,
    EpisodeState,
    EpisodeStatus,
    Reward,
    Split,
)
from nextstate.errors import BudgetError, ConflictError, RecordError
from nextstate.keys import key_hash, new_key
from nextstate.records import Json, TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Cursor, Database, queries
from nextstate.store.episode_rows import (
    THIS,
    TURNS,
    Shown,
    close_episode,
    load,
    observe,
    one_outcome,
    open_one,
    opened,
    rewards_of,
    row_of,
    shown,
)
from nextstate.store.texts import cursor_of
from nextstate.store.workers import SILENT_S
from nextstate.wire import read_json

API_KEY = "ep-"
"""How an episode's own key begins."""
_E, _R, _T = t.episodes.c, t.rewards.c, t.turns.c
_NAMED_BY = {
    how: sa.select(
        *(_E.id, _E.lineage, _E.split, _E.sampling, _E.version, _E.opener, _E.max_tokens)
    ).where(which)
    for how, which in {"id": THIS, "key": _E.key_hash == sa.bindparam("episode")}.items()
}
_FORGET_REWARD = sa.delete(t.rewards).where(
    _R.episode == sa.bindparam("episode"),
    _R.name == sa.bindparam("name"),
    _R.turn.is_not_distinct_from(sa.bindparam("turn")),
)
_ADD_REWARD = sa.insert(t.rewards).values(
    {c.name: sa.bindparam(c.name) for c in _R if c.name != "seq"}
)
_REWARD_COUNT = sa.select(sa.func.count().label("count")).where(
    _R.episode == sa.bindparam("episode")
)
_KIND = sa.select(_T.kind).where(_T.id == sa.bindparam("turn"))
_CALLING = sa.select(
    *(_E.state, _E.status, _E.opened_at, _E.calls, _E.tokens),
    *(_E.max_calls, _E.max_tokens, _E.deadline_s),
).where(THIS)
_HELD = sa.select(sa.func.coalesce(sa.func.sum(t.holds.c.tokens), 0).label("tokens")).where(
    t.holds.c.episode == sa.bindparam("episode")
)
_HELD_ELSEWHERE = _HELD.join(t.workers, t.workers.c.id == t.holds.c.worker).where(
    t.holds.c.worker != sa.bindparam("worker"),
    # Silent beside the others, not beside the clock: while the store is locked, nobody can beat.
    t.workers.c.beat >= sa.select(sa.func.max(t.workers.c.beat)).scalar_subquery() - SILENT_S,
)
_HOLDS = sa.select(t.holds.c.tokens).where(t.holds.c.call == sa.bindparam("call"))
_HOLD = sa.insert(t.holds).values({c.name: sa.bindparam(c.name) for c in t.holds.c})
_CALLED = sa.update(t.episodes).where(THIS).values(calls=_E.calls + 1)


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
    max_tokens: int | None = None


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


class Hold(NamedTuple):
    """What a call wants to hold of its episode's tokens, so that other workers know of it."""

    call: str
    """An id of its own."""
    worker: str
    most: int | None
    """At most so many; None: all that is left."""


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
        return self._named("id", episode_id)

    def of_key(self, key: str) -> Named | None:
        """The episode that has this API key."""
        return self._named("key", key_hash(key))

    def get(self, episode_id: str) -> Episode | None:
        """One episode, or None."""
        with self._database.read() as connection:
            return load(cursor_of(connection), episode_id)

    def shown(self, episode_id: str) -> Shown:
        """One episode with what belongs to it. Raises NoEpisodeError."""
        with self._database.read() as connection:
            return shown(cursor_of(connection), episode_id)

    def ids(self, choice: Choice, before: str | None = None, limit: int | None = None) -> list[str]:
        """The newest chosen episodes, oldest first; only those opened before `before`, if given.

        It looks at a row of each episode. Raises NoEpisodeError.
        """
        query = sa.select(_E.id).where(*_conditions(choice)).limit(limit)
        with self._database.read() as connection:
            if before is not None:
                row = row_of(cursor_of(connection), before)
                query = query.where(sa.tuple_(_E.opened_at, _E.id) < (row.opened_at, row.id))
            rows = connection.execute(query.order_by(_E.opened_at.desc(), _E.id.desc()))
            return [*rows.scalars()][::-1]

    def get_all(self, ids: Sequence[str]) -> list[Episode]:
        """Those of the episodes that there are, in this order."""
        with self._database.read() as connection:
            cursor = cursor_of(connection)
            found = [load(cursor, name) for name in ids]
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
        with self._database.cursor(write=True) as cursor:
            now, found = self._database.now(), list[Episode]()
            for episode in episodes:
                key = key_hash((keys or {}).get(episode.id) or new_key())
                found.append(open_one(cursor, episode, size, key, opener, now))
            return found

    def check_open(self, episode_id: str) -> None:
        """Raises NoEpisodeError, and ConflictError once the episode is closed."""
        with self._database.cursor(write=False) as cursor:
            opened(cursor.first(_CALLING, episode=episode_id), episode_id)

    def begin_call(
        self, episode_id: str, replies: int = 1, held: int = 0, hold: Hold | None = None
    ) -> Left | None:
        """Counts a call of the model. Raises NoEpisodeError, ConflictError and BudgetError.

        None if other calls hold so many tokens that none is left for each of its replies: `held`
        by those of this worker; with a `hold` of its own, also those of the others that live.
        Again with the same `hold`, it counts nothing again.
        """
        with self._database.cursor(write=True) as cursor:
            row = opened(cursor.first(_CALLING, episode=episode_id), episode_id)
            past_s = self._database.now() - row.opened_at
            seconds = None if row.deadline_s is None else row.deadline_s - past_s
            if hold is not None and (kept := cursor.first(_HOLDS, call=hold.call)) is not None:
                return Left(kept.tokens, seconds)
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
            tokens = None if row.max_tokens is None else row.max_tokens - row.tokens
            if tokens is not None and tokens < replies:
                raise BudgetError(
                    f"episode {episode_id!r} has {tokens} of its max_tokens = {row.max_tokens} "
                    f"left, and the request asks for {replies} replies: ask for fewer"
                )
            if tokens is not None:
                if hold is not None:
                    held += self._held_elsewhere(cursor, episode_id, hold.worker)
                if tokens - held < replies:
                    return None
                if hold is not None:
                    most = (tokens - held) // replies * replies
                    most = most if hold.most is None else min(most, hold.most)
                    values = {"call": hold.call, "worker": hold.worker, "tokens": most}
                    cursor.send(_HOLD, episode=episode_id, **values)
            cursor.run(_CALLED, episode=episode_id)
        return Left(None if tokens is None else tokens - held, seconds)

    def free(self, calls: Sequence[str]) -> None:
        """Ends what calls hold."""
        with self._database.write() as connection:
            connection.execute(sa.delete(t.holds).where(t.holds.c.call.in_(calls)))

    def turn_ids(self, episode_id: str) -> list[str]:
        """The turns of an episode; each one's position is its step."""
        with self._database.cursor(write=False) as cursor:
            return [row.id for row in cursor.all(TURNS, episode=episode_id)]

    def reward(self, rewards: Sequence[Reward]) -> None:
        """Keeps rewards of one episode: the last word counts per name and step.

        Raises NoEpisodeError, ConflictError once the episode is closed, and RecordError for a turn
        that is no step and for more than `MOST_REWARDS` of an episode.
        """
        with self._database.cursor(write=True) as cursor:
            for reward in rewards:
                if reward.turn is not None:
                    _check_step(cursor, reward.turn)
                row = row_of(cursor, reward.episode)
                if row.state != EpisodeState.OPEN:
                    raise ConflictError(
                        f"episode {reward.episode!r} is closed as {row.status}: "
                        f"give the reward {reward.name!r} before you close it"
                    )
                same = {"episode": reward.episode, "name": reward.name, "turn": reward.turn}
                cursor.send(_FORGET_REWARD, **same)
                cursor.send(
                    _ADD_REWARD,
                    **same,
                    kind=reward.kind.value,
                    value=reward.value,
                    source=reward.source,
                    at=self._database.now(),
                )
            for name in {reward.episode for reward in rewards}:
                row = cursor.first(_REWARD_COUNT, episode=name)
                if row is not None and row.count > MOST_REWARDS:
                    raise RecordError(
                        f"episode {name!r} would have {row.count} rewards: expected at most "
                        f"{MOST_REWARDS}; give one for each step and name"
                    )

    def rewards(self, episode_id: str) -> list[Reward]:
        """The rewards of an episode, in the order in which they were given last."""
        with self._database.cursor(write=False) as cursor:
            return rewards_of(cursor, episode_id)

    def close(
        self,
        episode_id: str,
        status: EpisodeStatus,
        outcome: float | None,
        observation: str | None,
    ) -> Shown:
        """Closes an episode; the observation becomes the next state of its last turn.

        Without `outcome` it is what the outcome rewards say; an episode that never trains has none.
        A second close must say the same.
        Raises NoEpisodeError and ConflictError.
        """
        with self._database.cursor(write=True) as cursor:
            row = row_of(cursor, episode_id)
            never = status in NEVER_TRAIN
            outcome = None if never else one_outcome(cursor, episode_id, outcome)
            if row.state != EpisodeState.OPEN:
                if (row.status, row.outcome) != (status, outcome):
                    raise ConflictError(
                        f"episode {episode_id!r} is closed as {row.status} with the outcome "
                        f"{row.outcome}: it cannot be closed as {status} with {outcome}"
                    )
            else:
                close_episode(cursor, episode_id, status, outcome, self._database.now())
                if observation:
                    judge = not never and row.split == Split.TRAIN
                    observe(cursor, row, observation, judge=judge)
            return shown(cursor, episode_id)

    def _held_elsewhere(self, cursor: Cursor, episode_id: str, worker: str) -> int:
        row = cursor.first(_HELD_ELSEWHERE, episode=episode_id, worker=worker)
        return 0 if row is None else int(row.tokens)

    def _named(self, how: str, what: str) -> Named | None:
        with self._database.cursor(write=False) as cursor:
            row = cursor.first(_NAMED_BY[how], episode=what)
        if row is None:
            return None
        sampling = read_json(row.sampling.encode())
        held_out = row.split == Split.EVAL
        return Named(
            *(row.id, row.lineage, held_out, sampling, row.version, row.opener, row.max_tokens)
        )


def _check_step(cursor: Cursor, turn: str) -> None:
    row = cursor.first(_KIND, turn=turn)
    if row is not None and row.kind != TurnKind.MAIN:
        raise RecordError(
            f"turn {turn!r} is a {row.kind} turn, such as one for a title: it is no step that "
            "learns; name a step by x-nextstate-turn, the header of its reply"
        )


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
