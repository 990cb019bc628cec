"""One engine as events of a simulated clock.

It works as vLLM without chunked prefill: a prompt's computation stops all replies; between, each
step makes one token of every running reply. It remembers what it has computed under each version
until it needs the memory. A request waits until its prompt and reply have room. vLLM's own way, to
let replies grow and to take back what does not fit, is not simulated.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.simulated_cluster import Cluster

Placing = Literal["sticky", "hashed", "anywhere"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated. Times are in seconds, lengths in tokens; `mean_` ones are exponential."""

    agents: int = 1000
    engines: int = 8
    seconds: float = 600.0
    """How long agents ask. What was asked is answered after that."""
    warm_up_s: float = 120.0
    """What is asked before is not measured."""
    seed: int = 0
    placing: Placing = "sticky"
    """One proxy; several, which agree by hashing; or always the engine with the fewest requests."""
    system: int = 150
    """The beginning that all conversations have in common."""
    mean_first: int = 100
    mean_said: int = 30
    mean_reply: int = 48
    longest_reply: int = 200
    context: int = 1900
    """A conversation that has no room for another reply ends, and the agent begins a new one."""
    mean_turns: int = 20
    mean_think_s: float = 5.0
    memory: int = 209_000
    """What each engine's cache holds: 1 GiB with the demo's policy."""
    most_running: int = 256
    """Replies that an engine makes at once: vLLM's own limit."""
    flip_every_s: float = 0.0
    """Between new versions; 0: none."""
    load_s: float = 0.056
    """Of an adapter: benchmarks/results/learner.md."""
    mean_life_s: float = 0.0
    """Of an engine until it fails; 0: it does not."""
    back_s: float = 60.0
    """Until an engine that failed answers again: docs/limits.md."""
    hold_s: float = 120.0
    """How long a request waits while no engine is up, before it fails."""


@dataclass(eq=False, slots=True)
class Request:
    """One request, or the probe of a version."""

    key: bytes
    prompt: int
    reply: int
    asked_at: float
    version: int = 0
    agent: Agent | None = None
    engine: Engine | None = None
    died: int = 0
    """Engines that ended while they had it."""
    cached: int = 0
    begun_at: float | None = None
    """When an engine began with its prompt."""
    first_at: float | None = None
    """When its first token was there."""
    ended_at: float | None = None
    ok: bool = False


@dataclass(eq=False, slots=True)
class Agent:
    """Asks, thinks, and asks again."""

    number: int
    drawn: random.Random
    conversations: int = 0
    key: bytes = b""
    prompt: int = 0
    turns: int = 0
    """That its conversation still has."""


class Cache:
    """The prefixes that an engine remembers. The ends of those used longest ago go first."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.held = 0
        """Of running requests."""
        self.kept: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self.size = 0

    def known(self, request: Request, system: int) -> int:
        """How many tokens of a prompt it has."""
        common = self.kept.get((b"", request.version), 0) if system else 0
        own = self.kept.get((request.key, request.version), 0) if common == system else 0
        return min(common + own, request.prompt - 1)

    def take(self, request: Request, system: int) -> bool:
        """Makes room for a request and notes what it knows of it. False if there is none."""
        common, own = (b"", request.version), (request.key, request.version)
        size = request.prompt + request.reply - system
        if self.held + size + system > self.memory:
            return False
        request.cached = self.known(request, system)
        self.size -= self.kept.pop(own, 0)
        self.held += size
        if system:
            self._keep(common, system)
        self._forget()
        return True

    def give(self, request: Request, system: int) -> None:
        """Keeps what a request has used, as long as there is room."""
        size = request.prompt + request.reply - system
        self.held -= size
        self._keep((request.key, request.version), size)
        self._forget()

    def _keep(self, key: tuple[bytes, int], size: int) -> None:
        self.size += size - self.kept.pop(key, 0)
        self.kept[key] = size

    def _forget(self) -> None:
        while (over := self.size + self.held - self.memory) > 0:
            oldest = next(iter(self.kept))
            left = self.kept[oldest] - over
            if left > 0:
                self.kept[oldest], self.size = left, self.size - over
            else:
                self.size -= self.kept.pop(oldest)

    def clear(self) -> None:
        """Forgets all."""
        self.kept.clear()
        self.size = self.held = 0


class Engine:
    """One engine; the proxy's `Placed`."""

    takes_adapters = True

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name = name
        self.up = True
        self.lives = 1
        """How often it was started; negative while it is not."""
        self.loaded: set[str] = {"0"}
        self.running = 0
        """Requests that the proxy has sent to it."""
        self.waiting: deque[Request] = deque()
        self.cache = Cache(cluster.plan.memory)
        self._cluster = cluster
        self._prefills: Request | None = None
        self._replies: list[tuple[float, int, Request]] = []
        """(the step at which each ends, a number, the request): a heap."""
        self._steps = 0.0
        self._since = 0.0
        """When `_steps` was right."""
        self._turn = 0
        """Counts its decisions: what an earlier one has planned does not count."""

    def ask(self, request: Request) -> None:
        """Adds a request."""
        request.engine = self
        self.waiting.append(request)
        if self._prefills is None:
            self._go_on()

    def fail(self) -> list[Request]:
        """Ends at once; returns what it had."""
        had = [*self.waiting, *(one for *_, one in self._replies)]
        if self._prefills is not None:
            had.append(self._prefills)
        self.up, self.lives = False, -self.lives
        self._prefills, self._turn = None, self._turn + 1
        self.loaded.clear()
        self.waiting.clear()
        self._replies.clear()
        self.cache.clear()
        return had

    def _go_on(self) -> None:
        """Begins with the next prompt that has room, else goes on with the replies."""
        cluster, plan = self._cluster, self._cluster.plan
        self._count_steps()
        self._turn += 1
        if self.waiting and len(self._replies) < plan.most_running:
            request = self.waiting[0]
            if self.cache.take(request, cluster.common(request)):
                self._prefills = self.waiting.popleft()
                request.begun_at = cluster.now
                new = request.prompt - request.cached
                end = cluster.now + cluster.times.prefill_s(new, request.cached)
                cluster.at(end, self._prefilled, self._turn)
                return
        if self._replies:
            left = self._replies[0][0] - self._steps
            step_s = cluster.times.step_s(len(self._replies))
            cluster.at(cluster.now + left * step_s, self._replied, self._turn)

    def _count_steps(self) -> None:
        if self._replies and self._prefills is None:
            step_s = self._cluster.times.step_s(len(self._replies))
            self._steps += (self._cluster.now - self._since) / step_s
        self._since = self._cluster.now

    def _prefilled(self, turn: int) -> None:
        request = self._prefills
        if turn != self._turn or request is None:
            return
        request.first_at = self._since = self._cluster.now
        self._prefills = None
        end = self._steps + request.reply - 1
        heapq.heappush(self._replies, (end, self._cluster.number(), request))
        self._end_replies()

    def _replied(self, turn: int) -> None:
        if turn == self._turn:
            self._steps, self._since = self._replies[0][0], self._cluster.now
            self._end_replies()

    def _end_replies(self) -> None:
        ended: list[Request] = []
        while self._replies and self._replies[0][0] <= self._steps:
            ended.append(heapq.heappop(self._replies)[2])
        for request in ended:
            self.cache.give(request, self._cluster.common(request))
        self._go_on()
        for request in ended:
            self._cluster.ended(request, ok=True)
