"""Sessions and next states found by content alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.hooks import Utterance
from nextstate.records import Json, NextState, Source, Timings, Turn, TurnKind
from nextstate.redaction import Redactor
from nextstate.redaction.names import HiddenNames
from nextstate.store import Store
from nextstate.store.sessions import Candidate
from plugins.agents.profile import GENERIC, Profile
from proxy.linking.history import (
    Context,
    Link,
    RememberedMessages,
    Reply,
    Scope,
    keys_of,
    link_of,
    next_states,
    place_of,
    read_history,
)
from proxy.linking.meaning import meaning_of
from proxy.linking.names import explicit_session, session_names
from proxy.linking.parents import find_parent

DATABASES = True
"""Each test runs on both."""
PROFILE = Profile(GENERIC)
SCOPE = Scope("main", None)


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
    assert meaning_of(assistant("<think>hm</think>\n\nYes. ")) == meaning_of(assistant("Yes."))
    assert meaning_of({"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}) == (
        meaning_of(assistant("Yes."))
    )
    one, other = assistant(None, ("ls", '{"a": 1, "b": 2}')), assistant("", ("ls", '{"b":2,"a":1}'))
    other["tool_calls"][0]["id"] = "callx"
    assert meaning_of(one) == meaning_of(other)


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
    assert len({meaning_of(m) for m in different}) == len(different)


def test_what_was_said_is_known_in_words_and_to_the_letter() -> None:
    def before(*messages: Json) -> Context:
        history = read_history([*messages, assistant("Yes."), user("next")], PROFILE)
        assert history.context.words != history.contexts[0].words
        return history.contexts[0]

    system: Json = {"role": "system", "content": "It is 8."}
    plain = before(system, user("a b"), user("c"))
    assert len(plain.hashes) == 2
    assert before(system, user("a b"), user("c")) == plain
    merged = before(system, user("a  b\nc"))
    later = before({**system, "content": "It is 9."}, user("a b"), user("c"))
    for found in (merged, later):
        assert found.words == plain.words
        assert found.letters != plain.letters
    assert before(system, user("a b"), user("d")).words != plain.words
    assert not before(system).hashes


def test_what_users_write_does_not_change_the_chain() -> None:
    replies = [assistant("one"), assistant("two")]
    plain = [user("a"), replies[0], user("b"), replies[1], user("c")]
    stamped = [user("[Sun] a"), user("carrier"), replies[0], replies[1], user("other")]
    links = [link_of(read_history(messages, PROFILE), SCOPE) for messages in (plain, stamped)]
    keys = {link and link.replies[0][1:3] for link in links}
    assert len(keys) == 1
    assert None not in keys


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5))
def test_a_request_that_continues_a_turn_looks_for_the_turns_own_keys(texts: list[str]) -> None:
    history = [m for text in texts[:-1] for m in (user("q"), assistant(text))]
    asked, reply = [*history, user("q")], assistant(texts[-1])
    keys = keys_of(read_history(asked, PROFILE), meaning_of(reply), SCOPE)
    next_request = read_history([*asked, reply, user("next")], PROFILE)
    link = link_of(next_request, SCOPE)
    assert link is not None
    assert (link.replies[0].chain_key, link.replies[0].key, link.replies[0].context_key) == keys
    for other in (Scope("other", None), Scope("main", "chat")):
        elsewhere = link_of(next_request, other)
        assert elsewhere is not None
        found = (
            elsewhere.replies[0].chain_key,
            elsewhere.replies[0].key,
            elsewhere.replies[0].context_key,
        )
        assert not {*found} & {*keys}


messages_of_any_kind = st.lists(
    st.one_of(
        st.builds(user, st.sampled_from(["", "go", "<note>x</note>", "[12:00] go"])),
        st.builds(assistant, st.sampled_from(["", "Done.", "<think>hm</think>Done."])),
        st.sampled_from(
            [
                {"role": "system", "content": "It is 8."},
                {"role": "tool", "tool_call_id": "1", "content": "exit code 0"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
                assistant("", ("ls", "{}")),
            ]
        ),
    ),
    max_size=8,
)


@given(st.lists(messages_of_any_kind, max_size=6), st.sampled_from([0, 2000, 1 << 20]))
def test_what_is_remembered_reads_like_what_is_new(
    requests: list[list[Json]], most_bytes: int
) -> None:
    remembered = RememberedMessages(most_bytes)
    for messages in requests:
        assert read_history(messages, PROFILE, remembered) == read_history(messages, PROFILE)


class Counting(Profile):
    """Counts the messages that it reads."""

    read = 0

    def utterance(self, message: Json) -> Utterance | None:
        self.read += 1
        return super().utterance(message)


def test_of_a_history_that_goes_on_each_message_is_read_once() -> None:
    profile, remembered = Counting(GENERIC), RememberedMessages()
    messages: list[Json] = []
    for step in range(30):
        messages += [user(f"question {step}"), assistant(f"answer {step}")]
        read_history(messages, profile, remembered)
    assert profile.read == len(messages)


def test_remembered_messages_take_a_bounded_memory_and_the_last_used_stay() -> None:
    profile, remembered = Counting(GENERIC), RememberedMessages(most_bytes=20_000)
    first = user("first")
    for step in range(100):
        read_history([first, user(f"{step} " + "x" * 1000)], profile, remembered)
    assert profile.read == 101, "the first one was used all the time"
    read_history([user("0 " + "x" * 1000)], profile, remembered)
    assert profile.read == 102, "the second one had to go"


def test_a_first_request_continues_nothing() -> None:
    history = read_history([user("hello")], PROFILE)
    assert link_of(history, SCOPE) is None
    assert next_states("t", history) == []


def test_everything_after_the_last_reply_is_the_next_state() -> None:
    tools: list[Json] = [
        {"role": "tool", "tool_call_id": "1", "content": "exit code 0"},
        {"role": "tool", "tool_call_id": "2", "content": "exit code 1"},
        {"role": "system", "content": "the clock struck"},
        user("and now?"),
        user("  "),
    ]
    messages = [user("go"), assistant("", ("ls", "{}"), ("ls", "{}")), *tools]
    states = next_states("t", read_history(messages, PROFILE))
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
    def place(
        *texts: str, session: str | None = "s", kind: str = "main", parent: str | None = None
    ) -> bytes | None:
        messages = read_history([user(text) for text in texts], PROFILE)
        return place_of(Scope("main", session), kind, parent, messages)

    start = place("hello")
    assert start == place("hello")
    assert start != place("good evening")
    assert start != place("hello", session="other")
    after = place("hello", "and now?", parent="turn_1")
    assert after == place("Continue the current task", parent="turn_1")
    assert after != place(kind="side", parent="turn_1")
    assert place(session=None) is None, "two pictures need not be the same"


def test_long_session_ids_that_begin_alike_stay_apart(tmp_path: Path) -> None:
    ids = ["s" * 300, "s" * 301, "s" * 299 + "t", "s" * 200, "\udcff" * 300]
    hide = HiddenNames(tmp_path, Redactor())
    kept = [hide(str(explicit_session({"x-session-id": name}, {}))) for name in ids]
    assert len(set(kept)) == len(ids)
    assert all(name is not None and len(name.encode()) <= 200 for name in kept)
    assert kept[3] == ids[3]


def test_no_plain_hash_is_kept_of_a_long_session_id_and_nothing_secret_in_it(
    tmp_path: Path,
) -> None:
    hide = HiddenNames(tmp_path, Redactor())
    name = "s" * 300 + " 4711"
    digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    assert digest not in hide(name)
    assert hide(name) == session_names(name, PROFILE, hide)[0]
    assert hide("s" * 300 + " ann.b@firma-nord.de").startswith("hidden-")


def test_among_identical_replies_the_one_that_shares_messages_is_the_parent(tmp_path: Path) -> None:
    store = Store(StoreConfig(dir=str(tmp_path)))
    key, rows = bytes(16), list[Candidate]()
    for name, text in (("a", "Sort."), ("b", "Write.")):
        turn = Turn(
            id=name,
            session=name,
            index=0,
            kind=TurnKind.MAIN,
            lineage="main",
            policy_version=0,
            client_model="base",
            request={"messages": [user(text)]},
            reply=assistant("Done."),
            finish_reason="stop",
            prompt_ids=None,
            completion_ids=None,
            behaviour_logprobs=None,
            sampling={},
            timings=Timings(1.0, 0.1, 0.2),
            untrainable="no ids",
        )
        with store.recording() as recording:
            recording.add_turn(turn, key, key)
            rows = recording.sessions.with_chain_key(key)
    messages = read_history([user("Sort."), assistant("Done."), user("No.")], PROFILE).messages
    said = tuple(rows[-1].message_hashes)
    link = Link((Reply(1, key, key, None, said, 5),), False, messages)
    for is_continued in (False, True):
        with store.recording() as recording:
            parent = find_parent(recording.sessions, link, SCOPE).parent
            assert parent is not None
            assert (parent.id, parent.continued) == ("a", is_continued)
            if not is_continued:
                states = [NextState("a", Source.USER, "No.", 0.9)]
                recording.add_next_states("a", True, states)
    store.close()


def test_results_in_another_order_than_their_calls_are_brought_into_the_calls() -> None:
    """Judges pair calls and results by position: a page must not stand in a command's place."""
    calling = assistant(None, ("web_fetch", "{}"), ("bash", "{}"), ("lamp", "{}"))

    def result(number: int) -> Json:
        return {"role": "tool", "tool_call_id": f"call-{number}", "content": f"of {number}"}

    def order(*after: Json) -> list[str]:
        messages = [user("go"), calling, *after]
        states = next_states("t", read_history(messages, PROFILE), sent=messages)
        return [state.text for state in states]

    assert order(result(1), user("so?"), result(2), result(0)) == ["of 0", "so?", "of 1", "of 2"]
    assert order(result(2), result(0)) == ["of 0", "of 2"]
    nameless = {"role": "tool", "content": "of ?"}
    assert order(result(2), nameless, result(0)) == ["of 0", "of ?", "of 2"]
