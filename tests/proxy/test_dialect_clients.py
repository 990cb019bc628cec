"""What coding agents really send: it is served through chat, means what it means to vLLM, trains.

`data/clients` holds requests that the agents sent, with their fields as they are and other words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from nextstate.app.settings import Settings
from nextstate.engine.messages_behaviour import MessagesBehaviour
from nextstate.hooks import AgentProfile, load_plugin, text_of
from nextstate.records import BASE_VERSION, Json, Timings, Turn, TurnKind
from nextstate.store import Store
from proxy.capture import Capture, distribution_change
from proxy.dialects import messages, responses
from proxy.exchange import Exchange, record_exchange
from proxy.linking.names import explicit_session, names_conversation
from tests.conftest import Done
from tests.running_loop import Engine, Loop
from tests.same_answer import answer_of, assert_same

SENT: dict[str, list[Json]] = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(__file__).parent / "data" / "clients").glob("*.json"))
}
REQUESTS = {f"{name} {i}": sent for name, made in SENT.items() for i, sent in enumerate(made)}
ASKED = [case for case in REQUESTS if "budget" not in case]
"""Without those that have room for 1,024 tokens of thoughts, as the small policy has not."""
KNOWN = MessagesBehaviour(merges_system=True, disabled_effort="none", shows_no_tools=False)
AUTO: AgentProfile = load_plugin("agents", "auto", None)
INLINE = MessagesBehaviour(merges_system=False, disabled_effort="low", shows_no_tools=False)


def chat_form(sent: Json, behaviour: MessagesBehaviour) -> tuple[Json, str | None]:
    """The request in chat form, and why it would be relayed as it is."""
    path, body = sent["path"].partition("?")[0], sent["body"]
    if path == "/v1/chat/completions":
        return body, None
    dialect = messages if path == "/v1/messages" else responses
    translation = dialect.to_chat(body, behaviour)
    return translation.chat, translation.native


@pytest.mark.parametrize("behaviour", [KNOWN, INLINE])
@pytest.mark.parametrize("case", REQUESTS)
def test_what_agents_send_goes_through_chat_and_may_train(
    case: str, behaviour: MessagesBehaviour
) -> None:
    chat, native = chat_form(REQUESTS[case], behaviour)
    assert native is None
    strict = any(tool["function"].get("strict") for tool in chat.get("tools", ()))
    change = distribution_change(chat)
    assert change == ("sampled under a grammar (strict tool)" if strict else None)


def told(sent: Json, behaviour: MessagesBehaviour, role: str) -> list[str]:
    """What a role says in the chat form."""
    found: list[str] = []
    for message in chat_form(sent, behaviour)[0]["messages"]:
        content = message.get("content") or ""
        if message["role"] == role:
            parts = [{"text": content}] if isinstance(content, str) else content
            found += [part["text"] for part in parts]
    return found


def test_the_model_reads_all_that_claude_code_says() -> None:
    first, second = SENT["claude_code"]
    assert told(first, INLINE, "system") == [
        "You are a coding agent. Be brief." * 2,
        "You are a coding agent. Be brief.",
    ]
    assert told(first, KNOWN, "system") == ["You are a coding agent. Be brief." * 3]
    assert told(second, KNOWN, "user")[-1] == "say hello with bash"
    assert told(second, KNOWN, "tool") == ["hello-there"]


def test_the_model_sees_the_tools_that_codex_has() -> None:
    chat, _ = chat_form(SENT["codex"][0], KNOWN)
    names = [tool["function"]["name"] for tool in chat["tools"]]
    assert names[:2] == ["exec_command", "multi_agent_v1__close_agent"]
    assert not any("search" in name for name in names)


@pytest.mark.parametrize("name", SENT)
def test_the_next_request_goes_on_from_the_one_before(name: str) -> None:
    main = [sent for sent in SENT[name] if sent["body"].get("tools")]
    for first, second in pairwise(main):
        one, two = (chat_form(sent, INLINE)[0]["messages"] for sent in (first, second))
        assert two[: len(one)] == one
        assert two[len(one)]["role"] == "assistant"


@pytest.mark.parametrize("thoughts", ["", "<think>I look.</think>", "I look.</think>\n\n"])
@pytest.mark.parametrize("name", SENT)
def test_the_next_request_shows_the_result_of_the_reply(
    store: Store, name: str, thoughts: str
) -> None:
    main = [sent for sent in SENT[name] if sent["body"].get("tools")]
    for n, (first, second) in enumerate(pairwise(main)):
        one, two = (chat_form(sent, INLINE)[0]["messages"] for sent in (first, second))
        reply, *after = two[len(one) :]
        reply = {**reply, "content": thoughts + (reply.get("content") or "")}
        recorded(store, f"{n} first", first, reply)
        turn = recorded(store, f"{n} second", second, {"role": "assistant", "content": f"{n}"})
        assert (turn.parent, turn.kind) == (f"{n} first", TurnKind.MAIN)
        assert [state.text for state in store.turns.next_states(f"{n} first")] == [
            text_of(message["content"]) for message in after
        ]


RESPONSES_CALL = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
MESSAGES_CALL = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
MESSAGES_IMAGE = {"type": "image", "source": {"type": "base64", "data": "AAAA"}}


def given_back(*content: Json) -> Json:
    """The Messages block of a tool's result."""
    return {"type": "tool_result", "tool_use_id": "c", "content": [*content]}


