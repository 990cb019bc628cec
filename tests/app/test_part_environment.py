"""Each part has only its own secrets in its environment."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from nextstate.app.part_environment import part_environment
from nextstate.app.settings import Settings
from nextstate.app.stages import stage_process
from nextstate.app.supervisor import end, start
from nextstate.config import StoreConfig
from tests.scripted_engine import MODEL, scripted_engine

VARIABLES = {
    "CLIENTS": "[proxy] api_key_env",
    "ALICE": "[lineages.alice] api_key_env",
    "ENGINE": "[engine] api_key_env",
    "JUDGES": "[judge] api_key_env",
    "NEXTSTATE_STORE_KEY": "whoever opens the store",
    "NEXTSTATE_STORE_KEY_FILE": "whoever opens the store",
    "CREDENTIALS_DIRECTORY": "whoever opens the store",
    "WANDB_API_KEY": "the learner's",
    "OPENAI_API_KEY": "nobody's",
    "AWS_SECRET_ACCESS_KEY": "nobody's",
    "GITHUB_TOKEN": "nobody's",
    "PGPASSWORD": "nobody's",
    "OPENAI_APIKEY": "nobody's",
    "API_KEY_OPENAI": "nobody's",
    "PRIVATE_KEY_PEM": "nobody's",
    "SSH_PRIVATE_KEY_B64": "nobody's",
    "VAULT_TOKEN_VALUE": "nobody's",
    "JWT": "nobody's",
}
OPENS_STORE = {"NEXTSTATE_STORE_KEY", "NEXTSTATE_STORE_KEY_FILE", "CREDENTIALS_DIRECTORY"}
CONFIG = """
[store]
dir = "{folder}/state"
[engine]
mode = "external"
url = "{engine}"
model = "{model}"
api_key_env = "ENGINE"
[proxy]
port = 0
api_key_env = "CLIENTS"
[lineages.alice]
api_key_env = "ALICE"
[judge]
kind = "{judge}"
api_key_env = "JUDGES"
[privacy]
allow_hosts = ["api.openai.com"]
"""
HAS = {
    "proxy": {"CLIENTS", "ALICE", "ENGINE", *OPENS_STORE},
    "judge": {"ENGINE", "JUDGES", *OPENS_STORE},
    "learner": {"ENGINE", *OPENS_STORE},
    "rollout": set[str](),
    "writer": OPENS_STORE,
    "engine": set[str](),
}


def settings(folder: Path, engine: str = "http://127.0.0.1:1", judge: str = "rules") -> Settings:
    file = folder / "nextstate.toml"
    file.write_text(CONFIG.format(folder=folder, engine=engine, model=MODEL, judge=judge))
    return Settings.read(file)


@pytest.mark.parametrize("part", HAS)
def test_a_part_gets_only_its_own_secrets(tmp_path: Path, part: str) -> None:
    plain = {
        "PATH": "/bin",
        "HOME": "/root",
        "KEYBOARD": "de",
        "PWD": "/",
        "TOKENIZERS_PARALLELISM": "0",
    }
    plain |= {"HTTPS_PROXY": "http://proxy.lan:3128", "NO_PROXY": "a.lan"}
    found = part_environment(settings(tmp_path), part, VARIABLES | plain)
    assert {*found} == HAS[part] | {*plain}


def test_a_proxys_password_is_for_those_who_ask_somebody_outside(tmp_path: Path) -> None:
    given = {"HTTPS_PROXY": "http://me:password@proxy.lan:3128"}
    outside = settings(tmp_path, judge="litellm")
    for part in HAS:
        assert part_environment(settings(tmp_path), part, given) == {}
        assert part_environment(outside, part, given) == (given if part == "judge" else {})


def test_no_plugin_of_a_rollout_gets_what_opens_the_store(tmp_path: Path) -> None:
    found = settings(tmp_path)
    found = replace(found, rollout=replace(found.rollout, environment="mine:create"))
    got = part_environment(found, "rollout", VARIABLES)
    assert "OPENAI_API_KEY" in got
    assert not OPENS_STORE & {*got}


def test_a_providers_variable_is_for_the_judge_that_asks_a_provider(tmp_path: Path) -> None:
    found = settings(tmp_path, judge="litellm")
    assert "OPENAI_API_KEY" in part_environment(found, "judge", VARIABLES)
    assert "CLIENTS" not in part_environment(found, "judge", VARIABLES)
    for part in ("proxy", "learner", "engine", "writer"):
        assert "OPENAI_API_KEY" not in part_environment(found, part, VARIABLES)


def test_a_database_servers_password_is_for_the_parts_that_ask_it(tmp_path: Path) -> None:
    store = StoreConfig(str(tmp_path), "postgresql://me@db.example,other.example:5433/nextstate")
    found = replace(settings(tmp_path), store=store)
    assert found.hosts["db.example"] == found.hosts["other.example"] == "[store] url"
    for part, own in HAS.items():
        more = set[str]() if part == "engine" else {"PGPASSWORD"}
        assert {*part_environment(found, part, VARIABLES)} == own | more


def test_some_secrets_no_part_gets(tmp_path: Path) -> None:
    inherited, found = VARIABLES | {"PATH": "/bin"}, settings(tmp_path)
    parts = ("proxy", "judge", "learner", "rollout", "engine")
    got = {name for part in parts for name in part_environment(found, part, inherited)}
    assert sorted({*inherited} - got) == [
        *("API_KEY_OPENAI", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "JWT", "OPENAI_APIKEY"),
        *("OPENAI_API_KEY", "PGPASSWORD", "PRIVATE_KEY_PEM", "SSH_PRIVATE_KEY_B64"),
        *("VAULT_TOKEN_VALUE", "WANDB_API_KEY"),
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x") for name in ("OPENAI_APIKEY", "PRIVATE_KEY_PEM", "SSH_PRIVATE_KEY_B64")),
        *((name, "x") for name in ("API_KEY_OPENAI", "VAULT_TOKEN_VALUE", "JWT", "JWT_PROD")),
        *((name, "x") for name in ("OPENAI_APIKEY_PROD", "AUTHTOKEN_CI", "API_KEY2", "GH_TOKEN_2")),
        ("HTTPS_PROXY", "http://ann:hunter2@proxy.example:3128"),
    ],
)
def test_a_secret_is_known_whatever_stands_around_its_name(
    tmp_path: Path, name: str, value: str
) -> None:
    plain = {"TOKENIZERS_PARALLELISM": "false", "HTTP_PROXY": "http://proxy.example:3128"}
    for part in HAS:
        assert part_environment(settings(tmp_path), part, {name: value} | plain) == plain


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_real_processes_have_only_their_own_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: f"{name}-{secrets.token_hex(16)}" for name in VARIABLES}
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    def held(pid: int) -> set[str]:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        return {name for name, value in values.items() if value.encode() in environ}

    async def test() -> None:
        async with scripted_engine() as engine:
            found = settings(tmp_path, engine.url)
            for part in ("proxy", "judge", "learner", "rollout"):
                child = stage_process(found, part, part)
                process = await start(child)
                try:
                    assert held(process.pid) == HAS[part], part
                    if part == "proxy":
                        async with asyncio.timeout(60):
                            while not (below := psutil.Process(process.pid).children()):
                                assert process.returncode is None, child.log_file.read_text()
                                await asyncio.sleep(0.1)
                        (writer,) = below
                        async with asyncio.timeout(10):
                            while "proxy.writer" not in writer.cmdline():
                                await asyncio.sleep(0.05)
                        assert held(writer.pid) == HAS["writer"]
                finally:
                    await end(child)

    asyncio.run(test())


def test_a_weak_key_is_refused_at_the_start_and_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(tmp_path)
    monkeypatch.setenv("ENGINE", "e")
    monkeypatch.setenv("ALICE", secrets.token_hex(16))
    monkeypatch.setenv("CLIENTS", "changeme")
    command = [sys.executable, "-P", "-m", "nextstate", "proxy", "--config"]
    done = subprocess.run(
        [*command, str(tmp_path / "nextstate.toml")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "[proxy] api_key_env = 'CLIENTS'" in done.stderr
    assert "could be guessed" in done.stderr
    assert "changeme" not in done.stderr
