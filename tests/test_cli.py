"""The command line without an engine: what it prints, and how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nextstate.cli import main
from nextstate.config import StoreConfig
from nextstate.records import PolicyVersion, VersionState
from nextstate.store import Store
from tests.test_store import add, judge, turn


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose store holds two turns and a version."""
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmodel = "{tmp_path}"\n')
    (tmp_path / "config.json").write_text("{}")
    store = Store(StoreConfig(dir=f"{tmp_path}/state"))
    add(store, turn(0), turn(1))
    judge(store, 0, -1, hint="Be brief.")
    store.add_version(PolicyVersion("main", 1, 0, "/a", "ff", 16, VersionState.CANDIDATE), None)
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
        *("turn", "session", "index", "kind", "lineage", "version"),
        *("trainable", "reason", "next_state", "verdict"),
    ]
    assert first["verdict"] == {"score": -1, "votes": [-1], "hint": "Be brief."}
    assert first["next_state"] == [{"source": "user", "text": "thanks"}]
    assert second["verdict"] is None
    assert main(["turns", "--limit", "1", "--config", str(config)]) == 0
    assert [line.split()[0] for line in lines(capsys)] == ["turn_1"]


def test_versions_and_feedback(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions", "--json", "--config", str(config)]) == 0
    assert json.loads(lines(capsys)[0])["state"] == "candidate"
    assert main(["versions", "--config", str(config)]) == 0
    assert main(["feedback", "turn_1", "--score", "1", "--config", str(config)]) == 0
    capsys.readouterr()
    main(["turns", "--json", "--limit", "1", "--config", str(config)])
    assert json.loads(lines(capsys)[0])["verdict"]["score"] == 1


def test_status_of_a_stopped_loop(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--config", str(config)]) == 0
    found = json.loads(lines(capsys)[0])
    assert found["proxy"] == found["engine"] == "down"
    assert found["counts"]["turns/main"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rollback", "9"], "no version 9 of lineage 'main'; known: 1"),
        (["rollback", "0"], "nextstate up"),
        (["feedback", "turn_x", "--score", "1"], "no turn 'turn_x'"),
        (["judge"], "nextstate up"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
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
    assert re.search(r"training: needs [\d.]+ GB: base .* GB are free on cpu", found[-1])
    config.write_text(config.read_text() + '[agents]\nprofile = "nobody"\n')
    assert main(["doctor", "--config", str(config)]) == 2
    assert any(line.startswith("FAIL  agent profile") for line in lines(capsys))
    config.write_text("[proxy]\nprot = 1\n")
    assert main(["doctor", "--config", str(config)]) == 2
    assert any("did you mean 'port'" in line for line in lines(capsys))
