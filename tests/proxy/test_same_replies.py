"""Conversations that get the same replies: each next state goes to its own conversation."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json
from tests.proxy.conversations import (
    AT_LENGTH,
    CROWD,
    PROFILE,
    Step,
    alternating,
    recorded,
    step,
)


def test_a_turn_that_was_replaced_by_its_retry_is_nobodys_parent() -> None:
    steps = [
        step("cut", alternating("go"), "Done.", cut=True),  # all of the text came, its end did not
        step("whole", alternating("go"), "Done."),
        step("next, cut", alternating("go", "Done.", "and now?"), "", cut=True),
        step("next", alternating("go", "Done.", "and now?"), "Yes."),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["next, cut"] == "whole"
        assert found.parents["next"] == "whole"
        assert found.store.turns.ids() == ["whole", "next"]


def test_a_request_sent_again_does_not_go_to_another_agent_that_got_the_same_reply() -> None:
    steps = [
        step("a1", alternating("a: go"), "OK"),
        step("b1", alternating("b: go"), "OK"),
        step("a2, cut", alternating("a: go", "OK", "a: and now?"), "", cut=True),
        step("a2", alternating("a: go", "OK", "a: and now?"), "Yes."),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["a2, cut"] == "a1"
        assert found.parents["a2"] == "a1"
        assert found.states("a1") == ["a: and now?"]
        assert found.states("b1") == []


OPENCLAW: AgentProfile = load_plugin("agents", "openclaw", None)
CARRIER: Json = {"role": "user", "content": "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>> time and place"}


def begun_by(*first: Json) -> tuple[list[Json], list[Json]]:
    """The first two requests of a conversation that hears "Done." and goes on as all do."""
    return [*first], [*first, *alternating("", "Done.", "No, that is wrong.")[1:]]


def only_the_system_differs(number: int) -> tuple[list[Json], list[Json]]:
    system: Json = {"role": "system", "content": f"You play character {number}."}
    return begun_by(system, {"role": "user", "content": "Hello"})


def only_a_picture_differs(number: int) -> tuple[list[Json], list[Json]]:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{number}"}}
    return begun_by({"role": "user", "content": [picture]})


def white_space_and_parts_change(number: int) -> tuple[list[Json], list[Json]]:
    """And the system tells the time, so that no message comes as it was."""
    first, second = begun_by({"role": "user", "content": f"Task {number}:\n\nlook"})
    parts = [{"type": "text", "text": f"Task {number}:"}, {"type": "text", "text": "look "}]
    now, later = ({"role": "system", "content": f"It is {hour} o'clock."} for hour in (8, 9))
    return [now, *first], [later, {"role": "user", "content": parts}, *second[1:]]


def carriers_come_and_go(number: int) -> tuple[list[Json], list[Json]]:
    first, second = begun_by({"role": "user", "content": f"[Sun 2026-11-22 08:38 UTC] {number}"})
    return [*first, CARRIER], [*second, CARRIER]


def only_the_runtime_differs(number: int) -> tuple[list[Json], list[Json]]:
    first, second = begun_by(
        {"role": "user", "content": f"Hello\n\nRuntime: agent=main | sessionId={number}"}
    )
    return [*first, CARRIER], [*second, CARRIER]


@pytest.mark.parametrize(
    ("requests", "profile"),
    [
        (only_the_system_differs, PROFILE),
        (only_a_picture_differs, PROFILE),
        (white_space_and_parts_change, PROFILE),
        (carriers_come_and_go, OPENCLAW),
        (only_the_runtime_differs, OPENCLAW),
    ],
)
def test_any_number_of_agents_that_hear_the_same_keep_their_own_next_states(
    requests: Callable[[int], tuple[list[Json], list[Json]]], profile: AgentProfile
) -> None:
    both = [requests(number) for number in range(2 * CROWD)]
    steps = [step(f"first {n}", first, "Done.") for n, (first, _) in enumerate(both)]
    steps += [step(f"second {n}", second, "I see.") for n, (_, second) in enumerate(both)]
    with recorded([steps], Random(0), profile=profile) as found:
        for number in range(len(both)):
            assert found.parents[f"second {number}"] == f"first {number}"
            assert found.states(f"first {number}") == ["No, that is wrong."]


CALL = {"name": "exec", "arguments": '{"command": "cat README.md && git status && ls -la"}'}
FIRST_CALL: Json = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": CALL}],
}


@pytest.mark.parametrize("text", ["Done.", "", "Hello! How can I help you today?", None])
@pytest.mark.parametrize("before", [[], alternating("Hi", "Hi!"), alternating("Hi", "")])
def test_a_reply_that_many_get_links_no_strangers(text: str | None, before: list[Json]) -> None:
    reply = FIRST_CALL if text is None else {"role": "assistant", "content": text}
    system: Json = {"role": "system", "content": "You are careful."}
    own = [*before, {"role": "user", "content": "Sort the files."}]
    one = Step("one", [system, *own], reply, False, None, [], "")
    for other in (
        alternating("Write a poem."),
        alternating("a", "b", "Write a poem."),
        alternating("a", "", "Write."),
    ):
        messages = [system, *other, reply, {"role": "user", "content": "No, that is wrong."}]
        with recorded([[one, step("stranger", messages, "I see.")]], Random(0)) as found:
            assert found.parents["stranger"] is None
            assert found.states("one") == []


def test_what_is_left_of_a_history_that_was_cut_finds_its_turn() -> None:
    """Unless that is a single short message, which strangers say, too."""
    asks = "By date, and those of the same day by name. " * 8
    for asked, left, parent in (
        ("By date.", 1, "one"),
        (asks, 1, "one"),
        (asks, 2, "one"),
        ("By date.", 2, None),
    ):
        first = alternating("Sort the files.", "By name?", asked)
        second = [*first[left:], *alternating("", "Done.", "Thanks. And now back.")[1:]]
        steps = [step("one", first, "Done."), step("two", second, "I see.")]
        with recorded([steps], Random(0)) as found:
            assert found.parents["two"] == parent


def test_a_summary_hides_what_a_reply_followed_unless_the_client_tells() -> None:
    """However long the reply is: what programs answer to many may be long."""
    summary = alternating("Summary: files were sorted.")
    for reply, names, parent in (
        ("Done.", None, None),
        ("Done.", ["chat"], "one"),
        ("Done. " + AT_LENGTH, None, None),
    ):
        goes_on = [*summary, *alternating("", reply, "Thanks.")[1:]]
        steps = [step("one", alternating("Sort the files."), reply), step("two", goes_on, "I see.")]
        with recorded([steps], Random(0), names) as found:
            assert found.parents["two"] == parent


@pytest.mark.parametrize(
    ("system", "parent"),
    [("You are careful.", f"first {CROWD - 1}"), ("It is {}:00.", None)],
)
def test_of_conversations_that_are_alike_to_the_letter_the_newest_is_continued(
    system: str, parent: str | None
) -> None:
    """Those that another clock tells apart are several, and it is not sure which one goes on."""

    def asked(hour: int, *texts: str) -> list[Json]:
        return [{"role": "system", "content": system.format(hour)}, *alternating(*texts)]

    steps = [step(f"first {n}", asked(n, "go"), "Done.") for n in range(CROWD)]
    steps.append(step("second", asked(CROWD, "go", "Done.", "and now?"), "Yes."))
    with recorded([steps], Random(0)) as found:
        assert found.parents["second"] == parent
