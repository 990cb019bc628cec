"""What real agents make of a history, and what strangers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from nextstate.hooks import Utterance
from nextstate.records import Json
from plugins.agents.profile import GENERIC, Profile
from tests.proxy.conversations import (
    AT_LENGTH,
    Step,
    alternating,
    asked,
    assistant,
    recorded,
    result,
    step,
    user,
)

GO = [{"role": "system", "content": "You are careful."}, user("Look at both files.")]
CALLS = [("read", '{"path": "a.py", "lines": 100.0}'), ("read", '{"path": "b.py"}'), ("date", "")]
BACK = [("read", '{"lines":100,"path":"a.py"}'), ("read", '{"path":"b.py"}'), ("date", "{}")]
REPLY = assistant("<think>Both.</think>I look at both.", *CALLS)
ONE_EACH = [assistant("I look at both.", BACK[0]), *(assistant(None, call) for call in BACK[1:])]
RESULTS = [result(0), result(1), result(2)]


@pytest.mark.parametrize(
    "sent_back",
    [
        [assistant("I look at both.", *BACK), *RESULTS],
        [message for pair in zip(ONE_EACH, RESULTS, strict=True) for message in pair],
        [assistant("I look at both."), assistant("", *BACK), *RESULTS],
        [*ONE_EACH, *RESULTS],
        [assistant("I look"), assistant(" at both."), assistant(None, *BACK), *RESULTS],
        [assistant("Both.</think>I look at both.", *BACK), *RESULTS],
        [assistant("I look at both.", *BACK[::-1]), *RESULTS],
        [assistant("I look at both.", BACK[1], BACK[0], BACK[2]), *RESULTS],
        [assistant("I look at both.", BACK[2]), assistant(None, *BACK[:2]), *RESULTS],
    ],
)
@pytest.mark.parametrize("name", [None, "chat"])
@pytest.mark.parametrize("crowd", [0, 20])
def test_a_reply_cut_into_messages_is_one_turn_and_all_results_follow_it(
    sent_back: list[Json], name: str | None, crowd: int
) -> None:
    others = [[GO[0], user(f"Look at both files of {n}.")] for n in range(crowd)]
    steps = [asked("one", GO, REPLY), *(asked(f"x{n}", m, REPLY) for n, m in enumerate(others))]
    steps.append(asked("two", [*GO, *sent_back], assistant("Both are fine.")))
    last = [*GO, *sent_back, assistant("Both are fine."), user("Thanks.")]
    steps.append(asked("three", last, assistant("Gladly.")))
    with recorded([steps], Random(0), name and [name]) as found:
        assert found.parents["two"] == "one"
        assert found.states("one") == ["result 0", "result 1", "result 2"]
        assert found.parents["three"] == "two"
        assert found.states("two") == ["Thanks."]
        assert found.sessions["one"] == found.sessions["three"]
        assert not any(found.states(f"x{n}") for n in range(crowd))


def test_the_same_calls_in_another_order_in_two_conversations_are_two() -> None:
    steps: list[Step] = []
    for name, calls in (("a", CALLS), ("b", CALLS[::-1])):
        begun = [GO[0], user(f"Look at both files of {name}.")]
        steps.append(asked(name, begun, assistant("", *calls)))
        sent_back = assistant("", *calls[::-1])
        steps.append(asked(f"{name}2", [*begun, sent_back, *RESULTS], assistant("Fine.")))
    with recorded([steps], Random(0)) as found:
        assert (found.parents["a2"], found.parents["b2"]) == ("a", "b")
        assert found.sessions["a"] != found.sessions["b"]


def test_agents_that_do_the_same_in_another_order_stay_apart() -> None:
    """A task that is tried several times at once, whose tools always answer the same."""
    orders = {"a": "xyz", "b": "yxz", "c": "zyx", "d": "xzy"}
    histories = {name: [*GO] for name in orders}
    steps: list[Step] = []
    for n in range(3):
        for name, order in orders.items():
            reply = assistant("", (order[n], "{}"))
            steps.append(asked(f"{name}{n}", list(histories[name]), reply))
            histories[name] += [reply, {"role": "tool", "tool_call_id": "c", "content": "ok"}]
    steps += [asked(f"{name}3", histories[name], assistant("Done.")) for name in orders]
    with recorded([steps], Random(0)) as found:
        for name in orders:
            assert found.parents[f"{name}3"] == f"{name}2"


def test_turns_of_a_loop_with_one_call_each_stay_turns() -> None:
    messages, steps = [*GO], list[Step]()
    for n in range(40):
        reply = assistant("", ("read", f'{{"page": {n % 3}}}'))
        steps.append(asked(f"t{n}", list(messages), reply))
        messages += [reply, result(n)]
    with recorded([steps], Random(0)) as found:
        for n in range(1, 40):
            assert found.parents[f"t{n}"] == f"t{n - 1}"
            assert found.states(f"t{n - 1}") == [f"result {n - 1}"]


@pytest.mark.parametrize(
    "added",
    [
        user("<system-reminder>\nThe file a.py has changed.\n</system-reminder>"),
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        user(""),
    ],
)
def test_what_an_agent_adds_between_the_results_cuts_no_reply_off(added: Json) -> None:
    cut = [m for pair in zip(ONE_EACH, RESULTS, strict=True) for m in (*pair, added)]
    steps = [asked("one", GO, REPLY), asked("two", [*GO, *cut], assistant("Both are fine."))]
    said_between = [*GO, *cut[:3], user("Wait."), *cut[3:]]
    steps.append(asked("other", said_between, assistant("I wait.")))
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] == "one"
        states = found.states("one")
        assert [state for state in states if state.startswith("result")] == [
            "result 0",
            "result 1",
            "result 2",
        ]


@pytest.mark.parametrize("asks", [[], [user("continue")]])
def test_a_reply_and_its_continuation_may_be_one_message_later(asks: list[Json]) -> None:
    part, rest = assistant("First, the files are sor"), assistant("ted by date.")
    whole = assistant("First, the files are sorted by date.")
    steps = [
        asked("cut", GO, part),
        asked("whole", [*GO, part, *asks], rest),
        asked("next", [*GO, whole, user("And by name?")], assistant("Also.")),
        asked("stranger", [GO[0], user("Sort."), whole, user("No.")], assistant("Why?")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["whole"] == "cut"
        assert found.parents["next"] == "whole"
        assert found.states("whole") == ["And by name?"]
        assert found.parents["stranger"] is None
        assert found.states("cut") == [one["content"] for one in asks]


GREETING = "Hello and welcome! I am the assistant of this shop." + AT_LENGTH
Names = Sequence[str] | None


def stamped(hour: int, text: str) -> str:
    return f"[{hour}:00] {text}"


@pytest.mark.parametrize(
    ("reply", "names", "vague"),
    [
        ("Done.", ["app"], True),
        ("Done.", ["app"], False),
        ("Done.", None, False),
        (GREETING, None, False),
        (GREETING, ["app"], True),
    ],
)
@pytest.mark.parametrize("both", [[], [user("The shop sells shoes.")]])
def test_words_that_fit_two_conversations_land_on_neither(
    reply: str, names: Names, vague: bool, both: list[Json]
) -> None:
    system: Json = {"role": "system", "content": "It is 10:00."}
    for first, other in ((1, 2), (2, 1)):
        one = [system, *both, user(stamped(10, "Book a table."))]
        two = [system, *both, user(stamped(11, "Write a poem."))]
        steps = [step("a1", one, reply), step("b1", two, reply)]
        steps = [steps[first - 1], steps[other - 1]]
        plain = [system, *both, user("Book a table."), assistant(reply), user("No, wrong.")]
        steps.append(step("a2", plain, "I see."))
        kept = [*two, assistant(reply), user("Nice.")]
        steps.append(step("b2", kept, "Gladly."))
        with recorded([steps], Random(0), names, vague=vague) as found:
            assert found.parents["a2"] is None
            assert found.states("a1") == []
            assert found.sessions["a2"] not in (found.sessions["a1"], found.sessions["b1"])
            assert found.parents["b2"] == "b1", "whoever changed nothing is still found"
            assert found.states("b1") == ["Nice."]


@pytest.mark.parametrize("vague", [True, False])
def test_under_a_name_that_one_conversation_has_the_stamp_may_go(vague: bool) -> None:
    steps = [
        step("a1", [user(stamped(10, "Book a table."))], "Done."),
        step("a2", [user("Book a table."), assistant("Done."), user("No, wrong.")], "I see."),
    ]
    with recorded([steps], Random(0), ["app"], vague=vague) as found:
        assert found.states("a1") == ["No, wrong."]


@pytest.mark.parametrize("vague", [True, False])
def test_a_stranger_is_not_the_only_other_one_under_a_name(vague: bool) -> None:
    """The turn that it continues was never seen; others under the name were."""
    steps = [
        step("a1", [user("Book a table.")], "Booked."),
        step("b1", [user("Write a poem.")], "Done."),
        step("a2", [user("Book a table."), assistant("Booked."), user("Thanks.")], "Bye."),
        step("c2", [user("Sum this up."), assistant("Done."), user("No, wrong.")], "I see."),
    ]
    with recorded([steps], Random(0), ["app"], vague=vague) as found:
        assert found.parents["c2"] is None
        assert found.states("b1") == []
        assert found.states("a1") == ["Thanks."]


@pytest.mark.parametrize(("names", "vague"), [(None, False), (["app"], True), (["app"], False)])
def test_words_that_fit_two_requests_of_one_session_land_on_neither(
    names: Names, vague: bool
) -> None:
    """Two people began with the same words, so both conversations look like one."""
    begun = alternating("Hi", "Hello.")
    steps = [
        step("a1", [user(stamped(10, "Hi"))], "Hello."),
        step("b1", [user("Hi")], "Hello."),
        step("a2", [*begun, user(stamped(10, "Book a table."))], "Done."),
        step("b2", [*begun, user("Write a poem.")], "Done."),
        step("a3", [*begun, user("Book a table."), assistant("Done."), user("No.")], "I see."),
        step("b3", [*begun, user("Write a poem."), assistant("Done."), user("Nice.")], "Gladly."),
    ]
    with recorded([steps], Random(0), names, vague=vague) as found:
        assert found.parents["a3"] is None
        assert found.states("a2") == []
        assert found.states("b2") == ["Nice."]


def test_the_same_words_to_two_apps_go_to_the_one_whose_system_it_is() -> None:
    def asks(who: str, hour: int, *texts: str) -> list[Json]:
        system = {"role": "system", "content": f"You are a {who}. It is {hour}:30."}
        return [system, *alternating(*texts)]

    steps = [
        step("pirate", asks("pirate", 8, "Hi"), "Hello!"),
        step("nurse", asks("nurse", 8, "Hi"), "Hello!"),
        step("pirate 2", asks("pirate", 9, "Hi", "Hello!", "Speak up."), "Aye!"),
        step("cook 2", asks("cook", 9, "Hi", "Hello!", "Is it done?"), "No."),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["pirate 2"] == "pirate"
        assert found.parents["cook 2"] is None
        assert found.states("nurse") == []


def test_agents_whose_every_text_is_machine_made_keep_their_links() -> None:
    class Deaf(Profile):
        def utterance(self, message: Json) -> Utterance | None:
            found = super().utterance(message)
            return None if found is None or found.text.startswith("<") else found

    steps = [step(f"{who}1", [user(f"<task>{who}</task>")], "ls") for who in ("a", "b")] + [
        step(
            "a2",
            [user("<task>a</task>"), assistant("ls"), user("<output>x</output>"), user("Well?")],
            "cat",
        ),
    ]
    with recorded([steps], Random(0), profile=Deaf(GENERIC)) as found:
        assert found.parents["a2"] == "a1"
        assert found.states("a1") == ["Well?"]
