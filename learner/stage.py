"""The learner stage: verdicts in, versions out.

`run` puts the stage together and `train_in_turn` is its loop: each lineage in turn takes at most
one update (`Lineage.update`), so none can starve another. All lineages share one trainer and with
it the base. A lineage that must not go on is left alone for some time, though what it serves is
watched; when the last one must not go on, the learner ends with its error.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from learner.config import LearnerConfig
from learner.evaluator import Evaluator
from learner.examining import Examining
from learner.folders import lineage_folder
from learner.lineage import Lineage, Publisher
from learner.memory import REMEDY, can_divide, try_largest_batch
from learner.metric_writers import MetricWriters, open_writers
from learner.model import check_devices, pick_device
from learner.rank_processes import started
from learner.ranks import Ranks
from learner.schedule import LiveRequests, Schedule, parse_schedule
from learner.shared_trainer import SharedTrainer
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.errors import LearnerError, NoRoomError, StartError, TakenError
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.store import Store

log = logging.getLogger(__name__)

PAUSE_S = 600.0
"""How long a lineage that must not go on is left alone; each further time twice as long."""
LONGEST_PAUSE_S = 6 * 3600.0
_TOLD_POLL_S = 1.0
"""The shortest pause where each look is a question to a server."""


def run(
    store: Store,
    config: LearnerConfig,
    model_path: str,
    lineages: Sequence[str],
    publish: Publisher,
    stop: threading.Event,
    live_requests: LiveRequests | None = None,
    engine_dtype: str = "float32",
    *,
    examined: Sequence[str] = (),
    first_wait_s: float = 0.5,
    full_disk_wait_s: float = 30.0,
) -> None:
    """Trains the lineages in turn, over one base, until `stop` is set.

    `live_requests` asks the engine; `schedule = "idle"` needs it. `engine_dtype` is the precision
    in which the engine computes, if known; `auto` is half precision. `[rollout]` holds the
    exams of the `examined` lineages; candidates of others take exams while somebody else holds
    theirs, but versions that are whole models take none. The waits are `Lineage`'s.
    Raises StartError for a model that cannot be loaded, a batch that does not fit into memory or a
    lineage that another process trains, and LearnerError when the last lineage must not go on.
    Leased samples are ready again then.
    """
    schedule = _schedule(config, stop, live_requests)
    check_devices(config, pick_device(config))
    root = store.dir / "learner"
    with ExitStack() as opened:
        writers: dict[str, MetricWriters] = {}
        for name in lineages:
            folder = lineage_folder(root, name)
            make_folder(folder)
            taken = f"lineage {name!r} is trained"
            remedy = "end it, or train another one with `nextstate learner --lineage NAME`"
            # With a server the holder may be a machine that was cut off, and end soon.
            error = TakenError if store.config.url.startswith("postgres") else StartError
            opened.enter_context(ProcessLock(folder / "lock", taken, remedy, error))
            opened.enter_context(store.roles.hold(f"learner/{name}", taken, remedy))
            writers[name] = open_writers(config, folder, name)
            opened.callback(writers[name].close)
        file = lineage_folder(root, lineages[0]) / "ranks"  # whose lock we hold
        given = model_path, root, engine_dtype
        begin = partial(_begin, opened, file, stop, schedule, live_requests, *given)
        trainer = None
        try:
            trainer = begin(config)
        except NoRoomError as error:
            if not can_divide(config, model_path):
                raise
            log.warning("the ranks divide the base: with a whole one for each, %s", error)
        if trainer is None:  # here the error holds the first one no longer
            gc.collect()
            torch.cuda.empty_cache()
            config = replace(config, divided=True)
            trainer = begin(config)
        shared = SharedTrainer(trainer, lineages)
        learners = [
            Lineage(
                name,
                store,
                config,
                shared,
                Evaluator(config, trainer),
                publish,
                writers[name],
                stop,
                examining=None
                if config.trains_all
                else Examining(store, name, configured=name in examined),
                first_wait_s=first_wait_s,
                full_disk_wait_s=full_disk_wait_s,
            )
            for name in lineages
        ]
        try:
            poll_s = max(config.poll_s, _TOLD_POLL_S * store.database.tells_changes)
            train_in_turn(learners, shared.forget, schedule.may_update, stop, poll_s)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
            raise LearnerError(f"an update did not fit: {reason}; {REMEDY}") from error


def _begin(
    opened: ExitStack,
    file: Path,
    stop: threading.Event,
    schedule: Schedule,
    live_requests: LiveRequests | None,
    model_path: str,
    work_dir: Path,
    engine_dtype: str,
    config: LearnerConfig,
) -> PolicyTrainer:
    """The trainer of rank 0. The other ranks are there until `opened` is closed, or it raises."""
    work = partial(follow, config, model_path, work_dir, engine_dtype, live_requests)
    on_gpus = config.divided and pick_device(config).type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"  # layers come from GPU to GPU
    with ExitStack() as begun:
        ranks = begun.enter_context(started(config.ranks, work, stop.set, file, backend=backend))
        trainer = _trainer(config, model_path, work_dir, engine_dtype, schedule, ranks)
        opened.enter_context(begun.pop_all())
    return trainer


def follow(
    config: LearnerConfig,
    model_path: str,
    work_dir: Path,
    engine_dtype: str,
    live_requests: LiveRequests | None,
    ranks: Ranks,
) -> None:
    """What another rank than the first does: it takes part in updates. Raises EOFError at the end.

    It knows no store and no lineage. Raises like `run`.
    """
    schedule = _schedule(config, threading.Event(), live_requests)
    _trainer(config, model_path, work_dir, engine_dtype, schedule, ranks).follow()


def _trainer(
    config: LearnerConfig,
    model_path: str,
    work_dir: Path,
    engine_dtype: str,
    schedule: Schedule,
    ranks: Ranks,
) -> PolicyTrainer:
    """The trainer of a rank, for which the largest batch fits."""
    if ranks.count > 1:
        threads = (config.threads or torch.get_num_threads()) // ranks.count
        config = replace(config, threads=max(1, threads))

    def build() -> PolicyTrainer:
        trainer = build_trainer(config, model_path, work_dir, ranks)
        trainer.engine_dtype = engine_dtype
        log.info("the largest batch fits rows=%d tokens=%d", *try_largest_batch(trainer))
        trainer.before_pass = schedule.before_pass
        return trainer

    return ranks.together(build)


def train_in_turn(
    lineages: Sequence[Lineage],
    forget: Callable[[str], None],
    may_update: Callable[[], bool],
    stop: threading.Event,
    poll_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Updates each lineage in turn until `stop` is set; a round without an update ends in a pause.

    A lineage that may not train now, because of its pause or because `may_update` says no, still
    looks at what serves. All of it is in this one thread, so no update is under way then. `forget`
    drops the trainer's state of a lineage. Raises LearnerError when the last lineage must not go
    on.
    """
    turns = [_Turn(lineage) for lineage in lineages]

    def attempt(turn: _Turn, act: Callable[[], bool | None]) -> bool:
        try:
            return bool(act())
        except LearnerError as error:
            turn.lineage.stopped(error)
            forget(turn.lineage.name)
            if all(other is turn or other.is_paused(clock()) for other in turns):
                turn.lineage.release()
                raise
            turn.pause(clock(), error)
            return False

    while not stop.is_set():
        for turn in turns:
            if turn.must_resume and not turn.is_paused(clock()):
                turn.must_resume = False
                attempt(turn, turn.lineage.resume)
        trained = False
        for turn in turns:
            if stop.is_set():
                return
            if turn.is_paused(clock()) or turn.must_resume or not may_update():
                turn.lineage.look()
            else:
                trained |= attempt(turn, turn.lineage.update)
        if not trained:
            stop.wait(poll_s)


