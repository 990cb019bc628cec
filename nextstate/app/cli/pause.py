"""`nextstate pause`: lets a lineage not train until a person resumes it."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command, add_lineage, lineage_of, user_name

_EPILOG = """\
An update that is under way ends as it would. After it the lineage takes no batch. Turns are
recorded and judged as before, and their samples wait. `nextstate status` and `nextstate versions`
say who paused it.

examples:
  nextstate pause            the lineage main
  nextstate pause alice
  nextstate resume alice     it trains again
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "pause", run, "let a lineage not train until it is resumed")
    parser.epilog = _EPILOG
    add_lineage(parser)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.store import Store

    settings = Settings.read(args.config)
    lineage = lineage_of(args, settings.all_lineages)
    Store(settings.store).versions.pause(lineage, user_name())
    print(f"{lineage} takes no batch any more; `nextstate resume {lineage}` ends the pause")
    return 0
