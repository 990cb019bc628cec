"""`nextstate forget`: takes turns, and what was made or learned from them, off this machine.

First the versions that trained on them are withdrawn: the newest version before them serves, and
their adapters are deleted. Then the records go, and at last the database is written anew. Killed in
between, the same command goes on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from nextstate.app.engine_access import change_version
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import judge_folder
from nextstate.engine.client import publish
from nextstate.errors import AdapterError, ConflictError, EngineError, StartError
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.store import Store
from nextstate.store.forgetting import Plan, Wanted
from nextstate.store.ledger import SOMEBODY
from nextstate.wire import json_object

log = logging.getLogger(__name__)

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
    faster than they can be withdrawn.
    """
    withdrawn: dict[str, list[int]] = {}
    for _ in range(_TRIES):
        told("looking for what holds it")
        plan = store.forgetting.forget(wanted, by)
        if plan.in_training:
            raise ConflictError(
                f"an update uses {plan.in_training} of these turns: nothing is forgotten; try "
                "again when it has ended, or end `nextstate up`, start it again and then try"
            )
        if not plan.versions:
            break
        for lineage, numbers in plan.versions.items():
            told(f"withdrawing versions of {lineage}")
            _serve_another(settings, store, lineage, numbers, by)
            withdrawn.setdefault(lineage, []).extend(numbers)
        if store.forgetting.withdraw(plan):
            _delete_files(store.dir, plan)
    else:
        raise ConflictError(
            "new versions trained on these turns while they were being forgotten: nothing else is "
            "forgotten; run `nextstate pause` for each lineage and try again"
        )
    told("looking at the trained judges")
    judges = _delete_judges(settings, {*plan.turns, *plan.touched})
    for episode in plan.episodes:
        shutil.rmtree(store.dir / "pictures" / episode, ignore_errors=True)
    told("writing the database anew")
    store.compact()
    return Forgotten(plan, withdrawn, judges)


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
        except AdapterError as error:
            log.warning("version %d cannot serve: %s", version.number, error)
        except (StartError, EngineError) as error:
            # Nobody is served meanwhile: the proxy loads what serves before it lets requests in.
            log.info("no engine answers, so nothing was loaded: %s", error)
            if store.versions.set_serving(lineage, version.number, by):
                return


def _delete_files(state_dir: Path, plan: Plan) -> None:
    """Deletes the adapters of withdrawn versions, and the training state that goes with them."""
    from learner.folders import lineage_folder, remove_adapter, remove_checkpoint, version_path

    for lineage, numbers in plan.versions.items():
        for number in numbers:
            remove_adapter(version_path(state_dir, lineage, number))
        remove_checkpoint(lineage_folder(state_dir / "learner", lineage))


def _delete_judges(settings: Settings, turns: Collection[str]) -> list[str]:
    """Deletes the judges that were trained on one of the turns, and those trained from them."""
    folders = sorted(judge_folder(settings).glob("v[0-9]*"))
    if not folders:
        return []
    gone: list[str] = []
    numbers = set[object]()
    make_folder(judge_folder(settings))
    taken = "a judge is being trained"
    with ProcessLock(judge_folder(settings) / "lock", taken, "wait for it, or end it"):
        for folder in folders:
            card = json_object((folder / "card.json").read_bytes()) or {}
            if card.get("parent") in numbers or any(
                one in turns for one in card.get("turns") or ()
            ):
                numbers.add(card.get("number"))
                shutil.rmtree(folder)
                gone.append(folder.name)
    return gone
