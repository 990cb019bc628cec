"""`nextstate up` without a configuration file: the three questions, and the file that they make."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nextstate.app.cli.connect import AGENT_NAMES
from nextstate.app.first_file import Answers, ask, file_text, usual, visible_gpus, write_file
from nextstate.app.settings import Settings
from nextstate.config import EngineConfig
from nextstate.engine import process as vllm
from nextstate.errors import StartError
from nextstate.store.sqlite import FILE


def asked(*lines: str, cached: tuple[str, ...] = ()) -> tuple[Answers, str]:
    """The answers, and what was said."""
    given: Iterator[str] = iter(lines)
    said: list[str] = []

    def read(prompt: str) -> str:
        said.append(prompt)
        line = next(given, None)
        if line is None:
            raise EOFError
        return line

    found = ask(read, said.append, AGENT_NAMES, cached, gpus=1, small=Path("/small"))
    return found, "\n".join(said)


def test_enter_takes_the_defaults_which_are_those_of_the_configuration() -> None:
    found, said = asked("", "", "", cached=("someone/small",))
    assert found == Answers(EngineConfig().model, "other", "engine")
    assert "In the local cache: someone/small" in said


def test_a_wrong_answer_is_explained_and_asked_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    found, said = asked(
        *("/absent", str(tmp_path), "x\0y", "~nobody", "~", str(model)),
        *("clippy", "openclaw"),
        *("judge judy", "rules,engine"),
    )
    assert found == Answers(str(model), "openclaw", "rules,engine")
    assert "'/absent' is neither a folder on this machine nor a name like OWNER/NAME" in said
    assert f"{tmp_path} has no config.json: name a folder with weights" in said
    assert "'clippy' is not one of openclaw, codex" in said
    assert "'judge judy' is not one of engine, rules, rules,engine" in said


def test_answers_that_end_leave_no_file() -> None:
    with pytest.raises(StartError, match="no file was written: `nextstate up --yes` takes"):
        asked("", "")


@given(
    model=st.text(st.characters(exclude_categories=["Cs"])),
    agent=st.sampled_from([*AGENT_NAMES, "other"]),
    judge=st.sampled_from(["engine", "rules", "rules,engine"]),
    gpus=st.integers(0, 3),
)
@example(model="~0", agent="other", judge="rules", gpus=0)
@example(model="/\0", agent="other", judge="rules", gpus=2)
def test_every_answer_makes_a_file_that_says_what_was_answered(
    model: str, agent: str, judge: str, gpus: int
) -> None:
    text = file_text(Answers(model, agent, judge), [str(number) for number in range(gpus)])
    found = tomllib.loads(text)
    assert (found["engine"]["model"], found["judge"]["kind"]) == (model, judge)
    assert (f"nextstate connect {agent}`" in text) == (agent != "other")
    assert ("--gpu-memory-utilization" in found["engine"]["args"]) == (gpus == 1)


def test_without_a_gpu_the_small_model_and_the_rules_are_offered(tmp_path: Path) -> None:
    small = tmp_path / "SmolLM2"
    for answer in ("", "smollm2"):
        said: list[str] = []
        given = iter([answer, "openclaw", ""])
        found = ask(lambda _: next(given), said.append, AGENT_NAMES, (), 0, small)  # noqa: B023
        assert found == Answers(str(small), "openclaw", "rules")
        assert "`nextstate fetch smollm2` downloads" in "".join(said)
    assert usual(0, small) == Answers(str(small), judge="rules")
    assert usual(1, small) == Answers()
    written = tomllib.loads(file_text(found, []))
    assert written["learner"]["max_wait_s"] == 60.0
    assert written["engine"]["served_model_name"] == "SmolLM2"
    small.mkdir()
    (small / "model.safetensors").touch()
    ask(lambda _: "", said.append, AGENT_NAMES, (), 0, small)
    assert "fetch smollm2" not in said[-4]


@pytest.mark.parametrize(("gpus", "second"), [(["0", "1"], "1"), (["2", "GPU-a", "3"], "GPU-a")])
def test_with_several_gpus_vllm_takes_the_second_and_the_learner_has_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[str], second: str
) -> None:
    file = tmp_path / "nextstate.toml"
    write_file(file, file_text(Answers(), gpus))
    engine = Settings.read(file).engine
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
    assert engine.env == {"CUDA_VISIBLE_DEVICES": second}
    assert vllm.gpu_share(engine, {}) == 0.0
    assert "--gpu-memory-utilization" not in engine.args


def test_the_file_is_read_without_complaint_and_holds_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "nextstate.toml"
    write_file(file, file_text(Answers(), []))
    written, default = Settings.read(file), Settings.read()
    assert written.engine == default.engine
    assert (written.judge, written.proxy) == (default.judge, default.proxy)
    assert written.learner == replace(default.learner, max_wait_s=60.0)


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    found = tomllib.loads(file_text(Answers(str(tmp_path / "small")), []))
    assert found["engine"]["served_model_name"] == "small"


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text("[proxy]\n")
    with pytest.raises(StartError, match="cannot be written: File exists"):
        write_file(file, "")
    with pytest.raises(StartError, match="cannot be written: No such file"):
        write_file(tmp_path / "absent" / "nextstate.toml", "")
    assert file.read_text() == "[proxy]\n"


def test_gpus_are_those_that_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []
    driver.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: the same'\n"
    )
    driver.chmod(0o700)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_gpus() == ["1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert visible_gpus() == []


def up(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HOME": str(folder), "HF_HOME": str(folder / "hf")}
    env |= {"XDG_CACHE_HOME": "", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-P", "-m", "nextstate", "up", *arguments]
    return subprocess.run(
        argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def test_without_a_file_and_a_terminal_the_error_names_the_option(tmp_path: Path) -> None:
    done = up(tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert "run `nextstate up` in a terminal, or `nextstate up --yes` for the defaults" in line
    assert list(tmp_path.iterdir()) == []


def test_yes_writes_the_file_checks_it_and_names_the_command_that_fetches_the_model(
    tmp_path: Path,
) -> None:
    done = up(tmp_path, "--yes", "--config", "mine.toml")
    assert (done.returncode, done.stderr) == (2, "")
    model = Settings.read(tmp_path / "mine.toml").engine.model
    assert model == f"{tmp_path}/.cache/nextstate/SmolLM2-135M-Instruct"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL  model")]
    assert "run `nextstate fetch smollm2` once" in line
    assert done.stdout.splitlines()[-1].startswith("Do what the lines with FAIL say")
    assert (tmp_path / ".nextstate" / FILE).exists()
