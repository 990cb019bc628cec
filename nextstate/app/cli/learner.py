"""`nextstate learner`: runs the learner alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from nextstate.app.cli.common import add_command, stage_settings


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "learner", run, "run the learner alone")
    parser.epilog = "example: nextstate learner --lineage alice"
    text = "train only this one (default: all in turn, over one copy of the base model)"
    parser.add_argument("--lineage", metavar="NAME", help=text)
    parser.add_argument("--under-ray", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.stages import run_learner
    from nextstate.engine.process import on_other_gpus

    settings = stage_settings(args)
    if args.under_ray:
        settings = replace(settings, engine=on_other_gpus(settings.engine))
    run_learner(settings, args.lineage)
    return 0
