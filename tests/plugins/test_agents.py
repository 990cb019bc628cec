"""Agent profiles: which words are a person's and which are a machine's."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from judge.evidence import build_evidence
from judge.stage import task_of
from nextstate.errors import PluginError
from nextstate.hooks import AgentProfile, Evidence, JudgeSettings, load_judge, load_plugin
from nextstate.records import BASE_VERSION, Json, NextState, Source, Timings, Turn, TurnKind
from nextstate.store import Store
from plugins.agents.machine import source_of
from plugins.agents.profile import AGENTS
from proxy.capture import Capture
from proxy.exchange import Exchange, record_exchange
from proxy.linking.history import next_states, read_history
from proxy.linking.names import named_kind

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
    heard = profile.utterance(message)
    assert (heard and heard.text) == expected


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
def test_housekeeping_is_a_side_turn(
    profile: AgentProfile, messages: list[Json], kind: TurnKind
) -> None:
    assert profile.kind({"messages": messages}) is kind


def test_a_missing_plugin_says_where_plugins_are() -> None:
    with pytest.raises(PluginError, match=r"plugins/agents/"):
        load_plugin("agents", "nobody", None)
    with pytest.raises(PluginError, match="no function 'absent'"):
        load_plugin("agents", "plugins.agents.generic:absent", None)


AUTO: AgentProfile = load_plugin("agents", "auto", None)
RULES = load_judge(["rules"], JudgeSettings())
ROWS: list[Json] = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "agents.jsonl").read_text().splitlines()
]
"""Texts in the user role after a reply, by agents and by people, labelled by hand."""


def conversation(row: Json) -> Json:
    """A request that ends with the row's message."""
    begun = [system(row["system"])] if "system" in row else []
    message = {"role": "user", "content": row["content"]}
    return {"messages": [*begun, user("hi"), {"role": "assistant", "content": "Hello."}, message]}


def states_of(request: Json) -> list[NextState]:
    return next_states("t", read_history(request["messages"], AUTO.for_request(request)))


def votes(states: list[NextState]) -> tuple[int, bool]:
    """The vote of `rules` on a plain reply with these next states."""
    vote = asyncio.run(RULES.vote(Evidence((("user", "hi"),), "Hello.", tuple(states)), 1))
    return vote.score, vote.sure


@pytest.mark.parametrize("row", ROWS, ids=[f"{n}-{row['agent']}" for n, row in enumerate(ROWS)])
def test_every_labelled_text_gets_its_speaker(row: Json) -> None:
    states = states_of(conversation(row))
    assert [state.source.value for state in states] == ([row["source"]] if row["source"] else [])
    if row["source"] == "user":
        assert states[0].text == row["words"]


def test_agents_are_found_by_their_requests_alone() -> None:
    named = {
        (row["agent"], AUTO.for_request(conversation(row)).name) for row in ROWS if "system" in row
    }
    assert all(wanted == found for wanted, found in named)
    assert len(named) >= 13
    assert AUTO.for_request({"messages": [user("hello")]}).name == "generic"
    assert len({agent.name for agent in AGENTS}) == len(AGENTS)


def test_the_offline_judge_does_not_take_a_harness_for_a_person() -> None:
    for row in ROWS:
        states = states_of(conversation(row))
        if row["source"] is None:
            assert votes(states) == (0, False), row
        elif row["source"] == "environment":
            heard = [NextState("t", Source.USER, s.text, 0.9) for s in states]
            assert heard  # an observation is also a next state
            assert {s.source for s in states} == {Source.ENVIRONMENT}, row


@pytest.mark.parametrize("name", ["auto", "generic"])
def test_marks_hold_where_the_agent_is_not_known(name: str) -> None:
    profile = load_plugin("agents", name, None)
    kept = [
        row["content"]
        for row in ROWS
        if row["agent"] not in ("openclaw", "generic", "react") and row["source"] is None
        if (heard := profile.utterance(user(row["content"]))) and heard.source is Source.USER
    ]
    # A person may write this, unless the agent is Qwen Code or Claude Code.
    assert kept == ["Please continue.", "Continue from where you left off."]


