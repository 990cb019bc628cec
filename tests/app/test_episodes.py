"""`nextstate episodes`, and what `nextstate status` says of environments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from rich.cells import cell_len

from judge.groups import settle_over
from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.episodes import Episode, EpisodeStatus, Reward, RewardKind
from nextstate.records import Json
from nextstate.store import Store
from tests.judge.test_groups import attempt, open_episode, take

TURN_A, TURN_B = "turn_a", "turn_b"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose store holds a settled group of two and an open episode."""
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{tmp_path}"\n')
    (tmp_path / "config.json").write_text("{}")
    with closing(Store(StoreConfig(dir=f"{tmp_path}/state"))) as store:
        attempt(store, "e-1", 1.0, (TURN_A, [1, 1, 0]), size=2)
        attempt(store, "e-2", 0.0, (TURN_B, [-1]))
        settle_over(store, 0)
        open_episode(store, "e-3", group=None, max_calls=4, metadata={"row": 1})
        take(store, "e-3", ("turn_c", None))
        store.episodes.reward(
            [Reward("e-3", "parse", RewardKind.PROCESS, -0.5, "turn_c", "parser")]
        )
    return file


def shown(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> list[str]:
    assert main([*arguments, "--config", str(config)]) == 0
    return capsys.readouterr().out.splitlines()


def rows(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> Sequence[Json]:
    return [json.loads(line) for line in shown(capsys, config, *arguments, "--json")]


def test_episodes_are_one_json_object_a_line(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, config, "episodes")
    assert [one["episode"] for one in found] == ["e-1", "e-2", "e-3"]
    assert list(found[0]) == [
        *("episode", "lineage", "environment", "task", "group", "split", "seed", "max_calls"),
        *("max_tokens", "deadline_s", "version", "sampling", "metadata", "state", "status"),
        *("outcome", "opened_at", "closed_at", "version_min", "version_max", "calls", "tokens"),
        "reason",
    ]
    assert [one["state"] for one in found] == ["settled", "settled", "open"]
    of_group = rows(capsys, config, "episodes", "--group", "g")
    assert of_group == found[:2]
    assert rows(capsys, config, "episodes", "--limit", "1") == found[2:]
    assert rows(capsys, config, "episodes", "--group", "h") == []


def test_a_line_says_what_an_episode_tried_and_how_it_ended(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(capsys, config, "episodes") == [
        "e-1  shell  settled 1  0 calls  v0  find the file",
        "e-2  shell  settled 0  0 calls  v0  find the file",
        "e-3  shell  open  0 calls  v0  find the file",
    ]


def test_a_line_is_as_wide_as_the_terminal_and_never_cuts_an_id(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "e" * 100
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        task = "\x1b[2Jlook\n" * 100
        for name in ("f-1", long):
            store.episodes.open([Episode(name, "main", "s" * 100, task, version=3)], None)
        store.episodes.close("f-1", EpisodeStatus.FAILED, None, None)
    *_, one, other = shown(capsys, config, "episodes")
    assert (cell_len(one), "dropped" in one, "✗" in one) == (80, True, True)
    assert other.startswith(f"{long}  sss")
    assert one.isprintable()
    assert other.isprintable()


def test_filters_and_pages_choose_episodes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen, expected in (
        (["--outcome", "solved"], ["e-1"]),
        (["--outcome", "failed"], ["e-2"]),
        (["--outcome", "none"], ["e-3"]),
        (["--environment", "shell"], ["e-1", "e-2", "e-3"]),
        (["--environment", "other"], []),
        (["--lineage", "main", "--group", "g"], ["e-1", "e-2"]),
        (["--since", "1h"], ["e-1", "e-2", "e-3"]),
        (["--since", "2999-01-01"], []),
        (["--before", "e-3"], ["e-1", "e-2"]),
        (["--before", "e-1"], []),
        (["--before", "e-3", "--limit", "1"], ["e-2"]),
    ):
        for limit in ([], ["--limit", "0"]):
            found = rows(capsys, config, "episodes", *limit, *chosen)
            assert [one["episode"] for one in found] == expected, chosen
    assert main(["episodes", "--limit", "2", "--config", str(config)]) == 0
    assert "older ones: --before e-2" in capsys.readouterr().err
    assert main(["episodes", "--before", "e-2", "--config", str(config)]) == 0
    assert capsys.readouterr().err == ""
    for wrong, said in (
        (["--before", "e-9"], "there is no episode 'e-9'"),
        (["--since", "noon"], "--since 'noon' is neither a duration"),
        (["--lineage", "carol"], "there is no lineage 'carol'; known: main"),
    ):
        assert main(["episodes", *wrong, "--config", str(config)]) == 2
        assert said in capsys.readouterr().err


def test_one_episode_shows_what_each_step_is_worth(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = rows(capsys, config, "episodes", "e-1")
    (step,) = found["steps"]
    assert step == {
        "step": 0, "turn": TURN_A, "kind": "main", "version": 0, "next_state": ["no such file"],
        "votes": [1, 1, 0], "score": 1, "state": "ready", "advantage": 1.5, "reason": None,
    }  # fmt: skip
    card = shown(capsys, config, "episodes", "e-1")
    assert f"    0  {TURN_A}  +1  ready, advantage +1.50  no such file" in card
    card = shown(capsys, config, "episodes", "e-3")
    assert "reward       process parse = -0.5 of turn_c by parser" in card
    assert "max_calls    4" in card
    assert "    0  turn_c   ·  not judged yet  no such file" in card


def test_an_unknown_episode_is_one_line_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["episodes", "e-9", "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "nextstate: there is no episode 'e-9': see `nextstate episodes`"


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["episodes", "--help"])
    assert "  nextstate episodes --limit 20 " in capsys.readouterr().out


def test_status_counts_episodes_and_says_whether_the_judge_predicts_outcomes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = rows(capsys, config, "status")
    assert found["environments"] == {
        "main/shell": {"episodes": 2, "solved": 1, "judge_auc": 1.0, "process_weight": 1.0}
    }
    counts = {key: n for key, n in found["counts"].items() if key.startswith(("ep", "gr", "rew"))}
    assert counts == {
        "episodes/open": 1, "episodes/settled": 2, "groups/settled": 1, "rewards/process": 1,
    }  # fmt: skip
    lines = [line for line in shown(capsys, config, "status") if line.startswith("environments")]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        "1 of the last 2 solved; the judge predicts outcomes with AUC 1.00"
    ]


def test_a_judge_that_guesses_is_shown_as_ignored(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store(StoreConfig(dir=f"{config.parent}/state"))) as store:
        for number in range(20):
            names = f"a-{number}", f"b-{number}"
            right = 1 if number % 3 == 0 else -1
            for name, outcome, vote in zip(names, (1.0, 0.0), (right, -right), strict=True):
                open_episode(store, name, 2, group=f"group-{number}")
                take(store, name, (f"{name}/0", [vote]))
                store.episodes.close(name, EpisodeStatus.DONE, outcome, None)
            settle_over(store, 0)
        # With λ = 1 it would be 1 - 0.5.
        assert store.groups.advantages("a-19")["a-19/0"] == ("ready", 1.0, None)
    (line,) = [line for line in shown(capsys, config, "status") if line.startswith("environments")]
    assert line.endswith("AUC 0.38, too little: it is ignored")
