"""`nextstate verify`: reads everything that is stored and says what is not as it should be."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command
from nextstate.errors import EXIT_USAGE

if TYPE_CHECKING:
    from nextstate.store import Store


def add(subparsers: Any) -> None:
    text = "read everything that is stored and say what is wrong"
    parser = add_command(subparsers, "verify", run, text)
    parser.description = (
        "Reads every page of the database, every text, every adapter and the ledger: whether they "
        "are whole, are what their hashes say, and are counted right. Nothing is changed. "
        "Exit code 2: something is wrong."
    )
    parser.epilog = (
        "The last line is the ledger's head. Note it elsewhere: with --head, a ledger that was cut "
        "or written anew since is found too.\n\nexample: nextstate verify --config nextstate.toml"
    )
    text = "the head that an earlier verify printed: the ledger must go on from it"
    parser.add_argument("--head", metavar="NUMBER:HASH", help=text)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from nextstate.app.settings import Settings
    from nextstate.store import Store

    store = Store(Settings.read(args.config).store)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("reading texts", total=None)

        def read(done: int, of: int) -> None:
            progress.update(bar, completed=done, total=of)

        problems = store.verifying.problems(read)
    problems += _adapters(store)
    problems += store.ledger.problems(args.head)
    for problem in problems:
        print(f"FAIL  {problem}")
    if not problems:
        counts = store.counts()
        turns = counts.get("turns/main", 0) + counts.get("turns/side", 0)
        print(f" ok   {turns} turns and {len(store.versions.all())} versions are whole")
        newest = store.ledger.newest(1)
        print(f" ok   ledger: {newest[0].head if newest else 'no entry yet'}")
    return EXIT_USAGE if problems else 0


def _adapters(store: Store) -> Iterator[str]:
    """What is wrong with the files of the versions."""
    from pathlib import Path

    from nextstate.engine.adapter_files import verify_adapter
    from nextstate.errors import AdapterError, EngineError

    for version in store.versions.all():
        if version.path is not None and version.sha256 is not None:
            try:
                verify_adapter(Path(version.path), version.sha256)
            except (AdapterError, EngineError) as error:
                yield f"version {version.number} of {version.lineage}: {error}"
