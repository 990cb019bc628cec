"""What a real vLLM tells of its sampler, through the proxy and the store, against Hugging Face."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from transformers import AutoModelForCausalLM

from demo.course import MODEL, POLICY
from nextstate.app.settings import Settings
from nextstate.engine.abilities import sampling_lacks
from nextstate.engine.client import EngineClient
from nextstate.records import Sample, Turn
from nextstate.sampling import Sampling
from nextstate.store import Store
from tests.hugging_face_sampling import CASES, differences

if TYPE_CHECKING:
    from tests.running_loop import Engine, Loop

QUESTION = "Tom has 3 apples and gets 4 more. How many apples does he have?"

UNCHANGED = ("model's own", "plain", "greedy")
SURELY_CHANGED = ("temperature 0.7", "temperature 1.5", "repetition 1.3", "all")
"""The demo's policy is so sure of most tokens that a truncation or a bias need not show."""


async def _ask_all(loop: Loop) -> dict[str, str]:
    """The turn of each case; they run at the same time, so that one batch has different rows."""
    async with aiohttp.ClientSession(loop.url) as http:

        async def ask(asked: dict[str, Any]) -> str:
            talk = [{"role": "user", "content": QUESTION}]
            body = {"model": MODEL, "messages": talk, "max_tokens": 24, **asked}
            async with http.post("/v1/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                return answer.headers["x-nextstate-turn"]

        done = await asyncio.gather(*map(ask, CASES.values()))
        return dict(zip(CASES, done, strict=True))


@pytest.fixture(scope="module")
def turns(loop: Loop) -> dict[str, Turn]:
    asked = asyncio.run(_ask_all(loop))
    store = Store(Settings.read(loop.config).store)
    found = {case: store.turns.get(turn) for case, turn in asked.items()}
    store.close()
    return {case: turn for case, turn in found.items() if turn is not None}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(POLICY)


@pytest.mark.parametrize("case", CASES)
def test_the_learner_reads_a_turn_as_vllm_sampled_it(
    turns: dict[str, Turn], model: Any, case: str
) -> None:
    turn = turns[case]
    assert turn.untrainable is None
    assert turn.prompt_ids
    assert turn.completion_ids
    assert turn.behaviour_logprobs
    sample = Sample(
        turn.id,
        turn.session,
        0,
        turn.prompt_ids,
        turn.completion_ids,
        turn.behaviour_logprobs,
        1,
        None,
        Sampling.read(turn.sampling),
    )
    found = differences(model, [sample])
    assert found.hugging_face < 1e-3
    assert found.learner < 1e-3
    if case in UNCHANGED:
        assert found.raw < 1e-2
    if case in SURELY_CHANGED:
        assert found.raw > 1e-2, "so the raw log-probs would have been noticed"


def test_the_doctor_finds_nothing_wrong_with_the_sampling_of_a_managed_engine(
    native_engine: Engine,
) -> None:
    async def lacks() -> tuple[str, ...]:
        async with EngineClient(
            native_engine.url, native_engine.model, native_engine.key
        ) as engine:
            return await sampling_lacks(engine)

    assert asyncio.run(lacks()) == ()
