"""The hinted prompt is the prompt that the engine makes of the request with the hint in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from judge.hinting import HINT_HEADER, hinted_prompt
from nextstate.records import Json, Timings, Turn, TurnKind


class Letters:
    """Renders a prompt with one token for each letter of all contents."""

    def __init__(self) -> None:
        self.messages: list[Json] = []

    async def tokenize(
        self, messages: list[Json], tools: list[Json] | None, extra: Json
    ) -> list[int]:
        self.messages = messages
        return [*"".join(message["content"] for message in messages).encode()]


def turn_of(*texts: str, prompt_ids: tuple[int, ...] = (1,), **fields: Any) -> Turn:
    messages = [{"role": "user", "content": text} for text in texts]
    return Turn(
        **{"id": "t", "session": "s", "index": 0, "kind": TurnKind.MAIN, "lineage": "main"},
        **{"policy_version": 0, "client_model": "m", "finish_reason": "stop"},
        request={"messages": messages, **fields},
        reply={"role": "assistant", "content": "Hi"},
        prompt_ids=prompt_ids,
        completion_ids=(2,),
        behaviour_logprobs=(-0.5,),
        sampling={},
        timings=Timings(0.0, None, 0.1),
        untrainable=None,
        parent=None,
    )


def rendered(turn: Turn) -> bytes | None:
    ids = asyncio.run(hinted_prompt(turn, "Be brief.", Letters()))
    return None if ids is None else bytes(ids)


WHOLE = b"earlierlater" + HINT_HEADER.encode() + b"Be brief."


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, WHOLE),
        ({"truncate_prompt_tokens": None}, WHOLE),
        ({"truncate_prompt_tokens": 1000}, WHOLE),
        ({"truncate_prompt_tokens": 25}, WHOLE[-25:]),
        ({"truncate_prompt_tokens": "2_5.0", "truncation_side": "left"}, WHOLE[-25:]),
        ({"truncate_prompt_tokens": 25, "truncation_side": "right"}, None),
        ({"truncate_prompt_tokens": 1000, "truncation_side": "right"}, WHOLE),
        ({"truncate_prompt_tokens": 0}, None),
        ({"truncate_prompt_tokens": -1, "prompt_ids": (1,) * 12}, WHOLE),
        ({"truncate_prompt_tokens": -1, "prompt_ids": (1,) * 11}, WHOLE[-11:]),
        ({"kv_transfer_params": {"prompt_token_ids": [1, 2]}}, None),
        ({"kv_transfer_params": {}}, WHOLE),
    ],
)
def test_the_hinted_prompt_is_cut_like_the_turns_own_prompt(
    fields: dict[str, Any], prompt: bytes | None
) -> None:
    assert rendered(turn_of("earlier", "later", **fields)) == prompt


def test_thoughts_have_the_name_that_the_chat_route_uses() -> None:
    turn, engine = turn_of("hi"), Letters()
    old = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    new = {"role": "assistant", "content": "a", "reasoning_content": "hm", "reasoning": "so"}
    turn.request["messages"] = [old, new, *turn.request["messages"]]
    asyncio.run(hinted_prompt(turn, "x", engine))
    assert [message.get("reasoning") for message in engine.messages] == ["hm", "so", None]
