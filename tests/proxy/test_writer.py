"""The writer while its store is away."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from nextstate.errors import WaitError
from nextstate.store import Store
from proxy import writer as proxy_writer
from proxy.exchange import Read, read_exchange
from proxy.writer import Answer
from tests.proxy.test_recorder import answers, exchange, framed, ids

DATABASES = True
"""Each test runs on both."""


def test_an_exchange_is_read_once_however_long_the_store_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, tries, recording = [], count(), Store.recording

    def read(*given: Any) -> Read:
        reads.append(given)
        return read_exchange(*given)

    def away(self: Store) -> Any:
        if next(tries) < 3:
            raise WaitError("nobody answers")
        return recording(self)

    monkeypatch.setattr(proxy_writer, "read_exchange", read)
    monkeypatch.setattr(Store, "recording", away)
    assert answers(store, framed(one := exchange("hi"))) == [Answer.BLOCKED, Answer.KEPT]
    assert (store.turns.ids(), len(reads)) == (ids([one]), 1)
