"""The Anthropic Messages API in terms of chat completions, byte for byte as vLLM answers it.

vLLM's own /v1/messages returns neither token ids nor log-probs, so a request goes to
/v1/chat/completions (`messages_request`) and its reply is translated back. Only requests that a
differential test has shown to give equal replies go this way. All others are relayed unchanged to
/v1/messages, where vLLM answers or refuses them, and are recorded without tokens.
"""

from __future__ import annotations

import json
import uuid

from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.messages_request import text_of, to_chat, tool_call

__all__ = ["Chunks", "Events", "encode", "from_chat", "to_chat", "to_chat_reply"]

_FINISH = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}
_FINISH["tool_use"] = "tool_calls"


def from_chat(reply: Json) -> Json | None:
    """A plain chat reply as the Messages API gives it.

    None if vLLM could not give it either, for example because a tool call is cut off. The request
    must then be relayed unchanged, so that the client gets vLLM's own error.
    """
    choice = next(iter(objects(reply.get("choices"))), None)
    if choice is None:
        return None
    message = obj(choice.get("message"))
    content: list[Json] = []
    if message.get("reasoning"):
        content.append(
            {"type": "thinking", "thinking": message["reasoning"], "signature": _signature()}
        )
    if message.get("content"):
        content.append({"type": "text", "text": message["content"]})
    calls = objects(message.get("tool_calls"))
    for call in calls:
        function = obj(call.get("function"))
        block: Json = {"type": "tool_use", "id": call.get("id"), "name": function.get("name")}
        try:
            given = json.loads(function.get("arguments") or "")
            encode(given)
        except (ValueError, RecursionError):
            return None
        if given is not None and not isinstance(given, dict):
            return None
        content.append(block if given is None else {**block, "input": given})
    reason, matched = _stop(choice.get("finish_reason"), choice.get("stop_reason"), calls, True)
    body: Json = {
        "id": reply.get("id"),
        "type": "message",
        "role": "assistant",
        "content": content or [{"type": "text", "text": ""}],
        "model": reply.get("model"),
        "stop_reason": reason,
        "stop_sequence": matched,
        "usage": _usage(reply.get("usage")),
        "kv_transfer_params": reply.get("kv_transfer_params"),
        "ec_transfer_params": reply.get("ec_transfer_params"),
    }
    return {name: value for name, value in body.items() if value is not None}


