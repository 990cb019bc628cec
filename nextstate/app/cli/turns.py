"""`nextstate turns`: lists turns with their next states and verdicts."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number


def add(subparsers: Any) -> None:
    text = "list recorded turns with next states and verdicts"
    parser = add_command(subparsers, "turns", run, text)
    add_json(parser)
    text = "only the newest N (0: all)"
    parser.add_argument("--limit", type=whole_number, default=0, help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.app.views import turn_line, turn_row
    from nextstate.store import Store

    store = Store(Settings.read(args.config).store)
    ids = store.turns.ids(args.limit or None, newest_first=bool(args.limit))
    for turn_id in reversed(ids) if args.limit else ids:
        turn = store.turns.get(turn_id)
        if turn is None:
            continue
        states, verdict = store.turns.next_states(turn_id), store.judging.verdict(turn_id)
        if args.json:
            print_json(turn_row(turn, states, verdict, store.judging.feedback(turn_id)))
        else:
            print(turn_line(turn, states, verdict))
    return 0
