"""The OpenAI Responses dialect, served through chat completions.

vLLM's own /v1/responses loses log-probs, so a request goes to /v1/chat/completions and the reply is
translated into what vLLM 0.32 would have answered, byte for byte. Only ids, times and the echo of
tools that are no functions differ: the echo is as the client wrote it. A differential test checks
this. `to_chat` says for which requests it holds. The others are relayed unchanged, and
`to_chat_reply` and `Chunks` read the native reply for the record.

The object repeats temperature, top-p and penalties: the engine's own defaults must be filled into
the request before. The translation assumes the default `--tool-strict-level` and no response store.
Cached prompt tokens are reported as 0 unless the engine runs with `--enable-prompt-tokens-details`.
The chat route does not show if a reply with tool calls that is exactly `max_output_tokens` long was
cut: it counts as cut.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from nextstate.records import Json
from nextstate.wire import obj, objects
from proxy.dialects.responses_record import Chunks, to_chat_reply
from proxy.dialects.responses_request import to_chat
from proxy.dialects.responses_tools import InputReader, ToolNames, chosen_name, custom_input

__all__ = ["Chunks", "Events", "from_chat", "to_chat", "to_chat_reply"]

_LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller temperature to this, unless it is 0."""
_GREEDY = 1e-5
"""Below it vLLM samples greedily, with top_p = 1."""


def from_chat(reply: Json, body: Json, max_model_len: int) -> Json:
    """A whole chat reply as the Responses object that the client asked for with `body`."""
    choice = (objects(reply.get("choices")) or [obj(None)])[0]
    message = obj(choice.get("message"))
    reply_id, usage = str(reply.get("id")), obj(reply.get("usage"))
    names, output = ToolNames(body), list[Json]()
    if message.get("reasoning"):
        output.append(_reasoning_item(_id("rs", reply_id, 0), message["reasoning"], None))
    if message.get("content"):
        output.append(_message_item(_id("msg", reply_id, len(output)), message["content"]))
    for call in objects(message.get("tool_calls")):
        function = obj(call.get("function"))
        name, arguments = function.get("name"), function.get("arguments")
        custom = names.is_custom(name)
        item_id = _id("ctc" if custom else "fc", reply_id, len(output))
        item = names.item(item_id, call.get("id"), name, "completed")
        said = {"input": custom_input(arguments or "")} if custom else {"arguments": arguments}
        output.append({**item, **said})
    response = _Response(body, reply, max_model_len, usage.get("prompt_tokens", 0))
    cut = choice.get("finish_reason") == "length"
    if message.get("tool_calls") and usage.get("completion_tokens") == response.max_output_tokens:
        cut = True  # chat says "tool_calls" even if it was cut
    return response.ended(output, cut, usage)


