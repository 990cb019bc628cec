"""The HTTP client towards the engine, against servers on real sockets."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextstate.errors import ConfigError
from proxy.upstream import Cut, NotHttp, Upstream
from tests.proxy.upstream_server import (
    CHUNKED,
    OK,
    SIZED,
    Talk,
    ask,
    chunked,
    run,
    saying,
    server,
    whole,
)

# Requests


def test_a_request_is_sent_in_these_bytes() -> None:
    async def test() -> None:
        async with server(saying(SIZED), base="/base/") as (upstream, talks):
            answer = await upstream.ask(
                "POST", "/v1/x?a=%0d", {"x-a": "caf\udce9", "x-b": ""}, b"body"
            )
            assert await whole(answer) == b"hello"
            host = talks[0].writer.get_extra_info("sockname")
            assert talks[0].requests == [
                (
                    b"POST /base/v1/x?a=%%0d HTTP/1.1\r\nHost: %b:%d\r\nX-Fixed: 1\r\n"
                    b"x-a: caf\xe9\r\nx-b: \r\nContent-Length: 4\r\n\r\n"
                    % (host[0].encode(), host[1]),
                    b"body",
                )
            ]

    run(test())


def test_a_user_in_the_url_is_its_authorization_unless_there_is_another() -> None:
    async def test() -> None:
        async with server(saying(SIZED), user="me:pw@") as (upstream, talks):
            await ask(upstream)
            answer = await upstream.ask("POST", "/", {"Authorization": "Bearer key"}, b"")
            assert await whole(answer) == b"hello"
            first, second = (head for head, _ in talks[0].requests)
            assert b"\r\nAuthorization: Basic bWU6cHc=\r\n" in first
            assert second.count(b"Authorization") == 1
            assert b"\r\nAuthorization: Bearer key\r\n" in second

    run(test())


@pytest.mark.parametrize("url", ["", "host", "host:8000", "http://", "ftp://host", "http://h:x"])
def test_an_invalid_address_is_refused_with_the_name_of_its_key(url: str) -> None:
    with pytest.raises(ConfigError, match=r"\[engine\] url"):
        Upstream(url, {})


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("/", "x", "a\r\ny: b"),
        ("/", "x", "a\ny: b"),
        ("/", "x", "a\r"),
        ("/", "x\r\ny", "a"),
        ("/ HTTP/1.1\r\nx: y", "x", "a"),
    ],
)
def test_a_line_break_within_the_head_is_refused_and_nothing_sent(
    target: str, name: str, value: str
) -> None:
    async def test() -> None:
        async with server(saying(SIZED)) as (upstream, talks):
            with pytest.raises(ValueError, match="line break"):
                await upstream.ask("POST", target, {name: value}, b"")
            assert talks == []

    run(test())


# Answers


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[bytes], bytes, bool]:
    """An answer in pieces, its body, and whether its end is known without the connection's."""
    body_parts = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    body = b"".join(body_parts)
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    data = draw(st.sampled_from([b"", interim])) + OK + b"X-A: 1\r\n"
    if framing == "length":
        data += b"content-length: %d\r\n\r\n" % len(body) + body
    elif framing == "chunked":
        end = draw(st.sampled_from([b"0\r\n\r\n", b"0;x=y\r\nX-Trailer: 1\r\n\r\n"]))
        chunks = chunked(body_parts).removesuffix(b"0\r\n\r\n")
        data += b"TRANSFER-encoding: Chunked\r\n\r\n" + chunks + end
    else:
        data += b"\r\n" + body
    cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=len(data))))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return pieces, body, framing != "close"


@settings(max_examples=100)
@given(answers())
def test_every_framing_split_anywhere_gives_the_same_answer(
    made: tuple[list[bytes], bytes, bool],
) -> None:
    pieces, body, framed = made

    async def test() -> None:
        async with server(saying(*pieces, keep=framed)) as (upstream, talks):
            for _ in range(2):
                answer = await upstream.ask("POST", "/", {}, b"")
                assert (answer.status, answer.headers["x-a"]) == (200, "1")
                assert "X-Trailer" not in answer.headers
                assert "Link" not in answer.headers
                assert await whole(answer) == body
                assert await answer.read() == b""
            assert len(talks) == (1 if framed else 2)

    run(test())


def test_the_chunks_of_one_read_come_as_one_piece() -> None:
    async def test() -> None:
        parts = [b"data: %d\n\n" % number for number in range(100)]
        async with server(saying(CHUNKED + chunked(parts))) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert await answer.read() == b"".join(parts)
            assert await answer.read() == b""

    run(test())


def test_a_piece_is_there_before_the_next_one_comes() -> None:
    async def test() -> None:
        go_on = asyncio.Event()

        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(CHUNKED + b"3\r\none\r\n")
            await go_on.wait()
            await talk.say(b"3\r\ntwo\r\n0\r\n\r\n")

        async with server(serve) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert await answer.read() == b"one"
            go_on.set()
            assert await answer.read() == b"two"
            assert await answer.read() == b""

    run(test())


