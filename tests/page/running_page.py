"""A proxy with its web page on a port of its own, for the tests of this folder."""

from __future__ import annotations

import asyncio
import functools
import re
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path

import aiohttp

from nextstate.app.page.routes import Page
from nextstate.app.settings import Settings
from nextstate.config import EngineConfig, StoreConfig
from nextstate.engine.client import publish
from nextstate.store import Store
from proxy.lineages import Access
from tests.proxy.running_proxy import TIMEOUT, Running, running
from tests.scripted_engine import MODEL, ScriptedEngine, scripted_engine

Test = Callable[["Site"], Awaitable[None]]


class Site:
    """A browser without scripts: it keeps cookies and sends forms."""

    def __init__(
        self, p: Running, page: Page, http: aiohttp.ClientSession, engine: ScriptedEngine
    ) -> None:
        self.proxy, self.url = p.proxy, p.url
        self.page = page
        self.http = http
        self.engine = engine

    async def get(
        self, path: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> str:
        answer = await self.http.get(self.url + path, headers=headers)
        text = await answer.text()
        assert answer.status == status, text
        return text

    async def post(
        self,
        path: str,
        fields: Mapping[str, str],
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Sends fields; a redirection is followed."""
        sent = {"Origin": self.url} if headers is None else headers
        answer = await self.http.post(self.url + path, data=fields, headers=sent)
        text = await answer.text()
        assert answer.status == status, text
        return text

    async def submit(self, page: str, path: str, status: int = 200, **fields: str) -> str:
        """Sends the form of a page, with its token."""
        token = token_in(await self.get(page))
        return await self.post(path, {"token": token, **fields}, status)


def token_in(page: str) -> str:
    """The token of the page's forms."""
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page)
    assert found, page
    return found[1]


def words(page: str) -> str:
    """What a page says, without its marks."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + sum_.to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    rows = (b"\0" + bytes(colour) * width) * height
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def settings_of(store: Store, tmp_path: Path) -> Settings:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[engine]\nmodel = "{MODEL}"\n[store]\ndir = "{store.dir}"\n')
    return replace(
        Settings.read(file),
        store=StoreConfig(dir=str(store.dir)),
        engine=EngineConfig(model=MODEL),
    )


@asynccontextmanager
async def site(
    store: Store,
    tmp_path: Path,
    key: str | None = None,
    access: Mapping[str, Access] | None = None,
) -> AsyncGenerator[Site]:
    async with (
        scripted_engine() as engine,
        running(engine.url, store, tmp_path, key=key, access=access) as p,
        aiohttp.ClientSession(timeout=TIMEOUT, cookie_jar=aiohttp.CookieJar(unsafe=True)) as http,
    ):
        await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
        p.proxy.pages = page = Page(
            settings_of(store, tmp_path),
            store,
            p.proxy.keys,
            functools.partial(publish, store, p.proxy.engines),
            p.proxy.health_in_full,
            p.proxy.feedback.allowance,
            p.proxy.tries,
            p.proxy.requests,
        )
        yield Site(p, page, http, engine)


def on_site(
    test: Test,
    store: Store,
    tmp_path: Path,
    key: str | None = None,
    access: Mapping[str, Access] | None = None,
) -> None:
    """Runs a test against the page of a proxy that is up."""

    async def run() -> None:
        async with site(store, tmp_path, key, access) as found:
            await test(found)

    asyncio.run(run())
