"""Replies that come back in a form that means the same: the next state finds its turn.

In each case another conversation, which began with the same words, got a reply that means something
else, or the same in another form; its turn stays its own.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from nextstate.records import Json
from proxy.exchange import Exchange
from tests.proxy import conversations
from tests.proxy.conversations import Step, asked, recorded, result, user
from tests.proxy.conversations import assistant as said


def get(arguments: str) -> Json:
    return said(None, ("get", arguments))


GO = [{"role": "system", "content": "You are careful."}, user("Look at the files please.")]
FORMS = {
    # What JavaScript makes of whole numbers that it cannot hold.
    "a long id": (get('{"id": 1234567890123456789}'), get('{"id":1234567890123456800}')),
    "a number out of range": (get('{"n": 1e400}'), get('{"n":null}')),
    "no number": (get('{"n": [NaN, -Infinity]}'), get('{"n":[null,null]}')),
    # What repairs make of JSON that is none.
    "a comma too many": (get('{"id": 1,}'), get('{"id":1}')),
    "commas too many": (get('{"a": [1, 2,], "b": {"c": "d",},}'), get('{"a":[1,2],"b":{"c":"d"}}')),
    "Python's quotes": (
        get("{'path': 'it\\'s \"a\".py', 'all': True}"),
        get('{"path": "it\'s \\"a\\".py", "all": true}'),
    ),
    "a mark of the byte order": (get('\ufeff{"all": 1}'), get('{"all": 1}')),
    "cut in a text": (get('{"path": "a.py", "text": "hel'), get('{"path":"a.py","text":"hel"}')),
    "cut in a list": (get('{"of": [{"a": 1}, {"b": [tr'), get('{"of":[{"a":1},{"b":[true]}]}')),
    "cut in a key": (get('{"path": "a.py", "te'), get('{"path":"a.py"}')),
    "cut before a value": (get('{"path": "a.py", "text":'), get('{"path":"a.py"}')),
    "cut after a comma": (get('{"path": "a.py",'), get('{"path":"a.py"}')),
    "a truth in quotes": (get('{"all": "true"}'), get('{"all":true}')),
    "a name in other letters": (said(None, ("Read", "{}")), said(None, ("read", "{}"))),
    "calls written as text": (
        said("I look.", ("web_search", '{"query": "it\'s", "n": 2}'), ("date", "{}")),
        said(
            "I look.\nCalling tools:\n[{'id': 'call_0', 'function': {'name': 'web_search', "
            "'arguments': {'query': \"it's\", 'n': 2}}}, {'function': {'name': 'date', "
            "'arguments': {}}}]"
        ),
    ),
    "code written as a call": (
        said("<code>\nprint('[')\n</code>"),
        said(
            "<code>\nprint('[')\n</code>\nCalling tools:\n[{'id': 'call_1', 'function': "
            "{'name': 'python_interpreter', 'arguments': \"print('[')\"}}]"
        ),
    ),
    # What becomes of letters.
    "half a character": (said("Hi \ud83d there"), said("Hi \ufffd there")),
    "an accent apart": (said("cafe\u0301 is open"), said("caf\u00e9 is open")),
    "a mark before the text": (said("\ufeffIt is open"), said("It is open")),
    "nothing": (said(""), said("(no content)")),
    "thoughts in a fold": (
        said("<think>hm</think>It is open."),
        said(
            '<details type="reasoning" done="true" duration="3">\n<summary>Thought for 3 seconds'
            "</summary>\n&gt; hm <b>\n</details>\nIt is open."
        ),
    ),
}
OTHERS = {
    "no number": get('{"n": [null, 5]}'),
    "calls written as text": said("I look.", ("web_search", "{}"), ("date", "{}")),
    "a long id": get('{"id": 1234567890123456788}'),
    "a comma too many": get('{"id": 1, "of": 1,}'),
    "cut in a text": get('{"path": "a.py", "text": "he'),
    "cut in a key": get('{"path": "a.py", "to'),
    "a truth in quotes": get('{"all": "false"}'),
    "an accent apart": said("cafe is open"),
    "thoughts in a fold": said("<think>hm</think>It is shut."),
}
"""What the other conversation heard; otherwise it is another call."""


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_in_another_form_finds_its_turn_and_no_other(form: str) -> None:
    reply, sent_back = FORMS[form]
    other = OTHERS.get(form, said("Other.", ("put", '{"id": 7}')))
    then = [result()] if reply.get("tool_calls") else [user("No, wrong.")]
    steps = [
        asked("one", GO, reply),
        asked("two", [*GO, sent_back, *then], said("I see.")),
        asked("other", GO, other),
        asked("stranger", [GO[0], user("Stop."), sent_back, user("No.")], said("Why?")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] == "one"
        assert found.states("one") == [one["content"] for one in then]
        assert found.states("other") == []
        assert found.parents["stranger"] is None


@pytest.mark.parametrize(
    "form", ["a long id", "cut in a key", "a comma too many", "a truth in quotes"]
)
def test_a_form_that_fits_the_replies_of_two_conversations_is_nobodys(form: str) -> None:
    """Whoever sends back what was said to the letter is still found."""
    other = {
        "a long id": get('{"id": 1234567890123456790}'),
        "cut in a key": get('{"path": "a.py", "ti'),
        "a comma too many": get('{"id": 1'),
        "a truth in quotes": get('{"all": true }'),
    }[form]
    reply, sent_back = FORMS[form]
    steps = [asked("a1", GO, reply), asked("b1", GO, other)]
    exact = form != "a truth in quotes"  # that one is what the other one heard
    last = asked("a2", [*GO, sent_back if exact else reply, result(1)], said("I see."))
    steps.append(last)
    steps.append(asked("b2", [*GO, other, result(2)], said("I see.")))
    with recorded([steps], Random(0)) as found:
        assert found.parents["a2"] == (None if exact else "a1")
        assert found.parents["b2"] == "b1"
        assert found.states("b1") == ["result 2"]


def stopped(monkeypatch: pytest.MonkeyPatch, *stops: str, **of_turn: list[str]) -> None:
    """Requests are sent with these stop sequences, those of one turn where they are given."""

    def exchange(**fields: Any) -> Exchange:
        stop = of_turn.get(fields["turn_id"], [*stops])
        return Exchange(**fields)._replace(request={**fields["request"], "stop": stop})

    monkeypatch.setattr(conversations, "Exchange", exchange)


THINK = "Thought: I run it.\n<code>\nprint(1)\n"
CALLING = "Calling tools:\n[{'id': 'call_1', 'function': {'name': 'python_interpreter'}}]"


@pytest.mark.parametrize(
    ("reply", "sent_back"),
    [
        (THINK, f"{THINK}</code>"),
        (THINK, f"{THINK}</code>\n{CALLING}"),
        ("Action: ls\nAction Input: .\n", "Action: ls\nAction Input: .\nObservation:"),
        (f"{THINK}</code>", f"{THINK}</code>"),
    ],
)
def test_what_an_agent_writes_from_the_stop_sequence_on_is_not_the_models(
    reply: str, sent_back: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, "Observation:", "Calling tools:", "</code>", "\n\n")
    steps: list[Step] = []
    history = [*GO]
    for n in range(3):
        steps.append(asked(f"t{n}", history, said(f"{n} {reply}")))
        history = [*history, said(f"{n} {sent_back}"), user(f"Observation:\n{n}")]
    steps.append(asked("other", [GO[0], user("Stop.")], said(f"0 {reply}")))
    with recorded([steps], Random(0)) as found:
        assert [found.parents[f"t{n}"] for n in range(3)] == [None, "t0", "t1"]
        assert found.states("other") == []


def test_what_no_stop_sequence_ends_is_another_reply() -> None:
    steps = [
        asked("one", GO, said(THINK)),
        asked("two", [*GO, said(f"{THINK}</code>"), user("No.")], said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] is None


@pytest.mark.parametrize(
    ("reply", "earlier", "later", "sent_back"),
    [
        # The later request alone has a sequence that the reply holds.
        ("I see. Observation: it works.", [], ["Observation:"], ""),
        ("One. Two.", ["Three"], ["One", "."], ""),
        ("print(1)</code> done", [], ["</code>"], ""),
        # The earlier one alone has it, and its reply was told with it, or ended by it.
        ("print(1)</code>", ["</code>"], [], ""),
        ("print(1)", ["</code>"], [], "</code>"),
        ("print(1)", ["</code>"], ["<end_plan>"], "</code>"),
        # White space, which does not count, kept the engine from ending it.
        ("a b, then c", ["ab"], ["ab"], "ab"),
        ("My Observation: none.", ["\nObservation:"], ["\nObservation:"], "\nObservation: 1"),
    ],
)
def test_a_reply_ends_where_the_request_that_it_answers_ends_it(
    reply: str,
    earlier: list[str],
    later: list[str],
    sent_back: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped(monkeypatch, two=later, other=later, one=earlier)
    steps = [
        asked("other", [*GO, user("And then?")], said(reply)),
        asked("one", GO, said(reply)),
        asked("two", [*GO, said(reply + sent_back), user("No.")], said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] == "one"
        assert found.states("one") == ["No."]
        assert found.states("other") == []


@pytest.mark.parametrize("earlier", [[], ["Delete"], ["OK."]])
def test_what_another_request_ends_with_is_no_reply_of_a_stranger(
    earlier: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply is how the other one begins, and its own request did not end it there."""
    stopped(monkeypatch, ".", stranger=earlier)
    steps = [
        asked("stranger", GO, said("OK")),
        asked("two", [*GO, said("OK. I delete it."), user("No!")], said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] is None
        assert found.states("stranger") == []


PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
CALLS = [("read", '{"path": "a.png"}'), ("read", '{"path": "b.png"}')]


def test_a_picture_that_a_tool_gave_and_its_words_cut_no_reply_off() -> None:
    shown: Json = {
        "role": "user",
        "content": [{"type": "text", "text": "Attached image(s) from tool result:"}, PICTURE],
    }
    each = [said(None, CALLS[0]), result(0), shown, said(None, CALLS[1]), result(1), shown]
    wait = [said(None, CALLS[0]), result(0), user("Wait."), said(None, CALLS[1]), result(1)]
    steps = [
        asked("one", GO, said(None, *CALLS)),
        asked("other", [*GO, *wait], said("I wait.")),
        asked("two", [*GO, *each], said("Both are fine.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["other"] is None, "a person spoke before the second call"
        assert found.parents["two"] == "one"
        assert [text for text in found.states("one") if text.startswith("result")] == [
            "result 0",
            "result 1",
        ]


def test_turns_with_a_picture_each_stay_turns() -> None:
    messages, steps = [*GO], list[Step]()
    for n in range(6):
        reply = said(None, ("look", f'{{"page": {n % 2}}}'))
        steps.append(asked(f"t{n}", messages, reply))
        shown = {"role": "user", "content": [{"type": "text", "text": f"Page {n}"}, PICTURE]}
        messages = [*messages, reply, result(n), shown]
    with recorded([steps], Random(0)) as found:
        for n in range(1, 6):
            assert found.parents[f"t{n}"] == f"t{n - 1}"
            assert found.states(f"t{n - 1}") == [f"result {n - 1}", f"Page {n - 1}"]