class _Turn:
    """A lineage's place in the loop."""

    def __init__(self, lineage: Lineage) -> None:
        self.lineage = lineage
        self.must_resume = True
        self._paused_until = 0.0
        self._pause_s = PAUSE_S

    def is_paused(self, now: float) -> bool:
        """True if the lineage is left alone."""
        return now < self._paused_until

    def pause(self, now: float, error: LearnerError) -> None:
        """Leaves the lineage alone for some time after `error`."""
        log.error(
            "training stopped lineage=%s: %s; the other lineages go on. It is left alone for %.0f "
            "min; before that, the next start of the learner tries this one again",
            self.lineage.name,
            error,
            self._pause_s / 60,
        )
        self.must_resume = True
        self._paused_until = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        try:
            self.lineage.release()
        except LearnerError as also:
            log.error("samples stay leased for now lineage=%s: %s", self.lineage.name, also)


def _schedule(
    config: LearnerConfig, stop: threading.Event, live_requests: LiveRequests | None
) -> Schedule:
    kind, window = parse_schedule(config.schedule)
    if kind == "idle" and live_requests is None:
        raise StartError(
            '[learner] schedule = "idle" asks the engine whether it is idle, and there is none: '
            'set [learner] schedule to "always" or a time'
        )
    return Schedule(
        kind,
        stop.wait,
        window=window,
        live_requests=live_requests,
        patience_s=config.idle_patience_s,
    )
