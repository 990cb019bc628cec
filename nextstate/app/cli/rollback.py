"""`nextstate rollback`: puts an earlier version into service."""

from __future__ import annotations

import argparse
import asyncio
import functools
from typing import Any

from nextstate.app.cli.common import add_command, find_version, user_name
from nextstate.errors import StartError
from nextstate.records import MAIN_LINEAGE, VersionState


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "rollback", run, "serve an earlier version again")
    parser.epilog = "example: nextstate rollback 3"
    parser.add_argument("number", type=int, help="its number; 0 is the base model")
    text = "default: %(default)s"
    parser.add_argument("--lineage", default=MAIN_LINEAGE, metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.engine_access import change_version
    from nextstate.app.settings import Settings
    from nextstate.engine.client import publish
    from nextstate.store import Store

    settings = Settings.read(args.config)
    store = Store(settings.store)
    version = find_version(store, args.lineage, args.number)
    if args.lineage not in settings.all_lineages:
        raise StartError(f"there is no lineage {args.lineage!r}: see [lineages.NAME]")
    if not version.can_serve:
        why = (
            f"was rejected before it was written and cannot serve: {version.reason}"
            if version.sha256 is None
            else f"has no adapter any more: {version.reason}"
            if version.state is VersionState.REJECTED
            else "has no adapter any more: it was deleted to make room ([learner] keep_versions)"
        )
        raise StartError(
            f"version {version.number} {why}; choose another one of `nextstate versions`"
        )
    change = functools.partial(publish, by=user_name())
    asyncio.run(change_version(settings, change, store, version))
    print(f"version {version.number} serves {version.lineage}")
    return 0
