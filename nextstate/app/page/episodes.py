"""An episode as a page shows it: what it tried, its rewards, and its steps with pictures."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nextstate import sealed_files
from nextstate.app.episode_views import versions_text
from nextstate.app.page import turns
from nextstate.episodes import Episode
from nextstate.errors import SealError
from nextstate.hooks import AgentProfile
from nextstate.records import Json
from nextstate.store import Store

MOST_BYTES = 8 << 20
"""Of a picture; a larger file is not shown."""
_STEPS = 25
"""Steps on one page."""
_KINDS = {".jpg": ("image/jpeg", b"\xff\xd8\xff"), ".png": ("image/png", b"\x89PNG\r\n\x1a\n")}
"""Kind and beginning of a file, by the end of its name."""


def whole(store: Store, episode: Episode, start: int, profile: AgentProfile) -> Json:
    """Everything about one episode; of its steps those from place `start` on."""
    ids = store.episodes.turn_ids(episode.id)
    shown = ids[start : start + _STEPS]
    rewards = store.episodes.rewards(episode.id)
    by_id = {turn.id: turn for turn in store.lookup.summaries(shown)}
    steps: list[Json] = []
    for place, name in enumerate(shown, start):
        if name not in by_id:
            continue
        line = turns.line(by_id[name], profile)
        line["step"] = place
        line["rewards"] = [reward for reward in rewards if reward.turn == name]
        line["picture"] = picture_file(store.dir, episode.id, place) is not None
        steps.append(line)
    return {
        "episode": episode,
        "facts": facts(episode),
        "versions": versions_text(episode),
        "rewards": [reward for reward in rewards if reward.turn is None],
        "steps": steps,
        "count": len(ids),
        "start": start,
        "end": start + len(shown),
        "earlier": max(start - _STEPS, 0),
    }


def facts(episode: Episode) -> list[tuple[str, str]]:
    """(name, value) of what is known of it besides its outcome."""
    found = [
        ("Environment", episode.environment),
        ("Group", episode.group),
        ("Split", episode.split.value),
        ("Seed", episode.seed),
        ("Calls", _of(episode.calls, episode.max_calls)),
        ("Tokens", _of(episode.tokens, episode.max_tokens)),
        ("Deadline", None if episode.deadline_s is None else f"{episode.deadline_s:g} s"),
        ("Ended", episode.status and episode.status.value),
    ]
    found += [(f"Sampling: {name}", f"{value:g}") for name, value in episode.sampling.items()]
    return [(name, str(value)) for name, value in found if value is not None]


def picture(state_dir: Path, episode: str, step: int) -> tuple[bytes, str] | None:
    """What the agent saw before its reply at a step, and the kind of its content.

    None if there is no file, or if it is too large or not of the kind that its name says.
    """
    file = picture_file(state_dir, episode, step)
    if file is None:
        return None
    kind, beginning = _KINDS[file.suffix]
    with (
        suppress(OSError, SealError),
        open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened,
    ):
        found = sealed_files.opened(file, opened.read(MOST_BYTES + sealed_files.MOST_MORE + 1))
        return (found, kind) if found.startswith(beginning) and len(found) <= MOST_BYTES else None
    return None


def picture_file(state_dir: Path, episode: str, step: int) -> Path | None:
    """STATE/pictures/EPISODE/STEP.jpg or .png; None if it is not there or a link leads elsewhere.

    Whoever runs an environment with a screen puts it there; steps are numbered from 0.
    """
    for suffix in _KINDS:
        file = state_dir / "pictures" / episode / f"{step}{suffix}"
        real = state_dir.resolve() / file.relative_to(state_dir)
        with suppress(OSError):
            if file.is_file() and file.resolve() == real:
                return file
    return None


def _of(used: int, most: int | None) -> str:
    return str(used) if most is None else f"{used} of {most}"
