"""Agents that talk, call tools, retry, fork, reset and cut their history, as hypothesis strategies.

A generated agent knows which turn each of its requests continues, and writes it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from hypothesis import strategies as st

from nextstate.records import Json
from tests.proxy.conversations import AT_LENGTH, CROWD, Step

COMMON = ("Done.", "OK", "I will look into it.")
"""Replies that every agent gets."""


@dataclass
class Agent:
    """Plays a program of moves; `unique` replies are long and occur nowhere else."""

    name: str
    unique: bool
    rng: Random
    common: Sequence[str] = COMMON
    """What it hears where replies are not unique; if it is only one, no call of a tool."""
    steps: list[Step] = field(default_factory=list)
    _history: list[Json] = field(default_factory=list)
    _last: str | None = None
    """The turn behind the last assistant message, if the proxy saw it."""
    _forks: list[tuple[list[Json], str | None, str]] = field(default_factory=list)
    _chat: str = ""
    _said: int = 0
    _chats: int = 0

    def play(self, moves: Sequence[str]) -> list[Step]:
        """The requests that the moves come to."""
        self._reset()
        for move in moves:
            getattr(self, f"_{move}")()
        return self.steps

    # The moves

    def _talk(self) -> None:
        self._ask([{"role": "user", "content": self._text("user")}])

    def _tools(self) -> None:
        """Results of the calls that the last reply made, and perhaps a word from the user."""
        calls = self._history[-1].get("tool_calls") if self._history else None
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": self._text("result")}
            for call in calls or ()
        ]
        if not results or self.rng.random() < 0.3:
            results.append({"role": "user", "content": self._text("user")})
        self._ask(results)

    def _retry(self) -> None:
        """A request that is cut, once or more often, and sent again."""
        self._ask([{"role": "user", "content": self._text("user")}], cuts=self.rng.randrange(1, 4))

    def _unseen(self) -> None:
        """A turn that went another way than through the proxy."""
        self._history.append({"role": "user", "content": self._text("user")})
        self._history.append(self._reply(unseen=True))
        self._last = None

    def _truncate(self) -> None:
        """The oldest messages go; the last reply stays, and what it answers."""
        last = max(
            (n for n, m in enumerate(self._history) if m["role"] == "assistant"), default=None
        )
        if last is not None:
            self._history = self._history[self.rng.randrange(max(last, 1)) :]

    def _compact(self) -> None:
        """The whole history becomes a summary: nobody can tell what it continues."""
        if self._last is not None or self._history:
            self._history = [{"role": "user", "content": self._text("summary")}]
            self._last = None
            self._new_chat()

    def _fork(self) -> None:
        """Keeps the history as it is now for later; without any there is nothing to go back to."""
        if self._history:
            self._forks.append((list(self._history), self._last, self._chat))

    def _back(self) -> None:
        """Goes on from a fork."""
        if self._forks:
            self._history, self._last, self._chat = self.rng.choice(self._forks)
            self._history = list(self._history)

    def _reset(self) -> None:
        self._history, self._last = [], None
        self._new_chat()

    # What they are made of

    def _new_chat(self) -> None:
        self._chats += 1
        self._chat = f"{self.name}/{self._chats}"

    def _ask(self, said: list[Json], cuts: int = 0) -> None:
        replied = any(message["role"] == "assistant" for message in self._history)
        if replied and self._last is None:
            self._new_chat()  # behind an unseen turn: the store cannot know what was before
        self._history += said
        for attempt in range(cuts + 1):
            reply = self._reply(unseen=False)
            cut = attempt < cuts
            if cut:
                reply = {"role": "assistant", "content": (reply["content"] or "")[:5]}
            step = Step(
                id=f"turn_{self.name}_{len(self.steps)}",
                messages=list(self._history),
                reply=reply,
                cut=cut,
                parent=self._last,
                states=[message["content"] for message in said],
                conversation=self._chat,
            )
            self.steps.append(step)
        self._history.append(self._kept(reply))
        self._last = step.id

    def _reply(self, *, unseen: bool) -> Json:
        text = self._text("unseen" if unseen else "reply") if self.unique else self._common()
        text += AT_LENGTH if self.unique else ""
        if self.rng.random() < 0.3:
            text = f"<think>{self.rng.random()}</think>\n{text}"
        reply: Json = {"role": "assistant", "content": text}
        if len(self.common) > 1 and self.rng.random() < 0.4:
            arguments = f'{{"path": "{text if self.unique else "."}", "depth": 1}}'
            function = {"name": "ls", "arguments": arguments.replace("\n", "")}
            call = {"id": f"call_{self.rng.random()}", "type": "function", "function": function}
            reply = {"role": "assistant", "content": None, "tool_calls": [call]}
        return reply

    def _kept(self, reply: Json) -> Json:
        """The reply as an agent keeps it: without thoughts, calls renamed and reformatted."""
        kept = {**reply, "content": (reply["content"] or "").rpartition("</think>")[2].strip()}
        if "tool_calls" in reply:
            function = reply["tool_calls"][0]["function"]
            arguments = function["arguments"].replace(", ", ",").replace(": ", ":")
            call = {"id": "callx", "type": "function"}
            kept["tool_calls"] = [{**call, "function": {**function, "arguments": arguments}}]
        return kept

    def _common(self) -> str:
        return self.rng.choice(self.common)

    def _text(self, what: str) -> str:
        self._said += 1
        return f"{what} {self._said} of {self.name}"


MOVES = (
    *("talk", "talk", "talk", "talk", "talk", "tools", "tools", "retry", "retry"),
    *("truncate", "truncate", "truncate", "unseen", "compact", "reset"),
)
PLAIN = ("talk", "talk", "tools", "retry")
FORKING = (*MOVES, "fork", "back")


@st.composite
def programs(draw: st.DrawFn, moves: Sequence[str], unique: bool = True) -> list[list[Step]]:
    """The requests of two to four agents."""
    lists = draw(
        st.lists(st.lists(st.sampled_from(moves), min_size=3, max_size=12), min_size=2, max_size=3)
    )
    seed = draw(st.integers(0, 2**32))
    return [
        Agent(f"a{number}", unique, Random(seed + number)).play(moves)
        for number, moves in enumerate(lists)
    ]


@st.composite
def crowds(draw: st.DrawFn) -> list[list[Step]]:
    """The requests of agents of whom each hears the same all the time."""
    seed = draw(st.integers(0, 2**32))
    moves = draw(st.lists(st.sampled_from(PLAIN), min_size=2, max_size=3))
    return [
        Agent(f"a{number}", False, Random(seed + number), common=COMMON[:1]).play(moves)
        for number in range(CROWD)
    ]
