"""What does a version change cost under load, and how soon after a step does the version answer?

It runs on a real vLLM with the demo's policy and settings, through the proxy, in two parts. First
the learner stage trains on its clients' feedback; the time from the end of an optimizer step to the
first reply by the new version is measured. Then many clients ask while the learner's own publisher
publishes versions with random weights. Windows with changes alternate with windows without; the
gaps between the events of a reply are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import orjson
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.asking import Answered, Clients
from benchmarks.gaps import (
    Window,
    added,
    lengths,
    quantile,
    sort_into,
    worst,
    wrong_versions,
)
from benchmarks.marks import FLIP, READY, REGISTERED, UPDATE, Mark, shares, update_of
from demo.course import MODEL, toy_course
from demo.run import Plan, write_settings
from demo.tasks import Domain
from nextstate.app.engine_access import zero_adapter
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.supervisor import Supervisor
from nextstate.records import MAIN_LINEAGE
from nextstate.store import Store

GAP_GOAL_S = 0.1
ANSWER_GOAL_S = 1.0
LIGHT, HEAVY = 2, 16
"""Clients in the two columns of the step's table."""
_SERVERS = ("proxy", "engine")
_SETTLE_S = 3.0
"""Seconds of load before the first window."""
_PART_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_END_S = 30.0
_UNTIL_ASKED, _FIRST_TOKEN = "asked", "first token"
_EXAMPLES = """\
examples:
  python -m benchmarks.publishing
  python -m benchmarks.publishing --updates 0              # version changes only
  python -m benchmarks.publishing --changes 0              # from step to reply only
  python -m benchmarks.publishing --changes 4 --rounds 2 --updates 2
"""


@dataclass(slots=True)
class Load:
    """The results of the version changes."""

    clients: int
    changes: list[list[Mark]]
    windows: list[Window]
    """Pairs: one with changes and one without, in either order."""
    failures: list[str]
    replies: int


@dataclass(slots=True)
class Answers:
    """Times from a step to the first reply by its version, for several updates."""

    clients: int
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """By part, in order; the parts of one update add up to its `first_token`."""
    first_token: list[float] = field(default_factory=list[float])
    whole: list[float] = field(default_factory=list[float])
    failures: list[str] = field(default_factory=list[str])

    @property
    def ours(self) -> list[float]:
        """Times to the first token without the pause in which no client asked."""
        pauses = self.seconds[_UNTIL_ASKED]
        # A request between the flip and its mark is no pause.
        return [t - max(0.0, pause) for t, pause in zip(self.first_token, pauses, strict=True)]


class Timed:
    """A child process that prints the marks of its parts."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout

    def go(self) -> None:
        """Lets the publisher publish once."""
        self._stdin.write(b"\n")

    async def until(self, part: str, timeout_s: float = _PART_TIMEOUT_S) -> list[Mark]:
        """The marks up to the next one of `part`; exits with the child's log if there is none."""
        found: list[Mark] = []
        why = "ended"
        try:
            async with asyncio.timeout(timeout_s):
                while line := await self._stdout.readline():
                    found.append(Mark(**orjson.loads(line)))
                    if found[-1].part == part:
                        return found
        except TimeoutError:
            why = f"has done no {part!r} for {timeout_s:.0f} s"
        sys.exit(f"benchmarks.timed {why}; its log ends:\n{self._log.read_text()[-2000:]}")


@asynccontextmanager
async def timed(settings: Settings, *arguments: str) -> AsyncGenerator[Timed]:
    """`benchmarks.timed` as a child, ended on leaving."""
    what, *more = arguments
    log = settings.store.path / "logs" / f"timed-{what}.log"
    command = [sys.executable, "-m", "benchmarks.timed", what, str(settings.file), *more]
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
    try:
        yield Timed(process, log)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _END_S)
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def serving(folder: Path) -> AsyncGenerator[Settings]:
    """The demo's engine behind a proxy, warmed with an adapter as `nextstate up` does."""
    course = toy_course("combined", Domain.STUDENT, 0)
    settings = write_settings(Plan(course, "combined", 0, 0, folder))
    await make_zero_adapter(settings)
    stack = Stack(settings)
    stack.supervisor = Supervisor([stack.children[name] for name in _SERVERS])
    async with stack.running() as running:
        await stack.wait_ready(running)
        yield settings


