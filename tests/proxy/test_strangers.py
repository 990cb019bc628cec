"""Words that may be a stranger's land on nobody's turn, those of the conversation on their own."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from nextstate.records import Json
from nextstate.store.sessions import Sessions
from tests.proxy.conversations import AT_LENGTH, Step, alternating, asked, recorded

GREETING = "Hello and welcome! I am the assistant of this shop." + AT_LENGTH
SHOP: Json = {"role": "system", "content": "You help in a shop."}
OK: Json = {"role": "tool", "tool_call_id": "call_0", "content": "ok"}
Names = Sequence[str] | None


def user(text: str, *pictures: str) -> Json:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}}
        for one in pictures
    ]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts] if parts else text}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def said(text: str, *calls: str) -> Json:
    message: Json = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{n}", "type": "function", "function": {"name": name, "arguments": "{}"}}
            for n, name in enumerate(calls)
        ]
    return message


def after(messages: Sequence[Json], reply: Json, word: str = "No, wrong.") -> list[Json]:
    """The request that follows `reply`, with a person's word about it."""
    return [*messages, reply, user(word)]


DONE, CAT = said("Done."), said("A cat.")
CANCEL = user("Cancel my order, please.")


def customer(number: int, time: str) -> list[Json]:
    return [system(f"You help customer {number}. It is {time}."), CANCEL]


def with_detail(message: Json) -> Json:
    text, picture = message["content"]
    picture = {**picture, "image_url": {**picture["image_url"], "detail": "auto"}}
    return {"role": "user", "content": [text, picture]}


def in_parts(text: str) -> Json:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def tool(text: str, call: str = "call_0") -> list[Json]:
    return [user("Look."), said("", "f"), {"role": "tool", "tool_call_id": call, "content": text}]


WHAT = "What is this?"


@pytest.mark.parametrize(
    ("one", "other", "again", "reply"),
    [
        # A clock and the day are no more than that, but each is another conversation's too.
        (customer(1, "10:00"), customer(1, "10:01"), customer(1, "10:02"), DONE),
        (
            customer(1, "9:59:59 on 2026-11-30"),
            customer(1, "10:01:00 on 2026-12-01"),
            customer(1, "10:02:30 on 2026-12-01"),
            DONE,
        ),
        # A number that is no clock is not told from one.
        (customer(4411, "10:00"), customer(1144, "10:01"), customer(4411, "10:02"), DONE),
        # What changed is no clock: which of them is it?
        (
            [system("Room 12."), CANCEL],
            [system("Room 21."), CANCEL],
            [system("Room 3."), CANCEL],
            DONE,
        ),
        # Only the picture tells them apart, and the agent has dropped or rewritten it.
        ([user(WHAT, "1")], [user(WHAT, "2")], [user(WHAT)], CAT),
        ([user(WHAT, "1")], [user(WHAT, "2")], [with_detail(user(WHAT, "1"))], CAT),
        # Only white space does, and the agent has rewritten it.
        ([user("Delete file 1 0")], [user("Delete file 10")], [in_parts("Delete file 1 0")], DONE),
        (tool("a b"), tool("ab"), tool("a b", "call0"), DONE),
    ],
)
@pytest.mark.parametrize(("names", "vague"), [(None, False), (["app"], True)])
def test_what_fits_two_conversations_alike_but_none_to_the_letter_is_nobodys(
    one: list[Json], other: list[Json], again: list[Json], reply: Json, names: Names, vague: bool
) -> None:
    for first, second in ((one, other), (other, one)):
        steps = [asked("a1", first, reply), asked("b1", second, reply)]
        steps.append(asked("a2", after(again, reply), said("I see.")))
        steps.append(asked("b2", after(other, reply, "Great!"), said("Gladly.")))
        with recorded([steps], Random(0), names, vague=vague) as found:
            own, strange = ("a1", "b1") if first is one else ("b1", "a1")
            assert found.parents["a2"] is None
            assert found.states(own) == []
            assert found.states(strange) == ["Great!"], "to the letter, so it is sure"
    alone = [asked("a1", one, reply), asked("a2", after(again, reply), said("I see."))]
    with recorded([alone], Random(0), names, vague=vague) as found:
        assert found.states("a1") == ["No, wrong."], "nobody else is there"


