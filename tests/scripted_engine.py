"""A fake engine that speaks vLLM 0.32's HTTP format; a test scripts its replies."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from nextstate.engine.adapter_files import WEIGHTS_FILE, folder_sha256

MODEL = "base"
FINGERPRINT = "vllm-test"
WARM_UP_PROMPT = [0]


def write_weights(folder: Path) -> str:
    """Makes an adapter's folder with a file instead of weights; returns its `folder_sha256`."""
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(folder.name.encode())
    (folder / "adapter_config.json").write_text("{}")
    return folder_sha256(folder)


def adapter(lineage: str, number: int, folder: str) -> str:
    """The name of the adapter that `write_weights` made in a folder of that name."""
    with tempfile.TemporaryDirectory() as parent:
        return f"{lineage}-v{number:06d}-{write_weights(Path(parent, folder))[:16]}"


@dataclass
class Script:
    """One reply: a token is a piece of text with its id and log-prob."""

    pieces: Sequence[str] = ("Hel", "lo")
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str = "stop"
    status: int = 200
    cut_after: int | None = None
    """Break the connection after this many pieces."""
    gate: asyncio.Event | None = None
    """Wait for it before the second piece."""
    body_gate: asyncio.Event | None = None
    """Wait for it before a reply in one body."""
    miscount: int = 0
    """Added to the number of completion tokens in `usage`."""
    unknown_logprob: bool = False
    tokens: Sequence[tuple[int, float]] | None = None
    """The id and log-prob of each piece, instead of those of `token`."""
    raw_logprobs: bool = False
    """Whether log-probs are told before the temperature."""
    temperature: float = 1.0
    """Its default."""
    """Report every log-prob with the value that vLLM uses for an unknown one."""
    answers_as: str | None = None
    """The model name in the reply, if it differs from the requested one."""


