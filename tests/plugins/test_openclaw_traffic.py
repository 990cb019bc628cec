"""Real traffic of OpenClaw 2026.9.6, labelled by hand: kind, session, turn and next state.

`data/openclaw/*.jsonl` holds one request a line with the reply that it got; texts over 300
characters and everything that no link depends on are cut. The labels beside it were made by reading
the requests, without this code. An aside (`/btw`) and a typed command are no next state.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from random import Random

import pytest

from nextstate.config import StoreConfig
from nextstate.hooks import load_plugin
from nextstate.records import Json, Timings, TurnKind
from nextstate.store import Store
from proxy.capture import Capture
from proxy.exchange import Exchange, record_exchange
from proxy.linking.names import explicit_session

QUEUED = (
    "[Queued user message from a previous active turn; preserved as context only. Continue with "
    "the active prompt below.]"
)
GO_ON = (
    "Continue the current task from the existing transcript, preserving completed work. If an "
    "action was interrupted, inspect its state before deciding whether to retry it. Do not restart "
    "the task or repeat completed actions."
)
WORDS = re.compile(r"(\[\w{3} [^\]]*\] )?(.*?)(\n\nRuntime: [^\n]*)?", re.DOTALL)
"""The stamp, the person's words, and the line about the runtime."""
DATA = Path(__file__).parent / "data" / "openclaw"


def read(name: str) -> list[Json]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def turn_id(number: int) -> str:
    return f"turn_{number}"


def exchange_of(line: Json, *, cut: bool = False, turn: str | None = None) -> Exchange:
    capture = Capture()
    if not cut:
        choice = {"index": 0, "message": line["reply"], "finish_reason": "stop"}
        capture.body({"model": "base", "choices": [choice]})
    return Exchange(
        turn_id=turn or turn_id(line["n"]),
        lineage="main",
        explicit_session=explicit_session(line["headers"], line["body"]),
        request=line["body"],
        capture=capture,
        policy_version=0,
        timings=Timings(0.0, 0.0, 0.0),
        cut=cut,
        untrainable="the engine cut the reply" if cut else None,
    )


def wrapped_anew(line: Json) -> Json:
    """The same request as OpenClaw sends it after a failure: the person's last words are wrapped.

    Seen of 2026.9.6 when its engine was killed. What it wrote itself is sent again as it was.
    """
    messages = list(line["body"]["messages"])
    last = max((at for at, m in enumerate(messages) if is_a_persons(m)), default=None)
    if last is None or any(m["role"] != "user" for m in messages[last:]):
        return line
    found = WORDS.fullmatch(messages[last]["content"])
    assert found is not None
    stamp, words, runtime = (part or "" for part in found.groups())
    content = f"{stamp}{QUEUED}\n{words}\n\n{GO_ON}{runtime}"
    messages[last] = messages[last] | {"content": content}
    return line | {"body": line["body"] | {"messages": messages}}


def is_a_persons(message: Json) -> bool:
    text = message.get("content")
    stamped = isinstance(text, str) and re.match(r"\[\w{3} [^\]]*\] [^\[/]", text)
    return message["role"] == "user" and bool(stamped)


class Recorded:
    """The recorded traffic in a store, with its labels."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(StoreConfig(dir=str(folder)))
        self.profile = load_plugin("agents", "openclaw", None)
        self.sessions: dict[str, str] = {}

    def add(self, exchange: Exchange) -> None:
        with self.store.recording() as recording:
            turn = record_exchange(recording, exchange, self.profile)
        self.sessions[turn.id] = turn.session

    def check(self, labels: list[Json]) -> None:
        """Every label holds."""
        expected: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for label in labels:
            for state in label["next_states"]:
                expected[turn_id(state["turn"])].append((state["source"], state["text"]))
        ours: dict[str, set[str]] = defaultdict(set)
        theirs: dict[str, set[str]] = defaultdict(set)
        for label in labels:
            turn = self.store.turns.get(turn_id(label["n"]))
            assert turn is not None
            where = f"request {label['n']}: {label['note']}"
            assert turn.kind == label["kind"], where
            found = [(s.source.value, s.text) for s in self.store.turns.next_states(turn.id)]
            assert found == expected[turn.id], where
            if turn.kind is TurnKind.MAIN:
                parent = label["continues"]
                assert turn.parent == (None if parent is None else turn_id(parent)), where
                ours[label["session"]].add(turn.session)
                theirs[turn.session].add(label["session"])
        assert {len(names) for names in (*ours.values(), *theirs.values())} == {1}


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


@pytest.mark.parametrize("name", ["local", "gateway"])
def test_every_request_finds_its_turn_its_session_and_its_next_state(
    recorded: Recorded, name: str
) -> None:
    for line in read(f"{name}.jsonl"):
        recorded.add(exchange_of(line))
    recorded.check(read(f"{name}.labels.jsonl"))


@pytest.mark.parametrize("seed", range(5))
def test_interleaved_agents_and_retried_requests_change_no_label(
    recorded: Recorded, seed: int
) -> None:
    rng = Random(seed)
    streams = [read("local.jsonl"), read("gateway.jsonl")]
    numbers = {
        name: [x["n"] for x in read(f"{name}.labels.jsonl")] for name in ("local", "gateway")
    }
    shift = max(numbers["gateway"])
    for line in streams[0]:
        line["n"] += shift
    while any(streams):
        line = rng.choice([stream for stream in streams if stream]).pop(0)
        for attempt in range(rng.choice((0, 0, 1, 3))):
            recorded.add(exchange_of(line, cut=True, turn=f"cut_{line['n']}_{attempt}"))
            line = wrapped_anew(line)
        recorded.add(exchange_of(line))
    local = read("local.labels.jsonl")
    for label in local:
        label["n"] += shift
        label["continues"] = label["continues"] and label["continues"] + shift
        for state in label["next_states"]:
            state["turn"] += shift
    labels = local + read("gateway.labels.jsonl")
    recorded.check(labels)
    listed = set(recorded.store.turns.ids(1000))
    assert listed == {turn_id(label["n"]) for label in labels}, "a retried request is one turn"
