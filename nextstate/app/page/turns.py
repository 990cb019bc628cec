"""Turns as people read them: who said what, how it was judged, and why it does not train."""

from __future__ import annotations

from collections.abc import Sequence

from nextstate.app.page.texts import Said, message_text, short
from nextstate.hooks import AgentProfile, text_of
from nextstate.records import Json, NextState, SampleState, Turn, TurnKind, Verdict
from nextstate.store import Store
from nextstate.store.lookup import Fate, TurnSummary
from nextstate.wire import objects

_MESSAGES = 30
"""Messages of a request on one page."""


def line(turn: TurnSummary, profile: AgentProfile) -> Json:
    """A turn of the list."""
    asked = _asked(turn, profile)
    return {
        "turn": turn,
        "asked": asked and (asked[0], short(asked[1])),
        "reply": short(message_text(turn.reply)),
        "followed": [(str(s.source), short(s.text)) for s in turn.followed[:3]],
        "votes": votes_text(turn.votes),
        "hint": short(turn.hint) if turn.hint else "",
        "why": why(turn.kind, turn.untrainable, turn.score, turn.followed, turn.fate),
    }


def spoken(turn: TurnSummary, profile: AgentProfile) -> Json:
    """A turn of a conversation: the same, with what was said as far as a page shows it."""
    asked = _asked(turn, profile)
    return line(turn, profile) | {
        "asked": None if asked is None else Said(asked[0], "", asked[1]),
        "reply": Said("reply", "reply", message_text(turn.reply)),
        "followed": [
            Said(str(s.source), f"s{number}", s.text) for number, s in enumerate(turn.followed)
        ],
    }


def votes_text(votes: Sequence[int]) -> str:
    """The votes of a judge in a row."""
    return " ".join(f"{vote:+d}" for vote in votes)


def _asked(turn: TurnSummary, profile: AgentProfile) -> tuple[str, str] | None:
    """(who, what) of the last message, without an agent's envelope; None if the agent wrote it."""
    last = turn.messages[-1]
    if turn.answers is not None and turn.answers[1] in message_text(last):
        return str(turn.answers[0]), turn.answers[1]
    ours = profile.for_request({"messages": [*turn.messages]})
    said = ours.utterance(last)
    return None if said is None else (str(said.source), said.text)


def why(
    kind: str,
    untrainable: str | None,
    score: int | None,
    next_states: Sequence[NextState],
    fate: Fate | None,
) -> tuple[str, str]:
    """(a word for the style, what became of the turn or what it waits for)."""
    if kind == TurnKind.SIDE:
        return "no", "a side turn: the agent's housekeeping is never trained"
    if untrainable is not None:
        return "no", f"cannot train: {untrainable}"
    if fate is not None:
        return _fate(fate)
    if score is not None:
        return "waits", "judged"
    return "waits", "waits for the judge" if next_states else "waits for what follows"


def _fate(fate: Fate) -> tuple[str, str]:
    if fate.state is SampleState.TRAINED:
        return "yes", f"trained in version {fate.trained_in}"
    if fate.state is SampleState.DROPPED:
        return "no", f"dropped: {fate.reason or 'no reason is known'}"
    return "waits", {
        SampleState.WAITING: "waits for its group of episodes",
        SampleState.READY: "ready to train",
        SampleState.LEASED: "in training",
        SampleState.HELD: "held out: new versions are checked on it",
    }[fate.state]


def whole(store: Store, turn: Turn, before: int | None) -> Json:
    """Everything about one turn; of its messages those before number `before`, or the last."""
    states, verdict = store.turns.next_states(turn.id), store.judging.verdict(turn.id)
    messages = _messages(turn)
    end = len(messages) if before is None else min(before, len(messages))
    begin = max(end - _MESSAGES, 0)
    shown = [_said(messages[number], f"m{number}") for number in range(begin, end)]
    score = None if verdict is None else verdict.score
    standing = store.lookup.standing(turn.id)
    fate = None if standing is None else standing.fate
    return {
        "turn": turn,
        "messages": shown,
        "begin": begin,
        "end": end,
        "count": len(messages),
        "reply": Said("reply", "reply", message_text(turn.reply)),
        "next_states": [
            Said(str(s.source), f"s{number}", s.text) for number, s in enumerate(states)
        ],
        "verdict": verdict,
        "votes": "" if verdict is None else votes_text(verdict.votes),
        "feedback": store.judging.feedback(turn.id),
        "why": why(turn.kind, turn.untrainable, score, states, fate),
        "facts": facts(turn, verdict),
    }


def _messages(turn: Turn) -> list[Json]:
    """What a turn answers: a conversation, or the one text that the completions route got."""
    messages, prompt = objects(turn.request.get("messages")), turn.request.get("prompt")
    if messages or prompt is None:
        return messages
    return [{"role": "prompt", "content": text_of(prompt) or str(prompt)}]


def text_named(store: Store, turn: Turn, name: str) -> str | None:
    """The whole text of a message: see `Said.name`. None if there is none."""
    if name == "reply":
        return message_text(turn.reply)
    number = int(name[1:])
    if name[0] == "m":
        messages = _messages(turn)
        return message_text(messages[number]) if number < len(messages) else None
    states = store.turns.next_states(turn.id)
    return states[number].text if number < len(states) else None


def facts(turn: Turn, verdict: Verdict | None) -> list[tuple[str, str]]:
    """(name, value) of what was measured."""
    found = [("Model", turn.client_model), ("Kind", f"{turn.kind} turn {turn.index}")]
    prompt, reply = turn.prompt_ids, turn.completion_ids
    found.append(("Prompt", "unknown" if prompt is None else f"{len(prompt)} tokens"))
    found.append(("Reply", "unknown" if reply is None else f"{len(reply)} tokens"))
    if turn.behaviour_logprobs:
        mean = sum(turn.behaviour_logprobs) / len(turn.behaviour_logprobs)
        found.append(("Mean log-prob", f"{mean:.3f} nats a token"))
    if turn.finish_reason:
        found.append(("Ended by", turn.finish_reason))
    if turn.timings.first_token_s is not None:
        found.append(("First token", f"{turn.timings.first_token_s:.2f} s"))
    found.append(("Whole reply", f"{turn.timings.total_s:.2f} s"))
    if verdict is not None and verdict.hinted_prompt_ids is not None:
        found.append(("Hinted prompt", f"{len(verdict.hinted_prompt_ids)} tokens"))
    if turn.episode is not None:
        found.append(("Episode", f"{turn.episode}, step {turn.step}"))
    return found


def _said(message: Json, name: str) -> Said:
    return Said(str(message.get("role") or "unknown")[:40], name, message_text(message))
