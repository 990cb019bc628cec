"""Sessions, links and next states of agents that interleave, retry, fork, reset and truncate.

A generated agent knows which turn each of its requests continues; the store has to find it out from
the messages alone. `Agent` plays one agent's program and writes down the truth beside each request.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json, Timings
from nextstate.store import Store
from plugins.agents.profile import GENERIC, Profile
from proxy.capture import Capture
from proxy.exchange import Exchange, record_exchange

FEW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROFILE = Profile(GENERIC)
COMMON = ("Done.", "OK", "I will look into it.")
"""Replies that every agent gets to hear."""
AT_LENGTH = " It says what it did and why as models do." * 6
"""What makes a reply one that nobody else gets."""
CROWD = 24
"""More agents than candidates are looked at."""


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
        """The oldest messages go; the last reply stays."""
        last = max(
            (n for n, m in enumerate(self._history) if m["role"] == "assistant"), default=None
        )
        if last is not None:
            self._history = self._history[self.rng.randrange(last + 1) :]

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


class Played:
    """A store that has recorded every step, on disk."""

    def __init__(self, store: Store, profile: AgentProfile, vague: bool = False) -> None:
        self.store = store
        self.profile = profile
        self.vague = vague
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
            turn = record_exchange(recording, exchange, self.profile)
        self.parents[turn.id], self.sessions[turn.id] = turn.parent, turn.session

    def states(self, turn: str) -> list[str]:
        return [state.text for state in self.store.turns.next_states(turn)]


@contextmanager
def played(
    lanes: Sequence[Sequence[Step]],
    rng: Random,
    names: Sequence[str] | None = None,
    profile: AgentProfile = PROFILE,
    vague: bool = False,
) -> Generator[Played]:
    """The lanes recorded in a random order, each under its explicit session id if `names`.

    If `vague`, the ids are a person's or an app's.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Played(Store(StoreConfig(dir=str(Path(folder) / "state"))), profile, vague)
        try:
            for number, step in interleaved(lanes, rng):
                result.record(step, names and names[number])
            yield result
        finally:
            result.store.close()


def followed(lanes: Sequence[Sequence[Step]], order: Sequence[str]) -> dict[str, list[str]]:
    """What followed each turn first."""
    steps = {step.id: step for lane in lanes for step in lane}
    found: dict[str, list[str]] = {}
    for name in order:
        step = steps[name]
        if step.parent is not None:
            found.setdefault(step.parent, step.states)
    return found


def grouped(names: dict[str, str]) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = defaultdict(set)
    for turn, name in names.items():
        groups[name].add(turn)
    return {frozenset(group) for group in groups.values()}


@FEW
@given(programs(FORKING), st.randoms(use_true_random=False))
def test_every_request_finds_the_turn_that_it_continues(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with played(lanes, rng) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}
        conversations = {name: step.conversation for name, step in truth.items()}
        assert grouped(found.sessions) == grouped(conversations)
        expected = followed(lanes, list(found.parents))
        assert {name: found.states(name) for name in truth} == {
            name: expected.get(name, []) for name in truth
        }


@FEW
@given(programs(FORKING), st.randoms(use_true_random=False))
def test_the_order_in_which_agents_interleave_changes_nothing(
    lanes: list[list[Step]], rng: Random
) -> None:
    with played(lanes, rng) as one, played(lanes, rng) as other:
        assert one.parents == other.parents
        assert grouped(one.sessions) == grouped(other.sessions)
        assert {turn: one.states(turn) for turn in one.parents} == {
            turn: other.states(turn) for turn in other.parents
        }


@FEW
@given(programs(FORKING, unique=False), st.randoms(use_true_random=False))
def test_sessions_with_ids_of_their_own_never_mix(lanes: list[list[Step]], rng: Random) -> None:
    names = [f"session {number}" for number in range(len(lanes))]
    owner = {step.id: number for number, lane in enumerate(lanes) for step in lane}
    with played(lanes, rng, names) as found:
        for turn, number in owner.items():
            assert found.sessions[turn].partition("~")[0] == names[number]
            parent = found.parents[turn]
            assert parent is None or owner[parent] == number


@FEW
@given(programs(PLAIN, unique=False), st.randoms(use_true_random=False))
def test_agents_that_hear_the_same_replies_are_told_apart_by_what_was_said(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with played(lanes, rng) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}


