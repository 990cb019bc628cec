"""The official SDKs, unmodified, through the proxy to vLLM: what they read, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import openai
import pytest

from nextstate.app.settings import Settings
from nextstate.records import Json, Source, Turn
from nextstate.store import Store
from tests.running_loop import Engine, Loop

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(find_spec("anthropic") is None, reason="it comes with vLLM"),
]

APPLES = "Tom has 3 apples and gets 4 more. How many apples does Tom have?"
ASKED: list[Any] = [{"role": "user", "content": APPLES}]
NEXT: Any = {"role": "user", "content": "Thanks. And two more?"}
CALL = '<tool_call>{"name":"clock","arguments":{"zone":"Köln"}}</tool_call>'
PARAMETERS: Json = {"type": "object", "properties": {"zone": {"type": "string"}}}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": PARAMETERS}}
SCRIPT: Json = {"structured_outputs": {"choice": [CALL]}}
"""Makes the tiny policy call the tool."""
EXACT: Any = {"name": "clock", "input_schema": {"enum": [{"zone": "Köln"}]}, "strict": True}
PLAIN_AND_STREAM = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])

NewTurns = Callable[[], list[Turn]]


@pytest.fixture(scope="module")
def store(loop: Loop) -> Iterator[Store]:
    """The loop's own store."""
    opened = Store(Settings.read(loop.config).store)
    yield opened
    opened.close()


@pytest.fixture
def new_turns(store: Store) -> NewTurns:
    """What was recorded since the test began, which holds once a reply's end has been seen."""
    before = store.turns.ids()

    def found() -> list[Turn]:
        turns = [store.turns.get(turn) for turn in store.turns.ids()[len(before) :]]
        return [turn for turn in turns if turn is not None]

    return found


@pytest.fixture(scope="module")
def gpt(native_engine: Engine) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    url = f"{native_engine.proxy_url}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(native_engine: Engine) -> Iterator[Any]:
    """Anthropic's client."""
    import anthropic  # takes seconds, also of a run that only reads this file

    url = native_engine.proxy_url
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(native_engine: Engine) -> str:
    return native_engine.model


def chat(gpt: openai.OpenAI, model: str, messages: list[Any], stream: bool, **more: Any) -> Any:
    """The reply's message."""
    asked: Any = {"model": model, "messages": messages, "max_tokens": 8, **more}
    if not stream:
        return gpt.chat.completions.create(**asked).choices[0].message
    with gpt.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        return events.current_completion_snapshot.choices[0].message


def message(claude: Any, model: str, messages: list[Any], stream: bool, **more: Any) -> Any:
    asked: Any = {"model": model, "messages": messages, "max_tokens": 8, **more}
    if not stream:
        return claude.messages.create(**asked)
    with claude.messages.stream(**asked) as events:
        return events.get_final_message()


def response(gpt: openai.OpenAI, model: str, given: list[Any], stream: bool, **more: Any) -> Any:
    asked: Any = {"model": model, "input": given, "max_output_tokens": 8, **more}
    if not stream:
        return gpt.responses.create(**asked)
    with gpt.responses.stream(**asked) as events:
        return events.get_final_response()


def assert_kept(turn: Turn, said: str, reason: str | None = None) -> None:
    """The turn holds what the client read; and trains, unless there is a reason."""
    assert turn.reply["content"] == said
    assert turn.policy_version == 0
    if reason is None:
        assert turn.untrainable is None
    else:
        assert reason in (turn.untrainable or "")


def assert_linked(store: Store, turns: list[Turn], source: Source, text: str) -> None:
    first, second = turns
    assert second.parent == first.id
    assert second.session == first.session
    assert (first.index, second.index) == (0, 1)
    assert [(s.source, s.text) for s in store.turns.next_states(first.id)] == [(source, text)]


