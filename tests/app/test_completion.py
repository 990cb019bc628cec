"""`nextstate completion`, in the shells that this machine has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nextstate.app.cli import main

_BASH = """
source {script}
function=$(complete -p nextstate | sed -E 's/.*-F ([^ ]+).*/\\1/')
COMP_WORDS=({words} "{last}")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$function nextstate "{last}" x
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
CASES = {
    "nextstate ver": {"verify", "versions"},
    "nextstate turns --s": {"--session", "--since"},
    "nextstate connect openc": {"openclaw", "opencode"},
    "nextstate judge tr": {"train"},
    "nextstate up --config mi": {"mine.toml"},
}


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert main(["completion", shell]) == 0
    (folder / "mine.toml").touch()
    file = folder / f"completion.{shell}"
    file.write_text(capsys.readouterr().out)
    return file


def said(argv: list[str], folder: Path) -> str:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("line", CASES)
def test_bash_completes_commands_options_choices_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    words, _, last = line.rpartition(" ")
    code = _BASH.format(script=script("bash", tmp_path, capsys), words=words, last=last)
    assert set(said(["bash", "--norc", "-c", code], tmp_path).split()) == CASES[line]


@pytest.mark.parametrize("line", CASES)
def test_fish_completes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    file = script("fish", tmp_path, capsys)
    code = f"source {file}; complete -C '{line}'"
    found = said(["fish", "--no-config", "-c", code], tmp_path).splitlines()
    assert {shown.partition("\t")[0] for shown in found} == CASES[line]


def test_zsh_reads_its_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = script("zsh", tmp_path, capsys)
    assert file.read_text().startswith("#compdef nextstate\n")
    said(["zsh", "-f", "-n", str(file)], tmp_path)
