"""`nextstate demo`: shows that a small policy learns."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextstate.app.cli.common import add_command, whole_number


def add(subparsers: Any) -> None:
    text = "watch a model learn from talk, on a real vLLM"
    parser = add_command(subparsers, "demo", run, text, config=False)
    parser.epilog = "example: nextstate demo --model smollm2 --wish named"
    parser.add_argument(
        "--method",
        choices=("binary", "opd", "opd_topk", "combined", "combined_sampled"),
        default="combined",
        help="learn from scores, from hints, or from both (default); see [learner] method",
    )
    parser.add_argument(
        "--model",
        default="",
        help="a real model instead of the small policy: smollm2 (downloaded once) or a folder",
    )
    parser.add_argument(
        "--persona",
        choices=("student", "teacher"),
        default="student",
        help="student: nothing that looks machine-written; teacher: specific, friendly comments",
    )
    parser.add_argument(
        "--wish",
        choices=("short", "named", "cheerful"),
        default="short",
        help="what the person wants who talks to a real model: one short sentence (default), her "
        "name and a question, or an exclamation mark",
    )
    text = "tasks with tools instead of a persona: the policy learns from how its episodes end"
    parser.add_argument("--tools", action="store_true", help=text)
    text = "of the conversations or tasks, and the adapter"
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
    if args.tools:
        from demo.tool_demo import run_tool_demo

        return run_tool_demo(seed=args.seed, updates=args.updates, out=args.out)
    from demo.course import model_course, toy_course
    from demo.run import run_demo
    from demo.smollm2 import model_folder
    from demo.tasks import Domain

    if args.model:
        course = model_course(model_folder(args.model), args.wish, args.seed)
    else:
        course = toy_course(args.method, Domain(args.persona), args.seed)
    return run_demo(
        course,
        method=args.method,
        seed=args.seed,
        updates=args.updates,
        out=args.out,
    )
