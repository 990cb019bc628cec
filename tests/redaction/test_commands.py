"""What commands write into the store is redacted as the proxy's records are."""

from __future__ import annotations

import json
from pathlib import Path

from nextstate.app.cli import main
from nextstate.app.finding import names_of
from nextstate.app.settings import Settings
from nextstate.redaction.names import KEY_FILE, HiddenNames
from nextstate.store import Store
from tests.store.test_records import add, turn

MAIL, KEY = "ann.b@firma-nord.de", "ghp_a8Zk2LmQ9xYt3RvB7nPw5cDfH4jK6sTuV1eG"


def settings_of(tmp_path: Path, more: str = "") -> Settings:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n{more}')
    return Settings.read(file)


def test_imported_conversations_hold_no_secrets(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    chats = tmp_path / "chats.json"
    said = [{"role": "user", "content": f"I am {MAIL}"}, {"role": "assistant", "content": KEY}]
    chats.write_text(json.dumps([{"messages": said}]))
    assert main(["import", str(chats), "--config", str(settings.file)]) == 0
    store = Store(settings.store)
    found = store.turns.get(store.turns.ids()[0])
    assert found is not None
    assert found.request["messages"] == [{"role": "user", "content": "I am [secret:email]"}]
    assert found.reply["content"] == "[secret:api_key]"


def test_feedback_at_the_command_line_is_redacted(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    store = Store(settings.store)
    add(store, turn(0))
    hint = f"Write to {MAIL}."
    arguments = ["feedback", "turn_0", "--score=-1", "--hint", hint, "--config", str(settings.file)]
    assert main(arguments) == 0
    verdict = store.judging.feedback("turn_0")
    assert verdict is not None
    assert verdict.hint == "Write to [secret:email]."


def test_a_session_is_found_by_the_name_that_its_client_gave(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    Store(settings.store).close()
    hide = HiddenNames(settings.store.path, settings.privacy.redactor)
    assert names_of(MAIL, settings)[0] == hide(MAIL) != MAIL
    assert names_of("work", settings)[0] == "work"
    assert (settings.store.path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    off = settings_of(tmp_path, "[privacy]\nredact = []\n")
    assert names_of(MAIL, off)[0] == MAIL
