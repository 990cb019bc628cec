"""The decision which turn a request continues, and which session its turn belongs to.

The store hands out candidates by their keys; here one of them is chosen, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nextstate.records import TurnKind
from nextstate.store.sessions import Candidate, Sessions
from proxy.linking.history import (
    KEY_BYTES,
    LETTERS_BYTES,
    RARE_BYTES,
    SYSTEM_BYTES,
    Link,
    Scope,
)
from proxy.linking.meaning import stops_of
from proxy.linking.proof import Compared, before, is_answer_to, is_rest_of, size_of


class Found(NamedTuple):
    """What the search for the turn that a request continues has found."""

    parent: Candidate | None = None
    start: int | None = None
    """The message of the request with which the parent's reply begins."""
    unsure: bool = False
    """True if there were candidates, and none of them is surely the parent."""


def find_parent(sessions: Sessions, link: Link, scope: Scope) -> Found:
    """The turn that a request with this link continues.

    The first candidates have the same chain of replies and the same context, to the letter or at
    least in its words. The next ones have the same chain, and the last ones the same last reply,
    because the agent may have cut its history. Strangers get the same replies too, so of these a
    candidate must be proven (`proxy/linking/proof.py`), or the client's name must stand for one
    conversation only.

    Of several candidates the one with most in common is taken, then one that nothing has continued
    yet, then the newest. If different conversations have equally much in common and are not alike
    to the letter, none is taken; nor if different requests at one place of a conversation have.
    """
    compared = Compared(sessions)
    found = _find(sessions, link, scope, compared)
    for ended, stops in link.ended:
        if found.parent is not None or found.unsure:
            break
        other = _find(sessions, ended, scope, compared)
        if other.parent is None or not stops.isdisjoint(stops_of(sessions.sampling(other.parent))):
            found = other
    return found


def _find(sessions: Sessions, link: Link, scope: Scope, compared: Compared) -> Found:
    last, chains = link.replies[0], {reply.chain_key: None for reply in link.replies}
    rows = sessions.with_context_key(last.context_key) if last.context_key else []
    if rows:
        return _found(_surest(rows, link), link)
    of_chain: list[Candidate] = []
    for chain_key in chains:
        of_chain = of_chain or sessions.with_chain_key(chain_key)
    for rows in _in_the_same_words(sessions, link, of_chain) if of_chain else ():
        if rows:
            best = _surest(rows, link)
            if best and not _is_alike(best, link) and not _is_named(sessions, scope):
                return Found(unsure=True)
            return _found(best, link)
    rows = of_chain
    shared = [row for row in rows if _in_common(row, last.hashes)]
    if rows and (shared or link.rare or _is_only_conversation(sessions, scope)):
        best = _surest(shared or rows, link, siblings=True)
        if (
            best is None
            or best.messages == b"".join([one.hash for one in link.messages[: last.start]])
            or (_is_alike(best, link) and is_answer_to(compared, best, before(link.messages, last)))
            or _is_named(sessions, scope)
        ):
            return _found(best, link)
    unsure = bool(rows)
    for reply in link.replies:
        if reply.key is None:
            continue
        rows = sessions.with_reply_key(reply.key)
        if rows and not _is_named(sessions, scope):
            left = before(link.messages, reply)
            alike = [row for row in rows if _is_alike(row, link)]
            proven = [row for row in alike if is_rest_of(compared, row, left, reply.size)]
            unsure = unsure or len(proven) < len(rows)
            rows = proven
        if rows:
            return _found(_surest(rows, link), link)
    return Found(unsure=unsure)


def _found(best: Candidate | None, link: Link) -> Found:
    return Found(best, best and _start(best, link), best is None)


def main_turn(sessions: Sessions, turn: Candidate) -> Candidate | None:
    """The newest main turn that a turn goes back to; itself if it is one."""
    found: Candidate | None = turn
    while found is not None and found.kind != TurnKind.MAIN:
        found = sessions.parent_of(found.id)
    return found


