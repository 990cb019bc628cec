"""`nextstate resume`: lets a lineage train again that has paused."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command, add_lineage, lineage_of, user_name


def add(subparsers: Any) -> None:
    text = "let a lineage train again that a person or the gate's rejections have paused"
    parser = add_command(subparsers, "resume", run, text)
    parser.epilog = "example: nextstate resume alice"
    add_lineage(parser)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.store import Store

    settings = Settings.read(args.config)
    lineage = lineage_of(args, settings.all_lineages)
    Store(settings.store).versions.resume(lineage, user_name())
    print(f"{lineage} trains again once the learner looks")
    return 0
