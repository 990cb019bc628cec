"""A group of episodes from its opening by HTTP to the version that its steps have made.

Proxy, judge and learner are the real ones, on real sockets and one store. Only the engine is
scripted.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from judge.config import JudgeConfig
from judge.stage import run
from nextstate.hooks import JudgeSettings, load_judge
from nextstate.store import Store
from tests.judge.test_stage import ScriptedEngine as Tokenizer
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import CONFIG, Recorded, load_float64, logprobs, save_tiny_model
from tests.proxy.environment import Environment, call, said, user
from tests.proxy.running_proxy import Running, both
from tests.scripted_engine import Script, ScriptedEngine

TASK = user("Make the tests pass.")
RIGHT, WRONG = ("fix ", "it"), ("rm ", "-rf")
RIGHT_IDS, WRONG_IDS = (10, 11), (30, 31)
FAILED, QUIET = "Process exited with code 1", "a.txt"
PROMPT_IDS = (1, 2, 3)
"""Of the scripted engine."""


def sampled(model: torch.nn.Module, ids: tuple[int, ...]) -> list[float]:
    with torch.no_grad():
        return logprobs(model, PROMPT_IDS, ids).tolist()


async def play(
    engine: ScriptedEngine,
    p: Running,
    opened: dict[str, Any],
    script: Script,
    solved: bool,
    shown: str,
) -> list[str]:
    """Two steps of an episode; `shown` follows the first. Returns their turns."""
    engine.queue += [script] * 2
    url, reply = opened["base_url"], said("".join(script.pieces))
    first, _ = await call(p, url, TASK)
    second, _ = await call(p, url, TASK, reply, user(shown))
    end = QUIET if solved else FAILED
    await Environment(p).close(opened["episode"], outcome=float(solved), observation=end)
    return [first, second]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def judge(store: Store, done: Callable[[], bool]) -> None:
    """Runs the judge `outcome` until something is done."""
    stop, kind = asyncio.Event(), load_judge(["outcome"], JudgeSettings())
    config = JudgeConfig(kind="outcome", votes=1, look_s=0.01)
    stage = asyncio.create_task(run(store, config, kind, Tokenizer(), stop))
    await until(done)
    stop.set()
    await stage
    await kind.close()


def test_a_group_is_played_judged_settled_and_trained(store: Store, tmp_path: Path) -> None:
    turns: list[str] = []
    model_path = save_tiny_model(tmp_path / "model")
    base = load_float64(model_path)
    right, wrong = sampled(base, RIGHT_IDS), sampled(base, WRONG_IDS)
    scripts = {
        True: Script(RIGHT, tokens=list(zip(RIGHT_IDS, right, strict=True))),
        False: Script(WRONG, tokens=list(zip(WRONG_IDS, wrong, strict=True))),
    }

    async def test(engine: ScriptedEngine, p: Running) -> None:
        asked = {"environment": "shell", "task": "fix", "group": "g", "group_size": 4}
        group = (await Environment(p).ask("POST", "groups", asked))["episodes"]
        for opened, solved, shown in zip(
            group, (True, True, False, False), (QUIET, QUIET, FAILED, QUIET), strict=True
        ):
            turns.extend(await play(engine, p, opened, scripts[solved], solved, shown))
        await judge(store, lambda: store.counts().get("samples/ready") == 8)
        assert (await Environment(p).get("g-0"))["state"] == "settled"

    both(test, store, tmp_path)
    # Half is solved, so z_outcome is ±1 and the judge counts half. It votes -1 on the three steps
    # of eight that a failure follows, and 0 on the others: z_process is -√(5/3) and √(3/5).
    better, worse = math.sqrt(3 / 5) / 2, -math.sqrt(5 / 3) / 2
    expected = [1 + better] * 4 + [-1 + worse] * 2 + [-1 + better, -1 + worse]
    found = {
        turn: advantage
        for number in range(4)
        for turn, (_, advantage, _) in store.groups.advantages(f"g-{number}").items()
    }
    assert found == pytest.approx(dict(zip(turns, expected, strict=True)))

    recorded = Recorded(tmp_path / "state", model_path)
    train(
        recorded,
        model_path,
        FakeEngine(recorded.store),
        replace(CONFIG, batch_size=8, method="binary"),
    )
    (version,) = store.versions.all("main")
    assert recorded.states() == {"trained": 8}
    assert version.metrics["score/mean"] == 0.5  # of the outcomes
    assert [turn for turn, _ in store.versions.used_turns("main", 1)] == turns
    policy = PeftModel.from_pretrained(load_float64(model_path), str(version.path)).double()
    assert sum(sampled(policy, RIGHT_IDS)) > sum(right)
    assert sum(sampled(policy, WRONG_IDS)) < sum(wrong)
    recorded.store.close()