async def make_zero_adapter(settings: Settings) -> None:
    """Makes the adapter with which the proxy warms the engine up, as the learner does at start."""
    rank, path = settings.learner.lora_rank, zero_adapter(settings)
    command = [sys.executable, "-m", "learner.adapters", "zero", "--rank", str(rank)]
    command += ["--model", settings.engine.model_path, "--out", str(path)]
    process = await asyncio.create_subprocess_exec(*command)
    if await process.wait():
        sys.exit("the adapter that warms the engine up could not be made")


async def change_under_load(
    settings: Settings, count: int, changes: int, rounds: int, every_s: float, step: Progress
) -> Load:
    """The changes, spread over `rounds` windows, each beside a window without a change."""
    task = step.add_task("version changes", total=changes)
    clients = Clients(settings.proxy.port, MODEL)
    published = [(0.0, _serves(settings))]
    made: list[list[Mark]] = []
    windows: list[Window] = []
    async with timed(settings, "publisher", str(changes)) as publisher:
        await publisher.until(READY)
        async with clients.asking(count):
            await asyncio.sleep(_SETTLE_S)
            for number in range(rounds):
                inside = changes * (number + 1) // rounds - changes * number // rounds
                for changing in (True, False) if number % 2 else (False, True):
                    begin = time.perf_counter()
                    for at in range(1, inside + 1):
                        if changing:
                            publisher.go()
                            made.append(update_of(await publisher.until(FLIP), REGISTERED))
                            step.advance(task)
                        await asyncio.sleep(begin + at * every_s - time.perf_counter())
                    windows.append(Window(begin, time.perf_counter(), changing))
    published += [(marks[0].began, _version(marks)) for marks in made]
    sort_into(windows, clients.replies)
    failures = clients.failures + wrong_versions(clients.replies, published)
    return Load(count, made, windows, failures, len(clients.replies))


async def answers_after_steps(settings: Settings, updates: int, step: Progress) -> list[Answers]:
    """`updates` updates with few clients, then with many; the first one of all does not count."""
    task = step.add_task("from step to reply", total=2 * updates + 1)
    found: list[Answers] = []
    url = f"http://127.0.0.1:{settings.proxy.port}"
    async with timed(settings, "learner") as learner, aiohttp.ClientSession(url) as http:
        for count, uncounted in ((LIGHT, 1), (HEAVY, 0)):
            clients = Clients(settings.proxy.port, MODEL)
            clients.after = lambda answered, clients=clients: _say(http, clients, answered)
            answers = Answers(count)
            async with clients.asking(count):
                begin = time.perf_counter()
                while len(answers.whole) < updates:
                    marks = update_of(await learner.until(FLIP))
                    if marks[0].began < begin:
                        continue
                    first = await _first_by(clients, _version(marks))
                    step.advance(task)
                    if uncounted:
                        uncounted -= 1
                    else:
                        _count(answers, marks, first)
            answers.failures = clients.failures
            found.append(answers)
    return found


async def _say(http: aiohttp.ClientSession, clients: Clients, answered: Answered) -> None:
    """The demo student's feedback: it rejects replies that look machine-written."""
    said = {"turn_id": answered.turn, "score": -1 if "**" in answered.text else 1}
    async with http.post("/v1/feedback", json=said) as answer:
        # 404: the turn is recorded late; one sample less does not matter.
        if answer.status not in (200, 404):
            clients.failures.append(f"feedback was answered {answer.status}: {await answer.text()}")


async def _first_by(clients: Clients, version: int) -> Answered:
    """The reply by the version whose first event was the earliest."""
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        whole = await clients.reply_by(version)
    # A reply that began earlier may still run.
    await asyncio.sleep(2 * (whole.ended - whole.started))
    return min((r for r in clients.replies if r.version == version), key=lambda r: r.times[0])


def _count(answers: Answers, update: Sequence[Mark], first: Answered) -> None:
    made, flipped = update[0].ended, update[-1].ended
    parts = shares(update)
    parts[_UNTIL_ASKED] = first.started - flipped
    parts[_FIRST_TOKEN] = first.times[0] - first.started
    for part, seconds in parts.items():
        answers.seconds.setdefault(part, []).append(seconds)
    answers.first_token.append(first.times[0] - made)
    answers.whole.append(first.ended - made)


def _version(marks: Sequence[Mark]) -> int:
    version = marks[-1].version
    assert version is not None
    return version


def _serves(settings: Settings) -> int:
    store = Store(settings.store)
    number = store.versions.serving(MAIN_LINEAGE).number
    store.close()
    return number


