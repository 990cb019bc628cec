"""Exporting from the page: a file that is streamed to those who may have it, and kept nowhere."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nextstate.app.page import exporting
from nextstate.config import StoreConfig
from nextstate.store import Store
from proxy.lineages import Access
from tests.encrypted import encrypt
from tests.page.running_page import Site, on_site, token_in, words
from tests.store.test_records import add, judge, turn

PROCESSES = subprocess  # the page starts `nextstate export`
PAGE = "/page/export?what=kto"
KTO = {"what": "kto", "form": "jsonl", "lineage": "main"}


def fill(store: Store, lineage: str = "main", start: int = 0) -> None:
    """A praised and a blamed turn, and one that nobody judged."""
    add(store, *(turn(start + number, lineage=lineage) for number in range(3)))
    judge(store, start, 1)
    judge(store, start + 1, -1)


async def download(site: Site, fields: Mapping[str, str]) -> aiohttp.ClientResponse:
    form = {"token": token_in(await site.get(PAGE)), **fields}
    sent = {"Origin": site.url}
    return await site.http.post(f"{site.url}/page/export", data=form, headers=sent)


def test_the_button_sends_the_rows_of_the_command_as_a_file(store: Store, tmp_path: Path) -> None:
    fill(store)

    def files() -> set[Path]:
        return {*store.dir.rglob("*"), *tmp_path.iterdir()}

    async def test(site: Site) -> None:
        before = files()
        assert "Export kto of main?" in words(await site.get(PAGE))
        answer = await download(site, KTO)
        assert answer.status == 200
        assert answer.headers["Content-Disposition"] == 'attachment; filename="main-kto.jsonl"'
        assert answer.headers["Cache-Control"] == "no-store"
        rows = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert [(row["turn"], row["label"]) for row in rows] == [
            ("turn_0", True),
            ("turn_1", False),
        ]
        answer = await download(site, KTO | {"form": "parquet"})
        assert answer.content_type == "application/vnd.apache.parquet"
        pq: Any = importlib.import_module("pyarrow.parquet")  # it has no types
        read = pq.read_table(io.BytesIO(await answer.read()))
        assert read.column("turn").to_pylist() == ["turn_0", "turn_1"]
        assert files() == before, "no copy is left"

    on_site(test, store, tmp_path)


def test_an_export_of_nothing_or_of_no_kind_is_told_and_is_no_file(
    store: Store, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        page = "/page/export?what=sft"
        told = await site.submit(page, "/page/export", 409, **KTO)
        assert "no judged turn fits" in words(told)
        for wrong in ({"what": "all"}, {"what": ""}, {"form": "xml"}, {"form": ""}):
            await site.submit(page, "/page/export", 400, **KTO | wrong)
        await site.submit(page, "/page/export", 400, **KTO | {"what": "turns", "form": "parquet"})
        await site.submit(page, "/page/export", 404, **KTO | {"lineage": "bob"})

    on_site(test, store, tmp_path)


def test_a_lineages_key_exports_that_lineage_only(store: Store, tmp_path: Path) -> None:
    fill(store)
    fill(store, "alice", 10)

    async def test(site: Site) -> None:
        await site.post("/page/login", {"key": "alice's"})
        assert (await download(site, KTO)).status == 404
        answer = await download(site, KTO | {"lineage": "alice"})
        rows = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert [row["turn"] for row in rows] == ["turn_10", "turn_11"]

    access = {"alice": Access(model="alice", key="alice's")}
    on_site(test, store, tmp_path, "the-proxy-key", access)


def test_an_encrypted_store_leaves_in_clear_only_if_a_person_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoreConfig(dir=str(tmp_path / "state"))
    encrypt(config, monkeypatch)
    with closing(Store(config)) as store:
        fill(store)

        async def test(site: Site) -> None:
            assert 'name="in_clear"' in await site.get(PAGE)
            answer = await download(site, KTO)
            assert answer.status == 400
            assert "encrypted" in await answer.text()
            answer = await download(site, KTO | {"in_clear": "yes"})
            assert len((await answer.text()).splitlines()) == 2

        on_site(test, store, tmp_path)


def big(store: Store) -> None:
    """Some 12 MB to export: more than the pipe and the sockets hold."""
    for number in range(12):
        text = f"{number} " + os.urandom(500_000).hex()
        request = {"messages": [{"role": "user", "content": text}]}
        add(store, turn(number, request=request), next_state=None)


def test_a_browser_that_leaves_or_stalls_ends_the_command_and_never_has_a_part_for_the_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big(store)
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def noted(*words: str, **more: Any) -> asyncio.subprocess.Process:
        started.append(await start(*words, **more))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)

    async def test(site: Site) -> None:
        fields = KTO | {"what": "turns"}
        answers = [await download(site, fields) for _ in range(exporting.MOST_DOWNLOADS)]
        assert [answer.status for answer in answers] == [200, 200]
        assert (await download(site, fields)).status == 503
        assert "Is it learning?" in await site.get("/"), "the proxy goes on meanwhile"
        answers[0].close()
        await asyncio.wait_for(started[0].wait(), 30)
        started[1].kill()
        with pytest.raises(aiohttp.ClientError):
            await answers[1].read()
        monkeypatch.setattr(exporting, "STALLED_S", 0.2)
        stalled = await download(site, fields)
        await asyncio.wait_for(started[2].wait(), 30)
        with pytest.raises(aiohttp.ClientError):
            await stalled.read()

    on_site(test, store, tmp_path)
