"""Starting the ranks of a learner, and noticing that one has ended or hangs.

The others are child processes of rank 0. What ranks tell each other goes through sockets that a
child inherits and nobody else can open. Only gradients are summed by gloo, over the loopback
interface. torchrun is not used: its agent listens on every interface without a key, also with
127.0.0.1 as its endpoint.

A rank that ends also ends the others: their sockets close. One that hangs gives no sign of life and
is killed. What started the learner starts it again, and it goes on from its checkpoint.
"""
# pyright: basic

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from learner.ranks import SHARED_ERRORS, Ranks
from nextstate import egress, logs
from nextstate.errors import LostRankError

log = logging.getLogger(__name__)

HANG_S = 60
"""A rank without a sign of life for so long is killed. A thread of its own gives them, also in a
long pass."""
_START_S = 600
"""The same until its first sign, which follows its imports: they may take long on a busy machine.
"""
_MEET_TIMEOUT = timedelta(minutes=10)
"""Of connecting, of a sum of gradients, and of a divided base's next layer, for which a rank waits
while another one computes its loss. A silent rank is killed earlier."""
_END_S = 10.0
_NOTICE_S = 5.0
"""How long it takes at most to notice that a rank has ended."""
_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when the thread that started it ends."""


@contextmanager
def started(
    count: int,
    follow: Callable[[Ranks], None],
    on_loss: Callable[[], object],
    file: Path,
    hang_s: int = HANG_S,
    *,
    backend: str = "gloo",
) -> Iterator[Ranks]:
    """Inside the block this process is rank 0 of `count`; its children, the others, run `follow`.

    `follow` is pickled. `on_loss` is called when another rank ends. The ranks find each other by
    `file`, which only this process may use. `backend`: torch's name for what carries tensors.
    Raises LostRankError at the block's end if a rank was lost in it, and RuntimeError inside
    another such block: a process has one group for sums.
    """
    if count == 1:
        yield Ranks()
        return
    if dist.is_initialized():  # here, since the children would wait for us to join
        raise RuntimeError("this process has ranks already")
    file.unlink(missing_ok=True)  # a killed learner's
    children = _Children(count, partial(_run, follow, file, hang_s, backend), on_loss, hang_s)
    try:
        ranks = Ranks(0, count, children.links)
        join(ranks, file, backend)
        yield ranks
        children.require_all()
    except RuntimeError:  # torch's, if another rank ends in a pass over a divided base
        children.require_all(_NOTICE_S)
        raise
    finally:
        children.end()
        _leave()
        file.unlink(missing_ok=True)


def join(ranks: Ranks, file: Path, backend: str) -> None:
    """Connects the ranks for sums, over the loopback interface only."""
    ranks.all(lambda: ())  # all are there: what follows takes no longer than a moment
    logging.getLogger("transformers.training_args").setLevel(logging.ERROR)  # it expects torchrun
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = "lo0" if sys.platform == "darwin" else "lo"
    store = FileStore(str(file), ranks.count)
    store.set_timeout(_MEET_TIMEOUT)
    ranks.together(
        lambda: dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.count, timeout=_MEET_TIMEOUT
        )
    )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Children:
    """The other ranks, as rank 0 sees them."""

    def __init__(
        self,
        count: int,
        live: Callable[..., None],
        on_loss: Callable[[], object],
        hang_s: int,
    ) -> None:
        """`live`: `_run` with its first arguments."""
        self.links: list[Connection] = []
        self._on_loss = on_loss
        self._processes: list[BaseProcess] = []
        self._signs: list[Connection] = []
        self._lost: list[str] = []
        self._noticed = threading.Event()
        self._ends = threading.Event()
        for rank in range(1, count):
            self._start(rank, count, live, hang_s)

    def _start(self, rank: int, count: int, live: Callable[..., None], hang_s: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        # On Linux and macOS; the types say what Windows returns.
        ours, theirs = cast("tuple[Connection, Connection]", spawning.Pipe())
        our_signs, their_signs = cast("tuple[Connection, Connection]", spawning.Pipe())
        child = spawning.Process(
            target=live,
            args=(rank, count, theirs, their_signs, egress.allowed_hosts()),
            name=f"rank {rank}",
        )
        with _own_device(rank), _signals_blocked():
            child.start()
        theirs.close()
        their_signs.close()
        self.links.append(ours)
        self._signs.append(our_signs)
        self._processes.append(child)

        def kill(silent_s: int) -> None:
            log.error("rank %d gave no sign of life for %d s and is killed", rank, silent_s)
            child.kill()

        def lost() -> None:
            if not self._ends.is_set():
                child.join(_END_S)
                self._lost.append(f"rank {rank} of the learner ended with code {child.exitcode}")
                self._noticed.set()
                self._on_loss()

        _watch(our_signs, self._ends, hang_s, kill, lost)

    def require_all(self, within_s: float = 0.0) -> None:
        """Raises LostRankError if a rank has ended, or is seen to within that time."""
        self._noticed.wait(within_s)
        if self._lost:
            raise LostRankError(f"{'; '.join(self._lost)}: the learner starts again")

    def end(self) -> None:
        """Ends the ranks: they find their sockets closed."""
        self._ends.set()
        for link in (*self.links, *self._signs):
            link.close()
        until = time.monotonic() + _END_S
        for child in self._processes:
            child.join(max(0.0, until - time.monotonic()))
            child.kill()
            child.join()


def _run(
    follow: Callable[[Ranks], None],
    file: Path,
    hang_s: int,
    backend: str,
    rank: int,
    count: int,
    link: Connection,
    signs: Connection,
    hosts: frozenset[str] | None,
) -> None:
    """The whole life of another rank."""
    parent = os.getppid()
    if sys.platform == "linux":  # a rank that is stopped could not end itself
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logs.to_stderr()
    if hosts is not None:
        egress.guard(hosts)

    def kill_parent(silent_s: int) -> None:
        log.error("rank 0 gave no sign of life for %d s and is killed", silent_s)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)

    _watch(signs, threading.Event(), hang_s, kill_parent, lambda: os._exit(1))
    ranks, code = Ranks(rank, count, [link]), 0
    try:
        join(ranks, file, backend)
        follow(ranks)
    except EOFError:
        pass  # rank 0 has ended, or needs no others any more
    except (*SHARED_ERRORS, LostRankError) as error:
        log.error("rank %d ends: %s", rank, error)
        code = 1
    _leave()
    # The interpreter's own end takes seconds with torch, and there is nothing to keep.
    multiprocessing.util._exit_function()  # pyright: ignore[reportAttributeAccessIssue]
    os._exit(code)


def _watch(
    signs: Connection,
    ends: threading.Event,
    hang_s: int,
    on_silence: Callable[[int], None],
    on_end: Callable[[], None],
) -> None:
    """Exchanges signs of life with another rank, from a thread of its own.

    The first sign is given before this returns, so a rank that is silent from then on is noticed.
    Seconds are counted only while this process runs, so that one that was stopped together with
    the other, by Ctrl-Z or by a machine that slept, does not kill it when both go on.
    """

    def watch() -> None:
        silent_s, limit_s = 0, _START_S
        try:
            while not ends.wait(1.0):
                silent_s += 1
                while signs.poll():
                    signs.recv_bytes()
                    silent_s, limit_s = 0, hang_s
                if silent_s == limit_s:
                    on_silence(silent_s)
                signs.send_bytes(b".")
        except (EOFError, OSError):
            on_end()

    with suppress(OSError):  # the thread meets with the same
        signs.send_bytes(b".")
    threading.Thread(target=watch, name="signs of life", daemon=True).start()


@contextmanager
def _own_device(rank: int) -> Iterator[None]:
    """A process that is started inside the block sees one GPU: the one of this rank."""
    name = "CUDA_VISIBLE_DEVICES"
    seen = os.environ.get(name)
    devices = seen.split(",") if seen else [str(number) for number in range(rank + 1)]
    os.environ[name] = devices[rank] if rank < len(devices) else ""
    try:
        yield
    finally:
        if seen is None:
            del os.environ[name]
        else:
            os.environ[name] = seen


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started inside the block gets no signal to end: only rank 0 decides."""
    resource_tracker.ensure_running()  # its start would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
