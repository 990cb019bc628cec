"""NextState's plugin in the real OpenClaw: what its gateway's turns say, and what a person says.

One conversation is held with OpenClaw's gateway, and each test looks at a part of what is stored.
`make clients` installs OpenClaw; without it the tests that need it are skipped.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.config import StoreConfig
from nextstate.records import Turn, TurnKind
from nextstate.store import Store
from tests.app.connect.openclaw_gateway import ANSWERS_WITHIN_S, PROGRAM, environment, gateway
from tests.proxy.running_proxy import running
from tests.scripted_engine import MODEL, Script, scripted_engine

PLUGIN = Path(str(files("plugins"))) / "agents" / "openclaw"
FIRST, CORRECTION, TASK, ANOTHER = (
    "Tom has 3 apples and gets 4. How many?",
    "No, I asked for a number alone.",
    "Run echo 7 for me.",
    "Read HEARTBEAT.md to me.",  # without the plugin it looks like a heartbeat
)
HINT = "Say what the command printed."
CALL = {
    "index": 0,
    "id": "call_1",
    "type": "function",
    "function": {"name": "exec", "arguments": json.dumps({"command": "echo 7"})},
}

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PROGRAM.exists(), reason="OpenClaw is not installed: `make clients`"),
]


@dataclass
class Talk:
    """What was said in the conversation, and what the proxy stored of it."""

    store: Store
    told: dict[str, str] = field(default_factory=dict[str, str])
    """What a command answered in the chat."""
    named: list[str] = field(default_factory=list[str])
    """The sessions in the headers of OpenClaw's requests."""
    keyed: int = 0
    """The number of requests with a key of their conversation, `prompt_cache_key`."""
    before: str = ""
    """OpenClaw's settings before they were connected, and after they were restored."""
    after: str = ""

    def turns(self) -> list[Turn]:
        found = [self.store.turns.get(turn_id) for turn_id in self.store.turns.ids()]
        return [t for t in found if t is not None and not t.session.startswith("nextstate-")]

    def main(self) -> list[Turn]:
        return [turn for turn in self.turns() if turn.kind is TurnKind.MAIN]

    def heard(self, turn: Turn) -> list[tuple[str, str]]:
        """(source, text) of what followed."""
        return [(s.source.value, s.text) for s in self.store.turns.next_states(turn.id)]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Talk:
    home = tmp_path_factory.mktemp("openclaw")
    settings, config = home / ".openclaw/openclaw.json", home / "nextstate.toml"
    settings.parent.mkdir()
    (home / "workspace").mkdir()
    before = f"// mine\n{{\n  agents: {{ defaults: {{ workspace: '{home}/workspace' }} }}, //\n}}\n"
    settings.write_text(before)
    talk = Talk(Store(StoreConfig(dir=str(home / "state"))), before=before)
    command = ["connect", "openclaw", "--file", str(settings), "--config", str(config)]

    async def hold() -> None:
        async with (
            scripted_engine() as engine,
            running(engine.url, talk.store, home, profile="auto") as proxy,
        ):
            engine.context = 65_536
            await asyncio.wait_for(proxy.proxy.versions.wait_up(), 60)
            config.write_text(
                f'[store]\ndir = "{home}/none"\n[engine]\nmodel = "{MODEL}"\n'
                f"[proxy]\nport = {proxy.url.rpartition(':')[2]}\n"
            )
            assert await asyncio.to_thread(main, [*command, "--plugin"]) == 0
            async with gateway(home, home) as chat:
                engine.script = Script(("It", " is", " 7"))
                await chat.say(FIRST)
                await chat.say(CORRECTION)
                engine.queue.append(Script(("",), tool_calls=[CALL], finish_reason="tool_calls"))
                engine.queue.append(Script(("I", " ran", " it")))
                await chat.say(TASK)
                asked = len(engine.requests)
                await chat.call("wake", mode="now", text="Look around.")
                async with asyncio.timeout(ANSWERS_WITHIN_S):
                    while len(engine.requests) == asked:
                        await asyncio.sleep(0.05)
                talk.told["bad"] = await chat.say(f"/bad {HINT}")
                await chat.say("/new")
                await chat.say(ANOTHER)
                talk.told["good"] = await chat.say("/good")
            talk.keyed = sum("prompt_cache_key" in body for body in engine.requests)
            headers = [{k.lower(): v for k, v in one.items()} for one in engine.headers[1:]]
            talk.named += [one["x-session-id"] for one in headers if "x-session-id" in one]

    asyncio.run(hold())
    assert main([*command, "--undo"]) == 0
    talk.after = settings.read_text()
    return talk


