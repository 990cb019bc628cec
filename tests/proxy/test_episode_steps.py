"""Whatever replies an agent drops from its history, each turn is followed by what it was told."""

from __future__ import annotations

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exchanges import exchange
from nextstate.config import StoreConfig
from nextstate.episodes import Episode
from nextstate.records import Json, Source
from nextstate.store import Store
from proxy.exchange import record_exchange
from tests.proxy.conversations import PROFILE
from tests.proxy.environment import said, user

REPLIES = st.sampled_from(["ls", "cat a", ""])
"""Few, so that many are equal."""
TOLD = st.sampled_from(["a b", "error", "$"])
STEPS = st.lists(st.tuples(REPLIES, TOLD, st.booleans()), min_size=1, max_size=8)


@settings(max_examples=40)
@given(episodes=st.lists(STEPS, min_size=1, max_size=3), data=st.data())
def test_each_turn_of_interleaved_episodes_is_followed_by_what_it_was_told(
    episodes: list[list[tuple[str, str, bool]]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(StoreConfig(dir=folder))
        names = [f"e-{number}" for number in range(len(episodes))]
        store.episodes.open([Episode(name, "main", "shell", "go") for name in names], None)
        left = {name: list(enumerate(steps)) for name, steps in zip(names, episodes, strict=True)}
        histories: dict[str, list[Json]] = {name: [user("go")] for name in names}
        while left:
            name = data.draw(st.sampled_from(sorted(left)))
            step, (reply, told, dropped) = left[name].pop(0)
            if not left[name]:
                del left[name]
            sent: Json = {"model": "base", "messages": [*histories[name]]}
            with store.recording() as recording:
                record_exchange(
                    recording,
                    exchange(f"{name}/{step}", sent, said(reply))._replace(episode=name),
                    PROFILE,
                )
            histories[name] += [user(told)] if dropped else [said(reply), user(told)]
        for name, steps in zip(names, episodes, strict=True):
            turns = [f"{name}/{step}" for step in range(len(steps))]
            assert store.episodes.turn_ids(name) == turns
            followed = [store.turns.next_states(turn) for turn in turns]
            assert [[(s.source, s.text) for s in states] for states in followed] == [
                *([(Source.ENVIRONMENT, told)] for _, told, _ in steps[:-1]),
                [],
            ]
        store.close()