def encode(reply: Json) -> bytes:
    """JSON as vLLM writes it: compact, with as few escaped characters as possible.

    orjson writes some floats differently (1e16 for 1e+16).
    """
    return json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Events:
    """The events of one streamed reply, from the chunks of a chat completion.

    An error in the stream becomes an `error` event with the engine's message, and the stream ends
    without `message_stop`. vLLM does the same, with the message of its own parser in the event.
    """

    failed = False
    """An error is an event like others in this dialect: the connection is not cut."""

    def __init__(self) -> None:
        self._started = False
        self._failed = False
        self._index = 0
        """The open block's index, or the next one's."""
        self._open: str | None = None
        """The open block's type."""
        self._tool_id: str | None = None
        """The open block's tool call."""
        self._tool_ids: dict[int, str] = {}
        self._arguments: list[str] | None = None
        """The latest tool call's arguments so far; None if no tool was called."""
        self._late: list[str] = []
        """Text that came while a tool call was open. It becomes a block when the call is closed."""
        self._finish = "stop"
        self._matched: object = None

    def feed(self, chunk: Json) -> bytes:
        """The events for a chunk, if any."""
        if self._failed:
            return b""
        if not isinstance(chunk.get("choices"), list):
            return self._fail(chunk)
        if not self._started:
            self._started = True
            return _event("message_start", message=_started(chunk))
        choice = next(iter(objects(chunk["choices"])), None)
        if choice is None:
            return self._end(chunk.get("usage"))
        if choice.get("finish_reason") is not None:
            self._finish, self._matched = choice["finish_reason"], choice.get("stop_reason")
        delta = obj(choice.get("delta"))
        sent: list[bytes] = []
        for kind, name in (("thinking", "reasoning"), ("text", "content")):
            text = text_of(delta.get(name))
            if text:
                sent.append(self._text(kind, text))
        sent += [self._call(call) for call in objects(delta.get("tool_calls"))]
        return b"".join(sent)

    def done(self) -> bytes:
        """The events for the end of the chat stream."""
        return b"" if self._failed else self._close() + _event("message_stop")

    def _text(self, kind: str, text: str) -> bytes:
        if kind == "text" and self._open == "tool_use":
            self._late.append(text)
            return b""
        opened = b"" if self._open == kind else self._start({"type": kind, kind: ""})
        return opened + self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, call: Json) -> bytes:
        function = obj(call.get("function"))
        index: int = call.get("index", 0)
        opened = b""
        if call.get("id") is not None:
            called: str = call["id"]
            self._tool_ids[index] = called
            if called != self._tool_id and function.get("name") is not None:
                block: Json = {
                    "type": "tool_use",
                    "id": called,
                    "name": function["name"],
                    "input": {},
                }
                opened = self._start(block)
                self._tool_id, self._arguments = called, []
        arguments = text_of(function.get("arguments"))
        is_open = self._tool_id is not None and self._tool_ids.get(index) == self._tool_id
        if not arguments or not is_open or self._arguments is None:
            return opened
        self._arguments.append(arguments)
        return opened + self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _start(self, block: Json) -> bytes:
        closed = self._close()
        self._open = block["type"]
        return closed + _event("content_block_start", content_block=block, index=self._index)

    def _delta(self, delta: Json) -> bytes:
        return _event("content_block_delta", delta=delta, index=self._index)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta({"type": "signature_delta", "signature": _signature()})
        closed = signed + _event("content_block_stop", index=self._index)
        late = "".join(self._late)
        self._open, self._tool_id = None, None
        self._late.clear()
        self._index += 1
        return closed + (self._text("text", late) + self._close() if late else b"")

    def _end(self, usage: object) -> bytes:
        called = self._arguments is not None
        complete = _is_json("".join(self._arguments or ()))
        reason, matched = _stop(self._finish, self._matched, called, complete)
        delta = {"stop_reason": reason, "stop_sequence": matched}
        return self._close() + _event("message_delta", delta=delta, usage=_usage(usage))

    def _fail(self, chunk: Json) -> bytes:
        self._failed = True
        message = obj(chunk.get("error")).get("message") or "the engine sent no chat chunk"
        return _event("error", error={"type": "internal_error", "message": str(message)})


def to_chat_reply(body: Json) -> Json:
    """A plain Messages reply as a chat reply, for its record."""
    blocks = objects(body.get("content"))
    message: Json = {
        "role": "assistant",
        "content": "".join(text_of(b.get("text")) for b in blocks if b.get("type") == "text"),
    }
    reasoning = "".join(text_of(b.get("thinking")) for b in blocks if b.get("type") == "thinking")
    if reasoning:
        message["reasoning"] = reasoning
    calls = [tool_call(block) for block in blocks if block.get("type") == "tool_use"]
    if calls:
        message["tool_calls"] = calls
    return {
        "id": body.get("id"),
        "object": "chat.completion",
        "model": body.get("model"),
        "choices": [
            {
                "index": 0,
                "message": message,
                "finish_reason": _finish(body),
                "stop_reason": body.get("stop_sequence"),
            }
        ],
        "usage": _chat_usage(body.get("usage")),
    }


