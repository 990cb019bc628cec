"""The engine's connections: which are used again, which are closed, and when."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.proxy.running_proxy import until
from tests.proxy.upstream_server import CHUNKED, OK, SIZED, Talk, ask, run, saying, server, whole

# Connections


def test_a_connection_is_used_again_once_its_answer_is_read() -> None:
    async def test() -> None:
        async with server(saying(SIZED)) as (upstream, talks):
            first = await upstream.ask("POST", "/", {}, b"1")
            second = await upstream.ask("POST", "/", {}, b"2")
            assert [await whole(second), await whole(first)] == [b"hello", b"hello"]
            first.close()  # it is no longer theirs to close
            await ask(upstream, b"3")
            await ask(upstream, b"4")
            bodies = [[body for _, body in talk.requests] for talk in talks]
            assert bodies == [[b"1", b"3", b"4"], [b"2"]]

    run(test())


@pytest.mark.parametrize(
    "said",
    [
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        SIZED + b"HTTP/1.1 500 Not yours\r\nContent-Length: 3\r\n\r\nbad",
        SIZED + b"HTTP/1.1 500 Not",
        SIZED + b"rubbish",
        CHUNKED + b"5\r\nhello\r\n0\r\n\r\nrubbish",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhellorubbish",
    ],
)
def test_a_connection_that_will_close_or_sent_too_much_is_not_used_again(said: bytes) -> None:
    async def test() -> None:
        async with server(saying(said)) as (upstream, talks):
            for number in (1, 2):
                assert await ask(upstream) == b"hello"
                await until(lambda number=number: len(talks) == number)
                await talks[-1].ended.wait()

    run(test())


def test_a_connection_that_sends_without_a_request_is_closed() -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(SIZED)
            await speak.wait()
            await talk.say(SIZED)
            await talk.request()

        speak = asyncio.Event()
        async with server(serve) as (upstream, talks):
            assert await ask(upstream) == b"hello"
            speak.set()
            await talks[0].ended.wait()
            speak.clear()
            assert await ask(upstream) == b"hello"
            assert len(talks) == 2

    run(test())


def test_a_connection_that_the_server_closed_meanwhile_is_not_used() -> None:
    async def test() -> None:
        async with server(saying(SIZED, keep=False)) as (upstream, talks):
            assert await ask(upstream) == b"hello"
            free = upstream._free  # pyright: ignore[reportPrivateUsage]
            await until(lambda: not free)
            assert await ask(upstream) == b"hello"
            assert [len(talk.requests) for talk in talks] == [1, 1]

    run(test())


def test_idle_connections_are_closed() -> None:
    async def test() -> None:
        async with server(saying(SIZED), idle_s=0.02) as (upstream, talks):
            answers = [await upstream.ask("POST", "/", {}, b"") for _ in range(3)]
            for answer in answers:
                await whole(answer)
            for talk in talks:
                await talk.ended.wait()
            assert await ask(upstream) == b"hello"
            assert len(talks) == 4

    run(test())


def test_an_answer_that_comes_before_the_request_is_out_ends_the_connection() -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.reader.readuntil(b"\r\n\r\n")
            await talk.say(SIZED)
            await asked_again.wait()

        asked_again = asyncio.Event()
        async with server(serve) as (upstream, talks):
            assert await ask(upstream, bytes(64 * 1024 * 1024)) == b"hello"
            assert await ask(upstream) == b"hello"
            assert len(talks) == 2
            asked_again.set()

    run(test())


def test_a_reader_that_does_not_read_stops_the_server_until_it_does() -> None:
    size = 32 * 1024 * 1024

    async def test() -> None:
        sent = asyncio.Event()

        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(OK + b"Content-Length: %d\r\n\r\n" % size, bytes(size))
            sent.set()
            await talk.request()
            await talk.say(SIZED)

        async with server(serve) as (upstream, talks):
            answer = await upstream.ask("POST", "/", {}, b"")
            (connection,) = upstream._connections  # pyright: ignore[reportPrivateUsage]
            transport = connection._transport  # pyright: ignore[reportPrivateUsage]
            await until(lambda: not transport.is_reading())
            assert sum(map(len, connection.parts)) < 1024 * 1024
            assert not sent.is_set()
            assert await whole(answer) == bytes(size)
            assert sent.is_set()
            assert await ask(upstream) == b"hello"
            assert len(talks) == 1

    run(test())


def test_closing_an_answer_ends_its_request_at_once() -> None:
    async def test() -> None:
        async def serve(talk: Talk) -> None:
            await talk.request()
            await talk.say(CHUNKED + b"5\r\nhello\r\n")
            await talk.request()

        async with server(serve) as (upstream, talks):
            answer = await upstream.ask("POST", "/", {}, b"")
            assert await answer.read() == b"hello"
            answer.close()
            await talks[0].ended.wait()
            assert await answer.read() == b""

    run(test())


def test_a_request_that_is_given_up_before_its_answer_ends_at_once() -> None:
    async def test() -> None:
        asked = asyncio.Event()

        async def serve(talk: Talk) -> None:
            await talk.request()
            asked.set()
            await talk.request()

        async with server(serve) as (upstream, talks):
            asking = asyncio.create_task(upstream.ask("POST", "/", {}, b""))
            await asked.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await talks[0].ended.wait()

    run(test())


def test_a_closed_client_leaves_no_connection() -> None:
    async def test() -> None:
        async with server(saying(SIZED)) as (upstream, talks):
            assert await ask(upstream) == b"hello"
            async with upstream:
                open_answer = await upstream.ask("POST", "/", {}, b"")
            await talks[0].ended.wait()
            assert open_answer.status == 200

    run(test())


# Over TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that only who is told so trusts, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    found, key = folder / "certificate.pem", folder / "key.pem"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=engine", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *made, *named, "-keyout", key, "-out", found]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl command to make a certificate with")
    return found, key


@pytest.mark.parametrize("trusted", [True, False])
def test_https_needs_a_certificate_that_is_trusted(
    certificate: tuple[Path, Path], trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def test() -> None:
        async with server(saying(SIZED), tls) as (upstream, talks):
            if not trusted:
                with pytest.raises(ssl.SSLCertVerificationError):
                    await upstream.ask("POST", "/", {}, b"")
                return
            assert [await ask(upstream), await ask(upstream)] == [b"hello", b"hello"]
            assert len(talks) == 1

    run(test())
