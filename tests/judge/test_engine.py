"""The judge on the real vLLM, whose tiny policy cannot judge: nonsense is never a reward."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from demo.course import MODEL
from judge.config import JudgeConfig
from judge.stage import run
from nextstate.engine.client import EngineClient
from nextstate.errors import JudgeError
from nextstate.hooks import Evidence, JudgeSettings
from nextstate.records import NextState, Source
from plugins.judges.engine import EngineJudge, create
from plugins.judges.one_word import OPTIONS, WORDS, word_logprobs, word_question
from tests.judge.test_stage import Watched, a_turn, open_store, record
from tests.running_loop import Engine

pytestmark = pytest.mark.engine

EVIDENCE = Evidence(
    (("user", "Name a river."),), "**Nile**", (NextState("t", Source.USER, "No bold.", 0.9),)
)
TURNS = 2


def settings_for(engine: Engine) -> JudgeSettings:
    return JudgeSettings(
        model=MODEL, base_url=f"{engine.url}/v1", api_key=engine.key, max_tokens=80
    )


def test_seeded_prompts_that_do_not_fit_into_one_step_leave_the_engine_alive(
    native_engine: Engine,
) -> None:
    """vLLM on a CPU crashes when a sampled, seeded request meets a chunked prefill."""
    sampled = {"model": MODEL, "max_tokens": 4, "temperature": 0.8}

    async def ask() -> list[int]:
        async with aiohttp.ClientSession() as http:

            async def one(seed: int) -> int:
                url = f"{native_engine.proxy_url}/v1/chat/completions"
                text = f"Tom has {seed} apples. " * 140  # no two share a prefix in the cache
                body = sampled | {"seed": seed, "messages": [{"role": "user", "content": text}]}
                async with http.post(url, json=body) as answer:
                    return answer.status

            return await asyncio.gather(*(one(seed) for seed in range(6)))

    assert asyncio.run(ask()) == [200] * 6


def test_nonsense_in_the_form_of_the_schema_is_no_vote(native_engine: Engine) -> None:
    async def ask() -> list[object]:
        judge = EngineJudge(settings_for(native_engine))
        try:
            votes = (judge.written_vote(EVIDENCE, seed) for seed in range(6))
            return await asyncio.gather(*votes, return_exceptions=True)
        finally:
            await judge.close()

    answers = asyncio.run(ask())
    assert all(isinstance(answer, JudgeError) for answer in answers), answers
    # None was refused for its form: the server accepted the schema and the prompt.
    assert not any("answered" in str(answer) for answer in answers), answers


def test_vllm_tells_log_probs_of_the_words_alone(native_engine: Engine) -> None:
    """With `--logprobs-mode processed_logprobs` the grammar leaves the words all the mass."""

    async def ask() -> Any:
        body = {**OPTIONS, "model": MODEL, "messages": word_question(EVIDENCE, 0)}
        url = f"{native_engine.url}/v1/chat/completions"
        async with (
            aiohttp.ClientSession(headers=native_engine.headers) as http,
            http.post(url, json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            return await answer.json()

    answer = asyncio.run(ask())
    (told,) = answer["choices"][0]["logprobs"]["content"]
    possible = [token for token in told["top_logprobs"] if token["logprob"] > -9000]
    assert sum(math.exp(token["logprob"]) for token in possible) == pytest.approx(1, abs=1e-3)
    for token in possible:
        assert any(word.startswith(token["token"]) for word in WORDS.values()), possible
    assert answer["usage"]["completion_tokens"] == 1
    assert word_logprobs(answer) is not None


def test_a_judge_that_understands_nothing_gives_no_reward(
    native_engine: Engine, tmp_path: Path
) -> None:
    store, counts = open_store(tmp_path), Watched()
    record(store, [a_turn(number) for number in range(TURNS)])

    async def scene() -> None:
        stop = asyncio.Event()
        judge = create(settings_for(native_engine))
        async with EngineClient(native_engine.url, MODEL, native_engine.key) as engine:
            task = asyncio.create_task(run(store, JudgeConfig(), judge, engine, stop, counts))
            await counts.until(judged=TURNS)
            stop.set()
            await task
        await judge.close()

    asyncio.run(scene())
    assert counts.totals() == (TURNS, 0, 0)
    found = store.counts()
    assert not any(name.startswith("samples/") and "ready" in name for name in found), found
    verdicts = [store.judging.verdict(turn_id) for turn_id in store.turns.ids()]
    assert [verdict and verdict.score for verdict in verdicts] == [0] * TURNS
    store.close()
