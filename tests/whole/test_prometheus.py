"""The numbers under /metrics, read by a real Prometheus, and the dashboard that is made of them.

Both programs come with Debian's `prometheus` (`make prometheus`).
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nextstate.engine.process import free_port
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.judge.test_groups import open_episode
from tests.proxy.running_proxy import Running, both, request
from tests.scripted_engine import ScriptedEngine
from tests.store.test_records import add, judge, turn

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "nextstate.json").read_text("utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="no prometheus: `make prometheus` installs it"
)


def fill(store: Store) -> None:
    """Records of every kind that the dashboard shows."""
    add(store, *(turn(number) for number in range(3)))
    for number, score in enumerate((1, -1, 0)):
        assert judge(store, number, score)
    store.versions.add(PolicyVersion("main", 1, 0, None, None, 1, VersionState.REJECTED), None)
    open_episode(store, "e-1", group=None)


async def use(p: Running) -> str:
    """Asks a few times, once with a request that cannot be a turn; returns /metrics."""
    for _ in range(3):
        assert (await p.chat(request()))[0] == 200
    assert (await p.chat(request(prompt_logprobs=1)))[0] == 400
    return await (await p.http.get(f"{p.url}/metrics")).text()


@needs_prometheus
def test_promtool_finds_nothing_to_object_to(store: Store, tmp_path: Path) -> None:
    fill(store)
    pages: list[str] = []

    async def test(engine: ScriptedEngine, p: Running) -> None:
        pages.append(await use(p))

    both(test, store, tmp_path)
    assert PROMTOOL is not None
    checked = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=pages[0], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@needs_prometheus
@pytest.mark.timeout(120)
def test_every_query_of_the_dashboard_has_an_answer(store: Store, tmp_path: Path) -> None:
    fill(store)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        await use(p)
        async with prometheus(p, tmp_path) as ask:
            while await ask("count_over_time(nextstate_requests_total[1m]) >= 3") == []:
                await use(p)
                await asyncio.sleep(0.2)
            answers = {query: await ask(query) for query in QUERIES}
            assert [query for query, found in answers.items() if not found] == []
            assert [
                sample["value"][1]
                for sample in await ask('nextstate_stored{record="verdicts",state="1"}')
            ] == ["1"]

    both(test, store, tmp_path)


def test_the_dashboard_shows_every_number_and_explains_no_other(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        told = set(re.findall(r"(?m)^# TYPE (\S+)", await use(p)))
        shown = set(re.findall(r"nextstate_\w+", " ".join(QUERIES)))
        assert {name.removesuffix("_bucket") for name in shown} == told

    both(test, store, tmp_path)


def test_the_page_of_numbers_explains_each(store: Store, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

    async def test(engine: ScriptedEngine, p: Running) -> None:
        told = set(re.findall(r"(?m)^# TYPE (\S+)", await use(p)))
        assert set(re.findall(r"(?m)^\| `(nextstate_\w+)", page)) == told

    both(test, store, tmp_path)


@asynccontextmanager
async def prometheus(p: Running, folder: Path) -> AsyncGenerator[Any]:
    """A Prometheus that reads the proxy's numbers every second, and a function that asks it."""
    assert PROMETHEUS is not None
    target = p.url.removeprefix("http://")
    config = (ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8")
    config = config.replace("127.0.0.1:8080", target).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )

    async def ask(query: str) -> list[Any]:
        expr = query.replace("$__rate_interval", "1m")
        try:
            async with p.http.get(
                f"http://{address}/api/v1/query", params={"query": expr}
            ) as answer:
                if answer.status == 503:  # it reads its files yet
                    return []
                found = await answer.json()
        except aiohttp.ClientConnectionError:
            assert process.returncode is None, (folder / "prometheus.log").read_text()
            return []
        assert found["status"] == "success", (query, found)
        return found["data"]["result"]

    try:
        yield ask
    finally:
        process.terminate()
        await process.wait()
