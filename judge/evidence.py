"""What a judge sees of a turn, within stated bounds.

A text that is longer than its cap is clipped: two thirds of the cap come from its head and one
third from its tail, and a mark between them says how many characters are missing. The reply's cap
is `max_chars`. The request's last messages may use twice that in all, and so may the next states:
shorter texts stay whole, and the longer ones share the rest evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import orjson

from judge.strangers import without_trust
from nextstate.hooks import AgentProfile, Evidence, text_of
from nextstate.records import Json, NextState, Turn
from nextstate.thoughts import without_thoughts
from nextstate.wire import obj, objects

TAIL_MESSAGES = 6
"""How many of the request's last messages the judge sees."""


def build_evidence(
    turn: Turn,
    states: Sequence[NextState],
    max_chars: int,
    later: Sequence[NextState] = (),
    profile: AgentProfile | None = None,
    tail_messages: int = TAIL_MESSAGES,
) -> Evidence:
    """What the judge sees of a turn; `later` is what the user said at the end of its task.

    The agent's `profile` removes the messages that the agent wrote itself, and its envelope around
    a person's words.
    """
    messages = cast("list[Json]", turn.request.get("messages") or [])
    profile = profile and profile.for_request(turn.request)
    said = [
        utterance for message in messages if (utterance := said_in(message, profile)) is not None
    ]
    tail = said[-tail_messages:]
    reply = message_text(turn.reply)
    return bounded(Evidence(tuple(tail), reply, tuple(states), tuple(later)), max_chars)


def bounded(evidence: Evidence, max_chars: int) -> Evidence:
    """The evidence with every text clipped by the rule above, and strangers' without trust."""
    texts = clipped_all([text for _, text in evidence.tail], max_chars, 2 * max_chars)
    return Evidence(
        tail=tuple((role, text) for (role, _), text in zip(evidence.tail, texts, strict=True)),
        reply=clipped(evidence.reply, max_chars),
        next_states=_clipped_states(without_trust(evidence.reply, evidence.next_states), max_chars),
        later=_clipped_states(evidence.later, max_chars),
    )


def said_in(message: Json, profile: AgentProfile | None) -> tuple[str, str] | None:
    """(speaker, words) of a message; None where the agent itself wrote it.

    The profile decides: a message in the user role may come from the environment.
    """
    role = str(message.get("role", ""))
    if profile is None or role not in ("user", "tool"):
        return role, message_text(message)
    utterance = profile.utterance(message)
    return None if utterance is None else (utterance.source.value, utterance.text)


def _clipped_states(states: Sequence[NextState], max_chars: int) -> tuple[NextState, ...]:
    texts = clipped_all([state.text for state in states], max_chars, 2 * max_chars)
    return tuple(replace(state, text=text) for state, text in zip(states, texts, strict=True))


def message_text(message: Json) -> str:
    """A message's text without its thoughts, then its tool calls, one a line."""
    parts = [without_thoughts(text_of(message.get("content"))).strip()]
    refusal = message.get("refusal")
    if isinstance(refusal, str):
        parts.append(refusal)
    functions = [call.get("function") for call in objects(message.get("tool_calls"))]
    functions.append(message.get("function_call"))
    parts += [_call_text(function) for f in functions if (function := obj(f))]
    return "\n".join(part for part in parts if part)


def clipped(text: str, cap: int) -> str:
    """`text`, clipped by the rule above when it is longer than `cap` characters.

    >>> clipped("abcdefghij", 6)
    'abcd\\n[… 4 characters left out …]\\nij'
    """
    if len(text) <= cap:
        return text
    tail = cap // 3
    head = cap - tail
    return f"{text[:head]}\n[… {len(text) - cap} characters left out …]\n{text[len(text) - tail :]}"


def clipped_all(texts: Sequence[str], cap: int, total: int) -> list[str]:
    """The texts, each clipped to `cap` characters and all of them together to `total`."""
    share = fair_share([min(len(text), cap) for text in texts], total)
    return [clipped(text, min(cap, share)) for text in texts]


def fair_share(lengths: Sequence[int], total: int) -> int:
    """The largest cap under which `lengths` sum to at most `total`.

    >>> fair_share([10, 100, 100], 110)
    50
    """
    left = total
    waiting = sorted(lengths)
    while waiting:
        share = left // len(waiting)
        if waiting[0] > share:
            return share
        left -= waiting.pop(0)
    return total


def _call_text(function: Json) -> str:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    return f"[calls {function.get('name')}({arguments})]"
