"""Forgetting: which records hold what a person wants gone, and taking all of it out of the store.

A turn's words are in more records than its own: the turns that continue it send them again, and the
turn before it has them as its next state, from which a judge made a score and a hint. So these go
with it, and so does the whole episode of a step. A version that trained on any of them, and every
version trained from that, must be withdrawn first (`withdraw`). Which did is in the ledger: samples
forget it when they are given back, and go with their turns by retention. What is deleted is gone
from the file only after `Database.compact`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
import sqlalchemy as sa

from nextstate.records import FEEDBACK, SampleState, VersionState
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.database import Database, queries
from nextstate.store.ledger import SOMEBODY, Kind, append, append_states
from nextstate.store.settling import verdict_texts
from nextstate.store.texts import Row
from nextstate.store.turns import turn_texts
from nextstate.store.vault import open_column, vault_of
from nextstate.store.versions import WITHDRAWN
from nextstate.wire import write_json

_PER_STATEMENT = 500
_ROWS_AT_ONCE = 1000
_T, _S, _V, _J, _E = t.turns.c, t.samples.c, t.verdicts.c, t.judgements.c, t.episodes.c
_Name = TypeVar("_Name", str, bytes)
_ESCAPED = re.compile(r'\\+(?:u([0-9a-fA-F]{4})|(["/bfnrt]))?')
_LETTERS = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_DROPPED = "a person let us forget it"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall be forgotten: everything that meets one of the conditions."""

    turns: Collection[str] = ()
    """Ids of turns. Of one that retention took, the versions that learned from it still go."""
    sessions: Collection[str] = ()
    """Names of sessions: ours or the client's own."""
    before: float | None = None
    """Unix time in seconds: turns whose requests arrived earlier. Later turns of the same
    conversations stay, with what they repeat of it."""
    matching: str | None = None
    """A text, which anything that was said, replied, hinted or remarked contains. Case does not
    count."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What forgetting takes."""

    turns: tuple[str, ...]
    """Turns that go, oldest first."""
    episodes: tuple[str, ...]
    """Episodes that go."""
    touched: tuple[str, ...]
    """Turns that stay, and lose what followed them or what a judge made of it."""
    versions: Mapping[str, tuple[int, ...]]
    """The versions of each lineage that must be withdrawn first."""
    in_training: int
    """How many of the turns an update uses at this moment: nothing can be forgotten until it ends.
    """
    learned: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """All versions of each lineage that learned from them, those that were withdrawn too."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to forget."""
        return not (self.turns or self.episodes or self.versions)