def test_openclaw_leaves_its_settings_alone_and_undo_restores_every_byte(talk: Talk) -> None:
    assert talk.after == talk.before


def test_a_correction_is_what_followed_the_first_turn(talk: Talk) -> None:
    first, second, *_ = talk.main()
    assert talk.heard(first) == [("user", CORRECTION)]
    assert talk.heard(second) == [("user", TASK)]
    assert second.parent == first.id
    assert second.session == first.session


def test_a_tools_output_is_what_followed_the_call(talk: Talk) -> None:
    _, _, call, answer, *_ = talk.main()
    assert [source for source, _ in talk.heard(call)] == ["tool"]
    assert "7" in talk.heard(call)[0][1]
    assert answer.parent == call.id


def test_bad_is_about_the_answer_and_its_words_are_the_hint(talk: Talk) -> None:
    answer = talk.main()[3]
    feedback = talk.store.judging.feedback(answer.id)
    assert feedback is not None
    assert (feedback.score, feedback.hint) == (-1, HINT)
    assert talk.told["bad"] == "Noted: that reply was bad."
    assert talk.heard(answer) == [], "feedback is not said twice"


def test_the_kind_of_a_turn_is_what_started_it_and_not_its_words(talk: Talk) -> None:
    assert len(talk.main()) == 5
    sides = [turn for turn in talk.turns() if turn.kind is TurnKind.SIDE]
    assert {turn.session for turn in sides} == {talk.main()[0].session}


def test_each_turn_of_a_run_names_openclaws_session(talk: Talk) -> None:
    assert len(talk.named) == 6
    assert len({*talk.named}) == 1, "a reset keeps the name"
    assert talk.keyed, "so that turns are linked without the plugin too"


def test_a_reset_begins_another_session_and_good_is_about_its_answer(talk: Talk) -> None:
    *_, before, after = talk.main()
    assert after.session != before.session
    assert after.parent is None
    feedback = talk.store.judging.feedback(after.id)
    assert feedback is not None
    assert feedback.score == 1


def test_its_files_are_those_that_its_package_names() -> None:
    package = json.loads((PLUGIN / "package.json").read_text())
    manifest = json.loads((PLUGIN / "openclaw.plugin.json").read_text())
    assert {"package.json", *package["files"]} == {file.name for file in PLUGIN.iterdir()}
    assert package["version"] == manifest["version"]


@pytest.mark.soak
def test_openclaw_installs_the_packed_plugin_and_loads_it(tmp_path: Path) -> None:
    (tmp_path / ".openclaw").mkdir()
    (tmp_path / ".openclaw/openclaw.json").write_text("{}")

    def ran(*argv: str) -> str:
        done = subprocess.run(
            argv,
            cwd=tmp_path,
            env=environment(tmp_path),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWERS_WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    packed = ran("npm", "pack", "--silent", str(PLUGIN)).strip()
    ran(str(PROGRAM), "plugins", "install", packed, "--force", "--accept-capabilities")
    (copy,) = tmp_path.glob(".openclaw/extensions/*/")
    assert {file.name for file in copy.iterdir()} >= {file.name for file in PLUGIN.iterdir()}
    listed = json.loads(ran(str(PROGRAM), "plugins", "list", "--json"))
    (ours,) = [one for one in listed["plugins"] if one["id"] == "nextstate"]
    assert (ours["enabled"], ours["status"]) == (True, "loaded")
