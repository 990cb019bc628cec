"""A learner under the stopwatch, in a process of its own: prints when each of its parts ran.

    python -m benchmarks.timed learner CONFIG       # the learner stage, until SIGTERM
    python -m benchmarks.timed publisher CONFIG N   # N versions, one for each line on stdin
    python -m benchmarks.timed updates CONFIG N     # an update of N turns for each line on stdin

All go the learner stage's own way through the functions that are named below. The publisher's
adapters are small random ones: it tells what a version change costs when nothing trains. The
updates are all the same: each is undone, and its turns are made up.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from inspect import iscoroutinefunction
from pathlib import Path
from time import perf_counter
from typing import Any

import orjson
import torch

from benchmarks.marks import (
    ADAPTER,
    CHECKPOINT,
    FLIP,
    GATE,
    LOADED,
    PROBED,
    READY,
    REGISTERED,
    STEP,
    Mark,
)
from benchmarks.training_step import turn
from learner import lineage
from learner.adapters import Card, load_weights, save_adapter
from learner.config import LearnerConfig
from learner.evaluator import Evaluator
from learner.folders import version_path
from learner.trainer import PolicyTrainer, build_trainer
from learner.weights import LoraWeights
from nextstate import logs
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import change_version, zero_adapter
from nextstate.app.settings import Settings
from nextstate.app.stages import run_learner
from nextstate.engine.client import EngineClient, publish_candidate
from nextstate.records import BASE_VERSION, MAIN_LINEAGE, PolicyVersion, VersionState
from nextstate.store import Store
from nextstate.store.versions import Versions

WATCHED: dict[str, tuple[object, str]] = {
    STEP: (PolicyTrainer, "update"),
    GATE: (Evaluator, "measure"),
    ADAPTER: (LoraWeights, "save"),
    CHECKPOINT: (lineage, "save_checkpoint"),
    REGISTERED: (Versions, "add"),
    LOADED: (EngineClient, "load_adapter"),
    PROBED: (EngineClient, "probe"),
    FLIP: (Versions, "serve_candidate"),
}
TURN_TOKENS = 120, 70
"""Tokens of a made-up turn, and those of its reply."""
_WEIGHT = 0.02
"""Standard deviation: enough to change replies, too little to spoil them."""


def mark(part: str, began: float, version: int | None = None) -> None:
    """Prints a part that ends now."""
    found = Mark(part, began, perf_counter(), version)
    sys.stdout.buffer.write(orjson.dumps(found) + b"\n")
    sys.stdout.buffer.flush()


def watch(part: str, owner: object, name: str) -> None:
    """Has every call of a function marked, with the version's number if a version is given last."""
    function: Callable[..., Any] = getattr(owner, name)

    def version(given: tuple[object, ...]) -> int | None:
        return given[-1].number if isinstance(given[-1], PolicyVersion) else None

    @wraps(function)
    def plain(*given: Any, **named: Any) -> Any:
        began = perf_counter()
        found = function(*given, **named)
        mark(part, began, version(given))
        return found

    @wraps(function)
    async def awaited(*given: Any, **named: Any) -> Any:
        began = perf_counter()
        found = await function(*given, **named)
        mark(part, began, version(given))
        return found

    setattr(owner, name, awaited if iscoroutinefunction(function) else plain)


def run_publisher(settings: Settings, count: int) -> None:
    """Publishes a version for each line that comes, after all adapters have been made."""
    store = Store(settings.store)
    known = store.versions.all(MAIN_LINEAGE)
    first = known[-1].number + 1 if known else BASE_VERSION + 1
    made = [make_version(settings, store, first + n) for n in range(count)]
    mark(READY, perf_counter())
    for version, _ in zip(made, sys.stdin, strict=False):
        store.versions.add(version, None)
        asyncio.run(change_version(settings, publish_candidate, store, version))
    store.close()


def run_updates(settings: Settings, count: int) -> None:
    """Makes the same update of `count` made-up turns with hints for each line that comes."""
    cores = shared_cores(settings)
    if cores is not None:
        os.sched_setaffinity(0, cores.learner)
        torch.set_num_threads(len(cores.learner))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(settings.learner, settings.engine.model_path, Path(folder))
        words = trainer.policy.config.get_text_config().vocab_size
        samples = [turn(*TURN_TOKENS, words, True, seed) for seed in range(count)]
        mark(READY, perf_counter())
        for _ in sys.stdin:
            trainer.restore(trainer.update(samples, {BASE_VERSION: 0}).before)


def make_version(settings: Settings, store: Store, number: int) -> PolicyVersion:
    """Saves a random adapter of the shape that the learner's have."""
    config: LearnerConfig = settings.learner
    torch.manual_seed(number)
    shapes = load_weights(zero_adapter(settings))
    weights = {name: _WEIGHT * torch.randn_like(tensor) for name, tensor in shapes.items()}
    path = version_path(store.dir, MAIN_LINEAGE, number)
    card = Card(MAIN_LINEAGE, number, number - 1, config.method, [], {})
    sha256 = save_adapter(path, weights, config, settings.engine.model_path, card)
    return PolicyVersion(
        MAIN_LINEAGE, number, number - 1, str(path), sha256, 0, VersionState.CANDIDATE
    )


def main() -> None:
    """Runs what the arguments say."""
    what, config, *count = sys.argv[1:]
    logs.to_stderr()
    settings = Settings.read(Path(config))
    for part, (owner, name) in WATCHED.items():
        watch(part, owner, name)
    if what == "learner":
        run_learner(settings)
    elif what == "updates":
        run_updates(settings, int(count[0]))
    else:
        torch.set_num_threads(settings.learner.threads or 1)
        run_publisher(settings, int(count[0]))


if __name__ == "__main__":
    main()
