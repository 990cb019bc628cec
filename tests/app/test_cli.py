"""The command line without an engine: what it prints, and how it fails."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nextstate.app import stages
from nextstate.app.cli import main
from nextstate.app.engine_access import engine_file, zero_adapter
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.stages import wait_for_engine
from nextstate.config import StoreConfig
from nextstate.errors import EXIT_LATER, EXIT_USAGE, FencedError, StartError, TakenError
from nextstate.records import Feedback, Json, PolicyVersion, TurnKind, VersionState
from nextstate.store import Store
from nextstate.store.shares import OWNER
from tests.store.test_records import add, judge, turn


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose store holds two turns and a version."""
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{tmp_path}"\n')
    (tmp_path / "config.json").write_text("{}")
    store = Store(StoreConfig(dir=f"{tmp_path}/state"))
    add(store, turn(0), turn(1))
    judge(store, 0, -1, hint="Be brief.")
    store.versions.add(PolicyVersion("main", 1, 0, "/a", "ff", 16, VersionState.CANDIDATE), None)
    store.close()
    return file


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_turns_are_one_json_object_a_line_with_the_documented_keys(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["turns", "--json", "--config", str(config)]) == 0
    first, second = (json.loads(line) for line in lines(capsys))
    assert list(first) == [
        *("turn", "session", "index", "episode", "step", "kind", "lineage", "version"),
        *("engine", "trainable", "reason", "next_state", "verdict", "feedback"),
    ]
    assert first["verdict"] == {"score": -1, "votes": [-1], "hint": "Be brief.", "judge": "rules"}
    assert first["next_state"] == [{"source": "user", "text": "thanks"}]
    assert second["verdict"] is second["feedback"] is None
    assert main(["turns", "--limit", "1", "--config", str(config)]) == 0
    assert [line.split()[0] for line in lines(capsys)] == ["turn_1"]


def newest(config: Path, capsys: pytest.CaptureFixture[str]) -> Json:
    """The newest turn as `turns --json` shows it."""
    capsys.readouterr()
    main(["turns", "--json", "--limit", "1", "--config", str(config)])
    return json.loads(lines(capsys)[0])


def test_feedback_needs_no_proxy_and_its_comment_is_shown(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--score", "1", "--comment", "Just right.", "--config", str(config)]
    assert main(["feedback", "turn_1", *given]) == 0
    assert lines(capsys) == ["turn_1: score +1"]
    found = newest(config, capsys)
    assert found["verdict"] == {"score": 1, "votes": [], "hint": None, "judge": "feedback"}
    assert found["feedback"] == {"score": 1, "comment": "Just right."}


def test_feedback_on_a_session_is_on_its_newest_main_turn(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + '[agents]\nprofile = "openclaw"\n')
    store = Store(StoreConfig(dir=f"{config.parent}/state"))
    with store.recording() as recording:
        recording.add_turn(turn(2, session="abc~2"), b"2", b"2", client_session="abc")
        recording.add_turn(turn(3, session="abc~2", kind=TurnKind.SIDE), b"3", b"3")
    store.close()
    for name, score in (("abc~2", -1), ("abc", 1), ("abc:7", 0)):  # ours, theirs, with its epoch
        given = ["--session", name, "--score", str(score), "--config", str(config)]
        assert main(["feedback", *given]) == 0
        assert lines(capsys) == [f"turn_2: score {score:+d}"]


def test_feedback_that_comes_too_late_says_so(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=f"{config.parent}/state"))
    store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
    store.close()
    assert main(["feedback", "turn_0", "--score", "1", "--config", str(config)]) == 0
    (line,) = lines(capsys)
    assert line.startswith("turn_0: score +1 (the turn is being trained")


def test_feedback_names_a_turn_or_a_session(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["turn_1", "--session", "s"]):
        with pytest.raises(SystemExit, match="2"):
            main(["feedback", *arguments, "--score", "1"])
        assert "--session" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["feedback", "--help"])
    assert "nextstate feedback --session my-chat" in capsys.readouterr().out


@pytest.fixture
def chain(config: Path) -> Path:
    """The same store with a trained version 2, which serves, and a rejected version 3."""
    store = Store(Settings.read(config).store)
    store.versions.set_serving("main", 1)
    store.training.lease_samples("main", 9, "b", scored=True, hinted=True)
    metrics = {"score/mean": -1.0, "step/kl": 0.00456, "gate/kl_base": 0.12, "gate/rank": 0.0204}
    state = VersionState.CANDIDATE
    store.versions.add(PolicyVersion("main", 2, 1, "/b", "ee", 1, state, metrics), "b")
    store.versions.set_serving("main", 2)
    state = VersionState.REJECTED
    store.versions.add(PolicyVersion("main", 3, 2, None, None, 1, state, {}, "too far"), None)
    store.close()
    return config


