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
With --before and the name of the first session that is shown comes the page before it; with the
turn at which it stopped looking, what is older than that.

examples:
  nextstate sessions                      the newest {_SHOWN}
  nextstate sessions --since 1d --lineage alice
  nextstate sessions --untrained          with a turn that does not train
  nextstate turns --session NAME          what was said in one
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "sessions", run, "list conversations, a line each")
    parser.epilog = _EPILOG
    add_json(parser)
    text = f"only the newest N (0: all; default: {_SHOWN}, with --json all)"
    parser.add_argument("--limit", type=whole_number, metavar="N", help=text)
    text = "only sessions that ended before this one, or before this turn: the next page"
    parser.add_argument("--before", metavar="NAME", help=text)
    parser.add_argument("--lineage", metavar="NAME", help="only of this lineage")
    text = "only with a turn since then: 30m, 2h, 3d or a date such as 2026-05-31"
    parser.add_argument("--since", metavar="WHEN", help=text)
    text = "only with a turn that does not train"
    parser.add_argument("--untrained", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import finding
    from nextstate.app.settings import Settings
    from nextstate.app.terminal import fitted
    from nextstate.app.turn_views import session_row, session_table
    from nextstate.errors import StartError
    from nextstate.store import Store
    from nextstate.store.lookup import Choice

    settings = Settings.read(args.config)
    since = None if args.since is None else finding.since_time(args.since)
    lineages = None if args.lineage is None else (args.lineage,)
    choice = Choice(lineages=lineages, since=since, untrained=args.untrained)
    limit = args.limit if args.limit is not None else 0 if args.json else _SHOWN
    store = Store(settings.store)
    before = None if args.before is None else finding.end_of(store, choice, args.before, settings)
    most = finding.LOOKED_THROUGH
    found = finding.newest_sessions(store, choice, limit, most, before)
    sessions = found.sessions
    if not sessions and not found.gave_up and args.lineage not in (None, *settings.all_lineages):
        known = ", ".join(settings.all_lineages)
        raise StartError(f"--lineage {args.lineage!r:.80} has no turn here; known: {known}")
    if args.json:
        for session in sessions:
            print_json(session_row(session))
    elif sessions:
        print(session_table(sessions))
    note = ""
    if found.gave_up is not None:
        note = f"looked through {most} turns; older sessions: "
        note += f"--before {found.gave_up}, all: --limit 0"
    elif not args.json and not sessions:
        note = "no session was found"
    elif not args.json and limit and len(sessions) == limit:
        note = f"these are {limit}; older ones: --before {fitted(sessions[0].name, 200)}"
    if note:
        sys.stdout.flush()
        print(f"nextstate: {note}", file=sys.stderr)
    return 0
