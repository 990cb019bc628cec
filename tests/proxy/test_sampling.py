"""Every field of vLLM's requests leaves the distribution alone, can be rebuilt, or is refused."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from nextstate.sampling import PLAIN, Sampling
from proxy.capture import distribution_change, sampling_settings

REBUILT: dict[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 2.0},
    "allowed_token_ids": [5, 6],
}
"""Fields that the learner rebuilds, with a value that changes how a token is drawn."""
SHAPES: dict[str, Any] = {
    "min_tokens": 8,
    "bad_words": ["no"],
    "use_beam_search": True,
    "watermarking": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "thinking_token_budget": 64,
    "kv_transfer_params": {"do_remote_decode": True},
    "vllm_xargs": {"any": 1},
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
"""Fields that change how a token is drawn beyond that, with a value that does."""
NEUTRAL: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "min_tokens": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "bad_words": [],
    "use_beam_search": False,
    "watermarking": False,
    "vllm_xargs": {},
    "response_format": {"type": "text"},
    "tool_choice": "auto",
    "parallel_tool_calls": True,
}
PROMPT = {
    *("messages", "prompt", "suffix", "prompt_embeds", "tools", "documents", "reasoning_effort"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "add_special_tokens"),
    *("continue_final_message", "truncate_prompt_tokens", "truncation_side", "media_io_kwargs"),
    *("mm_processor_kwargs", "mm_payload", "ec_transfer_params"),
}
"""They make the prompt, whose ids are recorded as the engine saw them."""
ENDS = {
    *("max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_detection", "include_stop_str_in_output"),
}
"""They say when to stop drawing, never what is drawn."""
COUNTED = {"n", "length_penalty"}
"""Several choices are refused as such; the penalty ranks beams only."""
REPORTS = {
    *("model", "seed", "stream", "stream_options", "stream_interval", "user", "priority"),
    *("request_id", "session_id", "cache_salt", "logprobs", "top_logprobs", "prompt_logprobs"),
    *("logprob_token_ids", "echo", "include_reasoning", "skip_special_tokens"),
    *("spaces_between_special_tokens", "return_tokens_as_token_ids", "return_token_ids"),
    *("return_token_offsets", "return_prompt_text", "return_mm_kwargs"),
    "routed_experts_prompt_start",
}
"""They choose what is served and told, not how a token is drawn."""


def fields_of(module: str, name: str) -> set[str]:
    """The public fields of a request class of the installed vLLM, read and not imported."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / module).read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    targets = (s.target for s in found.body if isinstance(s, ast.AnnAssign))
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest"),
        ("entrypoints/openai/completion/protocol.py", "CompletionRequest"),
    ],
)
def test_what_every_field_of_a_request_does_to_the_sampler_is_known(module: str, name: str) -> None:
    known = {*REBUILT, *SHAPES, *PROMPT, *ENDS, *COUNTED, *REPORTS}
    assert fields_of(module, name) - known == set()


@pytest.mark.parametrize("name", SHAPES)
def test_a_turn_drawn_from_another_distribution_is_refused_with_the_reason(name: str) -> None:
    reason = distribution_change({"tools": [{"type": "function"}], name: SHAPES[name]})
    assert reason is not None
    assert name in reason or "grammar" in reason


@pytest.mark.parametrize("name", REBUILT)
def test_what_the_learner_can_rebuild_trains(name: str) -> None:
    asked = {name: REBUILT[name], "messages": []}
    assert distribution_change(asked) is None
    told = sampling_settings(asked, {})
    assert told == {name: REBUILT[name]}
    assert Sampling.read(told) != PLAIN


def test_without_a_choice_of_tools_no_grammar_holds() -> None:
    tools = [{"type": "function", "function": {"name": "a", "strict": True}}]
    none = {"tools": tools, "tool_choice": "none", "parallel_tool_calls": False}
    assert distribution_change(none) is None
    assert "grammar" in (distribution_change({**none, "tool_choice": "auto"}) or "")


@pytest.mark.parametrize(
    "asked", [{"temperature": "hot"}, {"logit_bias": {"a": 1}}, {"top_p": float("nan")}]
)
def test_a_value_that_cannot_be_read_does_not_train(asked: dict[str, Any]) -> None:
    assert "cannot be read" in (distribution_change(asked) or "")


def test_a_turn_says_what_the_client_asked_for_and_which_defaults_held() -> None:
    defaults = {"temperature": 0.7, "top_k": 20}
    told = sampling_settings({"temperature": 0.2, "top_p": None, "stop": ["x"]}, defaults)
    assert told == {"temperature": 0.2, "stop": ["x"], "defaults": {"top_k": 20}}
    assert Sampling.read(told) == Sampling(temperature=0.2, top_k=20)
    assert sampling_settings({}, {}) == {}
    assert Sampling.read(sampling_settings({}, defaults)) == Sampling(temperature=0.7, top_k=20)


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_same_field_at_its_neutral_value_changes_nothing(name: str) -> None:
    assert distribution_change({"tools": [{"type": "function"}], name: NEUTRAL[name]}) is None
    assert distribution_change({name: None}) is None
    assert Sampling.read({name: NEUTRAL[name]}) == PLAIN


@pytest.mark.parametrize("name", sorted(PROMPT | ENDS | COUNTED | REPORTS))
def test_a_field_that_shapes_nothing_refuses_nothing(name: str) -> None:
    assert distribution_change({name: 1}) is None
