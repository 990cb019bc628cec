"""Groups of episodes on their way to advantages: which wait, what was scored, and the settling.

An episode without a group is one alone, with the same rules. The judge stage decides when a group
is settled and what its steps are worth (`judge/groups.py`); here it is written, all or nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from nextstate.episodes import FAMILY, EpisodeState, EpisodeStatus, RewardKind, Split
from nextstate.records import SampleState, TurnKind
from nextstate.store import schema as t
from nextstate.store.database import Database, queries
from nextstate.store.episode_rows import close_episode
from nextstate.store.texts import Row, cursor_of
from nextstate.wire import read_json

_E, _G, _R, _T = t.episodes.c, t.groups.c, t.rewards.c, t.turns.c
_MOST_EARLIER = 1000
_AT_ONCE = 500
"""Steps in one statement."""
_UNSETTLED = (SampleState.WAITING, SampleState.DROPPED)
"""What a sample is before: dropped if its turn cannot train."""
_LEFT_OPEN = "it was still open when its group's deadline had passed"
_NO_OUTCOME = "the episode was closed without an outcome"
_TEACHES_NOTHING = "advantage 0 without a hinted prompt teaches nothing"
_NO_VERSION = "served by a model that is not a version of this lineage"


@dataclass(frozen=True, slots=True)
class Member:
    """An episode of a group that is not settled."""

    id: str
    state: EpisodeState
    opened_at: float
    deadline_s: float | None
    closed_at: float | None


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A group whose steps have no advantages yet, or an episode without a group."""

    name: str
    """Of the group, or of the episode."""
    alone: bool
    """Whether it is an episode without a group."""
    lineage: str
    environment: str
    family: str | None
    """That of its task; None: it was opened before families were kept."""
    size: int | None
    """How many scorable episodes it shall have; None if nobody said."""
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """A step of a closed episode."""

    turn: str
    process: float | None
    """The mean of the rewards that were declared for it, else of the judge's votes; None: neither.
    What a person said of it takes the place of votes."""
    hinted: bool
    """Whether it can be distilled."""


@dataclass(frozen=True, slots=True)
class ScoredEpisode:
    """A closed episode of a group."""

    episode: str
    outcome: float | None
    steps: tuple[ScoredStep, ...]
    """In their order, without side turns and without those that a retry replaced."""
    versions: tuple[int, int] | None = None
    """The oldest and the newest policy version that served it; None: none did."""


@dataclass(frozen=True, slots=True)
class SettledEpisode:
    """An episode that is settled."""

    group: str
    """The episode's own name if it was alone."""
    outcome: float
    process: float | None
    """The mean process reward of its judged steps; None: none was judged."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a group's steps are worth: each turn is in exactly one of the two."""

    advantages: Mapping[str, float]
    dropped: Mapping[str, str]
    """Why a step must not train."""


Decide = Callable[
    [Unsettled, Sequence[ScoredEpisode], Sequence[SettledEpisode], Sequence[float]],
    Settlement | None,
]
"""From a group, its closed episodes, earlier episodes of its environment and, for one episode
alone, the last FAMILY outcomes of its family, both the newest last, to what becomes of it; None: it
must wait."""


