"""The page of how it runs, the pause, and the export."""

from __future__ import annotations

import asyncio
import json
import shlex
from html import unescape
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.page.running import lags
from nextstate.app.settings import Settings
from nextstate.records import Feedback
from nextstate.store import Store
from nextstate.store.examiners import Examiners
from nextstate.store.shares import OWNER
from nextstate.training_status import write_training_status
from tests.page.running_page import Site, on_site, words
from tests.store.test_records import add, judge, turn


def test_how_it_runs_shows_queues_lag_engine_and_the_judge(store: Store, tmp_path: Path) -> None:
    for number in range(12):
        add(store, turn(number, policy_version=0))
        if number < 11:
            judge(store, number, 1 if number % 2 else -1)
    for number in range(11):
        store.reviewing.give(Feedback(f"turn_{number}", 1 if number % 2 else -1), OWNER)

    async def test(site: Site) -> None:
        found = words(await site.get("/page/running"))
        for text in (
            *("Turns that wait for the judge 1", "Judged turns that are ready to train 11"),
            *("Recorded turns 12", "0 11", "State up", "For learning it lacks nothing"),
            *("rules 11 11", "1.00", "main may train.", "[learner] max_lag"),
        ):
            assert text in found, text
        store.versions.pause("main", "ann")
        assert "Training of main is paused. ann paused it." in words(
            await site.get("/page/running")
        )

    on_site(test, store, tmp_path)


def test_how_it_runs_says_who_holds_exams_and_which_version_waits_for_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "all_lineages", ("main", "other"))
    asked: set[str] = set()

    def holder(lineage: str) -> str | None:
        asked.add(lineage)
        return Examiners.holder(store.examiners, lineage)

    monkeypatch.setattr(store.examiners, "holder", holder)
    waits = "version 1 takes its exam before it serves: `program words` has not begun it"

    async def test(site: Site) -> None:
        assert "Exams" not in words(await site.get("/page/running"))
        store.examiners.hold("main", "program words")
        (store.dir / "learner" / "main").mkdir(parents=True)
        write_training_status(store.dir, "main", waits)
        found = words(await site.get("/page/running"))
        assert "Exams: program words holds them" in found
        assert f"The learner: {waits}" in found
        assert asked == {"main"}

    on_site(test, store, tmp_path)


def test_the_lag_is_counted_from_what_serves() -> None:
    assert lags({5: 2, 3: 1, 9: 4}, 5) == [(0, 6), (2, 1)]
    assert lags({}, 5) == []


def test_a_pause_is_confirmed_on_a_page_and_happens_only_then(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        page = "/page/lineages/main/pause"
        for path in ("/", "/page/versions", "/page/running"):
            assert f'href="{page}"' in await site.get(path)
        assert "takes no batch any more until" in words(await site.get(page))
        assert store.versions.decisions("main").pause is None
        assert "takes no batch any more" in await site.submit(page, page)
        pause = store.versions.decisions("main").pause
        assert pause is not None
        assert pause.by == "somebody at the web page"
        assert "It does not train already." in words(await site.get(page))

    on_site(test, store, tmp_path)


def test_the_export_shows_a_command_that_runs_as_it_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, turn(0))
    judge(store, 0, 1)
    monkeypatch.chdir(tmp_path)

    async def test(site: Site) -> None:
        page = await site.get("/page/export?what=sft")
        command = unescape(page.split("<pre")[1].split(">", 1)[1].split("</pre>")[0])
        program, *arguments = shlex.split(command)
        assert program == "nextstate"
        assert await asyncio.to_thread(main, arguments) == 0
        assert json.loads((tmp_path / "sft.jsonl").read_text())["turn"] == "turn_0"
        assert "<pre" not in await site.get("/page/export")
        for query in ("what=all", "what=sft&form=xml", "what=turns&form=parquet"):
            await site.get(f"/page/export?{query}", 400)

    on_site(test, store, tmp_path)
