"""A scripted vLLM in a process of its own that serves one version, as a whole model.

    python -m tests.engine.whole_server PORT NAME FOLDER

Hidden files in the version's folder say how it fails: `.dies` before it serves, `.differs` from the
learner. Streams wait after their first piece while there is a file `.waits`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from aiohttp import web

from nextstate.engine.whole import PROBE_FILE
from tests import scripted_engine


class WholeServer(scripted_engine.ScriptedEngine):
    """Answers probes with what the learner has said."""

    folder: Path
    running = 0

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_get("/metrics", self._metrics)
        return app

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text=f"vllm:num_requests_running {self.running}\nvllm:num_requests_waiting 0\n"
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("return_tokens_as_token_ids"):
            return await super()._completions(request)
        probes: list[dict[str, Any]] = json.loads((self.folder / PROBE_FILE).read_text())["probes"]
        (one,) = [probe for probe in probes if probe["prompt"] == body["prompt"]]
        off = 0.01 if (self.folder / ".differs").exists() else 0.0
        told = zip(one["tokens"], one["logprobs"], strict=True)
        top = {f"token_id:{token}": logprob + off for token, logprob in told}
        choice = {"index": 0, "text": "x", "logprobs": {"top_logprobs": [top]}}
        return web.json_response({"model": body["model"], "choices": [choice]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        try:
            return await super()._chat(request)
        finally:
            self.running -= 1


async def serve(port: int, folder: Path, host: str) -> None:
    server = WholeServer()
    server.folder = folder
    runner = web.AppRunner(server.app())
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    while True:
        waits = (folder / ".waits").exists()
        if waits and server.script.gate is None:
            server.script.gate = asyncio.Event()
        elif not waits and server.script.gate is not None:
            server.script.gate.set()
            server.script.gate = None
        await asyncio.sleep(0.02)


def main(port: str, name: str, folder: str, host: str = "127.0.0.1") -> None:
    if Path(folder, ".dies").exists():
        print("ValueError: these weights cannot be read")
        sys.exit(1)
    scripted_engine.MODEL = name
    asyncio.run(serve(int(port), Path(folder), host))


if __name__ == "__main__":
    main(*sys.argv[1:])
