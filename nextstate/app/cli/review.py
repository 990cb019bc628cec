"""`nextstate review`: feedback that counts only once somebody accepts it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from nextstate.app.cli.common import add_command, add_json, counted, print_json

_EPILOG = """\
Feedback of a key without the scope admin waits here if there are more than 60 verdicts of it in an
hour (flood), if it is about another key's turn (foreign), or if it says the opposite of what
followed the turn or of what you said (contradiction). Your own word settles it too: `nextstate
feedback`, or the turn's web page.

examples:
  nextstate review                         what waits, with its number
  nextstate review accept 3 4              these count, as if you had said them
  nextstate review drop --key bob          all that the key bob said is forgotten
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "review", run, "feedback that waits: accept or drop it")
    parser.epilog = _EPILOG
    parser.add_argument("action", nargs="?", choices=("list", "accept", "drop"), default="list")
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="which of them")
    parser.add_argument("--key", metavar="NAME", help="all of this key")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.errors import ConfigError
    from nextstate.store import Store

    store = Store(Settings.read(args.config).store)
    waiting = [
        one
        for one in store.reviewing.waiting(None)
        if (not args.numbers or one.seq in args.numbers)
        and (args.key is None or one.client.removeprefix("key ") == args.key)
    ]
    if args.action == "list":
        for one in waiting:
            said = one.said
            if args.json:
                print_json(
                    {
                        "number": one.seq,
                        "turn": said.turn,
                        "client": one.client,
                        "reason": one.reason,
                        "score": said.score,
                        "hint": said.hint,
                        "comment": said.comment,
                        "at": one.at,
                    }
                )
                continue
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.at))
            line = f"{one.seq} {at} {one.client}: {said.score:+d} on {said.turn} ({one.reason})"
            print(line + (f": {said.hint or said.comment}" if said.hint or said.comment else ""))
        if not waiting and not args.json:
            print("nothing waits for a review")
        return 0
    if not args.numbers and args.key is None:
        raise ConfigError(
            f"name what to {args.action}: its numbers from `nextstate review`, or --key NAME"
        )
    act = store.reviewing.accept if args.action == "accept" else store.reviewing.drop
    done = sum(act([one.seq for one in waiting[n : n + 500]]) for n in range(0, len(waiting), 500))
    print(f"{args.action}ed {counted(done, 'verdict')}".replace("droped", "dropped"))
    return 0
