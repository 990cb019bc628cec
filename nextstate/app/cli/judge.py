"""`nextstate judge`: runs the judge alone, or measures it on labels (`eval`), or trains one."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from nextstate.app.cli.common import add_command, stage_settings, whole_number

EXAMPLES, EPOCHS = 240, 5
"""Enough for a model of 135 M parameters and short reactions (benchmarks/results/judge.md)."""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "judge", run, "run the judge alone")
    parser.epilog = "example: nextstate judge --config work.toml"
    text = "compare the configured judge with labelled next states"
    commands = parser.add_subparsers(metavar="eval | train")
    evaluation = add_command(commands, "eval", run_eval, text)
    evaluation.epilog = "example: nextstate judge eval judge/data/next_states.jsonl"
    evaluation.add_argument("file", type=Path, help="one labelled next state a line, JSON")
    evaluation.add_argument("--split", help="only the cases of this split, as dev or test")
    text = "train a judge from labelled next states and your feedback: the kind `engine` uses it"
    training = add_command(commands, "train", run_train, text)
    training.formatter_class = argparse.HelpFormatter
    training.description = (
        f"{text[0].upper()}{text[1:]}. A fifth of the conversations is held out. A new version "
        "goes on from the one before; it is kept only if it agrees with the held-out labels better "
        "than the base model and not worse than the one before."
    )
    training.epilog = "example: nextstate judge train --examples 400 --language en"
    training.add_argument(
        "file", type=Path, nargs="?", help="labelled next states as for eval (default: ours)"
    )
    training.add_argument(
        "--split", help="only the cases of this split (default: dev of our file, all of yours)"
    )
    training.add_argument(
        "--language",
        metavar="NAME",
        help="only the cases of this language, as en: a model learns nothing from one that it does "
        "not speak (default: all)",
    )
    number = whole_number
    text = f"use at most N next states, yours first (default: {EXAMPLES})"
    training.add_argument("--examples", type=number, default=EXAMPLES, metavar="N", help=text)
    text = f"train N times on each (default: {EPOCHS})"
    training.add_argument("--epochs", type=number, default=EPOCHS, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.stages import run_judge

    asyncio.run(run_judge(stage_settings(args)))
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Prints how the judge agrees with the labels."""
    from nextstate.app.settings import Settings
    from nextstate.app.stages import evaluate_judge
    from nextstate.egress import guard

    settings = Settings.read(args.config)
    guard(settings.hosts)
    print(asyncio.run(evaluate_judge(settings, args.file, args.split)))
    return 0


def run_train(args: argparse.Namespace) -> int:
    """Trains a judge and prints what it is worth."""
    from judge.evaluation import LABELLED, read_cases
    from nextstate.app.judge_training import MIN_EXAMPLES, train_judge
    from nextstate.app.progress import progress
    from nextstate.app.settings import Settings
    from nextstate.egress import guard
    from nextstate.errors import ConfigError

    if args.examples < MIN_EXAMPLES or not args.epochs:
        raise ConfigError(
            f"--examples {args.examples} --epochs {args.epochs}: expected at least {MIN_EXAMPLES} "
            "examples and one epoch"
        )
    settings = Settings.read(args.config)
    guard(settings.hosts)
    split = args.split or ("dev" if args.file is None else None)
    given = read_cases(args.file or LABELLED, split)
    if args.language is not None:
        languages = {case.groups.get("language", "none") for case in given}
        given = [case for case in given if case.groups.get("language") == args.language]
        if not given:
            raise ConfigError(
                f"--language {args.language!r}: no labelled next state has it; they have "
                f"{', '.join(sorted(languages))}"
            )
    with progress() as step:
        text = train_judge(settings, given, args.examples, args.epochs, step)
    print(text)
    if not settings.judge.uses_base:
        print('it votes once [judge] kind has "engine", and model and base_url are empty')
    return 0
