"""`nextstate forget`: a person sees what goes and confirms; nothing that learned from it serves."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from learner.folders import version_path
from nextstate.app.cli import main
from nextstate.app.forgetting import UNDER_WAY
from nextstate.config import StoreConfig
from nextstate.episodes import Episode
from nextstate.process_lock import ProcessLock
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.store.test_forgetting import judge, record, said


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Two conversations; version 2 trained on the second one, and version 3 follows it."""
    opened = Store(StoreConfig(dir=str(tmp_path / "state")))
    first = said(0, None)
    second = said(1, first)
    other = said(2, None)
    record(opened, first, second, other, said(3, other))
    judge(opened, first.id, second)
    for number in (1, 2, 3):
        path = version_path(opened.dir, "main", number)
        path.mkdir(parents=True)
        batch = None
        if number == 2:
            opened.training.hold_out("main", lambda _: False)
            opened.training.lease_samples("main", 1, "b", scored=True, hinted=True)
            batch = "b"
        state = VersionState.CANDIDATE
        opened.versions.add(
            PolicyVersion("main", number, number - 1, str(path), "ff", 1, state), batch
        )
        assert opened.versions.set_serving("main", number)
    (opened.dir / "learner" / "main").mkdir(parents=True)
    (opened.dir / "learner" / "main" / "checkpoint.pt").touch()
    yield opened
    opened.close()


@pytest.fixture
def config(store: Store, tmp_path: Path) -> Path:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{store.dir}"\n')
    return file


