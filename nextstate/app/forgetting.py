"""`nextstate forget`: takes turns, and what was made or learned from them, off this machine.

First the versions that trained on them are withdrawn: the newest version before them serves, and
their adapters are deleted, as are trained judges and pictures. Then the records go, which tell what
was to be forgotten, and at last the database is written anew. Killed in between, the same command
goes on: a file says that the database must still be written anew.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import judge_folder, judge_paths, judges_lock
from nextstate.engine.client import publish
from nextstate.errors import AdapterError, ConflictError, EngineError, StartError
from nextstate.store import Store
from nextstate.store.forgetting import Plan, Wanted
from nextstate.store.ledger import SOMEBODY
from nextstate.wire import json_object

log = logging.getLogger(__name__)

UNDER_WAY = "forgetting"
"""This file is in the state folder from before records go until no byte of them is left."""
_TRIES = 5
"""New versions may be made of the turns meanwhile."""
Told = Callable[[str], object]
"""Gets what is being done."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What went."""

    plan: Plan
    withdrawn: dict[str, list[int]]
    """Versions by their lineages."""
    judges: list[str]
    """The names of the folders of trained judges that went."""


def forget(
    settings: Settings, store: Store, wanted: Wanted, told: Told, by: str = SOMEBODY
) -> Forgotten:
    """Forgets everything that is wanted; the ledger says that `by` wanted it.

    Raises ConflictError while an update uses one of the turns, and if versions are made of them
    faster than they can be withdrawn; StartError while a judge is being trained.
    """
    withdrawn: dict[str, list[int]] = {}
    with judges_lock(settings):
        for _ in range(_TRIES):
            told("looking for what holds it")
            plan = store.forgetting.plan(wanted)
            if plan.in_training:
                raise ConflictError(
                    f"an update uses {plan.in_training} of these turns: nothing is forgotten; try "
                    "again when it has ended, or end `nextstate up`, start it again and then try"
                )
            for lineage, numbers in plan.versions.items():
                told(f"withdrawing versions of {lineage}")
                _serve_another(settings, store, lineage, numbers, by)
                withdrawn.setdefault(lineage, []).extend(numbers)
            if not store.forgetting.withdraw(plan):
                continue
            _delete_files(store.dir, plan)
            judges = _delete_judges(settings, {*plan.turns, *plan.touched})
            (store.dir / UNDER_WAY).touch(0o600)
            plan = store.forgetting.forget(wanted, by)
            if not (plan.versions or plan.in_training):
                break
        else:
            raise ConflictError(
                "new versions trained on these turns while they were being forgotten: nothing else "
                "is forgotten; run `nextstate pause` for each lineage and try again"
            )
    told("writing the database anew")
    finish(store)
    return Forgotten(plan, withdrawn, judges)


def finish(store: Store) -> bool:
    """Writes the database anew if a `forget` has not come to that; whether it had not."""
    file = store.dir / UNDER_WAY
    if not file.exists():
        return False
    store.compact()
    file.unlink()
    return True


def _serve_another(
    settings: Settings, store: Store, lineage: str, numbers: Collection[int], by: str
) -> None:
    """Puts the newest ancestor of what serves into service that is not one of `numbers`."""
    serving = store.versions.serving(lineage)
    if serving.number not in numbers:
        return
    change = functools.partial(publish, by=by)
    for version in store.versions.ancestors(serving):
        if version.number in numbers or not version.can_serve:
            continue
        try:
            asyncio.run(change_version(settings, change, store, version))
            return
        except ConflictError:  # what a person has chosen meanwhile is looked at next
            return
        except AdapterError as error:
            log.warning("version %d cannot serve: %s", version.number, error)
        except (StartError, EngineError) as error:
            # Nobody is served meanwhile: the proxy loads what serves before it lets requests in.
            log.info("no engine answers, so nothing was loaded: %s", error)
            if store.versions.set_serving(lineage, version.number, by):
                return


def _delete_files(state_dir: Path, plan: Plan) -> None:
    """Deletes what withdrawn versions are made of, drafts too, and what files hold of episodes.

    Those are their pictures, and the log of the rollout: of an episode that failed it quotes the
    program. Lines do not always say which one, so the whole log goes. A command that was killed may
    have withdrawn versions, so it looks at all that learned from the turns.
    """
    from learner.folders import (
        lineage_folder,
        remove_adapter,
        remove_checkpoint,
        remove_drafts,
        version_path,
    )

    remove_drafts(state_dir)
    for lineage, numbers in plan.learned.items():
        for number in numbers:
            remove_adapter(version_path(state_dir, lineage, number))
        remove_checkpoint(lineage_folder(state_dir / "learner", lineage))
    for episode in plan.episodes:
        shutil.rmtree(state_dir / "pictures" / episode, ignore_errors=True)
    for log_file in (state_dir / "logs").glob("rollout.log*") if plan.episodes else ():
        with suppress(FileNotFoundError):  # it is being rotated
            os.truncate(log_file, 0)  # the rollout appends to it


def _delete_judges(settings: Settings, turns: Collection[str]) -> list[str]:
    """Deletes the judges that were trained on one of the turns, and those trained from them.

    So goes one whose card cannot be read: it may be half deleted, and it cannot vote.
    """
    gone: list[Path] = []
    numbers = set[object]()
    versions = judge_paths(settings)
    for folder in sorted(judge_folder(settings).glob("v[0-9]*")):
        try:
            card = json_object((folder / "card.json").read_bytes())
        except FileNotFoundError:
            card = None
        if card is None:
            goes = folder in versions
            card = {"number": int(folder.name[1:])} if goes else {}
        else:
            goes = card.get("parent") in numbers or any(t in turns for t in card.get("turns") or ())
        if goes:
            numbers.add(card.get("number"))
            gone.append(folder)
    for folder in reversed(gone):  # one that is left leads to those that were trained from it
        shutil.rmtree(folder)
    return [folder.name for folder in gone]
