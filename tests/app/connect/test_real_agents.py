"""The real agents read the settings that `nextstate connect` wrote, and their turns arrive.

`make clients` installs them; an agent that is not there is not tested.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.records import TurnKind
from nextstate.store import Store
from tests.proxy.running_proxy import running
from tests.scripted_engine import MODEL, scripted_engine

NODE = Path(__file__).parents[3] / ".clients/node_modules"
ANSWERS_WITHIN_S = 280
SAID = "Tom has 3 apples."


@dataclass(frozen=True)
class Agent:
    name: str
    file: str
    before: str
    program: str
    arguments: tuple[str, ...]
    accepts: tuple[str, ...] = ()
    """The agent's own check of its settings."""
    names_sessions: bool = False
    context: int = 65_536
    """Tokens that the engine tells."""


AGENTS = (
    Agent(
        "openclaw",
        ".openclaw/openclaw.json",
        "// mine\n{\n  agents: { defaults: { workspace: 'HOME/workspace' } }, // here\n}\n",
        ".bin/openclaw",
        ("agent", "--local", "--session-id", "talk", "--message", SAID),
        ("config", "validate"),
        names_sessions=True,
    ),
    Agent(
        "codex",
        ".codex/config.toml",
        '# mine\nmodel = "other"  # before\n\n[tui]\nanimations = false\n',
        ".bin/codex",
        ("exec", "--skip-git-repo-check", SAID),
    ),
    Agent(
        "qwen-code",
        ".qwen/settings.json",
        '{\n  // mine\n  "ui": { "hideTips": true },\n  "$version": 4\n}\n',
        ".bin/qwen",
        ("-p", SAID),
    ),
    Agent(
        "opencode",
        ".config/opencode/opencode.jsonc",
        '{\n  // mine\n  "$schema": "https://opencode.ai/config.json",\n  "share": "disabled"\n}\n',
        "opencode-linux-x64/bin/opencode",
        ("run", SAID),
    ),
)


def if_installed(agent: Agent, *marks: pytest.MarkDecorator, speaks: bool = True) -> object:
    reason = f"{agent.name} is not installed: `make clients` does it"
    missing = pytest.mark.skipif(not (NODE / agent.program).exists(), reason=reason)
    name = f"{agent.name}-{agent.context}" + ("" if speaks else "-settings")
    return pytest.param(agent, speaks, marks=[missing, *marks], id=name)


OPENCLAW, *OTHERS = AGENTS
SMALL = replace(OPENCLAW, context=8192)
CASES = [
    *map(if_installed, OTHERS),
    if_installed(OPENCLAW, speaks=False),
    if_installed(SMALL, speaks=False),
    if_installed(OPENCLAW, pytest.mark.soak),
    if_installed(SMALL, pytest.mark.soak),
]
"""OpenClaw takes half a minute of CPU time to answer. By settings that `nextstate connect` wrote it
talks in test_openclaw_plugin.py, so here it is only asked whether it accepts them."""


def run(agent: Agent, home: Path, *arguments: str) -> None:
    """Runs the agent until it ends, with nothing in its environment but a path and a home."""
    path = os.pathsep.join([str(NODE / ".bin"), os.environ["PATH"]])
    done = subprocess.run(
        [str(NODE / agent.program), *arguments],
        env={"PATH": path, "HOME": str(home)},
        cwd=home / "workspace",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANSWERS_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("agent", "speaks"), CASES)
def test_a_real_agent_reads_its_settings_and_its_file_comes_back(
    agent: Agent, speaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file, config = tmp_path / agent.file, tmp_path / "nextstate.toml"
    file.parent.mkdir(parents=True)
    (tmp_path / "workspace").mkdir()
    before = agent.before.replace("HOME", str(tmp_path))
    file.write_text(before)
    store = Store(StoreConfig(dir=str(tmp_path / "state")))
    command = ["connect", agent.name, "--file", str(file), "--config", str(config)]

    async def talk() -> None:
        async with scripted_engine() as engine, running(engine.url, store, tmp_path) as proxy:
            engine.context = agent.context
            await asyncio.wait_for(proxy.proxy.versions.wait_up(), 60)
            port = proxy.url.rpartition(":")[2]
            config.write_text(
                f'[store]\ndir = "{tmp_path}/none"\n[engine]\nmodel = "{MODEL}"\n'
                f"[proxy]\nport = {port}\n"
            )
            assert await asyncio.to_thread(main, command) == 0
            if agent.accepts:
                await asyncio.to_thread(run, agent, tmp_path, *agent.accepts)
            if speaks:
                await asyncio.to_thread(run, agent, tmp_path, *agent.arguments)
                named = [body for body in engine.requests if body.get("prompt_cache_key")]
                assert not agent.names_sessions or named
                if agent is SMALL:
                    (asked,) = named[:1]
                    assert "tools" not in asked
                    assert len(str(asked["messages"])) < 12_000, "about 2000 tokens"
                    assert asked["max_completion_tokens"] == 256, asked.keys()

    asyncio.run(talk())
    turns = [turn for turn in map(store.turns.get, store.turns.ids()) if turn is not None]
    said = [turn for turn in turns if not turn.session.startswith("nextstate-")]
    assert speaks == any(turn.kind is TurnKind.MAIN for turn in said)
    assert main([*command, "--undo"]) == 0
    assert file.read_text() == before