def print_load(console: Console, load: Load) -> None:
    """The gaps with and without changes, and the two goals."""
    console.print(_gaps_table(load.windows))
    took = [marks[-1].ended - marks[0].ended for marks in load.changes]
    console.print(
        f"{len(load.changes)} version changes under {load.clients} streams, {load.replies} "
        f"replies; a change takes {_spread(took)} ms"
    )
    found = added(load.windows)
    console.print(
        f"added to the worst gap: {_ms(found.overall)} ms; mean of the pairs of windows "
        f"{_ms(found.mean)} ms (90 %: {_ms(found.low)} … {_ms(found.high)}); "
        f"goal ≤ {_ms(GAP_GOAL_S)} ms: {_verdict(found.overall <= GAP_GOAL_S)}"
    )
    _print_failures(console, load.failures)


def _gaps_table(windows: Sequence[Window]) -> Table:
    table = _table("gaps, ms", "p50", "p99", "p99.9", "worst", "worst of a window: median")
    for name in ("from", "to", "worst wait for a first token"):
        table.add_column(name, justify="right")
    for changing, name in ((False, "no change"), (True, "changes")):
        ours = [window for window in windows if window.changing == changing]
        gaps = lengths(gap for window in ours for gap in window.gaps)
        each = [worst(window.gaps) for window in ours]
        shown = [quantile(gaps, share) for share in (0.5, 0.99, 0.999, 1.0)]
        shown += [median(each), min(each), max(each), max(worst(w.firsts) for w in ours)]
        table.add_row(name, *map(_ms, shown))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def print_answers(console: Console, found: Sequence[Answers]) -> None:
    """The parts of the time from step to reply, and the goal."""
    columns = [f"{answers.clients} streams" for answers in found]
    table = _table("from the step's end, ms: median (worst)", *columns)
    for part in (*UPDATE[1:], _UNTIL_ASKED, _FIRST_TOKEN):
        table.add_row(part, *(_spread(answers.seconds[part]) for answers in found))
    table.add_row("all, to the first token", *(_spread(answers.first_token) for answers in found))
    table.add_row("without asked, to first token", *(_spread(answers.ours) for answers in found))
    table.add_row("all, to the reply's end", *(_spread(answers.whole) for answers in found))
    console.print(table)
    for answers in found:
        within = sum(seconds <= ANSWER_GOAL_S for seconds in answers.first_token)
        ours = sum(seconds <= ANSWER_GOAL_S for seconds in answers.ours)
        updates = len(answers.first_token)
        console.print(
            f"{answers.clients} streams: {within} of {updates} versions answered within "
            f"{ANSWER_GOAL_S:g} s of their step: {_verdict(within == updates)}; "
            f"{ours} did without the clients' own pause, the time until one asked"
        )
        _print_failures(console, answers.failures)


def _print_failures(console: Console, failures: Sequence[str]) -> None:
    console.print(f"failed requests: {len(failures)}; goal 0: {_verdict(not failures)}")
    for failure in failures[:5]:
        console.print(f"  {failure}", markup=False)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f}"


def _spread(seconds: Sequence[float]) -> str:
    return f"{_ms(median(seconds))} ({_ms(max(seconds))})"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


async def measure(options: argparse.Namespace, console: Console) -> None:
    """Both parts on one engine; each is printed when it ends."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with tempfile.TemporaryDirectory(prefix="nextstate-publishing-") as folder:
        async with serving(Path(folder)) as settings:
            with Progress(console=Console(stderr=True)) as progress:
                if options.updates:
                    answers = await answers_after_steps(settings, options.updates, progress)
                    print_answers(console, answers)
                if options.changes:
                    asked = (options.streams, options.changes, options.rounds, options.every_s)
                    print_load(console, await change_under_load(settings, *asked, progress))


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.publishing",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--changes", default=50, **whole, help="versions (default: 50)")
    parser.add_argument("--streams", default=16, **whole, help="while they change (default: 16)")
    parser.add_argument("--rounds", default=10, **whole, help="pairs of windows (default: 10)")
    parser.add_argument(
        "--every-s", type=float, default=1.2, help="seconds a change (default: 1.2)"
    )
    parser.add_argument("--updates", default=10, **whole, help="steps a row (default: 10)")
    options = parser.parse_args()
    if options.changes and not 1 <= options.rounds <= options.changes:
        parser.error(f"--rounds {options.rounds}: expected 1 to --changes = {options.changes}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        asyncio.run(measure(options, console))
    except asyncio.CancelledError:
        sys.exit("stopped; everything has been shut down")


if __name__ == "__main__":
    main()