@queries
class Forgetting:
    """Queries that delete."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def plan(self, wanted: Wanted) -> Plan:
        """What forgetting takes; it reads every turn, and for `matching` every text."""
        with self._database.read() as connection:
            return _plan(connection, wanted)

    def withdraw(self, plan: Plan) -> bool:
        """Takes the plan's versions out of the chain for good, except where one of them serves.

        Their other samples are ready to train again. False if one serves: nothing of its lineage is
        changed.
        """
        v, done = t.versions.c, True
        gone = {*plan.turns, *plan.touched}
        with self._database.write() as connection:
            for lineage, numbers in plan.versions.items():
                ours = v.lineage == lineage, v.number.in_(numbers)
                serving = sa.select(v.number).where(*ours, v.state == VersionState.SERVING)
                if connection.execute(serving).first() is not None:
                    done = False
                    continue
                values = {"state": VersionState.REJECTED, "path": None, "reason": WITHDRAWN}
                connection.execute(sa.update(t.versions).where(*ours).values(**values))
                now, state = self._database.now(), VersionState.REJECTED
                append_states(connection, now, lineage, numbers, state, WITHDRAWN)
                trained = sa.select(_S.turn).where(
                    _S.lineage == lineage,
                    _S.trained_in.in_(numbers),
                    _S.state == SampleState.TRAINED,
                )
                turns = connection.execute(trained).scalars().all()
                _set_samples(connection, gone.intersection(turns), SampleState.DROPPED, _DROPPED)
                _set_samples(connection, set(turns) - gone, SampleState.READY, None)
        return done

    def forget(self, wanted: Wanted, by: str = SOMEBODY) -> Plan:
        """Deletes everything that is wanted, if no version must be withdrawn first.

        The ledger gets the ids of turns, and `by`, who wanted it. (Clients choose episodes' ids.)
        Returns what it took, or what it would take: nothing is changed if the plan has `versions`
        or turns `in_training`.
        """
        with self._database.write() as connection:
            plan = _plan(connection, wanted)
            if not (plan.versions or plan.in_training):
                _delete(connection, plan)
                if plan.turns or plan.episodes:
                    gone = {"turns": plan.turns, "episodes": len(plan.episodes), "by": by}
                    append(connection, self._database.now(), Kind.FORGOTTEN, gone)
        return plan

    def unknown(self) -> dict[str, list[int]]:
        """The versions that are kept and learned from turns that are in the store no more.

        By their lineages: what these turns held cannot be looked for.
        """
        v, found = t.versions.c, dict[str, list[int]]()
        with self._database.read() as connection:
            there = {*connection.execute(sa.select(_T.id)).scalars()}
            kept = sa.or_(v.state != VersionState.REJECTED, v.path.is_not(None))
            query = sa.select(v.lineage, v.number).where(kept)
            versions = {(row.lineage, row.number) for row in connection.execute(query)}
            for lineage, number, turns in _trainings(connection):
                if (lineage, number) in versions and not turns <= there:
                    found.setdefault(lineage, []).append(number)
        return found


def _plan(connection: sa.Connection, wanted: Wanted) -> Plan:
    found, alone = _chosen(connection, wanted)
    turns, episodes = _with_the_rest(connection, found, wanted.before is None)
    episodes |= alone
    touched = _touched(connection, turns)
    samples = [
        row
        for some in _parts([*turns, *touched])
        for row in connection.execute(
            sa.select(_S.lineage, _S.state, _S.trained_in).where(_S.turn.in_(some))
        )
    ]
    used = {(row.lineage, row.trained_in) for row in samples if row.trained_in is not None}
    gone = {*turns, *touched, *wanted.turns}
    used |= {
        (lineage, number)
        for lineage, number, of in _trainings(connection)
        if not gone.isdisjoint(of)
    }
    learned, versions = _descendants(connection, used)
    in_training = sum(row.state == SampleState.LEASED for row in samples)
    listed = tuple(sorted(episodes))
    return Plan(tuple(turns), listed, tuple(touched), versions, in_training, learned)


def _trainings(connection: sa.Connection) -> Iterator[tuple[str, int, set[str]]]:
    """(lineage, number, turns that it trained on) of every version, as the ledger tells."""
    c = t.ledger.c
    query = sa.select(c.content).where(c.kind == Kind.VERSION).order_by(c.seq)
    for row in _stream(connection, query):
        told = orjson.loads(row.content)
        yield told["lineage"], told["number"], {one[0] for one in told["turns"]}


def _chosen(connection: sa.Connection, wanted: Wanted) -> tuple[set[str], set[str]]:
    """The (turns, episodes without a turn) that meet a condition themselves."""
    found, episodes = set[str](), set[str]()
    for some in _parts(wanted.turns):
        found |= {*connection.execute(sa.select(_T.id).where(_T.id.in_(some))).scalars()}
    for name in wanted.sessions:
        for column in (_T.session, _T.client_session):
            found |= {*connection.execute(sa.select(_T.id).where(column == name)).scalars()}
        episodes |= {*connection.execute(sa.select(_E.id).where(_E.id == name)).scalars()}
    if wanted.before is not None:
        query = sa.select(_T.id).where(_T.started_at < wanted.before)
        found |= {*connection.execute(query).scalars()}
        query = sa.select(_E.id).where(_E.opened_at < wanted.before)
        episodes |= {*connection.execute(query).scalars()}
    if wanted.matching is not None:
        matching = _matching(connection, wanted.matching)
        found, episodes = found | matching[0], episodes | matching[1]
    for some in _parts(episodes):  # the others go with their turns
        query = sa.select(_T.episode).where(_T.episode.in_(some))
        episodes -= {*connection.execute(query).scalars()}
    return found, episodes


def _matching(connection: sa.Connection, text: str) -> tuple[set[str], set[str]]:
    """The turns with a record that holds the text, and the episodes."""
    wanted, plain = _compared(text), text.casefold()
    # A backslash that a person wrote is no escape: as it is, and as the JSON of a message has it.
    forms = {plain, write_json(plain).decode()[1:-1]}

    def has(value: str | None) -> bool:
        value = value or ""
        folded = value.casefold()
        return any(form in folded for form in forms) or wanted in _compared(value)

    keys = {key for key, stored in _all_texts(connection) if has(stored.decode(errors="replace"))}
    found, vault = set[str](), vault_of(connection.dialect)
    columns = (_T.id, _T.episode, _T.session, _T.client_session, _T.client_model, _T.sampling)
    texts_of = (_T.messages, _T.tools, _T.rest, _T.reply, _T.prompt_ids)
    for row in _stream(connection, sa.select(*columns, *texts_of)):
        sampling = open_column(vault, row.id, "sampling", row.sampling)
        if turn_texts(row) & keys or any(map(has, (*row[2:5], sampling))):
            found.add(row.id)
    n = t.next_states.c
    for row in _stream(connection, sa.select(n.turn, n.text)):
        found |= {row.turn} if row.text in keys else set()
    for said in (t.feedback.c, t.reviews.c):
        for row in _stream(connection, sa.select(said.turn, said.hint, said.comment)):
            found |= {row.turn} if {row.hint, row.comment} & keys else set()
    for row in _stream(connection, sa.select(t.verdicts)):
        found |= {row.turn} if verdict_texts(row) & keys or has(row.votes) else set()
    columns = (_E.task, _E.metadata, _E.id, _E.group_id, _E.sampling)
    episodes = {
        row.id
        for row in _stream(connection, sa.select(*columns))
        if {row.task, row.metadata} & keys or any(map(has, row[2:]))
    }
    r = t.rewards.c
    for row in _stream(connection, sa.select(r.episode, r.name, r.source)):
        episodes |= {row.episode} if any(map(has, row[1:])) else set()
    for some in _parts(episodes):
        found |= {*connection.execute(sa.select(_T.id).where(_T.episode.in_(some))).scalars()}
    return found, episodes


def _compared(text: str) -> str:
    """A text as it is compared: without case, and without what JSON escapes, however often.

    The arguments of a call are JSON within a message's JSON, and many clients escape `ü` there.
    """
    if "\\" in text:
        text = _ESCAPED.sub(_meant, text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _meant(escaped: re.Match[str]) -> str:
    code, letter = escaped.groups()
    if code is not None:
        return chr(int(code, 16))
    return _LETTERS.get(letter, letter) if letter else "\\"


def _with_the_rest(
    connection: sa.Connection, chosen: Collection[str], continuations: bool
) -> tuple[list[str], set[str]]:
    """(the turns that go, oldest first; the episodes that go).

    With a turn go the turns of its episode, a request that it was sent again as, and, with
    `continuations`, those that continue it.
    """
    found, episodes = set(chosen), set[str]()
    seqs = (sa.select(sa.func.min(_T.seq)).where(_T.id.in_(some)) for some in _parts(chosen))
    known = [seq for query in seqs if (seq := connection.execute(query).scalar()) is not None]
    first = min(known, default=0)
    query = sa.select(_T.seq, _T.id, _T.parent, _T.replaced_by, _T.episode).order_by(_T.seq)
    while True:  # a retry comes after what it replaces, and an episode's first step before others
        order: list[tuple[int, str]] = []
        passed: list[tuple[str | None, str | None]] = []
        maybe = sa.or_(_T.seq >= first, _T.replaced_by.is_not(None), _T.episode.is_not(None))
        for seq, turn_id, parent, retry, episode in _stream(connection, query.where(maybe)):
            if (
                turn_id in found
                or (continuations and parent in found)
                or retry in found
                or episode in episodes
            ):
                found.add(turn_id)
                order.append((seq, turn_id))
                if retry is not None:
                    found.add(retry)
                if episode is not None:
                    episodes.add(episode)
            elif retry is not None or episode is not None:
                passed.append((retry, episode))
        lowest = order[0][0] if order else first
        again = any(retry in found or episode in episodes for retry, episode in passed)
        if lowest >= first and not again:
            return [turn_id for _, turn_id in order], episodes
        first = min(first, lowest)


def _touched(connection: sa.Connection, turns: Sequence[str]) -> list[str]:
    """The turns that stay and were followed by one that goes, or judged by what followed."""
    gone = set(turns)
    found: set[str] = set()
    for some in _parts(turns):
        parents = sa.select(_T.parent).where(_T.id.in_(some), _T.parent.is_not(None))
        found |= {*connection.execute(parents).scalars()}
    found -= gone
    ends = sa.select(_J.turn, _J.task_end).where(_J.task_end.is_not(None))
    judged = {row.turn for row in _stream(connection, ends) if row.task_end in found | gone}
    return sorted((found | judged) - gone)


def _descendants(
    connection: sa.Connection, used: Collection[tuple[str, int]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """These versions and those trained from them, and which must still be withdrawn.

    By their lineages, oldest first.
    """
    v = t.versions.c
    learned, found = dict[str, tuple[int, ...]](), dict[str, tuple[int, ...]]()
    for lineage in sorted({lineage for lineage, _ in used}):
        query = sa.select(v.number, v.parent, v.state, v.path).where(v.lineage == lineage)
        tainted = {number for name, number in used if name == lineage}
        wanted: list[int] = []
        for row in connection.execute(query.order_by(v.number)):
            if row.number in tainted or row.parent in tainted:
                tainted.add(row.number)
                if row.state != VersionState.REJECTED or row.path is not None:
                    wanted.append(row.number)
        learned[lineage] = tuple(sorted(tainted))
        if wanted:
            found[lineage] = tuple(wanted)
    return learned, found


def _set_samples(
    connection: sa.Connection, turns: Collection[str], state: SampleState, reason: str | None
) -> None:
    values: dict[str, Any] = {"state": state, "reason": reason, "batch": None, "screened": None}
    if state is SampleState.READY:
        values["trained_in"] = None
    for some in _parts(turns):
        connection.execute(sa.update(t.samples).where(_S.turn.in_(some)).values(**values))


def _delete(connection: sa.Connection, plan: Plan) -> None:
    gone = set(plan.turns)
    followed = set[str]()
    staying: dict[str, list[str]] = defaultdict(list)
    for row in _stream(connection, sa.select(_T.id, _T.parent).where(_T.parent.is_not(None))):
        if row.id in gone:
            followed.add(row.parent)
        elif row.parent in gone:
            staying[row.parent].append(row.id)
    released = set[bytes]()
    for turn_id in plan.touched:
        released |= _unfollow(connection, turn_id, turn_id in followed)
    for turn_id in reversed(plan.turns):  # what continues a turn first: it counts fewer texts
        released |= delete_turn(connection, turn_id, staying[turn_id])
    for some in _parts(plan.episodes):
        released |= delete_episodes(connection, some)
    unbase(connection, released)


def delete_turn(connection: sa.Connection, turn_id: str, staying: Sequence[str]) -> set[bytes]:
    """Deletes a turn with all that is said of it; returns the texts that it used.

    The turns that stay and continue it count from now on the texts that it counted for them.
    """
    row = connection.execute(sa.select(t.turns).where(_T.id == turn_id)).one()
    own, every = _own_texts(connection, row), turn_texts(row)
    for child_id in staying:
        child = connection.execute(sa.select(t.turns).where(_T.id == child_id)).one()
        shared = turn_texts(child) & every
        texts.use(connection, shared - own)
        own -= shared  # the child has this use of them now
        connection.execute(sa.update(t.turns).where(_T.id == child_id).values(parent=None))
    keys = [*own, *_of_followers(connection, turn_id)]
    for f in (t.feedback.c, t.reviews.c):
        said = sa.select(f.hint, f.comment).where(f.turn == turn_id)
        keys += [key for row in connection.execute(said) for key in row if key is not None]
    tables = t.next_states, t.judgements, t.verdicts, t.feedback, t.reviews, t.samples, t.rewards
    for table in tables:
        connection.execute(sa.delete(table).where(table.c.turn == turn_id))
    connection.execute(sa.delete(t.turns).where(_T.id == turn_id))
    texts.release(connection, keys)
    return set(keys)


def delete_episodes(connection: sa.Connection, episodes: Sequence[str]) -> set[bytes]:
    """Deletes episodes whose turns are gone; returns the texts that they used."""
    chosen = _E.id.in_(episodes)
    rows = connection.execute(sa.select(_E.task, _E.metadata, _E.group_id).where(chosen)).all()
    connection.execute(sa.delete(t.rewards).where(t.rewards.c.episode.in_(episodes)))
    connection.execute(sa.delete(t.episodes).where(chosen))
    groups = {row.group_id for row in rows if row.group_id is not None}
    left = sa.select(_E.group_id).where(_E.group_id.in_(groups))
    g = t.groups.c.id
    connection.execute(sa.delete(t.groups).where(g.in_(groups), g.not_in(left)))
    keys = [key for row in rows for key in (row.task, row.metadata)]
    texts.release(connection, keys)
    return set(keys)


def _own_texts(connection: sa.Connection, row: Row) -> set[bytes]:
    """The texts whose use counts for a turn: those that its parent does not use."""
    keys = turn_texts(row)
    if row.parent is not None:
        parent = connection.execute(sa.select(t.turns).where(_T.id == row.parent)).first()
        keys -= set() if parent is None else turn_texts(parent)
    return keys


def _of_followers(connection: sa.Connection, turn_id: str) -> list[bytes]:
    """The texts of what followed a turn, and of what a judge made of it."""
    n = t.next_states.c
    keys = list(connection.execute(sa.select(n.text).where(n.turn == turn_id)).scalars())
    verdict = connection.execute(sa.select(t.verdicts).where(_V.turn == turn_id)).first()
    return keys + ([] if verdict is None else [*verdict_texts(verdict)])


def _unfollow(connection: sa.Connection, turn_id: str, followed: bool) -> set[bytes]:
    """Takes from a turn that stays what followed it, if so, and what a judge made of that.

    What a person said of the turn stays. A step that keeps its next states, because only the end of
    its task is gone, is judged again. Returns the texts that the turn used.
    """
    n = t.next_states.c
    keys: list[bytes] = []
    if followed:
        keys += connection.execute(sa.select(n.text).where(n.turn == turn_id)).scalars()
        connection.execute(sa.delete(t.next_states).where(n.turn == turn_id))
        connection.execute(sa.update(t.turns).where(_T.id == turn_id).values(continued=False))
    verdict = connection.execute(sa.select(t.verdicts).where(_V.turn == turn_id)).first()
    again: dict[str, Any] = {"task_end": None}
    if verdict is None or verdict.judge != FEEDBACK:
        keys += [] if verdict is None else verdict_texts(verdict)
        connection.execute(sa.delete(t.verdicts).where(_V.turn == turn_id))
        connection.execute(sa.delete(t.samples).where(_S.turn == turn_id))
        again |= {"state": "pending", "attempts": 0, "not_before": 0.0, "lease_until": None}
        if followed:
            connection.execute(sa.delete(t.judgements).where(_J.turn == turn_id))
    connection.execute(sa.update(t.judgements).where(_J.turn == turn_id).values(**again))
    texts.release(connection, keys)
    return set(keys)


def unbase(connection: sa.Connection, released: Collection[bytes], most: int | None = None) -> None:
    """Deletes texts that nothing uses but others, up to `most`, compressed against them."""
    c = t.texts.c
    for some in _parts(released):
        count = sa.func.count().label("others")
        query = sa.select(c.base, count).where(c.base.in_(some)).group_by(c.base)
        for base, others in connection.execute(query).all():
            uses = connection.execute(sa.select(c.uses).where(c.hash == base)).scalar()
            if uses != others or (most is not None and others > most):
                continue
            against = connection.execute(sa.select(c.hash).where(c.base == base)).scalars()
            texts.delete_base(connection, base, against.all())


def _all_texts(connection: sa.Connection) -> Iterator[tuple[bytes, bytes]]:
    """Every text under its hash, a page at a time."""
    c = t.texts.c
    keys: list[bytes] = []
    for row in _stream(connection, sa.select(c.hash)):
        keys.append(row.hash)
        if len(keys) == _PER_STATEMENT:
            yield from texts.get(connection, keys).items()
            keys = []
    yield from texts.get(connection, keys).items()


def _stream(connection: sa.Connection, query: sa.Select[*tuple[Any, ...]]) -> Iterator[Row]:
    yield from connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))


def _parts(names: Collection[_Name]) -> Iterator[list[_Name]]:
    every = list(names)
    for start in range(0, len(every), _PER_STATEMENT):
        yield every[start : start + _PER_STATEMENT]
