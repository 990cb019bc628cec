"""The learner's loop: lease a batch, take one step, keep the version, settle, publish.

Its order makes a kill harmless at any point. The adapter's folder is written first, then the
checkpoint, then the store registers the version and settles its samples in one transaction. On
start, a checkpoint that the store does not know is registered, and only then are the leases of the
dead learner released: no sample trains twice and none is lost.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential,
)

from learner.adapters import (
    Card,
    check_scale,
    lineage_folder,
    load_weights,
    save_adapter,
    version_path,
)
from learner.advantages import WEIGHTS
from learner.batch import token_count
from learner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from learner.config import LearnerConfig
from learner.schedule import LiveRequests, Schedule
from learner.selection import Parents, is_due, policy_lag, unfit
from learner.sinks import Sinks, open_sinks
from learner.trainer import PolicyTrainer, Update, build_trainer
from nextstate.errors import EngineError, LearnerError, StartError
from nextstate.records import BASE_VERSION, PolicyVersion, Sample, VersionState
from nextstate.store import Store

log = logging.getLogger(__name__)

_LEASE_S = 3600.0
_FIRST_WAIT_S = 0.5


class Publisher(Protocol):
    """Brings a version into service: loads it into the engine, probes it, flips to it."""

    def __call__(self, version: PolicyVersion, /) -> None:
        """Returns once the version serves; raises EngineError if it may work later."""
        ...


def run(
    store: Store,
    config: LearnerConfig,
    model_path: str,
    lineage: str,
    publish: Publisher,
    stop: threading.Event,
    live_requests: LiveRequests | None = None,
) -> None:
    """Trains the lineage until `stop` is set.

    `live_requests` asks the engine, which `schedule = "idle"` needs.
    Raises StartError for a model that cannot be loaded and LearnerError when training must not go
    on; leased samples are ready again then.
    """
    schedule = _schedule(config, stop, live_requests)
    folder = lineage_folder(store.dir / "learner", lineage)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    sinks = open_sinks(config, folder, lineage)
    trainer = build_trainer(config, model_path, folder)
    trainer.before_micro_batch = schedule.before_micro_batch
    learner = _Learner(store, config, model_path, lineage, publish, stop, trainer, schedule, sinks)
    try:
        trainer.train_on(learner.updates())
    except LearnerError:
        learner.recover()
        raise
    finally:
        sinks.close()


def _schedule(
    config: LearnerConfig, stop: threading.Event, live_requests: LiveRequests | None
) -> Schedule:
    if config.schedule == "idle" and live_requests is None:
        raise StartError(
            '[learner] schedule = "idle" asks the engine whether it serves, and there is none: '
            'set [learner] schedule to "always" or "window"'
        )
    return Schedule(
        config.schedule,
        stop.wait,
        windows=config.windows,
        live_requests=live_requests,
        patience_s=config.idle_patience_s,
    )


class _Learner:
    """One run of the stage; see the module."""

    def __init__(
        self,
        store: Store,
        config: LearnerConfig,
        model_path: str,
        lineage: str,
        publish: Publisher,
        stop: threading.Event,
        trainer: PolicyTrainer,
        schedule: Schedule,
        sinks: Sinks,
    ) -> None:
        self._store = store
        self._config = config
        self._weights = WEIGHTS[config.method]
        self._model_path = model_path
        self._lineage = lineage
        self._publish = publish
        self._stop = stop
        self._trainer = trainer
        self._schedule = schedule
        self._sinks = sinks
        self._folder = lineage_folder(store.dir / "learner", lineage)
        self._current = BASE_VERSION
        """The version whose weights the trainer holds."""
        self._waits_since: float | None = None
        """Since when `min_batch` samples are ready, by the monotonic clock."""

    def updates(self) -> Iterator[Update]:
        """Batches for the trainer; what follows each `yield` runs after its step."""
        self._resume()
        while not self._stop.is_set():
            self._schedule.before_update()
            if self._stop.is_set():
                return
            self._follow_rollback()
            leased = self._lease()
            if leased is None:
                self._stop.wait(self._config.poll_s)
                continue
            batch, samples = leased
            yield Update(samples, self._current, self._parents())
            version = self._keep(batch, samples)
            self._bring_into_service(version)

    def recover(self) -> Checkpoint | None:
        """Settles the samples that were trained and makes every other leased one ready again."""
        checkpoint = load_checkpoint(self._folder)
        if checkpoint and self._store.version(self._lineage, checkpoint.version.number) is None:
            self._register(checkpoint.version, checkpoint.batch)
        self._store.release_samples(self._lineage)
        return checkpoint

    def _resume(self) -> None:
        """Goes on from the newest version that may serve, after `recover`."""
        checkpoint = self.recover()
        versions = self._store.versions(self._lineage)
        if not versions:
            return
        newest = versions[-1]
        start = self._store.serving(self._lineage) if _is_behind(newest) else newest
        self._go_on_from(start)
        if checkpoint and checkpoint.version.number == start.number:
            self._trainer.load_training_state(checkpoint.state)
        if newest.state is VersionState.CANDIDATE:
            self._bring_into_service(newest)

    def _follow_rollback(self) -> None:
        """Goes on from the version that serves, if the newest one was taken out of service."""
        versions = self._store.versions(self._lineage)
        if not versions or not _is_behind(versions[-1]):
            return
        serving = self._store.serving(self._lineage)
        if serving.number != self._current:
            self._go_on_from(serving)
            self._trainer.forget_moments()

    def _go_on_from(self, version: PolicyVersion) -> None:
        if version.path is None:
            self._trainer.reset_adapter()
        else:
            check_scale(Path(version.path), self._config)
            self._trainer.load_adapter(load_weights(Path(version.path), version.sha256))
        self._trainer.restart_teacher()
        self._current = version.number
        log.info("training goes on lineage=%s version=%d", self._lineage, version.number)

    def _parents(self) -> Parents:
        return {v.number: v.parent for v in self._store.versions(self._lineage)}

    def _lease(self) -> tuple[str, list[Sample]] | None:
        """A batch of samples that may train, with its name; drops those that must not."""
        size = self._config.batch_size
        scored, hinted = self._weights.rl != 0, self._weights.distils
        parents = self._parents()
        self._drop_stale(parents)
        while self._is_due(self._store.ready_samples(self._lineage, scored, hinted)):
            batch = uuid.uuid4().hex
            samples = self._store.lease_samples(
                self._lineage, size, batch, _LEASE_S, scored=scored, hinted=hinted
            )
            if not self._drop_unfit(samples, parents):
                self._waits_since = None
                return batch, samples
            self._store.release_samples(self._lineage)
        return None

    def _is_due(self, ready: int) -> bool:
        now = time.monotonic()
        if ready < self._config.min_batch:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        return is_due(
            ready,
            now - (self._waits_since or now),
            batch_size=self._config.batch_size,
            min_batch=self._config.min_batch,
            max_wait_s=self._config.max_wait_s,
        )

    def _drop_stale(self, parents: Parents) -> None:
        """Settles ready samples whose version is too far from the one that trains."""

        def reason(version: int) -> str | None:
            lag = policy_lag(parents, self._current, version)
            limits = {"max_lag": self._config.max_lag, "max_tokens": self._config.max_tokens}
            return unfit(0, lag, **limits)

        for text, count in self._store.drop_stale(self._lineage, reason).items():
            log.info("samples dropped count=%d reason=%s", count, text)

    def _drop_unfit(self, samples: list[Sample], parents: Parents) -> int:
        """Settles those of the samples that must not train, and returns how many."""
        reasons = {
            sample.turn: unfit(
                token_count(sample),
                policy_lag(parents, self._current, sample.policy_version),
                max_lag=self._config.max_lag,
                max_tokens=self._config.max_tokens,
            )
            for sample in samples
        }
        found = {turn: reason for turn, reason in reasons.items() if reason is not None}
        for turn, reason in found.items():
            self._store.drop_samples([turn], reason)
            log.info("sample dropped turn=%s reason=%s", turn, reason)
        return len(found)

    def _keep(self, batch: str, samples: list[Sample]) -> PolicyVersion:
        """Saves adapter and checkpoint, then registers the version and settles its samples."""
        parents = self._parents()
        lags = [policy_lag(parents, self._current, s.policy_version) for s in samples]
        metrics = {**self._trainer.metrics, "lag/max": max(lags)}
        number = max(parents, default=BASE_VERSION) + 1
        path = version_path(self._store.dir, self._lineage, number)
        turns = [sample.turn for sample in samples]
        card = Card(self._lineage, number, self._current, self._config.method, turns, metrics)
        sha256 = save_adapter(
            path, self._trainer.adapter_weights(), self._config, self._model_path, card
        )
        version = PolicyVersion(
            lineage=self._lineage,
            number=number,
            parent=self._current,
            path=str(path),
            sha256=sha256,
            samples=len(samples),
            state=VersionState.CANDIDATE,
            metrics=metrics,
        )
        state = self._trainer.training_state()
        save_checkpoint(self._folder, Checkpoint(version, batch, state))
        self._register(version, batch)
        self._current = number
        return version

    def _register(self, version: PolicyVersion, batch: str) -> None:
        self._store.add_version(version, batch)
        self._sinks.write(version.number, version.metrics)
        log.info("version made lineage=%s version=%d", version.lineage, version.number)

    def _bring_into_service(self, version: PolicyVersion) -> None:
        """Publishes, again and again while the engine fails, until told to stop."""
        retrying = Retrying(
            retry=retry_if_exception_type(EngineError),
            wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=30.0),
            sleep=sleep_using_event(self._stop),
            stop=stop_when_event_set(self._stop),
            before_sleep=self._log_failure,
        )
        try:
            retrying(self._publish, version)
        except RetryError:
            log.warning(
                "version not published lineage=%s version=%d", version.lineage, version.number
            )

    def _log_failure(self, attempt: RetryCallState) -> None:
        error = attempt.outcome.exception() if attempt.outcome else None
        log.warning(
            "publishing failed lineage=%s attempt=%d: %s",
            self._lineage,
            attempt.attempt_number,
            error,
        )


def _is_behind(newest: PolicyVersion) -> bool:
    """Whether the newest version was rejected, or rolled back after it had served."""
    return newest.state in (VersionState.REJECTED, VersionState.RETIRED)
