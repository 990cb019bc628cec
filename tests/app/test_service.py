"""`nextstate service`: the files are what systemd, Docker and compose read."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextstate.app.cli import main
from nextstate.app.service_files import MARK, Machine, compose_file, unit
from nextstate.errors import StartError

ROOT = Path(__file__).parents[2]
HADOLINT = shutil.which("hadolint", path=f"{ROOT}/.hadolint/bin:{os.environ['PATH']}")
SPECIAL = "a b%h$HOME\"'\\ü"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[engine]\nmodel = "{tmp_path}"\n[store]\ndir = "~/mine"\n')
    return file


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder that looks like the sources."""
    shutil.copytree(ROOT / "requirements", tmp_path / "sources" / "requirements")
    return tmp_path / "sources"


def machine(folder: Path) -> Machine:
    return Machine(
        program=folder / "bin" / "nextstate",
        config=folder / "nextstate.toml",
        state=folder / "state",
        state_dir=str(folder / "state"),
        models=folder / "hf",
        model=folder / "model",
        user="1000:1000",
    )


def service(*arguments: object) -> int:
    return main(["service", *map(str, arguments)])


def test_the_unit_goes_where_systemd_looks_and_names_this_program(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert service("systemd", "--config", config) == 0
    file = tmp_path / "config" / "systemd" / "user" / "nextstate.service"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{file} is written"
    assert "systemctl --user enable --now nextstate" in said[1]
    assert f'/nextstate" "up" "--config" "{config}"' in file.read_text()
    assert service("systemd", "--config", config) == 0  # ours: it is replaced


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("name", ["plain", SPECIAL])
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    program = tmp_path / "a b%h$HOMEü"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o700)
    file = tmp_path / "nextstate.service"
    file.write_text(unit(replace(machine(folder), program=program)))
    argv = ["systemd-analyze", "verify", "--user", "--man=no", "--recursive-errors=no", str(file)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "nextstate" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_compose_runs_the_image_with_the_configuration_the_state_and_the_models(
    config: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    monkeypatch.setenv("HOME", str(config.parent))
    given = ("--accel", accelerator, "--out", sources, "--config", config)
    assert service("compose", *given) == 0
    found: Any = yaml.safe_load((sources / "compose.yaml").read_text())["services"]["nextstate"]
    assert found["build"] == {"context": str(sources), "args": {"ACCEL": accelerator}}
    mounted = {one["target"]: (one["source"], "read_only" in one) for one in found["volumes"]}
    assert mounted["/nextstate/nextstate.toml"] == (str(config), True)
    assert mounted["/nextstate/mine"] == (f"{config.parent}/mine", False)
    assert mounted[str(config.parent)] == (str(config.parent), True)
    assert mounted["/models"][1]
    assert ("deploy" in found) == (accelerator == "cuda")
    assert (config.parent / "mine").is_dir()
    assert f"ARG ACCEL={accelerator}\n" in (sources / "Dockerfile").read_text()


def reaches_the_image(ignored: str, name: str) -> bool:
    """Whether `COPY . .` takes a file: the last line that fits it or a folder above it decides.

    Of Docker's patterns this knows those that are used: plain names, `*`, and `**/` before either.
    """
    rules = [line for line in ignored.splitlines() if line and not line.startswith("#")]
    above = [name, *map(str, Path(name).parents)][:-1]
    taken = True
    for rule in rules:
        pattern = rule.removeprefix("!")
        assert "/" not in pattern.removeprefix("**/")
        everywhere = pattern.startswith("**/")
        pattern = pattern.removeprefix("**/")
        names = [Path(one).name if everywhere else one for one in above]
        if any("/" not in one and fnmatch(one, pattern) for one in names):
            taken = rule.startswith("!")
    return taken


def test_keys_settings_and_what_was_recorded_stay_out_of_the_image(
    config: Path, sources: Path
) -> None:
    assert service("docker", "--accel", "cpu", "--out", sources, "--config", config) == 0
    ignored = (sources / ".dockerignore").read_text()
    for name in (
        *(".env", "nextstate/.env", "nextstate.toml", "store.key", "tls/key.pem", "mine/store.db"),
        *(".git/config", ".venv/bin/python", ".clients/x", ".docs/x", ".policies/x", "dist/x.whl"),
        *("demo/__pycache__/x.pyc", "demo/policy/.env.local"),
    ):
        assert not reaches_the_image(ignored, name), name
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    rooms = ("nextstate/", "proxy/", "judge/", "learner/", "rollout/", "plugins/", "demo/")
    needed = [name for name in done.stdout.split() if name.startswith((*rooms, "requirements/"))]
    for name in (*needed, "pyproject.toml", "README.md", "LICENSE"):
        assert reaches_the_image(ignored, name), name


def test_odd_names_reach_compose_as_they_are() -> None:
    folder = Path("/") / SPECIAL
    text = compose_file(machine(folder), "cpu", folder)
    found: Any = yaml.safe_load(text)["services"]["nextstate"]
    assert found["build"]["context"] == str(folder).replace("$", "$$")
    assert found["volumes"][1]["source"] == str(folder / "state").replace("$", "$$")


def test_a_name_that_no_unit_can_hold_is_refused() -> None:
    with pytest.raises(StartError, match="has a control character"):
        unit(machine(Path("/a\nExecStartPre=/bin/sh")))
    with pytest.raises(StartError, match="systemd starts no such file"):
        unit(machine(Path("/it's")))


def test_a_file_that_is_not_ours_is_not_replaced(
    config: Path, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources / "Dockerfile").write_text("FROM scratch\n")
    given = ("--accel", "cpu", "--out", sources, "--config", config)
    assert service("docker", *given) == 2
    assert "Dockerfile is not ours: move it away" in capsys.readouterr().err
    assert (sources / "Dockerfile").read_text() == "FROM scratch\n"
    (sources / "Dockerfile").write_text(f"# {MARK}\n")
    assert service("docker", *given) == 0


def test_what_is_missing_is_said(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert service("compose", "--out", config.parent, "--config", config) == 2
    assert "is not the folder of NextState's sources" in capsys.readouterr().err
    assert service("systemd", "--config", config.parent / "absent.toml") == 2
    assert "`nextstate up` makes it at the first start" in capsys.readouterr().err


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: `make hadolint`")
def test_hadolint_finds_nothing_wrong_with_the_dockerfile(config: Path, sources: Path) -> None:
    assert service("docker", "--accel", "cpu", "--out", sources, "--config", config) == 0
    argv = [str(HADOLINT), str(sources / "Dockerfile")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
