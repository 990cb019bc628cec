"""What `status` and `versions N` say of the watch, in words and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.app.watching import serving_watch, version_watch, watch_text
from nextstate.records import Json, PolicyVersion, VersionState
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
        f"too; in these the score changed by -0.25 ± {found['error']:.2f}; the first look is at 24 "
        "judged turns: a clear fall in the same sessions puts version 0 back into service"
    )


def fallen(store: Store, *later: int) -> Json:
    """What is seen after 40 praised turns of one session and these later ones."""
    at = say(store, 0, "long", 0, *[1, 1, 1, 0] * 10)
    make(store, 1)
    say(store, at, "long", 1, *later)
    found = serving_watch(store, "main")
    assert found is not None
    return found


def test_nothing_is_promised_before_the_first_look(store: Store) -> None:
    """23 turns are all bad, and yet no test has been made."""
    found = fallen(store, *[-1] * 23)
    assert (found["look"], found["visible"], found["next_look"]) == (None, None, 24)
    assert "would have found" not in watch_text(found)


def test_the_power_is_that_of_the_last_look_at_its_own_level_and_reference(store: Store) -> None:
    found = fallen(store, *[1, 0] * 20)
    assert (found["look"], found["reference"], found["next_look"]) == (24, 640, 50)
    assert found["level"] == pytest.approx(0.001 * 0.05 * 0.8)
    assert watch_text(found).endswith(
        f"the look at 24 judged turns would have found a fall by {found['visible']:.2f} in 4 of 5 "
        "cases; the next is at 50: such a fall in the same sessions, or a smaller one that "
        "lasts, puts version 0 back into service"
    )


def test_a_look_that_can_compare_little_says_so(store: Store) -> None:
    at = say(store, 0, "long", 0, 1, -1)
    make(store, 1)
    say(store, say(store, at, "long", 1, 1), "new", 1, *[1] * 30)
    said = watch_text(serving_watch(store, "main"))
    assert "the look at 24 judged turns could not have found any fall; the next is at 50" in said


def test_what_a_person_has_accepted_is_not_said_to_go(store: Store) -> None:
    fallen(store, *[-1] * 30)
    store.versions.set_serving("main", 1)
    said = watch_text(serving_watch(store, "main"))
    assert "back into service" not in said
    assert said.endswith(
        "the watch does not withdraw it: a person has chosen a version, or resumed training, since "
        "it was made"
    )
    (first,) = store.versions.all("main")
    assert watch_text(version_watch(store, first, on=True)) == said


def test_a_suspect_is_shown_before_what_a_person_has_accepted(store: Store) -> None:
    fallen(store, *[1] * 60)
    store.versions.set_serving("main", 1)
    make(store, 2)
    say(store, 200, "long", 2, 1, 1)
    found = serving_watch(store, "main")
    assert found is not None
    assert (found["since"], found["why_not"]) == (2, None)


def test_a_watch_that_is_off_promises_nothing(store: Store) -> None:
    fallen(store, *[-1] * 30)
    (first,) = store.versions.all("main")
    said = watch_text(version_watch(store, first, on=False))
    assert said.endswith("the watch does not withdraw it: [learner] watch = false")


def test_after_the_last_look_nothing_more_is_promised(store: Store) -> None:
    fallen(store, *[1] * 300)
    (first,) = store.versions.all("main")
    said = watch_text(version_watch(store, first, on=True))
    assert said.endswith(
        "it was the last, so now only a fall that later versions show too puts version 0 back into "
        "service"
    )
    say(store, 400, "long", 1, *[1] * 101)
    said = watch_text(version_watch(store, first, on=True))
    assert said.endswith(
        "the watch does not withdraw it: it has passed all looks, the last at 300 turns"
    )


def test_the_version_that_would_serve_is_one_whose_adapter_is_kept(store: Store) -> None:
    at = say(store, 0, "s", 0, 1, 1)
    for number in (1, 2, 3):
        make(store, number)
        at = say(store, at, "s", number, *[1] * 30)
    assert store.versions.forget_adapter("main", 2)
    found = version_watch(store, store.versions.serving("main"), on=True)
    assert found is not None
    assert (found["since"], found["before"]) == (3, 1)
    assert "puts version 1 back into service" in watch_text(found)
    assert store.versions.forget_adapter("main", 1)
    assert "puts version 0 back" in watch_text(serving_watch(store, "main"))


def test_without_a_common_session_it_says_that_nobody_can_tell(store: Store) -> None:
    at = 0
    for number in range(10):
        at = say(store, at, f"old{number}", 0, 1, 1, 1, number % 2)
    first = make(store, 1)
    for number in range(10):
        at = say(store, at, f"new{number}", 1, -1, -1, -1, number % 2)
    found = version_watch(store, first, on=True)
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
    found = version_watch(store, second, on=True)
    assert found is not None
    assert (found["since"], found["before"], found["comparable"]) == (2, 1, 2)
    assert watch_text(found).endswith(
        "the watch does not withdraw it: neither it nor a version trained from it serves"
    )


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
    assert main(["versions", "1", "--config", str(file)]) == 0
    assert "does not withdraw it: [learner] watch = false" in capsys.readouterr().out
