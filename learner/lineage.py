"""One lineage's work: train on a batch, check the candidate, keep it, publish it, watch it.

The order makes a kill harmless at any point. The adapter's folder is written first, then the
checkpoint, then the store registers the version and settles its samples in one transaction. At the
start, a checkpoint that the store does not know is registered, and only then the leases of the dead
learner are released: no sample trains twice and none is lost.

For a candidate that the gate rejects, one transaction registers it as rejected and drops its
samples with that reason, because the same batch would fail again. Then weights and optimizer go
back to the snapshot from before the step. If a version cannot be written to disk, it is forgotten
and its samples are ready again. After several rejections in a row the lineage pauses until a person
decides, and keeps the samples (`learner/rejections.py`).

The verdicts on the chain's turns are watched (`learner/watch.py`), whether or not the lineage may
train. After a clear fall, the version from before the fall serves instead; if an adapter is not
what was registered, its parent does. What was withdrawn never returns by itself. What a person has
put into service is left alone: every flip names the version that it replaces, and a candidate is
retired if its parent no longer serves or a person decided since its update began. Training
continues from what serves.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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

from learner.adapters import Card
from learner.batches import Batches, LeasedBatch
from learner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from learner.config import LearnerConfig
from learner.evaluator import Evaluator
from learner.examining import Examining
from learner.folders import lineage_folder, remove_adapter, remove_checkpoint, version_path
from learner.gate import objection
from learner.metric_writers import MetricWriters
from learner.news import News
from learner.pruning import prune
from learner.rejections import MANY_REJECTIONS, rejected_in_a_row, why_paused
from learner.shared_trainer import SharedTrainer
from learner.trainer import PolicyTrainer, UpdateResult
from learner.watch import TURNS, Watch
from nextstate.errors import AdapterError, DiskError, EngineError, LearnerError
from nextstate.records import (
    BASE_VERSION,
    WHOLE_MODEL,
    Decisions,
    PolicyVersion,
    VersionState,
)
from nextstate.store import Store
from nextstate.tracing import tracing
from nextstate.training_status import write_training_status

log = logging.getLogger(__name__)

_WATCH_EVERY_S = 5.0
"""A look reads TURNS turns and as many versions."""


class Publisher(Protocol):
    """Brings a version into service: loads it into the engine, probes it, flips to it."""

    def __call__(self, version: PolicyVersion, /, withdraw: Decisions | None = None) -> None:
        """Returns once the version serves; with `withdraw`, once an ancestor serves instead.

        `withdraw` is what people had decided when the version was found bad. Returns as well, and
        changes nothing, if another version was put into service meanwhile, or this one again.
        Raises EngineError if a later try may succeed, and AdapterError for an adapter that is not
        the registered one.
        """
        ...


class Lineage:
    """One lineage's run of the stage; see the module."""

    def __init__(
        self,
        name: str,
        store: Store,
        config: LearnerConfig,
        shared: SharedTrainer,
        evaluator: Evaluator,
        publish: Publisher,
        writers: MetricWriters,
        stop: threading.Event,
        *,
        examining: Examining | None = None,
        first_wait_s: float = 0.5,
        full_disk_wait_s: float = 30.0,
    ) -> None:
        """`examining`: its candidates take exams; None: they take none.

        `first_wait_s`: before a failing engine is tried again; each wait is twice as long.
        `full_disk_wait_s`: after a version that could not be written.
        """
        self.name = name
        self._store = store
        self._config = config
        self._shared = shared
        self._evaluator = evaluator
        self._publish = publish
        self._writers = writers
        self._stop = stop
        self._examining = examining
        self._first_wait_s = first_wait_s
        self._full_disk_wait_s = full_disk_wait_s
        self._folder = lineage_folder(store.dir / "learner", name)
        self._batches = Batches(store, config, name)
        self._current = BASE_VERSION
        """The version whose weights the lineage trains."""
        self._decided = 0
        """How often people had chosen a version when the update under way began."""
        self._pause: str | None = None
        """What `nextstate status` is told of the pause or stop; None if there is none."""
        self._watched = Watch()
        self._news = News(store)
        self._next_look = 0.0
        """When the watch looks again, on the monotonic clock."""

    def resume(self) -> None:
        """Continues from the candidate that waits to serve, or else from what serves."""
        checkpoint = self.release()
        self.report(None)
        self._pause = None
        versions = self._store.versions.all(self.name)
        self._is_paused()
        if not versions:
            return
        newest = versions[-1]
        waits = newest.state is VersionState.CANDIDATE and not self._store.versions.overtaken(
            newest
        )
        start = newest if waits else self._store.versions.serving(self.name)
        if not self._continue_from(start):
            return
        if checkpoint and checkpoint.version.number == start.number:
            self._shared.of(self.name).restore_training(checkpoint.training)
        if waits:
            self._waits_for_exam()

    def release(self) -> Checkpoint | None:
        """Settles the samples that were trained and makes every other leased one ready again."""
        checkpoint = load_checkpoint(self._folder)
        if checkpoint and self._store.versions.get(self.name, checkpoint.version.number) is None:
            if self._store.training.is_leased(self.name, checkpoint.batch):
                self._register(checkpoint.version, checkpoint.batch, checkpoint.decided)
            else:  # another learner released them, or the store is an older copy: they train anew
                log.warning(
                    "version dropped lineage=%s version=%d: its samples were released meanwhile",
                    self.name,
                    checkpoint.version.number,
                )
                remove_checkpoint(self._folder)
                checkpoint = None
        self._store.training.release_samples(self.name)
        return checkpoint

    def look(self) -> None:
        """Watches what serves and ends an exam.

        It trains nothing and reads a bounded part of the store, so it may come at every poll.
        """
        if not self._news.none():
            self._look()

    def update(self) -> bool:
        """Looks (`look`), and takes one update if a batch is due; True if one was."""
        if self._news.none():
            return False
        trained = self._update()
        if trained:
            self._news.forget()
        return trained

    def _look(self) -> bool:
        """True while the newest version takes its exam."""
        self._watch()
        waits = self._waits_for_exam()
        if waits:
            self._news.forget()  # its time may run out
        return waits

    def _update(self) -> bool:
        if self._look():
            return False
        follows = self._follow_rollback()
        self._decided = self._store.versions.decisions(self.name).choices
        batch = self._batches.lease(self._current) if follows and not self._is_paused() else None
        if batch is None:
            return False
        trainer = self._shared.of(self.name)
        started, started_ns = time.perf_counter(), time.time_ns()
        self._evaluator.prepare(self._batches.held_out(), batch.samples, self._current)
        prepared_s = time.perf_counter() - started
        result = trainer.update(batch.samples, batch.lags)
        candidate = self._evaluate(result, batch, prepared_s)
        if candidate.state is VersionState.REJECTED:
            self._reject(candidate, batch)
            tracing("learner").updated(candidate, batch.turns, started_ns)
            trainer.restore(result.before)
            return True
        try:
            version = self._save(candidate, batch, trainer)
        except DiskError as error:
            log.error("%s; trying again in %.0f s", error, self._full_disk_wait_s)
            self._forget_folder(candidate.number)
            trainer.restore(result.before)
            self._store.training.release_samples(self.name)
            self._stop.wait(self._full_disk_wait_s)
            return True
        self._keep(version, batch)
        tracing("learner").updated(version, batch.turns, started_ns)
        self._waits_for_exam()
        watched = self._config.watch
        prune(self._store, self.name, self._current, watched, self._config.keep_versions)
        return True

    def stopped(self, error: LearnerError) -> None:
        """Tells `nextstate status`, until `resume`, that the lineage is left alone."""
        self._pause = f"stopped: {error}"
        self.report(self._pause)

    def report(self, why_not: str | None) -> None:
        """Tells `nextstate status` why the lineage does not train; None: it does."""
        write_training_status(self._store.dir, self.name, why_not)

    @property
    def _epoch(self) -> int | None:
        """In the names of files that another machine's learner could write over."""
        return self._store.database.epochs.get(f"learner/{self.name}")

    def _follow_rollback(self) -> bool:
        """Continues from the version that serves, if another one was put into service.

        False if that one is of no use: then another serves soon. If the newest version has not
        served yet, training continues from it.
        """
        versions = self._store.versions.all(self.name)
        if not versions or versions[-1].state is VersionState.CANDIDATE:
            return True
        serving = self._store.versions.serving(self.name)
        if serving.number != self._current:
            if not self._continue_from(serving):
                return False
            self._shared.of(self.name).forget_moments()
            self.report(self._pause)
        return True

    def _continue_from(self, version: PolicyVersion) -> bool:
        """Puts the version's weights into the trainer; False for an adapter that has changed.

        It waits for one that cannot be read for now.
        """
        weights = self._shared.of(self.name).weights
        try:
            if version.path is None:
                weights.reset()
            else:
                self._retrying("loading")(weights.load, Path(version.path), version.sha256)
        except AdapterError as error:
            self._withdraw(version, str(error))
            return False
        except RetryError:  # it must stop
            return False
        self._current = version.number
        log.info("training continues lineage=%s version=%d", self.name, version.number)
        return True

    def _watch(self) -> None:
        """Takes the serving version out of service after a clear fall of the scores.

        What served before the fall serves again. Never blames what a person has put into service.
        """
        if not self._config.watch or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _WATCH_EVERY_S
        stored = self._store.versions
        decisions = stored.decisions(self.name)
        serving = stored.serving(self.name)
        chain = stored.chain(self.name, serving.number, TURNS)
        turns = stored.judged_turns(self.name, TURNS)
        fall = self._watched.fall(chain, turns, decisions.after)
        if fall is None:
            return
        reason = f"rolled back: {fall}"
        to_blame = chain[chain.index(fall.suspect) :]
        for number in to_blame[:-1]:
            stored.reject(self.name, number, reason)
        parent = chain[chain.index(fall.suspect) - 1]
        self._withdraw(replace(serving, parent=parent), reason, decisions)

    def _waits_for_exam(self) -> bool:
        """True while the newest version takes its exam; without one or after it, it is decided.

        Then it serves or is rejected.
        """
        newest = self._store.versions.newest(self.name, MANY_REJECTIONS)
        if not newest:
            return False
        *before, candidate = newest
        if candidate.state is not VersionState.CANDIDATE:
            return False
        waits = self._examining and self._examining.waits(candidate)
        self.report(waits or self._pause)
        if waits is not None:
            return True
        reason = self._examining and self._examining.objection(candidate)
        if reason is None:
            self._bring_into_service(candidate)
            return False
        rejected = rejected_in_a_row(before, self._store.versions.decisions(self.name).after)
        give_back = rejected if len(rejected) + 1 >= MANY_REJECTIONS else ()
        if self._store.versions.fail(candidate, reason, give_back):
            log.warning(
                "version rejected lineage=%s version=%d: %s", self.name, candidate.number, reason
            )
        return False

    def _rejections(self) -> list[int]:
        """The versions in a row that the gate rejected last, since a person decided."""
        newest = self._store.versions.newest(self.name, MANY_REJECTIONS)
        return rejected_in_a_row(newest, self._store.versions.decisions(self.name).after)

    def _is_paused(self) -> bool:
        """True while a person, or several rejections in a row, pause the lineage; it says so."""
        newest = self._store.versions.newest(self.name, MANY_REJECTIONS)
        decisions = self._store.versions.decisions(self.name)
        pause = why_paused(self.name, newest, decisions)
        if pause != self._pause:
            self.report(pause)
            if pause is not None:
                by_gate = decisions.pause is None
                log.log(
                    logging.ERROR if by_gate else logging.INFO, "lineage=%s %s", self.name, pause
                )
        self._pause = pause
        return pause is not None

    def _withdraw(
        self, version: PolicyVersion, reason: str, decisions: Decisions | None = None
    ) -> None:
        """Rejects a registered version; if it serves, an ancestor takes its place.

        Unless people choose a version after `decisions`, which are those until now if None.
        """
        decisions = decisions or self._store.versions.decisions(self.name)
        log.error("version rejected lineage=%s version=%d: %s", self.name, version.number, reason)
        serves = version.state is VersionState.SERVING
        if serves or not self._store.versions.reject(self.name, version.number, reason):
            self._bring_into_service(replace(version, reason=reason), withdraw=decisions)

    def _evaluate(
        self, result: UpdateResult, batch: LeasedBatch, prepared_s: float
    ) -> PolicyVersion:
        """The version that the update has made, rejected or a candidate; nothing is saved yet."""
        started = time.perf_counter()
        found = self._evaluator.measure(result)
        reason = objection(found, self._config)
        numbers = [version.number for version in self._store.versions.all(self.name)]
        metrics = {
            **result.metrics,
            "lag/max": max(batch.lags.values()),
            **found.metrics(),
            "gate/seconds": prepared_s + time.perf_counter() - started,
        }
        if self._config.trains_all:
            trained = self._shared.of(self.name).trained
            metrics[WHOLE_MODEL] = sum(weight.numel() for weight in trained)
        return PolicyVersion(
            lineage=self.name,
            number=max(numbers, default=BASE_VERSION) + 1,
            parent=self._current,
            path=None,
            sha256=None,
            samples=len(batch.samples),
            state=VersionState.CANDIDATE if reason is None else VersionState.REJECTED,
            metrics=_finite(metrics),  # the reason names a value that is not a number
            reason=reason,
        )

    def _reject(self, version: PolicyVersion, batch: LeasedBatch) -> None:
        """Registers a version that never serves; after several in a row the lineage pauses."""
        before = self._rejections()
        pauses = len(before) + 1 >= MANY_REJECTIONS
        self._register(version, batch.name, give_back=before if pauses else ())
        self._forget_folder(version.number)
        log.warning(
            "version rejected lineage=%s version=%d: %s", self.name, version.number, version.reason
        )
        self._is_paused()

    def _forget_folder(self, number: int) -> None:
        """Removes what was written of a version that is not registered with a folder."""
        remove_adapter(version_path(self._store.dir, self.name, number, self._epoch))

    def _save(
        self, candidate: PolicyVersion, batch: LeasedBatch, trainer: PolicyTrainer
    ) -> PolicyVersion:
        """Writes the adapter's folder, then the checkpoint."""
        v = candidate
        path = version_path(self._store.dir, v.lineage, v.number, self._epoch)
        card = Card(v.lineage, v.number, v.parent, self._config.method, batch.turns, v.metrics)
        version = replace(v, path=str(path), sha256=trainer.weights.save(path, card))
        training = trainer.snapshot().training
        checkpoint = Checkpoint(version, batch.name, training, self._decided)
        save_checkpoint(self._folder, checkpoint, self._epoch)
        return version

    def _keep(self, version: PolicyVersion, batch: LeasedBatch) -> None:
        """Registers a saved version and settles its samples."""
        self._register(version, batch.name, self._decided)
        self._current = version.number
        self._evaluator.accept(version.number)
        self.report(None)

    def _register(
        self,
        version: PolicyVersion,
        batch: str,
        decided: int | None = None,
        give_back: Sequence[int] = (),
    ) -> None:
        state = self._store.versions.add(version, batch, decided, give_back)
        if state is VersionState.REJECTED and version.path is not None:  # its parent was withdrawn
            self._forget_folder(version.number)
            remove_checkpoint(self._folder)
        self._writers.write(version.number, version.metrics)
        log.info(
            "version made lineage=%s version=%d state=%s",
            version.lineage,
            version.number,
            state,
        )

    def _bring_into_service(
        self, version: PolicyVersion, *, withdraw: Decisions | None = None
    ) -> None:
        """Publishes or withdraws, again and again while the engine fails, until the learner stops.

        The other lineages wait meanwhile: they have the same engine.
        """
        retrying = self._retrying("publishing")
        try:
            if withdraw:
                retrying(self._publish, version, withdraw=withdraw)
            else:
                retrying(self._publish_unless_overtaken, version)
        except AdapterError as error:
            self._withdraw(version, str(error))
        except RetryError:
            log.warning("version not published lineage=%s version=%d", self.name, version.number)

    def _publish_unless_overtaken(self, version: PolicyVersion) -> None:
        if self._store.versions.overtaken(version):
            log.warning(
                "version not published lineage=%s version=%d: another one was put into service",
                version.lineage,
                version.number,
            )
        else:
            self._publish(version)

    def _retrying(self, what: str) -> Retrying:
        """Tries again and again while that raises EngineError, until the learner stops."""
        return Retrying(
            retry=retry_if_exception_type(EngineError),
            wait=wait_exponential(multiplier=self._first_wait_s, max=30.0),
            sleep=sleep_using_event(self._stop),
            stop=stop_when_event_set(self._stop),
            before_sleep=partial(self._log_failure, what),
        )

    def _log_failure(self, what: str, attempt: RetryCallState) -> None:
        error = attempt.outcome.exception() if attempt.outcome else None
        number = attempt.attempt_number
        log.warning("%s failed lineage=%s attempt=%d: %s", what, self.name, number, error)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that JSON can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
