"""Many agents on several engines, as events of a simulated clock that are drawn from a seed.

Where a request goes is decided by the proxy's own code (proxy/routing.py), and versions flip by its
rules. How long an engine takes was measured (benchmarks/service_times.py).
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.service_times import Times
from benchmarks.simulated_engine import Agent, Engine, Plan, Request
from nextstate.engine.client import SLOW_S
from proxy.intervals import INTERVALS
from proxy.routing import Places, able


@dataclass(slots=True)
class Found:
    """What a simulation has found."""

    requests: list[Request] = field(default_factory=list[Request])
    """Of agents, in the order in which they asked."""
    sent: Counter[str] = field(default_factory=Counter[str])
    """How many of the measured requests each engine got."""
    moved: int = 0
    flips_s: list[float] = field(default_factory=list[float])
    """From a version's registration until it serves."""
    left_out: int = 0
    """Engines without which a version began to serve."""
    failures: int = 0
    measured: list[Request] = field(default_factory=list[Request])
    """Those that were asked after the warm-up."""
    measured_s: float = 0.0

    @property
    def failed(self) -> int:
        """How many of the measured requests got no whole reply."""
        return sum(not one.ok for one in self.measured)

    @property
    def turns_per_s(self) -> float:
        """Whole replies of the measured requests, over the time in which they were asked."""
        return sum(one.ok for one in self.measured) / self.measured_s

    @property
    def hits(self) -> float:
        """The share of prompt tokens that were cached."""
        done = [one for one in self.measured if one.ok]
        return sum(one.cached for one in done) / max(1, sum(one.prompt for one in done))

    @property
    def spread(self) -> float:
        """The requests of the engine that got most, over the mean."""
        return max(self.sent.values()) / statistics.mean(self.sent.values())

    def waited_s(self, share: float) -> float:
        """A quantile of the time until an engine began with a request."""
        return _quantile(
            [o.begun_at - o.asked_at for o in self.measured if o.begun_at is not None], share
        )

    def first_s(self, share: float) -> float:
        """A quantile of the time until the first token."""
        return _quantile(
            [o.first_at - o.asked_at for o in self.measured if o.first_at is not None], share
        )


def _quantile(values: Sequence[float], share: float) -> float:
    found = sorted(values)
    return found[min(len(found) - 1, int(share * len(found)))] if found else float("nan")


