"""`nextstate resume`: lets a lineage train again that has paused."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command
from nextstate.errors import StartError
from nextstate.records import MAIN_LINEAGE


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "resume", run, "let a lineage train again that has paused")
    text = "default: %(default)s"
    parser.add_argument("--lineage", default=MAIN_LINEAGE, metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.store import Store

    settings = Settings.read(args.config)
    if args.lineage not in settings.all_lineages:
        raise StartError(f"there is no lineage {args.lineage!r}: see [lineages.NAME]")
    Store(settings.store).versions.resume(args.lineage)
    print(f"{args.lineage} trains again once the learner looks")
    return 0
