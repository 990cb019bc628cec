"""Forgetting from the web page: what would go, and the command that takes it.

The command runs in a process of its own: it reads every turn, loads the learner's code and writes
the database anew, and the proxy must go on answering meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from nextstate.app.page import turns
from nextstate.app.settings import Settings
from nextstate.errors import EXIT_LATER
from nextstate.hooks import AgentProfile
from nextstate.store import Store
from nextstate.store.forgetting import Wanted
from proxy.answers import Refused

MOST = 5000
"""Turns that one form names: they are the arguments of a command."""
_SHOWN = 8
_ONE = asyncio.Semaphore(1)
"""The command reads every turn and writes the database anew: once is enough at a time."""


def plan(
    store: Store, ids: Sequence[str], sees: Sequence[str], profile: AgentProfile
) -> dict[str, Any]:
    """What forgetting these turns takes, for the page that asks. Raises Refused."""
    if len(ids) > MOST:
        raise Refused(
            413, f"These are more than {MOST} turns: `nextstate forget --session NAME` takes them."
        )
    found = store.forgetting.plan(Wanted(turns=ids))
    if not {*found.versions} <= {*sees}:
        raise Refused(403, "Another lineage learned from these turns: use its key.")
    return {
        "plan": found,
        "lines": [turns.line(t, profile) for t in store.lookup.summaries(found.turns[:_SHOWN])],
        "more": max(len(found.turns) - _SHOWN, 0),
    }


async def run(settings: Settings, ids: Sequence[str], by: str) -> str:
    """Forgets turns for `by`; returns what the command says. Raises Refused with its error."""
    if _ONE.locked():
        raise Refused(503, "Something is being forgotten already: try again in a moment.")
    async with _ONE:
        return await _run(settings, ids, by)


async def _run(settings: Settings, ids: Sequence[str], by: str) -> str:
    argv = [sys.executable, "-P", "-m", "nextstate", "forget", "--yes", "--by", by]
    if settings.file.exists():
        argv += ["--config", str(settings.file.absolute())]
    process = await asyncio.create_subprocess_exec(
        *argv,
        "--",
        *ids,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told, failed = await process.communicate()
    if process.returncode != 0:
        lines = failed.decode(errors="replace").strip().splitlines()
        status = 503 if process.returncode == EXIT_LATER else 409
        raise Refused(status, lines[-1] if lines else "The command ended without a word.")
    # Before that it shows the turns themselves.
    lines = told.decode(errors="replace").splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith("forgot ")), len(lines))
    return ". ".join(lines[start:]) or "There was nothing of that any more."
