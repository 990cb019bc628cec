"""How a managed vLLM without a GPU shares the machine's cores with the learner.

vLLM binds one computing thread to each core that it takes, and its processes spin while they wait
for each other. A learner on the same cores gets only a part of them, and each of its steps lasts as
long as the slowest of its threads. So vLLM gets some cores and the learner the others
(`benchmarks/beside.py` has the numbers).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nextstate.app.settings import Settings
from nextstate.engine.process import on_cpu

BINDING = "VLLM_CPU_OMP_THREADS_BIND"
_LEARNERS_SHARE = 4
"""The learner gets one core in this many, but at least one."""
_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Cores:
    """The logical CPUs of each; no physical core belongs to both."""

    engine: frozenset[int]
    learner: frozenset[int]

    def of_replica(self, number: int, replicas: int) -> frozenset[int]:
        """Those of one of several engines; all of the engines' if there are too few to divide."""
        cores = [own for core in physical_cores({*self.engine}) if (own := core & self.engine)]
        share = len(cores) // replicas
        if replicas == 1 or not share:
            return self.engine
        return frozenset[int]().union(*cores[number * share : (number + 1) * share])

    def __str__(self) -> str:
        return f"vLLM on {_listed(self.engine)}, the learner on {_listed(self.learner)}"


def shared_cores(settings: Settings) -> Cores | None:
    """Who computes where; None if nothing is divided.

    Nothing is divided if either computes elsewhere, if `[engine] env` binds vLLM's threads, if the
    learner is given as many threads as there are cores, and on systems other than Linux.
    """
    engine, learner = settings.engine, settings.learner
    elsewhere = engine.mode != "managed" or learner.device == "cuda" or not on_cpu()
    if elsewhere or BINDING in engine.env or sys.platform != "linux":
        return None
    return divide(physical_cores(os.sched_getaffinity(0)), learner.threads)


def divide(cores: list[frozenset[int]], threads: int) -> Cores | None:
    """The last `threads` physical cores for the learner, 0 chooses; None if none is left for vLLM.

    vLLM takes its cores from the first memory node only, and the last ones are in the last node.

    >>> divide([frozenset({n}) for n in range(8)], 0)
    Cores(engine=frozenset({0, 1, 2, 3, 4, 5}), learner=frozenset({6, 7}))
    """
    kept = len(cores) - (threads or max(1, len(cores) // _LEARNERS_SHARE))
    if kept < 1:
        return None
    return Cores(frozenset[int]().union(*cores[:kept]), frozenset[int]().union(*cores[kept:]))


def physical_cores(allowed: set[int], topology: Path = _TOPOLOGY) -> list[frozenset[int]]:
    """The physical cores as sets of their `allowed` logical CPUs, in the order of the first one."""
    found: dict[frozenset[int], None] = {}
    for cpu in sorted(allowed):
        try:
            text = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
            siblings = _parsed(text)
        except (OSError, ValueError):
            siblings = {cpu}
        found[frozenset((siblings | {cpu}) & allowed)] = None
    return list(found)


def _parsed(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it, such as `0-2,8`."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _listed(cpus: frozenset[int]) -> str:
    return f"CPU {', '.join(map(str, sorted(cpus)))}"
