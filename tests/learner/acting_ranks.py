"""Work that every rank does, for tests. It imports no TRL, so a rank is there after 3 s, not 10."""

import os
from collections.abc import Sequence
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
        case "passes":
            return with_passes(ranks, [False] * (ranks.rank + 1))
        case "passes with a gradient":
            return with_passes(ranks, [True] * (2 - ranks.rank))
        case "different passes":
            return with_passes(ranks, [ranks.rank == 1])
        case "a pass that fails":
            return with_passes(ranks, [False] * 3, fails=ranks.rank == 1)
        case "a pass of rank 0":
            return with_passes(ranks, [False] * (ranks.rank == 0), alone=True)
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


def with_passes(
    ranks: Ranks, passes: Sequence[bool], *, fails: bool = False, alone: bool = False
) -> list[str]:
    """What each rank does in passes, each with a gradient or without, over a divided base."""
    done: list[str] = []
    ranks.lend = lambda kind: done.append(f"{ranks.rank} lends {kind}")

    def work() -> list[str]:
        for number, kind in enumerate(passes):
            if fails and number == 1:
                raise LearnerError("it went wrong")
            with torch.set_grad_enabled(kind):
                ranks.join_pass()
            done.append(f"{ranks.rank} reads {kind}")
        return done

    try:
        if not alone:
            ranks.all(work)
        elif ranks.rank == 0:
            work()
            ranks.tell("done")
        else:
            assert ranks.receive() == "done"
    finally:
        ranks.lend = None
    return ranks.all(lambda: done)


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
