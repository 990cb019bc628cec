"""`nextstate learner`: runs the learner alone."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "learner", run, "run the learner alone")
    parser.epilog = "example: nextstate learner --lineage alice"
    text = "train only this one (default: all in turn, over one copy of the base model)"
    parser.add_argument("--lineage", metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.engine_access import reached_hosts
    from nextstate.app.settings import Settings
    from nextstate.app.stages import run_learner
    from nextstate.egress import guard
    from nextstate.tracing import allow

    settings = Settings.read(args.config)
    allow(settings.hosts)
    guard(reached_hosts(settings))
    run_learner(settings, args.lineage)
    return 0