@dataclass
class ScriptedEngine:
    """Answers chat requests with `script`, or with what `queue` holds first."""

    script: Script = field(default_factory=Script)
    queue: list[Script] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    """Requests for completions, including warm-ups and probes."""
    headers: list[dict[str, str]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    loads: int = 0
    """Requests to load an adapter so far."""
    loading: asyncio.Event | None = None
    """Loads wait until it is set."""
    undone: int = 0
    """The number of coming loads that succeed and are undone at once, as if a proxy unloaded."""
    unloads_to_fail: int = 0
    refuses_adapters: bool = False
    """Answers loads like a vLLM without `--enable-lora`."""
    unloaded: list[str] = field(default_factory=list)
    resets: int = 0
    """The number of coming requests whose connection breaks before any byte of an answer."""
    was_reset: list[str] = field(default_factory=list)
    """The paths of requests whose connection broke."""
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    healthy: bool = True
    frozen: asyncio.Event | None = None
    """All requests wait until it is set."""
    served: list[str] = field(default_factory=list)
    """The models of the chat requests that were answered."""
    context: int = 4096
    """Tokens, as `/v1/models` tells them."""
    server: TestServer | None = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return str(self.server.make_url("")).rstrip("/")

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._reset])
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        app.router.add_post("/v1/unload_lora_adapter", self._unload)
        app.router.add_post("/v1/echo", self._echo)
        app.router.add_post("/v1/score", self._score)
        app.router.add_post("/tokenize", self._tokenize)
        return app

    @web.middleware
    async def _reset(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.frozen is not None:
            await self.frozen.wait()
        if self.resets and request.method == "POST":
            self.resets -= 1
            self.was_reset.append(request.path)
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return await handler(request)

    async def kill(self) -> None:
        """Ends it as SIGKILL would: nobody listens, and every connection breaks."""
        assert self.server is not None
        assert self.server.runner is not None
        for site in [*self.server.runner.sites]:
            await site.stop()
        assert self.server.runner.server is not None
        for connection in self.server.runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def start_again(self) -> None:
        """Starts it anew at the same address, without adapters."""
        assert self.server is not None
        self.adapters.clear()
        port = self.server.port
        self.server = TestServer(self.app(), port=port, handler_cancellation=True)
        await self.server.start_server()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0"})

    async def _models(self, request: web.Request) -> web.Response:
        models = [{"id": MODEL, "parent": None, "root": "/m", "max_model_len": self.context}]
        models += [{"id": n, "parent": MODEL, "root": p} for n, p in self.adapters.items()]
        return web.json_response({"object": "list", "data": models})

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.loads += 1
        if self.loading is not None:
            await self.loading.wait()
        if self.refuses_adapters:
            error = {"message": "LoRA is not enabled.", "type": "InternalServerError", "code": 500}
            return web.json_response({"error": error}, status=500)
        if body["lora_name"] in self.adapters:
            message = f"The lora adapter '{body['lora_name']}' has already been loaded."
            error = {"message": message, "type": "InvalidUserInput", "param": None, "code": 400}
            return web.json_response({"error": error}, status=400)
        if self.undone:
            self.undone -= 1
        else:
            self.adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success: LoRA adapter added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.unloads_to_fail:
            self.unloads_to_fail -= 1
            return web.Response(status=500)
        if name not in self.adapters:
            return web.Response(status=404)
        del self.adapters[name]
        self.unloaded.append(name)
        return web.Response(text="Success: LoRA adapter removed successfully.")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.completions.append(body)
        if body["model"] != MODEL and body["model"] not in self.adapters:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return web.json_response({"error": error}, status=404)
        script = Script(("x",)) if body["prompt"] == WARM_UP_PROMPT else self.script
        if body.get("stream"):
            return await self._send(request, completion_chunks(body, script), script)
        data = compact(completion_reply(body, script))
        return web.Response(body=data, content_type="application/json")

    async def _tokenize(self, request: web.Request) -> web.Response:
        text = json.dumps((await request.json())["messages"])
        return web.json_response({"tokens": [ord(c) % 256 for c in text], "count": len(text)})

    async def _echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), headers={"x-engine": "yes"})

    async def _score(self, request: web.Request) -> web.StreamResponse:
        """An example of the routes that name a model and that the proxy passes on."""
        body = await request.json()
        self.requests.append(body)
        model = body["model"]
        if model != MODEL and model not in self.adapters:
            error = {"message": f"The model `{model}` does not exist.", "code": 404}
            return web.json_response({"error": error}, status=404)
        data = compact({"model": model, "data": [{"score": 0.5}]})
        if self.script.cut_after is None:
            return web.Response(body=data, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[: self.script.cut_after])
        assert request.transport is not None
        request.transport.close()
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw)
        except ValueError:
            return web.json_response({"error": {"message": "not JSON", "code": 400}}, status=400)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        model = body.get("model")
        if not isinstance(model, str):
            error = {"message": "Input should be a valid string", "code": 400}
            return web.json_response({"error": error}, status=400)
        if model != MODEL and model not in self.adapters:
            error = {"message": f"The model `{model}` does not exist.", "code": 404}
            return web.json_response({"error": error}, status=404)
        self.served.append(model)
        script = self.queue.pop(0) if self.queue else self.script
        if script.status != 200:
            error = {"message": "scripted", "code": script.status}
            return web.json_response({"error": error}, status=script.status)
        if script.answers_as is not None:
            body = {**body, "model": script.answers_as}
        if not body.get("stream"):
            if script.body_gate is not None:
                await script.body_gate.wait()
            data = compact(plain_reply(body, script))
            return web.Response(body=data, content_type="application/json")
        return await self._send(request, stream_chunks(body, script), script)

    async def _send(
        self, request: web.Request, chunks: list[dict[str, Any]], script: Script
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            for number, chunk in enumerate(chunks):
                if script.gate is not None and number == 2:
                    await script.gate.wait()
                if script.cut_after is not None and number > script.cut_after:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                await response.write(b"data: " + compact(chunk) + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.aborted.set()
            raise
        return response


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def token(number: int, script: Script | None = None) -> tuple[int, float]:
    """(id, log-prob) of the piece at a position."""
    if script is not None and script.tokens is not None:
        return script.tokens[number]
    return 100 + number, -0.25 * (number + 1)


def _logprobs(script: Script, number: int) -> dict[str, Any]:
    logprob = -9999.0 if script.unknown_logprob else token(number, script)[1]
    entry = {"token": script.pieces[number], "logprob": logprob, "bytes": []}
    return {"content": [{**entry, "top_logprobs": []}]}


def _usage(script: Script) -> dict[str, int]:
    count = len(script.pieces) + script.miscount
    return {"prompt_tokens": 3, "total_tokens": 3 + count, "completion_tokens": count}


def stream_chunks(body: dict[str, Any], script: Script) -> list[dict[str, Any]]:
    """The chunks that vLLM streams for one choice."""
    ids, logprobs = body.get("return_token_ids"), body.get("logprobs")
    usage = (body.get("stream_options") or {}).get("include_usage")
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1}
    head["model"] = body["model"]

    def chunk(delta: dict[str, Any], number: int | None, finish: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None}
        if number is not None and logprobs:
            choice["logprobs"] = _logprobs(script, number)
        choice["finish_reason"] = finish
        if finish is not None:
            choice["stop_reason"] = None
        if number is not None:
            choice["token_ids"] = [token(number, script)[0]] if ids else None
        return {**head, "choices": [choice]}

    first = chunk({"role": "assistant", "content": ""}, None, None)
    first |= {"prompt_token_ids": [1, 2, 3] if ids else None, "prompt_text": None}
    chunks = [first]
    last = len(script.pieces) - 1
    for number, piece in enumerate(script.pieces):
        finish = script.finish_reason if number == last else None
        delta: dict[str, Any] = {"content": piece} if piece else {}
        if finish and script.tool_calls:
            delta["tool_calls"] = script.tool_calls
        if delta or finish or ids or logprobs:
            chunks.append(chunk(delta, number, finish))
    fingerprint = {"system_fingerprint": FINGERPRINT}
    if usage:
        chunks.append({**head, "choices": [], "usage": _usage(script), **fingerprint})
    else:
        chunks[-1] |= fingerprint
    return chunks


def plain_reply(body: dict[str, Any], script: Script) -> dict[str, Any]:
    """vLLM's answer without streaming."""
    ids = body.get("return_token_ids")
    count = len(script.pieces)
    content = [_logprobs(script, n)["content"][0] for n in range(count)]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(script.pieces)}
    if script.tool_calls:
        message["tool_calls"] = script.tool_calls
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": content} if body.get("logprobs") else None,
        "finish_reason": script.finish_reason,
        "token_ids": [token(n, script)[0] for n in range(count)] if ids else None,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": _usage(script),
        "prompt_token_ids": [1, 2, 3] if ids else None,
    }


