"""Translates a Responses request into a chat request, or says why it cannot be.

For requests that pass, vLLM renders the same prompt and samples in the same way on both routes, as
tests have shown. A request with anything else in it is relayed unchanged. Things that vLLM ignores
(a message's id, an unknown field, a tool that it shows to no model) are ignored here too. Two
differences cannot be seen in a request: a chat template that prints a past call's function object
as a whole gets its name and arguments in the other order, and `text` is repeated correctly only
with the default `--tool-strict-level`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.responses_tools import (
    chat_tools,
    chosen_name,
    custom_arguments,
    flat_name,
    problem,
)
from proxy.dialects.translation import Translation

_FORWARDED = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "parallel_tool_calls",
    "structured_outputs",
    "cache_salt",
    "priority",
    "chat_template_kwargs",
    "user",
    "metadata",
    "prompt_cache_key",
    "session_id",
)
"""Fields that both routes have and read in the same way."""

_UNPROVEN = (
    "conversation",
    "ec_transfer_params",
    "kv_transfer_params",
    "logit_bias",
    "media_io_kwargs",
    "mm_payload",
    "mm_processor_kwargs",
    "previous_input_messages",
    "previous_response_id",
    "prompt",
    "request_id",
    "return_mm_kwargs",
    "stop_token_ids",
    "vllm_xargs",
    "watermarking",
)
"""Fields with an effect, or an echo in the response, that the chat route does not have."""

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_SUMMARIES = ("auto", "concise", "detailed")
_INCLUDES = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
)
_UNKNOWN = MessagesBehaviour()
_EXACT_FLOAT = 1e16
_EXACT: dict[type, float] = {bool: 2, int: 2**63, float: _EXACT_FLOAT}
"""JSON libraries read or write numbers from here on in different ways."""


def to_chat(body: Json, behaviour: MessagesBehaviour = _UNKNOWN) -> Translation:
    """The request in chat form. Never raises: a malformed request is relayed unchanged."""
    reader = _Reader()
    chat: Json = {name: body[name] for name in _FORWARDED if name in body}
    chat["messages"] = reader.messages(body)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    reader.tools(body, chat, behaviour)
    reasoning = obj(body.get("reasoning"))
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    form = obj(obj(body.get("text")).get("format"))
    if form.get("type") == "json_schema":
        chat["structured_outputs"] = {"json": form.get("schema")}
    elif form.get("type") == "json_object":
        chat["structured_outputs"] = {"json_object": True}
    if body.get("stream"):
        # The first event names the tokens left after the prompt, the last one the usage.
        chat["return_token_ids"] = True
        chat["stream_options"] = {"include_usage": True}
    reader.fields(body)
    return Translation(chat, reader.reason)


class _Reader:
    """Reads a request, and keeps the first thing in it that is not proven to be equal."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def allow(self, fine: bool, what: str) -> bool:
        """Keeps `what` as the reason, unless it is fine or there is one already."""
        if not fine and self.reason is None:
            self.reason = f"the Responses request {what}, so its tokens are not known"
        return fine

    def fields(self, body: Json) -> None:
        """Checks the fields whose effect, or whose echo in the response, is not proven."""
        unproven = [name for name in _UNPROVEN if body.get(name) is not None]
        self.allow(not unproven, f"has the field {', '.join(unproven)}")
        for name, fine in _FIELDS.items():
            self.allow(name not in body or fine(body[name]), f"has its own kind of {name}")
        twice = (
            obj(body.get("text")).get("format") is not None
            and body.get("structured_outputs") is not None
        )
        self.allow(not twice, "has two formats")
        self.allow(_is_text(body.get("model")) and body["model"] != "", "names no model")
        tools = [tool["function"] for tool in chat_tools(objects(body.get("tools")))]
        choice = body.get("tool_choice", "auto")
        forced = choice not in ("auto", "none") or body.get("parallel_tool_calls") is False
        if tools and body.get("text") is not None:
            forced = forced or any(tool.get("strict") for tool in tools)
            kind = obj(obj(body["text"]).get("format")).get("type", "text")
            self.allow(not forced and kind == "text", "has a text format with tools")

    def tools(self, body: Json, chat: Json, behaviour: MessagesBehaviour) -> None:
        """Sets the tools that the model sees in `chat`, and which one it must call."""
        listed, choice = body.get("tools", []), body.get("tool_choice", "auto")
        tools = objects(listed)
        if not self.allow(tools == listed, "has no list of tools"):
            return
        why = next((why for tool in tools if (why := problem(tool)) is not None), None)
        self.allow(why is None, why or "")
        self.allow(_plain_numbers(tools), "has a malformed tool")
        shown = [] if why else [*chat_tools(tools)]
        if isinstance(choice, dict):
            chosen = cast(Json, choice)
            name = None if why else chosen_name(chosen.get("name"), tools)
            fine = set(chosen) == {"type", "name"} and chosen["type"] in ("function", "custom")
            self.allow(fine and name is not None, "has its own kind of tool_choice")
            choice = {"type": "function", "function": {"name": name}}
        else:
            self.allow(choice in ("auto", "none", "required"), "has its own kind of tool_choice")
            self.allow(bool(shown) or choice != "required", "forces a tool without having one")
        if shown:
            chat["tools"], chat["tool_choice"] = shown, choice
        elif tools:
            fine = behaviour.shows_no_tools is False
            self.allow(fine, "has only tools that no model is shown")
            chat["tool_choice"] = "none" if choice == "none" else None

    def messages(self, body: Json) -> list[Json]:
        """The conversation as chat messages."""
        messages: list[Json] = []
        if isinstance(body.get("instructions"), str) and body["instructions"]:
            messages.append({"role": "system", "content": body["instructions"]})
        given = body.get("input")
        if isinstance(given, str):
            return [*messages, {"role": "user", "content": given}]
        items: list[Any] = cast(list[Any], given) if isinstance(given, list) else []
        self.allow(bool(items), "has no input")
        for item in items:
            self.item(obj(item), messages)
        last = obj(items[-1]) if items else {}
        self.allow(
            last.get("status") in (None, "completed") or "call_id" in last,
            "ends with a message to be continued",
        )
        return messages

    def item(self, item: Json, messages: list[Json]) -> None:
        """Adds one input item to the messages or to the last assistant message."""
        kind = item.get("type", "message")
        self.allow(
            item.get("status") in (None, "completed", "incomplete", "in_progress"),
            "has an item with a status of its own",
        )
        if kind in ("function_call", "custom_tool_call"):
            self.call(item, messages)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self.allow(_is_text(item.get("call_id")), "has a malformed call's output")
            content = self.content(item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            )
        elif kind == "reasoning":
            self.allow(not item.get("encrypted_content"), "has an encrypted thought")
            self.add("reasoning", self.thought(item), messages)
        elif kind == "message" and item.get("role") == "assistant":
            self.add("content", self.assistant_text(item), messages)
        elif kind == "message" and item.get("role") in ("user", "system", "developer"):
            messages.append({"role": item["role"], "content": self.content(item.get("content"))})
        else:
            self.allow(False, f"has an item of type {str(kind)[:40]}")

    def call(self, item: Json, messages: list[Json]) -> None:
        """Adds a call to the last assistant message, or begins one."""
        custom, name = item["type"] == "custom_tool_call", item.get("name")
        given = item.get("input" if custom else "arguments")
        parts = (item.get("call_id"), name, given)
        self.allow(all(_is_text(part) for part in parts), "has a malformed call")
        self.allow(_is_text_or_null(item.get("namespace")), "has a malformed call")
        if item.get("namespace") and not custom:
            name = flat_name(item["namespace"], name)
        arguments = custom_arguments(given) if custom else given
        call: Json = {
            "id": item.get("call_id"),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        if _last_assistant(messages) is None:
            messages.append({"role": "assistant"})
        messages[-1].setdefault("tool_calls", []).append(call)

    def add(self, name: str, text: str, messages: list[Json]) -> None:
        """Adds a field to the last assistant message, or begins one if it has the field already."""
        last = _last_assistant(messages)
        if last is None or name in last:
            messages.append({"role": "assistant", name: text})
        else:
            last[name] = text

    def thought(self, item: Json) -> str:
        """A reasoning item's text: its first content part, else its first summary."""
        summary = objects(item.get("summary"))
        content = objects(item.get("content"))
        fine = summary == item.get("summary") and item.get("content") in (None, content)
        fine = fine and all(part.get("type") == "reasoning_text" for part in content)
        fine = fine and all(part.get("type") == "summary_text" for part in summary)
        texts = [part.get("text") for part in (*content, *summary)]
        fine = fine and all(_is_text(text) for text in texts)
        self.allow(fine, "has a malformed reasoning item")
        return next((text for text in texts if isinstance(text, str)), "")

    def assistant_text(self, item: Json) -> str:
        """An assistant message's text. Like vLLM it reads only the first part of a list."""
        content = item.get("content")
        if isinstance(content, str):
            return content
        parts = objects(content)
        fine = bool(parts) and parts == content
        for part in parts:
            fine = fine and part.get("type") in ("output_text", "input_text")
            fine = fine and _is_text(part.get("text"))
        self.allow(fine, "has an assistant message in parts of its own")
        texts = [part["text"] for part in parts if _is_text(part.get("text"))]
        return texts[0] if texts else ""

    def content(self, content: object) -> str | list[Json]:
        """A message's content: text, or parts, of which those without text stay as they are."""
        if isinstance(content, str):
            return content
        parts = objects(content)
        fine = parts == content
        for part in parts:
            fine = fine and part.get("type") == "input_text" and _is_text(part.get("text"))
        self.allow(fine, "has a message that is not text alone")
        return [
            {"type": "text", "text": part["text"]} if _is_text(part.get("text")) else part
            for part in parts
        ]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_count_or_null(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or (isinstance(value, int) and 0 < value < 2**53)


def _one_of(*allowed: object) -> Callable[[object], bool]:
    return lambda value: any(value is one or value == one for one in allowed)


def _is_include(value: object) -> bool:
    names = cast(list[Any], value) if isinstance(value, list) else None
    return value is None or (names is not None and all(name in _INCLUDES for name in names))


def _is_template_switch(value: object) -> bool:
    known = isinstance(value, dict) and set(cast(Json, value)) <= {"enable_thinking", "thinking"}
    return value is None or known


def _is_number_or_null(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return value is None or (isinstance(value, int | float) and abs(value) < _EXACT_FLOAT)


def _is_switch_or_null(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_metadata(value: object) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(map(_is_text, cast(Json, value).values()))


def _is_reasoning(value: object) -> bool:
    given = obj(value)
    fine = value is None or isinstance(value, dict)
    fine = fine and given.get("effort") in (None, *_EFFORTS)
    summaries = (given.get("summary"), given.get("generate_summary"))
    return fine and all(summary in (None, *_SUMMARIES) for summary in summaries)


def _is_text_config(value: object) -> bool:
    if value is None:
        return True
    given = obj(value)
    if not isinstance(value, dict) or set(given) - {"format", "verbosity"}:
        return False
    form = given.get("format")
    fields: dict[object, set[str]] = {
        "text": {"type"},
        "json_object": {"type"},
        "json_schema": {"type", "name", "schema", "description", "strict"},
    }
    kind = obj(form).get("type")
    fine = form is None or (isinstance(kind, str) and not set(obj(form)) - fields.get(kind, set()))
    if kind == "json_schema":
        fine = (
            fine and _is_text(obj(form).get("name")) and isinstance(obj(form).get("schema"), dict)
        )
        fine = fine and _is_text_or_null(obj(form).get("description"))
        fine = fine and _is_switch_or_null(obj(form).get("strict"))
    verbosity = given.get("verbosity") in (None, "low", "medium", "high")
    return fine and verbosity and _plain_numbers(form)


def _plain_numbers(value: object) -> bool:
    """Whether every JSON library writes all numbers in a value in the same way."""
    pending: list[Any] = [value]
    while pending:
        held = pending.pop()
        if isinstance(held, dict):
            pending += cast(Json, held).values()
        elif isinstance(held, list):
            pending += cast(list[Any], held)
        elif isinstance(held, int | float) and abs(held) >= _EXACT[type(held)]:
            return False
    return True


_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "stream": _is_switch_or_null,
    "store": _is_switch_or_null,
    "parallel_tool_calls": _is_switch_or_null,
    "temperature": _is_number_or_null,
    "top_p": _is_number_or_null,
    "presence_penalty": _is_number_or_null,
    "frequency_penalty": _is_number_or_null,
    "instructions": _is_text_or_null,
    "user": _is_text_or_null,
    "metadata": _is_metadata,
    "reasoning": _is_reasoning,
    "text": _is_text_config,
    "prompt_cache_key": _is_text_or_null,
    "session_id": _is_text_or_null,
    "max_output_tokens": _is_count_or_null,
    "max_tool_calls": _is_count_or_null,
    "background": _one_of(False),
    "enable_response_messages": _one_of(False),
    "include_reasoning": _one_of(True),
    "truncation": _one_of("disabled"),
    "top_logprobs": _one_of(None, 0),
    "service_tier": _one_of("auto", "default", "flex", "scale", "priority"),
    "include": _is_include,
    "chat_template_kwargs": _is_template_switch,
}
"""The values of a field for which the reply is known. Any field may be absent."""


def _last_assistant(messages: list[Json]) -> Json | None:
    return messages[-1] if messages and messages[-1]["role"] == "assistant" else None
