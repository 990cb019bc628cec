"""docs/environments.md: its program runs as it stands there.

Its environment is played in tests/rollout/test_document.py.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from nextstate.store import Store
from tests.proxy.running_proxy import Running, both
from tests.scripted_engine import MODEL, Script, ScriptedEngine

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"


def test_the_program_opens_plays_and_closes_a_group(store: Store, tmp_path: Path) -> None:
    program, *_ = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        here = program.replace("http://127.0.0.1:8080", p.url).replace("MODEL", MODEL)
        engine.queue += [Script(("a", ".txt")), Script(("b", ".txt"))] * 2
        await asyncio.to_thread(exec, here, {})
        found = [store.episodes.get(f"words-1-{number}") for number in range(4)]
        assert [episode and episode.outcome for episode in found] == [1.0, 0.0, 1.0, 0.0]
        assert store.counts()["turns/trainable"] == 4
        assert len(store.judging.lease(9, 60)) == 4

    both(test, store, tmp_path)
