"""What recording a turn costs the writer, in instructions that callgrind counts.

    python -m benchmarks.writer_instructions          # about 4 minutes; needs valgrind

Other work on the machine does not change the count. The writer's own loop runs (`Writer.run`), on
the streamed turns that `make bench` makes: 64 tokens, a prompt of 200 ids, each the first of its
conversation. So nothing is remembered of them but the system prompt and the settings.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

from nextstate.config import StoreConfig
from nextstate.redaction import NOTHING, Redactor
from proxy.writer import LENGTH, Writer, spare_collector

_TOGETHER = (1, 5)
"""Turns in one transaction."""
_WARM_UP, _TURNS = 60, 200
_MARK = "sched_yield"
"""A function of the C library that nothing else calls: callgrind tells its count there."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # what callgrind runs
    inside = parser.parse_args().inside
    if inside is not None:
        _write(Path(inside))
        return
    if shutil.which("valgrind") is None:
        sys.exit("this needs valgrind, which is not there: apt-get install valgrind")
    print("| redaction | turns a transaction | million instructions a turn |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        counted = iter(_counted(Path(folder)))
        for redacting in (False, True):
            for together in _TOGETHER:
                count = next(counted) / _TURNS / 1e6
                print(f"| {'on' if redacting else 'off'} | {together} | {count:.3f} |")


def _counted(folder: Path) -> list[int]:
    """The instructions of the measured turns of each part, in the order of `_write`."""
    with folder.joinpath("exchanges").open("wb") as file:
        parts = 2 * len(_TOGETHER)
        pickle.dump(list(islice(_exchanges(), parts * (_WARM_UP + _TURNS))), file)
    subprocess.run(
        [
            *("valgrind", "--tool=callgrind", f"--dump-before={_MARK}"),
            f"--callgrind-out-file={folder}/counted",
            *(sys.executable, "-P", "-m", "benchmarks.writer_instructions", "--inside", folder),
        ],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    dumps = sorted(folder.glob("counted.*"), key=lambda file: int(file.suffix[1:]))
    found = [re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.M) for dump in dumps]
    return [int(match[1]) for match in found[1::2] if match]


def _exchanges() -> Iterator[bytes]:
    """Finished exchanges as the recorder sends them."""
    from benchmarks.mock_engine import MODEL, chunks
    from benchmarks.relay import bodies
    from nextstate.records import Timings, new_id
    from nextstate.wire import read_json
    from proxy.exchange import Exchange
    from proxy.serving import CHAT, Direct

    data = b"".join(chunks(ids=True, usage=True))
    for body in bodies():
        serving, at = Direct(CHAT, read_json(body), MODEL, None), 0
        while at < len(data):
            _, at = serving.content(data, at)
            end = data.find(b"\n\n", at) + 2
            serving.event(data[at:end])
            at = end
        serving.capture.join()
        timings = Timings(time.time(), 0.05, 0.5)
        exchange = Exchange(new_id("turn"), "main", None, serving.chat, serving.capture, 0, timings)
        pickled = pickle.dumps(exchange, pickle.HIGHEST_PROTOCOL)
        yield LENGTH.pack(len(pickled)) + pickled


class _Recorder:
    """The recorder's end of the socket: what it sends goes into one transaction each time."""

    def __init__(self, exchanges: Iterator[bytes], together: int) -> None:
        self._exchanges = exchanges
        self._together = together
        self._sent = 0
        self._answered = True

    def recv(self, _size: int, flags: int) -> bytes:
        """The next exchanges; at the beginning and the end of what is measured, the mark."""
        if flags:
            raise BlockingIOError
        if self._sent in (_WARM_UP, _WARM_UP + _TURNS):
            os.sched_yield()
        if self._sent == _WARM_UP + _TURNS:
            return b""
        self._sent += self._together
        return b"".join(islice(self._exchanges, self._together))

    def sendall(self, answers: bytes) -> None:
        """Takes the writer's answers."""


def _write(folder: Path) -> None:
    with folder.joinpath("exchanges").open("rb") as file:
        exchanges = iter(cast("list[bytes]", pickle.load(file)))
    for redactor in (NOTHING, Redactor()):
        for together in _TOGETHER:
            place = folder / f"{bool(redactor)}-{together}"
            spare_collector()
            source: Any = _Recorder(exchanges, together)
            Writer(source, StoreConfig(dir=str(place)), "auto", redactor).run()


if __name__ == "__main__":
    main()