class Events:
    """Turns the chunks of one chat stream into the events of a Responses stream.

    After an error in the stream it writes nothing more, and `failed` says that the connection must
    be cut, as vLLM itself does.
    """

    def __init__(self, body: Json, max_model_len: int) -> None:
        self.failed = False
        self._body = body
        self._max_model_len = max_model_len
        self._names = ToolNames(body)
        self._response: _Response | None = None
        self._sequence = 0
        self._output: list[Json] = []
        self._kind: str | None = None
        """The kind of the open item: "reasoning", "content" or "call"; None between items."""
        self._item: Json = {}
        self._text = ""
        self._call_index: object = None
        self._input: InputReader | None = None
        """Reads the open call's input, if it calls a custom tool."""
        self._sent = ""
        """The part of that input that was sent."""
        self._cut = False
        self._usage: Json = {}

    def feed(self, chunk: Json) -> bytes:
        """The events for a chunk. The first chunk must hold the prompt's token ids."""
        if self.failed or "error" in chunk:
            self.failed = True
            return b""
        events: list[bytes] = []
        if self._response is None:
            prompt: list[int] = chunk.get("prompt_token_ids") or []
            self._response = _Response(self._body, chunk, self._max_model_len, len(prompt))
            for kind in ("response.created", "response.in_progress"):
                events.append(self._event(kind, {"response": self._response.begun()}))
        self._usage = obj(chunk.get("usage")) or self._usage
        for choice in objects(chunk.get("choices")):
            events += self._delta(obj(choice.get("delta")))
            self._cut = self._cut or choice.get("finish_reason") == "length"
        return b"".join(events)

    def done(self) -> bytes:
        """The events at the stream's end."""
        if self.failed or self._response is None:
            return b""
        events = self._close()
        response = self._response.ended(self._output, self._cut, self._usage)
        events.append(self._event("response.completed", {"response": response}))
        return b"".join(events)

    def _delta(self, delta: Json) -> list[bytes]:
        events: list[bytes] = []
        if delta.get("reasoning") is not None:
            events += self._text_delta("reasoning", delta["reasoning"])
        if delta.get("content"):
            events += self._text_delta("content", delta["content"])
        groups: dict[object, list[Json]] = {}
        for call in objects(delta.get("tool_calls")):
            groups.setdefault(call.get("index"), []).append(call)
        for index, calls in groups.items():
            events += self._call_delta(index, calls)
        return events

    def _text_delta(self, kind: str, text: str) -> list[bytes]:
        events: list[bytes] = []
        if self._kind != kind:
            events += self._close()
            prefix = "rs" if kind == "reasoning" else "msg"
            item = self._open(kind, prefix)
            if kind == "reasoning":
                added = {**_reasoning_item(item, "", "in_progress"), "content": None}
                part: Json = {"text": "", "type": "reasoning_text"}
            else:
                added = {**_message_item(item, ""), "content": None, "status": "in_progress"}
                added["content"] = []
                part = {**_text_part(""), "logprobs": []}
            events.append(self._item_event("response.output_item.added", added))
            events.append(self._part_event("response.content_part.added", part))
        self._text += text
        data: Json = {"content_index": 0, "delta": text, "item_id": self._item["id"]}
        if kind == "content":
            data["logprobs"] = []
        data["output_index"] = len(self._output)
        name = "output_text" if kind == "content" else "reasoning_text"
        events.append(self._event(f"response.{name}.delta", data))
        return events

    def _call_delta(self, index: object, calls: list[Json]) -> list[bytes]:
        functions = [obj(call.get("function")) for call in calls]
        if calls[0].get("function") is None:
            return []
        events: list[bytes] = []
        if self._kind != "call" or self._call_index != index:
            events += self._close()
            name = functions[0].get("name")
            custom = self._names.is_custom(name)
            item_id = self._open("call", "ctc" if custom else "fc")
            self._call_index = index
            self._input, self._sent = InputReader() if custom else None, ""
            call_id = calls[0].get("id") or _id("chatcmpl-tool-", item_id, 0)
            self._item = self._names.item(item_id, call_id, name, "in_progress")
            events.append(self._item_event("response.output_item.added", self._item))
        arguments = "".join(function.get("arguments") or "" for function in functions)
        self._text += arguments
        if self._input is not None:
            events += self._input_delta(self._input.feed(arguments))
        elif arguments:
            data = {"delta": arguments, "item_id": self._item["id"]}
            data["output_index"] = len(self._output)
            events.append(self._event("response.function_call_arguments.delta", data))
        return events

    def _input_delta(self, text: str) -> list[bytes]:
        if not text:
            return []
        self._sent += text
        data = {"delta": text, "item_id": self._item["id"], "output_index": len(self._output)}
        return [self._event("response.custom_tool_call_input.delta", data)]

    def _open(self, kind: str, prefix: str) -> str:
        assert self._response is not None
        self._kind, self._text = kind, ""
        self._item = {"id": _id(prefix, self._response.chat_id, len(self._output))}
        return self._item["id"]

    def _close(self) -> list[bytes]:
        if self._kind is None:
            return []
        item_id: str = self._item["id"]
        index = len(self._output)
        text: Json = {"output_index": index, "text": self._text}
        if self._kind == "call" and self._input is not None:
            given = custom_input(self._text)
            # What was sent cannot be taken back. An input that does not continue it is sent whole.
            rest = given[len(self._sent) :] if given.startswith(self._sent) else given
            done = {**self._item, "input": given}
            data = {"input": given, "item_id": item_id, "output_index": index}
            events = self._input_delta(rest)
            events.append(self._event("response.custom_tool_call_input.done", data))
        elif self._kind == "call":
            done = {**self._item, "arguments": self._text, "status": "completed"}
            data = {"arguments": self._text, "item_id": item_id, "name": done["name"]}
            data["output_index"] = index
            events = [self._event("response.function_call_arguments.done", data)]
        elif self._kind == "reasoning":
            done = _reasoning_item(item_id, self._text, "completed")
            data = {"content_index": 0, "item_id": item_id, **text}
            events = [self._event("response.reasoning_text.done", data, before="text")]
            events.append(self._part_event("response.content_part.done", done["content"][0]))
        else:
            done = _message_item(item_id, self._text)
            data: Json = {"content_index": 0, "item_id": item_id, "logprobs": [], **text}
            events = [self._event("response.output_text.done", data, before="text")]
            events.append(self._part_event("response.content_part.done", done["content"][0]))
        events.append(self._item_event("response.output_item.done", done))
        self._output.append(done)
        self._kind = None
        return events

    def _item_event(self, kind: str, item: Json) -> bytes:
        return self._event(kind, {"item": item, "output_index": len(self._output)})

    def _part_event(self, kind: str, part: Json) -> bytes:
        data = {"content_index": 0, "item_id": self._item["id"]}
        return self._event(kind, {**data, "output_index": len(self._output), "part": part})

    def _event(self, kind: str, data: Json, before: str | None = None) -> bytes:
        """One event. Its sequence number comes before the field `before`, else at the end."""
        tail = {} if before is None else {before: data.pop(before)}
        payload = {**data, "sequence_number": self._sequence, **tail, "type": kind}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(payload))