@queries
class Groups:
    """Queries for settling groups of the split `train`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def unsettled(self) -> list[Unsettled]:
        """The groups that wait, and the episodes without a group that do."""
        with self._database.cursor(write=False) as cursor:
            return _groups_of(cursor.all(_WAIT))

    def unjudged(self, group: Unsettled) -> int:
        """How many steps of its closed episodes the judge still works on."""
        j = t.judgements.c
        turns = sa.select(_T.id).where(_T.episode.in_(_closed(group)))
        query = sa.select(sa.func.count()).where(j.turn.in_(turns), j.state != "done")
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def earlier(self, lineage: str, environment: str) -> list[SettledEpisode]:
        """The newest settled episodes of an environment, the newest last."""
        with self._database.read() as connection:
            return _earlier(connection, lineage, environment)

    def environments(self) -> list[tuple[str, str]]:
        """Every (lineage, environment) that has settled episodes."""
        query = sa.select(_E.lineage, _E.environment).where(_E.settled_at.is_not(None)).distinct()
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(_E.lineage, _E.environment)).all()
        return [(row.lineage, row.environment) for row in rows]

    def last(self, beginning: str, digits: int) -> str | None:
        """The last group by name of those whose names go on after that with so many digits."""
        length = sa.func.length(_G.id) == len(beginning) + digits
        query = sa.select(_G.id).where(*_begins(_G.id, beginning), length)
        with self._database.read() as connection:
            names = connection.execute(query.order_by(_G.id.desc())).scalars()
            return next((name for name in names if name[len(beginning) :].isdecimal()), None)

    def unfinished(self, beginning: str) -> list[str]:
        """The groups with episodes that are open, of those whose names begin so, in order."""
        still = _E.state == EpisodeState.OPEN.value
        query = sa.select(_E.group_id).where(*_begins(_E.group_id, beginning), still).distinct()
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(_E.group_id)).scalars())

    def open_members(self, group: str) -> list[str]:
        """The episodes of a group that are open."""
        query = sa.select(_E.id).where(_E.group_id == group, _E.state == EpisodeState.OPEN.value)
        with self._database.read() as connection:
            return list(connection.execute(query.order_by(_E.id)).scalars())

    def attempts(self, beginning: str) -> list[tuple[str, EpisodeState, float | None]]:
        """(group, state, outcome) of every episode of the groups whose names begin so."""
        query = sa.select(_E.group_id, _E.state, _E.outcome).where(*_begins(_E.group_id, beginning))
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [(row.group_id, EpisodeState(row.state), row.outcome) for row in rows]

    def advantages(self, episode_id: str) -> dict[str, tuple[str, float | None, str | None]]:
        """(state of the sample, its advantage, why it was dropped) by turn of an episode."""
        s = t.samples.c
        query = sa.select(s.turn, s.state, s.advantage, s.reason).join(t.turns, _T.id == s.turn)
        with self._database.read() as connection:
            rows = connection.execute(query.where(_T.episode == episode_id)).all()
        return {row.turn: (row.state, row.advantage, row.reason) for row in rows}

    def settle(self, group: Unsettled, decide: Decide) -> bool:
        """Settles a group in one transaction; False if it is settled already or must wait.

        Its steps become samples with an advantage, ready or dropped. An episode that is still open
        is dropped, and so is one without an outcome.
        """
        with self._database.write() as connection:
            known = _load(connection, group)
            if known is None:
                return False
            closed = _scored(connection, _closed(known))
            earlier = _earlier(connection, known.lineage, known.environment)
            alone = sum(episode.outcome is not None for episode in closed) == 1
            outcomes = _outcomes(connection, known) if alone else []
            settlement = decide(known, closed, earlier, outcomes)
            if settlement is None:
                return False
            now = self._database.now()
            cursor = cursor_of(connection)
            for member in known.members:
                if member.state is EpisodeState.OPEN:
                    close_episode(cursor, member.id, EpisodeStatus.ABORTED, None, now, _LEFT_OPEN)
            for episode in closed:
                _settle_episode(connection, episode, now)
            steps = [step for episode in closed for step in episode.steps]
            _settle_steps(connection, steps, settlement)
            if not known.alone:
                done = sa.update(t.groups).where(_G.id == known.name)
                connection.execute(done.values(state="settled"))
        return True


_COLUMNS = (
    *(_E.id, _E.group_id, _E.lineage, _E.environment, _E.state),
    *(_E.opened_at, _E.deadline_s, _E.closed_at, _E.family),
)
_MEMBER = sa.select(*_COLUMNS, _G.size).join(t.groups, _G.id == _E.group_id)
_ALONE = sa.select(*_COLUMNS, sa.literal_column("1", sa.Integer).label("size"))
_ALL_WAITING = sa.union_all(
    _MEMBER.where(_G.state == "open", _G.split == Split.TRAIN.value),
    _ALONE.where(
        sa.or_(_E.state == EpisodeState.OPEN.value, _E.state == EpisodeState.CLOSED.value),
        _E.split == Split.TRAIN.value,
        _E.group_id.is_(None),
    ),
).subquery()
_WAIT = sa.select(_ALL_WAITING)


def _groups_of(rows: Sequence[Row]) -> list[Unsettled]:
    members: defaultdict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        members[row.group_id or row.id, row.group_id is None].append(row)
    return [
        Unsettled(
            name=name,
            alone=alone,
            lineage=some[0].lineage,
            environment=some[0].environment,
            family=some[0].family,
            size=some[0].size,
            members=tuple(
                Member(
                    row.id, EpisodeState(row.state), row.opened_at, row.deadline_s, row.closed_at
                )
                for row in some
            ),
        )
        for (name, alone), some in members.items()
    ]


def _begins(name: sa.ColumnElement[Any], beginning: str) -> tuple[sa.ColumnElement[bool], ...]:
    """That a name begins so, as a range that an index serves: `~` is the last of its letters."""
    return name >= beginning, name < f"{beginning}\x7f"


def _load(connection: sa.Connection, group: Unsettled) -> Unsettled | None:
    """The group as it is now; None if it is settled."""
    states = EpisodeState.OPEN.value, EpisodeState.CLOSED.value
    if group.alone:
        query = _ALONE.where(_E.id == group.name, _E.state.in_(states))
    else:
        query = _MEMBER.where(_G.id == group.name, _G.state == "open")
    return next(iter(_groups_of(connection.execute(query).all())), None)


def _closed(group: Unsettled) -> list[str]:
    return [member.id for member in group.members if member.state is EpisodeState.CLOSED]


def _scored(connection: sa.Connection, episodes: Sequence[str]) -> list[ScoredEpisode]:
    """The episodes with what is known of their steps."""
    columns = _E.id, _E.outcome, _E.version_min, _E.version_max
    outcomes = sa.select(*columns).where(_E.id.in_(episodes)).order_by(_E.id)
    declared: defaultdict[str, list[float]] = defaultdict(list)
    of_steps = _R.episode.in_(episodes), _R.kind == RewardKind.PROCESS.value
    for row in connection.execute(sa.select(_R.turn, _R.value).where(*of_steps)):
        declared[row.turn].append(row.value)
    v = t.verdicts.c
    hinted = v.hinted_prompt_ids.is_not(None).label("hinted")
    query = (
        sa.select(_T.id, _T.episode, v.votes, v.score, hinted)
        .outerjoin(t.verdicts, v.turn == _T.id)
        .where(_T.episode.in_(episodes), _T.kind == TurnKind.MAIN.value, _T.replaced_by.is_(None))
        .order_by(_T.episode, _T.step)
    )
    steps: defaultdict[str, list[ScoredStep]] = defaultdict(list)
    for row in connection.execute(query):
        told = declared.get(row.id) or _votes(row)
        process = math.fsum(told) / len(told) if told else None
        steps[row.episode].append(ScoredStep(row.id, process, bool(row.hinted)))
    return [
        ScoredEpisode(
            row.id,
            row.outcome,
            tuple(steps[row.id]),
            None if row.version_min is None else (row.version_min, row.version_max),
        )
        for row in connection.execute(outcomes)
    ]


def _votes(row: Row) -> list[float]:
    """What was voted on a turn; a person's score counts as one vote."""
    if row.score is None:
        return []
    votes: list[int] = read_json(row.votes.encode())
    return [float(vote) for vote in votes or [row.score]]