@settings(FEW, max_examples=4)
@given(crowds(), st.integers(0, 2**32))
def test_so_are_more_of_them_than_are_looked_at(lanes: list[list[Step]], seed: int) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with played(lanes, Random(seed)) as found:
        assert found.parents == {name: step.parent for name, step in truth.items()}


@FEW
@given(
    programs(MOVES), st.randoms(use_true_random=False), st.sampled_from([None, "same", "different"])
)
def test_a_retried_turn_is_one_turn(lanes: list[list[Step]], rng: Random, ids: str | None) -> None:
    names = ids and [f"s{number if ids == 'different' else ''}" for number in range(len(lanes))]
    whole = {step.id for lane in lanes for step in lane if not step.cut}
    with played(lanes, rng, names or None) as found:
        assert set(found.store.turns.ids()) == whole
        assert found.store.counts().get("turns/main", 0) == len(whole)
        for turn in found.parents:
            assert found.store.turns.get(turn) is not None, "replaced turns can still be read"


@FEW
@given(programs(FORKING, unique=False), st.randoms(use_true_random=False))
def test_whatever_happens_a_turn_is_judged_at_most_once_and_by_what_really_followed(
    lanes: list[list[Step]], rng: Random
) -> None:
    truth = {step.id: step for lane in lanes for step in lane}
    with played(lanes, rng) as found:
        children: dict[str, list[Step]] = defaultdict(list)
        for turn, parent in found.parents.items():
            if parent is not None:
                children[parent].append(truth[turn])
        for turn in truth:
            states = found.states(turn)
            assert not states or states in [child.states for child in children[turn]]
        judged = [turn for turn in truth if found.states(turn)]
        assert sorted(found.store.judging.lease(1000, 60.0)) == sorted(judged)


