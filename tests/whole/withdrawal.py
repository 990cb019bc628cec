"""People who praise replies and, from a later version on, complain until the watch steps in."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import cycle

import httpx
import openai

from tests.running_loop import Loop, wait_for

_SESSIONS = 6
_PRAISED = 40
"""Turns at least; the watch compares a session's later turns with these."""
_PRAISE, _COMPLAINT = "Thanks, that is perfect! ", "That is wrong. "
_QUESTIONS = cycle(
    f"Tom has {have} apples and gets {more} more. How many?"
    for have in range(2, 9)
    for more in range(2, 9)
)
"""So many that no session asks one twice: a client that repeats an exchange sends a request again,
and nothing follows it."""


@dataclass
class _Conversation:
    """One session; its client sends only the last exchange."""

    client: openai.OpenAI
    model: str
    exchange: tuple[str, str] | None = None

    def say(self, words: str) -> int:
        """Says what it thinks of the last reply and asks on; returns the version that answers."""
        question = next(_QUESTIONS)
        said = question if self.exchange is None else words + question
        before = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), self.exchange or (), strict=False)
        ]
        raw = self.client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=[*before, {"role": "user", "content": said}],  # pyright: ignore
            max_tokens=8,
        )
        self.exchange = (said, raw.parse().choices[0].message.content or "")
        return int(raw.headers["x-nextstate-version"])


def complain_until_withdrawn(loop: Loop, model: str, within_s: float) -> tuple[int, int]:
    """Praises until another version serves, then complains until the watch withdraws one.

    Returns the newest version that was complained about, and the one that serves afterwards.
    """
    end = time.monotonic() + within_s
    talks = [
        _Conversation(
            openai.OpenAI(
                base_url=f"{loop.url}/v1",
                api_key="x",
                max_retries=0,
                default_headers={"x-session-id": f"person {number}"},
            ),
            model,
        )
        for number in range(_SESSIONS)
    ]
    turns = 0
    first = newest = talks[0].say("")
    while turns < _PRAISED:
        for talk in talks:
            talk.say(_PRAISE)
            turns += 1
    # Nobody talks meanwhile: the learner has the machine to itself.
    wait_for(lambda: _serving(loop) != first, within_s)
    while not _withdrawn(loop):
        for talk in talks:
            newest = max(newest, talk.say(_COMPLAINT))
            turns += 1
        assert time.monotonic() < end, f"{turns} turns and none was withdrawn"
    while (serving := talks[0].say("")) in _withdrawn(loop):
        assert time.monotonic() < end, f"version {serving} still serves"
    return newest, serving


def _serving(loop: Loop) -> int:
    """The version that answers."""
    return int(httpx.get(f"{loop.url}/healthz").json()["version"])


def _withdrawn(loop: Loop) -> list[int]:
    """The versions that the watch has taken out of service."""
    return [
        version["number"]
        for version in loop.versions()
        if (version["reason"] or "").startswith("rolled back: ")
    ]