class _Response:
    """The Responses object of one reply."""

    def __init__(self, body: Json, chat: Json, max_model_len: int, prompt_tokens: int) -> None:
        self.chat_id = str(chat.get("id"))
        self._body = body
        self._chat = chat
        asked: int | None = body.get("max_output_tokens")
        left = max_model_len - prompt_tokens
        self.max_output_tokens = left if asked is None else min(asked, left)

    def begun(self) -> Json:
        """The object in the stream's first events."""
        return self._object([], "in_progress", None)

    def ended(self, output: list[Json], cut: bool, usage: Json) -> Json:
        """The object at the end; `cut` if the reply ran out of tokens."""
        return self._object(output, "incomplete" if cut else "completed", _usage(usage))

    def _object(self, output: list[Json], status: str, usage: Json | None) -> Json:
        body = self._body
        parallel = body.get("parallel_tool_calls")
        temperature, top_p = _sampling(body)
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": _id("resp", self.chat_id, 0),
            "created_at": self._chat.get("created"),
            "incomplete_details": incomplete,
            "instructions": body.get("instructions"),
            "metadata": body.get("metadata"),
            "model": self._chat.get("model"),
            "object": "response",
            "output": output,
            "parallel_tool_calls": True if parallel is None else parallel,
            "temperature": temperature,
            "tool_choice": _tool_choice_echo(body),
            "tools": [_tool_echo(tool) for tool in objects(body.get("tools"))],
            "top_p": top_p,
            "background": False,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": body.get("max_tool_calls"),
            "previous_response_id": None,
            "prompt": None,
            "reasoning": _reasoning_echo(body.get("reasoning")),
            "service_tier": body.get("service_tier", "auto"),
            "status": status,
            "text": _text_echo(body.get("text")),
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": usage,
            "user": body.get("user"),
            "presence_penalty": float(body.get("presence_penalty") or 0),
            "frequency_penalty": float(body.get("frequency_penalty") or 0),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }


def _sampling(body: Json) -> tuple[float, float]:
    """The temperature and top_p that vLLM reports."""
    temperature, top_p = body.get("temperature"), body.get("top_p")
    temperature = 1.0 if temperature is None else float(temperature)
    top_p = 1.0 if top_p is None else float(top_p)
    if 0 < temperature < _LEAST_TEMPERATURE:
        temperature = _LEAST_TEMPERATURE
    return temperature, 1.0 if temperature < _GREEDY else top_p


def _tool_choice_echo(body: Json) -> Any:
    choice = body.get("tool_choice", "auto")
    if not body.get("tools"):
        return "none"
    named = obj(choice)
    if not named:
        return choice
    chosen = chosen_name(named.get("name"), objects(body["tools"]))
    return {"name": chosen, "type": named.get("type")}


def _tool_echo(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    names = ("name", "parameters", "strict", "type", "allowed_callers", "defer_loading")
    known = {name: tool.get(name) for name in (*names, "description", "output_schema")}
    return {**known, **{name: value for name, value in tool.items() if name not in known}}


def _reasoning_echo(given: object) -> Json | None:
    if given is None:
        return None
    names = ("context", "effort", "generate_summary", "mode", "summary")
    return {name: obj(given).get(name) for name in names}


def _text_echo(given: object) -> Json | None:
    if given is None:
        return None
    form = obj(given).get("format")
    if obj(form).get("type") == "json_schema":
        names = ("name", "schema", "type", "description", "strict")
        form = {name: obj(form).get(name) for name in names}
    return {"format": form, "verbosity": obj(given).get("verbosity")}


def _usage(usage: Json) -> Json:
    cached = obj(usage.get("prompt_tokens_details"))
    thought = obj(usage.get("completion_tokens_details")).get("reasoning_tokens")
    return {
        "input_tokens": usage.get("prompt_tokens", 0),
        "input_tokens_details": {
            "cached_tokens": cached.get("cached_tokens") or 0,
            "cache_write_tokens": cached.get("created_cache_tokens") or 0,
            "input_tokens_per_turn": [],
            "cached_tokens_per_turn": [],
        },
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {
            "reasoning_tokens": thought or 0,
            "tool_output_tokens": 0,
            "output_tokens_per_turn": [],
            "tool_output_tokens_per_turn": [],
        },
        "total_tokens": usage.get("total_tokens", 0),
    }


def _id(kind: str, chat_id: str, position: int) -> str:
    """An id in vLLM's form, always the same for the same reply."""
    digest = hashlib.blake2b(f"{kind}{position} {chat_id}".encode(), digest_size=8).hexdigest()
    return kind + digest if kind.endswith("-") else f"{kind}_{digest}"


def _text_part(text: str) -> Json:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def _message_item(item_id: str, text: str) -> Json:
    return {
        "id": item_id,
        "content": [_text_part(text)],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def _reasoning_item(item_id: str, text: str, status: str | None) -> Json:
    return {
        "id": item_id,
        "summary": [],
        "type": "reasoning",
        "content": [{"text": text, "type": "reasoning_text"}],
        "encrypted_content": None,
        "status": status,
    }
