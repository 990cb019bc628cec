"""What the next update waits for: the same sentence on the page, on the screen and in `status`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from nextstate.app.live import Watcher
from nextstate.app.page.home import home
from nextstate.app.settings import Settings
from nextstate.app.status import status, status_lines
from nextstate.app.waiting import waits
from nextstate.store import Store
from tests.store.test_shares import clients, ready_of

NOON = datetime(2026, 11, 30, 12, 0)
Made = Callable[..., tuple[Settings, Store]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Settings with such lines under [learner], and their store."""

    def make(learner: str = "") -> tuple[Settings, Store]:
        file = tmp_path / "nextstate.toml"
        file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[learner]\n{learner}')
        settings = Settings.read(file)
        return settings, Store(settings.store)

    return make


def said(made: Made, learner: str = "", *given: tuple[str, int], at: datetime = NOON) -> str:
    """What `waits` says of so many ready samples of each client."""
    settings, store = made(learner)
    for client, count in given:
        ready_of(store, client, count, client)
    found = waits(settings, store, "main", store.counts(), at)
    store.close()
    return found


def test_without_max_wait_s_an_update_waits_for_all_its_turns(made: Made) -> None:
    assert said(made, "", ("", 3)) == "3 judged turns are ready; an update takes 16."


def test_with_max_wait_s_an_update_begins_with_fewer_turns(made: Made) -> None:
    assert said(made, "max_wait_s = 60.0", ("", 1)) == (
        "1 judged turn is ready; an update takes 16, or those that are ready 60 s after the first."
    )


def test_outside_its_window_it_says_when_an_update_may_begin(made: Made) -> None:
    night = 'schedule = "22:00-07:00"\nbatch_size = 2'
    assert said(made, night, ("", 2)) == (
        "2 judged turns are ready; an update takes 2. None begins before 22:00 "
        '([learner] schedule = "22:00-07:00").'
    )
    assert "22:00" not in said(made, night, at=NOON.replace(hour=23))


def test_with_the_schedule_idle_it_says_that_agents_go_first(made: Made) -> None:
    assert said(made, 'schedule = "idle"').endswith(
        'While the engine serves, each pass waits up to 60 s ([learner] schedule = "idle").'
    )


def test_what_the_shares_hold_back_is_said_and_when_an_update_begins(made: Made) -> None:
    assert said(made, "", ("key eve", 90), ("", 4)) == (
        "94 judged turns are ready; an update takes 16. The shares let 5 of them train now. An "
        "update begins with these after 60 min."
    )


def test_an_update_under_way_and_a_client_that_waits_for_others_are_said(made: Made) -> None:
    settings, store = made()
    ready_of(store, "key eve", 90, "e")
    ready_of(store, "", 3, "o")
    assert clients(store, 16, "b1") == {"": 3, "key eve": 1}
    found = waits(settings, store, "main", store.counts(), NOON)
    assert found == (
        "89 judged turns are ready; an update takes 16. The shares let none of them train before "
        "others give some, or for a day."
    )
    ready_of(store, "", 16, "o")
    assert len(store.training.lease_samples("main", 16, "b2", scored=True, hinted=True)) == 16
    found = waits(settings, store, "main", store.counts(), NOON)
    assert found.startswith("An update with 16 turns is under way. 89 judged turns are ready")
    store.close()


def test_the_page_the_screen_and_status_say_the_same(made: Made) -> None:
    settings, store = made("max_wait_s = 30.0")
    ready_of(store, "", 2)
    expected = waits(settings, store, "main", store.counts())
    found = asyncio.run(status(settings))
    assert found["waits"] == {"main": expected}
    assert f"waits/main                   {expected}" in status_lines(found)
    assert home(settings, store, {"engine": "up"}, "main")["waits"] == expected
    (lineage,) = Watcher(settings, store).look({}, {"engine": "up"}).lineages
    assert lineage.waits == expected
    store.versions.pause("main", "a person")
    found = asyncio.run(status(settings))
    assert found["waits"] == {}
    assert found["training"]["main"].startswith("paused by a person")
    assert home(settings, store, {"engine": "up"}, "main")["waits"] == "a person paused it."
    store.close()
