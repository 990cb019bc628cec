"""What is recorded of secrets: a placeholder in texts, and no token that could tell them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json, Timings, Turn, new_id
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.repeated import TOO_LONG
from nextstate.store import Store
from proxy.capture import Capture
from proxy.exchange import Exchange, read_exchange, record
from proxy.linking.history import RememberedMessages
from proxy.redacting import AT_START, IN_PROMPT, SOMEWHERE, UNSEARCHED

PROFILE: AgentProfile = load_plugin("agents", "generic", None)
KEY = "ghp_a8Zk2LmQ9xYt3RvB7nPw5cDfH4jK6sTuV1eG"
MAIL = "anna.schmidt@firma-nord.de"


def captured(pieces: Sequence[str], message: Json | None = None, told: bool = True) -> Capture:
    """A reply of these tokens; `told`: the engine says what each of them says."""
    entries = [
        {"logprob": -0.5 - at, **({"token": piece} if told else {})}
        for at, piece in enumerate(pieces)
    ]
    capture = Capture()
    capture.body(
        {
            "prompt_token_ids": [1, 2, 3],
            "usage": {"prompt_tokens": 3, "completion_tokens": len(pieces)},
            "choices": [
                {
                    "index": 0,
                    "message": message or {"role": "assistant", "content": "".join(pieces)},
                    "finish_reason": "stop",
                    "logprobs": {"content": entries},
                    "token_ids": [100 + at for at in range(len(pieces))],
                }
            ],
        }
    )
    return capture


class Recorder:
    """Records exchanges one after the other, as a writer does."""

    def __init__(self, store: Store, redactor: Redactor = Redactor()) -> None:  # noqa: B008
        self.store = store
        self.remembered = RememberedMessages(redactor=redactor)

    def __call__(self, messages: Sequence[Json], capture: Capture, **more: Any) -> Turn:
        request = {"model": "base", "messages": [*messages], **more}
        exchange = Exchange(
            new_id("turn"), "main", None, request, capture, 0, Timings(1.0, 0.1, 0.2)
        )
        read = read_exchange(exchange, PROFILE, self.remembered)
        with self.store.recording() as recording:
            record(recording, read)
        turn = self.store.turns.get(exchange.turn_id)
        assert turn is not None
        return turn


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def test_a_turn_without_a_secret_is_kept_as_it_is(store: Store) -> None:
    turn = Recorder(store)([user("hello")], captured(["Hi", " there"]))
    assert turn.trainable
    assert (turn.prompt_ids, turn.completion_ids) == ((1, 2, 3), (100, 101))


def test_a_secret_in_the_prompt_leaves_no_prompt_ids_and_does_not_train(store: Store) -> None:
    turn = Recorder(store)([user(f"my key is {KEY}")], captured(["Thanks", "!"]))
    assert turn.untrainable == IN_PROMPT
    # The reply may repeat the secret in other tokens.
    assert (turn.prompt_ids, turn.completion_ids, turn.behaviour_logprobs) == (None, None, None)
    assert turn.request["messages"] == [user("my key is [secret:api_key]")]
    assert turn.reply["content"] == "Thanks!"


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": KEY}}]},
        {"chat_template_kwargs": {"about": MAIL}},
        {"documents": [{"text": MAIL}]},
    ],
)
def test_a_secret_in_other_parts_of_the_prompt_counts_too(store: Store, more: Json) -> None:
    turn = Recorder(store)([user("hello")], captured(["Hi"]), **more)
    assert turn.untrainable == IN_PROMPT
    assert KEY not in json.dumps(turn.request)
    assert MAIL not in json.dumps(turn.request)


def test_a_secret_beside_the_prompt_is_replaced_and_the_turn_trains(store: Store) -> None:
    more = {"user": MAIL, "metadata": {"mail": MAIL}, "stop": [KEY]}
    turn = Recorder(store)([user("hello")], captured(["Hi"]), **more)
    assert turn.trainable
    assert turn.request["user"] == "[secret:email]"
    assert turn.sampling["stop"] == ["[secret:api_key]"]


def test_the_tokens_before_a_secret_of_the_reply_train_and_no_others(store: Store) -> None:
    pieces = ["Your key", " is", " gh", "p_a8Zk2LmQ9xYt3Rv", "B7nPw5cDfH4jK6sTuV1eG", ".", " Bye"]
    turn = Recorder(store)([user("what is it?")], captured(pieces))
    assert turn.trainable
    assert turn.completion_ids == (100, 101)
    assert turn.behaviour_logprobs == (-0.5, -1.5)
    assert turn.reply["content"] == "Your key is [secret:api_key]. Bye"


def test_a_reply_that_begins_with_a_secret_does_not_train(store: Store) -> None:
    turn = Recorder(store)([user("who?")], captured([MAIL[:5], MAIL[5:], " it is"]))
    assert turn.untrainable == AT_START
    assert turn.completion_ids is None
    assert turn.behaviour_logprobs is None


def test_a_secret_whose_tokens_are_unknown_takes_all_ids_with_it(store: Store) -> None:
    turn = Recorder(store)([user("who?")], captured(["It is ", MAIL], told=False))
    assert turn.untrainable == SOMEWHERE
    assert turn.completion_ids is None
    assert turn.reply["content"] == "It is [secret:email]"


def test_a_secret_in_a_call_is_cut_by_its_tokens(store: Store) -> None:
    arguments = json.dumps({"to": MAIL})
    pieces = ["<tool_call>", '{"name": "send", "arguments": ', arguments, "}</tool_call>"]
    call = {"id": "c", "type": "function", "function": {"name": "send", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    turn = Recorder(store)([user("send it")], captured(pieces, message))
    assert turn.completion_ids == (100, 101)
    kept = turn.reply["tool_calls"][0]["function"]["arguments"]
    assert json.loads(kept) == {"to": "[secret:email]"}


def test_a_secret_that_only_the_tokens_hold_is_cut_too(store: Store) -> None:
    pieces = ["<think>", f"her mail is {MAIL}", "</think>", "Done"]
    message = {"role": "assistant", "content": "Done"}  # the client asked for no thoughts
    turn = Recorder(store)([user("go")], captured(pieces, message))
    assert turn.completion_ids == (100,)


def test_a_history_with_secrets_is_linked_and_what_follows_is_redacted(store: Store) -> None:
    recorded = Recorder(store)
    asked = user(f"write to {MAIL}")
    first = recorded([asked], captured(["I wrote to ", MAIL]))
    reply = {"role": "assistant", "content": f"I wrote to {MAIL}"}
    second = recorded([asked, reply, user(f"no, the key {KEY} leaked")], captured(["Sorry"]))
    assert (second.parent, second.session) == (first.id, first.session)
    states = store.turns.next_states(first.id)
    assert [state.text for state in states] == ["no, the key [secret:api_key] leaked"]


def test_a_history_that_is_sent_again_is_not_searched_again(store: Store) -> None:
    class Counting(Redactor):
        __slots__ = ()

        def spans(self, text: str) -> Any:
            searched.append(text)
            return Redactor.spans(self, text)

    searched: list[str] = []
    recorded = Recorder(store, Counting())
    said = [user(f"step number {number} of {MAIL}") for number in range(20)]
    recorded(said, captured(["One"]))
    searched.clear()
    recorded([*said, user("and then the next")], captured(["Two"]))
    assert f"step number 0 of {MAIL}" not in searched
    assert "and then the next" in searched


def test_with_redaction_off_all_is_kept(store: Store) -> None:
    turn = Recorder(store, NOTHING)([user(f"my key is {KEY}")], captured(["Thanks ", MAIL]))
    assert turn.trainable
    assert KEY in turn.request["messages"][0]["content"]
    assert turn.completion_ids == (100, 101)


PASSWORD = "hunter2Xy9"


def held(store: Store, secret: str) -> bool:
    """Whether some file of the state folder holds it."""
    store.checkpoint()
    files = [path.read_bytes() for path in store.dir.rglob("*") if path.is_file()]
    return any(secret.encode() in data for data in files)


def test_a_secret_that_is_said_again_without_its_name_is_replaced_too(store: Store) -> None:
    record_ = Recorder(store)
    asked = user(f"The password is {PASSWORD}, and {PASSWORD} it stays.")
    said = f"Noted: {PASSWORD}."
    first = record_([asked], captured(["Noted: ", PASSWORD, "."]))
    assert first.reply["content"] == "Noted: [secret:password]."
    history = [asked, {"role": "assistant", "content": said}, user(f"Is {PASSWORD} long?")]
    second = record_(history, captured(["Yes, ", PASSWORD, " is."]))
    assert second.parent == first.id
    assert [one["content"] for one in second.request["messages"]] == [
        "The password is [secret:password], and [secret:password] it stays.",
        "Noted: [secret:password].",
        "Is [secret:password] long?",
    ]
    assert second.reply["content"] == "Yes, [secret:password] is."
    (state,) = store.turns.next_states(first.id)
    assert state.text == "Is [secret:password] long?"
    assert not held(store, PASSWORD)


def test_a_password_of_a_field_is_known_again_in_a_call(store: Store) -> None:
    arguments = json.dumps({"with": "tiger-lamp-7"})
    call = {"id": "c", "type": "function", "function": {"name": "login", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    part = {"type": "tool_result", "input": {"password": "tiger-lamp-7"}}
    turn = Recorder(store)([{"role": "user", "content": [part]}], captured(["x"], message))
    assert turn.reply["tool_calls"][0]["function"]["arguments"] == '{"with": "[secret:password]"}'
    assert not held(store, "tiger-lamp-7")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ('password: "elephants"', "Two elephants."),  # a word may mean something else
        ("password: ab12cd", "It is ab12cd."),  # as a short one may
        (f"password: {PASSWORD}", f"See {PASSWORD}2 and x{PASSWORD}."),
        ("no secret here", f"See {PASSWORD}."),
    ],
)
def test_what_only_looks_like_a_named_secret_stays(store: Store, asked: str, said: str) -> None:
    assert Recorder(store)([user(asked)], captured([said])).reply["content"] == said


def test_what_a_long_text_named_is_replaced_where_it_is_said_again(store: Store) -> None:
    """However far down in a tool's output it stood."""
    record_ = Recorder(store)
    output = user("line of a log\n" * 7000 + f"password: {PASSWORD}\n" + "more\n" * 9)
    turn = record_([output, user(f"Is {PASSWORD} long?")], captured(["Yes, ", PASSWORD, "."]))
    assert turn.request["messages"][1]["content"] == "Is [secret:password] long?"
    assert turn.reply["content"] == "Yes, [secret:password]."
    assert not held(store, PASSWORD)


