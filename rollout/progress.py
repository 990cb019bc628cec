"""What an endless run has done so far: a file that it writes and `nextstate status` reads."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nextstate.episodes import SOLVED
from nextstate.records import Json
from nextstate.wire import json_object
from rollout.attempt import Attempt

log = logging.getLogger(__name__)

WRITE_EVERY_S = 2.0
FILE = "progress.json"


@dataclass(slots=True)
class Progress:
    """Counts since the run began."""

    environment: str
    since: float
    """Unix time in seconds."""
    episodes: int = 0
    """That trained or were compared, without those of exams."""
    solved: int = 0
    failed: int = 0
    """Among them: environment or proxy broke."""
    exams: int = 0
    """Episodes of exams."""
    playing: int = 0
    model_s: float = 0.0
    environment_s: float = 0.0
    yields: bool = False
    """Whether people use the engine, so that it plays one at a time."""

    def ended(self, attempt: Attempt, *, exam: bool) -> None:
        """Counts an episode."""
        if exam:
            self.exams += 1
            return
        self.episodes += 1
        self.solved += attempt.outcome is not None and attempt.outcome >= SOLVED
        self.failed += attempt.outcome is None
        self.model_s += attempt.model_s
        self.environment_s += attempt.environment_s

    def write(self, folder: Path) -> None:
        """Replaces the file; a failure is only logged."""
        file = folder / FILE
        try:
            file.with_suffix(".draft").write_text(json.dumps(asdict(self)))
            file.with_suffix(".draft").replace(file)
        except OSError as error:
            log.warning("`nextstate status` does not show the rollout: %s", error)


def read_progress(folder: Path) -> Json:
    """What the last run wrote; {} if there was none."""
    try:
        return json_object((folder / FILE).read_bytes()) or {}
    except OSError:
        return {}


def progress_text(found: Json) -> str:
    """The same in plain words.

    >>> print(progress_text({"environment": "tools", "since": 2e5, "episodes": 8, "solved": 2,
    ...     "failed": 0, "exams": 64, "playing": 8, "model_s": 12.0, "environment_s": 4.0,
    ...     "yields": True})[:-15])
    tools: 8 episodes, 2 solved, 0 failed, 64 of exams, 8 playing; an episode waits 1.5 s for the \
model, 0.5 s for its environment; people use the engine, so it plays one at a time; since 1970
    """
    count = max(1, found["episodes"])
    told = [
        f"{found['environment']}: {found['episodes']} episodes, {found['solved']} solved, "
        f"{found['failed']} failed, {found['exams']} of exams, {found['playing']} playing",
        f"an episode waits {found['model_s'] / count:.2g} s for the model, "
        f"{found['environment_s'] / count:.2g} s for its environment",
    ]
    if found["yields"]:
        told.append("people use the engine, so it plays one at a time")
    told.append(f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(found['since']))}")
    return "; ".join(told)