def said(*texts: str) -> list[Json]:
    """A history that alternates, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def step(turn: str, messages: list[Json], reply: str, *, cut: bool = False) -> Step:
    return Step(turn, messages, {"role": "assistant", "content": reply}, cut, None, [], "")


def test_a_turn_that_was_replaced_by_its_retry_is_nobodys_parent() -> None:
    steps = [
        step("cut", said("go"), "Done.", cut=True),  # all of the text came, its end did not
        step("whole", said("go"), "Done."),
        step("next, cut", said("go", "Done.", "and now?"), "", cut=True),
        step("next", said("go", "Done.", "and now?"), "Yes."),
    ]
    with played([steps], Random(0)) as found:
        assert found.parents["next, cut"] == "whole"
        assert found.parents["next"] == "whole"
        assert found.store.turns.ids() == ["whole", "next"]


def test_a_request_sent_again_does_not_go_to_another_agent_that_got_the_same_reply() -> None:
    steps = [
        step("a1", said("a: go"), "OK"),
        step("b1", said("b: go"), "OK"),
        step("a2, cut", said("a: go", "OK", "a: and now?"), "", cut=True),
        step("a2", said("a: go", "OK", "a: and now?"), "Yes."),
    ]
    with played([steps], Random(0)) as found:
        assert found.parents["a2, cut"] == "a1"
        assert found.parents["a2"] == "a1"
        assert found.states("a1") == ["a: and now?"]
        assert found.states("b1") == []


OPENCLAW: AgentProfile = load_plugin("agents", "openclaw", None)
CARRIER: Json = {"role": "user", "content": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> time and place"}


def begun_by(*first: Json) -> tuple[list[Json], list[Json]]:
    """The first two requests of a conversation that hears "Done." and goes on as all do."""
    return [*first], [*first, *said("", "Done.", "No, that is wrong.")[1:]]


def only_the_system_differs(number: int) -> tuple[list[Json], list[Json]]:
    system: Json = {"role": "system", "content": f"You play character {number}."}
    return begun_by(system, {"role": "user", "content": "Hello"})


def only_a_picture_differs(number: int) -> tuple[list[Json], list[Json]]:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{number}"}}
    return begun_by({"role": "user", "content": [picture]})


def white_space_and_parts_change(number: int) -> tuple[list[Json], list[Json]]:
    """And the system tells the time, so that no message comes as it was."""
    first, second = begun_by({"role": "user", "content": f"Task {number}:\n\nlook"})
    parts = [{"type": "text", "text": f"Task {number}:"}, {"type": "text", "text": "look "}]
    now, later = ({"role": "system", "content": f"It is {hour} o'clock."} for hour in (8, 9))
    return [now, *first], [later, {"role": "user", "content": parts}, *second[1:]]


def carriers_come_and_go(number: int) -> tuple[list[Json], list[Json]]:
    first, second = begun_by({"role": "user", "content": f"[Sun 2026-11-22 08:38 UTC] {number}"})
    return [*first, CARRIER], [*second, CARRIER]


def only_the_runtime_differs(number: int) -> tuple[list[Json], list[Json]]:
    first, second = begun_by(
        {"role": "user", "content": f"Hello\n\nRuntime: agent=main | sessionId={number}"}
    )
    return [*first, CARRIER], [*second, CARRIER]


@pytest.mark.parametrize(
    ("requests", "profile"),
    [
        (only_the_system_differs, PROFILE),
        (only_a_picture_differs, PROFILE),
        (white_space_and_parts_change, PROFILE),
        (carriers_come_and_go, OPENCLAW),
        (only_the_runtime_differs, OPENCLAW),
    ],
)
def test_any_number_of_agents_that_hear_the_same_keep_their_own_next_states(
    requests: Callable[[int], tuple[list[Json], list[Json]]], profile: AgentProfile
) -> None:
    both = [requests(number) for number in range(2 * CROWD)]
    steps = [step(f"first {n}", first, "Done.") for n, (first, _) in enumerate(both)]
    steps += [step(f"second {n}", second, "I see.") for n, (_, second) in enumerate(both)]
    with played([steps], Random(0), profile=profile) as found:
        for number in range(len(both)):
            assert found.parents[f"second {number}"] == f"first {number}"
            assert found.states(f"first {number}") == ["No, that is wrong."]


CALL = {"name": "exec", "arguments": '{"command": "cat README.md && git status && ls -la"}'}
FIRST_CALL: Json = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
}


@pytest.mark.parametrize("text", ["Done.", "", "Hello! How can I help you today?", None])
@pytest.mark.parametrize("before", [[], said("Hi", "Hi!"), said("Hi", "")])
def test_a_reply_that_many_get_links_no_strangers(text: str | None, before: list[Json]) -> None:
    reply = FIRST_CALL if text is None else {"role": "assistant", "content": text}
    system: Json = {"role": "system", "content": "You are careful."}
    own = [*before, {"role": "user", "content": "Sort the files."}]
    one = Step("one", [system, *own], reply, False, None, [], "")
    for other in (said("Write a poem."), said("a", "b", "Write a poem."), said("a", "", "Write.")):
        messages = [system, *other, reply, {"role": "user", "content": "No, that is wrong."}]
        with played([[one, step("stranger", messages, "I see.")]], Random(0)) as found:
            assert found.parents["stranger"] is None
            assert found.states("one") == []


def test_what_is_left_of_a_history_that_was_cut_finds_its_turn() -> None:
    first = said("Sort the files.", "By name?", "By date.")
    second = [*said("", "Done.", "Thanks. And now back.")[1:]]
    for left in (first[2:], first[1:]):
        steps = [step("one", first, "Done."), step("two", [*left, *second], "I see.")]
        with played([steps], Random(0)) as found:
            assert found.parents["two"] == "one"


def test_a_summary_hides_what_a_reply_followed_unless_that_or_the_client_tells() -> None:
    summary = said("Summary: files were sorted.")
    for reply, names, parent in (
        ("Done.", None, None),
        ("Done.", ["chat"], "one"),
        ("Done. " + AT_LENGTH, None, "one"),
    ):
        goes_on = [*summary, *said("", reply, "Thanks.")[1:]]
        steps = [step("one", said("Sort the files."), reply), step("two", goes_on, "I see.")]
        with played([steps], Random(0), names) as found:
            assert found.parents["two"] == parent


@pytest.mark.parametrize("system", ["You are careful.", "It is {} o'clock."])
def test_of_conversations_that_are_all_alike_the_newest_is_continued(system: str) -> None:
    def asked(hour: int, *texts: str) -> list[Json]:
        return [{"role": "system", "content": system.format(hour)}, *said(*texts)]

    steps = [step(f"first {n}", asked(n, "go"), "Done.") for n in range(CROWD)]
    steps.append(step("second", asked(CROWD, "go", "Done.", "and now?"), "Yes."))
    with played([steps], Random(0)) as found:
        assert found.parents["second"] == f"first {CROWD - 1}"
