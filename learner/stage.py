"""A lineage's turn: lease a batch, train on it, check the candidate, keep it, publish, watch.

Its order makes a kill harmless at any point. The adapter's folder is written first, then the
checkpoint, then the store registers the version and settles its samples in one transaction. On
start, a checkpoint that the store does not know is registered, and only then are the leases of the
dead learner released: no sample trains twice and none is lost.

A candidate that the gate rejects writes nothing but one transaction, which registers it as rejected
and drops its samples with that reason: a batch whose step was thrown away once would fail again.
Killed before it, its samples are ready again; after it, they are settled. Either way the checkpoint
is still the parent's, and weights and optimizer go on from there. A version that cannot be written
to disk is forgotten, and its samples are ready again. Where one candidate after another is
rejected, the lineage pauses and its samples stay ready (`learner/patience.py`).

While a version serves, the verdicts on its turns are watched. A clear drop, or an adapter that is
no longer what was registered, takes it out of service for its parent, and it never returns by
itself. What a person has put into service is left alone: every flip says which version it replaces,
and a candidate whose parent no longer serves is retired. Training goes on from what serves.

All lineages of a process share one trainer and with it the base (`learner.turns`). Everything else
is a lineage's own: folder, checkpoint, examiner, metrics. A lineage that must not go on stops
alone; the learner ends with the last one.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from tenacity import (
    RetryCallState,
    RetryError,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_when_event_set,
    wait_exponential,
)
from torch import Tensor

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
from learner.examiner import Examiner
from learner.gate import objection
from learner.patience import MANY_REJECTIONS, Patience, rejected_in_a_row
from learner.schedule import LiveRequests, Schedule
from learner.selection import Parents, is_due, is_held_out, policy_lag, unfit
from learner.sinks import Sinks, open_sinks
from learner.trainer import PolicyTrainer, Update, build_trainer
from learner.turns import Seat, Turns
from learner.watch import REFERENCE_VERSIONS, clear_drop
from nextstate.errors import AdapterError, DiskError, EngineError, LearnerError, StartError
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import BASE_VERSION, PolicyVersion, Sample, VersionState
from nextstate.store.store import Store
from nextstate.training_status import write_training_status

log = logging.getLogger(__name__)

_LEASE_S = 3600.0
_FIRST_WAIT_S = 0.5
_FULL_DISK_WAIT_S = 30.0
_HELD_PER_SESSION = 4
_WATCH_EVERY_S = 5.0
"""A look takes 30 ms over 100 000 verdicts."""


class Publisher(Protocol):
    """Brings a version into service: loads it into the engine, probes it, flips to it."""

    def __call__(self, version: PolicyVersion, /, withdraw: bool = False) -> None:
        """Returns once the version serves; with `withdraw`, once an ancestor does in its place.

        Returns as well, and changes nothing, if another version was put into service meanwhile.
        Raises EngineError if it may work later, and AdapterError for an adapter that is not the one
        registered.
        """
        ...


def run(
    store: Store,
    config: LearnerConfig,
    model_path: str,
    lineages: Sequence[str],
    publish: Publisher,
    stop: threading.Event,
    live_requests: LiveRequests | None = None,
    engine_dtype: str = "float32",
) -> None:
    """Trains the lineages in turn, over one base, until `stop` is set.

    `live_requests` asks the engine, which `schedule = "idle"` needs. `engine_dtype` is what the
    engine computes in, as far as that is known; `auto` is half precision.
    Raises StartError for a model that cannot be loaded or a lineage that another process trains,
    and LearnerError when the last lineage that trained must not go on. Leased samples are ready
    again then.
    """
    schedule = _schedule(config, stop, live_requests)
    root = store.dir / "learner"
    with ExitStack() as opened:
        sinks: dict[str, Sinks] = {}
        for lineage in lineages:
            folder = lineage_folder(root, lineage)
            make_folder(folder)
            taken = f"lineage {lineage!r} is trained"
            remedy = "end it, or train another one with `nextstate learner --lineage NAME`"
            opened.enter_context(ProcessLock(folder / "lock", taken, remedy))
            sinks[lineage] = open_sinks(config, folder, lineage)
            opened.callback(sinks[lineage].close)
        trainer = build_trainer(config, model_path, root)
        trainer.before_micro_batch = schedule.before_micro_batch
        trainer.engine_dtype = engine_dtype
        seat = Seat(trainer, lineages)
        learners = [
            _Learner(store, config, model_path, name, publish, stop, trainer, seat, sinks[name])
            for name in lineages
        ]
        turns = Turns(learners, seat, schedule.before_update, stop, config.poll_s)
        while True:
            try:
                trainer.train_on(turns.updates())
                return
            except LearnerError as error:
                write_training_status(store.dir, turns.acting, f"stopped: {error}")
                turns.drop(error)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
                raise LearnerError(
                    f"an update did not fit: {reason}; lower [learner] micro_batch_tokens or "
                    'max_tokens, or "--gpu-memory-utilization" in [engine] args'
                ) from error


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
    """One lineage's run of the stage; see the module."""

    def __init__(
        self,
        store: Store,
        config: LearnerConfig,
        model_path: str,
        lineage: str,
        publish: Publisher,
        stop: threading.Event,
        trainer: PolicyTrainer,
        seat: Seat,
        sinks: Sinks,
    ) -> None:
        self._store = store
        self._config = config
        self._weights = WEIGHTS[config.method]
        self._model_path = model_path
        self.lineage = lineage
        self._publish = publish
        self._stop = stop
        self._trainer = trainer
        self._seat = seat
        self._sinks = sinks
        self._folder = lineage_folder(store.dir / "learner", lineage)
        self._current = BASE_VERSION
        """The version whose weights the trainer holds when it is this lineage's turn."""
        self._waits_since: float | None = None
        """Since when `min_batch` samples are ready, by the monotonic clock."""
        self._trained_before: frozenset[str] | None = None
        """Sessions that trained before any was held out; None until one may be."""
        self._examiner = Examiner(config, trainer)
        self._patience = Patience()
        self._next_look = 0.0
        """When the watch looks again, on the monotonic clock."""

    def turn(self) -> Generator[Update, None, bool]:
        """One look at the lineage, with an update if a batch is due; says whether one was.

        What follows the `yield` runs after its step.
        """
        self._watch()
        follows = self._follow_rollback()
        leased = self._lease() if follows and not self._patience.waits() else None
        if leased is None:
            return False
        self._seat.take(self.lineage)
        batch, samples = leased
        started = time.perf_counter()
        self._examiner.prepare(self._held_out(), samples, self._current)
        prepared = time.perf_counter() - started
        before = self._trainer.adapter_weights()
        if self._weights.distils:
            samples = self._trainer.with_best_hints(samples)
        yield Update(samples, self._current, self._parents())
        candidate = self._examine(samples, prepared)
        if candidate.state is VersionState.REJECTED:
            self._reject(candidate, batch, before)
            return True
        version = self._keep(candidate, batch, samples, before)
        if version is not None:
            self._bring_into_service(version)
        return True

    def recover(self) -> Checkpoint | None:
        """Settles the samples that were trained and makes every other leased one ready again."""
        checkpoint = load_checkpoint(self._folder)
        if checkpoint and self._store.version(self.lineage, checkpoint.version.number) is None:
            self._register(checkpoint.version, checkpoint.batch)
        self._store.release_samples(self.lineage)
        return checkpoint

    def resume(self) -> None:
        """Goes on from the candidate that waits to serve, or else from what serves."""
        checkpoint = self.recover()
        self._tell(None)
        versions = self._store.versions(self.lineage)
        self._patience = Patience(rejected_in_a_row(versions))
        if not versions:
            return
        newest = versions[-1]
        waits = newest.state is VersionState.CANDIDATE and not self._store.overtaken(newest)
        start = newest if waits else self._store.serving(self.lineage)
        if not self._can_go_on_from(start):
            return
        if checkpoint and checkpoint.version.number == start.number:
            self._trainer.load_training_state(checkpoint.state)
        if waits:
            self._bring_into_service(newest)

    def _follow_rollback(self) -> bool:
        """Goes on from the version that serves, where another was put into service.

        False if that one turns out to be of no use: then another serves soon. A newest version that
        has not served yet is what training goes on from.
        """
        versions = self._store.versions(self.lineage)
        if not versions or versions[-1].state is VersionState.CANDIDATE:
            return True
        serving = self._store.serving(self.lineage)
        if serving.number != self._current:
            if not self._can_go_on_from(serving):
                return False
            self._trainer.forget_moments()
            self._patience = Patience()
            self._tell(None)
        return True

    def _watch(self) -> None:
        """Takes the serving version out of service if its turns are clearly worse than before.

        Not one that a person chose: an older one than others that served, or a rejected one.
        """
        if not self._config.watch_level or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _WATCH_EVERY_S
        serving = self._store.serving(self.lineage)
        if serving.reason is not None:
            return
        later = [v for v in self._store.versions(self.lineage) if v.number > serving.number]
        before = self._store.ancestors(serving)[:REFERENCE_VERSIONS]
        if not before or any(v.state is not VersionState.REJECTED for v in later):
            return
        numbers = [version.number for version in before]
        counts = self._store.score_counts(self.lineage, [serving.number, *numbers])
        level, drop = self._config.watch_level, self._config.watch_drop
        ours, others = counts[serving.number], [counts[number] for number in numbers]
        found = clear_drop(ours, others, level=level, drop=drop)
        if found is not None:
            self._disown(serving, f"rolled back: {found}")

    def _disown(self, version: PolicyVersion, reason: str) -> None:
        """Rejects a version that was registered; if it serves, an ancestor takes its place."""
        log.error(
            "version rejected lineage=%s version=%d: %s", self.lineage, version.number, reason
        )
        serves = version.state is VersionState.SERVING
        if serves or not self._store.reject_version(self.lineage, version.number, reason):
            self._bring_into_service(replace(version, reason=reason), withdraw=True)

    def _can_go_on_from(self, version: PolicyVersion) -> bool:
        """`_go_on_from`; disowns a version whose adapter is not what was registered."""
        try:
            self._go_on_from(version)
        except AdapterError as error:
            self._disown(version, str(error))
            return False
        return True

    def _go_on_from(self, version: PolicyVersion) -> None:
        self._seat.take(self.lineage)
        if version.path is None:
            self._trainer.reset_adapter()
        else:
            check_scale(Path(version.path), self._config)
            self._trainer.load_adapter(load_weights(Path(version.path), version.sha256))
        self._trainer.restart_teacher()
        self._current = version.number
        log.info("training goes on lineage=%s version=%d", self.lineage, version.number)

    def _parents(self) -> Parents:
        return {v.number: v.parent for v in self._store.versions(self.lineage)}

    def _lease(self) -> tuple[str, list[Sample]] | None:
        """A batch of samples that may train, with its name; drops those that must not."""
        size = self._config.batch_size
        scored, hinted = self._weights.rl != 0, self._weights.distils
        parents = self._parents()
        self._drop_stale(parents)
        self._begin_to_hold_out(len(parents))
        while self._is_due(self._store.ready_samples(self.lineage, scored, hinted)):
            if self._hold_out():  # it looks at all that wait: not while there is nothing to do
                continue
            batch = uuid.uuid4().hex
            samples = self._store.lease_samples(
                self.lineage, size, batch, _LEASE_S, scored=scored, hinted=hinted
            )
            dropped = self._drop_unfit(samples, parents)
            # One of a held-out session may have become ready since.
            if not dropped and not any(self._is_held_out(s.session) for s in samples):
                self._waits_since = None
                return batch, samples
            self._store.release_samples(self.lineage)
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

    def _begin_to_hold_out(self, versions: int) -> None:
        """From `holdout_after` versions on, except for sessions that trained before."""
        config = self._config
        if self._trained_before is None and config.holdout and versions >= config.holdout_after:
            self._trained_before = self._store.trained_sessions(self.lineage)

    def _hold_out(self) -> int:
        """Keeps ready samples from training; says how many."""
        if self._trained_before is None:
            return 0
        return self._store.hold_out(self.lineage, self._is_held_out)

    def _is_held_out(self, session: str) -> bool:
        return (
            self._trained_before is not None
            and is_held_out(self.lineage, session, self._config.holdout)
            and session not in self._trained_before
        )

    def _held_out(self) -> list[Sample]:
        """The samples that the next candidate is checked on."""
        if self._trained_before is None:
            return []
        limit = self._config.holdout_samples
        return self._store.held_samples(self.lineage, limit, _HELD_PER_SESSION)

    def _drop_stale(self, parents: Parents) -> None:
        """Settles ready samples whose version is too far from the one that trains."""

        def reason(version: int) -> str | None:
            lag = policy_lag(parents, self._current, version)
            limits = {"max_lag": self._config.max_lag, "max_tokens": self._config.max_tokens}
            return unfit(0, lag, **limits)

        for text, count in self._store.drop_stale(self.lineage, reason).items():
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

    def _examine(self, samples: list[Sample], prepared_s: float) -> PolicyVersion:
        """The version that the step has made, rejected or a candidate; nothing is kept yet."""
        started = time.perf_counter()
        found = self._examiner.measure()
        reason = objection(found, self._config)
        parents = self._parents()
        lags = [policy_lag(parents, self._current, s.policy_version) for s in samples]
        metrics = {
            **self._trainer.metrics,
            "lag/max": max(lags),
            **found.metrics(),
            "gate/seconds": prepared_s + time.perf_counter() - started,
        }
        return PolicyVersion(
            lineage=self.lineage,
            number=max(parents, default=BASE_VERSION) + 1,
            parent=self._current,
            path=None,
            sha256=None,
            samples=len(samples),
            state=VersionState.CANDIDATE if reason is None else VersionState.REJECTED,
            # A value that is not a number is in the reason; JSON has none.
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            reason=reason,
        )

    def _reject(self, version: PolicyVersion, batch: str, before: Mapping[str, Tensor]) -> None:
        """Registers a version that never serves, and goes back to before its step."""
        self._register(version, batch)
        self._forget_folder(version.number)
        self._undo(before)
        log.warning(
            "version rejected lineage=%s version=%d: %s",
            self.lineage,
            version.number,
            version.reason,
        )
        rejections, pause_s = self._patience.rejected()
        if rejections >= MANY_REJECTIONS:
            said = (
                f"{rejections} versions in a row were rejected lineage={self.lineage}: lower "
                f"[learner] learning_rate = {self._config.learning_rate:g} or step_kl = "
                f"{self._config.step_kl:g}; `nextstate versions` shows each reason"
            )
            if pause_s:
                said += (
                    f"; training pauses for {pause_s / 60:.0f} min and its samples wait: restart "
                    "the learner, or put another version into service, to try at once"
                )
                self._tell(f"paused: {said}; the last reason: {version.reason}")
            log.error("%s", said)

    def _undo(self, before: Mapping[str, Tensor]) -> None:
        """Weights and optimizer as they were before the step: the checkpoint is the parent's."""
        self._trainer.load_adapter(before)
        checkpoint = load_checkpoint(self._folder)
        if checkpoint and checkpoint.version.number == self._current:
            self._trainer.load_training_state(checkpoint.state)
        else:
            self._trainer.forget_moments()
            self._trainer.restart_teacher()

    def _forget_folder(self, number: int) -> None:
        """Removes what was written of a version that is not registered with a folder."""
        path = version_path(self._store.dir, self.lineage, number)
        shutil.rmtree(path, ignore_errors=True)

    def _keep(
        self,
        candidate: PolicyVersion,
        batch: str,
        samples: list[Sample],
        before: Mapping[str, Tensor],
    ) -> PolicyVersion | None:
        """Saves adapter and checkpoint, then registers the version and settles its samples.

        None if there is no room for it: then nothing has happened, and its samples are ready.
        """
        try:
            version = self._save(candidate, batch, [sample.turn for sample in samples])
        except DiskError as error:
            log.error("%s; trying again in %.0f s", error, _FULL_DISK_WAIT_S)
            self._forget_folder(candidate.number)
            self._undo(before)
            self._store.release_samples(self.lineage)
            self._stop.wait(_FULL_DISK_WAIT_S)
            return None
        self._register(version, batch)
        self._current = version.number
        self._examiner.accept(version.number)
        self._patience = Patience()
        self._tell(None)
        return version

    def _save(self, candidate: PolicyVersion, batch: str, turns: list[str]) -> PolicyVersion:
        v = candidate
        path = version_path(self._store.dir, v.lineage, v.number)
        card = Card(v.lineage, v.number, v.parent, self._config.method, turns, v.metrics)
        sha256 = save_adapter(
            path, self._trainer.adapter_weights(), self._config, self._model_path, card
        )
        version = replace(v, path=str(path), sha256=sha256)
        state = self._trainer.training_state()
        save_checkpoint(self._folder, Checkpoint(version, batch, state))
        return version

    def _register(self, version: PolicyVersion, batch: str) -> None:
        self._store.add_version(version, batch)
        self._sinks.write(version.number, version.metrics)
        log.info(
            "version made lineage=%s version=%d state=%s",
            version.lineage,
            version.number,
            version.state,
        )

    def _tell(self, why_not: str | None) -> None:
        """Says in `nextstate status` why the lineage does not train; None: it does."""
        write_training_status(self._store.dir, self.lineage, why_not)

    def _bring_into_service(self, version: PolicyVersion, *, withdraw: bool = False) -> None:
        """Publishes or withdraws, again and again while the engine fails, until told to stop.

        The other lineages wait for it: their engine is the same, and fails them too.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(EngineError),
            wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=30.0),
            sleep=sleep_using_event(self._stop),
            stop=stop_when_event_set(self._stop),
            before_sleep=self._log_failure,
        )
        try:
            if withdraw:
                retrying(self._publish, version, withdraw=True)
            else:
                retrying(self._publish_unless_overtaken, version)
        except AdapterError as error:
            self._disown(version, str(error))
        except RetryError:
            log.warning(
                "version not published lineage=%s version=%d", version.lineage, version.number
            )

    def _publish_unless_overtaken(self, version: PolicyVersion) -> None:
        if self._store.overtaken(version):
            log.warning(
                "version not published lineage=%s version=%d: another one was put into service",
                version.lineage,
                version.number,
            )
        else:
            self._publish(version)

    def _log_failure(self, attempt: RetryCallState) -> None:
        error = attempt.outcome.exception() if attempt.outcome else None
        log.warning(
            "publishing failed lineage=%s attempt=%d: %s",
            self.lineage,
            attempt.attempt_number,
            error,
        )
