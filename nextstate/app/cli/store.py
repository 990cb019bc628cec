"""`nextstate store copy`: copies the store into another database."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from typing import Any

from nextstate.app.cli.common import add_command

_EPILOG = """\
Stop NextState first. A copy that was cut short goes on when it is begun again, and one that is
whole is only compared. When it is done, set [store] url to the new place. Adapters, logs and
checkpoints stay in [store] dir.

examples:
  nextstate store copy postgresql://nextstate@db.example/nextstate    from a file to a server
  nextstate store copy sqlite:////home/me/backup.sqlite3              and back
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "store", run, "copy the store into another database")
    parser.epilog = _EPILOG
    parser.add_argument("action", choices=("copy",))
    parser.add_argument("url", metavar="URL", help="what [store] url is to be: an empty database")


def run(args: argparse.Namespace) -> int:
    from nextstate.app.progress import progress
    from nextstate.app.settings import Settings
    from nextstate.errors import ConfigError
    from nextstate.records import TurnKind
    from nextstate.store import Store
    from nextstate.store.copying import copy

    config = Settings.read(args.config).store
    source, target = Store(config), Store(replace(config, url=args.url))
    if source.database.name == target.database.name:
        raise ConfigError(f"{source.database.name} is the store itself: name another database")
    written = Counter[str]()
    with progress() as step:

        def more(table: str, rows: int) -> None:
            written[table] += rows
            step(table, written[table], None)

        rows = copy(source.database, target.database, more)
    kinds = {f"turns/{kind}" for kind in TurnKind}
    turns = sum(n for key, n in target.counts().items() if key in kinds)
    print(f"{target.database.name} has all {turns} turns; {rows} rows were written")
    source.close()
    target.close()
    return 0
