"""`nextstate connect` against a running proxy: what it writes, sends and says."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import stat
import tomllib
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.cli.connect import AGENT_NAMES
from nextstate.app.connect import first_turn
from nextstate.app.connect.agents import AGENTS, ENVIRONMENT_AGENTS, FILE_AGENTS
from nextstate.app.connect.target import Target
from nextstate.config import StoreConfig
from nextstate.engine.process import free_port
from nextstate.records import TurnKind
from nextstate.store import Store
from tests.proxy.running_proxy import running
from tests.scripted_engine import scripted_engine

KEY = "a-key-of-mine"
FILES = {
    "openclaw": ".openclaw/openclaw.json",
    "codex": ".codex/config.toml",
    "qwen-code": ".qwen/settings.json",
    "opencode": ".config/opencode/opencode.json",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, with a configuration of a proxy that is not up."""
    for name in ("OPENCLAW_CONFIG_PATH", "OPENCLAW_HOME", "OPENCLAW_STATE_DIR", "CODEX_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("OPENCODE_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEXTSTATE_TEST_KEY", KEY)
    write_config(tmp_path, f"http://127.0.0.1:{free_port()}")
    return tmp_path


def write_config(home: Path, url: str, more: str = "", engine: str = "") -> None:
    port = url.rpartition(":")[2]
    (home / "nextstate.toml").write_text(
        f'[store]\ndir = "{home}/state"\n[engine]\nmodel = "base"\n{engine}\n'
        f"[proxy]\nport = {port}\n{more}\n"
    )


def connect(home: Path, *arguments: str) -> int:
    return main(["connect", *arguments, "--config", str(home / "nextstate.toml")])


def through(home: Path, *arguments: str, key: str | None = None, context: int = 65_536) -> Store:
    """Runs the command while a proxy is up; returns the proxy's store."""
    store = Store(StoreConfig(dir=str(home / "proxy")))

    async def run() -> None:
        async with scripted_engine() as engine, running(engine.url, store, home, key=key) as p:
            engine.context = context
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            more = 'api_key_env = "NEXTSTATE_TEST_KEY"' if key else ""
            write_config(home, p.url, more)
            assert await asyncio.to_thread(connect, home, *arguments) == 0

    asyncio.run(run())
    return store


def test_the_command_knows_every_agent() -> None:
    assert [agent.name for agent in AGENTS] == [*AGENT_NAMES]
    assert {agent.name for agent in FILE_AGENTS} == {*FILES}


@pytest.mark.parametrize("agent", FILES)
def test_a_first_turn_arrives_and_does_not_train(
    agent: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = through(home, agent)
    said = re.search(r"a first turn arrived: (turn_\w+)", capsys.readouterr().out)
    assert said is not None
    turn = store.turns.get(said[1])
    assert turn is not None
    assert turn.kind is TurnKind.SIDE
    assert "65536" in (home / FILES[agent]).read_text(), "the engine's context is in the settings"


def test_openclaw_gets_provider_model_and_both_switches(home: Path) -> None:
    file = home / FILES["openclaw"]
    file.parent.mkdir()
    file.write_text(
        "// mine\n{\n  agents: { defaults: { model: 'a/b', modelPolicy: { allow: ['a/*'] } } },\n"
        "  models: { providers: { other: { apiKey: 'k' } } }, // all\n}\n"
    )
    connect(home, "openclaw")
    text = file.read_text()
    assert text.startswith("// mine\n")
    assert "}, // all\n" in text
    assert 'model: "nextstate/base", modelPolicy: { allow: [\'a/*\', "nextstate/base"] }' in text
    assert "other: { apiKey: 'k' }" in text
    for switch in ("supportsPromptCacheKey", "sendSessionAffinityHeaders"):
        assert f'"{switch}": true' in text


def test_the_plugin_is_offered_and_loads_only_when_asked_for(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / FILES["openclaw"]
    file.parent.mkdir()
    earlier = "/an/earlier/place/plugins/agents/openclaw"
    file.write_text(f"{{ plugins: {{ allow: ['a'], load: {{ paths: ['{earlier}'] }} }} }}")
    connect(home, "openclaw")
    assert "nextstate connect openclaw --plugin" in capsys.readouterr().out
    assert earlier in file.read_text()
    connect(home, "openclaw", "--plugin")
    connect(home, "openclaw")
    assert "--plugin" not in capsys.readouterr().out, "it is loaded already"
    text = file.read_text()
    found = re.search(r"paths: \[(\S+)\]", text)
    assert found is not None
    folder = Path(json.loads(found[1]))
    assert (folder / "openclaw.plugin.json").is_file(), "of the NextState that runs now"
    assert "allow: ['a', \"nextstate\"]" in text
    assert '"allowConversationAccess": true' in text


@pytest.mark.parametrize("agent", ["codex", "aider"])
def test_an_agent_without_a_plugin_says_so(
    agent: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert connect(home, agent, "--plugin") == 2
    assert f"no plugin for {agent}" in capsys.readouterr().err


def test_what_it_says_to_run_next_keeps_its_own_arguments(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "my file.json"
    connect(home, "openclaw", "--file", str(file))
    said = capsys.readouterr().out
    told = f"nextstate connect openclaw --undo --file '{file}' --config {home / 'nextstate.toml'}"
    assert f"back again: {told}\n" in said
    assert main(shlex.split(told)[1:]) == 0
    assert not file.exists()


def test_undo_names_what_was_before_an_earlier_change(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "o.json"
    file.write_text("{}")
    named = ("openclaw", "--file", str(file))
    connect(home, *named)
    file.write_text(file.read_text() + "// mine\n")
    write_config(home, "http://127.0.0.1:5", engine='served_model_name = "other"')
    connect(home, *named)
    capsys.readouterr()
    assert connect(home, *named, "--undo") == 0
    said = capsys.readouterr().out
    assert file.read_text().endswith("// mine\n")
    older = Path(said.strip().rpartition(" is in ")[2])
    assert older.read_text() == "{}"


@pytest.mark.parametrize("agent", FILES)
def test_twice_changes_nothing_and_undo_restores_every_byte(
    agent: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / FILES[agent]
    file.parent.mkdir(parents=True)
    before = b"# \xc3\xa9\r\n" if agent == "codex" else b"// \xc3\xa9\r\n{ }"
    file.write_bytes(before)
    connect(home, agent)
    after = file.read_bytes()
    capsys.readouterr()
    connect(home, agent)
    assert "names the proxy already" in capsys.readouterr().out
    assert file.read_bytes() == after
    assert connect(home, agent, "--undo") == 0
    assert file.read_bytes() == before
    assert [*file.parent.iterdir()] == [file]


def test_a_dry_run_shows_the_change_and_writes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for agent, file in FILES.items():
        assert connect(home, agent, "--dry-run") == 0
        said = capsys.readouterr().out
        assert "+" in said
        assert "/v1" in said
        assert not (home / file).exists()
        assert not (home / file).parent.exists()


def test_the_key_is_written_and_not_shown(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    through(home, "openclaw", key=KEY)
    assert f'"apiKey": "{KEY}"' in (home / FILES["openclaw"]).read_text()
    assert (home / FILES["openclaw"]).stat().st_mode & 0o777 == 0o600
    through(home, "qwen-code", key=KEY)
    settings = json.loads((home / FILES["qwen-code"]).read_text())
    assert settings["env"] == {"NEXTSTATE_TEST_KEY": KEY}
    through(home, "codex", key=KEY)
    provider = tomllib.loads((home / FILES["codex"]).read_text())["model_providers"]["nextstate"]
    assert provider["env_key"] == "NEXTSTATE_TEST_KEY"
    through(home, "claude-code", key=KEY)
    shown = capsys.readouterr()
    assert 'export ANTHROPIC_API_KEY="$NEXTSTATE_TEST_KEY"' in shown.out
    assert KEY not in shown.out + shown.err


@pytest.mark.parametrize("agent", FILES)
def test_a_file_that_others_read_is_private_once_it_holds_the_key_and_undo_restores_its_mode(
    agent: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(home, "http://127.0.0.1:1", 'api_key_env = "NEXTSTATE_TEST_KEY"')
    file = home / FILES[agent]
    file.parent.mkdir(parents=True)
    before = b"" if agent == "codex" else b"{}"
    file.write_bytes(before)
    file.chmod(0o644)
    has_key = agent != "codex"  # it reads the key from the environment
    private, told = (0o600, f"chmod 644 {file}") if has_key else (0o644, "")
    connect(home, agent, "--dry-run")
    assert (f"{file} would hold the proxy's key" in capsys.readouterr().out) == has_key
    connect(home, agent)
    assert stat.S_IMODE(file.stat().st_mode) == private
    assert told in capsys.readouterr().out
    write_config(home, "http://127.0.0.1:2", 'api_key_env = "NEXTSTATE_TEST_KEY"')
    connect(home, agent)
    assert "chmod" not in capsys.readouterr().out
    file.chmod(0o644)
    connect(home, agent)  # names the proxy already
    assert stat.S_IMODE(file.stat().st_mode) == private
    assert told in capsys.readouterr().out
    assert connect(home, agent, "--undo") == 0
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (before, 0o644)


def test_a_proxy_that_is_not_up_is_named_with_the_command_that_starts_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert connect(home, "openclaw") == 75
    said = capsys.readouterr()
    assert re.search(
        r"no proxy listens at http://127\.0\.0\.1:\d+: start it with `nextstate up`", said.err
    )
    assert "context is not known" in said.out
    assert (home / FILES["openclaw"]).exists()


def test_without_a_proxy_the_context_is_the_configured_one(home: Path) -> None:
    write_config(home, "http://127.0.0.1:1", engine="max_model_len = 40960")
    assert connect(home, "opencode") == 75
    found = json.loads((home / FILES["opencode"]).read_text())
    model = found["provider"]["nextstate"]["models"]["base"]
    assert model["limit"] == {"context": 40960, "output": 10240}


def test_a_context_that_is_too_small_for_openclaw_makes_its_prompts_short_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / FILES["openclaw"]
    file.parent.mkdir()
    defaults = "{ skills: ['a'], params: { maxTokens: 99 } }"
    before = f"{{ agents: {{ defaults: {defaults} }}, tools: {{ deny: ['x'] }} }}"
    file.write_text(before)
    through(home, "openclaw", context=8192)
    text = file.read_text()
    for setting in (
        *('"skipBootstrap": true', '"contextInjection": "never"', "skills: []"),
        *("params: { maxTokens: 99 }", """deny: ['x', "*"]""", '"contextWindow": 8192'),
    ):
        assert setting in text, text
    said = capsys.readouterr().out
    assert "the model's context has 8192 tokens" in said
    assert "WITHOUT tools" in said
    assert "soon forgets" not in said
    through(home, "openclaw", context=65_536)
    assert "this model has room for long ones" in capsys.readouterr().out
    assert file.read_text().count("skipBootstrap") == 1
    connect(home, "openclaw", "--undo")
    assert file.read_text() == before
    through(home, "openclaw", context=4096)
    assert "with 4096 it soon forgets" in capsys.readouterr().out
    connect(home, "openclaw", "--undo")
    through(home, "openclaw", context=65_536)
    assert "skipBootstrap" not in file.read_text()
    assert "prompts" not in capsys.readouterr().out


def test_the_context_of_an_engine_that_still_loads_is_waited_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(StoreConfig(dir=str(home / "proxy")))

    async def run() -> None:
        async with scripted_engine() as engine:
            engine.healthy = False
            async with running(engine.url, store, home) as p:
                held = asyncio.Event()
                wait = p.proxy.versions.wait_admitted

                async def waited(seconds: float) -> None:
                    held.set()
                    await wait(seconds)

                monkeypatch.setattr(p.proxy.versions, "wait_admitted", waited)
                write_config(home, p.url)
                command = asyncio.create_task(asyncio.to_thread(connect, home, "openclaw"))
                await asyncio.wait_for(held.wait(), 30)
                engine.healthy = True
                assert await command == 0

    asyncio.run(run())
    assert '"contextWindow": 4096' in (home / FILES["openclaw"]).read_text()


def test_an_engine_that_never_comes_up_is_waited_for_as_long_as_the_proxy_holds_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_turn, "_ANSWERS_WITHIN_S", 0.05)

    async def run() -> None:
        async with scripted_engine() as engine:
            engine.frozen = asyncio.Event()
            target = Target(engine.url, "base")
            async with asyncio.timeout(4):
                assert await first_turn.with_context(target, 0.05) == target
            asked = asyncio.create_task(first_turn.with_context(target, 60.0))
            await asyncio.sleep(0)
            engine.frozen.set()
            assert (await asked).context == engine.context

    asyncio.run(run())


@pytest.mark.parametrize(
    ("agent", "text", "said"),
    [
        ("openclaw", '{\n  "a": 1\n  "b": 2\n}', "line 3, column 3: expected a comma or }"),
        ("openclaw", "[]", "line 1, column 1: expected an object as the value of the whole file"),
        ("qwen-code", '{"env": []}', "line 1, column 9: expected an object as the value of env"),
        ("codex", "model = \n", "Invalid value"),
        ("codex", "model_providers = {}\n", "is written in a way that cannot be changed here"),
    ],
)
def test_an_unexpected_file_is_one_error_and_stays(
    agent: str, text: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "elsewhere" / "settings"
    file.parent.mkdir()
    file.write_text(text)
    assert connect(home, agent, "--file", str(file)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nextstate: {file}: ")
    assert said in line
    assert "nothing was changed" in line
    assert file.read_text() == text
    assert [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("agent", ENVIRONMENT_AGENTS, ids=lambda agent: agent.name)
def test_the_lines_for_a_shell_name_proxy_and_key(
    agent: object, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = getattr(agent, "name", "")
    assert connect(home, name, "--dry-run") == 0
    words = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert {word[0] for word in words} == {"export"}
    variables = dict(word[1].split("=", 1) for word in words)
    assert any(value.startswith("http://127.0.0.1:") for value in variables.values())
    assert "unused" in variables.values()


def test_an_agent_without_a_file_has_nothing_to_undo(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert connect(home, "claude-code", "--undo") == 2
    assert "claude-code is connected by environment variables" in capsys.readouterr().err


def test_an_agent_may_have_a_key_of_its_own(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_KEY", "ns-its-own")
    assert connect(home, "codex", "--key-env", "AGENT_KEY", "--dry-run") == 0
    said = capsys.readouterr().out
    assert 'env_key = "AGENT_KEY"' in said
    assert "ns-its-own" not in said
    assert connect(home, "codex", "--key-env", "NOBODYS", "--dry-run") == 2
    assert "--key-env = 'NOBODYS'" in capsys.readouterr().err


def test_a_lineage_has_its_own_model_and_key(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = '[lineages.alice]\nmodel = "alice"\napi_key_env = "NEXTSTATE_TEST_KEY"'
    write_config(home, "http://127.0.0.1:1", more)
    assert connect(home, "openai-agents", "--lineage", "alice", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "export OPENAI_DEFAULT_MODEL=alice\n" in said
    assert 'export OPENAI_API_KEY="$NEXTSTATE_TEST_KEY"\n' in said
    assert connect(home, "openai-agents", "--lineage", "bob") == 2
    assert "there is no lineage 'bob'" in capsys.readouterr().err


def test_a_settings_file_is_looked_for_where_the_agent_looks(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = {
        "OPENCLAW_STATE_DIR": ("openclaw", home / "s", home / "s/openclaw.json"),
        "OPENCLAW_CONFIG_PATH": ("openclaw", home / "c.json", home / "c.json"),
        "CODEX_HOME": ("codex", home / "x", home / "x/config.toml"),
        "XDG_CONFIG_HOME": ("opencode", home / "g", home / "g/opencode/opencode.json"),
        "OPENCODE_CONFIG": ("opencode", home / "o.json", home / "o.json"),
    }
    for name, (agent, value, file) in elsewhere.items():
        monkeypatch.setenv(name, str(value))
        assert connect(home, agent, "--dry-run") == 0
        assert str(file) in capsys.readouterr().out


def test_a_first_turn_that_is_refused_or_not_recorded_is_an_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(StoreConfig(dir=str(home / "proxy")))

    async def run() -> None:
        async with scripted_engine() as engine, running(engine.url, store, home, key=KEY) as p:
            await asyncio.wait_for(p.proxy.versions.wait_up(), 60)
            for url in (p.url, engine.url):  # without the proxy's key; no proxy at all
                write_config(home, url)
                assert await asyncio.to_thread(connect, home, "openclaw") == 2

    asyncio.run(run())
    refused, unrecorded = capsys.readouterr().err.splitlines()
    assert "answered a first turn with 401: " in refused
    assert "recorded no turn: see [privacy] record" in unrecorded