@PLAIN_AND_STREAM
def test_a_chat_conversation(
    gpt: openai.OpenAI, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    first = chat(gpt, model, ASKED, stream)
    history = [*ASKED, {"role": "assistant", "content": first.content}, NEXT]
    second = chat(gpt, model, history, stream)
    turns = new_turns()
    for turn, said in zip(turns, (first, second), strict=True):
        assert_kept(turn, said.content)
    assert_linked(store, turns, Source.USER, NEXT["content"])


@PLAIN_AND_STREAM
def test_a_chat_with_a_tool(
    gpt: openai.OpenAI, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    more: Any = {"tools": [CLOCK], "max_tokens": 99}
    called = chat(gpt, model, ASKED, stream, **more, extra_body=SCRIPT)
    (call,) = called.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("clock", {"zone": "Köln"})
    told = {"role": "tool", "tool_call_id": call.id, "content": "12:00"}
    more["max_tokens"] = 4
    said = chat(gpt, model, [*ASKED, called, told], stream, **more)
    first, second = new_turns()
    assert "structured_outputs" in (first.untrainable or "")
    assert first.reply["tool_calls"][0]["function"]["name"] == "clock"
    assert_kept(second, said.content or "")
    assert_linked(store, [first, second], Source.TOOL, "12:00")


def test_two_choices_are_kept_and_do_not_train(
    gpt: openai.OpenAI, model: str, new_turns: NewTurns
) -> None:
    plain = gpt.chat.completions.create(model=model, messages=ASKED, n=2, max_tokens=6)
    assert [choice.index for choice in plain.choices] == [0, 1]
    said = ["", ""]
    for chunk in gpt.chat.completions.create(
        model=model, messages=ASKED, n=2, max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    for turn, text in zip(new_turns(), (plain.choices[0].message.content, said[0]), strict=True):
        assert_kept(turn, text or "", "2 choices")


@PLAIN_AND_STREAM
def test_a_completion(gpt: openai.OpenAI, model: str, new_turns: NewTurns, stream: bool) -> None:
    if stream:
        chunks = gpt.completions.create(model=model, prompt=APPLES, max_tokens=8, stream=True)
        said = "".join(chunk.choices[0].text for chunk in chunks)
    else:
        reply = gpt.completions.create(model=model, prompt=APPLES, max_tokens=8)
        said = reply.choices[0].text
    (turn,) = new_turns()
    assert_kept(turn, said)


@PLAIN_AND_STREAM
def test_a_responses_conversation(
    gpt: openai.OpenAI, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    first = response(gpt, model, ASKED, stream)
    second = response(gpt, model, [*ASKED, *first.output, NEXT], stream)
    turns = new_turns()
    for turn, said in zip(turns, (first, second), strict=True):
        assert_kept(turn, said.output_text)
    assert_linked(store, turns, Source.USER, NEXT["content"])


@PLAIN_AND_STREAM
def test_a_response_with_a_tool(
    gpt: openai.OpenAI, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    more: Any = {"tools": [{"type": "function", **CLOCK["function"]}]}
    if not stream:
        more["tools"][0]["strict"] = False
    scripted = {"max_output_tokens": 99, "extra_body": SCRIPT}
    called = response(gpt, model, ASKED, stream, **more, **scripted)
    (call,) = called.output
    assert (call.name, json.loads(call.arguments)) == ("clock", {"zone": "Köln"})
    told = {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}
    said = response(gpt, model, [*ASKED, call, told], stream, **more, max_output_tokens=4)
    first, second = new_turns()
    assert "structured_outputs" in (first.untrainable or "")
    assert_kept(second, said.output_text)
    assert_linked(store, [first, second], Source.TOOL, "12:00")


@PLAIN_AND_STREAM
def test_a_messages_conversation(
    claude: Any, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    first = message(claude, model, ASKED, stream)
    history = [*ASKED, {"role": "assistant", "content": first.content}, NEXT]
    second = message(claude, model, history, stream)
    turns = new_turns()
    for turn, said in zip(turns, (first, second), strict=True):
        assert_kept(turn, "".join(block.text for block in said.content))
    assert_linked(store, turns, Source.USER, NEXT["content"])


@PLAIN_AND_STREAM
def test_a_message_with_a_tool(
    claude: Any, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    forced: Any = {"tools": [EXACT], "tool_choice": {"type": "any"}, "max_tokens": 99}
    called = message(claude, model, ASKED, stream, **forced)
    (call,) = called.content
    assert (call.type, call.name, call.input) == ("tool_use", "clock", {"zone": "Köln"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "12:00"}
    told = [{"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
    said = message(claude, model, [*ASKED, *told], stream)
    first, second = new_turns()
    assert "forced tool call" in (first.untrainable or "")
    assert_kept(second, "".join(block.text for block in said.content))
    assert_linked(store, [first, second], Source.TOOL, "12:00")


@PLAIN_AND_STREAM
def test_a_conversation_with_system_messages_in_it(
    claude: Any, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    """As Claude Code has it."""
    begun = [*ASKED, {"role": "system", "content": "Two agents are there."}]
    more: Any = {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "disabled"},
        "tools": [],
        "extra_body": {"context_management": {"edits": []}},
    }
    first = message(claude, model, begun, stream, **more)
    history = [*begun, {"role": "assistant", "content": first.content}, NEXT]
    second = message(claude, model, history, stream, **more)
    turns = new_turns()
    for turn, said in zip(turns, (first, second), strict=True):
        assert_kept(turn, "".join(block.text for block in said.content))
    assert_linked(store, turns, Source.USER, NEXT["content"])


@PLAIN_AND_STREAM
def test_a_response_with_tools_of_other_kinds(
    gpt: openai.OpenAI, model: str, store: Store, new_turns: NewTurns, stream: bool
) -> None:
    """As Codex has them: a custom tool's input is its own text, a namespace stands by itself."""
    agents: Json = {"type": "namespace", "name": "agents", "description": "Others"}
    agents["tools"] = [{"type": "function", **CLOCK["function"], "strict": False}]
    tools = [{"type": "custom", "name": "patch"}, agents, {"type": "web_search"}]
    calls = [
        '<tool_call>{"name":"patch","arguments":{"input":"+ \\"ü\\"\\n- 🧮"}}</tool_call>',
        '<tool_call>{"name":"agents__clock","arguments":{"zone":"Köln"}}</tool_call>',
    ]
    scripted: Any = {"structured_outputs": {"choice": ["".join(calls)]}}
    more: Any = {"tools": tools, "max_output_tokens": 160}
    called = response(gpt, model, ASKED, stream, **more, extra_body=scripted)
    patch, clock = called.output
    assert (patch.type, patch.name, patch.input) == ("custom_tool_call", "patch", '+ "ü"\n- 🧮')
    assert (clock.name, clock.namespace) == ("clock", "agents")
    told = [
        {"type": "custom_tool_call_output", "call_id": patch.call_id, "output": "Done."},
        {"type": "function_call_output", "call_id": clock.call_id, "output": "12:00"},
    ]
    history = [*ASKED, *(item.model_dump(exclude_none=True) for item in called.output), *told]
    said = response(gpt, model, history, stream, tools=tools, max_output_tokens=4)
    first, second = new_turns()
    assert_kept(second, said.output_text)
    assert second.parent == first.id
    assert [state.text for state in store.turns.next_states(first.id)] == ["Done.", "12:00"]


def test_counting_tokens_makes_no_turn(claude: Any, model: str, new_turns: NewTurns) -> None:
    counted = claude.messages.count_tokens(model=model, messages=ASKED)
    asked = message(claude, model, ASKED, stream=False)
    assert counted.input_tokens == asked.usage.input_tokens
    assert len(new_turns()) == 1


def test_the_command_line_shows_the_turns_as_they_are_linked(
    loop: Loop, gpt: openai.OpenAI, model: str, new_turns: NewTurns
) -> None:
    first = chat(gpt, model, ASKED, True)
    history = [*ASKED, {"role": "assistant", "content": first.content}, NEXT]
    chat(gpt, model, history, True, extra_body={"min_tokens": 2})
    turns = new_turns()
    shown = {turn["turn"]: turn for turn in loop.turns()}
    one, two = (shown[turn.id] for turn in turns)
    assert one["session"] == two["session"]
    assert (one["index"], two["index"]) == (0, 1)
    assert one["next_state"] == [{"source": "user", "text": NEXT["content"]}]
    assert (one["trainable"], one["reason"]) == (True, None)
    assert (two["trainable"], two["next_state"]) == (False, [])
    assert "min_tokens = 2" in two["reason"]
