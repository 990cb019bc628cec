"""Writes an update's metrics outside the store: to a file, TensorBoard or Weights & Biases."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from learner.config import LearnerConfig
from nextstate.errors import StartError

log = logging.getLogger(__name__)


class MetricWriter(Protocol):
    """Takes the metrics of one version after another."""

    def write(self, version: int, metrics: Mapping[str, float]) -> None:
        """Keeps the metrics of the update that made `version`."""
        ...

    def close(self) -> None:
        """Writes what is still buffered."""
        ...


class JsonLines:
    """One line a version, appended to a `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, version: int, metrics: Mapping[str, float]) -> None:
        """Appends the line; if the disk is full, appends nothing."""
        with self._path.open("ab", buffering=0) as file:
            size, line = file.tell(), orjson.dumps({"version": version, **metrics}) + b"\n"
            if file.write(line) != len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Nothing is buffered."""


class TensorBoard:
    """Event files in a folder, one scalar for each metric, with the version as the step."""

    def __init__(self, folder: Path) -> None:
        writer: Any = importlib.import_module("tensorboardX")
        # The file name has only seconds: a quick restart would overwrite the earlier file.
        suffix = f".{time.time_ns()}"
        self._writer = writer.SummaryWriter(str(folder), flush_secs=5, filename_suffix=suffix)

    def write(self, version: int, metrics: Mapping[str, float]) -> None:
        """Queues the scalars; they are on disk some seconds later."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, version)

    def close(self) -> None:
        """Writes what is queued."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the lineage in a project of Weights & Biases; a restart continues it."""

    def __init__(self, project: str, lineage: str, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            name=lineage,
            id=f"{project}-{lineage}",
            dir=str(folder),
            resume="allow",
            reinit="create_new",  # otherwise a second lineage would get the first one's run
        )

    def write(self, version: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics."""
        self._run.log(dict(metrics), step=version)

    def close(self) -> None:
        """Sends what is queued and ends the run."""
        self._run.finish()


class MetricWriters:
    """Several writers. What one of them cannot write is logged: metrics never end training."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = writers

    def write(self, version: int, metrics: Mapping[str, float]) -> None:
        """Writes to each."""
        for writer in self._writers:
            try:
                writer.write(version, metrics)
            except Exception:
                log.exception(
                    "metrics not written to=%s version=%d", type(writer).__name__, version
                )

    def close(self) -> None:
        """Closes each."""
        for writer in self._writers:
            try:
                writer.close()
            except Exception:
                log.exception("metrics not closed in=%s", type(writer).__name__)


def open_writers(config: LearnerConfig, folder: Path, lineage: str) -> MetricWriters:
    """The lineage's writers. Raises StartError if `wandb` is set and not installed."""
    writers: list[MetricWriter] = [JsonLines(folder / "metrics.jsonl")]
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        log.warning("no TensorBoard files: tensorboardX is not installed; run `make env`")
    elif config.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard"))
    if config.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise StartError(
                f"[learner] wandb = {config.wandb!r} needs the package wandb, 0.19.10 or newer, "
                'which is not installed: `pip install wandb`, or set it to ""'
            )
        writers.append(WeightsAndBiases(config.wandb, lineage, folder))
    return MetricWriters(writers)
