"""`nextstate keys`, and which keys are good enough."""

from __future__ import annotations

import secrets
import stat
from contextlib import closing
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.app.stages import require_key
from nextstate.config import StoreConfig
from nextstate.errors import ConflictError, RecordError
from nextstate.keys import Key, Scope, hashed, new_key, weakness
from nextstate.store import Store
from nextstate.store.keys import MOST_KEYS
from proxy.keys import Keys
from proxy.lineages import Lineages

WEAK = (
    *("changeme", "secret", "k" * 40, "changeme-changeme-changeme", "1234567890123456789012"),
    *("abcdefghijklmnopqrstuvwxyz", "sk-proj-abcd1234efgh5678ijkl", "sk-...your-key-here....."),
    *("your-api-key-here-0123456789", "passwordpasswordpassword", "0123456789" * 4),
    *("sk-ant-api03-Zm9vYmFyYmF6cXV4", "<replace-me-with-a-real-secret>", "aababbabababbabaabab"),
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[store]\ndir = "{tmp_path}/state"\n[lineages.alice]\nmodel = "alice"\n')
    return file


def keys(config: Path, *arguments: str) -> int:
    return main(["keys", *arguments, "--config", str(config)])


def key(name: str, secret: str = "", scopes: tuple[Scope, ...] = (Scope.CHAT,)) -> Key:
    return Key(name, hashed(secret or name), frozenset(scopes), None, 1.0)


@pytest.mark.parametrize("weak", WEAK)
def test_weak_and_example_keys_are_weak_and_the_reason_quotes_no_key(weak: str) -> None:
    reason = weakness(weak)
    assert reason is not None
    assert weak not in reason


@given(st.sampled_from([secrets.token_hex, secrets.token_urlsafe]), st.integers(16, 64))
def test_random_keys_are_good(make: type, length: int) -> None:
    assert weakness(make(length)) is None
    assert weakness(new_key()) is None


def test_a_key_is_shown_once_and_kept_as_its_hash(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys(config, "create", "laptop") == 0
    secret = capsys.readouterr().out.strip()
    assert weakness(secret) is None
    for file in (config.parent / "state").rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0
        assert not file.is_file() or secret.encode() not in file.read_bytes()
    assert keys(config, "list", "--json") == 0
    listed = capsys.readouterr().out
    assert secret not in listed
    found = orjson.loads(listed)
    assert (found["scopes"], found["lineage"], found["used_at"]) == (
        ["chat", "feedback"],
        None,
        None,
    )


def test_a_key_may_have_scopes_and_a_lineage(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--scope", "read", "--scope", "episodes", "--lineage", "alice", "--json")
    assert keys(config, "create", "ci", *more) == 0
    assert orjson.loads(capsys.readouterr().out)["name"] == "ci"
    assert keys(config, "list") == 0
    assert "episodes,read" in (shown := capsys.readouterr().out)
    assert "lineage alice" in shown
    assert "used never" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create",), "name the key"),
        (("create", "Laptop!"), "small letters"),
        (("create", "a", "--scope", "all"), "expected one of chat, feedback"),
        (("create", "a", "--lineage", "bob"), "known are main, alice"),
        (("revoke", "nobody"), "nextstate keys list"),
    ],
)
def test_a_wrong_call_says_what_to_change(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert keys(config, *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_revoked_key_stays_listed_until_it_is_removed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys(config, "create", "laptop") == 0
    assert keys(config, "revoke", "laptop") == 0
    assert keys(config, "create", "laptop") == 2  # its name stays taken
    capsys.readouterr()
    assert keys(config, "list") == 0
    assert "revoked" in capsys.readouterr().out
    assert keys(config, "revoke", "laptop", "--remove") == 0
    assert "every program of this machine" in capsys.readouterr().out


def test_there_may_be_so_many_keys_in_force(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    for number in range(MOST_KEYS):
        store.keys.add(key(f"k{number}"))
    with pytest.raises(ConflictError, match="revoke one"):
        store.keys.add(key("more"))
    store.keys.revoke("k0")
    store.keys.add(key("more"))
    store.close()


def test_a_key_needs_a_scope() -> None:
    with pytest.raises(RecordError, match="has no scope"):
        key("k", scopes=())


def test_a_proxy_that_others_reach_does_not_start_without_a_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + '[proxy]\nhost = "192.0.2.7"\n')
    for _ in range(2):
        assert main(["proxy", "--config", str(config)]) == 2
        refused = "[proxy] host = '192.0.2.7' is reachable from other machines and no key is asked"
        assert refused in capsys.readouterr().err
        assert keys(config, "create", "laptop") == 0
        assert keys(config, "revoke", "laptop", "--remove") == 0
        assert "every program of this machine" not in capsys.readouterr().out
    assert keys(config, "create", "laptop") == 0
    settings = Settings.read(config)
    with closing(Store(settings.store)) as store:
        require_key(settings, store)
        found = Keys(Lineages("m", None), store.keys, closed=True)
        store.keys.remove("laptop")
        found.refresh()
        assert found.needed  # the last key's removal does not open it
