"""The learner's stage against an engine that loads every adapter at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from learner import stage
from learner.config import LearnerConfig
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.errors import EngineError
from nextstate.records import PolicyVersion
from nextstate.store import Store
from tests.learner.test_tiny_model import CONFIG, Recorded


class FakeEngine:
    """A publisher that flips at once, remembers what it got and stops after `wanted` versions."""

    def __init__(self, store: Store, wanted: int = 1, failures: int = 0) -> None:
        self.stop = threading.Event()
        self.published: list[int] = []
        self.withdrawn: list[int] = []
        self.attempts = 0
        self.after: Callable[[PolicyVersion], None] = lambda _: None
        self._store = store
        self._wanted = wanted
        self._failures = failures

    def __call__(self, version: PolicyVersion, withdraw: object = None) -> None:
        self.attempts += 1
        if self.attempts <= self._failures:
            raise EngineError("the engine is restarting")
        if withdraw:
            self._store.versions.replace_serving(version, version.parent)
            self.withdrawn.append(version.number)
            return
        self._store.versions.serve_candidate(version)
        self.published.append(version.number)
        self.after(version)
        if len(self.published) >= self._wanted:
            self.stop.set()


def with_hook(monkeypatch: pytest.MonkeyPatch, hook: Callable[[PolicyTrainer], object]) -> None:
    """Shows the stage's trainer to `hook` before the first update, without the trial pass."""

    def build(*given: Any) -> PolicyTrainer:
        trainer = build_trainer(*given)
        hook(trainer)
        return trainer

    monkeypatch.setattr(stage, "build_trainer", build)
    monkeypatch.setattr(stage, "try_largest_batch", lambda _: (1, 1))


def train(
    recorded: Recorded,
    model_path: str,
    engine: FakeEngine,
    config: LearnerConfig = CONFIG,
    examined: Sequence[str] = (),
    lineages: Sequence[str] = ("main",),
) -> None:
    stage.run(
        recorded.store,
        config,
        model_path,
        lineages,
        engine,
        engine.stop,
        examined=examined,
        first_wait_s=0.001,
        full_disk_wait_s=0.001,
    )
