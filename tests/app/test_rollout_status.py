"""What `status` says of the endless run and of exams."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from judge.groups import settle_over
from nextstate.app.cli import main
from nextstate.app.exam_views import NO_HOLDER, exam_text
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.episodes import Episode, EpisodeStatus, Split
from nextstate.exams import FAILED, MISSED, Exam
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from rollout.attempt import Attempt
from rollout.progress import Progress, read_progress
from rollout.tasks import Task

DOCUMENT = Path(__file__).parents[2] / "docs" / "environments.md"
TASK = Task("t", Split.TRAIN, {})


def made(metrics: dict[str, float]) -> PolicyVersion:
    return PolicyVersion("main", 3, 2, "/a", "ff", 1, VersionState.CANDIDATE, metrics)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": 1.0}, ""),
        (
            Exam(4, 4, 3, 2, 0).metrics(),
            "version 3: it solves 3 and its parent 1 of 4 held-out tasks",
        ),
        (
            Exam(9, 9, 0, 0, 9).metrics() | {FAILED: 1.0},
            "version 3 failed: it solves 0 and its parent 9 of 9 held-out tasks",
        ),
        (
            {MISSED: 1.0},
            "version 3 serves without its whole exam: it solves 0 and its parent 0 of 0 held-out "
            "tasks (0 are planned); did `nextstate rollout` run?",
        ),
    ],
)
def test_an_exam_is_told_in_words(metrics: dict[str, float], expected: str) -> None:
    assert exam_text(made(metrics)) == expected


def test_status_tells_the_run_and_the_last_exam(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nextstate.toml"
    text = f'[store]\ndir = "{store.dir}"\n[proxy]\nport = 1\n'
    config.write_text(f'{text}[rollout]\nenvironment = "tools"\n')
    progress = Progress("tools", 0.0)
    for outcome, status in ((1.0, EpisodeStatus.DONE), (None, EpisodeStatus.FAILED)):
        progress.ended(Attempt("e", TASK, status, outcome, model_s=1.0), exam=False)
    progress.ended(Attempt("e", TASK, EpisodeStatus.DONE, 1.0), exam=True)
    (store.dir / "rollout").mkdir()
    progress.write(store.dir / "rollout")
    store.versions.add(made(Exam(4, 4, 3, 2, 0).metrics()), None)
    assert main(["status", "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rollout"] == read_progress(store.dir / "rollout")
    assert found["exams"] == {"main": "version 3: it solves 3 and its parent 1 of 4 held-out tasks"}
    assert main(["status", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("rollout"))
    assert "tools: 2 episodes, 1 solved, 1 failed, 1 of exams, 0 playing; " in line
    config.write_text(text)
    assert main(["status", "--config", str(config)]) == 0
    assert "none: see [rollout]" in capsys.readouterr().out


def test_status_tells_who_holds_exams_and_where_nobody_does(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "nextstate.toml"
    config.write_text(
        f'[store]\ndir = "{store.dir}"\n[proxy]\nport = 1\n[lineages.other]\nmodel = "o"\n'
    )

    def told() -> dict[str, str]:
        assert main(["status", "--config", str(config), "--json"]) == 0
        return json.loads(capsys.readouterr().out)["exams"]

    assert told() == {}
    store.episodes.open([Episode("e-1", "other", "shell", "t")], None)
    store.episodes.close("e-1", EpisodeStatus.DONE, 1.0, None)
    assert settle_over(store, 0.0) == 1
    assert told() == {"other": NO_HOLDER}
    store.examiners.hold("other", "nextstate rollout --run night")
    assert told() == {"other": "nextstate rollout --run night holds them"}
    other = replace(made(Exam(4, 4, 3, 2, 0).metrics()), lineage="other")
    store.versions.add(other, None)
    assert told()["other"].startswith("version 3: it solves 3 and its parent 1 of 4")


def test_the_section_of_the_document_is_valid(tmp_path: Path) -> None:
    (section,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    (tmp_path / "nextstate.toml").write_text(f'{section}[store]\ndir = "{tmp_path}/state"\n')
    assert Settings.read(tmp_path / "nextstate.toml").rollout.environment == "terminal"
    stages = Stack(Settings.read(tmp_path / "nextstate.toml")).children
    assert [*stages][:4] == ["rollout", "proxy", "judge", "learner"]


def test_without_an_environment_the_stage_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nextstate.toml").write_text("")
    assert main(["rollout", "--config", str(tmp_path / "nextstate.toml")]) == 2
    assert "[rollout] environment is empty: name one there" in capsys.readouterr().err
