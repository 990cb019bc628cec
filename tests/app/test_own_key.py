"""Our own commands reach a proxy that asks for a key, with one that lasts as long as it runs."""

from __future__ import annotations

import asyncio
import stat
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from nextstate.app.own_key import own_key_file, proxy_key, remove_own_key, write_own_key
from nextstate.app.settings import Settings
from nextstate.app.status import status
from nextstate.keys import Scope
from nextstate.store import Store
from tests.app.test_tls import configured, served
from tests.postgresql_server import Server, require_server
from tests.proxy.test_scopes import add_key
from tests.scripted_engine import scripted_engine


def test_commands_need_no_key_in_the_environment(tmp_path: Path) -> None:
    async def test() -> list[str | None]:
        async with scripted_engine() as engine:
            file = configured(tmp_path, engine.url, None)
            store = Store(Settings.read(file).store)
            add_key(store, "laptop", Scope.CHAT)
            store.close()
            keys: list[str | None] = []
            for _ in range(2):
                async with served(file, engine.url) as settings:
                    found = await status(settings)
                    assert found["proxy"].startswith("up")
                    assert isinstance(found["unrecorded"], dict)
                    keys.append(proxy_key(settings))
                    mode = own_key_file(settings).stat().st_mode
                    assert stat.S_IMODE(mode) == 0o600
                    async with (
                        aiohttp.ClientSession() as http,
                        http.get(f"{settings.proxy.url}/metrics") as answer,
                    ):
                        assert answer.status == 401
                assert not own_key_file(settings).exists()
            return keys

    first, second = asyncio.run(test())
    assert first is not None
    assert first != second


def test_the_end_of_a_proxy_leaves_another_ones_key(tmp_path: Path) -> None:
    file = configured(tmp_path, "http://127.0.0.1:1", None)
    settings = Settings.read(file)
    settings.store.path.mkdir()
    write_own_key(settings, "mine")
    remove_own_key(settings, "another")
    assert proxy_key(settings) == "mine"
    remove_own_key(settings, "mine")
    assert proxy_key(settings) is None


@pytest.mark.sqlite  # it brings its own server
def test_proxies_of_several_machines_have_one_key_whichever_of_them_starts_anew(
    tmp_path: Path,
) -> None:
    require_server()
    server = Server()

    async def test() -> None:
        async with scripted_engine() as engine:
            files: list[Path] = []
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
                file = configured(tmp_path / name, engine.url, None)
                text, place = file.read_text(), f'[store]\ndir = "{tmp_path}'
                url = f'[store]\nurl = "{server.database("shared")}"\ndir = "{tmp_path}'
                file.write_text(text.replace(f"{place}/{name}", url))
                files.append(file)
            store = Store(Settings.read(files[0]).store)
            add_key(store, "laptop", Scope.CHAT)
            store.close()
            async with AsyncExitStack() as opened:
                async with served(files[0], engine.url):
                    second = await opened.enter_async_context(served(files[1], engine.url))
                async with served(files[0], engine.url) as again:
                    for settings in (second, again):
                        headers = {"Authorization": f"Bearer {proxy_key(settings)}"}
                        url = f"{settings.proxy.url}/metrics"
                        async with aiohttp.request("GET", url, headers=headers) as answer:
                            assert answer.status == 200, settings.proxy.port

    try:
        asyncio.run(test())
    finally:
        server.close()