def test_two_agents_at_once_are_each_read_their_own_way() -> None:
    stamped = user("[Sun 2026-11-22 08:38 UTC] no, shorter please")
    openclaw = AUTO.for_request({"messages": [SYSTEM, stamped]})
    plain = AUTO.for_request({"messages": [system("Be kind."), stamped]})
    assert [p.name for p in (openclaw, plain)] == ["openclaw", "generic"]
    assert openclaw.utterance(stamped) == (Source.USER, "no, shorter please")
    assert plain.utterance(stamped) == (Source.USER, stamped["content"])
    assert openclaw.session("abc:4") == "abc"
    assert plain.session("abc:4") == "abc:4"


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("Analyze if this message indicates a new conversation topic.", "fix it"),
        ("You are a title generator. You output ONLY a thread title.", "hello"),
        (
            "Be kind.",
            "### Task:\nName it.\n\n### Output:\nJSON\n\n<chat_history>\nx\n</chat_history>",
        ),
        ("Be kind.", "Please write a 5-10 word title for the following conversation:\nx"),
        ("Be kind.", "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff"),
        (
            "You are Qwen Code",
            "Analyze *only* the content and structure of your immediately preceding response.",
        ),
        ("You are the component that summarizes internal chat history into a structure.", "x"),
        (
            "You are a personal assistant running inside OpenClaw.",
            "Watch the oven.\nCurrent time: Monday, 9:15\nReference UTC: 2026-11-23 09:15 UTC",
        ),
    ],
)
def test_an_agents_own_requests_are_side_turns(said: str, asked: str) -> None:
    request: Json = {"messages": [system(said), user(asked)]}
    assert AUTO.for_request(request).kind(request) is TurnKind.SIDE


MEMORY = (
    "Managed memory has TWO directories. Choose which one to write each memory into.\n\n"
    "Scan the recent conversation history in your context."
)
ASIDE = "<system-reminder>{}This is a side question from the user. Answer it.</system-reminder>"
ASKED_BEHIND_THE_HISTORY: list[list[str]] = [
    [MEMORY],
    ["You are now acting as the memory extraction subagent. Analyze the most recent ~4 messages"],
    ["# Dream: Memory Consolidation\n\nYou are performing a dream"],
    [ASIDE.format(""), "what does the second flag do?"],
    [f"{ASIDE.format(chr(10))}\n\nwhat does the second flag do?"],
    ["<system-reminder>\nYou are acting as an ADVISOR\n</system-reminder>\n\nFocus on the tests"],
    ["The user stepped away and is coming back. Recap in under 40 words."],
    ["Generate a short kebab-case name (2-4 words) for this conversation."],
    ["Describe your most recent action in 3-5 words using present tense."],
    ["[SUGGESTION MODE: Suggest what the user might naturally type next.]"],
    ["First, reason in your <analysis> block. Then, produce the summary."],
    ["Please analyze the conversation history above and generate a comprehensive project summary"],
    ["Generate the recap now. Wrap it in <recap>...</recap>."],
    ["Write a brief catch-up for a user returning to this task. Return JSON."],
    ["<system-reminder>\nToday is Monday.\n</system-reminder>", MEMORY],
]


@pytest.mark.parametrize("texts", ASKED_BEHIND_THE_HISTORY, ids=range(15))
def test_an_agents_own_request_after_the_history_says_nothing_about_the_reply(
    store: Store, texts: list[str]
) -> None:
    messages = [system("You are a helper."), user("What is 3 + 4?")]
    recorded(store, "a", messages, "It is 7.")
    messages.append({"role": "assistant", "content": "It is 7."})
    parts = [{"type": "text", "text": text} for text in texts]
    aside = [*messages, {"role": "user", "content": parts}]
    assert recorded(store, "b", aside, "Nothing to save.").kind is TurnKind.SIDE
    # The same holds for the tools that it uses meanwhile.
    call = {"id": "c", "type": "function", "function": {"name": "ls", "arguments": "{}"}}
    aside += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "MEMORY.md"},
    ]
    assert recorded(store, "c", aside, "Done.").kind is TurnKind.SIDE
    assert not store.turns.next_states("a")
    told = recorded(store, "d", [*messages, user("wrong, look again")], "Yes, it is 7.")
    assert (told.parent, told.kind) == ("a", TurnKind.MAIN)
    assert [s.text for s in store.turns.next_states("a")] == ["wrong, look again"]
    # Also in a main turn these are not a person's words.
    assert AUTO.utterance({"role": "user", "content": parts}) is None


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("\nYou are the component that summarizes a conversation when its window", "go"),
        ("You are performing a managed memory dream", "Memory directory: `/m`"),
        ("You generate session recaps for a CLI.", "x"),
        ("You are a Memory Writing Agent.\n\nYour job", "x"),
        ("Write a short summary label describing what these tool calls accomplished.", "x"),
        ("You are a memory search agent.", "x"),
        ("Generate a very short topic label (2-4 words)", "hi"),
        ("Be kind.", "Write a dream diary entry from these memory fragments:\n- tea"),
    ],
)
def test_side_requests_of_newer_releases(said: str, asked: str) -> None:
    request: Json = {"messages": [system(said), user(asked)]}
    assert AUTO.for_request(request).kind(request) is TurnKind.SIDE


