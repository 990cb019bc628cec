"""A real Chromium without a window, driven by its DevTools protocol over a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_START_S = 120.0


class Tab:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the browser's log says, such as a broken rule of the content security policy."""

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = await self._next()
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]

    async def open(self, url: str) -> None:
        """Loads a page."""
        await self.ask("Page.navigate", url=url)
        await self._loaded()

    async def click(self, selector: str) -> None:
        """Presses what the selector finds, and waits for the page that this loads."""
        await self.value(f"void setTimeout(() => document.querySelector({selector!r}).click())")
        await self._loaded()

    async def value(self, script: str) -> Any:
        """The value of a script in the page."""
        found = await self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def result(self, script: str) -> Any:
        """What the promise of a script resolves to."""
        found = await self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def becomes(self, script: str, wanted: Any = True) -> None:
        """Waits until a script has this value."""
        async with asyncio.timeout(60):
            while (found := await self.value(script)) != wanted:
                await asyncio.sleep(0.05)
        assert found == wanted

    async def key(self, name: str, code: int) -> None:
        """Presses a key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            more = {"key": name, "code": name, "windowsVirtualKeyCode": code, **text}
            await self.ask("Input.dispatchKeyEvent", type=kind, **more)

    async def look(self, width: int, dark: bool) -> None:
        """How wide the window is, in pixels, and which colours its user prefers."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.ask("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, file: Path) -> None:
        """Saves a picture of the whole page."""
        found = await self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        await asyncio.to_thread(file.write_bytes, base64.b64decode(found["data"]))

    async def _loaded(self) -> None:
        while (await self._next()).get("method") != "Page.loadEventFired":
            pass

    async def _next(self) -> dict[str, Any]:
        said = await asyncio.wait_for(self._socket.receive_json(), 60)
        if said.get("method") == "Log.entryAdded":
            self.complaints.append(said["params"]["entry"]["text"])
        return said


@asynccontextmanager
async def chromium(folder: Path) -> AsyncGenerator[Tab]:
    """A tab of a new browser, whose profile lies in the folder."""
    assert PROGRAM is not None
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--disable-extensions"),
        *("--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}"),
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _port(folder / "DevToolsActivePort")
        async with aiohttp.ClientSession() as http:
            answer = await http.get(f"http://127.0.0.1:{port}/json/list")
            (page,) = [one for one in await answer.json() if one["type"] == "page"]
            address = page["webSocketDebuggerUrl"]
            async with http.ws_connect(address, max_msg_size=1 << 28) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Log", "Runtime"):
                    await tab.ask(f"{domain}.enable")
                yield tab
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def _port(file: Path) -> int:
    async with asyncio.timeout(_START_S):
        while (port := await asyncio.to_thread(_read_port, file)) is None:
            await asyncio.sleep(0.05)
    return port


def _read_port(file: Path) -> int | None:
    """The port in the file's first line; None until that is written."""
    if not file.exists() or "\n" not in (text := file.read_text()):
        return None
    return int(text.splitlines()[0])
