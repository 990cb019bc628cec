"""`nextstate demo`: shows that a small policy learns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextstate.app.cli.common import add_command, whole_number


def add(subparsers: Any) -> None:
    text = "watch a small policy learn from talk, on a real vLLM"
    parser = add_command(subparsers, "demo", run, text, config=False)
    parser.epilog = "example: nextstate demo --persona teacher --method opd --seed 1"
    parser.add_argument(
        "--method",
        choices=("binary", "opd", "opd_topk", "combined", "combined_sampled"),
        default="combined",
        help="learn from scores, from hints, or from both (default); see [learner] method",
    )
    parser.add_argument(
        "--persona",
        choices=("student", "teacher"),
        default="student",
        help="student: nothing that looks machine-written; teacher: specific, friendly comments",
    )
    text = "of the conversations and the adapter"
    parser.add_argument("--seed", type=whole_number, default=0, help=text)
    text = "adapters to train (0: the default)"
    parser.add_argument("--updates", type=whole_number, default=0, help=text)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder for its configuration, records and curve (default: demo-output)",
    )


def run(args: argparse.Namespace) -> int:
    from demo.run import run_demo

    return run_demo(
        method=args.method,
        persona=args.persona,
        seed=args.seed,
        updates=args.updates,
        out=args.out,
    )
