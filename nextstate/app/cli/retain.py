"""`nextstate retain`: how long turns are kept; the oldest then go by themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, counted

if TYPE_CHECKING:
    from nextstate.store import Store

_EPILOG = """\
The judge's process looks every five minutes and deletes the oldest turns that are too old, or as
long as the store is too large. What is still of use stays: what did not train yet, conversations of
the last day, episodes that are not settled, feedback that waits for a review, turns that wait less
than a week for their verdict, and the newest 1040 judged and 64 held-out turns of each lineage.
Versions that learned from what goes stay in service: `nextstate forget ID` withdraws these, also
later, by the ids that `nextstate ledger` tells. What the turns held cannot be looked for then.

examples:
  nextstate retain                         what holds now
  nextstate retain --days 90               nothing older than 90 days
  nextstate retain --size 20GB             the newest 20 GB
  nextstate retain --off                   everything is kept
  nextstate retain --now                   sweep at once, for instance from a timer
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "retain", run, "let the oldest turns go by themselves")
    parser.epilog = _EPILOG
    text = "turns whose requests are older go"
    parser.add_argument("--days", type=float, metavar="DAYS", help=text)
    text = "above this size of the database with its log, the oldest turns go: 500MB, 20GB"
    parser.add_argument("--size", metavar="SIZE", help=text)
    parser.add_argument("--off", action="store_true", help="keep everything")
    parser.add_argument("--now", action="store_true", help="delete at once what is too much")


def run(args: argparse.Namespace) -> int:
    from contextlib import closing

    from nextstate.app.settings import Settings
    from nextstate.store import Store

    with closing(Store(Settings.read(args.config).store)) as store:
        _retain(store, args)
    return 0


def _retain(store: Store, args: argparse.Namespace) -> None:
    from dataclasses import replace

    from nextstate.app.retention import Keep, read_keep, read_size, sweep, write_keep
    from nextstate.errors import ConfigError

    keep = Keep() if args.off else read_keep(store.dir)
    if args.days is not None:
        if not 1 <= args.days <= 36_500:
            raise ConfigError(f"--days {args.days:g}: expected 1 to 36500, such as 90")
        keep = replace(keep, days=args.days)
    if args.size is not None:
        if store.config.url.startswith("postgres"):
            raise ConfigError(
                "--size counts in a file only: a server keeps the room of what is deleted for what "
                "comes; use --days"
            )
        keep = replace(keep, size=read_size(args.size))
    if args.off or args.days is not None or args.size is not None:
        write_keep(store.dir, keep)
    used = sum(store.retention.used_bytes())
    print(f"kept: {keep}; the store has {used / (1 << 20):.0f} MB")
    if args.now:
        position, turns = 0, 0
        while True:
            done = sweep(store, keep, position)
            position, turns = done.position, turns + done.turns
            if not position:
                break
        print(f"deleted {counted(turns, 'turn')}")
        if done.too_large:
            print("the store is still larger: what is left is of use")
