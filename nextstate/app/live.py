"""What a running loop does now, as one value: its parts, scores, waits and last error."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextstate.app.log_files import Follower, parts
from nextstate.app.page.charts import Score
from nextstate.app.page.home import answer, problems, scores
from nextstate.app.settings import Settings
from nextstate.app.status import pauses
from nextstate.app.waiting import waits
from nextstate.records import Json
from nextstate.store import Store
from nextstate.training_status import read_training_status

_JUDGED = 1000
"""The scores are those of so many of the newest judged turns."""
_ERROR = re.compile(r"(?:^|[ )])(?:ERROR|CRITICAL) ")
"""In a line of our log or of vLLM's."""
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class LastError:
    """The newest error in any log."""

    at: float
    part: str
    text: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """What one lineage does."""

    name: str
    serving: int
    scores: Sequence[Score]
    """By version, in ascending order."""
    answer: str
    """Whether it is learning."""
    waits: str
    """What its next update waits for, or why it does not train."""
    stopped: bool
    """True if it does not train until something changes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the loop."""

    parts: Mapping[str, str]
    """By process: its state."""
    lineages: Sequence[Lineage]
    counts: Mapping[str, int]
    """As `nextstate status` shows them."""
    problems: Sequence[str]
    """What is wrong now, the worst first."""
    last_error: LastError | None = None


class Watcher:
    """Looks at a loop again and again."""

    def __init__(
        self, settings: Settings, store: Store, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._logs: dict[Path, Follower] = {}
        self._last: LastError | None = None
        self._follow()

    def look(self, states: Mapping[str, str], health: Json) -> Seen:
        """What is so now. `states` are those of the processes, `health` is the proxy's answer."""
        self._read_logs()
        names, store = self._settings.all_lineages, self._store
        serving, counts = store.versions.serving_of(names), store.counts()
        stopped = read_training_status(store.dir, names) | pauses(store, names)
        lineages: list[Lineage] = []
        for name in names:
            found = scores(store.versions.judged_turns(name, _JUDGED))
            text = stopped.get(name) or waits(self._settings, store, name, counts)
            number = serving[name].number
            lineages.append(Lineage(name, number, found, answer(found), text, name in stopped))
        wrong = [
            *problems(self._settings, health, None),
            *(f"The lineage {name} does not train: {why}" for name, why in stopped.items()),
        ]
        return Seen(states, lineages, counts, wrong, self._last)

    def note(self, part: str, text: str) -> None:
        """Remembers an error."""
        self._last = LastError(self._clock(), part, text)

    def _follow(self) -> None:
        folder = self._store.dir / "logs"
        for name in parts(folder):
            file = folder / f"{name}.log"
            if file not in self._logs:
                self._logs[file] = Follower(file)

    def _read_logs(self) -> None:
        for file, follower in self._logs.items():
            errors = [line for line in follower.lines() if _ERROR.search(line)]
            if errors:
                self.note(file.stem, _ERROR.split(errors[-1], maxsplit=1)[-1])
        self._follow()


class OwnLog(logging.Handler):
    """Prints this process's warnings, or gives them to a watcher while there is one."""

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._show = show
        self.watcher: Watcher | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.watcher is None:
            self._show(record.getMessage())
        else:
            self.watcher.note("up", record.getMessage())


def news(before: Seen | None, now: Seen) -> list[str]:
    """What has changed between two looks, as lines for a log."""
    before = before or Seen({}, (), {}, ())
    lines = [f"{name}: {now.parts[name]}" for name in _new(before.parts, now.parts)]
    known = {lineage.name: lineage.serving for lineage in before.lineages}
    lines += [
        f"{lineage.name}: version {lineage.serving} serves; {lineage.answer}"
        for lineage in now.lineages
        if known.get(lineage.name) != lineage.serving
    ]
    # A problem whose number has changed is the same problem.
    was = {_NUMBER.sub("#", problem) for problem in before.problems}
    lines += [problem for problem in now.problems if _NUMBER.sub("#", problem) not in was]
    if before.problems and not now.problems:
        lines.append("nothing is wrong any more")
    if now.last_error is not None and now.last_error != before.last_error:
        lines.append(f"error in {now.last_error.part}: {now.last_error.text}")
    return lines


def _new(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The keys whose value has changed."""
    return [key for key, value in now.items() if before.get(key) != value]
