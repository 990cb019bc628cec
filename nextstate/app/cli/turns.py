"""`nextstate turns`: lists turns, who said what in each, or shows one whole turn."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number

if TYPE_CHECKING:
    from nextstate.app.finding import Newest
    from nextstate.store import Store

_SHOWN = 50
_EPILOG = f"""\
A line shows a turn's id, version, score, who spoke last and what they said, the reply, and after ✗
why the turn does not train. The newest turn comes last. Unless --limit is 0, the newest 10000 turns
are looked through for --lineage, --since and --untrained. --grep reads every turn in the store, a
few hundred at a time, until there are enough.

examples:
  nextstate turns                             the newest {_SHOWN}
  nextstate turns turn_1a2b                   all of one turn; the beginning of its id is enough
  nextstate turns --session my-chat --limit 5
  nextstate turns --since 2h --untrained      what does not train of the last two hours, and why
  nextstate turns --grep "backup script"      where this was said, replied or followed
  nextstate turns --before turn_1a2b          the {_SHOWN} before this one
  nextstate turns --json | tail -1            the newest turn as JSON; --json lists all of them
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "turns", run, "list recorded turns, or show one whole turn")
    parser.epilog = _EPILOG
    add_json(parser)
    text = "show this turn; the beginning of its id is enough"
    parser.add_argument("turn", nargs="?", metavar="ID", help=text)
    text = f"only the newest N (0: all; default: {_SHOWN}, with --json all)"
    parser.add_argument("--limit", type=whole_number, metavar="N", help=text)
    text = "only turns before this one: the next page"
    parser.add_argument("--before", metavar="ID", help=text)
    text = "only of this session; our name for it or your agent's own"
    parser.add_argument("--session", metavar="NAME", help=text)
    parser.add_argument("--lineage", metavar="NAME", help="only of this lineage")
    text = "only since then: 30m, 2h, 3d or a date such as 2026-05-31"
    parser.add_argument("--since", metavar="WHEN", help=text)
    text = "only turns that do not train"
    parser.add_argument("--untrained", action="store_true", help=text)
    text = "only turns with this text; case does not count. It reads every turn in the store"
    parser.add_argument("--grep", metavar="TEXT", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import finding
    from nextstate.app.settings import Settings
    from nextstate.app.terminal import columns
    from nextstate.app.turn_views import turn_line
    from nextstate.errors import StartError
    from nextstate.store import Store
    from nextstate.store.lookup import Choice

    settings = Settings.read(args.config)
    store = Store(settings.store)
    if args.turn is not None:
        _show(store, finding.the_turn(store, args.turn), args.json)
        return 0
    choice = Choice(
        sessions=() if args.session is None else finding.names_of(args.session, settings),
        lineages=None if args.lineage is None else (args.lineage,),
        since=None if args.since is None else finding.since_time(args.since),
        untrained=args.untrained,
    )
    words = () if args.grep is None else (" ".join(finding.words_of("--grep", args.grep)),)
    limit = args.limit if args.limit is not None else 0 if args.json else _SHOWN
    found, note = finding.every(store, choice, args.before, words), ""
    if limit:
        newest = finding.newest(store, choice, limit, args.before, words)
        found, note = iter(newest.turns), _note(newest, limit)
    width, is_empty = columns(), True
    for turn in found:
        is_empty = False
        if args.json:
            _print_row(store, turn.id)
        else:
            print(turn_line(turn, width))
    if is_empty and args.lineage not in (None, *settings.all_lineages):
        known = ", ".join(settings.all_lineages)
        raise StartError(f"--lineage {args.lineage!r:.80} has no turn here; known: {known}")
    if is_empty and not args.json:
        note = note or "nextstate: no turn was found"
    if note and not args.json:
        sys.stdout.flush()
        print(note, file=sys.stderr)
    return 0


def _note(newest: Newest, limit: int) -> str:
    from nextstate.app.finding import LOOKED_THROUGH

    if newest.before is None:
        return ""
    if newest.gave_up:
        return (
            f"nextstate: looked through {LOOKED_THROUGH} turns; "
            f"older ones: --before {newest.before}, all: --limit 0"
        )
    return f"nextstate: these are the newest {limit}; older ones: --before {newest.before}"


def _print_row(store: Store, turn_id: str) -> None:
    from nextstate.app.views import turn_row

    turn = store.turns.get(turn_id)
    if turn is not None:
        states, verdict = store.turns.next_states(turn_id), store.judging.verdict(turn_id)
        print_json(turn_row(turn, states, verdict, store.judging.feedback(turn_id)))


def _show(store: Store, turn_id: str, as_json: bool) -> None:
    from nextstate.app.turn_views import turn_card, turn_details

    turn = store.turns.get(turn_id)
    if turn is None:
        return
    about = (
        store.turns.next_states(turn_id),
        store.judging.verdict(turn_id),
        store.judging.feedback(turn_id),
        store.lookup.standing(turn_id),
    )
    if as_json:
        print_json(turn_details(turn, *about))
    else:
        print(turn_card(turn, *about))
