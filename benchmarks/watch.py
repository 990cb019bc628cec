"""How often the watch finds a worse version, and how often it blames one that is not worse.

Simulated users talk in sessions, several at a time, while a version is made every 16 turns. Each
session has a level of its own, so that its scores are alike. No time passes and no model runs. The
watch's exact test needs only that a session's scores would be exchangeable if no version were
worse: the last worlds break that on purpose.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from random import Random

from rich import box
from rich.console import Console
from rich.table import Table

from learner.watch import TURNS, Watch
from nextstate.records import JudgedTurn

VERSION_TURNS = 16
"""Judged turns that a version serves before the next one is made."""
BEFORE, AFTER = 800, 150
"""Judged turns before the fall, and those within which it should be found."""
_HARDER = BEFORE - 100
"""From this turn on new sessions are harder, in the last column."""
_CLIMB = 640
"""So many turns before the fall the lineage begins to get better."""
_NEUTRAL = 0.1
"""The share of scores 0."""


@dataclass(frozen=True, slots=True)
class World:
    """Who talks, and about what."""

    live: int
    """Sessions at a time; every turn is of a random one."""
    turns: int
    """Judged turns of a session."""
    mean: float = 0.7
    """The mean score before the fall."""
    spread: float = 0.1
    """Standard deviation of the sessions' levels."""
    harder: float = 0.0
    """New sessions score so much lower from turn _HARDER on."""
    topic: float = 0.0
    """Standard deviation of the level of 10 turns in a row of a session."""
    tiring: float = 0.0
    """How much lower a session scores after 100 turns."""
    climb: float = 0.0
    """How much lower all scores are _CLIMB turns before the fall; they get better until then."""


class _Session:
    def __init__(self, name: str, level: float, left: int) -> None:
        self.name, self.level, self.left = name, level, left
        self.age, self.topic = 0, 0.0


def talk(random: Random, world: World, fall: float, count: int) -> list[JudgedTurn]:
    """`count` judged turns, in which the mean score falls by `fall` after BEFORE of them."""
    live: list[_Session] = []
    turns: list[JudgedTurn] = []
    began = 0
    for at in range(count):
        while len(live) < world.live:
            began += 1
            level = random.gauss(world.mean, world.spread)
            level -= world.harder if at >= _HARDER else 0.0
            left = world.turns if at else random.randint(1, world.turns)
            live.append(_Session(f"s{began}", level, left))
        session = random.choice(live)
        if session.age % 10 == 0:
            session.topic = random.gauss(0.0, world.topic)
        mean = session.level + session.topic - world.tiring * session.age / 100
        mean -= world.climb * min(max(BEFORE - at, 0) / _CLIMB, 1.0)
        mean -= fall if at >= BEFORE else 0.0
        turns.append(JudgedTurn(session.name, at // VERSION_TURNS, _score(random, mean)))
        session.age += 1
        session.left -= 1
        if not session.left:
            live.remove(session)
    return turns


def alarm(random: Random, world: World, fall: float = 0.0, first: int = BEFORE) -> int | None:
    """How many turns after the fall the watch withdraws a version; it looks from `first` on."""
    turns = talk(random, world, fall, BEFORE + AFTER)
    watch = Watch()
    for at in [*range(first, BEFORE + AFTER, VERSION_TURNS), BEFORE + AFTER]:
        chain = list(range(turns[at - 1].version + 1))
        if watch.fall(chain, turns[max(0, at - TURNS) : at], -1):
            return at - BEFORE
    return None


def _score(random: Random, mean: float) -> int:
    bound = 1 - _NEUTRAL
    good = (bound + min(max(mean, -bound), bound)) / 2
    drawn = random.random()
    return 1 if drawn < good else 0 if drawn < good + _NEUTRAL else -1


_WORLDS = {
    "one session that goes on": World(1, 10_000),
    "4 at a time, 400 turns each": World(4, 400),
    "4 at a time, 200 turns each": World(4, 200),
    "4 at a time, 100 turns each": World(4, 100),
    "4 at a time, 40 turns each": World(4, 40),
    "4 at a time, 8 turns each": World(4, 8),
    "one session, mean score 0.5": World(1, 10_000, mean=0.5),
    "4 of 100, levels differ by 0.3": World(4, 100, mean=0.5, spread=0.3),
    "4 of 100, topics differ by 0.2": World(4, 100, topic=0.2),
    "one session, topics differ by 0.2": World(1, 10_000, topic=0.2),
    "4 of 100, 0.2 lower after 100 turns": World(4, 100, tiring=0.2),
    "one session, climbs from 0.2": World(1, 10_000, climb=0.5),
    "4 of 400, climbs from 0.2": World(4, 400, climb=0.5),
}


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="of each number (default: 200)")
    parser.add_argument("--only", default="", metavar="TEXT", help="worlds with this in the name")
    given = parser.parse_args()
    runs = range(given.runs)
    table = Table(box=box.SIMPLE, title=f"runs of {BEFORE} + {AFTER} judged turns in which …")
    for heading in (
        "sessions",
        f"a fall by 0.3 is found within {AFTER}",
        "by 0.6",
        f"a good version is withdrawn in {AFTER}",
        "in all of them",
        "… if older ones had questions easier by 0.6",
    ):
        table.add_column(heading, justify="left" if heading == "sessions" else "right")

    def share(found: list[int | None], least: int) -> str:
        return f"{sum(at is not None and at > least for at in found) / len(found):.1%}"

    for name, world in _WORLDS.items():
        if given.only not in name:
            continue
        shifted = replace(world, harder=0.6)
        quiet = [alarm(Random(f"quiet/{n}"), world, first=VERSION_TURNS) for n in runs]
        table.add_row(
            name,
            share([alarm(Random(f"fall/{n}"), world, 0.3) for n in runs], 0),
            share([alarm(Random(f"collapse/{n}"), world, 0.6) for n in runs], 0),
            share(quiet, 0),
            share(quiet, -BEFORE),
            share(
                [alarm(Random(f"harder/{n}"), shifted, first=_HARDER) for n in runs],
                _HARDER - BEFORE,
            ),
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