def _earlier(connection: sa.Connection, lineage: str, environment: str) -> list[SettledEpisode]:
    query = _settled(lineage, environment).limit(_MOST_EARLIER)
    return [
        SettledEpisode(row.group_id or row.id, row.outcome, row.process)
        for row in reversed(connection.execute(query).all())
    ]


def _outcomes(connection: sa.Connection, group: Unsettled) -> list[float]:
    """The last ones of the family of a group's task, the newest last."""
    query = _settled(group.lineage, group.environment).limit(FAMILY)
    rows = connection.execute(query.where(_E.family.is_not_distinct_from(group.family))).all()
    return [row.outcome for row in reversed(rows)]


def _settled(lineage: str, environment: str) -> sa.Select[*tuple[Any, ...]]:
    """The settled episodes of an environment, the newest first."""
    return (
        sa.select(_E.id, _E.group_id, _E.outcome, _E.process)
        .where(_E.settled_at.is_not(None), _E.lineage == lineage, _E.environment == environment)
        .order_by(_E.settled_at.desc(), _E.id.desc())
    )


def _settle_episode(connection: sa.Connection, episode: ScoredEpisode, now: float) -> None:
    ours = sa.update(t.episodes).where(_E.id == episode.episode)
    if episode.outcome is None:
        state = EpisodeState.DROPPED.value
        connection.execute(ours.values(state=state, reason=_NO_OUTCOME))
        return
    judged = [step.process for step in episode.steps if step.process is not None]
    process = math.fsum(judged) / len(judged) if judged else None
    state = EpisodeState.SETTLED.value
    connection.execute(ours.values(state=state, process=process, settled_at=now))


def _settle_steps(
    connection: sa.Connection, steps: Sequence[ScoredStep], settlement: Settlement
) -> None:
    """Makes the steps' samples, or gives those that wait their advantages.

    In few statements: while they run, no turn is recorded. But databases take only so many values.
    """
    s = t.samples.c
    columns = _T.id, _T.seq, _T.lineage, _T.policy_version, _T.untrainable
    for at in range(0, len(steps), _AT_ONCE):
        some = steps[at : at + _AT_ONCE]
        turns = [step.turn for step in some]
        rows = connection.execute(sa.select(*columns).where(_T.id.in_(turns)))
        of_turn = {row.id: row for row in rows}
        found = [_sample(of_turn[step.turn], step, settlement) for step in some]
        connection.execute(sa.delete(t.samples).where(s.turn.in_(turns), s.state.in_(_UNSETTLED)))
        connection.execute(sa.insert(t.samples), found)


def _sample(turn: Row, step: ScoredStep, settlement: Settlement) -> dict[str, Any]:
    """The columns of a step's sample."""
    advantage, reason = settlement.advantages.get(step.turn), settlement.dropped.get(step.turn)
    if turn.untrainable is not None or turn.policy_version is None:
        advantage, reason = None, turn.untrainable or _NO_VERSION
    elif reason is None and not advantage and not step.hinted:
        reason = _TEACHES_NOTHING
    return {
        "turn": step.turn,
        "seq": turn.seq,
        "lineage": turn.lineage,
        "state": SampleState.READY if reason is None else SampleState.DROPPED,
        "policy_version": turn.policy_version,
        "score": 0 if not advantage else int(math.copysign(1, advantage)),
        "hinted": step.hinted,
        "reason": reason,
        "screened": None,
        "advantage": advantage,
    }
