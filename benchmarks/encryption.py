"""What an encrypted store costs: CPU time of a recorded turn and of one that is read, and its size.

The writer's work is measured as it is by default: unpickling, redaction, linking, storing.

    python -m benchmarks.encryption

Conversations are recorded as the writer does it, in turns into a store that is not encrypted and
into one that is. Of each kind of time the tenth percentile is shown: another program on the machine
makes times longer, and never shorter.
"""

from __future__ import annotations

import os
import pickle
import secrets
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.redaction_cost import conversation
from nextstate.config import StoreConfig
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.redaction import Redactor
from nextstate.store import Store
from nextstate.store_key import VARIABLE, find_store_key
from proxy.exchange import read_exchange, record
from proxy.linking.history import RememberedMessages
from proxy.redacting import Known

_CONVERSATIONS = 32


@dataclass
class _Kind:
    """One store and its times in seconds."""

    store: Store
    remembered: RememberedMessages = field(
        default_factory=lambda: RememberedMessages(redactor=Redactor())
    )
    known: Known = field(default_factory=lambda: Known(Redactor()))
    recorded: list[float] = field(default_factory=list[float])
    read: list[float] = field(default_factory=list[float])

    def take(self, pickled: bytes, profile: AgentProfile) -> None:
        """Records an exchange."""
        started = time.process_time()
        exchange = pickle.loads(pickled)
        found = read_exchange(exchange, profile, self.remembered, self.known)
        with self.store.recording() as recording:
            record(recording, found)
        self.recorded.append(time.process_time() - started)

    @property
    def megabytes(self) -> float:
        """Of its database."""
        self.store.compact()
        return sum(file.stat().st_size for file in self.store.dir.glob("nextstate.*")) / 1e6


def _opened(folder: Path, *, encrypted: bool) -> _Kind:
    config = StoreConfig(dir=str(folder))
    if encrypted:
        key = find_store_key(folder)
        assert key is not None
        with Store.encryption(config) as encryption:
            encryption.turn_on(key)
            encryption.go_on(key, lambda *_: None, lambda *_: None)
    return _Kind(Store(config))


def _low(times: list[float]) -> float:
    """The tenth percentile in µs."""
    return statistics.quantiles(times, n=10)[0] * 1e6


def main() -> None:
    """Prints the table."""
    os.environ[VARIABLE] = secrets.token_hex(32)
    profile: AgentProfile = load_plugin("agents", "generic", None)
    print("| system prompt | | as it is | encrypted | more |\n|---|---|---|---|---|")
    for size in (500, 8_000, 64_000):
        with tempfile.TemporaryDirectory() as folder:
            clear = _opened(Path(folder, "clear"), encrypted=False)
            sealed = _opened(Path(folder, "sealed"), encrypted=True)
            for number in range(_CONVERSATIONS):
                for turn, pickled in enumerate(conversation(size, number)):
                    for kind in (clear, sealed) if (number + turn) % 2 else (sealed, clear):
                        kind.take(pickled, profile)
            for one, other in zip(clear.store.turns.ids(), sealed.store.turns.ids(), strict=True):
                for kind, turn in ((clear, one), (sealed, other)):
                    started = time.process_time()
                    assert kind.store.turns.get(turn) is not None
                    kind.read.append(time.process_time() - started)
            rows = {
                "record a turn, µs": (_low(clear.recorded), _low(sealed.recorded)),
                "read a turn, µs": (_low(clear.read), _low(sealed.read)),
                "the database, MB": (clear.megabytes, sealed.megabytes),
            }
            for name, (off, on) in rows.items():
                print(
                    f"| {size} characters | {name} | {off:.4g} | {on:.4g} | {on / off - 1:+.1%} |"
                )
            clear.store.close()
            sealed.store.close()


if __name__ == "__main__":
    main()
