"""Whether the store is whole: every text is what its name says, and everything is counted right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import sqlalchemy as sa
import zstandard

from nextstate.errors import SealError
from nextstate.store import schema as t
from nextstate.store import texts
from nextstate.store.counts import recount
from nextstate.store.database import Database, queries
from nextstate.store.settling import verdict_texts
from nextstate.store.turns import turn_texts, turn_values
from nextstate.store.vault import vault_of

_AT_ONCE = 500
_UNREADABLE = (zstandard.ZstdError, KeyError, SealError)
_LISTED = 5
"""Of each kind of problem with a text."""


class _TurnTexts(NamedTuple):
    """What `turn_texts` reads of a row."""

    messages: bytes
    tools: bytes | None
    rest: bytes
    reply: bytes
    prompt_ids: bytes | None


@queries
class Verifying:
    """Queries that read everything."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def problems(self, read: Callable[[int, int], object]) -> list[str]:
        """What is wrong, a line each; `read` gets how many texts are read, and of how many.

        Everybody else goes on meanwhile; what they change is not seen.
        """
        found = self._database.damage()
        if found:
            return found  # nothing else can be trusted
        with self._database.read() as connection:
            used = _used(connection)
            found += _wrong_texts(connection, used, read)
            found += _wrong_values(connection)
            kept = {(row.area, row.key): row.count_ for row in connection.execute(_COUNTS)}
            counted = recount(connection)
        found += [
            f"{area}/{key} is counted as {kept.get((area, key), 0)}, and there are "
            f"{counted.get((area, key), 0)}"
            for area, key in sorted(kept.keys() | counted.keys())
            if kept.get((area, key), 0) != counted.get((area, key), 0)
        ]
        return found


_COUNTS = sa.select(t.counts.c.area, t.counts.c.key, t.counts.c.count.label("count_"))


def _used(connection: sa.Connection) -> Counter[bytes]:
    """How often each text is used, counted from what uses it (nextstate/store/texts.py)."""
    used = Counter[bytes]()
    c, e = t.turns.c, t.episodes.c
    parents = t.turns.alias("parents")
    names, width = _TurnTexts._fields, len(_TurnTexts._fields)
    query = sa.select(
        *(c[name] for name in names), *(parents.c[name].label(f"parents_{name}") for name in names)
    ).outerjoin(parents, parents.c.id == c.parent)
    for row in connection.execute(query.execution_options(yield_per=_AT_ONCE)):
        above = None if row[width] is None else _TurnTexts(*row[width:])
        used.update(turn_texts(_TurnTexts(*row[:width])) - (turn_texts(above) if above else set()))
    for query in (
        sa.select(t.next_states.c.text),
        sa.select(t.texts.c.base).where(t.texts.c.base.is_not(None)),
        *(
            sa.select(column).where(column.is_not(None))
            for said in (t.feedback.c, t.reviews.c)
            for column in (said.hint, said.comment)
        ),
        sa.select(e.task),
        sa.select(e.metadata),
    ):
        used.update(connection.execute(query).scalars())
    for row in connection.execute(sa.select(t.verdicts)):
        used.update(verdict_texts(row))
    return used


def _wrong_texts(
    connection: sa.Connection, used: Counter[bytes], read: Callable[[int, int], object]
) -> list[str]:
    """Texts that are missing, that are not what their names say, or whose uses are wrong."""
    c = t.texts.c
    stored = {row.hash: row.uses for row in connection.execute(sa.select(c.hash, c.uses))}
    kinds: dict[str, list[str]] = {"missing": [], "not what its name says": [], "miscounted": []}
    kinds["missing"] += [key.hex() for key in used.keys() - stored.keys()]
    kinds["miscounted"] += [key.hex() for key, uses in stored.items() if used[key] != uses]
    done = 0
    for keys in _parts(list(stored)):
        for key, text in _readable(connection, keys):
            if text is None or texts.content_hash(text) != key:
                kinds["not what its name says"].append(key.hex())
        done += len(keys)
        read(done, len(stored))
    return [
        f"{len(names)} of {len(stored)} texts {'is' if len(names) == 1 else 'are'} {kind}: "
        + ", ".join(sorted(names)[:_LISTED])
        for kind, names in kinds.items()
        if names
    ]


def _wrong_values(connection: sa.Connection) -> list[str]:
    """The turns of an encrypted store with a value that was changed or moved."""
    if vault_of(connection.dialect) is None:
        return []
    wrong: list[str] = []
    query = sa.select(t.turns).execution_options(yield_per=_AT_ONCE)
    for row in connection.execute(query):
        try:
            turn_values(connection, row)
        except SealError:
            wrong.append(row.id)
    some = ", ".join(wrong[:_LISTED])
    return [f"{len(wrong)} turns have a sealed value that was changed: {some}"] if wrong else []


def _readable(connection: sa.Connection, keys: list[bytes]) -> Iterator[tuple[bytes, bytes | None]]:
    """The texts under some keys; None for one that cannot be decompressed."""
    try:
        yield from texts.get(connection, keys).items()
    except _UNREADABLE:  # one of them: each by itself
        for key in keys:
            try:
                yield key, texts.get(connection, [key]).get(key)
            except _UNREADABLE:
                yield key, None


def _parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _AT_ONCE):
        yield keys[start : start + _AT_ONCE]
