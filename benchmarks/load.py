"""Many paced streams at once, in a process of its own, and the gaps between their events.

    python -m benchmarks.load PORT STREAMS TOKENS PACE_S SECONDS

It prints one JSON object. The starts of the streams are spread over the time of one reply, so
replies begin and end all the time. A stream asks again when its reply ends. Only replies that began
and ended while all streams ran are counted.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count, pairwise

import orjson
import uvloop

from benchmarks.client import connect
from benchmarks.mock_engine import MODEL

STEP_MS = 0.1
"""The resolution of the gaps in milliseconds."""


@dataclass(slots=True)
class Gaps:
    """The results of one load."""

    streams: list[Counter[int]]
    """For each stream, the number of gaps by their length in steps of `STEP_MS`."""
    replies: int = 0
    events: int = 0
    reply_s: float = 0.0
    """The sum of the lengths of all replies in seconds."""
    cpu_s: float = 0.0
    """The load's own CPU time."""
    wall_s: float = 0.0

    def add(self, other: Gaps) -> None:
        """Adds another round."""
        for mine, theirs in zip(self.streams, other.streams, strict=True):
            mine.update(theirs)
        self.replies += other.replies
        self.events += other.events
        self.reply_s += other.reply_s
        self.cpu_s += other.cpu_s
        self.wall_s += other.wall_s

    def quantile_ms(self, share: float) -> float:
        """The gap that this share of all gaps does not exceed."""
        return quantile_ms(sum(self.streams, Counter[int]()), share)

    def worst_ms(self, share: float) -> float:
        """The same for the stream where it is longest."""
        return max(quantile_ms(stream, share) for stream in self.streams)

    @property
    def rate(self) -> float:
        """Events a second of one stream while it replies."""
        return self.events / self.reply_s if self.reply_s else 0.0


def quantile_ms(gaps: Counter[int], share: float) -> float:
    """The upper edge of the quantile's step, in milliseconds; 0.0 without any gap."""
    left = share * gaps.total()
    for step, number in sorted(gaps.items()):
        left -= number
        if left <= 0:
            return (step + 1) * STEP_MS
    return 0.0


async def load(port: int, streams: int, tokens: int, pace_s: float, seconds: float) -> Gaps:
    """Runs all streams for `seconds` plus the time that they need to start."""
    found = Gaps([Counter() for _ in range(streams)])
    numbers = count()
    begin = time.perf_counter() + tokens * pace_s
    end = begin + seconds

    async def stream(number: int) -> None:
        await asyncio.sleep(number / streams * tokens * pace_s)
        connection = await connect(port)
        while time.perf_counter() < end:
            reply = await connection.ask(_body(next(numbers), tokens, pace_s))
            if reply.started < begin or reply.ended > end:
                continue
            # From the role's event to the last token's; later events are not paced.
            times = reply.times[: tokens + 1]
            gaps = [int(1000 * (b - a) / STEP_MS) for a, b in pairwise(times)]
            found.streams[number].update(gaps)
            found.replies += 1
            found.events += len(gaps)
            found.reply_s += times[-1] - times[0]
        connection.close()

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(streams)))
    found.cpu_s, found.wall_s = time.process_time() - cpu, time.perf_counter() - wall
    return found


def _body(number: int, tokens: int, pace_s: float) -> bytes:
    said = {"role": "user", "content": f"Question {number} of {time.time_ns()}"}
    request = {"model": MODEL, "stream": True, "messages": [said]}
    return orjson.dumps({**request, "tokens": tokens, "pace_s": pace_s})


def main() -> None:
    """Loads and prints."""
    port, streams, tokens, pace_s, seconds = sys.argv[1:]
    found = uvloop.run(load(int(port), int(streams), int(tokens), float(pace_s), float(seconds)))
    sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_NON_STR_KEYS))


if __name__ == "__main__":
    main()
