"""What the documents show runs, is valid, or is what the code makes."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
import tomllib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from demo.course import POLICY
from docsite import configuration
from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.config import StoreConfig
from nextstate.store import Store
from tests.docs.messages import ROOT
from tests.proxy.running_proxy import Running, both
from tests.scripted_engine import MODEL, ScriptedEngine
from tests.store.test_records import add, turn

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"environments.md": 4, "exams.md": 1, "other-harnesses.md": 1}
"""Programs that tests/proxy/test_environments_doc.py, tests/proxy/test_exams.py and
tests/rollout/test_document.py run."""
LONGEST_README = 150


def blocks(language: str) -> dict[str, list[str]]:
    """The blocks of a language by document."""
    found = {
        path.name: re.findall(rf"^```{language}\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
        for path in DOCUMENTS
    }
    return {name: texts for name, texts in found.items() if texts}


PROGRAMS = blocks("python")
TOML = [(name, text) for name, texts in blocks("toml").items() for text in texts]


def run(program: str, changes: Mapping[str, str]) -> None:
    """Runs a program of a document, with these texts of it replaced."""
    for old, new in changes.items():
        assert old in program
        program = program.replace(old, new)
    exec(program, {"__name__": "__main__"})


def test_every_program_of_the_documents_is_run_by_a_test() -> None:
    here = {"README.md": 1, "start-gpu.md": 1, "operating.md": 1, "data.md": 2}
    assert {name: len(texts) for name, texts in PROGRAMS.items()} == here | ELSEWHERE


@pytest.mark.parametrize(("name", "text"), TOML)
def test_every_configuration_in_a_document_is_valid(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(text)
    assert tomllib.loads(text)
    Settings.read(file)


def test_the_page_of_the_configuration_is_what_the_code_makes() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration.document(), (
        "python -m docsite.configuration > docs/configuration.md"
    )


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= LONGEST_README


def test_an_openai_client_talks_to_the_proxy(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (short,), (program,) = PROGRAMS["README.md"], PROGRAMS["start-gpu.md"]
    assert short in program

    async def test(engine: ScriptedEngine, p: Running) -> None:
        changes = {"http://127.0.0.1:8080": p.url, "Qwen/Qwen3-4B-Instruct-2507": MODEL}
        await asyncio.to_thread(run, program, changes)

    both(test, store, tmp_path)
    assert capsys.readouterr().out == "Hello\n"


def test_the_backup_of_a_database_in_use_has_every_turn(store: Store, tmp_path: Path) -> None:
    (program,) = PROGRAMS["operating.md"]
    with store.recording() as recording:  # another transaction is open
        recording.holds("turn_0")
        add_to = Store(StoreConfig(dir=str(tmp_path / "other")))
        add(add_to, turn(0), turn(1))
        backup = tmp_path / "backup"
        backup.mkdir(mode=0o700)
        run(program, {"STATE": str(tmp_path / "other"), "BACKUP": str(backup)})
        assert add_to.turns.ids() == ["turn_0", "turn_1"]
        add_to.close()
    with closing(Store(StoreConfig(dir=str(backup)))) as restored:
        assert restored.turns.ids() == ["turn_0", "turn_1"]
    with closing(sqlite3.connect(backup / "nextstate.sqlite3")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.filterwarnings("default")
def test_a_warm_start_makes_a_whole_model_of_imported_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, training = PROGRAMS["data.md"]
    monkeypatch.chdir(tmp_path)
    Path("nextstate.toml").write_text(f'[store]\ndir = "{tmp_path}/state"\n')
    said = '{"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "3"}'
    Path("chats.json").write_text(f'[{{"conversations": [{said}]}}]')
    assert main(["import", "chats.json"]) == 0
    assert main(["export", "sft", "--imported", "--out", "warm.parquet"]) == 0
    shutil.copy("warm.parquet", "kto.parquet")
    run(reading, {})
    run(
        training,
        {
            "Qwen/Qwen3-4B-Instruct-2507": str(POLICY),
            "max_length=4096": "max_length=64, use_cpu=True, bf16=False, report_to='none'",
        },
    )
    assert "1 conversations imported" in capsys.readouterr().out
    assert Path("warm-model", "config.json").is_file()
    assert Path("warm-model", "model.safetensors").is_file()
    assert Path("warm-model", "tokenizer.json").is_file()


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    results = {f"results/{path.name}" for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert (pages | results) - listed == set()
