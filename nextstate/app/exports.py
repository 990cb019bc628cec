"""Recorded turns as rows of datasets: what TRL's trainers read as they are, and whole turns.

    sft       {messages, tools?}                  praised turns
    kto       {prompt, completion, label, tools?} praised and blamed turns
    dpo       {prompt, chosen, rejected, tools?}  a praised reply beside a blamed one
    prompts   {prompt, tools?}                    each different request once
    traces    {schema_version, turns}             tokens, one row an episode or a person's turn
    turns     everything that is known of a turn

All of them leave out side turns, and what was held out: turns of eval episodes. Each row of the
first three names its turns. `sft` and `prompts` may have what was imported too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from nextstate.app.export_files import Column
from nextstate.app.views import turn_row
from nextstate.hooks import text_of
from nextstate.records import Json, Turn
from nextstate.store import Store
from nextstate.store.turns import Exported
from nextstate.traces import training_trace
from nextstate.wire import obj, objects, write_json

_AT_ONCE = 256
_NAMES = ("tool_call_id", "name")

Rows = Iterator[Json]
Source = Iterator[Exported]


def stored(
    store: Store, lineage: str | None, told: Callable[[int], None], *, imported: bool = False
) -> Source:
    """The turns to export; `told` gets each one's position in the store."""
    position = 0
    while page := store.turns.after(position, _AT_ONCE, lineage, imported=imported):
        for found in page:
            position = found.position
            told(position)
            yield found


def sft(store: Store, source: Source) -> Rows:
    """Praised turns as conversations, and imported ones."""
    for found in source:
        if (found.score == 1 or found.imported) and (turn := store.turns.get(found.id)) is not None:
            messages = [*_prompt(turn), _message(turn.reply)]
            yield {"turn": turn.id, "messages": messages, **_tools(turn)}


def kto(store: Store, source: Source) -> Rows:
    """Praised and blamed turns."""
    for found in source:
        if found.score and (turn := store.turns.get(found.id)) is not None:
            yield {
                "turn": turn.id,
                "prompt": _prompt(turn),
                "completion": [_message(turn.reply)],
                "label": found.score > 0,
                **_tools(turn),
            }


def dpo(store: Store, source: Source) -> Rows:
    """Pairs of a praised and a blamed reply to one request.

    Either the same request was answered twice, or a blamed reply was answered by its user and the
    reply after that was praised: then it stands for what the first one should have been. Each
    turn is in one pair at most. The verdicts of all turns are held in memory: some 200 bytes each.
    """
    answers: dict[tuple[bytes, int], str] = {}
    blamed: set[str] = set()
    """Those that are in no pair yet."""
    for found in source:
        if found.score == 1:
            other = answers.pop((found.request, -1), None)
            rejected = next((turn for turn in (found.parent, other) if turn in blamed), None)
            if rejected is None:
                answers[found.request, 1] = found.id
            else:
                blamed.remove(rejected)
                yield from _pair(store, found.id, rejected)
        elif found.score == -1:
            chosen = answers.pop((found.request, 1), None)
            if chosen is None:
                blamed.add(found.id)
                answers[found.request, -1] = found.id
            else:
                yield from _pair(store, chosen, found.id)


def prompts(store: Store, source: Source) -> Rows:
    """Each different request once; 16 bytes of each are held in memory."""
    seen: set[bytes] = set()
    for found in source:
        if found.request not in seen and (turn := store.turns.get(found.id)) is not None:
            seen.add(found.request)
            yield {"prompt": _prompt(turn), **_tools(turn)}


def traces(store: Store, source: Source) -> Rows:
    """Token ids and log-probs as the engine told them."""
    for found in source:
        turn = store.turns.get(found.id)
        if turn is None or (turn.episode is not None and turn.step):
            continue
        ids = [turn.id] if turn.episode is None else store.episodes.turn_ids(turn.episode)
        trace = training_trace(map(store.turns.get, ids))
        if trace["turns"]:
            yield {"episode": turn.episode, **trace}


def turns(store: Store, source: Source) -> Rows:
    """What `nextstate turns --json` prints, with the request and the reply."""
    for found in source:
        if (turn := store.turns.get(found.id)) is not None:
            states, verdict = store.turns.next_states(turn.id), store.judging.verdict(turn.id)
            row = turn_row(turn, states, verdict, store.judging.feedback(turn.id))
            yield {**row, "request": turn.request, "reply": turn.reply}


class Format(NamedTuple):
    """One kind of dataset."""

    rows: Callable[[Store, Source], Rows]
    columns: Mapping[str, Column] | None
    """The columns of its table; None if the rows have no common shape."""


_TOOLS: Mapping[str, Column] = {"tools": "text"}
FORMATS = {
    "sft": Format(sft, {"turn": "text", "messages": "messages", **_TOOLS}),
    "kto": Format(
        kto,
        {
            "turn": "text",
            "prompt": "messages",
            "completion": "messages",
            "label": "flag",
            **_TOOLS,
        },
    ),
    "dpo": Format(
        dpo,
        {
            "turns": "texts",
            "prompt": "messages",
            "chosen": "messages",
            "rejected": "messages",
            **_TOOLS,
        },
    ),
    "prompts": Format(prompts, {"prompt": "messages", **_TOOLS}),
    "traces": Format(traces, {"schema_version": "number", "episode": "text", "turns": "traced"}),
    "turns": Format(turns, None),
}


def _pair(store: Store, chosen: str, rejected: str) -> Rows:
    good, bad = store.turns.get(chosen), store.turns.get(rejected)
    if good is not None and bad is not None:
        yield {
            "turns": [chosen, rejected],
            "prompt": _prompt(bad),
            "chosen": [_message(good.reply)],
            "rejected": [_message(bad.reply)],
            **_tools(bad),
        }


def _prompt(turn: Turn) -> list[Json]:
    return [_message(message) for message in objects(turn.request.get("messages"))]


def _message(message: Json) -> Json:
    """A message with one text as its content: a table's columns have one type each."""
    kept: Json = {"role": message.get("role"), "content": text_of(message.get("content"))}
    if calls := [_call(call) for call in objects(message.get("tool_calls"))]:
        kept["tool_calls"] = calls
    kept |= {name: text for name in _NAMES if isinstance(text := message.get(name), str)}
    return kept


def _call(call: Json) -> Json:
    function = obj(call.get("function"))
    called = {name: str(function.get(name, "")) for name in ("name", "arguments")}
    return {"id": str(call.get("id", "")), "type": "function", "function": called}


def _tools(turn: Turn) -> Json:
    """The tools as JSON in a text, which TRL reads: their parameters have no common shape."""
    tools = objects(turn.request.get("tools"))
    return {"tools": write_json(tools).decode()} if tools else {}