def test_headers_keep_their_order_duplicates_and_bytes() -> None:
    async def test() -> None:
        fields = b"Set-Cookie: a\r\nX-Odd: \xff\xc3\xa9\r\nset-cookie: b\r\nX-Empty:\r\n"
        async with server(saying(OK + fields + b"Content-Length: 0\r\n\r\n")) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert list(answer.headers.items()) == [
                ("Set-Cookie", "a"),
                ("X-Odd", "\udcffé"),
                ("set-cookie", "b"),
                ("X-Empty", ""),
                ("Content-Length", "0"),
            ]
            assert answer.headers.getall("SET-COOKIE") == ["a", "b"]
            assert answer.content_length == 0
            assert await answer.read() == b""

    run(test())


def test_an_answer_to_head_has_no_body_and_its_connection_is_not_used_again() -> None:
    async def test() -> None:
        said = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
        async with server(saying(said)) as (upstream, talks):
            for number in (1, 2):
                answer = await upstream.ask("HEAD", "/", {}, b"")
                assert (answer.status, answer.content_length) == (200, 5)
                assert await answer.read() == b""
                assert len(talks) == number
            assert b"content-length" not in talks[0].requests[0][0].lower()

    run(test())


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_ends_with_its_head(status: int) -> None:
    async def test() -> None:
        said = b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status
        async with server(saying(said)) as (upstream, talks):
            for _ in range(2):
                answer = await upstream.ask("POST", "/", {}, b"")
                assert answer.status == status
                assert await answer.read() == b""
            assert len(talks) == 1

    run(test())


def test_a_redirect_is_an_answer_like_any_other() -> None:
    async def test() -> None:
        said = b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
        async with server(saying(said)) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert (answer.status, answer.headers["location"]) == (307, "http://127.0.0.1:1/")

    run(test())


# What goes wrong


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 ", OK + b"X-A: 1\r\n", OK[:-2] + b"\r\n"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_closes_before_it_answers_is_an_os_error(said: bytes, reset: bool) -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(said)
            if reset:
                talk.reset()

        async with server(serve) as (upstream, _):
            with pytest.raises(ConnectionResetError, match="before it answered"):
                await upstream.ask("POST", "/", {}, b"")

    run(test())


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        OK + b"bad header\r\n\r\n",
        OK + b"Content-Length: x\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        OK + b"x: " + b"a" * 200_000,
        b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"\x16\x03\x01",
    ],
)
def test_an_answer_that_is_not_http_raises_not_http(said: bytes) -> None:
    async def test() -> None:
        async with server(saying(said)) as (upstream, talks):
            with pytest.raises(NotHttp):
                await upstream.ask("POST", "/", {}, b"")
            await talks[0].ended.wait()

    run(test())


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("said", "came"),
    [
        (OK + b"Content-Length: 9\r\n\r\nhello", b"hello"),
        (OK + b"Content-Length: 9\r\n\r\n", b""),
        (CHUNKED + b"5\r\nhello\r\n", b"hello"),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"hello"),
        (CHUNKED + b"9\r\nhello", b"hello"),
        (CHUNKED, b""),
    ],
)
def test_a_body_without_its_end_is_cut(said: bytes, came: bytes, reset: bool) -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(said)
            if reset:
                await taken.wait()
                talk.reset()

        taken = asyncio.Event()
        async with server(serve) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            if came:
                assert await answer.read() == came
            taken.set()
            for _ in range(2):
                with pytest.raises(Cut):
                    await answer.read()
            answer.close()

    run(test())


def test_a_body_without_a_length_is_cut_by_a_reset_and_not_by_a_close() -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(OK + b"\r\nhello")
            await taken.wait()
            talk.reset()

        taken = asyncio.Event()
        async with server(serve) as (upstream, _):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert await answer.read() == b"hello"
            taken.set()
            with pytest.raises(Cut):
                await answer.read()

    run(test())


def test_broken_framing_is_a_cut_after_what_came_before_it() -> None:
    async def test() -> None:
        async with server(saying(CHUNKED + b"5\r\nhello\r\nZZ\r\n")) as (upstream, talks):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert await answer.read() == b"hello"
            with pytest.raises(Cut, match="broken"):
                await answer.read()
            answer.close()
            await talks[0].ended.wait()

    run(test())


def test_a_refused_connection_is_an_os_error() -> None:
    async def test() -> None:
        async with Upstream("http://127.0.0.1:1", {}) as upstream:
            with pytest.raises(ConnectionRefusedError):
                await upstream.ask("POST", "/", {}, b"")

    run(test())


def test_a_connection_that_cannot_be_made_times_out() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
            url = f"https://127.0.0.1:{silent.getsockname()[1]}"
            async with Upstream(url, {}, connect_s=0.05) as upstream:
                with pytest.raises(TimeoutError):
                    await upstream.ask("POST", "/", {}, b"")

    run(test())
