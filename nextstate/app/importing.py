"""Old conversations in the store: kept as imported, neither judged nor trained by the learner.

Each is one turn of the kind `imported`, whose reply is the conversation's last. Its name is made
of what it says, so importing a file again adds nothing. No request continues it;
`nextstate export --imported` hands it out.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nextstate.app.conversations import Conversation, read_conversations
from nextstate.app.json_values import Broken, Found, json_objects
from nextstate.errors import ConfigError
from nextstate.records import Timings, Turn, TurnKind
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.repeated import MOST_SEARCHED, TOO_LONG, redacted_messages, size_of
from nextstate.store import Store
from nextstate.store.texts import HASH_BYTES
from nextstate.wire import write_json

IMPORTED = "imported: what sampled its tokens is not known"
"""Why it does not train."""
_AT_ONCE = 64


@dataclass(slots=True)
class Imported:
    """What became of a file's conversations."""

    added: int = 0
    known: int = 0
    """They were in the store already."""
    unanswered: int = 0
    """No assistant answers a user in them."""
    broken: int = 0
    """What could not be read."""


def import_file(
    store: Store,
    path: Path,
    lineage: str,
    told: Callable[[int], None],
    complain: Callable[[str], None],
    counts: Imported,
    redactor: Redactor = NOTHING,
) -> None:
    """Adds the conversations of a file; `told` gets how many of its bytes have been read.

    `complain` gets file, line and reason of each thing that cannot be read; the rest is taken.
    Raises ConfigError for a file that cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            found = _watched(json_objects(file, str(path)), told)
            turns: list[Turn] = []
            try:
                for one in read_conversations(found, str(path)):
                    if one is None:
                        counts.unanswered += 1
                        continue
                    if isinstance(one, Broken):
                        counts.broken += 1
                        complain(one.text)
                        continue
                    turns.append(_turn(one, lineage, redactor))
                    if len(turns) == _AT_ONCE:
                        _add(store, turns, counts)
            finally:
                _add(store, turns, counts)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _watched(
    found: Iterable[Found | Broken], told: Callable[[int], None]
) -> Iterator[Found | Broken]:
    for one in found:
        told(one.read)
        yield one


def _add(store: Store, turns: list[Turn], counts: Imported) -> None:
    """Adds those that are not in the store, in one transaction, and empties the list."""

    def add() -> int:
        added = 0
        with store.recording() as recording:
            for turn in turns:
                if not recording.holds(turn.id):
                    # Random keys: no request is taken for one that continues it.
                    keys = secrets.token_bytes(HASH_BYTES), secrets.token_bytes(HASH_BYTES)
                    recording.add_turn(turn, *keys)
                    added += 1
        return added

    added = store.database.waiting(add)
    counts.added += added
    counts.known += len(turns) - added
    turns.clear()


def _turn(conversation: Conversation, lineage: str, redactor: Redactor) -> Turn:
    *before, reply = redacted_messages(redactor, conversation.messages)
    request = {"model": conversation.model, "messages": before}
    if conversation.tools:
        long = bool(redactor) and size_of(conversation.tools) > MOST_SEARCHED
        request["tools"] = [{"type": TOO_LONG}] if long else redactor.value(conversation.tools)
    said = write_json([lineage, request, reply])
    name = f"import_{hashlib.blake2b(said, digest_size=10).hexdigest()}"
    return Turn(
        id=name,
        session=name,
        index=0,
        kind=TurnKind.IMPORTED,
        lineage=lineage,
        policy_version=None,
        client_model=conversation.model[:200],
        request=request,
        reply=reply,
        finish_reason=None,
        prompt_ids=None,
        completion_ids=None,
        behaviour_logprobs=None,
        sampling={},
        timings=Timings(time.time(), None, 0.0),
        untrainable=IMPORTED,
    )
