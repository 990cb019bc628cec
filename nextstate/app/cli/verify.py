"""`nextstate verify`: reads everything that is stored and says what is not as it should be."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command
from nextstate.errors import EXIT_USAGE

if TYPE_CHECKING:
    from nextstate.app.progress import Step
    from nextstate.app.settings import Settings
    from nextstate.store import Store


def add(subparsers: Any) -> None:
    text = "read everything that is stored and say what is wrong"
    parser = add_command(subparsers, "verify", run, text)
    parser.description = (
        "Reads every page of the database, every text, every file of adapters, whole\n"
        "models and trained judges, and the ledger: whether they are whole, are what\n"
        "their hashes say, and are counted right. Nothing is changed. Exit code 2:\n"
        "something is wrong."
    )
    parser.epilog = (
        "The last line is the ledger's head. Note it elsewhere: with --head, it is\n"
        "found too if somebody with the whole folder has cut the ledger since, or\n"
        "written it anew.\n\n"
        "example: nextstate verify --config nextstate.toml"
    )
    text = "the head that an earlier verify printed: the ledger must go on from it"
    parser.add_argument("--head", metavar="NUMBER:HASH", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.progress import progress
    from nextstate.app.settings import Settings
    from nextstate.store import Store

    settings = Settings.read(args.config)
    store = Store(settings.store)
    with progress() as step:
        problems = store.verifying.problems(partial(step, "reading texts"))
        problems += [*_adapters(store, step), *_judges(settings, store, step)]
    problems += [*_sealed(store), *_left_over(store)]
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


def _adapters(store: Store, step: Step) -> Iterator[str]:
    """What is wrong with the files of the versions, and of the adapters that warm vLLM up."""
    from pathlib import Path

    from nextstate.engine.adapter_files import CARD_FILE, verify_adapter
    from nextstate.errors import AdapterError, EngineError
    from nextstate.wire import json_object

    versions = store.versions.all()
    for done, version in enumerate(versions):
        step("reading versions", done, len(versions))
        if version.path is not None and version.sha256 is not None:
            try:
                verify_adapter(Path(version.path), version.sha256)
            except (AdapterError, EngineError) as error:
                yield f"version {version.number} of {version.lineage}: {error}"
    for folder in sorted((store.dir / "warm-up").glob("[!.]*/")):
        try:
            card = json_object((folder / CARD_FILE).read_bytes()) or {}
            verify_adapter(folder, str(card["sha256"]))
        except (AdapterError, EngineError, OSError, KeyError):
            yield f"{folder} is not as it was made: delete it, the learner makes it anew"


def _judges(settings: Settings, store: Store, step: Step) -> Iterator[str]:
    """Which trained judges are not as they were made."""
    from nextstate.app.trained_judge import judge_paths
    from nextstate.engine.adapter_files import folder_sha256
    from nextstate.errors import SealError

    folders = judge_paths(settings)  # first: a judge is told of before it has its folder
    told = store.ledger.judges()
    for done, folder in enumerate(folders):
        step("reading judges", done, len(folders))
        try:
            if (int(folder.name[1:]), folder_sha256(folder, with_card=True)) in told:
                continue
            why = "it was changed, or comes from elsewhere"
        except (OSError, SealError) as error:
            why = str(error)
        yield (
            f"the trained judge in {folder} is not one that the ledger tells of: {why}; delete it, "
            "and the one before it votes"
        )


def _sealed(store: Store) -> Iterator[str]:
    """Which files of an encrypted folder were changed, or lie there in clear."""
    from nextstate import sealed_files
    from nextstate.errors import SealError

    if store.vault is None:
        return
    for path in sealed_files.sealable(store.dir):
        try:
            sealed_files.read(path)
        except (OSError, SealError) as error:
            yield str(error)


def _left_over(store: Store) -> Iterator[str]:
    """What a `forget` that was interrupted has left."""
    from learner.folders import of_every_epoch, version_path
    from nextstate.app.forgetting import UNDER_WAY
    from nextstate.store.versions import WITHDRAWN

    if (store.dir / UNDER_WAY).exists():
        yield "the last `nextstate forget` was interrupted: run it again"
    for version in store.versions.all():
        if version.reason == WITHDRAWN:
            path = version_path(store.dir, version.lineage, version.number)
            for folder in of_every_epoch(path):
                yield (
                    f"version {version.number} of {version.lineage} was withdrawn, and its folder "
                    f"{folder} is there: run `nextstate forget` again"
                )
