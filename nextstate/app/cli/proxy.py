"""`nextstate proxy`: runs the proxy alone."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command, stage_settings


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "proxy", run, "run the proxy alone")
    parser.epilog = "example: nextstate proxy --config work.toml"
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--under-up", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    import uvloop

    from nextstate.app.stages import run_proxy
    from nextstate.guarded_loop import GuardedLoop

    running = run_proxy(stage_settings(args), args.worker, under_up=args.under_up)
    uvloop.run(running, loop_factory=GuardedLoop)
    return 0
