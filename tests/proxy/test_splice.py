"""A chunk cut as bytes is the chunk that parsing, stripping and writing anew would give."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from proxy.capture import Capture
from proxy.dialects.chat import Asked, client_chunk
from proxy.serving import CHAT, Direct
from proxy.splice import Splice
from proxy.sse import event_data

TRAPS = [
    '"',
    "\\",
    '},"logprobs":null',
    ',"finish_reason":null,"token_ids":[',
    "]}]}\n\n",
    "é",
    "\n",
]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(TRAPS)
deltas = st.one_of(
    texts.map(lambda text: {"content": text}),
    texts.map(lambda text: {"reasoning": text}),
    texts.map(lambda text: {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}),
    st.just({}),
)
askings = st.builds(Asked, st.sampled_from(["m", 'a"b', "é"]), st.booleans(), st.booleans())


def event_of(delta: dict[str, Any], tokens: list[tuple[int, float]], text: str) -> bytes:
    """A content chunk in vLLM's bytes."""
    entries = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for _, logprob in tokens
    ]
    choice = {"index": 0, "delta": delta, "logprobs": {"content": entries}, "finish_reason": None}
    choice["token_ids"] = [number for number, _ in tokens]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "v-1"}
    return b"data: " + orjson.dumps({**head, "choices": [choice]}) + b"\n\n"


def parsed(event: bytes) -> Any:
    return orjson.loads(event.removeprefix(b"data: "))


tokens = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(-99, 0)), min_size=1, max_size=3)


@given(askings, st.lists(st.lists(st.tuples(deltas, tokens, texts), min_size=1), max_size=4))
def test_cut_bytes_are_the_stripped_chunks_and_lose_nothing_however_many_come_at_once(
    asked: Asked, reads: list[list[tuple[dict[str, Any], list[tuple[int, float]], str]]]
) -> None:
    splice, pieces, whole, as_json = Splice(asked), Capture(), Capture(), Capture()
    first = event_of({"content": "Hi"}, [(1, -0.5)], "Hi")
    learned = splice.learn(first, parsed(first))
    assert learned is not None
    for capture in (pieces, whole, as_json):
        capture.chunk(parsed(first), event_data(first))
    pieces.cut(learned)
    for read in reads:
        events = [event_of(*chunk) for chunk in read]
        data = b"".join(events)
        sent, cut, end = splice.cut(b": else\n\n" + data, 8)
        assert end == 8 + len(data)
        expected = [client_chunk(parsed(event), asked, None) for event in events]
        assert sent == b"".join(
            b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in expected if chunk is not None
        )
        assert cut is not None
        pieces.piece(cut)
        for event in events:
            whole.chunk(parsed(event))
            as_json.chunk(parsed(event), event_data(event))
    for taken in (pieces, as_json):
        assert taken.message() == whole.message()
        assert taken.behaviour_logprobs() == whole.behaviour_logprobs()
        assert taken.completion_ids == whole.completion_ids


def test_the_pattern_is_captured_whole_if_it_says_more_than_its_parts() -> None:
    event = event_of({"content": "Hi"}, [(1, -0.5)], "Hi")
    more = event.replace(b'"model"', b'"service_tier":"default","model"')
    stopped = event.replace(b'"index":0', b'"index":0,"stop_reason":7')
    for said, whole in ((event, False), (more, True), (stopped, True)):
        splice = Splice(Asked("m", False, False))
        assert (splice.learn(said, parsed(said)) is None) is whole
        assert splice.cut(said, 0)[2] == len(said)  # it is the pattern all the same


def test_what_is_no_content_chunk_ends_the_cut_and_is_left_to_the_parser() -> None:
    splice = Splice(Asked("m"))
    first = event_of({"content": "Hi"}, [(1, -0.5)], "Hi")
    assert splice.cut(first, 0) == (b"", None, 0)  # nothing is known yet
    splice.learn(first, parsed(first))
    sent, piece, end = splice.cut(first, 0)
    assert piece is not None
    assert piece[0] == b'{"content":"Hi"}'
    assert piece[2] == b"1"
    assert end == len(first)
    others = [
        first.replace(old, new, 1)
        for old, new in (
            (b'"finish_reason":null', b'"finish_reason":"stop","stop_reason":null'),
            (b'"index":0', b'"index":1'),
            (b'"token_ids":[1]', b'"token_ids":null'),
            (b'"token_ids":[1]', b'"token_ids":[]'),
            (b',"logprobs":', b',"more":1}}]}\n\n' + first[:-9] + b',"logprobs":'),
            (b"]}]}\n\n", b']}],"usage":{"prompt_tokens":1}}\n\n'),
            (b"]}]}\n\n", b']},{"index":1,"token_ids":[2]}]}\n\n'),
        )
    ]
    assert first not in others
    for part in (first[:-1], first[:-30], b"da"):
        assert splice.cut(part, 0) == (b"", None, 0), part
        assert splice.cut(first + part, 0) == (sent, piece, len(first)), part
    for other in (*others, b"data: [DONE]\n\n", b": note\n\n"):
        assert splice.cut(other, 0) == (b"", None, 0), other
        assert splice.cut(other + first, 0) == (b"", None, 0), other
        for read in (first + other, first + other + first):
            assert splice.cut(read, 0) == (sent, piece, len(first)), other
        # `start` is where the parser stopped: what stands before it is nobody's any more.
        assert splice.cut(other + first, len(other)) == (sent, piece, len(other + first))


def relayed(*events: bytes) -> Capture:
    """What is captured of a stream that is relayed event by event, where it cannot be cut."""
    request: dict[str, Any] = {"model": "m", "messages": [], "stream": True}
    serving = Direct(CHAT, request, "m", None)
    for event in events:
        _, end = serving.content(event, 0)
        if end < len(event):
            serving.event(event)
    serving.capture.read()
    return serving.capture


HI = event_of({"content": "Hi"}, [(1, -0.5)], "Hi")
LAST = HI.replace(b'"finish_reason":null', b'"finish_reason":"stop"')


def test_a_log_prob_that_is_no_number_loses_no_reply_and_trains_none() -> None:
    null = HI.replace(b"-0.5", b"null")
    for events in ((null, LAST), (HI, null, LAST), (HI, HI, null, LAST)):
        assert "could not be read" in str(relayed(*events).untrainable({}))


def test_what_comes_after_the_replys_end_is_seen_wherever_the_pattern_begins() -> None:
    said = "the engine sent parts of the reply after its end"
    for events in ((LAST, HI), (HI, LAST, HI), (HI, HI, LAST, HI)):
        assert relayed(*events).untrainable({}) == said


def test_a_chunk_without_ids_takes_no_text_of_the_others_away() -> None:
    capture = relayed(HI, HI, HI.replace(b"[1]", b"[]"), LAST)
    assert capture.message()["content"] == "HiHiHiHi"


def test_a_stream_with_other_line_ends_is_left_to_the_parser() -> None:
    splice = Splice(Asked("m"))
    first = event_of({"content": "Hi"}, [(1, -0.5)], "Hi")
    splice.learn(first, parsed(first))
    other = first.replace(b"}]}\n\n", b"}]}\r\n\r\n")
    for read in (other, first + other, other + first):
        assert splice.cut(read, 0) == (b"", None, 0), read
