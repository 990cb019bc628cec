"""Sessions and next states found by content alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nextstate.records import Json, Source
from plugins.agents.profile import GENERIC, Profile
from proxy.linking.continuation import (
    canonical_reply,
    explicit_session,
    message_hashes,
    next_states,
    place_of,
    reply_keys,
    said,
)


def assistant(text: str | None, *calls: tuple[str, str]) -> Json:
    message: Json = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"call-{n}", "type": "function", "function": {"name": name, "arguments": args}}
            for n, (name, args) in enumerate(calls)
        ]
    return message


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def test_thinking_white_space_and_call_ids_do_not_matter() -> None:
    assert canonical_reply(assistant("<think>hm</think>\n\nYes. ")) == canonical_reply(
        assistant("Yes.")
    )
    assert canonical_reply(
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    ) == (canonical_reply(assistant("Yes.")))
    one, other = assistant(None, ("ls", '{"a": 1, "b": 2}')), assistant("", ("ls", '{"b":2,"a":1}'))
    other["tool_calls"][0]["id"] = "callx"
    assert canonical_reply(one) == canonical_reply(other)


def test_text_tool_names_and_arguments_do_matter() -> None:
    different = [
        assistant("Yes."),
        assistant("No."),
        assistant("", ("ls", "{}")),
        assistant("", ("rm", "{}")),
        assistant("", ("ls", '{"a":1}')),
        assistant("", ("ls", "{}"), ("ls", "{}")),
        assistant("", ("ls", "not json")),
    ]
    assert len({canonical_reply(m) for m in different}) == len(different)


def test_what_was_said_is_known_in_words_and_to_the_letter() -> None:
    def before(*messages: Json) -> tuple[bytes, bytes, int]:
        history = [*messages, assistant("Yes."), user("next")]
        read = [one and one.text for one in map(Profile(GENERIC).utterance, history)]
        found, in_all = said(history, message_hashes(history), read)
        assert in_all.words != found.words
        return found.words, found.exact, len(found.told)

    system: Json = {"role": "system", "content": "It is 8."}
    plain = before(system, user("a b"), user("c"))
    assert plain[2] == 2
    assert before(system, user("a b"), user("c")) == plain
    merged = before(system, user("a  b\nc"))
    later = before({**system, "content": "It is 9."}, user("a b"), user("c"))
    for found in (merged, later):
        assert found[0] == plain[0]
        assert found[1] != plain[1]
    assert before(system, user("a b"), user("d"))[0] != plain[0]
    assert before(system)[2] == 0


def test_what_users_write_does_not_change_the_chain() -> None:
    replies = [assistant("one"), assistant("two")]
    plain = [user("a"), replies[0], user("b"), replies[1], user("c")]
    stamped = [user("[Sun] a"), user("carrier"), replies[0], replies[1], user("other")]
    keys = reply_keys(plain, None)
    assert keys is not None
    assert keys == reply_keys(stamped, None)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5))
def test_a_request_that_continues_a_turn_has_the_turns_own_keys(texts: list[str]) -> None:
    history = [m for text in texts[:-1] for m in (user("q"), assistant(text))]
    reply = assistant(texts[-1])
    keys = reply_keys([*history, user("q")], reply)
    assert keys == reply_keys([*history, user("q"), reply, user("next")], None)


def test_a_first_request_continues_nothing() -> None:
    assert reply_keys([user("hello")], None) is None
    assert next_states("t", [user("hello")], [None]) == []


def test_everything_after_the_last_reply_is_the_next_state() -> None:
    tools: list[Json] = [
        {"role": "tool", "tool_call_id": "1", "content": "exit code 0"},
        {"role": "tool", "tool_call_id": "2", "content": "exit code 1"},
        {"role": "system", "content": "the clock struck"},
        user("and now?"),
        user("  "),
    ]
    messages = [user("go"), assistant("", ("ls", "{}"), ("ls", "{}")), *tools]
    states = next_states("t", messages, list(map(Profile(GENERIC).utterance, messages)))
    assert [(s.source, s.text) for s in states] == [
        (Source.TOOL, "exit code 0"),
        (Source.TOOL, "exit code 1"),
        (Source.ENVIRONMENT, "the clock struck"),
        (Source.USER, "and now?"),
    ]


def test_explicit_session_ids_win_in_the_documented_order() -> None:
    body: Json = {
        "prompt_cache_key": "key",
        "session_id": "field",
        "metadata": {"session_id": "meta"},
        "user": "user",
    }
    assert explicit_session({"x-session-id": "h", "x-session-affinity": "a"}, body) == "h"
    assert explicit_session({"x-session-affinity": "a"}, body) == "a"
    found: list[str | None] = []
    for name in ("prompt_cache_key", "session_id", "metadata", "user"):
        found.append(explicit_session({}, body))
        del body[name]
    assert found == ["key", "field", "meta", "user"]
    assert explicit_session({}, {"user": 3, "metadata": "x"}) is None


def test_a_retry_stands_where_the_first_attempt_stood() -> None:
    start = place_of("main", "s", "main", None, ["hello"])
    assert start == place_of("main", "s", "main", None, ["hello"])
    assert start != place_of("main", "s", "main", None, ["good evening"])
    assert start != place_of("main", "other", "main", None, ["hello"])
    after = place_of("main", "s", "main", "turn_1", ["hello", "and now?"])
    assert after == place_of("main", "s", "main", "turn_1", ["Continue the current task"])
    assert after != place_of("main", "s", "side", "turn_1", [])
    assert place_of("main", None, "main", None, []) is None, "pictures alone are not one another"


def test_long_session_ids_that_begin_alike_stay_apart() -> None:
    ids = ["s" * 300, "s" * 301, "s" * 299 + "t", "s" * 200, "\udcff" * 300]
    kept = [explicit_session({"x-session-id": name}, {}) for name in ids]
    assert len(set(kept)) == len(ids)
    assert all(name is not None and len(name.encode()) <= 200 for name in kept)
    assert kept[3] == ids[3]
