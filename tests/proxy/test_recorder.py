"""The recorder and its writer: an exchange that was submitted is stored once."""

from __future__ import annotations

import asyncio
import os
import pickle
import resource
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextstate.config import StoreConfig
from nextstate.records import Timings, new_id
from nextstate.store import Store
from proxy.capture import Capture
from proxy.exchange import Exchange
from proxy.recorder import Recorder
from proxy.writer import LENGTH, Answer, Writer
from proxy.writer_process import WriterProcess
from tests.proxy.running_proxy import until
from tests.proxy.writer_thread import WriterThread

DATABASES = True
"""Each test runs on both."""
MANY = 200
PATIENCE_S = 60.0


def exchange(said: str, history: Sequence[tuple[str, str]] = (), **more: Any) -> Exchange:
    """A user says `said` after a history of (said, reply); the reply is `re: {said}`."""
    messages: list[dict[str, Any]] = []
    for asked, replied in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": replied}]
    capture = Capture()
    message = {"role": "assistant", "content": f"re: {said}"}
    capture.body({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    request = {"model": "base", "messages": [*messages, {"role": "user", "content": said}], **more}
    return Exchange(new_id("turn"), "main", None, request, capture, 0, Timings(1.0, 0.1, 0.2))


def newest(writer: WriterProcess) -> psutil.Process:
    """The process that was started last."""
    return psutil.Process(writer.processes[-1].pid)


@asynccontextmanager
async def recording(
    store: Store,
    writer: WriterProcess | None = None,
    queue_size: int = 10_000,
    timeout_s: float = PATIENCE_S,
) -> AsyncGenerator[Recorder]:
    recorder = Recorder(
        writer or WriterThread(), store.config, "generic", timeout_s, queue_size=queue_size
    )
    running = asyncio.create_task(recorder.run())
    try:
        yield recorder
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scene(), PATIENCE_S)

    uvloop.run(limited())  # as `nextstate proxy` does


def ids(exchanges: Sequence[Exchange]) -> list[str]:
    return [one.turn_id for one in exchanges]


class Poison:
    """Crashes the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return os._exit, (1,)


class Unreadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("x",)


def test_a_turn_is_stored_when_record_returns(store: Store) -> None:
    async def scene() -> None:
        async with recording(store) as recorder:
            one = exchange("hi")
            await recorder.record(one)
            turn = store.turns.get(one.turn_id)
            assert turn is not None
            assert turn.reply["content"] == "re: hi"
            assert turn.request == one.request
            assert (recorder.counts.recorded, recorder.counts.late) == (1, 0)

    run(scene)


async def talk(recorder: Recorder, name: str, turns: int) -> list[str]:
    """Records a conversation turn by turn; returns the ids of its turns."""
    found: list[str] = []
    history: list[tuple[str, str]] = []
    for number in range(turns):
        one = exchange(f"{name} {number}", history)
        await recorder.record(one)
        found.append(one.turn_id)
        history.append((f"{name} {number}", f"re: {name} {number}"))
    return found


def test_a_writer_that_is_killed_repeatedly_loses_no_turn_and_stores_none_twice(
    store: Store,
) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer) as recorder:
            talks = [asyncio.create_task(talk(recorder, f"t{n}", 25)) for n in range(8)]
            killed: set[int] = set()
            for kills in range(1, 5):
                await until(lambda kills=kills: recorder.counts.recorded >= 40 * kills)
                killed.add(newest(writer).pid)
                newest(writer).kill()
            said = await asyncio.gather(*talks)
            assert len(killed) == 4
            assert (recorder.counts.recorded, recorder.counts.lost) == (MANY, 0)
        assert sorted(store.turns.ids()) == sorted(turn for turns in said for turn in turns)
        for name, turns in enumerate(said):
            assert [store.turns.get(turn).index for turn in turns] == list(range(25))  # pyright: ignore[reportOptionalMemberAccess]
            for number, turn in enumerate(turns[:-1], 1):
                assert [state.text for state in store.turns.next_states(turn)] == [
                    f"t{name} {number}"
                ]

    run(scene)


def test_exchanges_that_wait_for_a_starting_writer_outlive_the_proxy(store: Store) -> None:
    exchanges = [exchange(f"say {n} " + "x" * 50_000) for n in range(6)]

    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer) as recorder:
            await recorder.record(exchanges[0])
            first = newest(writer)
            first.suspend()
            for one in exchanges[1:4]:
                recorder.submit(one)
            first.kill()
            await until(lambda: newest(writer) != first)
            starting = newest(writer)
            starting.suspend()
            for one in exchanges[4:]:
                recorder.submit(one)
            await asyncio.sleep(0.05)  # until they are in the socket
            assert recorder.counts.recorded == 1
            asyncio.get_running_loop().call_later(0.2, starting.resume)

    run(scene)
    assert store.turns.ids() == ids(exchanges)


def test_an_exchange_may_come_at_any_moment_while_a_writer_ends(store: Store) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer) as recorder:
            await recorder.record(exchange("first"))
            first = newest(writer)
            first.kill()
            count = 1
            while newest(writer) == first:
                recorder.submit(exchange(f"say {count}"))
                count += 1
                await asyncio.sleep(0)
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (count, 0)
        assert len(store.turns.ids()) == count > 1

    run(scene)


class Pieces:
    """The writer's end of a socket, on which these pieces arrive one after the other."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = iter(pieces)
        self.sent = bytearray()

    def recv(self, _size: int, flags: int = 0) -> bytes:
        if flags & socket.MSG_DONTWAIT:
            raise BlockingIOError
        return next(self._pieces, b"")

    def sendall(self, data: bytes) -> None:
        self.sent += data


def answers(store: Store, *pieces: bytes) -> list[Answer]:
    """What a writer answers to these pieces, of which it handles one at a time."""
    source = Pieces(*pieces)
    Writer(cast(Any, source), store.config, "generic").run()
    assert source.sent[0] == Answer.READY
    return [Answer(answer) for answer in source.sent[1:]]


def framed(*exchanges: Exchange) -> bytes:
    """Exchanges as the recorder sends them."""
    pickled = [pickle.dumps(one) for one in exchanges]
    return b"".join(LENGTH.pack(len(one)) + one for one in pickled)


def test_an_exchange_that_is_sent_to_a_second_writer_is_stored_once(store: Store) -> None:
    first = exchange("hi")
    second = exchange("and then?", [("hi", "re: hi")])
    for _ in range(2):
        assert answers(store, framed(first, second)) == [Answer.KEPT, Answer.KEPT]
    assert store.turns.ids() == ids([first, second])
    assert [state.text for state in store.turns.next_states(first.turn_id)] == ["and then?"]
    assert store.counts()["judgements/pending"] == 1


def test_a_turn_whose_client_left_is_amended_and_stored_if_it_was_lost(
    store: Store,
) -> None:
    first, lost = exchange("hi"), exchange("ho")
    left, lost_left = (one._replace(cut=True, amends=True) for one in (first, lost))
    again = [exchange("hi"), exchange("ho")]
    kept, amended = Answer.KEPT, Answer.AMENDED
    said = answers(store, framed(first, left, left, lost_left, *again))
    assert said == [kept, amended, amended, kept, kept, kept]
    assert store.turns.ids() == ids(again)


@given(cuts=st.lists(st.integers(0, 3000), max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exchanges_may_be_cut_anywhere_on_their_way(store: Store, cuts: list[int]) -> None:
    exchanges = [exchange(f"say {n} " + "x" * 300 * n) for n in range(3)]
    sent = framed(*exchanges)
    bounds = sorted({0, *(min(cut, len(sent)) for cut in cuts), len(sent)})
    pieces = [sent[start:end] for start, end in pairwise(bounds)]
    assert answers(store, *pieces) == [Answer.KEPT] * 3
    assert store.turns.ids(limit=3, newest_first=True) == ids(exchanges)[::-1]


def test_an_exchange_that_arrived_whole_before_the_proxy_ended_is_stored_and_a_part_is_not(
    store: Store,
) -> None:
    whole, part = exchange("whole"), exchange("part")
    assert answers(store, framed(whole, part)[:-1]) == [Answer.KEPT]
    assert store.turns.ids() == [whole.turn_id]


def test_one_bad_exchange_does_not_take_the_others_with_it(store: Store) -> None:
    exchanges = [
        exchange("one"),
        exchange("two", odd={1, 2}),  # JSON has no sets: the store cannot hold it
        exchange("three", odd=Unreadable()),
        exchange("four"),
    ]
    kept, lost = Answer.KEPT, Answer.LOST
    assert answers(store, framed(*exchanges)) == [kept, lost, lost, kept]
    assert store.turns.ids() == ids([exchanges[0], exchanges[3]])


@pytest.mark.parametrize("opened", [True, False], ids=["open", "yet to be opened"])
def test_a_store_that_is_locked_for_longer_than_sqlite_waits_loses_no_turn(
    store: Store, opened: bool
) -> None:
    first, *others = exchanges = [exchange(f"say {n}") for n in range(3)]

    async def scene() -> None:
        async with recording(store) as recorder:
            if opened:
                await recorder.record(first)
            with store.recording() as held:  # another process holds the database
                assert not held.holds("turn_none")  # PostgreSQL has answered: it is locked by now
                for one in others if opened else exchanges:
                    recorder.submit(one)
                await until(lambda: recorder.counts.store_waits == 1)
            await recorder.drain(PATIENCE_S)
            counts = recorder.counts
            assert (counts.recorded, counts.lost, counts.store_waits) == (3, 0, 1)

    run(scene)
    assert store.turns.ids() == ids(exchanges)


def test_an_exchange_that_cannot_be_pickled_is_lost_alone(store: Store) -> None:
    async def scene() -> None:
        async with recording(store) as recorder:
            await recorder.record(exchange("one", odd=lambda: None))
            await recorder.record(exchange("two"))
            assert (recorder.counts.recorded, recorder.counts.lost) == (1, 1)

    run(scene)


def test_an_exchange_that_crashes_every_writer_is_lost_alone(store: Store) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer) as recorder:
            sound = [exchange(f"sound {n}") for n in range(4)]
            deadly = exchange("deadly", odd=Poison())
            await asyncio.gather(
                *(recorder.record(one) for one in (*sound[:2], deadly, *sound[2:]))
            )
            assert (recorder.counts.recorded, recorder.counts.lost) == (4, 1)
        assert store.turns.ids() == ids(sound)

    run(scene)


def test_a_locked_store_makes_turns_late_and_a_full_queue_loses_the_next(store: Store) -> None:
    async def scene() -> None:
        async with recording(store, queue_size=2, timeout_s=0.05) as recorder:
            with store.recording():  # another process holds the database
                exchanges = [exchange(f"say {n}") for n in range(3)]
                for one in exchanges:
                    await recorder.record(one)
                assert (recorder.counts.late, recorder.counts.lost) == (2, 1)
                assert recorder.counts.recorded == 0
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (2, 1)
        assert store.turns.ids() == ids(exchanges[:2])

    run(scene)


def test_the_queue_is_bounded_in_bytes_and_in_memory_once(store: Store) -> None:
    async def scene() -> None:
        async with recording(store, queue_size=256, timeout_s=0.01) as recorder:  # 16 MB
            with store.recording():  # another process holds the database
                exchanges = [exchange("x" * (1 << 19)) for _ in range(20)]  # said and replied
                for one in exchanges:
                    await recorder.record(one)
                assert in_transport(recorder) <= 5 << 20
                assert (recorder.counts.late, recorder.counts.lost) == (16, 4)
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (16, 4)
            largest = exchange("y" * (10 << 20))
            recorder.submit(largest)  # alone it has room
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (17, 4)
        assert store.turns.ids() == ids([*exchanges[:16], largest])

    run(scene)


def in_transport(recorder: Recorder) -> int:
    """Bytes of a second copy, between the recorder and the socket."""
    stream = recorder._stream  # pyright: ignore[reportPrivateUsage]
    assert stream is not None
    return stream.transport.get_write_buffer_size()


@pytest.mark.sqlite
def test_on_a_full_disk_turns_wait_for_room(store: Store) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer, timeout_s=0.05) as recorder:
            recorder.submit(before := exchange("before"))
            await recorder.drain(PATIENCE_S)
            process = newest(writer)
            size = max(file.stat().st_size for file in store.dir.glob("nextstate.sqlite3*"))
            _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
            process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
            late = [exchange(f"while full {n} " + random_text(size)) for n in range(3)]
            for one in late:
                await recorder.record(one)
            await until(lambda: recorder.counts.store_waits == 1)
            assert (recorder.counts.late, recorder.counts.waiting) == (3, 3)
            assert (recorder.counts.recorded, recorder.counts.lost) == (1, 0)
            process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (4, 0)
            assert recorder.counts.waiting == 0
            assert process.is_running()
        assert store.turns.ids() == ids([before, *late])

    run(scene)


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A file system of 1 MB; skips the test if this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.sqlite
def test_a_disk_that_is_full_before_the_first_turn_makes_it_late(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    store = Store(StoreConfig(dir=str(small_disk / "state")))
    ballast.write_bytes(bytes(4096 * (os.statvfs(small_disk).f_bavail)))

    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer, timeout_s=0.05) as recorder:
            exchanges = [exchange(f"say {n} " + random_text(40_000)) for n in range(4)]
            for one in exchanges:
                await recorder.record(one)
            await until(lambda: recorder.counts.store_waits > 0)
            assert (recorder.counts.recorded, recorder.counts.lost) == (0, 0)
            ballast.unlink()
            await recorder.drain(PATIENCE_S)
            assert (recorder.counts.recorded, recorder.counts.lost) == (4, 0)
        assert store.turns.ids() == ids(exchanges)

    run(scene)
    store.close()


def random_text(size: int) -> str:
    """Text that takes at least `size` bytes when compressed."""
    return os.urandom(size).hex()


@pytest.mark.sqlite
def test_a_store_that_cannot_be_opened_loses_turns_and_says_so(store: Store) -> None:
    async def scene() -> None:
        async with recording(store) as recorder:
            file = store.dir / "nextstate.sqlite3"
            file.rename(file.with_suffix(".away"))
            file.mkdir()
            await recorder.record(exchange("hi"))
            assert (recorder.counts.recorded, recorder.counts.lost) == (0, 1)

    run(scene)


def test_a_writer_that_cannot_start_is_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        with monkeypatch.context() as patch:
            patch.setattr("sys.executable", "/nowhere/python")
            async with recording(store, writer) as recorder:
                recorded = asyncio.create_task(recorder.record(exchange("hi")))
                await until(lambda: "no writer starts" in caplog.text)
                patch.undo()
                await recorded
                assert (recorder.counts.recorded, recorder.counts.lost) == (1, 0)

    run(scene)


def test_the_writer_ignores_ctrl_c_and_sigterm(store: Store) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        async with recording(store, writer) as recorder:
            await recorder.record(exchange("before"))
            process = newest(writer)
            assert os.getpgid(process.pid) == process.pid != os.getpgrp()
            for number in (signal.SIGINT, signal.SIGTERM):
                process.send_signal(number)
            await recorder.record(exchange("after"))
            assert (newest(writer), recorder.counts.recorded) == (process, 2)

    run(scene)


def test_the_writer_ends_with_the_recorder_and_none_starts_where_nothing_is_recorded(
    store: Store,
) -> None:
    async def scene() -> None:
        writer = WriterProcess()
        off = Recorder(writer, store.config, "generic", PATIENCE_S, enabled=False)
        await off.run()
        await off.record(exchange("hi"))
        assert (writer.processes, store.turns.ids()) == ([], [])
        async with recording(store, writer) as recorder:
            await recorder.record(exchange("hi"))
            process = newest(writer)
        assert not process.is_running()

    run(scene)
