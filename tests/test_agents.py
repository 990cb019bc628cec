"""Agent profiles: what is the person's, what is the machine's."""

from __future__ import annotations

import pytest

from nextstate.errors import PluginError
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json, TurnKind

CARRIER_TEXT = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\nx\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>"
CARRIER: Json = {"role": "user", "content": [{"type": "text", "text": CARRIER_TEXT}]}
SENT_AGAIN = (
    "[Queued user message from a previous active turn; preserved as context only. Continue with "
    "the active prompt below.]\nno,\n\nshorter please\n\nContinue the current task from the "
    "existing transcript, preserving completed work. Do not restart the task."
)


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


SYSTEM = system("You are a personal assistant running inside OpenClaw.")


@pytest.fixture
def profile() -> AgentProfile:
    return load_plugin("agents", "openclaw", None)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (user("[Sun 2026-11-22 08:38 UTC] no, shorter please"), "no, shorter please"),
        (user("[Sun 2026-11-22 08:38 UTC] Hi!\n\nRuntime: agent=main | shell=bash"), "Hi!"),
        (user("[1] is a list item"), "[1] is a list item"),
        (CARRIER, None),
        (user("[Queued user message from a previous active turn] hello"), None),
        (user(f"[Sun 2026-11-22 08:38 UTC] {SENT_AGAIN}"), "no,\n\nshorter please"),
        (user(f"{SENT_AGAIN}\n\nRuntime: agent=main"), "no,\n\nshorter please"),
        (user("Continue the current task where you left off."), None),
        (user("[Sun 2026-11-22 08:51 UTC] A background task completed. Use it."), None),
        ({"role": "tool", "content": "Continue the current task"}, "Continue the current task"),
        (user(""), None),
    ],
)
def test_only_what_a_person_or_a_tool_said_is_a_next_state(
    profile: AgentProfile, message: Json, expected: str | None
) -> None:
    assert profile.next_state_text(message) == expected


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        ([SYSTEM, user("[Sun 2026-11-22 08:38 UTC] hello"), CARRIER], TurnKind.MAIN),
        (
            [SYSTEM, user("Follow the heartbeat monitor scratch context"), CARRIER],
            TurnKind.SIDE,
        ),
        ([SYSTEM, user("hi"), user("Pre-compaction memory flush. Store")], TurnKind.SIDE),
        ([system("Generate a concise session title")], TurnKind.SIDE),
        (
            [
                {"role": "system", "content": "You are a context summarization assistant."},
                user("x"),
            ],
            TurnKind.SIDE,
        ),
        ([], TurnKind.MAIN),
    ],
)
def test_housekeeping_is_not_the_agents_work(
    profile: AgentProfile, messages: list[Json], kind: TurnKind
) -> None:
    assert profile.kind({"messages": messages}) is kind


def test_a_missing_plugin_says_where_plugins_are() -> None:
    with pytest.raises(PluginError, match=r"plugins/agents/"):
        load_plugin("agents", "nobody", None)
    with pytest.raises(PluginError, match="no function 'absent'"):
        load_plugin("agents", "plugins.agents.generic:absent", None)