class Chunks:
    """The events of a streamed Messages reply as chunks of a chat completion, for its record."""

    def __init__(self) -> None:
        self._model: object = None
        self._input: object = None
        """The usage at the start: some servers do not repeat the prompt's tokens at the end."""
        self._calls = -1

    def feed(self, payload: Json) -> Json | None:
        """The chunk for an event's payload; None if the event is not about the reply."""
        match payload.get("type"):
            case "message_start":
                message = obj(payload.get("message"))
                self._model, self._input = message.get("model"), message.get("usage")
                return self._chunk({"role": "assistant", "content": ""}, usage=self._input)
            case "content_block_start":
                block = obj(payload.get("content_block"))
                if block.get("type") != "tool_use":
                    return None
                self._calls += 1
                function = {"name": text_of(block.get("name")), "arguments": ""}
                return self._call({"id": block.get("id"), "type": "function", "function": function})
            case "content_block_delta":
                return self._delta(obj(payload.get("delta")))
            case "message_delta":
                usage = {**obj(self._input), **obj(payload.get("usage"))}
                return self._chunk({}, obj(payload.get("delta")), usage)
            case "error":
                return {"error": payload.get("error")}
            case _:
                return None

    def _delta(self, delta: Json) -> Json | None:
        match delta.get("type"):
            case "text_delta":
                return self._chunk({"content": text_of(delta.get("text"))})
            case "thinking_delta":
                return self._chunk({"reasoning": text_of(delta.get("thinking"))})
            case "input_json_delta":
                return self._call({"function": {"arguments": text_of(delta.get("partial_json"))}})
            case _:
                return None

    def _call(self, call: Json) -> Json:
        return self._chunk({"tool_calls": [{"index": max(self._calls, 0), **call}]})

    def _chunk(self, delta: Json, end: Json | None = None, usage: object = None) -> Json:
        choice: Json = {"index": 0, "delta": delta, "finish_reason": None}
        if end is not None:
            choice["finish_reason"], choice["stop_reason"] = _finish(end), end.get("stop_sequence")
        chunk: Json = {
            "object": "chat.completion.chunk",
            "model": self._model,
            "choices": [choice],
        }
        return chunk if usage is None else {**chunk, "usage": _chat_usage(usage)}


def _stop(
    finish: object, matched: object, called: object, complete: bool
) -> tuple[str | None, str | None]:
    """Why a reply ended, and the stop sequence that ended it."""
    if finish == "length":
        return "max_tokens", None
    if finish not in ("stop", "tool_calls"):
        return None, None
    if called and complete:
        return "tool_use", None
    if isinstance(matched, str):
        return "stop_sequence", matched
    return ("tool_use" if called or finish == "tool_calls" else "end_turn"), None


def _finish(end: Json) -> str:
    """The finish reason. vLLM names none for a reply that it aborted."""
    return _FINISH.get(text_of(end.get("stop_reason")), "abort")


def _usage(usage: object) -> Json:
    counted = obj(usage)
    details = obj(counted.get("prompt_tokens_details"))
    read, created = details.get("cached_tokens"), details.get("created_cache_tokens")
    prompt = _count(counted.get("prompt_tokens")) - _count(read) - _count(created)
    sent = {
        "input_tokens": max(0, prompt),
        "output_tokens": _count(counted.get("completion_tokens")),
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }
    return {name: value for name, value in sent.items() if value is not None}


def _chat_usage(usage: object) -> Json:
    counted = obj(usage)
    read = counted.get("cache_read_input_tokens")
    created = counted.get("cache_creation_input_tokens")
    prompt = _count(counted.get("input_tokens")) + _count(read) + _count(created)
    completion = _count(counted.get("output_tokens"))
    chat: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if read is not None or created is not None:
        chat["prompt_tokens_details"] = {"cached_tokens": read, "created_cache_tokens": created}
    return chat


def _started(chunk: Json) -> Json:
    return {
        "id": chunk.get("id"),
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": chunk.get("model"),
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(chunk.get("usage")),
    }


def _event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: ".encode() + encode({"type": kind, **fields}) + b"\n\n"


def _signature() -> str:
    """vLLM signs a thought with a random number that nobody can check."""
    return uuid.uuid4().hex


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
