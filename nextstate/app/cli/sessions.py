"""`nextstate sessions`: lists conversations with their turns and scores."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number

_SHOWN = 20
_EPILOG = f"""\
A line shows our name for the session, how many turns it has, when its first and its last request
arrived, the mean score of its verdicts, its lineage and the agent's own name for it. The session
with the newest turn comes last. Unless --limit is 0, the newest 10000 turns are looked through.

examples:
  nextstate sessions                      the newest {_SHOWN}
  nextstate sessions --since 1d --lineage alice
  nextstate turns --session NAME          what was said in one
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "sessions", run, "list conversations, a line each")
    parser.epilog = _EPILOG
    add_json(parser)
    text = "only the newest N (0: all; default: %(default)s)"
    parser.add_argument("--limit", type=whole_number, default=_SHOWN, metavar="N", help=text)
    parser.add_argument("--lineage", metavar="NAME", help="only of this lineage")
    text = "only with a turn since then: 30m, 2h, 3d or a date such as 2026-05-31"
    parser.add_argument("--since", metavar="WHEN", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import finding
    from nextstate.app.settings import Settings
    from nextstate.app.turn_views import session_row, session_table
    from nextstate.errors import StartError
    from nextstate.store import Store
    from nextstate.store.lookup import Choice

    settings = Settings.read(args.config)
    since = None if args.since is None else finding.since_time(args.since)
    lineages = None if args.lineage is None else (args.lineage,)
    choice = Choice(lineages=lineages, since=since)
    sessions = finding.newest_sessions(Store(settings.store), choice, args.limit).sessions
    if not sessions and args.lineage not in (None, *settings.all_lineages):
        known = ", ".join(settings.all_lineages)
        raise StartError(f"--lineage {args.lineage!r:.80} has no turn here; known: {known}")
    if args.json:
        for session in sessions:
            print_json(session_row(session))
    elif sessions:
        print(session_table(sessions))
    else:
        print("nextstate: no session was found", file=sys.stderr)
    return 0