def test_an_older_conversation_in_the_same_words_is_not_overlooked_for_many_newer_ones() -> None:
    others = [[system(f"Room {n}."), user(f"Order {n}.")] for n in range(30)]
    steps = [asked("a1", customer(1, "10:00"), DONE)]
    steps += [asked(f"x{n}", other, DONE) for n, other in enumerate(others)]
    steps += [asked("b1", customer(1, "10:01"), DONE)]
    steps.append(asked("a2", after(customer(1, "10:02"), DONE), said("I see.")))
    with recorded([steps], Random(0)) as found:
        assert found.parents["a2"] is None


BOOK, POEM = user("Book."), user("Poem.")
BEFORE = {
    "a word to go on": (
        [BOOK, said("One."), user("continue")],
        [POEM, said("Roses."), user("continue")],
    ),
    "an empty result": ([BOOK, said("", "f"), OK], [POEM, said("", "g"), OK]),
    "a call and its result": ([BOOK, said("", "f"), OK], [POEM, said("", "f"), OK]),
    "all that is left": ([BOOK, said("One."), user("continue")], [user("continue")]),
    "equal replies": (
        [user("[10:00] Book."), said("One."), user("continue")],
        [POEM, said("One."), user("continue")],
    ),
    "what the app says first": (
        [user("Be brief."), user("[10:00] Book.")],
        [user("Be brief."), POEM],
    ),
    "a long text of the app": (
        [user("Rules." + AT_LENGTH), said(GREETING), user("[10:00] Book.")],
        [user("Rules." + AT_LENGTH), said(GREETING), POEM],
    ),
}


@pytest.mark.parametrize("case", BEFORE)
@pytest.mark.parametrize(("names", "vague"), [(None, False), (["app"], True)])
def test_a_short_reply_and_one_shared_message_are_no_proof(
    case: str, names: Names, vague: bool
) -> None:
    """The stranger's own turn is in no store: it went another way, or was forgotten."""
    own, strangers = BEFORE[case]
    steps = [
        asked("a1", own, DONE),
        asked("stranger", after(strangers, DONE), said("I see.")),
        asked("a2", after(own, DONE, "Great!"), said("Gladly.")),
    ]
    with recorded([steps], Random(0), names, vague=vague) as found:
        assert found.parents["stranger"] is None
        assert found.states("a1") == ["Great!"]


@pytest.mark.parametrize(
    "own",
    [
        [BOOK, said("One."), user("continue")],
        [BOOK, said("", "f"), OK],
        [BOOK, said("One."), user("Now order the second of these, but only if it is blue.")],
    ],
)
def test_what_is_left_after_a_summary_finds_its_turn_if_it_is_enough(own: list[Json]) -> None:
    for left in (own[1:], [user("Summary: a book was asked for."), *own[1:]]):
        is_cut = left[0]["role"] == "assistant"
        reply = DONE if is_cut else said("Done." + AT_LENGTH)
        steps = [asked("one", own, reply), asked("two", after(left, reply), said("I see."))]
        with recorded([steps], Random(0)) as found:
            assert found.parents["two"] == "one"


