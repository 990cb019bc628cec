"""`nextstate proxy`: runs the proxy alone."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "proxy", run, "run the proxy alone")
    parser.epilog = "example: nextstate proxy --config work.toml"
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--under-up", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    import uvloop

    from nextstate.app.engine_access import reached_hosts
    from nextstate.app.settings import Settings
    from nextstate.app.stages import run_proxy
    from nextstate.egress import guard
    from nextstate.guarded_loop import GuardedLoop
    from nextstate.tracing import allow

    settings = Settings.read(args.config)
    allow(settings.hosts)
    guard(reached_hosts(settings))
    running = run_proxy(settings, args.worker, under_up=args.under_up)
    uvloop.run(running, loop_factory=GuardedLoop)
    return 0