def test_the_versions_table_shows_what_changed_and_why_one_was_rejected(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "--config", str(chain)]) == 0
    headings, first, second, third, reason = lines(capsys)
    assert headings.split()[:5] == ["lineage", "number", "state", "parent", "samples"]
    assert first.split() == ["main", "1", "retired", "0", "16", "·", "·", "·", "·"]
    assert second.split() == [
        *("main", "2", "serving", "1", "1", "-1.00", "0.0046", "0.120", "+0.0204")
    ]
    assert third.split()[:3] == ["main", "3", "rejected"]
    assert reason == "    too far"


def test_versions_shows_as_many_of_the_newest_as_are_wanted(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers(*arguments: str) -> list[int]:
        assert main(["versions", "--json", *arguments, "--config", str(chain)]) == 0
        return [json.loads(line)["number"] for line in lines(capsys)]

    assert numbers() == numbers("--limit", "0") == [1, 2, 3]
    assert numbers("--limit", "2") == [2, 3]
    assert main(["versions", "--limit", "2", "--config", str(chain)]) == 0
    said = capsys.readouterr()
    assert [line.split()[1] for line in said.out.splitlines()[:3]] == ["number", "2", "3"]
    assert "these are the newest 2; all: --limit 0" in said.err


def test_versions_as_json_have_the_documented_keys(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "--json", "--config", str(chain)]) == 0
    *_, second, third = (json.loads(line) for line in lines(capsys))
    assert list(second) == [
        *("lineage", "number", "state", "parent", "samples", "path", "sha256", "metrics", "reason")
    ]
    assert second["reason"] is None
    assert (third["state"], third["reason"]) == ("rejected", "too far")


def test_a_versions_card_shows_which_turns_made_it(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "2", "--config", str(chain)]) == 0
    printed = lines(capsys)
    assert printed[0] == "version 2 of main: serving"
    assert printed[-1] == "  turn_0  -1  Be brief."
    assert any(line.split() == ["gate/kl_base", "0.12"] for line in printed)
    assert main(["versions", "2", "--json", "--config", str(chain)]) == 0
    shown = json.loads(lines(capsys)[0])
    assert shown["turns"] == [{"turn": "turn_0", "score": -1, "hint": "Be brief."}]
    assert main(["versions", "3", "--config", str(chain)]) == 0
    assert lines(capsys)[:2] == ["version 3 of main: rejected", "reason   too far"]


