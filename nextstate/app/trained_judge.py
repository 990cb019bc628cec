"""The judges that `nextstate judge train` has made: where they lie, and which one votes.

A version is an adapter's folder under `judge/` in the state folder. Its card holds what it was
trained on, how it agreed with labels that it had not seen, and its calibration. The newest one that
was trained on the configured base model votes; the engine loads it under a name of its own when a
vote misses it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from nextstate.app.settings import Settings
from nextstate.engine.client import EngineClient, load_everywhere
from nextstate.errors import AdapterError, AnswerError, BusyError, EngineError, JudgeError
from nextstate.hooks import Calibration, TrainedJudge
from nextstate.private_files import make_folder
from nextstate.process_lock import ProcessLock
from nextstate.records import Json, PolicyVersion, VersionState

log = logging.getLogger(__name__)

NAME = "judge"
"""The lineage of its versions. One of a user with this name has other hashes in its names."""
TEMPERATURE, KAPPA, HELD_OUT = "judge/temperature", "judge/kappa", "judge/held_out"
KAPPA_LOW, KAPPA_HIGH = "judge/kappa_low", "judge/kappa_high"
BASE_KAPPA, EXAMPLES, OWN = "judge/kappa_base", "judge/examples", "judge/own"
"""Names of the metrics in a version's card."""
LOOK_S = 5.0
"""Seconds between two looks for a newer version."""
_FOLDER = re.compile(r"v\d{6}")
_NOT_NOW = (408, 425, 429)


def judge_folder(settings: Settings) -> Path:
    """The folder with all versions."""
    return settings.store.path / NAME


def judges_lock(settings: Settings) -> ProcessLock:
    """Keeps others from training a judge, and from what must not happen beside that."""
    make_folder(judge_folder(settings))
    taken = "a judge is being trained"
    return ProcessLock(judge_folder(settings) / "lock", taken, "wait for it, or end it")


def judge_path(settings: Settings, number: int) -> Path:
    """The folder of one version."""
    return judge_folder(settings) / f"v{number:06d}"


def judge_paths(settings: Settings) -> list[Path]:
    """The folders of all versions, for whatever model, oldest first."""
    return sorted(p for p in judge_folder(settings).glob("v*") if _FOLDER.fullmatch(p.name))


def judge_versions(settings: Settings) -> list[PolicyVersion]:
    """The versions for the configured base model, oldest first; unreadable ones are left out."""
    versions = [_read(path, settings.engine.model_path) for path in judge_paths(settings)]
    return [version for version in versions if version is not None]


def newest_number(settings: Settings) -> int:
    """The highest number that a folder has, for whatever model; 0 if there is none."""
    return max((int(path.name[1:]) for path in judge_paths(settings)), default=0)


def _read(path: Path, model_path: str) -> PolicyVersion | None:
    try:
        card: Json = orjson.loads((path / "card.json").read_bytes())
        shape: Json = orjson.loads((path / "adapter_config.json").read_bytes())
        if shape["base_model_name_or_path"] != model_path:
            return None
        return PolicyVersion(
            lineage=NAME,
            number=int(card["number"]),
            parent=card["parent"],
            path=str(path),
            sha256=str(card["sha256"]),
            samples=int(card["metrics"][EXAMPLES]),
            state=VersionState.SERVING,
            metrics=dict(card["metrics"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the trained judge in %s cannot be read: %s", path, error)
        return None


class TrainedJudges:
    """Tells which trained judge votes; looks for a newer one now and then."""

    def __init__(
        self, settings: Settings, engines: Sequence[EngineClient], look_s: float = LOOK_S
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._look_s = look_s
        self._look_at = -1.0
        self._newest: PolicyVersion | None = None
        self._unusable: set[int] = set()
        """Versions that the engine or the disk has refused."""

    def __call__(self) -> TrainedJudge | None:
        """The newest version that can be used, or None: then the base votes."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self._look_s
            usable = [
                version
                for version in judge_versions(self._settings)
                if version.number not in self._unusable
            ]
            self._newest = usable[-1] if usable else None
        return None if self._newest is None else self._described(self._newest)

    def _described(self, version: PolicyVersion) -> TrainedJudge:
        assert version.adapter_name is not None
        return TrainedJudge(
            name=f"engine v{version.number}",
            model=version.adapter_name,
            calibration=Calibration(version.metrics[TEMPERATURE]),
            load=lambda: self._load(version),
        )

    async def _load(self, version: PolicyVersion) -> None:
        try:
            await load_everywhere(self._engines, version, self._settings.store.path)
        except (AdapterError, AnswerError) as error:
            if isinstance(error, AnswerError) and (error.status >= 500 or error.status in _NOT_NOW):
                raise BusyError(str(error)) from error
            self._unusable.add(version.number)
            self._look_at = -1.0
            log.error(
                "the trained judge v%d is not used, the one before it votes: %s",
                version.number,
                error,
            )
            raise JudgeError(f"the trained judge v{version.number}: {error}") from error
        except EngineError as error:
            raise BusyError(str(error)) from error


def trained_text(version: PolicyVersion) -> str:
    """What one version is worth, in plain words, as far as its card knows it."""
    m = version.metrics
    text = f"engine v{version.number} votes, trained on {m[EXAMPLES]:.0f} labelled next states"
    if OWN in m:
        text += f", {m[OWN]:.0f} of them yours"
    if KAPPA not in m:
        return text
    text += f": κ {m[KAPPA]:.2f}"
    if KAPPA_LOW in m and KAPPA_HIGH in m:
        text += f" ({m[KAPPA_LOW]:.2f} to {m[KAPPA_HIGH]:.2f})"
    if HELD_OUT in m:
        text += f" on {m[HELD_OUT]:.0f} that it had not seen"
    return text + (f" (the base model: {m[BASE_KAPPA]:.2f})" if BASE_KAPPA in m else "")
