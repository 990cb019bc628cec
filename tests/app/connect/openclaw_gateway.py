"""OpenClaw's real gateway on a port of its own, and a client that writes into its chat."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from nextstate.engine.process import free_port

NODE = Path(__file__).parents[3] / ".clients/node_modules"
PROGRAM = NODE / ".bin/openclaw"
STARTS_WITHIN_S = 240
ANSWERS_WITHIN_S = 240
LESS: dict[str, Any] = {
    "plugins": {"slots": {"memory": "none"}},
    "session": {"maintenance": {"mode": "warn"}},
}
"""Settings without what makes half of OpenClaw's work: an index of its notes, and cleaning up."""
_TOKEN = "a-token"
_CHAT = "agent:main:main"


def environment(home: Path) -> dict[str, str]:
    """A path and a home, and nothing else of the machine."""
    path = os.pathsep.join([str(NODE / ".bin"), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(home)}


@dataclass
class Chat:
    """The main chat of a gateway, as its control page writes into it."""

    socket: aiohttp.ClientWebSocketResponse

    async def call(self, method: str, **params: Any) -> Mapping[str, Any]:
        """The answer to one call."""
        name = str(uuid.uuid4())
        await self.socket.send_json({"type": "req", "id": name, "method": method, "params": params})
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            while (said := await self.socket.receive_json()).get("id") != name:
                pass
        assert said["ok"], said
        return said["payload"]

    async def say(self, text: str) -> str:
        """What the gateway replies in the chat."""
        sent = await self.call(
            "chat.send", sessionKey=_CHAT, message=text, idempotencyKey=str(uuid.uuid4())
        )
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            while True:
                said = await self.socket.receive_json()
                told = said.get("payload") or {}
                if said.get("event") == "chat" and told.get("runId") == sent["runId"]:
                    assert told["state"] not in ("error", "aborted"), told
                    if told["state"] == "final":
                        parts = told.get("message", {}).get("content", [])
                        return "".join(part.get("text", "") for part in parts)


@asynccontextmanager
async def gateway(home: Path, folder: Path) -> AsyncGenerator[Chat]:
    """A running gateway with the settings in `home`; its log is in `folder`."""
    port = free_port()
    arguments = ("gateway", "run", "--port", str(port), "--bind", "loopback", "--auth", "token")
    with (folder / "gateway.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(str(PROGRAM), *arguments, "--token", _TOKEN, "--allow-unconfigured"),
            env=environment(home),
            cwd=folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        async with aiohttp.ClientSession() as http:
            async with asyncio.timeout(STARTS_WITHIN_S):
                await _ready(http, f"http://127.0.0.1:{port}/readyz", process, folder)
            async with http.ws_connect(f"ws://127.0.0.1:{port}") as socket:
                await socket.receive_json()  # the challenge, which devices sign
                chat = Chat(socket)
                await chat.call(
                    "connect",
                    minProtocol=4,
                    maxProtocol=4,
                    # The one client that may come without a device's key: the gateway's own, here.
                    client={
                        "id": "gateway-client",
                        "version": "1",
                        "platform": "linux",
                        "mode": "backend",
                    },
                    role="operator",
                    scopes=["operator.read", "operator.write", "operator.admin"],
                    auth={"token": _TOKEN},
                )
                yield chat
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _ready(
    http: aiohttp.ClientSession, url: str, process: asyncio.subprocess.Process, folder: Path
) -> None:
    while True:
        assert process.returncode is None, (folder / "gateway.log").read_text()[-2000:]
        with suppress(aiohttp.ClientError):
            async with http.get(url) as answer:
                if answer.status == 200 and (await answer.json()).get("ready"):
                    return
        await asyncio.sleep(0.2)
