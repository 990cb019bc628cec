"""Server-sent events may be split at any byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.sse import EventSplitter, event_data

events = st.lists(
    st.tuples(
        st.lists(
            st.sampled_from(["data: x", 'data:{"a":1}', ": note", "event: e", "id: é"]), min_size=1
        ),
        st.sampled_from(["\n", "\r\n"]),
    ).map(lambda e: (e[1].join(e[0]) + e[1] * 2).encode())
)


@given(events, st.data())
def test_events_come_out_whole_and_unchanged_wherever_the_stream_is_split(
    whole: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    splitter = EventSplitter()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[start:end])
    assert found == whole
    assert splitter.rest == b""


def test_a_cut_stream_leaves_its_last_bytes() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: 2\n") == [b"data: 1\n\n"]
    assert splitter.rest == b"data: 2\n"


def test_data_lines_are_joined_and_comments_have_no_data() -> None:
    assert event_data(b"data: {}\n\n") == b"{}"
    assert event_data(b"data:a\r\ndata: b\r\n\r\n") == b"a\nb"
    assert event_data(b": keep-alive\n\n") is None
    assert event_data(b"data: a\ndata: b\n\n") == b"a\nb"
