"""A paused engine is resumed, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import uvloop
from aiohttp.client_proto import ResponseHandler

from proxy.reading import resume, resume_by_hand

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"data: " + b"x" * 92 + b"\n\n"


@asynccontextmanager
async def answer_of(chunks: int) -> AsyncGenerator[aiohttp.ClientResponse]:
    """The answer of a server that sends all of its body at once, as so many HTTP chunks."""
    body = (b"%x\r\n%b\r\n" % (len(CHUNK), CHUNK)) * chunks + b"0\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}") as got:
        yield got


def test_a_reader_that_was_paused_is_resumed_until_all_has_come() -> None:
    async def read() -> bytes:
        async with answer_of(20_000) as answer:
            resume_by_hand(answer)
            transport = answer.connection and answer.connection.transport
            assert transport is not None
            while transport.is_reading():  # until more waits than the reader takes
                await asyncio.sleep(0)
            data = b""
            async for part in answer.content.iter_any():
                resume(answer)
                data += part
            return data

    assert uvloop.run(read()) == CHUNK * 20_000


def test_a_reader_that_was_not_paused_does_not_run_its_parser_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resumed: list[bool] = []
    resume_reading = ResponseHandler.resume_reading

    def counted(self: ResponseHandler, resume_parser: bool = True) -> None:
        resumed.append(resume_parser)
        resume_reading(self, resume_parser)

    monkeypatch.setattr(ResponseHandler, "resume_reading", counted)

    async def read() -> bytes:
        async with answer_of(100) as answer:
            resume_by_hand(answer)
            data = b""
            async for part in answer.content.iter_any():
                resume(answer)
                data += part
            return data

    assert uvloop.run(read()) == CHUNK * 100
    assert True not in resumed  # at the end the connection is, but not its parser
