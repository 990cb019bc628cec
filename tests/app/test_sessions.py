"""`nextstate sessions` and `nextstate feedback --match`: people find what they mean."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nextstate.app import finding
from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.records import Timings, TurnKind
from nextstate.store import Store
from nextstate.store.lookup import Choice
from tests.store.test_growth import fill, steps
from tests.store.test_records import add, judge, turn

DAY = 86_400.0
START = 1_800_000_000.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    replies = ("Use cron for the backup.", "Use rsync for it.", "A title", "Done.", "Use cron.")
    for number, (session, reply) in enumerate(
        zip(("a", "b\x1b[2J", "a", "a", "b\x1b[2J"), replies, strict=True)
    ):
        changes = {
            "session": session,
            "kind": TurnKind.SIDE if number == 2 else TurnKind.MAIN,
            "lineage": "main" if session == "a" else "bob",
            "reply": {"role": "assistant", "content": reply},
            "timings": Timings(START + DAY * number, 0.1, 0.2),
        }
        with store.recording() as recording:
            key = b"%016d" % number
            recording.add_turn(turn(number, **changes), key, key, client_session=f"my {session}")
    judge(store, 0, 1)
    judge(store, 3, -1)
    judge(store, 4, 1)
    store.close()
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    return file


def run(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main([*arguments, "--config", str(config)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_session_is_one_line_with_its_turns_times_lineage_and_score(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    headings, first, second = run(capsys, config, "sessions")
    assert headings.split() == [
        *("session", "turns", "first", "last", "score", "lineage", "client", "name")
    ]
    day = "2027-01-{} 08:00".format
    assert first.split() == [*f"a 3 {day(15)} {day(18)} +0.00 main my a".split()]
    assert second.split() == [*f"b 2 {day(16)} {day(19)} +1.00 bob my b".split()]


def test_sessions_as_json_and_by_lineage_time_and_number(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(*arguments: str) -> list[str]:
        rows = [json.loads(line) for line in run(capsys, config, "sessions", "--json", *arguments)]
        return [row["session"][0] for row in rows]

    first, _ = (json.loads(line) for line in run(capsys, config, "sessions", "--json"))
    assert first == {
        "session": "a",
        "client_session": "my a",
        "lineage": "main",
        "turns": 3,
        "first_at": START,
        "last_at": START + 3 * DAY,
        "mean_score": 0.0,
    }
    monkeypatch.setattr("time.time", lambda: START + 4.5 * DAY)
    assert names() == names("--limit", "0") == ["a", "b"]
    assert names("--limit", "1") == ["b"]
    assert names("--lineage", "main") == ["a"]
    assert names("--since", "20h") == ["b"]
    assert names("--since", "2d") == ["a", "b"]
    for wrong, expected in (
        (["--since", "noon"], "--since 'noon' is neither a duration"),
        (["--lineage", "carol"], "--lineage 'carol' has no turn here; known: main"),
    ):
        assert main(["sessions", *wrong, "--config", str(config)]) == 2
        assert expected in capsys.readouterr().err


def test_sessions_come_in_pages_and_by_what_does_not_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    for number in range(25):
        kind = TurnKind.SIDE if number == 3 else TurnKind.MAIN
        add(store, turn(number, session=f"s{number}", kind=kind))
    store.close()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')

    def names(*arguments: str) -> list[str]:
        return [line.split()[0] for line in run(capsys, config, "sessions", *arguments)[1:]]

    assert names() == [f"s{number}" for number in range(5, 25)]
    assert main(["sessions", "--config", str(config)]) == 0
    assert "these are 20; older ones: --before s5" in capsys.readouterr().err
    assert names("--before", "s5") == ["s0", "s1", "s2", "s3", "s4"]
    assert names("--before", "s5", "--limit", "2") == ["s3", "s4"]
    assert names("--untrained") == ["s3"]
    assert len(run(capsys, config, "sessions", "--json")) == 25
    assert main(["sessions", "--before", "nobody", "--config", str(config)]) == 2
    assert "--before 'nobody': there is no such session" in capsys.readouterr().err


def test_pages_of_some_sessions_show_each_once_where_others_of_their_turns_are_newer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    side, main_turn = TurnKind.SIDE, TurnKind.MAIN
    for number, (name, kind) in enumerate(
        [("a", side), ("b", side), ("c", side), ("a", main_turn), ("c", side), ("b", main_turn)]
    ):
        add(store, turn(number, session=name, kind=kind))
    store.close()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    shown: list[str] = []
    while len(shown) < 3:
        page = ["--untrained", "--limit", "1", *(["--before", shown[-1]] if shown else [])]
        [line] = run(capsys, config, "sessions", *page)[1:]
        shown.append(line.split()[0])
    assert shown == ["c", "b", "a"]


def test_a_name_that_clients_of_two_lineages_gave_is_asked_for_or_meant_within_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    for number, (name, lineage) in enumerate(
        [("x", "bob"), ("y", "main"), ("chat", "main"), ("chat~2", "bob"), ("z", "bob")]
    ):
        made = turn(number, session=name, index=0, lineage=lineage)
        with store.recording() as recording:
            key = b"%016d" % number
            recording.add_turn(made, key, key, client_session=f"my {name[:4]}")
    store.close()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')

    def names(*arguments: str) -> list[str]:
        return [line.split()[0] for line in run(capsys, config, "sessions", *arguments)[1:]]

    assert names("--before", "chat") == ["x", "y"]
    assert names("--before", "my chat", "--lineage", "bob") == ["x"]
    assert names("--before", "my chat", "--lineage", "main") == ["y"]
    assert names("--before", "turn_1") == ["x"]
    assert main(["sessions", "--before", "my chat", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert "--before 'my chat': several sessions have this name: chat~2, chat" in told


def test_a_search_for_sessions_that_stopped_says_so_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "LOOKED_THROUGH", 200)
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    made = [turn(n, session=f"s{n}" if n < 3 else "long", index=n) for n in range(450)]
    add(store, *made, turn(450, session="side", kind=TurnKind.SIDE), next_state=None)
    store.close()
    config = tmp_path / "nextstate.toml"
    config.write_text(f'[store]\ndir = "{tmp_path}/state"\n')

    def page(*arguments: str) -> tuple[list[str], str]:
        capsys.readouterr()
        assert main(["sessions", *arguments, "--config", str(config)]) == 0
        told = capsys.readouterr()
        return [line.split()[0] for line in told.out.splitlines()[1:]], told.err

    names, told = page()
    assert names == ["long", "side"]
    assert told == (
        "nextstate: looked through 200 turns; older sessions: --before turn_251, all: --limit 0\n"
    )
    names, told = page("--before", "turn_251")
    assert (names, "--before turn_51" in told) == ([], True), "the long one stood there already"
    assert page("--before", "turn_51") == (["s0", "s1", "s2"], "")
    assert page("--json", "--limit", "3")[1] == page()[1]
    assert page("--limit", "0") == (["s0", "s1", "s2", "long", "side"], "")
    assert page("--lineage", "bob")[1].startswith("nextstate: looked through 200 turns")


def test_a_list_of_sessions_costs_the_same_in_a_large_store(tmp_path: Path) -> None:
    found: list[int] = []
    for sessions in (20, 80):
        store = Store(StoreConfig(dir=str(tmp_path / str(sessions))))
        fill(store, sessions, ready=0)

        def look(store: Store) -> None:
            assert len(finding.newest_sessions(store, Choice(), 5).sessions) == 5

        found.append(steps(store, look))
    small, large = found
    assert large <= 1.5 * small + 300, found


def test_feedback_finds_the_turn_by_a_few_words(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = "--score=1"
    assert run(capsys, config, "feedback", "--match", "backup CRON", good) == ["turn_0: score +1"]
    assert run(capsys, config, "feedback", "--match", "question 1", good) == ["turn_1: score +1"]


def test_feedback_refuses_several_turns_and_lists_them(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(words: str) -> list[str]:
        capsys.readouterr()
        arguments = ["--match", words, "--score", "-1", "--config", str(config)]
        assert main(["feedback", *arguments]) == 2
        return capsys.readouterr().err.splitlines()

    first, *listed = refusal("use cron")
    assert first.startswith("nextstate: several main turns have the words 'use cron'; name one")
    assert [line.split()[0] for line in listed] == ["turn_4", "turn_0"]
    (line,) = refusal("title")  # a side turn is never judged
    assert "no main turn has the words 'title'" in line
    (line,) = refusal(" ")
    assert "--match ' ' has no words" in line
    store = Store(StoreConfig(dir=str(config.parent / "state")))
    assert [store.judging.feedback(f"turn_{n}") for n in (0, 4)] == [None, None]
    store.close()
    assert {row["feedback"] for row in map(json.loads, run(capsys, config, "turns", "--json"))} == {
        None
    }


def test_only_so_many_matches_are_looked_for(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    add(store, *(turn(number) for number in range(30)))
    with pytest.raises(finding.NoTurnError, match="several main turns") as found:
        finding.the_meant(store, ["question"])
    listed = str(found.value).splitlines()
    assert (len(listed), listed[1].split()[0], listed[-1]) == (10, "turn_29", "  …")
    store.close()
