"""Translates a Messages request into a chat request, as vLLM's own /v1/messages does."""

from __future__ import annotations

import json

from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.messages_limits import encodes, reasons
from proxy.dialects.messages_tools import tools_in_effect
from proxy.dialects.translation import Translation

_SAMPLING = {
    "stop_sequences": "stop",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "chat_template_kwargs": "chat_template_kwargs",
    "cache_salt": "cache_salt",
}
"""Fields with the same meaning in a chat request, and their names there."""
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_BILLING = "x-anthropic-billing-header"
"""The start of a block with which a client attributes its request. vLLM leaves it out."""
_UNKNOWN = MessagesBehaviour()


def to_chat(body: Json, behaviour: MessagesBehaviour = _UNKNOWN) -> Translation:
    """The request in chat form. Never raises: the engine refuses malformed requests."""
    reason = next(reasons(body, behaviour), None)
    native = None if reason is None else f"{reason}, so its tokens are not known"
    if not encodes(body):
        return Translation({"model": text_of(body.get("model")), "messages": []}, native)
    return Translation(_chat(body, behaviour), native)


def _chat(body: Json, behaviour: MessagesBehaviour) -> Json:
    messages = _messages(body, merge=bool(behaviour.merges_system))
    chat: Json = {"model": text_of(body.get("model")), "messages": messages}
    if body.get("max_tokens") is not None:
        chat["max_tokens"] = chat["max_completion_tokens"] = body["max_tokens"]
    for name, named in _SAMPLING.items():
        if body.get(name) is not None:
            chat[named] = body[name]
    if body.get("stream"):
        chat["stream"] = True
        chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    output = obj(body.get("output_config"))
    schema = obj(obj(output.get("format")).get("schema"))
    if schema:
        named_schema = {"name": "json_schema", "schema": schema}
        chat["response_format"] = {"type": "json_schema", "json_schema": named_schema}
    if output.get("effort") is not None:
        chat["reasoning_effort"] = output["effort"]
    _think(chat, body, behaviour)
    tools = tools_in_effect(body)
    # Without tools the chat route's own default would be "none", which is not quite vLLM's None.
    chat["tool_choice"] = "auto" if tools else None
    if tools:
        chat["tools"] = [_tool(tool) for tool in tools]
    if body.get("tool_choice") is not None:
        choice = obj(body["tool_choice"])
        function = {"name": text_of(choice.get("name"))}
        named_choice = {"type": "function", "function": function}
        chat["tool_choice"] = _TOOL_CHOICES.get(text_of(choice.get("type")), named_choice)
        chat["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use")
    return chat


def _think(chat: Json, body: Json, behaviour: MessagesBehaviour) -> None:
    """Sets the thinking that the request asks for in `chat`."""
    thinking = obj(body.get("thinking"))
    if thinking.get("type") == "disabled" and behaviour.disabled_effort is not None:
        chat["reasoning_effort"] = behaviour.disabled_effort
    if thinking.get("type") == "enabled" and not _is_boundless(thinking, body):
        chat["thinking_token_budget"] = thinking.get("budget_tokens")


def _is_boundless(thinking: Json, body: Json) -> bool:
    """Whether the thinking budget ends with the reply, as clients send it that want no budget.

    Such a budget has no effect, and vLLM refuses any budget if it has no reasoning parser.
    """
    budget, limit = thinking.get("budget_tokens"), body.get("max_tokens")
    return isinstance(budget, int) and isinstance(limit, int) and budget == limit - 1


def _tool(tool: Json) -> Json:
    schema = obj(tool.get("input_schema"))
    function: Json = {
        "name": text_of(tool.get("name")),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
    }
    for name in ("strict", "defer_loading"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _messages(body: Json, merge: bool) -> list[Json]:
    """The chat messages; `merge` moves the text of all system messages to the start."""
    system, chat = _system(body.get("system")), list[Json]()
    for message in objects(body.get("messages")):
        role, content = text_of(message.get("role")) or "user", message.get("content")
        if role == "system":
            inline = [{"type": "text", "text": content}] if isinstance(content, str) else content
            said = _system(inline)
            if merge:
                system += said
            elif said:
                chat.append({"role": "system", "content": said})
        elif isinstance(content, list):
            chat += _blocks(role, objects(message["content"]))
        else:
            chat.append({"role": role, "content": text_of(content)})
    return [{"role": "system", "content": system}, *chat] if system else chat


def _system(content: object) -> str:
    """The text of a system prompt, without the blocks that attribute the request."""
    if isinstance(content, str):
        return content
    texts = [
        text_of(block.get("text")) for block in objects(content) if block.get("type") == "text"
    ]
    return "".join(text for text in texts if not text.startswith(_BILLING))


def _blocks(role: str, blocks: list[Json]) -> list[Json]:
    """The chat messages for one message's blocks: tool results first, then the others."""
    results = [
        result
        for block in blocks
        if block.get("type") == "tool_result"
        for result in _results(block)
    ]
    parts = [part for part in map(_part, blocks) if part is not None]
    thoughts = [
        text_of(block["thinking"])
        for block in blocks
        if block.get("type") == "thinking" and block.get("thinking") is not None
    ]
    calls = [tool_call(block) for block in blocks if block.get("type") == "tool_use"]
    message: Json = {"role": role}
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if parts:
        one = len(parts) == 1 and parts[0]["type"] == "text"
        message["content"] = parts[0]["text"] if one else parts
    return results if role == "user" and not parts else [*results, message]


def _part(block: Json) -> Json | None:
    if block.get("type") == "text" and block.get("text"):
        return {"type": "text", "text": text_of(block["text"])}
    if block.get("type") == "image":
        source = obj(block.get("source"))
        data = f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
        url = source.get("url", "") if source.get("type") == "url" else data
        return {"type": "image_url", "image_url": {"url": url}}
    return None


def _results(block: Json) -> list[Json]:
    """A tool's result, and after it the tools that it refers to."""
    content = block.get("content")
    items = objects(content)
    if not isinstance(content, str):
        texts = [text_of(item.get("text")) for item in items if item.get("type") == "text"]
        content = "\n".join(texts)
        images = [part for part in map(_part, items) if part and part["type"] == "image_url"]
        if images:  # only in the record: vLLM shows them to the model in the next message
            content = [{"type": "text", "text": content}, *images]
    result = {"role": "tool", "tool_call_id": text_of(block.get("tool_use_id"))}
    names = [
        item.get("tool_name") or item.get("name")
        for item in items
        if item.get("type") == "tool_reference"
    ]
    referred = [{"type": "tool_reference", "name": name} for name in names if name]
    results = [{**result, "content": content}]
    return [*results, {**result, "content": referred}] if referred else results


def tool_call(block: Json) -> Json:
    """A tool_use block as a chat tool call."""
    # Written by the json module with its spaces and escapes, which become part of the prompt.
    arguments = json.dumps(obj(block.get("input")))
    function = {"name": text_of(block.get("name")), "arguments": arguments}
    return {"id": text_of(block.get("id")), "type": "function", "function": function}


def text_of(value: object) -> str:
    """`value` if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""
