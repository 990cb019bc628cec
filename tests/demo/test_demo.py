"""The demo's own arithmetic: what counts, and when the loop has not learned."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from demo.course import toy_course
from demo.replies import Style, render, render_wrong
from demo.report import Display, Record, write_record
from demo.run import Plan, write_settings
from demo.score import Score, score_of, shortfalls
from demo.talk import Answer, Talked
from demo.tasks import Domain, held_out_tasks
from demo.world import persona_world
from nextstate.errors import StartError
from nextstate.process_lock import ProcessLock
from nextstate.store import Store
from nextstate.store.sqlite import FILE


def answers() -> list[Answer]:
    """Four of version 3 (good, wrong style, wrong content, failed) and one of another version."""
    rng = Random(1)
    good, styled, wrong, _, other = held_out_tasks(Domain.STUDENT, 5)
    asked = persona_world(Domain.STUDENT, 0).held_out
    return [
        Answer(asked[0], render(good, Style.PLAIN, rng), 3),
        Answer(asked[1], render(styled, Style.FINAL, rng), 3),
        Answer(asked[2], render_wrong(wrong, Style.PLAIN, rng), 3),
        Answer(asked[3], None, -1),
        Answer(asked[4], render(other, Style.PLAIN, rng), 2),
    ]


def test_a_reply_counts_only_if_it_satisfies_and_is_right() -> None:
    score = score_of(answers(), 3)
    assert (score.questions, score.score, score.satisfied, score.right) == (4, 0.25, 0.5, 0.5)


def test_the_margin_is_the_wilson_interval_worked_by_hand() -> None:
    # n = 100, p = 0.5: 1.96·sqrt(0.0025 + 0.00009604) / 1.038416 = 0.09617…
    assert Score(1, 100, 0.5, 0.5, 1.0).margin == pytest.approx(0.09617, abs=1e-5)


FIRST, LAST = Score(0, 256, 0.17, 0.18, 0.99), Score(12, 256, 0.9, 0.91, 0.985)


@pytest.mark.parametrize(
    ("first", "last", "failed", "expected"),
    [
        (FIRST, LAST, 0, []),
        (FIRST, Score(12, 256, 0.79, 0.8, 0.99), 0, ["below 0.80"]),
        (FIRST, Score(12, 256, 0.9, 0.95, 0.97), 0, ["97.0% of the replies"]),
        (FIRST, LAST, 1, ["1 requests failed"]),
        (FIRST, Score(11, 256, 0.9, 0.91, 0.99), 0, ["only 11 of 12 versions"]),
        (LAST, LAST, 0, ["did not rise"]),
    ],
)
def test_a_loop_that_did_not_learn_says_why(
    first: Score, last: Score, failed: int, expected: list[str]
) -> None:
    found = shortfalls(first, last, failed, updates=12)
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_the_record_is_written_as_json_and_picture(tmp_path: Path) -> None:
    record = Record(
        "combined", "student", 0, [FIRST, LAST], 9, {}, {}, False, 0, [0, 12], 0.8, ("q", "a", "b")
    )
    data, picture = write_record(record, tmp_path)
    assert json.loads(data.read_text())["scores"][1]["score"] == 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_terminal_the_progress_is_plain_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Display(12) as display:
        display.phase("talk")
        display.live(Talked(), {"turns/main": 7, "verdicts/1": 2}, 3)
        display.scored(LAST)
    printed = capsys.readouterr().out
    assert "version 12" in printed
    assert "7 turns" in printed


def plan(out: Path) -> Plan:
    return Plan(toy_course("binary", Domain.STUDENT, 0), "binary", 0, 1, out)


@pytest.mark.parametrize("name", ["out", 'o"ut', "löss #1?%2F \\n"])
def test_the_demo_replaces_its_own_state_and_nothing_else(tmp_path: Path, name: str) -> None:
    settings = write_settings(plan(tmp_path / name))
    state = settings.store.path
    assert state == tmp_path / name / "state"
    (state / "old").touch()
    kept = tmp_path / name / "thesis.txt"
    kept.touch()
    assert write_settings(plan(tmp_path / name)).store.path == state
    assert not (state / "old").exists()
    assert kept.exists()


@pytest.mark.parametrize("name", ["state/thesis.txt", "nextstate.toml", "curve.png", "curve.json"])
def test_the_demo_touches_nothing_that_it_did_not_make(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(
        StartError, match=name.split("/")[0] + ".* was not made by `nextstate demo`"
    ):
        write_settings(plan(tmp_path))
    assert file.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_the_demo_follows_no_link_to_a_state_of_another_one(tmp_path: Path) -> None:
    elsewhere = write_settings(plan(tmp_path / "elsewhere")).store.path
    out = tmp_path / "out"
    out.mkdir()
    (out / "state").symlink_to(elsewhere)
    with pytest.raises(StartError, match="was not made"):
        write_settings(plan(out))
    assert elsewhere.is_dir()


@pytest.mark.parametrize(
    "name", ["nextstate.toml", "curve.png", "curve.json", "state/.made-by-nextstate-demo"]
)
def test_the_demo_writes_and_deletes_nothing_through_a_link(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    state = write_settings(plan(out)).store.path
    (state / "thesis.txt").touch()
    linked = out / name
    mine = tmp_path / "mine"
    if linked.exists():
        linked.rename(mine)
    else:
        mine.touch()
    linked.symlink_to(mine)
    before = mine.read_bytes()
    with pytest.raises(StartError, match="was not made by `nextstate demo`"):
        write_settings(plan(out))
    assert mine.read_bytes() == before
    assert (state / "thesis.txt").exists()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    state = write_settings(plan(tmp_path / "out")).store.path
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (state / "lock").symlink_to(mine)
    with pytest.raises(StartError, match="lock is a link"):
        write_settings(plan(tmp_path / "out"))
    assert mine.read_text() == "mine"


def test_the_demo_does_not_delete_a_state_that_a_stage_of_its_own_has_open(tmp_path: Path) -> None:
    config = write_settings(plan(tmp_path)).store
    store = Store(config)
    with pytest.raises(StartError, match="is in use"):
        write_settings(plan(tmp_path))
    assert store.turns.ids() == []
    store.close()
    write_settings(plan(tmp_path))
    (config.path / FILE).write_text("no database")
    assert not (write_settings(plan(tmp_path)).store.path / FILE).exists()


def test_the_demo_does_not_delete_a_state_that_is_in_use(tmp_path: Path) -> None:
    state = write_settings(plan(tmp_path)).store.path
    with ProcessLock(state / "lock", "in use", ""), pytest.raises(StartError, match="is in use by"):
        write_settings(plan(tmp_path))
    assert state.is_dir()
