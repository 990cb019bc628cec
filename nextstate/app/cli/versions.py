"""`nextstate versions`: lists policy versions, or shows what one was made from."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nextstate.app.cli.common import (
    add_command,
    add_json,
    find_version,
    print_json,
    whole_number,
)
from nextstate.records import MAIN_LINEAGE

_SHOWN = 50


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "versions", run, "list the policy versions")
    parser.epilog = "example: nextstate versions 3 --lineage alice"
    add_json(parser)
    parser.add_argument("number", type=int, nargs="?", help="show what made this one")
    text = f"only versions of this lineage (with a NUMBER: default {MAIN_LINEAGE})"
    parser.add_argument("--lineage", metavar="NAME", help=text)
    text = f"only the newest N (0: all; default: {_SHOWN}, with --json all)"
    parser.add_argument("--limit", type=whole_number, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import views
    from nextstate.app.judge_worth import judge_agreement, worth_line
    from nextstate.app.settings import Settings
    from nextstate.app.status import pauses
    from nextstate.app.watching import version_watch, watch_text
    from nextstate.store import Store

    settings = Settings.read(args.config)
    store = Store(settings.store)
    if args.number is not None:
        version = find_version(store, args.lineage or MAIN_LINEAGE, args.number)
        trained = store.versions.used_turns(version.lineage, version.number)
        seen = version_watch(store, version, settings.learner.watch)
        labels = store.judging.labels()
        if args.json:
            more = {"watch": seen, "judge_agreement": judge_agreement(labels)}
            turns = views.trained_rows(trained)
            print_json(views.version_row(version) | more | {"turns": turns})
        else:
            print(views.version_card(version, trained, watch_text(seen), worth_line(labels)))
        return 0
    limit = args.limit if args.limit is not None else 0 if args.json else _SHOWN
    versions = store.versions.all(args.lineage, limit or None)
    if args.json:
        for version in versions:
            print_json(views.version_row(version))
        return 0
    if versions:
        print(views.version_table(versions))
    else:
        print("nextstate: no version has been made: the base model answers", file=sys.stderr)
    lineages = settings.all_lineages if args.lineage is None else [args.lineage]
    for lineage, why in pauses(store, lineages).items():
        print(f"{lineage}: {why}")
    if limit and len(versions) == limit:
        note = f"nextstate: these are the newest {limit}; all: --limit 0"
        print(note, file=sys.stderr)
    return 0
