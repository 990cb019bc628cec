"""Does recording a turn cost more in a large store than in a small one?

One store of each size; the rounds take them in turn, and within a round the kinds of turn. The
smallest is measured twice: what its second row differs by is noise. Small stores begin every round
anew, so that they stay small. Timed is one whole transaction, as the proxy's writer runs it.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter

from rich.console import Console
from rich.progress import Progress

from benchmarks.conversations import FILE, PROFILE, TURNS, Conversation, Filler
from nextstate.config import StoreConfig
from nextstate.recording import Link
from nextstate.records import Turn
from nextstate.store import Store
from proxy.exchange import Exchange, record_exchange
from proxy.linking import message_hashes, reply_keys

KINDS = {
    "continues": "a turn of ten messages that continues a stored one",
    "new": "a turn that begins a conversation",
    "retry": "a turn that takes the place of a cut one",
    "link": "linking alone: the search for the turn that ten messages continue",
}
SIZES = (1_000, 10_000, 100_000)
FULL = 1_000_000
_ANEW = 10_000
"""Stores up to this size begin every round as they were filled."""
_WARM_UP = 20
_NEW = itertools.count(1_000_000_000)
"""Numbers of conversations that no store holds."""
_EXAMPLES = """\
examples:
  python -m benchmarks.growth
  python -m benchmarks.growth --full            with a million turns (3 GB in --dir)
  python -m benchmarks.growth --recordings 100 --rounds 2 --sizes 1000 4000
"""


@dataclass(slots=True)
class Row:
    """One line of the tables: a store and what was measured on it."""

    name: str
    turns: int
    filled: Path
    """Its folder as it was filled."""
    found: dict[str, list[list[float]]] = field(
        default_factory=lambda: {kind: [] for kind in KINDS}
    )
    """Milliseconds, by kind and by round."""


def fill(folder: Path, sizes: list[int], progress: Progress) -> dict[int, Path]:
    """A folder with a store of each size; the larger ones grow out of the smaller."""
    task = progress.add_task("filling", total=sizes[-1])
    grown = folder / "grown"
    filler = Filler(grown)
    stores: dict[int, Path] = {}
    for size in sizes:
        filler.fill(size, lambda done: progress.update(task, completed=done))
        stores[size] = grown
        if size != sizes[-1]:
            stores[size] = folder / str(size)
            stores[size].mkdir()
            shutil.copy(grown / FILE, stores[size])
    filler.close()
    return stores


def measure(row: Row, folder: Path, recordings: int, random: Random) -> None:
    """One round on one store: `recordings` of every kind, in turn."""
    place = row.filled
    if row.turns <= _ANEW:
        place = folder / "anew"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(row.filled, place)
    store = Store(StoreConfig(dir=str(place)))
    for _ in range(_WARM_UP):
        _record(store, Conversation(next(_NEW)).exchange(0))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(recordings):
        stored = Conversation(random.randrange(row.turns // TURNS))
        last = stored.turn_id(TURNS - 1)
        found["link"].append(_link(store, stored, last))
        spent, turn = _record(store, stored.exchange(TURNS, _fresh_id()))
        assert turn.parent == last, "the request did not find its turn"
        found["continues"].append(spent)
        spent, turn = _record(store, Conversation(next(_NEW)).exchange(0))
        assert turn.parent is None
        assert turn.index == 0
        found["new"].append(spent)
        again = Conversation(next(_NEW))
        _, cut = _record(store, again.exchange(0, _fresh_id(), cut=True))
        spent, turn = _record(store, again.exchange(0))
        assert turn.session == cut.session, "the retry did not find the cut turn"
        found["retry"].append(spent)
    store.close()
    for kind, values in found.items():
        row.found[kind].append(values)


def table(kind: str, rows: list[Row]) -> str:
    """One kind of recording over all sizes, as Markdown."""
    first = rows[0].found[kind]
    lines = [
        f"| {KINDS[kind]}: stored turns | p50, ms (rounds) | p99, ms (rounds) "
        "| p50, of the first row's | p99, of the first row's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = row.found[kind]
        cells = [f"| {row.name} "]
        cells += [f"| {_spread(found, share)} " for share in (0.5, 0.99)]
        cells += [f"| {_pooled(found, s) / _pooled(first, s):.2f} " for s in (0.5, 0.99)]
        lines.append("".join(cells) + "|")
    return "\n".join(lines)


def _record(store: Store, exchange: Exchange) -> tuple[float, Turn]:
    started = perf_counter()
    with store.recording() as recording:
        turn = record_exchange(recording, exchange, PROFILE)
    return 1000 * (perf_counter() - started), turn


def _link(store: Store, stored: Conversation, last: str) -> float:
    messages = stored.messages(TURNS)
    with store.recording() as recording:
        started = perf_counter()
        history = reply_keys(messages, None)
        assert history is not None
        link = Link(*history, message_hashes(messages))
        parent = recording.parent("main", link, stored.name)
        spent = 1000 * (perf_counter() - started)
    assert parent is not None
    assert parent.id == last
    return spent


def _fresh_id() -> str:
    return f"turn_{uuid.uuid4().hex[:20]}"


def _pooled(found: list[list[float]], share: float) -> float:
    return _quantile([value for values in found for value in values], share)


def _spread(found: list[list[float]], share: float) -> str:
    """Of all rounds together, with the lowest and the highest round."""
    each = [_quantile(values, share) for values in found]
    return f"{_pooled(found, share):.3f} ({min(each):.3f} … {max(each):.3f})"


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def report(rows: list[Row], files: Mapping[int, Path]) -> str:
    """All tables, and what was measured."""
    recordings = sum(len(values) for values in rows[0].found["new"])
    sizes = ", ".join(
        f"{size:,} turns {(path / FILE).stat().st_size / 1e6:.0f} MB"
        for size, path in files.items()
    )
    told = f"{recordings} recordings of each kind, {len(rows[0].found['new'])} rounds. {sizes}."
    return "\n\n".join([*(table(kind, rows) for kind in KINDS), told])


def main() -> None:
    """Fills, measures and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="What recording a turn costs in stores of different sizes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), metavar="TURNS", help="stored turns"
    )
    parser.add_argument("--full", action="store_true", help=f"also {FULL:,} turns")
    parser.add_argument("--recordings", type=int, default=2000, help="of a kind (default: 2000)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--dir", type=Path, help="where the stores lie for the time being")
    options = parser.parse_args()
    sizes = sorted({*options.sizes, *([FULL] if options.full else [])})
    with (
        tempfile.TemporaryDirectory(prefix="nextstate-growth-", dir=options.dir) as name,
        Progress(console=Console(stderr=True)) as progress,
    ):
        folder, random = Path(name), Random(1)
        stores = fill(folder, sizes, progress)
        rows = [Row(f"{size:,}", size, stores[size]) for size in sizes]
        rows.insert(1, Row(f"{sizes[0]:,} again", sizes[0], stores[sizes[0]]))
        task = progress.add_task("recording", total=options.rounds * len(rows))
        for number in range(options.rounds):
            for row in rows if number % 2 else rows[::-1]:
                measure(row, folder, options.recordings // options.rounds, random)
                progress.advance(task)
        print(report(rows, stores))


if __name__ == "__main__":
    main()
