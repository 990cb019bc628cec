"""`nextstate up`: runs the whole loop until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command

if TYPE_CHECKING:
    from nextstate.app.settings import Settings


def add(subparsers: Any) -> None:
    text = "start engine, proxy, judge and learner, and keep them running"
    parser = add_command(subparsers, "up", run, text)
    parser.epilog = "example: nextstate up --config work.toml"


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings

    return asyncio.run(_run_stack(Settings.read(args.config)))


async def _run_stack(settings: Settings) -> int:
    from rich.console import Console

    from nextstate.app.stack import Stack

    stack = Stack(settings)
    stopping = stack.supervisor.stopping
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"starting on {stack.dir} (logs in {stack.dir / 'logs'})")
    async with stack.running() as task:
        ready = asyncio.create_task(stack.wait_ready(task))
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        loading = "vLLM loads the model (half a minute and more)"
        waiting = loading if stack.managed else f"waiting for the engine at {stack.engine_url}"
        with console.status(waiting, spinner=spinner):
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.is_set():
            ready.result()
            console.print(f"ready: point your agent at {settings.proxy.url}/v1 (Ctrl-C ends it)")
        await asyncio.gather(ready, return_exceptions=True)
        await task
    return 0
