"""What redaction costs the writer, in CPU time of a streamed turn.

    python -m benchmarks.redaction_cost

Each turn is read, linked and stored as the writer does it, with and without redaction in turns; the
median of the tries counts. The reply is the mock engine's stream. A conversation sends its history
again with each turn, so only its first turn meets texts that are new.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.mock_engine import MODEL, chunks
from nextstate.config import StoreConfig
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Json, Timings, new_id
from nextstate.redaction import NOTHING, Redactor
from nextstate.store import Store
from proxy.exchange import Exchange, read_exchange, record
from proxy.linking.history import RememberedMessages
from proxy.redacting import Known
from proxy.serving import CHAT, Direct

_REPLY_TOKENS, _TURNS, _TRIES = 100, 21, 5
_PARAGRAPH = Path(__file__).parents[1].joinpath("docs", "how-it-works.md").read_text()[:2000]


def _pickled(messages: list[Json]) -> bytes:
    """An exchange as it comes to the writer."""
    body: Json = {"model": MODEL, "messages": messages, "stream": True}
    serving = Direct(CHAT, body, MODEL, None)
    data, at = b"".join(chunks(_REPLY_TOKENS, ids=True, usage=True)), 0
    while at < len(data):
        _, at = serving.content(data, at)
        end = data.find(b"\n\n", at) + 2
        if end < 2:
            break
        serving.event(data[at:end])
        at = end
    serving.capture.join()
    timings = Timings(time.time(), 0.05, 0.5)
    return pickle.dumps(
        Exchange(new_id("turn"), "main", None, serving.chat, serving.capture, 0, timings)
    )


def conversation(size: int, number: int) -> list[bytes]:
    """The exchanges of a conversation that begins with a system prompt of `size` characters."""
    reply = "".join(f" word{at}" for at in range(_REPLY_TOKENS))
    text = (_PARAGRAPH * (size // len(_PARAGRAPH) + 1))[:size]
    messages: list[Json] = [{"role": "system", "content": f"{number} {text}"}]
    found: list[bytes] = []
    for turn in range(_TURNS):
        messages.append({"role": "user", "content": f"step {turn} of {number}: {text[:300]}"})
        found.append(_pickled(messages))
        messages.append({"role": "assistant", "content": reply})
    return found


def _times(exchanges: list[bytes], redactor: Redactor, folder: Path) -> list[float]:
    """CPU seconds of each turn."""
    profile: AgentProfile = load_plugin("agents", "generic", None)
    store = Store(StoreConfig(dir=str(folder)))
    remembered, known = RememberedMessages(redactor=redactor), Known(redactor)
    found: list[float] = []
    for pickled in exchanges:
        started = time.process_time()
        read = read_exchange(pickle.loads(pickled), profile, remembered, known)
        with store.recording() as recording:
            turn = record(recording, read)
        found.append(time.process_time() - started)
        assert turn.trainable, turn.untrainable
    store.close()
    return found


def main() -> None:
    """Prints the table."""
    print("| system prompt | turn | off, µs | on, µs | more |\n|---|---|---|---|---|")
    for size in (500, 8_000, 64_000):
        first: dict[bool, list[float]] = {True: [], False: []}
        later: dict[bool, list[float]] = {True: [], False: []}
        with tempfile.TemporaryDirectory() as folder:
            for number in range(_TRIES):
                exchanges = conversation(size, number)
                for on in (False, True) if number % 2 else (True, False):
                    place = Path(folder, f"{number}-{on}")
                    times = _times(exchanges, Redactor() if on else NOTHING, place)
                    first[on].append(times[0])
                    later[on] += times[1:]
        for name, found in (("first", first), ("later", later)):
            off, on_ = (statistics.median(found[on]) * 1e6 for on in (False, True))
            print(f"| {size} characters | {name} | {off:.0f} | {on_:.0f} | {on_ - off:.0f} µs |")


if __name__ == "__main__":
    main()
