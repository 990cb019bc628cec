"""The agents that people use, from their registries, talk to a real vLLM through the proxy.

`make clients` installs them into `.clients`; an agent that is not there is not tested. Each is
asked something, and then told that it was right. Each has a home of its own and the proxy as its
only provider.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from demo.course import MODEL
from nextstate.app.connect.agents import ENVIRONMENT_AGENTS
from nextstate.app.connect.target import Target
from nextstate.engine.process import free_port
from nextstate.records import Json
from tests.app.connect.openclaw_gateway import LESS
from tests.chain_policy import CONTEXT, save_chain_policy
from tests.running_loop import Loop, wait_for, write_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

INSTALLED = Path(__file__).parents[2] / ".clients"
NODE = INSTALLED / "node_modules"
QUESTION = "Tom has 3 apples and gets 4 more. How many are there?"
ANSWERS_WITHIN_S = 240
PRAISE = "Thanks, that is right! And with 2 more?"


def call(tool: str, arguments: Json) -> tuple[str, ...]:
    """A tool call as the hermes parser reads it, in three tokens."""
    said = json.dumps({"name": tool, "arguments": arguments})
    return "<tool_call>", f"\n{said}\n", "</tool_call>"


REPLIES = (
    ("That", " makes", " seven", "."),
    ("You", " have", " seven", " apples", "."),
    call("bash", {"command": "echo 7"}),
    call("exec_command", {"cmd": "echo 7"}),
)
"""To an agent without such a tool a call is a mistake, of which it tells the model."""


@dataclass(frozen=True)
class Agent:
    """One program: what runs it with a question, and then again in the same session."""

    name: str
    needs: Path
    """What `make clients` installs of it."""
    program: Path
    arguments: tuple[str, ...]
    """`{said}` stands for the words, `{url}` for the proxy, `{home}` for its own folder."""
    again: tuple[str, ...] | None
    """None: it works on its task alone, and nobody answers it."""
    env: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, str] = field(default_factory=dict[str, str])
    """What it finds in its home."""


def lines(name: str) -> dict[str, str]:
    """The variables that `nextstate connect NAME` prints."""
    agent = next(agent for agent in ENVIRONMENT_AGENTS if agent.name == name)
    target = Target("{url}", MODEL, context=CONTEXT)
    return {**agent.variables(target), agent.key_variable: "unused"}


_CODEX = (
    *("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"),
    *("-c", f"model={MODEL}", "-c", "model_provider=here", "-c"),
    'model_providers.here={name="here",base_url="{url}/v1",env_key="KEY",wire_api="responses"}',
)
_CLAUDE = ("--dangerously-skip-permissions",)
_QWEN = ("--auth-type", "openai", "--yolo")
_OPENCLAW = ("agent", "--local", "--session-id", "talk", "--message", "{said}")
_OPENCLAW_FILE = {
    "models": {
        "providers": {
            "here": {
                "baseUrl": "{url}/v1",
                "apiKey": "unused",
                "api": "openai-completions",
                "models": [{"id": MODEL, "name": MODEL, "contextWindow": CONTEXT}],
            }
        }
    },
    "agents": {
        "defaults": {"model": {"primary": f"here/{MODEL}"}, "workspace": "{home}/workspace"}
    },
    **LESS,
}
_MINI = (
    *("-m", "minisweagent.run.mini", "-y", "--exit-immediately", "-m", f"openai/{MODEL}"),
    *("-t", "{said}", "-c", "mini.yaml", "-c", "model.model_kwargs.api_base={url}/v1"),
    *("-c", "model.cost_tracking=ignore_errors", "-c", "agent.step_limit=25"),
    *("-c", "agent.max_consecutive_format_errors=0", "-o", "{home}/steps.json"),
)
AGENTS = (
    Agent(
        "claude-code",
        NODE / "@anthropic-ai/claude-code-linux-x64/claude",
        NODE / "@anthropic-ai/claude-code-linux-x64/claude",
        ("-p", "{said}", *_CLAUDE),
        ("-p", "{said}", "--continue", *_CLAUDE),
        lines("claude-code") | {"IS_SANDBOX": "1"},
    ),
    Agent(
        "codex",
        NODE / ".bin/codex",
        NODE / ".bin/codex",
        ("exec", *_CODEX, "{said}"),
        ("exec", "resume", "--last", *_CODEX, "{said}"),
        {"KEY": "unused"},
    ),
    Agent(
        "qwen-code",
        NODE / ".bin/qwen",
        NODE / ".bin/qwen",
        (*_QWEN, "-p", "{said}"),
        (*_QWEN, "--continue", "-p", "{said}"),
        {"OPENAI_BASE_URL": "{url}/v1", "OPENAI_API_KEY": "unused", "OPENAI_MODEL": MODEL},
    ),
    Agent(
        "openclaw",
        NODE / ".bin/openclaw",
        NODE / ".bin/openclaw",
        _OPENCLAW,
        _OPENCLAW,
        files={".openclaw/openclaw.json": json.dumps(_OPENCLAW_FILE)},
    ),
    Agent(
        "mini-swe-agent",
        INSTALLED / "python/minisweagent",
        Path(sys.executable),
        _MINI,
        None,
        {
            "MSWEA_CONFIGURED": "true",
            "OPENAI_API_KEY": "unused",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "PYTHONPATH": str(INSTALLED / "python"),
        },
    ),
)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A loop whose policy answers prompts as long as agents send them."""
    folder = tmp_path_factory.mktemp("clients")
    save_chain_policy(folder / "policy", REPLIES)
    port = free_port()
    config = write_config(folder, port=port, policy=folder / "policy", context=CONTEXT)
    loop = Loop(config, port, trains=False)
    try:
        loop.wait_ready()
        yield loop
    finally:
        loop.close()


