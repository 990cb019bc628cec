"""`nextstate status`: the health of the processes and the counts in the store."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from nextstate.app.cli.common import add_command, add_json, print_json


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "status", run, "show each part's health and what is stored")
    parser.epilog = "example: nextstate status --json | jq .training"
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.app.status import status, status_lines

    found = asyncio.run(status(Settings.read(args.config)))
    if args.json:
        print_json(found)
    else:
        print("\n".join(status_lines(found)))
    return 0
