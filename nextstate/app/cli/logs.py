"""`nextstate logs`: shows the logs of the processes, and follows them."""

from __future__ import annotations

import argparse
import time
from typing import Any

from nextstate.app.cli.common import add_command, whole_number

_LINES = 20
_LOOK_EVERY_S = 0.25
_EPILOG = """\
examples:
  nextstate logs                    the newest lines of every part
  nextstate logs learner --lines 200
  nextstate logs proxy --follow     what it writes from now on, until Ctrl-C
"""


def add(subparsers: Any) -> None:
    text = "show the logs of engine, proxy, judge and learner"
    parser = add_command(subparsers, "logs", run, text)
    parser.epilog = _EPILOG
    parser.add_argument("part", nargs="?", metavar="PART", help="only this one (default: all)")
    parser.add_argument("--follow", action="store_true", help="go on with what is written")
    text = "the newest N of each (default: %(default)s)"
    parser.add_argument("--lines", type=whole_number, default=_LINES, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.log_files import Follower, last_lines, parts
    from nextstate.app.settings import Settings
    from nextstate.errors import StartError

    folder = Settings.read(args.config).store.path / "logs"
    known = parts(folder)
    if not known:
        raise StartError(f"there are no logs in {folder}: `nextstate up` writes them")
    if args.part not in (None, *known):
        raise StartError(f"there is no log of {args.part!r:.80}; known: {', '.join(known)}")
    names = known if args.part is None else [args.part]
    width = 0 if args.part is not None else max(map(len, names))
    followers = {name: Follower(folder / f"{name}.log") for name in names if args.follow}
    for name in names:
        _show(name, width, last_lines(folder / f"{name}.log", args.lines))
    while args.follow:
        for name, follower in followers.items():
            _show(name, width, follower.lines())
        time.sleep(_LOOK_EVERY_S)
    return 0


def _show(name: str, width: int, lines: list[str]) -> None:
    """Prints lines; with a width, each after the name of its part."""
    from nextstate.app.terminal import harmless_lines

    start = f"{name:{width}} | " if width else ""
    for line in lines:
        for shown in harmless_lines(line):
            print(f"{start}{shown.rstrip()}", flush=True)
