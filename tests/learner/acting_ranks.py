"""Work that every rank does, for tests. It imports no TRL, so a rank is there after 3 s, not 10."""

import os
from pathlib import Path

import torch

from learner.ranks import Ranks
from nextstate.errors import LearnerError, StartError


def act(ranks: Ranks, work: str) -> object:
    """One piece of work, as every rank does it."""
    match work:
        case "sum":
            weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
            weights[0].grad = torch.tensor([1.0, -2.0]) * 10**ranks.rank
            if ranks.rank == 1:
                weights[1].grad = torch.tensor([5.0, 7.0])
            ranks.sum_gradients(weights)
            return ranks.all(lambda: [None if w.grad is None else w.grad.tolist() for w in weights])
        case "tell apart":
            return ranks.require_equal([torch.tensor([1.0, float(ranks.rank)])])
        case "same":
            return ranks.require_equal([torch.tensor([1.0, float("nan")])])
        case "listen":
            return ranks.all(lambda: [own_addresses()])
        case _:
            kinds = {"learner": LearnerError, "start": StartError, "bug": ZeroDivisionError}
            kind = kinds.get(work, torch.OutOfMemoryError)

            def fail() -> list[str]:
                if ranks.rank == 1:
                    raise kind("it went wrong")
                return ["unharmed"]

            return ranks.all(fail)


def act_until_the_end(ranks: Ranks) -> None:
    while True:
        try:
            act(ranks, ranks.receive())
        except (LearnerError, StartError):
            continue


def own_addresses() -> set[str]:
    """The addresses at which this process listens, in hexadecimal as in /proc."""
    sockets = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            sockets.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]
    listening = (row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets)
    return {row[1].split(":")[0] for row in listening}


def shared(ranks: Ranks, work: str) -> object:
    ranks.tell(work)
    return act(ranks, work)
