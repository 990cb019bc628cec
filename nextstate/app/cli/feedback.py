"""`nextstate feedback`: records a person's score for a turn."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command
from nextstate.errors import StoreError

_EPILOG = """\
The last feedback on a turn counts, over any vote, until the turn has been trained on.

examples:
  nextstate feedback turn_1a2b --score 1
  nextstate feedback turn_1a2b --score -1 --hint "Answer in one sentence."
  nextstate feedback --session my-chat --score -1 --comment "It forgot the file."
  nextstate feedback --match "backup script cron" --score 1

--match reads every turn in the store, a few hundred at a time, and wants exactly one main turn in
which each of the words was said or replied. If there are several, it lists them and does nothing.
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "feedback", run, "say yourself how good a turn was")
    parser.epilog = _EPILOG
    which = parser.add_mutually_exclusive_group(required=True)
    text = "as in `nextstate turns` or the x-nextstate-turn header"
    which.add_argument("turn", nargs="?", help=text)
    text = "its newest main turn; our name for the session or your agent's own"
    which.add_argument("--session", metavar="NAME", help=text)
    text = "the one main turn in which each of these words was said or replied"
    which.add_argument("--match", metavar="WORDS", help=text)
    text = "bad, neither, or good"
    parser.add_argument("--score", type=int, choices=(-1, 0, 1), required=True, help=text)
    text = "what should have been done, in one to three sentences; it is trained on"
    parser.add_argument("--hint", help=text)
    parser.add_argument("--comment", help="a note for people; it is only kept")


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.hooks import load_plugin
    from nextstate.records import Feedback
    from nextstate.store import Store
    from nextstate.store.shares import OWNER

    settings = Settings.read(args.config)
    store = Store(settings.store)
    turn = args.turn
    if args.match is not None:
        from nextstate.app.finding import the_meant, words_of

        turn = the_meant(store, words_of("--match", args.match))
    elif turn is None:
        from nextstate.redaction.names import HiddenNames
        from proxy.linking.names import session_names

        profile = load_plugin("agents", settings.agents.profile, None)
        turn = store.turns.newest(
            session_names(
                args.session, profile, HiddenNames(settings.store.path, settings.privacy.redactor)
            )
        )
        if turn is None:
            raise StoreError(
                f"there is no main turn in a session {args.session!r}: see `nextstate turns --json`"
            )
    said = Feedback(turn, args.score, args.hint, args.comment)
    found = store.reviewing.give(said.without_secrets(settings.privacy.redactor), OWNER)
    print(f"{turn}: score {args.score:+d}" + ("" if found.applied else f" ({found.reason})"))
    return 0