@pytest.mark.parametrize(
    ("own", "reply", "later"),
    [
        ([SHOP, BOOK, said("I look.", "f"), OK], DONE, [SHOP, BOOK, DONE]),
        ([SHOP, BOOK, said("I look.", "f"), OK], DONE, [SHOP, BOOK, said("I look."), DONE]),
        ([SHOP, BOOK, said("The user wants")], said("a book.</think>Done."), [SHOP, BOOK, DONE]),
        ([SHOP, BOOK, said("Sure: ")], said("Sure: it is."), [SHOP, BOOK, said("Sure: it is.")]),
    ],
)
def test_where_only_an_agents_own_work_was_dropped_all_that_people_said_is_proof(
    own: list[Json], reply: Json, later: list[Json]
) -> None:
    steps = [
        asked("one", own, reply),
        asked("stranger", [SHOP, BOOK, said("Which?"), POEM, later[-1], user("No.")], said("Why?")),
        asked("two", [*later, user("Thanks.")], said("Gladly.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["stranger"] is None
        assert found.states("one") == ["Thanks."]


def test_a_clock_in_what_was_said_first_hides_no_turn() -> None:
    """Here in a user's message. Whoever then asks something else is another one."""

    def timed(minute: int, *later: Json) -> list[Json]:
        return [user(f"It is 10:{minute}, and you are an agent."), BOOK, said("Which?"), *later]

    steps = [
        asked("one", timed(10, user("This.")), DONE),
        asked("stranger", after(timed(20, user("That.")), DONE), said("Why?")),
        asked("two", after(timed(30, user("This.")), DONE), said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["stranger"] is None
        assert found.states("one") == ["No, wrong."]


def test_short_words_to_another_system_are_not_the_same_words() -> None:
    pirate, cook = system("You are a pirate."), system("You are a cook.")
    for asks, reply, names, parent in (
        ("Hi", "Hello!", None, None),
        ("Hi", "Hello!", ["chat"], "one"),
        ("Sort all the files of this folder.", "I do." + AT_LENGTH, None, "one"),
    ):
        steps = [
            asked("one", [pirate, user(asks)], said(reply)),
            asked("two", after([cook, user(asks)], said(reply)), said("I see.")),
        ]
        with recorded([steps], Random(0), names) as found:
            assert found.parents["two"] == parent
    for own, later in (
        ([BOOK, said("I look.", "f"), OK], [BOOK]),
        ([BOOK, said("Which?"), POEM], [said("Which?"), POEM]),
        ([user("Rules."), user("[10:00] Book.")], [user("Rules."), BOOK]),
    ):
        for begins, parent in ((cook, None), (pirate, "one")):
            steps = [
                asked("one", [pirate, *own], DONE),
                asked("two", after([begins, *later], DONE), said("I see.")),
            ]
            with recorded([steps], Random(0)) as found:
                assert found.parents["two"] == parent


def test_an_opening_of_the_model_itself_is_found_by_the_system_that_asked_for_it() -> None:
    steps = [
        asked("one", [SHOP], said(GREETING)),
        asked("two", after([SHOP], said(GREETING)), said("I see.")),
        asked("other", after([system("You help in a bank.")], said(GREETING)), said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert (found.parents["two"], found.parents["other"]) == ("one", None)


QUESTION = user("That is not what I asked.")


@pytest.mark.parametrize(
    ("own", "strangers", "reply"),
    [
        ([SHOP, user("Hi there")], [SHOP, user("What do you sell?")], said(GREETING)),
        ([SHOP, user("Hi there")], [SHOP], said(GREETING)),
        ([user("Hi there")], [user("Where is my parcel?")], said(GREETING * 5)),
        (
            [SHOP, *alternating("Hi", "Hi!", "Returns?")],
            [SHOP, user("Can I return it?")],
            said(GREETING),
        ),
    ],
)
@pytest.mark.parametrize(("names", "vague"), [(None, False), (["app"], True)])
def test_a_long_canned_reply_alone_is_no_proof(
    own: list[Json], strangers: list[Json], reply: Json, names: Names, vague: bool
) -> None:
    steps = [
        asked("a1", own, reply),
        asked("stranger", [*strangers, reply, QUESTION], said("I see.")),
        asked("a2", after(own, reply, "Thanks."), said("Gladly.")),
    ]
    with recorded([steps], Random(0), names, vague=vague) as found:
        assert found.parents["stranger"] is None
        assert found.states("a1") == ["Thanks."]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ("[10:00] Book a table.", "Book a table."),
        ("Book a table.", "[10:00] Book a table."),
        ("Book a table.\n\n<context>\nIt rains.\n</context>", "Book a table."),
        ("Book  a\ntable.\n\nRuntime: host", "Book a table."),
        ("It rains.\n\nEst-ce libre\u00a0?", "Est-ce libre\u00a0?"),
        ("部屋\u3000を予約。\n\nRuntime: host", "部屋\u3000を予約。"),
        ("It rains.\n\nRe\u0301serve une table.", "Re\u0301serve une table."),
        (
            "Answer from this.\n<query>Is a table free at ten?</query>\nBe brief.",
            "Is a table free at ten?",
        ),
    ],
)
@pytest.mark.parametrize(("names", "vague"), [(None, False), (["app"], True)])
def test_a_long_reply_to_the_same_words_is_the_own_one(
    first: str, later: str, names: Names, vague: bool
) -> None:
    reply = said("It is booked." + AT_LENGTH)
    steps = [
        asked("one", [SHOP, user(first)], reply),
        asked("two", after([SHOP, user(later)], reply), said("I see.")),
    ]
    with recorded([steps], Random(0), names, vague=vague) as found:
        assert found.states("one") == ["No, wrong."]


@pytest.mark.parametrize(
    ("own", "strangers", "reply"),
    [
        ([user("Hi there")], [], said("Hello!")),
        ([user("[10:00] Book a table.")], [user("Write a poem")], DONE),
        ([user("Book a table.")], [user("And the next table.")], DONE),
    ],
)
def test_the_only_conversation_that_was_seen_of_a_person_or_an_app_need_not_be_the_only_one(
    own: list[Json], strangers: list[Json], reply: Json
) -> None:
    steps = [
        asked("a1", own, reply),
        asked("stranger", [*strangers, reply, QUESTION], said("I see.")),
    ]
    with recorded([steps], Random(0), ["app"], vague=True) as found:
        assert found.parents["stranger"] is None
        assert found.states("a1") == []
    with recorded([steps], Random(0), ["chat"], vague=False) as found:
        assert found.states("a1") == ["That is not what I asked."], "one conversation has this name"


def with_results(size: int, of: int) -> list[Step]:
    """`of` conversations that got one reply after results of `size` bytes each, and a request that
    may continue any of them: its agent has dropped its own work."""
    reply, go = said("It is booked." + AT_LENGTH), user("Book a table.")
    steps: list[Step] = []
    for n in range(of):
        work = [{**OK, "content": f"{n} {at} " + "x" * size} for at in range(3)]
        steps.append(asked(f"a{n}", [go, said("", "f", "f", "f"), *work], reply))
    return [*steps, asked("next", after([go], reply), said("I see."))]


def test_what_is_read_for_a_proof_has_a_bound_whatever_the_messages_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the store is locked: megabytes of words in each candidate took seconds."""
    read: list[int] = []
    plain = Sessions.written

    def written(sessions: Sessions, key: bytes, most: int) -> bytes | None:
        found = plain(sessions, key, most)
        read.append(len(found or b""))
        return found

    monkeypatch.setattr(Sessions, "written", written)
    totals: list[int] = []
    for size in (1 << 10, 1 << 16, 1 << 20):
        read.clear()
        with recorded([with_results(size, 12)], Random(0)) as found:
            assert found.parents["next"] is None, "it may be anybody's"
        totals.append(sum(read))
    assert 36 << 10 < totals[0] < 40 << 10, "each is read once"
    assert totals[0] < totals[1] <= 4 << 20, totals
    assert totals[2] <= 4 << 20, totals


@pytest.mark.parametrize(("size", "parent"), [(1 << 10, "one"), (1 << 20, "one"), (1 << 22, None)])
def test_words_too_long_to_be_compared_are_no_proof(size: int, parent: str | None) -> None:
    text = "Book a table. " * (size // 14)
    reply = said("It is booked." + AT_LENGTH)
    steps = [
        asked("one", [SHOP, user(f"[10:00] {text}")], reply),
        asked("two", after([SHOP, user(text)], reply), said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] == parent


def test_pictures_of_many_megabytes_leave_room_for_the_words_beside_them() -> None:
    reply = said("It is booked." + AT_LENGTH)
    steps = [
        asked("one", [SHOP, user("[10:00] Book this table.", "A" * (6 << 20))], reply),
        asked("two", after([SHOP, user("Book this table.")], reply), said("I see.")),
    ]
    with recorded([steps], Random(0)) as found:
        assert found.parents["two"] == "one"
