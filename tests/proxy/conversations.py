"""Requests of agents, with the truth about them, and a store that records them."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nextstate.config import StoreConfig
from nextstate.hooks import AgentProfile
from nextstate.records import Json, Timings
from nextstate.store import Store
from plugins.agents.profile import GENERIC, Profile
from proxy.capture import Capture
from proxy.exchange import Exchange, read_exchange, record
from proxy.linking.history import RememberedMessages

PROFILE = Profile(GENERIC)
AT_LENGTH = " It says what it did and why as models do." * 6
"""Makes a reply so long that no other conversation gets it."""
CROWD = 24
"""More agents than the candidates that linking compares."""


@dataclass
class Step:
    """One request as an agent sends it, and what is true about it."""

    id: str
    messages: list[Json]
    reply: Json
    cut: bool
    parent: str | None
    """The turn that it continues, where the store can know it."""
    states: list[str]
    """What it says about its parent."""
    conversation: str
    """A name for the chat that it belongs to."""


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: tuple[str, str]) -> Json:
    message: Json = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": args}}
            for n, (name, args) in enumerate(calls)
        ]
    return message


def result(number: int = 0) -> Json:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": f"result {number}"}


def asked(turn: str, messages: Sequence[Json], reply: Json) -> Step:
    return Step(turn, [*messages], reply, False, None, [], "")


def alternating(*texts: str) -> list[Json]:
    """A history that alternates, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def step(turn: str, messages: list[Json], reply: str, *, cut: bool = False) -> Step:
    return Step(turn, messages, {"role": "assistant", "content": reply}, cut, None, [], "")


def interleaved(lanes: Sequence[Sequence[Step]], rng: Random) -> Iterator[tuple[int, Step]]:
    """Every step with its agent's number, each agent's own in order."""
    left = {number: iter(lane) for number, lane in enumerate(lanes)}
    while left:
        number = rng.choice(sorted(left))
        step = next(left[number], None)
        if step is None:
            del left[number]
        else:
            yield number, step


class Recorded:
    """A store that has recorded every step, on disk."""

    def __init__(self, store: Store, profile: AgentProfile, vague: bool = False) -> None:
        self.store = store
        self.profile = profile
        self.vague = vague
        self.remembered = RememberedMessages()
        self.parents: dict[str, str | None] = {}
        self.sessions: dict[str, str] = {}

    def record(self, step: Step, session: str | None) -> None:
        capture = Capture()
        choice: dict[str, Any] = {"index": 0, "message": step.reply}
        choice["finish_reason"] = None if step.cut else "stop"
        capture.body({"model": "base", "choices": [choice]})
        exchange = Exchange(
            turn_id=step.id,
            lineage="main",
            explicit_session=session,
            request={"model": "base", "messages": step.messages},
            capture=capture,
            policy_version=0,
            timings=Timings(0.0, 0.0, 0.0),
            cut=step.cut,
            untrainable="the engine cut the reply" if step.cut else None,
            vague_name=self.vague,
        )
        with self.store.recording() as recording:
            turn = record(recording, read_exchange(exchange, self.profile, self.remembered))
        self.parents[turn.id], self.sessions[turn.id] = turn.parent, turn.session

    def states(self, turn: str) -> list[str]:
        return [state.text for state in self.store.turns.next_states(turn)]


@contextmanager
def recorded(
    lanes: Sequence[Sequence[Step]],
    rng: Random,
    names: Sequence[str] | None = None,
    profile: AgentProfile = PROFILE,
    vague: bool = False,
) -> Generator[Recorded]:
    """The lanes recorded in a random order, each under its explicit session id if `names`.

    If `vague`, the ids are a person's or an app's.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Recorded(Store(StoreConfig(dir=str(Path(folder) / "state"))), profile, vague)
        try:
            for number, step in interleaved(lanes, rng):
                result.record(step, names and names[number])
            yield result
        finally:
            result.store.close()