def test_a_side_conversation_begins_behind_the_history() -> None:
    told = {
        "role": "developer",
        "content": "You are in a side conversation, not the main thread.\nAnswer.",
    }
    assistant: Json = {"role": "assistant", "content": "Done."}
    request: Json = {"messages": [user("fix it"), assistant, told, user("why?")]}
    assert AUTO.for_request(request).kind(request) is TurnKind.SIDE


@pytest.mark.parametrize(
    "content",
    [
        "no, shorter\n--- Content from referenced files ---\nContent from @a.py:\nx = 1\n"
        "--- End of content ---",
        [
            "no, shorter",
            "\n--- Content from referenced files ---",
            "\nContent from @a.py:\n",
            "great, thanks",
            "\n--- End of content ---",
        ],
    ],
)
def test_files_that_a_person_names_are_not_their_words(content: str | list[str]) -> None:
    parts: object = content
    if not isinstance(content, str):
        parts = [{"type": "text", "text": text} for text in content]
    assert AUTO.utterance({"role": "user", "content": parts}) == (Source.USER, "no, shorter")


def test_queued_messages_are_the_persons_words(profile: AgentProfile) -> None:
    text = (
        "[Queued messages while agent was busy]\n\n---\nQueued #1\nwrong\n\n---\nQueued #2\nagain"
    )
    assert profile.utterance(user(text)) == (Source.USER, "wrong\n\nagain")


@pytest.mark.parametrize(
    "asked",
    [
        "Give this chat a title",
        "### Task:\nWrite a poem\n\n### Output:\nfour lines",
        "summarize it",
        "quota",
    ],
)
def test_a_person_may_ask_for_titles_and_summaries(asked: str) -> None:
    request: Json = {"messages": [user(asked)]}
    assert AUTO.for_request(request).kind(request) is TurnKind.MAIN


def test_a_text_that_is_repeated_letter_by_letter_is_not_a_persons() -> None:
    template = "Have a look at the list above, take the next point that is still open, then go on."
    assert len(template) >= 80
    again = [m for _ in range(3) for m in ({"role": "assistant", "content": "ok"}, user(template))]
    assert states_of({"messages": [user("go"), *again]}) == []
    once = {"messages": [user("go"), *again[:2]]}
    assert [s.source for s in states_of(once)] == [Source.USER]


RAG = "### Task:\nRespond to the user query using the provided context"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def test_a_picture_that_a_tool_made_is_what_followed() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "screenshot", "arguments": "{}"}}
    request: Json = {
        "messages": [
            user("How does it look?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": [IMAGE]},
        ]
    }
    (state,) = states_of(request)
    assert (state.source, state.text) == (Source.TOOL, "[image]")
    assert votes([state]) == (0, False)


@pytest.mark.parametrize("parts", [["No, in", "German!"], [{"text": "No, in"}, "German!", 7]])
def test_words_in_bare_parts_are_heard(parts: list[Any]) -> None:
    request: Json = {
        "messages": [
            user("Say hello"),
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": parts},
        ]
    }
    (state,) = states_of(request)
    assert (state.source, state.text) == (Source.USER, "No, in\nGerman!")


@pytest.mark.parametrize(
    ("header", "kind"),
    [("side", TurnKind.SIDE), (" SIDE ", TurnKind.SIDE), ("main", TurnKind.MAIN), ("x", None)],
)
def test_the_turn_type_header_is_read(header: str, kind: TurnKind | None) -> None:
    assert named_kind({"x-turn-type": header}) is kind
    assert named_kind({}) is None


def recorded(
    store: Store, turn: str, messages: list[Json], reply: str, kind: TurnKind | None = None
) -> Turn:
    capture = Capture()
    choice = {"index": 0, "message": {"role": "assistant", "content": reply}}
    capture.body({"model": "base", "choices": [choice | {"finish_reason": "stop"}]})
    exchange = Exchange(
        turn, "main", None, {"messages": messages}, capture, BASE_VERSION, Timings(0.0, 0.0, 0.0)
    )
    with store.recording() as recording:
        return record_exchange(recording, exchange._replace(kind=kind), AUTO)