class Cluster:
    """The simulated clock, and what the proxy knows and does."""

    def __init__(self, plan: Plan, times: Times) -> None:
        self.plan, self.times = plan, times
        self.now = 0.0
        self.found = Found()
        self.engines = [Engine(f"engine-{number}", self) for number in range(plan.engines)]
        self.serving = 0
        self._named = {engine.name: engine for engine in self.engines}
        self._places = Places(shared=plan.placing == "hashed")
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._held: deque[Request] = deque()
        """No engine is up: they wait."""
        self._loading: set[Engine] = set()
        """The engines that the next version waits for."""
        self._have_loaded = 0
        self._published_at = 0.0

    def run(self) -> Found:
        """Simulates until every request has ended."""
        plan, found = self.plan, self.found
        for number in range(plan.agents):
            agent = Agent(number, random.Random(f"{plan.seed} agent {number}"))
            self.at(agent.drawn.uniform(0, plan.mean_think_s), self._ask, agent)
        if plan.flip_every_s:
            self.at(plan.flip_every_s, self._publish)
        for engine in self.engines if plan.mean_life_s else ():
            self._live(engine, random.Random(f"{plan.seed} {engine.name}"))
        while self._events:
            self.now, _, call, arguments = heapq.heappop(self._events)
            call(*arguments)
        found.measured = [one for one in found.requests if one.asked_at >= plan.warm_up_s]
        found.measured_s = plan.seconds - plan.warm_up_s
        return found

    def at(self, when: float, call: Callable[..., None], *arguments: object) -> None:
        """Calls something then."""
        heapq.heappush(self._events, (when, self.number(), call, arguments))

    def number(self) -> int:
        """The next of all numbers: what is equal keeps its order."""
        return next(self._numbers)

    def common(self, request: Request) -> int:
        """How much of its prompt all conversations have in common."""
        return 0 if request.agent is None else self.plan.system

    # Agents

    def _ask(self, agent: Agent) -> None:
        if self.now > self.plan.seconds:
            return
        plan, drawn = self.plan, agent.drawn

        def tokens(mean: int) -> int:
            return 1 + int(drawn.expovariate(1 / mean))

        reply = min(tokens(plan.mean_reply), plan.longest_reply)
        if agent.turns == 0 or agent.prompt + reply > plan.context:
            agent.conversations += 1
            text = f"{agent.number} {agent.conversations}".encode()
            agent.key = hashlib.blake2b(text, digest_size=16).digest()
            room = plan.context - reply
            agent.prompt = min(room, plan.system + tokens(plan.mean_first))
            agent.turns = tokens(plan.mean_turns)
        request = Request(agent.key, agent.prompt, reply, self.now, agent=agent)
        self.found.requests.append(request)
        self._send(request)

    def ended(self, request: Request, *, ok: bool) -> None:
        """A request has got its whole reply, or none."""
        request.ended_at, request.ok = self.now, ok
        if request.agent is None:
            if ok and request.engine is not None:
                self._probed(request.engine, request.version)
            return
        if request.engine is not None:
            request.engine.running -= 1
        agent, plan = request.agent, self.plan
        if ok:
            agent.turns -= 1
            said = 1 + int(agent.drawn.expovariate(1 / plan.mean_said))
            agent.prompt += request.reply + said
        self.at(self.now + agent.drawn.expovariate(1 / plan.mean_think_s), self._ask, agent)

    # The proxy

    def _send(self, request: Request) -> None:
        if not any(engine.up for engine in self.engines):
            self._held.append(request)
            self.at(max(self.now, request.asked_at + self.plan.hold_s), self._give_up, request)
            return
        request.version = self.serving
        found = able(self.engines, str(request.version), serving=True)
        key = None if self.plan.placing == "anywhere" else request.key
        running = {engine.name: engine.running for engine in found}
        engine = self._named[self._places.place(key, running, self.now)]
        engine.running += 1
        if request.asked_at >= self.plan.warm_up_s:
            self.found.sent[engine.name] += 1
        engine.ask(request)

    def _give_up(self, request: Request) -> None:
        if request in self._held:
            self._held.remove(request)
            self.ended(request, ok=False)

    # Engines that fail

    def _live(self, engine: Engine, drawn: random.Random) -> None:
        life_s = drawn.expovariate(1 / self.plan.mean_life_s)
        if self.now + life_s <= self.plan.seconds:
            self.at(self.now + life_s, self.fail, engine, drawn)

    def fail(self, engine: Engine, drawn: random.Random) -> None:
        """An engine ends at once. `drawn` decides how long it lives after it is back."""
        self.found.failures += 1
        had = engine.fail()
        self.at(self.now + self.plan.back_s, self._back, engine, drawn)
        if engine in self._loading:
            self._waits_less(engine)
        for request in had:
            if request.agent is None:
                continue
            request.died += 1
            if request.first_at is not None or (request.died > 1 and len(self.engines) > 1):
                self.ended(request, ok=False)
                continue
            engine.running -= 1
            request.engine = None
            self.found.moved += 1
            self._send(request)

    def _back(self, engine: Engine, drawn: random.Random) -> None:
        engine.lives = 1 - engine.lives
        self._load(engine, self.serving)
        self._live(engine, drawn)

    # Versions

    def _load(self, engine: Engine, version: int) -> None:
        self.at(self.now + self.plan.load_s, self._probe, engine, engine.lives, version)

    def _probe(self, engine: Engine, lives: int, version: int) -> None:
        if engine.lives == lives:
            engine.ask(Request(b"probe", 2, 2, self.now, version))

    def _publish(self) -> None:
        """Loads the next version into every engine that is up, as `load_everywhere` does."""
        if self.now > self.plan.seconds:
            return
        self.at(self.now + self.plan.flip_every_s, self._publish)
        up = {engine for engine in self.engines if engine.up}
        if not self._loading and up:
            self._loading, self._have_loaded, self._published_at = up, 0, self.now
            for engine in up:
                self._load(engine, self.serving + 1)

    def _probed(self, engine: Engine, version: int) -> None:
        engine.loaded.add(str(version))
        if not engine.up and version < self.serving:
            self._load(engine, self.serving)  # another one serves by now
        elif not engine.up:
            engine.up = True
            held, self._held = self._held, deque[Request]()
            for request in held:
                self._send(request)
        elif version == self.serving + 1 and engine in self._loading:
            self._have_loaded += 1
            self._waits_less(engine)

    def _waits_less(self, engine: Engine) -> None:
        """The next version does not wait for this engine any more."""
        self._loading.discard(engine)
        if not self._have_loaded:
            return
        next_one = self.serving + 1
        if not self._loading:
            self.at(self.now + INTERVALS.store_poll_s, self._flip, next_one)
        elif self._have_loaded == 1:  # the publisher, and then the proxy, wait for late ones
            late_s = SLOW_S + INTERVALS.store_poll_s + INTERVALS.flip_s
            self.at(self.now + late_s, self._flip, next_one)

    def _flip(self, version: int) -> None:
        if version != self.serving + 1:
            return  # it serves already
        self.found.left_out += len(self._loading)
        self.found.flips_s.append(self.now - self._published_at)
        self.serving, self._loading = version, set()
        for engine in self.engines:
            engine.loaded.discard(str(version - 1))
            if engine.up and str(version) not in engine.loaded:
                self._load(engine, version)


def simulate(plan: Plan, times: Times) -> Found:
    """What happens by this plan. Raises ValueError if a conversation does not fit an engine."""
    if not plan.system + plan.longest_reply < plan.context < plan.memory - plan.system:
        raise ValueError(
            f"context = {plan.context}: expected more than system and longest_reply, "
            f"{plan.system + plan.longest_reply}, and less than memory without system, "
            f"{plan.memory - plan.system}"
        )
    return Cluster(plan, times).run()