def session_of(sessions: Sessions, scope: Scope, name: str, *, fresh: bool) -> str:
    """The session of a turn without a parent, under the client's `name`.

    One name may stand for many conversations (a user's name, a chat that was reset) and for clients
    of several lineages. So each `fresh` one, which holds nothing from the assistant, is named
    `name`, `name~2`, `name~3`, … Any other one is taken for the newest of the lineage, with its
    history rewritten.
    """
    newest = sessions.newest_of_name(name, scope.lineage)
    if newest is not None and not fresh:
        return newest
    last = (sessions.newest_started(name) or "").removeprefix(f"{name}~")
    number = int(last) if last.isdecimal() else 1
    session = name
    while sessions.next_index(session):  # clients may use a name such as `name~2` themselves
        number += 1
        session = f"{name}~{number}"
    return session


def _in_the_same_words(
    sessions: Sessions, link: Link, of_chain: Sequence[Candidate]
) -> Iterator[Sequence[Candidate]]:
    """Turns with the same replies and the same words before them, the likeliest first."""
    keys = [reply.context_key for reply in link.replies if reply.context_key]
    for key in keys[1:]:
        yield sessions.with_context_key(key)
    for key in keys:
        start = key[:-LETTERS_BYTES]
        alike = [row for row in of_chain if (row.context_key or b"").startswith(start)]
        # Older ones, too: they may be another conversation's.
        yield [*dict.fromkeys((*alike, *sessions.with_context_prefix(start)))]
    for key in keys:
        yield sessions.with_context_prefix(key[:KEY_BYTES])


def _is_named(sessions: Sessions, scope: Scope) -> bool:
    """Whether the client's name stands for this one conversation.

    A person's or an app's does not: others under it may not have been seen.
    """
    return not scope.is_shared_name and _is_only_conversation(sessions, scope)


def _is_only_conversation(sessions: Sessions, scope: Scope) -> bool:
    """Whether a client's name stands for one conversation only.

    If the name is a conversation's, that is the last one that began, unless another one went on
    since: an agent keeps the name when it resets a chat. Under a shared name there must be no other
    conversation.
    """
    if scope.client_session is None:
        return False
    begun = sessions.newest_start(scope.client_session, scope.lineage)
    if begun is None:
        return True
    session, position = begun
    after = 0 if scope.is_shared_name else position
    return not sessions.has_others(scope.client_session, scope.lineage, session, after)


def _in_common(row: Candidate, hashes: Sequence[bytes]) -> int:
    """How many of a request's messages stood before this turn's reply, too."""
    return len(frozenset(hashes).intersection(row.message_hashes))


def _surest(rows: Sequence[Candidate], link: Link, *, siblings: bool = False) -> Candidate | None:
    """The turn that has most in common with a request; None if it may be a stranger's.

    `siblings` have one place and may have got different requests.
    """
    if len(rows) == 1:
        return rows[0]
    last = link.replies[0]
    marks = [
        (_in_common(row, last.hashes), _system(row.context_key) == _system(last.context_key))
        for row in rows
    ]
    top = [row for row, mark in zip(rows, marks, strict=True) if mark == max(marks)]
    if siblings and len({_words(row) for row in top}) > 1:
        return None
    if len({row.session for row in top}) > 1 and len({_letters(row) for row in top}) > 1:
        return None
    return max(top, key=lambda row: (not row.continued, row.seq))


def _is_alike(row: Candidate, link: Link) -> bool:
    """Whether a turn has the same system's text, or the words of the request are many."""
    last = link.replies[0]
    if _system(row.context_key) == _system(last.context_key):
        return True
    return size_of(before(link.messages, last)) + last.size >= RARE_BYTES


def _letters(row: Candidate) -> bytes:
    """What was said before a turn's reply, to the letter."""
    return row.context_key or row.messages


def _words(row: Candidate) -> bytes:
    return row.context_key[:-LETTERS_BYTES] if row.context_key else row.messages


def _system(context_key: bytes | None) -> bytes | None:
    return context_key and context_key[KEY_BYTES : KEY_BYTES + SYSTEM_BYTES]


def _start(row: Candidate, link: Link) -> int:
    """The message with which the reply of the turn that a request continues begins."""
    starts = (reply.start for reply in link.replies if reply.key and reply.key == row.reply_key)
    return next(starts, link.replies[0].start)  # the last message holds more than this reply