def test_a_version_that_was_never_written_cannot_serve(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollback", "3", "--config", str(chain)]) == 2
    said = capsys.readouterr().err
    assert "version 3 was rejected before it was written and cannot serve: too far" in said


def test_a_version_whose_adapter_was_deleted_cannot_serve(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(Settings.read(chain).store)
    made = PolicyVersion("main", 4, 2, "/d", "dd", 1, VersionState.RETIRED)
    store.versions.add(made, None)
    assert store.versions.forget_adapter("main", 4)
    store.close()
    assert main(["rollback", "4", "--config", str(chain)]) == 2
    assert "version 4 has no adapter any more: it was deleted to" in capsys.readouterr().err
    assert main(["versions", "4", "--config", str(chain)]) == 0
    assert "adapter  deleted to make room" in lines(capsys)


def test_resume_accepts_what_the_gate_rejected(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resume", "--config", str(chain)]) == 0
    assert lines(capsys) == ["main trains again once the learner looks"]
    assert Store(Settings.read(chain).store).versions.decisions("main").after == 3
    assert main(["resume", "--lineage", "bob", "--config", str(chain)]) == 2
    assert "there is no lineage 'bob'" in capsys.readouterr().err


def test_a_person_pauses_a_lineage_and_status_and_versions_say_who_and_how_it_goes_on(
    chain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "ada\x1b[2J")
    given = ["--config", str(chain)]
    assert main(["pause", *given]) == 0
    assert lines(capsys) == ["main takes no batch any more; `nextstate resume main` ends the pause"]
    store = Store(Settings.read(chain).store)
    assert store.versions.decisions("main").after == 2  # what the gate rejected is not accepted
    store.versions.set_serving("main", 1)
    assert main(["versions", *given]) == 0
    said = lines(capsys)[-1]
    assert said.startswith("main: paused by ada [2J since 20")
    assert said.endswith("`nextstate resume main` ends the pause")
    assert main(["status", "--json", *given]) == 0
    assert json.loads(lines(capsys)[0])["training"] == {"main": said.removeprefix("main: ")}
    assert main(["resume", "main", *given]) == 0
    assert store.versions.decisions("main").pause is None
    store.close()
    capsys.readouterr()
    assert main(["versions", *given]) == 0
    assert "paused" not in capsys.readouterr().out
    for command in ("pause", "resume"):
        assert main([command, "bob", *given]) == 2
        assert "there is no lineage 'bob'; known: main" in capsys.readouterr().err


def test_status_of_a_stopped_loop(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--config", str(config)]) == 0
    found = json.loads(lines(capsys)[0])
    assert found["proxy"] == found["engine"] == "down"
    assert found["counts"]["turns/main"] == 2


def test_status_shows_how_the_judge_agrees_with_people(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--json", "--config", str(config)]) == 0
    assert json.loads(lines(capsys)[0])["judge_agreement"] == {}
    assert main(["status", "--config", str(config)]) == 0
    assert any("no labels yet" in line for line in lines(capsys))
    store = Store(StoreConfig(dir=f"{config.parent}/state"))
    add(store, *(turn(number) for number in range(2, 6)))
    # Votes (1, 1, 0, 1) on what people call (1, 1, 0, -1): 3 of 4 agree; by chance it would be
    # (2·3 + 1·1) / 16, so kappa is (12/16 - 7/16) / (9/16) = 5/9.
    for number, voted, said in ((2, 1, 1), (3, 1, 1), (4, 0, 0), (5, 1, -1)):
        judge(store, number, voted)
        store.reviewing.give(Feedback(f"turn_{number}", said), OWNER)
    store.reviewing.give(Feedback("turn_1", 1), OWNER)  # never voted on: no label
    store.close()
    assert main(["status", "--json", "--config", str(config)]) == 0
    counted = {"labels": 4, "agreed": 3, "accuracy": 0.75, "kappa": 0.5556}
    expected = {"rules": {**counted, "interval": [0.3561, 0.9421]}}
    found = json.loads(lines(capsys)[0])
    assert (found["judge_agreement"], found["trained_judge"]) == (expected, None)
    assert main(["status", "--config", str(config)]) == 0
    shown = [line for line in lines(capsys) if line.startswith("judge_agreement/rules")]
    said = (
        "agrees with you on 3 of 4 turns you rated (36 to 94 %), κ 0.56; rate at least 10 to know "
        "more"
    )
    assert [line.split(maxsplit=1)[1] for line in shown] == [said]


def test_a_versions_card_says_what_the_judge_is_worth(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "2", "--config", str(chain)]) == 0
    assert "judge    no labels yet: give `nextstate feedback` on judged turns" in lines(capsys)
    store = Store(Settings.read(chain).store)
    for number in range(20, 36):
        add(store, turn(number))
        judge(store, number, 1)
        store.reviewing.give(Feedback(f"turn_{number}", 1 if number > 21 else -1), OWNER)
    store.close()
    assert main(["versions", "2", "--config", str(chain)]) == 0
    worth = "judge    rules agrees with you on 14 of 16 turns you rated (68 to 96 %), κ 0.00"
    assert worth in lines(capsys)
    assert main(["versions", "2", "--json", "--config", str(chain)]) == 0
    assert json.loads(lines(capsys)[0])["judge_agreement"]["rules"]["agreed"] == 14


@pytest.mark.parametrize("command", ["turns", "sessions", "episodes", "versions"])
def test_an_empty_list_says_so_and_as_json_is_empty(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([command]) == 0
    printed = capsys.readouterr()
    first, second = printed.err.splitlines()
    assert first.startswith("nextstate: no nextstate.toml in this folder")
    assert second.startswith("nextstate: no ")
    assert printed.out == ""
    Path("nextstate.toml").write_text("")
    assert main([command, "--json"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_program_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"nextstate \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rollback", "9"], "no version 9 of lineage 'main'; known: 1"),
        (["rollback", "0"], "nextstate up"),
        (["rollback", "0", "--lineage", "bob"], "no lineage 'bob': see [lineages.NAME]"),
        (["learner", "--lineage", "bob"], "no lineage 'bob': known are main; see [lineages.NAME]"),
        (["versions", "7"], "no version 7 of lineage 'main'; known: 1"),
        (["feedback", "turn_x", "--score", "1"], "no turn 'turn_x'"),
        (["feedback", "--session", "x", "--score", "1"], "no main turn in a session 'x'"),
        (["feedback", "turn_1", "--score", "1", "--hint", "x" * 1001], "expected at most 1000"),
        (["feedback", "turn_1", "--score", "1", "--comment", " "], "comment = ' ' says nothing"),
        (["feedback", "turn_1", "--score", "1", "--hint", "\udcff"], "not valid Unicode"),
        (["feedback", "--session", "\udcff", "--score", "1"], "no main turn in a session"),
        (["judge"], "nextstate up"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main([*arguments, "--config", str(config)]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("nextstate: ")
    assert expected in printed[0]


def test_doctor_names_what_is_wrong(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    shape |= {"max_position_embeddings": 128}
    (config.parent / "config.json").write_text(json.dumps(shape))
    assert main(["doctor", "--config", str(config)]) == 0
    found = lines(capsys)
    assert all(line.startswith(" ok ") for line in found)
    assert re.search(r"training: needs [\d.]+ GB for the base, .* GB of RAM free", found[-1])
    config.write_text(config.read_text() + '[agents]\nprofile = "nobody"\n')
    assert main(["doctor", "--config", str(config)]) == 2
    assert any(line.startswith("FAIL  agent profile") for line in lines(capsys))
    config.write_text("[proxy]\nprot = 1\n")
    assert main(["doctor", "--config", str(config)]) == 2
    assert any("did you mean 'port'" in line for line in lines(capsys))


@pytest.mark.parametrize(
    ("arguments", "lineages"),
    [([], ["main", "alice", "bob"]), (["--lineage", "bob"], ["bob"])],
)
def test_the_learner_trains_all_lineages_or_the_one_that_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], lineages: list[str]
) -> None:
    add_lineages(config)
    counted: list[int] = []
    trained: list[str] = []
    zero_adapter(Settings.read(config)).mkdir(parents=True)  # from before it had a card
    made: list[Path] = []

    def require_memory(
        config: object, _model_path: str, count: int, _share: float
    ) -> tuple[object, str]:
        counted.append(count)
        return config, "nothing"

    def run(
        _store: object, _config: object, _model: str, names: Sequence[str], *_: object, **__: object
    ) -> None:
        trained.extend(names)

    monkeypatch.setattr("learner.memory.require_memory", require_memory)
    monkeypatch.setattr("learner.adapters.save_zero_adapter", lambda *given: made.append(given[-1]))
    monkeypatch.setattr("learner.stage.run", run)
    monkeypatch.setattr("nextstate.app.stages.signal.signal", lambda *_: None)
    assert main(["learner", "--config", str(config), *arguments]) == 0
    assert (trained, counted) == (lineages, [len(lineages)])
    assert made == [zero_adapter(Settings.read(config))]


def test_a_learner_on_the_engines_gpu_waits_until_the_engine_is_up(config: Path) -> None:
    asked: list[str] = []

    class Starting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 3 else 503)
            self.end_headers()

    settings = Settings.read(config)
    wait_for_engine(settings, threading.Event())  # no engine runs
    with HTTPServer(("127.0.0.1", 0), Starting) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}"
        engine_file(settings).write_text(json.dumps({"url": url}))
        wait_for_engine(settings, threading.Event(), poll_s=0.01)
        server.shutdown()
    assert asked == ["/health"] * 3


def test_one_learner_serves_all_lineages_of_a_stack(config: Path) -> None:
    add_lineages(config)
    assert list(Stack(Settings.read(config)).children) == ["proxy", "judge", "learner", "engine"]


def add_lineages(config: Path) -> None:
    text = config.read_text()
    config.write_text(text + "".join(f'[lineages.{n}]\nmodel = "{n}"\n' for n in ("alice", "bob")))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TakenError("lineage 'main' is trained by process 7 on one"), EXIT_LATER),
        (FencedError("this process was cut off"), EXIT_LATER),
        (StartError("lineage 'main' is trained by process 7"), EXIT_USAGE),
    ],
)
def test_a_learner_that_may_take_over_later_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def run(*_: object) -> None:
        raise error

    monkeypatch.setattr(stages, "run_learner", run)
    (file := tmp_path / "nextstate.toml").touch()
    assert main(["learner", "--config", str(file)]) == code
