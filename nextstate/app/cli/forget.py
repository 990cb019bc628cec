"""`nextstate forget`: deletes turns, what was made of them, and versions that learned from them."""

from __future__ import annotations

import argparse
import sys
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, counted, user_name

if TYPE_CHECKING:
    from nextstate.app.settings import Settings
    from nextstate.store import Store
    from nextstate.store.forgetting import Plan, Wanted

_SHOWN = 8
_EPILOG = """\
With a turn go the later turns of its conversation, which send its words again, what a judge made of
them, and the whole episode of a step. Versions that trained on any of it are withdrawn with those
trained from them: their adapters are deleted, an earlier version serves, and the rest of their
samples trains again. Then the database is written anew, so that nothing of it is left in the state
folder. --before keeps later turns, with what they repeat. What `nextstate export` wrote elsewhere,
and the agent's own files, are not touched; an agent that goes on with the conversation sends it
again.

examples:
  nextstate forget turn_1a2b --dry-run     what would go with this turn
  nextstate forget turn_1a2b               this turn and what continues it
  nextstate forget --session my-chat       a whole conversation
  nextstate forget --before 90d            what is older than 90 days
  nextstate forget --matching "4111 1111"  whatever holds this text, in any conversation
  nextstate forget --matching - --yes < FILE   a secret: other accounts can read arguments
"""


def add(subparsers: Any) -> None:
    text = "delete turns and what learned from them"
    parser = add_command(subparsers, "forget", run, text)
    parser.epilog = _EPILOG
    text = "this turn; the beginning of its id is enough"
    parser.add_argument("turns", nargs="*", metavar="ID", help=text)
    text = "every turn of this session; our name for it or your agent's own"
    parser.add_argument("--session", metavar="NAME", help=text)
    text = "every turn before then: 3d, 12w or a date such as 2026-05-31"
    parser.add_argument("--before", metavar="WHEN", help=text)
    text = (
        "every turn that holds this text anywhere; case does not count; - reads it from standard "
    )
    text += "input, or asks for it, so that neither other accounts nor the shell's history have it"
    parser.add_argument("--matching", metavar="TEXT", help=text)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    text = "who wants it, for the ledger (default: this account's name)"
    parser.add_argument("--by", metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from nextstate.app.forgetting import finish, forget
    from nextstate.app.settings import Settings
    from nextstate.errors import ConfigError
    from nextstate.store import Store

    settings = Settings.read(args.config)
    store = Store(settings.store)
    if not args.dry_run and finish(store):
        print("the last `nextstate forget` was interrupted: the database was written anew")
    wanted = _wanted(args, settings, store)
    plan = store.forgetting.plan(wanted)
    if not args.turns:
        _warn(store)
    if plan.is_empty:
        print("there is nothing of that: nothing is forgotten")
        return 0
    _show(store, plan)
    if args.dry_run:
        return 0
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError("forgetting cannot be undone: confirm it with --yes")
        if input("Forget it? This cannot be undone. [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is forgotten")
            return 1
    console = Console(stderr=True)
    with console.status("") as status:
        done = forget(settings, store, wanted, status.update, args.by or user_name())
    print(f"forgot {counted(len(done.plan.turns), 'turn')}")
    if (other := _other_database(settings)) is not None:
        print(f"{other} is another store, from before [store] url was set: delete it")
    for lineage, numbers in sorted(done.withdrawn.items()):
        serving = store.versions.serving(lineage).number
        print(f"withdrew {_versions(numbers)} of {lineage}; version {serving} serves")
    for name in done.judges:
        print(f"deleted the trained judge {name}: `nextstate judge train` makes another one")
    return 0


def _text(matching: str) -> str:
    """What --matching means."""
    if matching != "-":
        return matching
    return getpass("Forget whatever holds: ") if sys.stdin.isatty() else sys.stdin.read()


def _wanted(args: argparse.Namespace, settings: Settings, store: Store) -> Wanted:
    """What the arguments mean. Raises ConfigError and NoTurnError."""
    from nextstate.app.finding import names_of, since_time, the_turn
    from nextstate.errors import ConfigError, NoTurnError
    from nextstate.store.forgetting import Wanted

    given = (args.turns, args.session, args.before, args.matching)
    if sum(bool(one) for one in given) != 1:
        raise ConfigError(
            "name what shall be forgotten: turns, or one of --session NAME, --before WHEN and "
            "--matching TEXT"
        )
    text = None if args.matching is None else _text(args.matching).strip()
    if text == "":
        raise ConfigError(f"--matching {args.matching!r:.40} is empty: expected a text")

    def named(turn: str) -> str:
        try:
            return the_turn(store, turn)
        except NoTurnError:
            if store.forgetting.plan(Wanted(turns=[turn])).learned:
                return turn  # retention took it, and what learned from it is there
            raise

    return Wanted(
        turns=[named(turn) for turn in args.turns],
        sessions=() if not args.session else names_of(args.session, settings),
        before=None if not args.before else since_time(args.before, option="--before"),
        matching=text,
    )


def _other_database(settings: Settings) -> Path | None:
    """A database of ours in [store] dir that is not the store, as after `nextstate store copy`."""
    from nextstate.store.sqlite import FILE, database_file

    url, file = settings.store.url, settings.store.path / FILE
    if not file.exists():
        return None
    is_it = not url.startswith("postgres") and database_file(url, settings.store.path) == file
    return None if is_it else file


def _warn(store: Store) -> None:
    """Says which versions may have learned from it though nothing tells so any more."""
    for lineage, numbers in store.forgetting.unknown().items():
        print(
            f"{_versions(numbers)} of {lineage} learned from turns that `nextstate retain` took: "
            "what these held cannot be looked for; `nextstate ledger` names them, and `nextstate "
            "forget ID` withdraws what learned from one"
        )


def _show(store: Store, plan: Plan) -> None:
    from nextstate.app.terminal import columns
    from nextstate.app.turn_views import turn_line
    from nextstate.store.lookup import Choice

    print(f"{counted(len(plan.turns), 'turn')} to forget:")
    for turn_id in plan.turns[:_SHOWN]:
        position = store.lookup.position(turn_id) or 0
        shown = store.lookup.page(Choice(), position - 1, newest_first=False, limit=1).turns
        # A turn that a retry replaced is on no page.
        is_it = bool(shown) and shown[0].id == turn_id
        print("  " + (turn_line(shown[0], columns() - 2) if is_it else turn_id))
    if len(plan.turns) > _SHOWN:
        print(f"  … and {len(plan.turns) - _SHOWN} more")
    if plan.episodes:
        print(f"with {counted(len(plan.episodes), 'episode')}")
    if plan.touched:
        print(f"{counted(len(plan.touched), 'turn')} before them: what followed is deleted there")
    for lineage, numbers in plan.versions.items():
        print(f"{_versions(numbers)} of {lineage} trained on them, and will be withdrawn")


def _versions(numbers: tuple[int, ...] | list[int]) -> str:
    return ("version " if len(numbers) == 1 else "versions ") + ", ".join(map(str, numbers))
