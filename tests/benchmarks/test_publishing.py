"""What the benchmark of version changes counts, by hand."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.asking import Answered, Broken, read
from benchmarks.client import Reply
from benchmarks.gaps import (
    Window,
    added,
    lengths,
    quantile,
    sort_into,
    wrong_versions,
)
from benchmarks.marks import ADAPTER, FLIP, GATE, REGISTERED, STEP, Mark, shares, update_of
from benchmarks.publishing import Answers

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-NextState-Version: 7\r\n"
    b"x-nextstate-turn: turn-1\r\n\r\n"
)


def answered(*times: float, version: int = 0, started: float | None = None) -> Answered:
    """A reply whose events came at these times, asked for at the first of them."""
    begin = times[0] if started is None else started
    return Answered(version, "turn", "text", begin, times, times[-1])


def event(content: str | None = None, finish: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    data = orjson.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})
    return b"%x\r\ndata: %b\n\n\r\n" % (len(data) + 8, data)


def reply(*events: bytes, head: bytes = HEAD) -> Reply:
    body = b"".join(events) + b"data: [DONE]\n\n\r\n0\r\n\r\n"
    times = [float(second) for second in range(1, len(events) + 2)]
    return Reply(0.5, times, times[-1], [head + body[:40], body[40:]])


def test_a_replys_text_version_and_turn_are_read_and_what_follows_its_finish_has_no_gap() -> None:
    found = read(reply(event(""), event("4 and "), event("3"), event("", "stop"), event()))
    assert (found.text, found.version, found.turn) == ("4 and 3", 7, "turn-1")
    assert list(found.times) == [1.0, 2.0, 3.0, 4.0]
    assert (found.started, found.ended) == (0.5, 6.0)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (reply(event(""), event("4")), "no finish reason in 2 events"),
        (reply(event("4"), b'data: {"error": {"message": "gone"}}\n\n'), "gone"),
        (reply(event("4", "stop"), head=b"HTTP/1.1 200 OK\r\n\r\n"), "x-nextstate-version is None"),
    ],
    ids=["cut", "error", "no version"],
)
def test_a_reply_that_is_not_whole_counts_as_failed(broken: Reply, why: str) -> None:
    with pytest.raises(Broken, match=why):
        read(broken)


def test_the_worst_gap_that_changes_add_is_the_difference_between_the_windows() -> None:
    windows = [
        Window(0, 10, False),
        Window(10, 20, True),
        Window(20, 30, True),
        Window(30, 40, False),
    ]
    sort_into(
        windows,
        [
            answered(1, 1.5, 2.5),  # at worst 1.0 without a change
            answered(11, 13, 14),  # 2.0 beside it
            answered(21, 21.5),  # 0.5 with changes
            answered(31, 31.25),  # 0.25 without
            answered(50, 60),  # after all windows
        ],
    )
    assert [lengths(window.gaps) for window in windows] == [[0.5, 1.0], [1.0, 2.0], [0.5], [0.25]]
    found = added(windows)
    assert found.overall == 2.0 - 1.0
    assert found.mean == ((2.0 - 1.0) + (0.5 - 0.25)) / 2
    assert 0.25 <= found.low <= found.mean <= found.high <= 1.0


def test_a_gap_that_reaches_into_a_window_with_changes_belongs_there() -> None:
    windows = [Window(0, 10, False), Window(10, 20, True), Window(20, 30, False)]
    sort_into(windows, [answered(9, 11), answered(19, 21), answered(9.5, 21, started=9)])
    assert [lengths(window.gaps) for window in windows] == [[], [2, 2, 11.5], []]
    assert [lengths(window.firsts) for window in windows] == [[0, 0.5], [0], []]


@given(st.lists(st.floats(0, 30), min_size=2, max_size=20), st.integers(1, 29))
def test_every_gap_within_the_windows_counts_once(times: list[float], border: int) -> None:
    times.sort()
    windows = [Window(0, border, True), Window(border, 30, False)]
    sort_into(windows, [answered(*times)])
    counted = lengths(gap for window in windows for gap in window.gaps)
    assert counted == sorted(b - a for a, b in pairwise(times))


@given(st.lists(st.integers(0, 9), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_least_value_that_the_share_does_not_exceed(
    values: list[int], share: float
) -> None:
    found = quantile(values, share)
    assert sum(value <= found for value in values) >= share * len(values)
    assert sum(value < found for value in values) < share * len(values)


def test_a_reply_by_a_version_that_cannot_be_serving_is_found() -> None:
    published = [(0.0, 0), (10.0, 1), (20.0, 2)]
    replies = [
        answered(5, 6, version=0),
        answered(12, 13, version=1, started=11),
        answered(14, 15, version=0, started=11.5),  # asked for before version 1 had answered
        answered(19, 22, version=0, started=18),
        answered(19, 22, version=2, started=18),
        answered(25, 26, version=9, started=24),
    ]
    assert wrong_versions(replies[:3], published) == []
    assert wrong_versions(replies, published) == [
        "version 0 answered after 1 had",
        "version 2 answered before it was published",
        "version 9 answered and was never published",
    ]


def test_the_parts_of_an_update_add_up_and_a_rejected_step_is_left_out() -> None:
    marks = [
        Mark(STEP, 0, 1),
        Mark(GATE, 1, 2),
        Mark(REGISTERED, 2, 3),  # rejected
        Mark(STEP, 10, 11),
        Mark(GATE, 12, 15),
        Mark(ADAPTER, 15, 15.5),
        Mark(FLIP, 16, 17, version=2),
    ]
    update = update_of(marks)
    assert update == marks[3:]
    assert shares(update) == {GATE: 4, ADAPTER: 0.5, FLIP: 1.5}
    assert sum(shares(update).values()) == update[-1].ended - update[0].ended


def test_what_is_ours_leaves_out_the_time_in_which_nobody_asked() -> None:
    answers = Answers(2, {"gate": [0.5, 0.25], "asked": [0.25, -0.125]}, [1.25, 1.0])
    assert answers.ours == [1.0, 1.0]
