"""Turns as people read them: one line each, or the whole turn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import cast

from rich.cells import cell_len, set_cell_size

from nextstate.app.terminal import fitted, harmless_lines
from nextstate.app.views import turn_row
from nextstate.hooks import AgentProfile, attached, load_plugin, text_of
from nextstate.records import Feedback, Json, NextState, SampleState, Source, Turn, Verdict
from nextstate.store.lookup import SessionSummary, Standing, TurnSummary
from nextstate.wire import obj, objects, one_line

_UNKNOWN = "·"
_PERSON, _TOOL, _ENVIRONMENT = "person", "tool", "environment"
_SPEAKERS = {
    Source.FEEDBACK: _PERSON,
    Source.USER: _PERSON,
    Source.TOOL: _TOOL,
    Source.ENVIRONMENT: _ENVIRONMENT,
}
_REASON_CELLS, _NAME_CELLS = 40, 32
_GENERIC: AgentProfile = load_plugin("agents", "generic", None)
_THEN, _NOTHING = "  →  ", "·"


def said(turn: TurnSummary) -> tuple[str, str]:
    """(who spoke last before the reply, what they said)."""
    message, earlier = turn.messages[-1], turn.earlier or {}
    # OpenClaw ends each request with a message of its own, after the person's.
    if earlier.get("role") == message.get("role") == "user" and not _GENERIC.utterance(message):
        message = earlier
    text = message_text(message)
    if turn.answers is not None and turn.answers[1] in text:  # a fork may answer something else
        return _SPEAKERS[turn.answers[0]], turn.answers[1]
    role = str(message.get("role", "user"))
    if role == "user":
        return _ENVIRONMENT if turn.in_episode else _PERSON, text
    return _TOOL if role in ("tool", "function") else fitted(role, 12), text


def message_text(message: Json) -> str:
    """What a message says, and which tools it calls, as text.

    >>> message_text({"content": "Look.", "tool_calls": [{"function": {"name": "ls"}}]})
    'Look.\\n[calls ls]'
    """
    content = message.get("content")
    parts = [text_of(content)]
    if not parts[0] and (shown := attached(content, Source.USER)) is not None:
        parts = [shown.text]
    for call in objects(message.get("tool_calls")):
        function = obj(call.get("function"))
        arguments = function.get("arguments")
        called = f"{function.get('name')} {arguments}" if arguments else str(function.get("name"))
        parts.append(f"[calls {text_of(called)}]")
    for block in objects(content):  # of Anthropic's API
        if block.get("type") == "tool_use":
            parts.append(f"[calls {text_of(str(block.get('name')))}]")
        elif block.get("type") == "tool_result":
            parts.append(text_of(block.get("content")))
    return "\n".join(part for part in parts if part)


def contains(turn: TurnSummary, words: Iterable[str]) -> bool:
    """Whether each of the words is in what was said, replied or followed; case does not count."""
    texts = [said(turn)[1], message_text(turn.reply), *(state.text for state in turn.followed)]
    whole = " ".join("\n".join(texts).split()).casefold()
    return all(word in whole for word in words)


def turn_line(turn: TurnSummary, width: int) -> str:
    """One line: id, version, score, who said what, the reply, and `✗` with why it does not train.

    At most `width` cells wide; `width` is 80 or more.
    """
    version = _UNKNOWN if turn.version is None else f"v{turn.version}"
    score = _UNKNOWN if turn.score is None else f"{turn.score:+d}"
    speaker, text = said(turn)
    start = f"{turn.id} {version:>3} {score:>2}  {speaker}: "
    room = width - cell_len(start) - len(_THEN)
    end = ""
    if turn.untrained is not None:
        end = f"  ✗ {fitted(turn.untrained, min(max(room // 3, 8), _REASON_CELLS))}"
    room = max(room - cell_len(end), 8)
    reply = fitted(message_text(turn.reply), room) or _NOTHING
    first = fitted(text, max(room - cell_len(reply), room // 2)) or _NOTHING
    return f"{start}{first}{_THEN}{fitted(reply, room - cell_len(first))}{end}"


def turn_details(
    turn: Turn,
    states: Sequence[NextState],
    verdict: Verdict | None,
    feedback: Feedback | None,
    standing: Standing | None,
) -> Json:
    """The object of `nextstate turns ID --json`: a line of the list, and the rest of the turn."""
    found = turn_row(turn, states, verdict, feedback)
    found["next_state"] = [
        {"source": state.source, "text": state.text, "trust": state.trust} for state in states
    ]
    if feedback is not None:
        found["feedback"]["hint"] = feedback.hint
    return found | {
        "request": turn.request,
        "reply": turn.reply,
        "finish_reason": turn.finish_reason,
        "started_at": turn.timings.started_at,
        "total_s": turn.timings.total_s,
        "parent": turn.parent,
        "training": training_text(turn, states, standing),
    }


def turn_card(
    turn: Turn,
    states: Sequence[NextState],
    verdict: Verdict | None,
    feedback: Feedback | None,
    standing: Standing | None,
) -> str:
    """The whole turn as text: what was said and replied, what followed, and what became of it."""
    lines = [f"turn         {turn.id}"]
    client = standing and standing.client_session
    shown = {
        "session": f"{turn.session}, turn {turn.index}",
        "client name": client if client != turn.session else None,
        "episode": None if turn.episode is None else f"{turn.episode}, step {turn.step}",
        "kind": f"{turn.kind} turn",
        "lineage": turn.lineage,
        "version": _UNKNOWN if turn.policy_version is None else turn.policy_version,
        "engine": turn.engine,
        "at": f"{time_text(turn.timings.started_at)}, {turn.timings.total_s:.1f} s",
        "continues": turn.parent,
        "replaced by": standing and standing.replaced_by,
        "trains": training_text(turn, states, standing),
    }
    lines += [f"{name:13}{one_line(str(v))}" for name, v in shown.items() if v is not None]
    messages = objects(turn.request.get("messages"))
    for message in messages:
        lines += _block(str(message.get("role")), message_text(message))
    if not messages:
        prompt = cast(object, turn.request.get("prompt", turn.request.get("input")))
        lines += _block("prompt", text_of(prompt) or str(prompt))
    end = "" if turn.finish_reason in (None, "stop") else f" (ended by {turn.finish_reason})"
    lines += _block(f"reply{end}", message_text(turn.reply))
    for state in states:
        lines += _block(f"next state: {state.source}, trust {state.trust:g}", state.text)
    if verdict is not None:
        votes = " ".join(f"{vote:+d}" for vote in verdict.votes)
        by = f" by {verdict.judge}" + (f", votes {votes}" if votes else "")
        lines += _block(f"verdict: {verdict.score:+d}{by}", "")
        lines += [] if verdict.hint is None else _block("hint", verdict.hint)
    if feedback is not None:
        lines += _block(f"feedback: {feedback.score:+d}", feedback.comment or "")
        lines += [] if feedback.hint is None else _block("a person's hint", feedback.hint)
    return "\n".join(lines)


def training_text(turn: Turn, states: Sequence[NextState], standing: Standing | None) -> str:
    """Whether a turn trains, and if not, why."""
    if turn.kind == "side":
        return "no: a side turn is never judged or trained"
    if turn.untrainable is not None:
        return f"no: {turn.untrainable}"
    if standing is None or standing.fate is None:
        if standing is not None and standing.work_reason is not None:
            return f"not yet: {standing.work_reason}"
        return "not yet: it waits for its verdict" if states else "not yet: nothing has followed it"
    fate = standing.fate
    worth = "" if fate.advantage is None else f", advantage {fate.advantage:+.2f}"
    return {
        SampleState.WAITING: "not yet: its group of episodes is not settled",
        SampleState.READY: f"yes: it waits for an update{worth}",
        SampleState.LEASED: f"yes: it is being trained{worth}",
        SampleState.TRAINED: f"yes: version {fate.trained_in} was trained on it{worth}",
        SampleState.DROPPED: f"no: {fate.reason}",
        SampleState.HELD: "no: it is held out, to check new versions on",
    }[fate.state]


def session_row(session: SessionSummary) -> Json:
    """One object of `nextstate sessions --json`."""
    return {
        "session": session.name,
        "client_session": session.client_name,
        "lineage": session.lineage,
        "turns": session.turns,
        "first_at": session.first_at,
        "last_at": session.last_at,
        "mean_score": session.mean_score,
    }


def session_table(sessions: Sequence[SessionSummary]) -> str:
    """A line for each session."""
    table = [("session", "turns", "first", "last", "score", "lineage", "client name")]
    for one in sessions:
        score = _UNKNOWN if one.mean_score is None else f"{one.mean_score:+.2f}"
        client = one.client_name if one.client_name != one.name else None
        table.append(
            (
                *(fitted(one.name, _NAME_CELLS), str(one.turns), time_text(one.first_at)),
                *(time_text(one.last_at), score, fitted(one.lineage, _NAME_CELLS)),
                fitted(client or "", _NAME_CELLS),
            )
        )
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(set_cell_size(cell, n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def time_text(at: float) -> str:
    """A Unix time in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _block(title: str, text: str) -> list[str]:
    """A heading with indented lines below it."""
    below = [f"  {line}".rstrip() for line in harmless_lines(text)] if text else []
    return ["", f"── {one_line(title)}", *below]