def put_out(*parts: Json) -> Json:
    """The Responses item of a tool's result."""
    return {"type": "function_call_output", "call_id": "c", "output": [*parts]}


@pytest.mark.parametrize(
    ("path", "after", "text"),
    [
        ("/v1/messages", {"role": "user", "content": [MESSAGES_IMAGE]}, "[image]"),
        ("/v1/messages", {"role": "user", "content": [given_back(MESSAGES_IMAGE)]}, "[image]"),
        (
            "/v1/messages",
            {
                "role": "user",
                "content": [given_back({"type": "text", "text": "a"}, MESSAGES_IMAGE)],
            },
            "a",
        ),
        ("/v1/responses", {"role": "user", "content": [{"type": "input_image"}]}, "[image]"),
        ("/v1/responses", {"role": "user", "content": [{"type": "input_file"}]}, "[file]"),
        ("/v1/responses", put_out({"type": "input_image", "image_url": "data:"}), "[image]"),
        (
            "/v1/responses",
            put_out({"type": "input_text", "text": "a"}, {"type": "input_image"}),
            "a",
        ),
    ],
)
def test_a_picture_is_what_followed_a_call(store: Store, path: str, after: Json, text: str) -> None:
    name = "messages" if path == "/v1/messages" else "input"
    made = (
        {"role": "assistant", "content": [MESSAGES_CALL]} if name == "messages" else RESPONSES_CALL
    )
    talk = [{"role": "user", "content": "How does it look?"}, made, after]
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    for turn, sent in (("first", talk[:1]), ("second", talk)):
        body: Json = {"model": "m", "max_tokens": 9, name: sent}
        request: Json = {"path": path, "headers": {}, "body": body}
        recorded(store, turn, request, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert [state.text for state in store.turns.next_states("first")] == [text]


def test_a_tool_that_says_nothing_is_shown_to_the_model() -> None:
    items: list[Json] = [{"role": "user", "content": "Look."}, RESPONSES_CALL, put_out()]
    chat, native = chat_form(
        {"path": "/v1/responses", "body": {"model": "m", "input": items}}, KNOWN
    )
    assert native is None
    assert chat["messages"][-1]["content"] == []


def recorded(store: Store, turn: str, sent: Json, reply: Json) -> Turn:
    """The turn of a request that the agent sent, after which it got `reply`."""
    capture = Capture()
    capture.body({"choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]})
    chat, _ = chat_form(sent, INLINE)
    named = explicit_session(sent["headers"], sent["body"])
    exchange = Exchange(turn, "main", named, chat, capture, BASE_VERSION, Timings(0.0, 0.0, 0.0))
    vague = not names_conversation(sent["headers"], sent["body"])
    with store.recording() as recording:
        return record_exchange(recording, exchange._replace(vague_name=vague), AUTO)


def smaller(sent: Json, model: str, stream: bool) -> Json:
    """The request for a small model that says nothing of its own choice."""
    body = {**sent["body"], "model": model, "temperature": 0, "stream": stream}
    for name in ("max_tokens", "max_output_tokens"):
        if name in body:
            body[name] = 12
    if "input" in body:
        body["max_output_tokens"] = 12
    if not stream:
        body.pop("stream_options", None)
    return body


@pytest.fixture(scope="module")
def compared(native_engine: Engine, ask_at_once: Callable[..., Done]) -> Done:
    """Raises in a case's place, if its answers differ."""

    def ask(case: str, stream: bool) -> int:
        body = smaller(REQUESTS[case], native_engine.model, stream)
        return assert_same(native_engine, REQUESTS[case]["path"], body, as_parsed=True).status

    return ask_at_once("compared", ask)


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("case", ASKED)
def test_an_answer_is_that_of_vllm(compared: Done, case: str, stream: bool) -> None:
    assert compared[case, stream].result() == 200


@pytest.mark.engine
@pytest.mark.parametrize("case", ASKED)
def test_a_turn_trains(loop: Loop, native_engine: Engine, case: str) -> None:
    body = smaller(REQUESTS[case], native_engine.model, True)
    del body["temperature"]
    path = REQUESTS[case]["path"]
    answer = answer_of(native_engine.proxy_url, path, body)
    assert answer.status == 200, answer
    with closing(Store(Settings.read(loop.config).store)) as store:
        turn = store.turns.get(answer.turn or "")
    assert turn is not None
    strict = case.startswith("openai_agents")
    assert turn.untrainable == ("sampled under a grammar (strict tool)" if strict else None)