def run(agent: Agent, arguments: tuple[str, ...], home: Path, url: str, said: str) -> None:
    """Runs the agent until it has answered."""

    def filled(text: str) -> str:
        return text.replace("{url}", url).replace("{home}", str(home)).replace("{said}", said)

    for name, text in agent.files.items():
        file = home / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(filled(text))
    workspace = home / "workspace"
    workspace.mkdir(exist_ok=True)
    path = os.pathsep.join([str(NODE / ".bin"), os.environ["PATH"]])
    env = {name: filled(value) for name, value in agent.env.items()}
    done = subprocess.run(
        [str(agent.program), *map(filled, arguments)],
        env={"PATH": path, "HOME": str(home), **env},
        cwd=workspace,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANSWERS_WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def if_installed(agent: Agent) -> Any:
    """The agent as a parameter; where it is not installed, no vLLM starts for it either."""
    reason = f"{agent.name} is not installed: `make clients` does it"
    missing = pytest.mark.skipif(not agent.needs.exists(), reason=reason)
    return pytest.param(agent, marks=missing, id=agent.name)


@pytest.mark.parametrize("agent", [if_installed(agent) for agent in AGENTS])
def test_the_turns_of_a_real_agent_are_linked_judged_and_trainable(
    agent: Agent, talks: Loop, tmp_path: Path
) -> None:
    earlier = {turn["turn"] for turn in talks.turns()}
    run(agent, agent.arguments, tmp_path, talks.url, QUESTION)
    if agent.again is not None:
        run(agent, agent.again, tmp_path, talks.url, PRAISE)

    def turns() -> list[Json]:
        return [t for t in talks.turns() if t["turn"] not in earlier and t["kind"] == "main"]

    def judged() -> bool:
        return all(t["verdict"] is not None for t in turns() if t["next_state"])

    wait_for(judged, 60)
    found = turns()
    assert [t["reason"] for t in found if not t["trainable"]] == []
    said = [state for turn in found for state in turn["next_state"] if state["source"] == "user"]
    if agent.again is None:
        # A reply without a call of its tool it drops, so what it says of that follows nothing.
        assert said == [], "nobody spoke to it"
        assert any("7" in state["text"] for turn in found for state in turn["next_state"])
        return
    assert [state["text"] for state in said] == [PRAISE]
    praised = next(turn for turn in found if said[0] in turn["next_state"])
    assert praised["verdict"]["score"] == 1
    sessions: dict[str, list[Json]] = {}
    for turn in found:
        sessions.setdefault(turn["session"], []).append(turn)
    assert [t for one in sessions.values() for t in one[:-1] if not t["next_state"]] == []