def test_what_is_too_long_to_search_is_not_kept_in_clear_and_does_not_train(store: Store) -> None:
    hostile, record_ = "4155552671 " * 500_000, Recorder(store)
    turn = record_([user(hostile), user("hello")], captured(["Hi"]))
    assert turn.untrainable == UNSEARCHED
    assert turn.request["messages"] == [user(TOO_LONG), user(TOO_LONG)]
    assert turn.completion_ids is None
    tools = [{"type": "function", "function": {"name": "f", "description": hostile}}]
    turn = record_([user("tools")], captured(["Hi"]), tools=tools)
    assert (turn.untrainable, turn.request["tools"]) == (IN_PROMPT, [{"type": TOO_LONG}])
    turn = record_([user("fields")], captured(["Hi"]), documents=[hostile])
    assert (turn.untrainable, turn.request["documents"]) == (IN_PROMPT, TOO_LONG)
    turn = record_([user("reply")], captured([hostile, "!"]))
    assert (turn.untrainable, turn.reply["content"]) == (UNSEARCHED, TOO_LONG)
    assert not held(store, "4155552671")


def test_a_long_conversation_that_came_message_by_message_is_kept_whole(store: Store) -> None:
    record_ = Recorder(store)
    messages: list[Json] = []
    for number in range(6):  # more than is searched at once
        messages.append(user(f"{number} " + "word " * 200_000))
        turn = record_(messages, captured([f"Reply {number}"]))
        assert turn.untrainable is None
        messages.append({"role": "assistant", "content": f"Reply {number}"})
    again = Recorder(store)(messages, captured(["later"]))
    kept = [one["content"] == TOO_LONG for one in again.request["messages"]]
    assert kept.index(True) > 6
    assert all(kept[kept.index(True) :])


def test_a_picture_does_not_count_as_text(store: Store) -> None:
    url = "data:image/png;base64," + "A" * (5 << 20)
    part = {"type": "image_url", "image_url": {"url": url}}
    turn = Recorder(store)([{"role": "user", "content": [part]}], captured(["A cat"]))
    assert turn.untrainable is None
    assert turn.request["messages"][0]["content"] == [part]


def test_many_named_secrets_do_not_make_a_long_history_slow(store: Store) -> None:
    def cost(messages: int) -> float:
        asked = [
            user(" ".join(f"password: x{n}y{m}zK9" for m in range(80))) for n in range(messages)
        ]
        started = time.process_time()
        Recorder(store)(asked, captured(["Hi"]))
        return time.process_time() - started

    cost(10)
    assert cost(400) < 8 * cost(100) + 0.5  # quadratic time would be sixteenfold