def _prompts(body: dict[str, Any]) -> list[Any]:
    """A request's prompts: each a text or a list of token ids."""
    prompt = body["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return prompt if several else [prompt]


def _prompt_ids(prompt: Any) -> list[int]:
    return [1, 2, 3] if isinstance(prompt, str) else prompt


def _text_logprobs(
    body: dict[str, Any], script: Script, numbers: Sequence[int], asked: int
) -> dict[str, Any]:
    """The log-probs of a completion, with `asked` alternatives for each token."""
    pieces = [script.pieces[n] for n in numbers]
    temperature = 1.0 if script.raw_logprobs else body.get("temperature", script.temperature)
    values = [token(n)[1] * (2 - temperature) for n in numbers]
    others = {f"other{k}": -9.0 for k in range(1, asked)}
    return {
        "text_offset": [len("".join(script.pieces[:n])) for n in numbers],
        "token_logprobs": values,
        "tokens": pieces,
        "top_logprobs": [
            {piece: value, **others} for piece, value in zip(pieces, values, strict=True)
        ],
    }


def _text_usage(body: dict[str, Any], script: Script) -> dict[str, int]:
    prompts = _prompts(body)
    asked = sum(len(_prompt_ids(prompt)) for prompt in prompts)
    count = len(prompts) * body.get("n", 1) * len(script.pieces) + script.miscount
    return {"prompt_tokens": asked, "total_tokens": asked + count, "completion_tokens": count}


def completion_chunks(body: dict[str, Any], script: Script) -> list[dict[str, Any]]:
    """The chunks that vLLM streams for a completion: `n` choices a prompt, one token a chunk."""
    ids, logprobs = body.get("return_token_ids"), body.get("logprobs")
    usage = (body.get("stream_options") or {}).get("include_usage")
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"]}
    prompts = [prompt for prompt in _prompts(body) for _ in range(body.get("n", 1))]
    chunks: list[dict[str, Any]] = []
    for number, piece in enumerate(script.pieces):
        finish = script.finish_reason if number == len(script.pieces) - 1 else None
        for index, prompt in enumerate(prompts):
            # With return_token_ids vLLM leaves the echoed text out; without, it adds the ids.
            echoed = number == 0 and body.get("echo") and not ids
            choice = {
                "index": index,
                "text": f"{prompt}{piece}" if echoed else piece,
                "logprobs": None
                if logprobs is None
                else _text_logprobs(body, script, [number], logprobs),
                "finish_reason": finish,
                "stop_reason": None,
                "prompt_token_ids": _prompt_ids(prompt) if not number and (ids or echoed) else None,
                "token_ids": [token(number)[0]] if ids else None,
            }
            ended = {"system_fingerprint": FINGERPRINT} if finish and not usage else {}
            chunks.append({**head, "choices": [choice], **ended})
    if usage:
        last = {"choices": [], "usage": _text_usage(body, script)}
        chunks.append({**head, **last, "system_fingerprint": FINGERPRINT})
    return chunks


def completion_reply(body: dict[str, Any], script: Script) -> dict[str, Any]:
    """vLLM's answer to a completion without streaming."""
    ids, logprobs = body.get("return_token_ids"), body.get("logprobs")
    numbers = range(len(script.pieces))
    text = "".join(script.pieces)
    prompts = [prompt for prompt in _prompts(body) for _ in range(body.get("n", 1))]
    choices = [
        {
            "index": index,
            "text": f"{prompt}{text}" if body.get("echo") and not ids else text,
            "logprobs": None
            if logprobs is None
            else _text_logprobs(body, script, numbers, logprobs),
            "finish_reason": script.finish_reason,
            "stop_reason": None,
            "token_ids": [token(n)[0] for n in numbers] if ids else None,
            "prompt_logprobs": None,
            "prompt_token_ids": _prompt_ids(prompt) if ids else None,
            "routed_experts": None,
        }
        for index, prompt in enumerate(prompts)
    ]
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": {**_text_usage(body, script), **details},
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


@asynccontextmanager
async def scripted_engine(engine: ScriptedEngine | None = None) -> AsyncGenerator[ScriptedEngine]:
    """A running scripted engine on a free port: a new one, or this one."""
    engine = engine or ScriptedEngine()
    engine.server = TestServer(engine.app(), handler_cancellation=True)
    limits = {"max_field_size": 1 << 18, "max_line_size": 1 << 18, "max_headers": 1024}
    await engine.server.start_server(**limits)
    try:
        yield engine
    finally:
        await engine.server.close()
