"""`nextstate ledger`: what happened to versions, who decided it, and what was forgotten."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, add_json, counted, print_json, whole_number

if TYPE_CHECKING:
    from nextstate.store.ledger import Entry

_SHOWN = 30
_ENCRYPTION = {
    "on": "the store was encrypted",
    "off": "it was taken away",
    "key": "another key opens the store",
    "data key": "everything was encrypted anew",
}
_EPILOG = f"""\
A line for each entry, oldest first. Each entry's hash covers the entry before it, so `nextstate
verify` finds any that was changed or removed. No entry holds a word of a conversation.

examples:
  nextstate ledger                      the newest {_SHOWN} entries
  nextstate ledger --limit 100 --before 71
  nextstate ledger --limit 0 --json     all, with a version's turns and the gate's results
"""


def add(subparsers: Any) -> None:
    text = "show what happened to versions, and what was forgotten"
    parser = add_command(subparsers, "ledger", run, text)
    parser.epilog = _EPILOG
    add_json(parser)
    text = "only the newest N (0: all; default: %(default)s)"
    parser.add_argument("--limit", type=whole_number, default=_SHOWN, metavar="N", help=text)
    text = "only entries before this one"
    parser.add_argument("--before", type=whole_number, metavar="NUMBER", help=text)


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nextstate.app.settings import Settings
    from nextstate.app.turn_views import time_text
    from nextstate.store import Store

    ledger = Store(Settings.read(args.config).store).ledger
    entry = None
    for entry in ledger.newest(args.limit or None, args.before):
        if args.json:
            print_json(asdict(entry))
        else:
            print(f"{entry.seq:>5}  {time_text(entry.at)}  {_line(entry)}")
    if entry is None and not args.json:
        older = f" before {args.before}" if args.before is not None else ": no version was made yet"
        print(f"nextstate: the ledger is empty{older}", file=sys.stderr)
    return 0


def _line(entry: Entry) -> str:
    """What an entry tells, in words."""
    from nextstate.store.ledger import Kind

    content = entry.content
    what = f"version {content.get('number')} of {content.get('lineage')}"
    why = f": {content['reason']}" if content.get("reason") else ""
    by = content.get("by")
    match entry.kind:
        case Kind.VERSION:
            turns = counted(len(content["turns"]), "turn")
            made = f"made from version {content['parent']} with {turns}"
            return f"{what} was {made}; it is {content['state']}{why}"
        case Kind.EXAM:
            return f"{what} took its exam"
        case Kind.JUDGE:
            parent = f", from judge v{content['parent']}" if content["parent"] else ""
            return f"judge v{content['number']} was trained{parent}"
        case Kind.STATE:
            return f"{what} is {content['state']}{why}"
        case Kind.DELETED:
            return f"{what}: its adapter was deleted to make room"
        case Kind.CHOICE:
            return f"{what} serves by choice of {by}"
        case Kind.PAUSE | Kind.RESUME:
            return f"{content['lineage']} was {entry.kind}d by {by}"
        case Kind.ENCRYPTION:
            return f"encryption: {_ENCRYPTION.get(content['change'], content['change'])}"
        case _:
            gone = counted(len(content["turns"]), "turn")
            if episodes := content["episodes"]:
                gone += f" and {counted(episodes, 'episode')}"
            return f"forgotten by {by}: {gone}"
