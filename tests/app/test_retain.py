"""`nextstate retain` and `nextstate review`."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import closing
from pathlib import Path

import pytest

from nextstate.app import retention
from nextstate.app.cli import main
from nextstate.app.retention import Keep, read_keep
from nextstate.app.settings import Settings
from nextstate.app.status import status
from nextstate.config import StoreConfig
from nextstate.records import Feedback
from nextstate.store import Store
from tests.postgresql_server import Server
from tests.store.test_records import add, judge, turn


@pytest.fixture
def config(tmp_path: Path) -> Path:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    add(store, *(turn(n, session=f"s{n}", client="key ann") for n in range(3)), next_state=None)
    judge(store, 0, 1)
    store.close()
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    return file


def said(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main([words[0], "--config", str(config), *words[1:]]) == 0
    return capsys.readouterr().out


def opened(config: Path) -> Store:
    return Store(Settings.read(config).store)


def test_retain_shows_sets_sweeps_and_ends(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(config, capsys, "retain").startswith("kept: everything; the store has ")
    assert said(config, capsys, "retain", "--days", "30", "--size", "20GB").startswith(
        "kept: 30 days and 20480 MB; "
    )
    folder = Settings.read(config).store.path
    assert read_keep(folder) == Keep(30.0, 20 << 30)
    # turn_0 waits to train, the others are of 1970
    assert said(config, capsys, "retain", "--now").endswith("deleted 2 turns\n")
    store = opened(config)
    assert store.turns.ids() == ["turn_0"]
    store.close()
    assert said(config, capsys, "retain", "--off").startswith("kept: everything; ")


def test_the_age_of_turns_is_counted_by_the_stores_clock_not_the_machines(config: Path) -> None:
    with closing(Store(Settings.read(config).store, lambda: 100_000.0)) as store:
        assert retention.sweep(store, Keep(2.0)).turns == 0
        assert len(store.turns.ids()) == 3


@pytest.mark.parametrize("words", [("--days", "0"), ("--days", "nan"), ("--size", "5")])
def test_a_setting_that_means_nothing_is_refused(
    config: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retain", "--config", str(config), *words]) == 2
    assert "expected" in capsys.readouterr().err


def test_a_size_is_refused_where_a_server_keeps_the_room(
    tmp_path: Path, postgresql: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    file, url = tmp_path / "nextstate.toml", postgresql.database("t_retain_size")
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\nurl = "{url}"\n')
    assert main(["retain", "--config", str(file), "--size", "20GB"]) == 2
    assert "--size counts in a file only" in capsys.readouterr().err
    with closing(opened(file)) as store:
        assert read_keep(store.dir) == Keep()
        add(store, turn(0, session="s"), next_state=None)  # of 1970
        retention.sweep(store, Keep(size=1))  # as a setting from before that is still there
        assert store.turns.ids() == ["turn_0"]
    assert said(file, capsys, "retain", "--days", "30", "--now").endswith("deleted 1 turn\n")


def test_it_goes_on_by_itself_until_it_is_stopped(config: Path) -> None:
    store, stopping = opened(config), threading.Event()
    retention.write_keep(store.dir, Keep(days=30))
    swept, step = threading.Event(), store.retention.step

    def seen(*given: object) -> object:
        found = step(*given)  # pyright: ignore
        if found.position is None:
            swept.set()
        return found

    store.retention.step = seen  # pyright: ignore
    sweeper = threading.Thread(target=retention.run, args=(store, stopping, 0.01))
    sweeper.start()
    assert swept.wait(30)
    stopping.set()
    sweeper.join(30)
    assert store.turns.ids() == ["turn_0"]
    store.close()


def test_a_broken_setting_deletes_nothing_and_ends_nothing(
    config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, stopping = opened(config), threading.Event()
    (store.dir / "retention.json").write_text("{")

    class Once(threading.Event):
        looked = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.looked += 1
            return self.looked > 2

    stopping = Once()
    retention.run(store, stopping)
    assert "nextstate retain" in caplog.text
    assert len(store.turns.ids()) == 3
    store.close()


def test_review_shows_accepts_and_drops(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(config, capsys, "review") == "nothing waits for a review\n"
    store = opened(config)
    for n in range(3):
        store.reviewing.give(Feedback(f"turn_{n}", -1, None, f"bad {n}"), "key eve")
    shown = said(config, capsys, "review").splitlines()
    assert [line.split(" key eve: ")[1] for line in shown] == [
        "-1 on turn_0 (contradiction): bad 0",
        "-1 on turn_1 (foreign): bad 1",
        "-1 on turn_2 (foreign): bad 2",
    ]
    found = [json.loads(line) for line in said(config, capsys, "review", "--json").splitlines()]
    assert (found[0]["number"], found[0]["turn"], found[0]["score"]) == (1, "turn_0", -1)
    assert said(config, capsys, "review", "accept", "1") == "accepted 1 verdict\n"
    assert said(config, capsys, "review", "drop", "--key", "eve") == "dropped 2 verdicts\n"
    assert store.judging.feedback("turn_0") == Feedback("turn_0", -1, None, "bad 0")
    assert store.judging.feedback("turn_1") is None
    store.close()
    assert main(["review", "--config", str(config), "drop"]) == 2


def test_status_tells_what_waits_and_what_is_held_back(config: Path) -> None:
    store = opened(config)
    store.reviewing.give(Feedback("turn_0", -1), "key eve")
    store.close()
    found = asyncio.run(status(Settings.read(config)))
    assert found["review"] == {"key eve": 1}
    assert (found["held_back"], found["kept"]) == ({}, "everything")
