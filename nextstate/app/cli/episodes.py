"""`nextstate episodes`: lists attempts at tasks, or shows one with its steps."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number

_EPILOG = """\
examples:
  nextstate episodes --limit 20          the newest 20, with state and outcome
  nextstate episodes --group words-1     the attempts that are compared with each other
  nextstate episodes words-1-0           its rewards, and what each of its steps is worth
  nextstate episodes --json | jq .outcome
"""


def add(subparsers: Any) -> None:
    parser = add_command(
        subparsers, "episodes", run, "list the episodes of environments, or show one"
    )
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_json(parser)
    parser.add_argument("episode", nargs="?", metavar="ID", help="show this one with its steps")
    parser.add_argument("--group", metavar="NAME", help="only the episodes of this group")
    text = "only the newest N (0: all)"
    parser.add_argument("--limit", type=whole_number, default=0, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app import episode_views as views
    from nextstate.app.settings import Settings
    from nextstate.errors import NoEpisodeError
    from nextstate.store import Store

    store = Store(Settings.read(args.config).store)
    if args.episode is not None:
        episode = store.episodes.get(args.episode)
        if episode is None:
            raise NoEpisodeError(
                f"there is no episode {args.episode!r:.120}: see `nextstate episodes`"
            )
        found = views.episode_details(store, episode)
        if args.json:
            print_json(found)
        else:
            print(views.episode_card(found))
        return 0
    episodes = store.episodes.newest(args.limit or None, args.group)
    if args.json:
        for episode in episodes:
            print_json(views.episode_row(episode))
    elif episodes:
        print(views.episode_table(episodes))
    return 0