def test_a_dry_run_says_what_would_go_and_changes_nothing(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", "turn_1", "--dry-run", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "1 turn to forget" in shown
    assert "ask<1>" in shown
    assert "1 turn before them" in shown
    assert "versions 2, 3 of main trained on them" in shown
    assert store.turns.get("turn_1") is not None
    assert store.versions.serving("main").number == 3


def test_a_text_to_forget_comes_from_standard_input_so_that_no_argument_holds_it(
    store: Store, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ASK<1>\n"))
    assert main(["forget", "--matching", "-", "--yes", "--config", str(config)]) == 0
    assert store.turns.ids() == ["turn_2", "turn_3"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["forget", "--matching", "-", "--config", str(config)]) == 2
    assert "--matching '-' is empty" in capsys.readouterr().err


def test_what_learned_from_it_is_withdrawn_and_its_files_go(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forget", "--session", "s0", "--yes", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "forgot 2 turns" in shown
    assert "withdrew versions 2, 3 of main; version 1 serves" in shown
    assert store.turns.ids() == ["turn_2", "turn_3"]
    assert store.versions.serving("main").number == 1
    assert version_path(store.dir, "main", 1).exists()
    assert not version_path(store.dir, "main", 2).exists()
    assert not version_path(store.dir, "main", 3).exists()
    assert not (store.dir / "learner" / "main" / "checkpoint.pt").exists()
    assert main(["rollback", "2", "--config", str(config)]) == 2
    assert "trained on turns that a person let us forget" in capsys.readouterr().err


def test_pictures_and_log_lines_of_an_episode_go_with_it(store: Store, config: Path) -> None:
    """A line about an episode that failed quotes the program or the server that failed."""
    store.episodes.open([Episode("e1", "main", "command", "my locker opens with 4711")], None)
    picture = store.dir / "pictures" / "e1" / "0.jpg"
    logs = [store.dir / "logs" / name for name in ("rollout.log", "rollout.log.1", "judge.log")]
    for file in (picture, *logs):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("failed: locker: command not found: 4711")
    with logs[0].open("ab") as held:  # by the rollout, which goes on
        assert main(["forget", "--matching", "Locker", "--yes", "--config", str(config)]) == 0
        held.write(b"later")
    assert not picture.exists()
    assert [file.read_text()[:6] for file in logs] == ["later", "", "failed"]


def test_a_withdrawn_versions_folder_is_found_whatever_learner_made_it(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a store on a server the learner's epoch is in the folder's name."""
    assert main(["forget", "--session", "s0", "--yes", "--config", str(config)]) == 0
    left = version_path(store.dir, "main", 2, epoch=8)
    left.mkdir(parents=True)
    assert main(["verify", "--config", str(config)]) == 2
    assert f"was withdrawn, and its folder {left} is there" in capsys.readouterr().out


def test_a_judge_that_trained_on_it_goes_with_those_after_it(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, parent, turns in ((1, None, ["other"]), (2, 1, ["turn_0"]), (3, 2, [])):
        folder = store.dir / "judge" / f"v{number:06d}"
        folder.mkdir(parents=True)
        card = {"number": number, "parent": parent, "turns": turns}
        (folder / "card.json").write_text(json.dumps(card))
    assert main(["forget", "turn_0", "--yes", "--config", str(config)]) == 0
    assert "deleted the trained judge v000002" in capsys.readouterr().out
    assert sorted(path.name for path in (store.dir / "judge").glob("v*")) == ["v000001"]


def test_a_judge_whose_card_cannot_be_read_goes_with_those_after_it(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, card in ((1, '{"number": 1, "parent": null}'), (2, None), (3, '{"parent": 2}')):
        folder = store.dir / "judge" / f"v{number:06d}"
        folder.mkdir(parents=True)
        if card is not None:
            (folder / "card.json").write_text(card)
    (store.dir / "judge" / "v000004").mkdir()
    (store.dir / "judge" / "v000004" / "card.json").write_text("{")
    (store.dir / "judge" / "v1 by hand").mkdir()
    assert main(["forget", "turn_0", "--yes", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    for number in (2, 3, 4):
        assert f"deleted the trained judge v{number:06d}" in told
    left = sorted(path.name for path in (store.dir / "judge").glob("v*"))
    assert left == ["v000001", "v1 by hand"]


def test_a_forgetting_that_was_cut_off_leaves_no_judge_that_others_were_trained_from(
    store: Store, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = '{"number": 1, "turns": ["turn_0"]}', '{"number": 2, "parent": 1}'
    for number, card in enumerate(cards, 1):
        folder = store.dir / "judge" / f"v{number:06d}"
        folder.mkdir(parents=True)
        (folder / "card.json").write_text(card)
    judges = store.dir / "judge"
    deleted: list[str] = []

    def one_only(folder: Path, **_: object) -> None:
        if judges in Path(folder).parents:
            if deleted:
                raise OSError("cut off")
            deleted.append(Path(folder).name)
        remove(folder, ignore_errors=True)

    remove = shutil.rmtree
    with monkeypatch.context() as patch, suppress(OSError):
        patch.setattr(shutil, "rmtree", one_only)
        main(["forget", "turn_0", "--yes", "--config", str(config)])
    assert deleted == ["v000002"]
    assert main(["forget", "turn_0", "--yes", "--config", str(config)]) == 0
    assert list(judges.glob("v*")) == []


def test_nothing_is_forgotten_while_a_judge_is_being_trained(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.dir / "judge").mkdir()
    with ProcessLock(store.dir / "judge" / "lock", "it is trained", ""):
        assert main(["forget", "turn_0", "--yes", "--config", str(config)]) != 0
    assert "a judge is being trained" in capsys.readouterr().err
    assert store.turns.get("turn_0") is not None
    assert store.versions.serving("main").number == 3


@pytest.mark.parametrize(
    ("killed_at", "problem"),
    [
        ("app.forgetting._delete_files", "version 2 of main was withdrawn, and its folder"),
        ("app.forgetting._delete_judges", ""),
        ("store.Store.compact", "`nextstate forget` was interrupted: run it again"),
    ],
)
def test_killed_in_between_the_same_command_goes_on(
    store: Store,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    killed_at: str,
    problem: str,
) -> None:
    folder = store.dir / "judge" / "v000001"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps({"number": 1, "turns": ["turn_0"]}))
    command = ["forget", "turn_0", "--yes", "--config", str(config)]

    def ends(*_: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"nextstate.{killed_at}", ends)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    at_the_end = killed_at == "store.Store.compact"
    assert (store.dir / UNDER_WAY).exists() == at_the_end
    assert main(["verify", "--config", str(config)]) == 2
    assert problem in capsys.readouterr().out
    compacted: list[bool] = []
    compact = Store.compact

    def compacts(own: Store) -> None:
        compacted.append(True)
        compact(own)

    monkeypatch.setattr(Store, "compact", compacts)
    assert main(command) == 0
    told = capsys.readouterr().out
    assert ("was interrupted: the database was written anew" in told) == at_the_end
    assert compacted == [True]
    assert not (store.dir / UNDER_WAY).exists()
    assert store.turns.ids() == ["turn_2", "turn_3"]
    assert not folder.exists()
    for number in (2, 3):
        assert not version_path(store.dir, "main", number).exists()
    assert not (store.dir / "learner" / "main" / "checkpoint.pt").exists()


def test_a_turn_that_retention_took_is_known_by_what_learned_from_it(
    store: Store,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nextstate.store.retention.KEPT_JUDGED", 0)
    assert store.retention.step(0, 1e12, "age").turns
    assert main(["forget", "--matching", "ask<1>", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "version 2 of main learned from turns that `nextstate retain` took" in shown
    assert "nothing is forgotten" in shown
    assert main(["forget", "turn_0", "--yes", "--config", str(config)]) == 0
    assert "withdrew versions 2, 3 of main; version 1 serves" in capsys.readouterr().out
    assert not version_path(store.dir, "main", 2).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what shall be forgotten"),
        (["turn_1", "--session", "s0"], "name what shall be forgotten"),
        (["turn_9"], "there is no turn 'turn_9'"),
        (["--before", "soon"], "--before 'soon' is neither a duration"),
        (["--matching", "  "], "--matching '  ' is empty"),
        (["turn_1"], "confirm it with --yes"),
    ],
)
def test_what_is_not_clear_or_not_confirmed_is_refused(
    store: Store,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["forget", *arguments, "--config", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert len(store.turns.ids()) == 4


def test_a_text_comes_from_the_standard_input_where_nobody_sees_it(
    store: Store,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ask<3>\n"))
    assert main(["forget", "--matching", "-", "--yes", "--config", str(config)]) == 0
    assert "forgot 2 turns" in capsys.readouterr().out
    assert store.turns.ids() == ["turn_0", "turn_1"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["forget", "--matching", "-", "--yes", "--config", str(config)]) == 2
    assert "is empty: expected a text" in capsys.readouterr().err


def test_a_store_from_before_a_copy_is_told(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = f"sqlite:///{config.parent}/copy.sqlite3"
    assert main(["store", "copy", copy, "--config", str(config)]) == 0
    assert main(["forget", "turn_3", "--yes", "--config", str(config)]) == 0
    assert "is another store" not in capsys.readouterr().out
    config.write_text(f'{config.read_text()}url = "{copy}"\n')
    assert main(["forget", "turn_2", "--yes", "--config", str(config)]) == 0
    told = f"{store.dir}/nextstate.sqlite3 is another store, from before [store] url was set"
    assert told in capsys.readouterr().out


def test_what_is_not_there_is_no_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", "--matching", "never said", "--config", str(config)]) == 0
    assert "nothing is forgotten" in capsys.readouterr().out


def test_it_waits_for_no_update_that_uses_it(
    store: Store, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = said(3, said(2, None))
    judge(store, "turn_2", other)
    store.training.hold_out("main", lambda _: False)
    store.training.lease_samples("main", 1, "now", scored=True, hinted=True)
    assert main(["forget", "turn_2", "--yes", "--config", str(config)]) == 2
    assert "an update uses 1 of these turns" in capsys.readouterr().err
    assert store.turns.get("turn_2") is not None