def test_the_clients_turn_type_wins_over_the_profile(store: Store) -> None:
    hello = [user("hello")]
    assert recorded(store, "a", hello, "hi", kind=TurnKind.SIDE).kind is TurnKind.SIDE
    title = [system("You are a title generator"), user("hello")]
    assert recorded(store, "b", title, "hi", kind=TurnKind.MAIN).kind is TurnKind.MAIN
    assert recorded(store, "c", title, "hi").kind is TurnKind.SIDE


def test_an_observation_in_the_user_role_is_the_environments_from_store_to_judge(
    store: Store,
) -> None:
    thought = "THOUGHT: I look at the folder of the parser first, then at it"
    seen = "<returncode>1</returncode>\n<output>\nno such file\n</output>"
    messages = [system("```mswea_bash_command\n```"), user("Please solve this: fix the parser")]
    recorded(store, "a", messages, thought)
    messages += [
        {
            "role": "assistant",
            "content": thought,
        },
        user(seen),
    ]
    turn = recorded(store, "b", messages, "THOUGHT: gone")
    assert turn.parent == "a"
    assert [(s.source, s.text, s.trust) for s in store.turns.next_states("a")] == [
        (Source.ENVIRONMENT, seen, 0.6)
    ]
    tail = build_evidence(turn, [], 1000, profile=AUTO, tail_messages=4).tail
    assert [who for who, _ in tail] == ["system", "user", "assistant", "environment"]
    asked, steps = task_of(turn.request, AUTO)
    assert (asked, len(steps)) == ("Please solve this: fix the parser", 1)


def test_a_picture_alone_is_recorded_as_what_followed(store: Store) -> None:
    messages = [user("What a day"), {"role": "assistant", "content": "Show me a picture of it"}]
    recorded(store, "a", messages[:1], "Show me a picture of it")
    turn = recorded(store, "b", [*messages, {"role": "user", "content": [IMAGE]}], "Nice")
    assert turn.parent == "a"
    assert [s.text for s in store.turns.next_states("a")] == ["[image]"]


@pytest.mark.parametrize(
    ("before", "again", "after"),
    [
        ("", "<system-reminder>", ""),
        ("", "</system-reminder>", ""),
        ("", "<a>", "</b>"),
        ("", "<a></a>", "x"),
        ("", "[", "]"),
        ("<x ", "a", ""),
        ("", "System: [x]\n", ""),
        ("", "\n[message_id: 1]", ""),
        ("", "Sender (untrusted metadata):\n```json\n", ""),
        ("", CARRIER_TEXT.partition("\n")[0], ""),
        ("", CARRIER_TEXT, ""),
        ("a (untrusted", " ", "):"),
        ("", "[x Result", ""),
        ("", "2026-01-01 x\n", ""),
        (RAG, "</context>", ""),
        ("[Replying to", "]  ", "x"),
        ("", "<task>", "</task>"),
    ],
)
def test_reading_hostile_text_grows_no_faster_than_the_text(
    before: str, again: str, after: str
) -> None:
    messages = [user(before + n * again + after) for n in (4_000, 32_000)]

    def seconds(profile: AgentProfile, message: Json) -> float:
        taken: list[float] = []
        for _ in range(7):
            started = time.thread_time()
            profile.utterance(message)
            profile.kind({"messages": [message]})
            taken.append(time.thread_time() - started)
        return min(taken)

    for name in ("openclaw", "generic"):
        profile = load_plugin("agents", name, None)
        short, long = (seconds(profile, message) for message in messages)
        assert long < 32 * short + 0.005  # eight times the text: 64 if it were quadratic


@pytest.mark.parametrize(
    "text",
    [
        r"{'path': 'C:\docs', 'error': 'no such file'}",
        r"{'pattern': '\d+\.\w', 'quoted': 'it\'s'}",
        r"{'byte': b'\400', 'mark': '\8'}",
        "{'a': 1if 1 else 2}",
        "{'a': 0xfor 1, 'words': 'my own words'}",
        "{'ask': 'why \\is it so?'",
    ],
)
def test_no_warning_tells_of_a_text_that_looks_like_pythons(text: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        source = source_of(text)
    assert told == []
    is_one = text.endswith("}") and "1" not in text
    assert source is (Source.ENVIRONMENT if is_one else Source.USER)
