"""Does recording a turn cost more in a large store than in a small one?

There is one store of each size. Each round measures all stores, and on each store all kinds of
turn. The smallest store is measured twice: the difference between its two rows is noise. Stores up
to 10 000 turns begin every round as they were filled, so that they stay small.

The time is that of one whole transaction, as the proxy's writer runs it. Pages read are read calls
to the system: pages that were not in SQLite's own cache. Their number does not depend on how busy
the machine is. Every round begins with the whole file in the system's cache. The report ends with
the bytes that still came from the disk, because one page from the disk costs more than linking.

The conversation to continue is drawn from all that are stored. Agents mostly continue a recent one,
so that kind is measured too, after all others, because it adds the most turns.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter

import psutil
from rich.console import Console
from rich.progress import Progress

from benchmarks.conversations import FILE, PROFILE, TURNS, Conversation, Filler
from nextstate.config import StoreConfig
from nextstate.records import Turn, new_id
from nextstate.store import Store
from proxy.exchange import Exchange, record_exchange
from proxy.linking.history import Scope, link_of, read_history
from proxy.linking.parents import find_parent

KINDS = {
    "continues": "a turn of ten messages that continues a stored one",
    "recent": "a turn of ten messages that continues one of the last that were recorded",
    "new": "a turn that begins a conversation",
    "retry": "a turn that takes the place of a cut one",
    "link": "linking only: the search for the turn that ten messages continue",
}
SIZES = (1_000, 10_000, 100_000)
_ANEW = 10_000
"""Largest store that begins every round as it was filled."""
_WARM_UP = 20
_ACTIVE = 32
"""Conversations that run at the same time where recent ones are continued."""
_CHECKPOINT_EVERY = 50
"""Recordings of each kind."""
_NEW = itertools.count(1_000_000_000)
"""Numbers of conversations that are in no store."""
_PROCESS = psutil.Process()
_EXAMPLES = """\
examples:
  python -m benchmarks.growth
  python -m benchmarks.growth --sizes 1000 1000000    (3 GB in --dir)
  python -m benchmarks.growth --recordings 100 --rounds 2 --sizes 1000 4000
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one recording."""

    ms: float
    reads: int
    """Read calls to the system."""


@dataclass(slots=True)
class Row:
    """One row of the tables: a store and its measurements."""

    name: str
    turns: int
    filled: Path
    """The folder of the store as it was filled."""
    found: dict[str, list[list[Cost]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """By kind and by round."""
    disk_bytes: int = 0
    """Bytes read from the disk in all rounds."""


def fill(folder: Path, sizes: list[int], progress: Progress) -> dict[int, Path]:
    """The folder of a store of each size; each grows out of the smaller one."""
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
    _read_through(place / FILE)
    disk_bytes = _disk_bytes()
    store = Store(StoreConfig(dir=str(place)))
    for _ in range(_WARM_UP):
        _record(store, Conversation(next(_NEW)).exchange(0, new_id("turn")))
    found: dict[str, list[Cost]] = {kind: [] for kind in KINDS}
    for number in range(recordings):
        stored = Conversation(random.randrange(row.turns // TURNS))
        last = stored.turn_id(TURNS - 1)
        found["link"].append(_link(store, stored, last))
        found["continues"].append(_continue(store, stored, last))
        cost, turn = _record(store, Conversation(next(_NEW)).exchange(0, new_id("turn")))
        assert turn.parent is None
        assert turn.index == 0
        found["new"].append(cost)
        again = Conversation(next(_NEW))
        _, cut = _record(store, again.exchange(0, new_id("turn"), cut=True))
        cost, turn = _record(store, again.exchange(0, new_id("turn")))
        assert turn.session == cut.session, "the retry did not find the cut turn"
        found["retry"].append(cost)
        _look_after(store, number)
    active = deque(_begun(store) for _ in range(_ACTIVE))
    for number in range(recordings):
        found["recent"].append(_continue(store, *active.popleft()))
        active.append(_begun(store))
        _look_after(store, number)
    store.close()
    row.disk_bytes += _disk_bytes() - disk_bytes
    for kind, costs in found.items():
        row.found[kind].append(costs)


def table(kind: str, rows: list[Row]) -> str:
    """One kind of recording over all sizes, as Markdown."""
    first = rows[0].found[kind]
    lines = [
        f"| {KINDS[kind]}: stored turns | p50, ms (rounds) | p99, ms (rounds) "
        "| p50, of the first row's | p99, of the first row's | pages read, mean |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = row.found[kind]
        cells = [f"| {row.name} "]
        cells += [f"| {_spread(found, share)} " for share in (0.5, 0.99)]
        cells += [f"| {_pooled(found, s) / _pooled(first, s):.2f} " for s in (0.5, 0.99)]
        cells.append(f"| {statistics.fmean(c.reads for costs in found for c in costs):.2f} ")
        lines.append("".join(cells) + "|")
    return "\n".join(lines)


def _record(store: Store, exchange: Exchange) -> tuple[Cost, Turn]:
    reads, started = _reads(), perf_counter()
    with store.recording() as recording:
        turn = record_exchange(recording, exchange, PROFILE)
    return _cost(reads, started), turn


def _continue(store: Store, stored: Conversation, last: str) -> Cost:
    """Records the next turn of a conversation whose last stored turn is `last`."""
    cost, turn = _record(store, stored.exchange(TURNS, new_id("turn")))
    assert turn.parent == last, "the request did not find its turn"
    return cost


def _begun(store: Store) -> tuple[Conversation, str]:
    """Records the first turns of a conversation; returns it and its last turn."""
    conversation, last = Conversation(next(_NEW)), ""
    for index in range(TURNS):
        last = new_id("turn")
        _record(store, conversation.exchange(index, last))
    return conversation, last


def _link(store: Store, stored: Conversation, last: str) -> Cost:
    messages = stored.messages(TURNS)
    with store.recording() as recording:
        reads, started = _reads(), perf_counter()
        scope = Scope("main", stored.name)
        link = link_of(read_history(messages, PROFILE), scope)
        assert link is not None
        parent = find_parent(recording.sessions, link, scope).parent
        cost = _cost(reads, started)
    assert parent is not None
    assert parent.id == last
    return cost


def _reads() -> int:
    """Read calls of this process so far; this call adds a constant number."""
    return _PROCESS.io_counters().read_count


def _cost(reads: int, started: float) -> Cost:
    ms, after = 1000 * (perf_counter() - started), _reads()
    return Cost(ms, (after - reads) - (_reads() - after))


def _look_after(store: Store, number: int) -> None:
    """Every 50 recordings: the proxy's checkpoint, and a recording that pays for its sync.

    Otherwise a measured recording would have to do the first. The sync costs the same in any store.
    """
    if number % _CHECKPOINT_EVERY == 0:
        store.checkpoint()
        _record(store, Conversation(next(_NEW)).exchange(0, new_id("turn")))


def _disk_bytes() -> int:
    return _PROCESS.io_counters().read_bytes


def _read_through(file: Path) -> None:
    with file.open("rb") as opened:
        while opened.read(1 << 24):
            pass


def _pooled(found: list[list[Cost]], share: float) -> float:
    return _quantile([cost.ms for costs in found for cost in costs], share)


def _spread(found: list[list[Cost]], share: float) -> str:
    """A quantile over all rounds, with the lowest and the highest round."""
    each = [_quantile([cost.ms for cost in costs], share) for costs in found]
    return f"{_pooled(found, share):.3f} ({min(each):.3f} … {max(each):.3f})"


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def report(rows: list[Row], files: Mapping[int, Path]) -> str:
    """All tables and the sizes of the stores."""
    recordings = sum(len(values) for values in rows[0].found["new"])
    sizes = ", ".join(
        f"{size:,} turns {(path / FILE).stat().st_size / 1e6:.0f} MB"
        for size, path in files.items()
    )
    summary = f"{recordings} recordings of each kind, {len(rows[0].found['new'])} rounds. {sizes}."
    disk = ", ".join(f"{row.name} {row.disk_bytes / 1e6:.1f} MB" for row in rows)
    summary += f" Read from the disk meanwhile: {disk}."
    return "\n\n".join([*(table(kind, rows) for kind in KINDS), summary])


def main() -> None:
    """Fills the stores, measures and prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="What recording a turn costs in stores of different sizes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), metavar="TURNS", help="stored turns"
    )
    parser.add_argument("--recordings", type=int, default=2000, help="of a kind (default: 2000)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--dir", type=Path, help="where the stores lie for the time being")
    options = parser.parse_args()
    sizes = sorted(set(options.sizes))
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
