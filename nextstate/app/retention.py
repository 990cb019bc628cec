"""How long turns are kept: the setting of a state folder, and the sweep that follows it.

The judge's process sweeps every few minutes, so nobody has to run anything. The setting is a small
file in the state folder and not a key of the configuration: it is a promise about what lies there.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nextstate.errors import ConfigError, StoreError
from nextstate.store import Store
from nextstate.wire import json_object, write_json

log = logging.getLogger(__name__)

FILE = "retention.json"
EVERY_S = 300.0
_DAY_S = 86_400.0
_MOST_STEPS = 2000
"""Of one sweep: 8000 turns. The next sweep goes on there."""
_REST = 4
"""A sweep rests this many times as long as a step took: people's recording goes first."""
_SPACE = 0.9
"""What is over its size is brought down to so much of it, without the log."""
_LEAST = 100 << 20
"""The log alone may have some MB."""
_UNITS = {"mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}


@dataclass(frozen=True, slots=True)
class Keep:
    """How much is kept."""

    days: float | None = None
    """Turns whose requests are older go; None: of any age."""
    size: int | None = None
    """Bytes of the database with its log; above it the oldest turns go. None: any."""

    def __str__(self) -> str:
        parts = [] if self.days is None else [f"{self.days:g} days"]
        parts += [] if self.size is None else [f"{self.size / (1 << 20):.0f} MB"]
        return " and ".join(parts) or "everything"


@dataclass(slots=True)
class Swept:
    """What a sweep did."""

    turns: int = 0
    position: int = 0
    """Where the next sweep goes on; 0 after one that came to the end."""
    too_large: bool = False
    """Whether the store is still over its size, because what is left is of use."""


def read_keep(folder: Path) -> Keep:
    """The setting of a state folder. Raises StoreError for a file that cannot be read."""
    file = folder / FILE
    try:
        found = json_object(file.read_bytes())
    except FileNotFoundError:
        return Keep()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    days, size = (found or {}).get("days"), (found or {}).get("size")
    numbers = all(value is None or type(value) in (int, float) for value in (days, size))
    if found is None or not numbers:
        raise StoreError(f"{file} is no setting of `nextstate retain`: run it again")
    return Keep(days, size)


def write_keep(folder: Path, keep: Keep) -> None:
    """Notes the setting of a state folder."""
    file = folder / f"{FILE}.new"
    file.write_bytes(write_json({"days": keep.days, "size": keep.size}))
    file.chmod(0o600)
    file.replace(folder / FILE)


def read_size(text: str) -> int:
    """The bytes of a size such as 20GB or 500 MB. Raises ConfigError.

    >>> read_size("2 GB"), read_size("500mb")
    (2147483648, 524288000)
    """
    number, unit = text.strip().lower()[:-2].strip(), text.strip().lower()[-2:]
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < _LEAST:
        raise ConfigError(f"--size {text!r:.40}: expected at least 100MB, such as 500MB or 20GB")
    return size


def sweep(
    store: Store, keep: Keep, position: int = 0, stopping: threading.Event | None = None
) -> Swept:
    """Deletes what is too old or too much, from a position on. Raises StoreError."""
    done = Swept(position=position)
    stopping = stopping or threading.Event()
    if keep.days is not None:
        before = store.database.now() - keep.days * _DAY_S
        by = f"retention: older than {keep.days:g} days"
        done = _sweep(store, done, before, by, stopping)
        while not stopping.is_set() and (gone := store.retention.drop_episodes(before, by)):
            _remove_pictures(store, gone)
    pages, log_bytes = store.retention.used_bytes()
    in_file = not store.config.url.startswith("postgres")  # a server's size does not fall
    if in_file and keep.size is not None and pages + log_bytes > keep.size:
        # What is deleted makes the log longer for a while, so the pages alone tell when to end.
        goal = int(_SPACE * keep.size)
        by = f"retention: the store had more than {keep.size >> 20} MB"
        position = done.position if keep.days is None else 0
        done = _sweep(store, Swept(done.turns, position), None, by, stopping, goal)
        done.too_large = store.retention.used_bytes()[0] > keep.size
    if done.turns:
        store.database.checkpoint()
        log.info("retention deleted turns=%d of what is more than %s", done.turns, keep)
    return done


def _sweep(
    store: Store,
    done: Swept,
    before: float | None,
    by: str,
    stopping: threading.Event,
    goal: int | None = None,
) -> Swept:
    for _ in range(_MOST_STEPS):
        if stopping.is_set() or (goal is not None and store.retention.used_bytes()[0] <= goal):
            return done
        started = time.monotonic()
        step = store.retention.step(done.position, before, by)
        _remove_pictures(store, step.episodes)
        done.turns += len(step.turns)
        done.position = step.position or 0
        if step.position is None:
            return done
        stopping.wait(_REST * (time.monotonic() - started))
    return done


def _remove_pictures(store: Store, episodes: Iterable[str]) -> None:
    for episode in episodes:
        shutil.rmtree(store.dir / "pictures" / episode, ignore_errors=True)


def run(store: Store, stopping: threading.Event, every_s: float = EVERY_S) -> None:
    """Sweeps again and again, as the setting says, until it is stopped."""
    position = 0
    while not stopping.wait(every_s):
        try:
            keep = read_keep(store.dir)
            done = sweep(store, keep, position, stopping)
            position = done.position
            if done.too_large:
                log.warning("the store has more than %s, but what is left is of use", keep)
        except StoreError as error:
            log.warning("nothing was deleted by its age or size: %s", error)
