"""`nextstate up`: runs the whole loop until SIGINT or SIGTERM, and shows what it does."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command

if TYPE_CHECKING:
    from rich.console import Console

    from nextstate.app.live import OwnLog, Seen, Watcher
    from nextstate.app.ray_stack import RayStack
    from nextstate.app.stack import Stack

_LOOK_EVERY_S = 2.0
_EPILOG = """\
Without a configuration file it asks three questions (model, agent, judge), writes one and checks
what it needs. On a terminal a screen shows what the loop does; elsewhere, and with TERM=dumb, a
line says what has changed.

examples:
  nextstate up
  nextstate up --yes                       no questions: the default model and judge
  nextstate up --config ~/alice/nextstate.toml
  nextstate up --ray 10.0.0.1:6379         each part on some node of a Ray cluster
"""


def add(subparsers: Any) -> None:
    text = "start engine, proxy, judge and learner, and keep them running"
    parser = add_command(subparsers, "up", run, text)
    parser.epilog = _EPILOG
    text = "if there is no configuration file: write one with the defaults"
    parser.add_argument("--yes", action="store_true", help=text)
    text = "run the parts on the nodes of the Ray cluster whose head is at HOST:PORT; auto: the "
    text += "one that runs this as a job (default: a Ray of this machine alone); needs Ray: `make "
    text += "ray` in a clone"
    parser.add_argument("--ray", nargs="?", const="", metavar="HOST:PORT", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings

    agent = None
    if not args.config.exists():
        agent = _first_start(args.config, args.yes)
        if agent is None:
            from nextstate.errors import EXIT_USAGE

            return EXIT_USAGE
    settings = Settings.read(args.config)
    if args.ray is None:
        from nextstate.app.stack import Stack

        return asyncio.run(_run_stack(Stack(settings), agent))
    from nextstate.app.ray_stack import RayStack
    from nextstate.ray_cluster import connect

    print("starting Ray" if not args.ray else f"joining Ray at {args.ray}", flush=True)
    stack = RayStack(settings, connect(args.ray, settings.store.path, quiet=True))
    return asyncio.run(_run_stack(stack, agent))


def _first_start(file: Path, defaults: bool) -> str | None:
    """Makes the configuration file and checks it; the agent, or None if the checks failed."""
    from nextstate.app import first_file
    from nextstate.app.cli.connect import AGENT_NAMES
    from nextstate.app.cli.doctor import show_checks
    from nextstate.engine.process import small_model
    from nextstate.errors import StartError

    gpus = first_file.visible_gpus()
    if defaults:
        answers = first_file.usual(len(gpus), small_model())
    elif sys.stdin.isatty() and sys.stdout.isatty():
        cached = first_file.cached_models()
        answers = first_file.ask(input, print, AGENT_NAMES, cached, len(gpus), small_model())
    else:
        raise StartError(
            f"there is no file {file} and no terminal to ask what should be in it: run "
            "`nextstate up` in a terminal, or `nextstate up --yes` for the defaults"
        )
    first_file.write_file(file, first_file.file_text(answers, gpus))
    print(f"\n{file} is written; now what it needs is checked:\n", flush=True)
    if show_checks(file):
        return answers.agent
    print(f"\nDo what the lines with FAIL say, or change {file}; then run `nextstate up` again.")
    return None


async def _run_stack(stack: Stack | RayStack, agent: str | None) -> int:
    from rich.console import Console

    stopping = stack.stopping
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    console = Console(highlight=False, soft_wrap=True)
    drawn = console.is_terminal and not console.is_dumb_terminal
    with _own_log(console) if drawn else nullcontext(None) as own_log:
        console.print(f"starting on {stack.dir} (logs in {stack.dir / 'logs'})")
        async with stack.running() as task:
            ready = asyncio.create_task(stack.wait_ready(task))
            spinner = "dots" if console.encoding.startswith("utf") else "line"
            loading = "vLLM loads the model (half a minute and more)"
            waiting = (
                loading
                if stack.managed
                else f"waiting for the engine at {', '.join(stack.engine_urls)}"
            )
            with console.status(waiting, spinner=spinner):
                await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.is_set():
                ready.result()
                url = stack.settings.proxy.url
                console.print(f"ready: point your agent at {url}/v1 (Ctrl-C ends it)")
                await _show(stack, console, own_log, agent)
            await asyncio.gather(ready, return_exceptions=True)
            await task
    return 0


async def _show(
    stack: Stack | RayStack, console: Console, own_log: OwnLog | None, agent: str | None
) -> None:
    """Shows what the loop does until it ends."""
    from nextstate.app.live import Watcher
    from nextstate.store import Store

    store = await asyncio.to_thread(Store, stack.settings.store)
    watcher = Watcher(stack.settings, store)
    if own_log is None:
        await _print(stack, watcher)
    else:
        own_log.watcher = watcher
        await draw(stack, console, watcher, agent)
        own_log.watcher = None
    store.close()


async def draw(
    stack: Stack | RayStack, console: Console, watcher: Watcher, agent: str | None
) -> None:
    """Draws the screen until everything ends."""
    from rich.live import Live

    from nextstate.app.first_file import OTHER_AGENT
    from nextstate.app.live_screen import Frame, marks_for, screen

    url, started = stack.settings.proxy.url, time.time()
    known = "AGENT" if agent in (None, OTHER_AGENT) else agent
    step = f"Web page {url}/   Your agent: nextstate connect {known}"
    marks, console.soft_wrap = marks_for(console.encoding), False
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not stack.stopping.is_set():
            seen = await _look(stack, watcher)
            frame = Frame(url, step, started, console.width, console.height, marks)
            live.update(screen(seen, frame, time.time()), refresh=True)
            await _pause(stack)
    console.soft_wrap = True
    console.print("ending")


async def _print(stack: Stack | RayStack, watcher: Watcher) -> None:
    from nextstate.app.live import news
    from nextstate.app.terminal import fitted

    before = None
    while not stack.stopping.is_set():
        seen = await _look(stack, watcher)
        for line in news(before, seen):
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {fitted(line, 1000)}", flush=True)
        before = seen
        await _pause(stack)


async def _look(stack: Stack | RayStack, watcher: Watcher) -> Seen:
    return await asyncio.to_thread(watcher.look, stack.states(), await stack.health())


async def _pause(stack: Stack | RayStack) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stack.stopping.wait(), _LOOK_EVERY_S)


@contextmanager
def _own_log(console: Console) -> Generator[OwnLog]:
    """What this process logs is shown on the console, and never over a screen."""
    from nextstate.app.live import OwnLog

    root = logging.getLogger()
    usual = root.handlers
    root.handlers = [own_log := OwnLog(lambda line: console.print(line, markup=False))]
    try:
        yield own_log
    finally:
        root.handlers = usual
