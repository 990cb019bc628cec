"""The arithmetic behind the table about engine and learner on one machine."""

from __future__ import annotations

from benchmarks.asking import Answered, Clients
from benchmarks.beside import tokens


def test_tokens_of_a_time_are_counted_over_all_replies() -> None:
    clients = Clients(0, "m")
    for times in ([1.0, 2.0, 3.0], [2.5, 3.5]):
        clients.replies.append(Answered(0, "t", "", 0.0, times, times[-1]))
    assert tokens(clients, 2.0, 3.0) == 2
