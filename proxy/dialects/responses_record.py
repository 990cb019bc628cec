"""Translates native Responses replies into chat form, for the record."""

from __future__ import annotations

from nextstate.records import Json
from nextstate.wire import obj, objects


def to_chat_reply(body: Json) -> Json:
    """A native Responses object as a chat reply, for the record."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[Json] = []
    for item in objects(body.get("output")):
        texts = [part.get("text") for part in objects(item.get("content"))]
        said = [text for text in texts if isinstance(text, str)]
        if item.get("type") == "message":
            content += said
        elif item.get("type") == "reasoning":
            reasoning += said
        elif "call_id" in item:
            calls.append(_chat_call(item))
    message: Json = {"role": "assistant", "content": "".join(content) or None}
    if reasoning:
        message["reasoning"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    else:
        message["content"] = "".join(content)
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(body)}
    return {**_chat_head(body, "chat.completion"), "choices": [choice], "usage": _chat_usage(body)}


class Chunks:
    """Turns the events of one native Responses stream into chat chunks, for the record."""

    def __init__(self) -> None:
        self._head: Json = _chat_head({}, "chat.completion.chunk")
        self._calls: dict[object, int] = {}

    def feed(self, payload: Json) -> Json | None:
        """The chunk for an event; None if the event adds nothing."""
        kind = payload.get("type")
        delta = payload.get("delta")
        if kind == "response.created":
            self._head = _chat_head(obj(payload.get("response")), "chat.completion.chunk")
            return self._chunk({"role": "assistant", "content": ""})
        if kind == "response.output_text.delta":
            return self._chunk({"content": delta})
        if kind == "response.reasoning_text.delta":
            return self._chunk({"reasoning": delta})
        if kind in (
            "response.function_call_arguments.delta",
            "response.custom_tool_call_input.delta",
        ):
            index = self._calls.get(payload.get("output_index"), 0)
            return self._chunk({"tool_calls": [{"index": index, "function": {"arguments": delta}}]})
        item = obj(payload.get("item"))
        if kind == "response.output_item.added" and "call_id" in item:
            index = self._calls[payload.get("output_index")] = len(self._calls)
            return self._chunk({"tool_calls": [{"index": index, **_chat_call(item)}]})
        if kind in ("response.completed", "response.incomplete"):
            response = obj(payload.get("response"))
            chunk = self._chunk({}, _finish_reason(response))
            return {**chunk, "usage": _chat_usage(response)}
        if kind in ("response.failed", "error") or "error" in payload:
            return {"error": payload.get("error") or payload.get("message") or payload}
        return None

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


def _chat_call(item: Json) -> Json:
    arguments = item.get("arguments", item.get("input"))
    function = {"name": item.get("name") or "", "arguments": arguments or ""}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def _chat_head(response: Json, kind: str) -> Json:
    return {
        "id": response.get("id"),
        "object": kind,
        "created": response.get("created_at"),
        "model": response.get("model"),
    }


def _finish_reason(response: Json) -> str | None:
    status = response.get("status")
    if status == "incomplete":
        return "length"
    if status != "completed":
        return None
    called = any("call_id" in item for item in objects(response.get("output")))
    return "tool_calls" if called else "stop"


def _chat_usage(response: Json) -> Json | None:
    usage = obj(response.get("usage"))
    if not usage:
        return None
    return {
        "prompt_tokens": usage.get("input_tokens"),
        "total_tokens": usage.get("total_tokens"),
        "completion_tokens": usage.get("output_tokens"),
    }
