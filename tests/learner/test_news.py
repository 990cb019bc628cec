"""A learner without work asks a store on a server one thing, and looks when that has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.news import News
from nextstate.config import StoreConfig
from nextstate.store import Store
from tests.store.test_records import add, judge, turn

DATABASES = True
"""Each test runs on both."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StoreConfig(dir=str(tmp_path / "state")))


def test_a_look_is_due_when_something_has_changed_or_after_half_a_minute(
    store: Store, database: str
) -> None:
    now = [0.0]
    news, on_server = News(store, lambda: now[0]), database == "postgresql"
    assert not news.none()
    assert news.none() == on_server
    add(store, turn(0))
    judge(store, 0, 1)
    assert not news.none()
    assert news.none() == on_server
    now[0] = 31.0
    assert not news.none()
    assert news.none() == on_server
    news.forget()
    assert not news.none()
    store.close()
