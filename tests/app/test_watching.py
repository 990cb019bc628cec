"""What `status` and `versions N` say of the watch, in words and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.app.watching import serving_watch, version_watch, watch_text
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.store.test_records import add, judge, turn


def say(store: Store, number: int, session: str, version: int, *scores: int) -> int:
    """Judges turns of one session that a version served; returns the next turn's number."""
    for score in scores:
        add(store, turn(number, session=session, policy_version=version))
        judge(store, number, score)
        number += 1
    return number


def make(store: Store, number: int) -> PolicyVersion:
    made = PolicyVersion("main", number, number - 1, "/a", "ff", 1, VersionState.CANDIDATE)
    store.versions.add(made, None)
    assert store.versions.serve_candidate(made)
    return made


def test_before_there_is_a_second_version_nothing_is_compared(store: Store) -> None:
    assert serving_watch(store, "main") is None
    assert watch_text(None) == "nothing to compare: no version before it"


def test_it_says_what_was_seen_what_could_be_seen_and_what_would_happen(store: Store) -> None:
    at = say(store, 0, "long", 0, *[1, 1, 1, 0] * 10)
    make(store, 1)
    at = say(store, at, "long", 1, *[1, 0] * 10)
    say(store, at, "new", 1, 1, 1)
    found = serving_watch(store, "main")
    assert found is not None
    assert (found["since"], found["before"]) == (1, 0)
    assert (found["turns"], found["comparable"], found["change"]) == (22, 20, -0.25)
    said = watch_text(found)
    assert said == (
        f"since version 1: 22 judged turns, 20 of them in sessions that earlier versions served "
        f"too; in these the score changed by -0.25 ± {found['error']:.2f}; by now a fall by "
        f"{found['visible']:.2f} would be found in 4 of 5 cases; a clear fall in the same sessions "
        "puts version 0 back into service"
    )


def test_without_a_common_session_it_says_that_nobody_can_tell(store: Store) -> None:
    at = 0
    for number in range(10):
        at = say(store, at, f"old{number}", 0, 1, 1, 1, number % 2)
    first = make(store, 1)
    for number in range(10):
        at = say(store, at, f"new{number}", 1, -1, -1, -1, number % 2)
    found = version_watch(store, first)
    said = watch_text(found)
    assert "20" not in said.split(":")[0]
    assert "40 judged turns, none in a session that an earlier version served too" in said
    assert (
        "In other sessions the score went from 0.88 to -0.62: harder questions or a worse version, "
        "which nobody can tell apart; `nextstate rollback 0` shows which" in said
    )


def test_a_version_that_left_the_chain_is_compared_with_its_own_ancestors(store: Store) -> None:
    at = say(store, 0, "s", 0, 1, 1)
    make(store, 1)
    at = say(store, at, "s", 1, 1, 1)
    second = make(store, 2)
    say(store, at, "s", 2, -1, -1)
    store.versions.set_serving("main", 1)
    found = version_watch(store, second)
    assert found is not None
    assert (found["since"], found["before"], found["comparable"]) == (2, 1, 2)


def test_status_and_versions_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{tmp_path}"\n')
    (tmp_path / "config.json").write_text("{}")
    store = Store(Settings.read(file).store)
    at = say(store, 0, "s", 0, 1, 1)
    make(store, 1)
    say(store, at, "s", 1, 1, 1)
    store.close()
    assert main(["status", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["watch"]["main"]["comparable"] == 2
    assert main(["status", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert any(
        line.startswith("watch/main") and "since version 1" in line for line in shown.splitlines()
    )
    assert main(["versions", "1", "--config", str(file)]) == 0
    assert "\nwatch    since version 1" in capsys.readouterr().out
    assert main(["versions", "1", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["watch"]["before"] == 0
    file.write_text(file.read_text() + "[learner]\nwatch = false\n")
    assert main(["status", "--json", "--config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["watch"] == {}
