"""An episode as a page shows it: what it tried, its rewards, and its steps with screenshots."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nextstate.app.episode_views import versions_text
from nextstate.app.page import turns
from nextstate.episodes import Episode
from nextstate.hooks import AgentProfile
from nextstate.records import Json
from nextstate.store import Store

MOST_BYTES = 8 << 20
"""Of a screenshot; a larger file is not shown."""
_STEPS = 25
"""Steps on one page."""
_PNG = b"\x89PNG\r\n\x1a\n"


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
        line["picture"] = screenshot_file(store.dir, episode.id, place) is not None
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


def screenshot(state_dir: Path, episode: str, step: int) -> bytes | None:
    """The PNG of a step; None if there is none, or if the file is no PNG or too large."""
    file = screenshot_file(state_dir, episode, step)
    if file is None:
        return None
    with suppress(OSError), open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as opened:
        found = opened.read(MOST_BYTES + 1)
        return found if found.startswith(_PNG) and len(found) <= MOST_BYTES else None
    return None


def screenshot_file(state_dir: Path, episode: str, step: int) -> Path | None:
    """STATE/screenshots/EPISODE/STEP.png; None if it is not there or a link leads elsewhere.

    Whoever runs an environment with a screen puts it there; steps are numbered from 0.
    """
    file = state_dir / "screenshots" / episode / f"{step}.png"
    with suppress(OSError, ValueError):
        if file.is_file() and file.resolve() == state_dir.resolve() / file.relative_to(state_dir):
            return file
    return None


def _of(used: int, most: int | None) -> str:
    return str(used) if most is None else f"{used} of {most}"
