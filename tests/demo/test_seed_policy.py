"""The shipped seed policy: what it can do, and that any engine can load it."""

from __future__ import annotations

import json
from functools import cache
from random import Random

import torch

from demo.checks import is_right, satisfies
from demo.corpus import HINT_BLOCK, Line, draw_conversation, persona_hint
from demo.seed_policy import POLICY, encode, load, sampler
from demo.tasks import Domain, held_out_tasks

SAMPLE = 50
"""Held-out questions of each of the two domains."""
MAX_BYTES = 8 * 1024 * 1024

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


@cache
def judged_replies(hinted: bool) -> list[tuple[bool, bool]]:
    """(right, satisfies) of sampled replies to held-out questions of both domains."""
    torch.manual_seed(11)
    sample = sampler(*load())
    rng = Random(11)
    tasks = [task for domain in Domain for task in held_out_tasks(domain, SAMPLE, seed=5)]
    hints = [HINT_BLOCK.format(hint=persona_hint(task, rng)) if hinted else "" for task in tasks]
    chats = [
        [{"role": "user", "content": task.question + hint}]
        for task, hint in zip(tasks, hints, strict=True)
    ]
    return [
        (is_right(task, reply), satisfies(task, reply))
        for task, reply in zip(tasks, sample(chats), strict=True)
    ]


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_replies_to_held_out_questions_are_right() -> None:
    # A policy that is right 98 % of the time falls below 0.94 of 100 in fewer than 1 of 200 draws.
    assert share([right for right, _ in judged_replies(hinted=False)]) >= 0.94


def test_the_preferred_style_is_about_one_in_six_unasked() -> None:
    # Three standard deviations of 100 draws at 0.167 are 0.11.
    assert 0.05 < share([pleased for _, pleased in judged_replies(hinted=False)]) < 0.28


def test_a_hint_is_obeyed_with_a_right_reply() -> None:
    assert share([right and pleased for right, pleased in judged_replies(hinted=True)]) >= 0.90


def test_the_card_states_the_promised_competence() -> None:
    card = json.loads((POLICY / "card.json").read_text())
    for domain in Domain:
        measured = card["measured_at_temperature_1"][domain.value]
        assert measured["right"] >= 0.98
        assert measured["hinted_style"] >= 0.95
        assert measured["redo_style"] >= 0.95
        assert 0.13 <= measured["style_unasked"] <= 0.20


def test_the_asset_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in POLICY.iterdir()) <= MAX_BYTES


def test_engines_sample_the_raw_distribution() -> None:
    config = json.loads((POLICY / "generation_config.json").read_text())
    assert config["do_sample"] is True
    assert config["temperature"] == 1.0
    assert config.get("top_k", 0) == 0
    assert config.get("top_p", 1.0) == 1.0
    model, tokenizer = load()
    assert config["eos_token_id"] == tokenizer.eos_token_id == model.config.eos_token_id


def test_the_template_renders_tools_calls_and_results() -> None:
    _, tokenizer = load()
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Is it raining?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "dry"},
            {"role": "tool", "content": "warm"},
        ],
        tools=[WEATHER],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert json.dumps(WEATHER) in text
    assert "<tools>" in text
    assert "</tools>" in text
    called = '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}'
    assert called + "\n</tool_call><|im_end|>\n" in text
    results = "<tool_response>\ndry\n</tool_response>\n<tool_response>\nwarm\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n")


def test_training_tokens_equal_the_rendered_template_and_histories_extend() -> None:
    _, tokenizer = load()
    rng = Random(4)
    for _ in range(200):
        lines: list[Line] = draw_conversation(rng)
        chat = [{"role": line.role, "content": line.content} for line in lines]
        ids, labels = encode(lines, tokenizer)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        asked = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(asked, add_special_tokens=False)
        assert ids[: len(prompt)] == prompt
        assert len(ids) <= 400
