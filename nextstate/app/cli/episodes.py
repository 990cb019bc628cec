"""`nextstate episodes`: lists attempts at tasks, or shows one with its steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number

if TYPE_CHECKING:
    from nextstate.episodes import Episode
    from nextstate.store import Store

_SHOWN, _AT_ONCE = 50, 200
_EPILOG = f"""\
A line shows an episode's id, environment, state, outcome, how often it called the model, the policy
versions that answered, and its task; after ✗ why it was dropped. The newest episode comes last.

examples:
  nextstate episodes                          the newest {_SHOWN}
  nextstate episodes --limit 20 --environment words
  nextstate episodes --since 2h --outcome failed
  nextstate episodes --group words-1          the attempts that are compared with each other
  nextstate episodes --before words-1-0       the {_SHOWN} before this one
  nextstate episodes words-1-0                its rewards, and what each of its steps is worth
  nextstate episodes --json | jq .outcome     all of them as JSON
"""


def add(subparsers: Any) -> None:
    parser = add_command(
        subparsers, "episodes", run, "list the episodes of environments, or show one"
    )
    parser.epilog = _EPILOG
    add_json(parser)
    parser.add_argument("episode", nargs="?", metavar="ID", help="show this one with its steps")
    text = f"only the newest N (0: all; default: {_SHOWN}, with --json all)"
    parser.add_argument("--limit", type=whole_number, metavar="N", help=text)
    text = "only episodes opened before this one: the next page"
    parser.add_argument("--before", metavar="ID", help=text)
    text = "only of this environment"
    parser.add_argument("--environment", metavar="NAME", help=text)
    text = "solved (at least 1), failed (less), or none (nobody has said)"
    outcomes = ("solved", "failed", "none")
    parser.add_argument("--outcome", choices=outcomes, metavar="WHICH", help=text)
    parser.add_argument("--group", metavar="NAME", help="only the episodes of this group")
    parser.add_argument("--lineage", metavar="NAME", help="only of this lineage")
    text = "only those opened since then: 30m, 2h, 3d or a date such as 2026-05-31"
    parser.add_argument("--since", metavar="WHEN", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import episode_views as views
    from nextstate.app import finding
    from nextstate.app.settings import Settings
    from nextstate.app.terminal import columns
    from nextstate.errors import StartError
    from nextstate.store import Store
    from nextstate.store.episodes import Choice

    settings = Settings.read(args.config)
    store = Store(settings.store)
    if args.episode is not None:
        found = views.episode_details(store, _get(store, args.episode))
        if args.json:
            print_json(found)
        else:
            print(views.episode_card(found))
        return 0
    if args.lineage not in (None, *settings.all_lineages):
        known = ", ".join(settings.all_lineages)
        raise StartError(f"there is no lineage {args.lineage!r:.80}; known: {known}")
    choice = Choice(
        lineages=None if args.lineage is None else (args.lineage,),
        environment=args.environment,
        group=args.group,
        outcome=args.outcome,
        since=None if args.since is None else finding.since_time(args.since),
    )
    if args.before is not None:
        _get(store, args.before)
    limit = args.limit if args.limit is not None else 0 if args.json else _SHOWN
    ids = store.episodes.ids(choice, args.before, limit + 1 if limit else None)
    shown = ids[-limit:]  # all of them for 0
    width = columns()
    for episode in _read(store, shown):
        if args.json:
            print_json(views.episode_row(episode))
        else:
            print(views.episode_line(episode, width))
    if len(shown) < len(ids) and not args.json:
        sys.stdout.flush()
        note = f"these are the newest {limit}; older ones: --before {shown[0]}"
        print(f"nextstate: {note}", file=sys.stderr)
    if not shown and not args.json:
        print("nextstate: no episode was found", file=sys.stderr)
    return 0


def _get(store: Store, name: str) -> Episode:
    """The episode. Raises NoEpisodeError."""
    from nextstate.errors import NoEpisodeError

    episode = store.episodes.get(name)
    if episode is None:
        raise NoEpisodeError(f"there is no episode {name!r:.120}: see `nextstate episodes`")
    return episode


def _read(store: Store, ids: Sequence[str]) -> Iterator[Episode]:
    """The episodes, a page at a time."""
    for start in range(0, len(ids), _AT_ONCE):
        yield from store.episodes.get_all(ids[start : start + _AT_ONCE])
