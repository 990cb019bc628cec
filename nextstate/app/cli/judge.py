"""`nextstate judge`: runs the judge alone; `nextstate judge eval`: measures it on labels."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from nextstate.app.cli.common import add_command


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "judge", run, "run the judge alone")
    text = "compare the configured judge with labelled next states"
    evaluation = add_command(parser.add_subparsers(metavar="eval"), "eval", run_eval, text)
    evaluation.epilog = "example: nextstate judge eval judge/data/next_states.jsonl"
    evaluation.add_argument("file", type=Path, help="one labelled next state a line, JSON")
    evaluation.add_argument("--split", help="only the cases of this split, as dev or test")


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.app.stages import run_judge

    asyncio.run(run_judge(Settings.read(args.config)))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Prints how the judge agrees with the labels."""
    from nextstate.app.settings import Settings
    from nextstate.app.stages import evaluate_judge

    print(asyncio.run(evaluate_judge(Settings.read(args.config), args.file, args.split)))
    return 0
