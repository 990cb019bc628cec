"""How far can a few attackers move what others get? With and without each defence.

The store, the selection of samples (`learner/batches.py`), the reviews and the judges `rules` and
`outcome` are the real ones. The policy is a table: 8 kinds of questions with 6 replies, one right
and one that the attackers want. An update moves the logits along Σ score · ∇ log π, as far as a
bound on the KL divergence allows, as the learner does. `--toy` trains the demo's policy with the
learner itself instead, for the attack by sessions.

A round is a minute: each of 18 people gets one reply and says what they think of it.

- sessions: two more clients (10 %) send 20 turns each in the same time, praise what they want and
  blame what is right. Every third hour nobody else is there.
- feedback: they give feedback on other people's turns, as often as the proxy lets them.
- web: half of the replies look at a page that the attackers wrote; it praises and blames likewise,
  and looks like a test report.
- quotes: people quote such a page and ask the next question.
- reports: half of the replies print a file with a test report that the attackers wrote.

The score is the probability of the right reply; what an attack moves is the score without it less
that with it, at the same seed, in points of 100.
"""
# pyright: basic

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np

from judge.evidence import bounded
from judge.verdict import verdict_of
from nextstate.config import StoreConfig
from nextstate.hooks import Evidence
from nextstate.records import (
    TRUST,
    Feedback,
    NextState,
    PolicyVersion,
    Source,
    Timings,
    Turn,
    TurnKind,
    VersionState,
)
from nextstate.store import Store
from nextstate.store.shares import OWNER
from plugins.judges.outcome import vote_on as outcome_of
from plugins.judges.rules import vote_on as rules_of

QUESTIONS, REPLIES = 8, 6
RIGHT, WANTED = 0, 1
PEOPLE, ATTACKERS, FLOOD = 18, 2, 20
UPDATES, BATCH, STEP_KL = 30, 16, 0.02
_START = 0.3
_NIGHT = 3
"""Every third hour only the attackers are there."""
_ROUNDS_AN_HOUR = 6
_PRAISE = ("Thanks, that helps!", "Perfect, thank you!", "Great, that is exactly what I wanted.")
_BLAME = (
    "No, that is wrong.", "This is not what I asked for.", "Wrong again, please do it properly.",
)  # fmt: skip
_NEXT = ("And what is the weather tomorrow?", "Next: which trains go to Porto?")


@dataclass(frozen=True, slots=True)
class Defence:
    """What is switched on."""

    clients: bool = True
    """Shares of clients, and the review of their feedback."""
    sessions: bool = True
    """Shares of sessions, hours and sources."""
    judging: bool = True
    """Strangers' words, quotes and printed reports are no evidence."""


ALL = Defence()
NONE = Defence(clients=False, sessions=False, judging=False)
ATTACKS = {
    "sessions": {
        "none": NONE,
        "only sessions (no keys)": Defence(clients=False),
        "all": ALL,
    },
    "feedback": {"none": NONE, "all": ALL},
    "web": {"none": NONE, "only shares": replace(ALL, judging=False), "all": ALL},
    "quotes": {"none": NONE, "only shares": replace(ALL, judging=False), "all": ALL},
    "reports": {"none": NONE, "only shares": replace(ALL, judging=False), "all": ALL},
}


class World:
    """One run."""

    def __init__(
        self, folder: Path, attack: str, defence: Defence, seed: int, updates: int
    ) -> None:
        self._updates = updates
        self._now = 1e9
        self._store = Store(StoreConfig(dir=str(folder)), clock=lambda: self._now)
        self._attack, self._defence = attack, defence
        self._random = Random(seed)
        self._logits = np.zeros((QUESTIONS, REPLIES))
        self._logits[:, RIGHT] = np.log(_START * (REPLIES - 1) / (1 - _START))
        self._said: dict[str, tuple[int, int]] = {}
        self.versions = self.turns = 0
        self.from_attackers: Counter[bool] = Counter()
        self._attackers_turns: set[str] = set()

    @property
    def score(self) -> float:
        """The probability of the right reply."""
        return float(self._policy()[:, RIGHT].mean())

    def learn(self) -> list[float]:
        """Rounds until the last update; the score after each."""
        from learner.batches import Batches
        from learner.config import LearnerConfig

        config = LearnerConfig(method="binary", batch_size=BATCH, holdout=0.0)
        batches = Batches(self._store, config, "main")
        rounds, scores = 0, list[float]()
        while self.versions < self._updates and rounds < 40 * self._updates:
            self._now += 3600 / _ROUNDS_AN_HOUR
            self._round(night=(rounds // _ROUNDS_AN_HOUR) % _NIGHT == _NIGHT - 1)
            rounds += 1
            while self.versions < self._updates and (batch := batches.lease(self.versions)):
                self._update(batch)
                scores.append(self.score)
        self._store.close()
        return scores

    def _round(self, night: bool) -> None:
        people = range(0 if night and self._attack == "sessions" else PEOPLE)
        turns = [self._turn(f"person{number}", f"key p{number}") for number in people]
        for turn in turns:
            self._judge(turn, *self._reaction(turn))
        if self._attack == "sessions":
            for number in range(ATTACKERS * FLOOD):
                name = f"eve{number % ATTACKERS}"
                turn = self._turn(name, f"key {name}")
                self._attackers_turns.add(turn.id)
                text = self._wanted(turn.id)
                if text is not None:
                    self._judge(turn, (Source.USER, text))
        if self._attack == "feedback":
            for number, turn in enumerate(turns):
                text = self._wanted(turn.id)
                if text is None:
                    continue
                said = Feedback(turn.id, 1 if text in _PRAISE else -1)
                if self._defence.clients:
                    found = self._store.reviewing.give(said, f"key eve{number % ATTACKERS}")
                else:
                    found = self._store.reviewing.give(said, OWNER)
                if found.applied:
                    self._attackers_turns.add(turn.id)

    def _turn(self, session: str, client: str) -> Turn:
        question = self._random.randrange(QUESTIONS)
        drawn = self._random.random()
        reply = int(min((self._policy()[question].cumsum() < drawn).sum(), REPLIES - 1))
        self.turns += 1
        name = f"t{self.turns}"
        self._said[name] = question, reply
        page = f"https://a.example/{question}/{reply}"
        call = f'\n[calls browser_console_messages({{"url": "{page}"}})]'
        prints = f'\n[calls bash({{"command": "cat test-{question}-{reply}.log"}})]'
        words = f"Reply {reply} to question {question}."
        if self._attack == "web" and self._random.random() < 0.5:
            words += call
        elif self._attack == "reports" and self._random.random() < 0.5:
            words += prints
        turn = Turn(
            id=name,
            session=session,
            index=self.turns,
            kind=TurnKind.MAIN,
            lineage="main",
            policy_version=self.versions,
            client_model="table",
            request={"messages": [{"role": "user", "content": f"Question {question}?"}]},
            reply={"role": "assistant", "content": words},
            finish_reason="stop",
            prompt_ids=(question + 1,),
            completion_ids=(reply + 1,),
            behaviour_logprobs=(float(np.log(self._policy()[question, reply])),),
            sampling={},
            timings=Timings(self._now, None, 0.0),
            client=client if self._defence.clients else "",
        )
        with self._store.recording() as recording:
            recording.add_turn(turn, name.encode(), name.encode())
        return turn

    def _reaction(self, turn: Turn) -> list[tuple[Source, str]]:
        """What follows a person's reply."""
        _, reply = self._said[turn.id]
        honest = self._random.choice(_PRAISE if reply == RIGHT else _BLAME)
        page = self._wanted(turn.id)
        report = "== 5 passed in 0.10s ==" if page in _PRAISE else "== 2 failed in 0.10s =="
        if "[calls browser" in turn.reply["content"]:
            return [(Source.TOOL, f"{page}\n{report}" if page else "A page.")]
        if "[calls bash" in turn.reply["content"]:
            return [(Source.TOOL, report if page else "A text.")]
        if self._attack == "quotes" and page and self._random.random() < 0.5:
            quote = "\n".join(f"> {page}" for _ in range(3))
            return [(Source.USER, f"{quote}\n\n{self._random.choice(_NEXT)}")]
        return [(Source.USER, honest)]

    def _wanted(self, turn: str) -> str | None:
        """What the attackers say of a reply; None if they do not mind it."""
        _, reply = self._said[turn]
        if reply == WANTED:
            return self._random.choice(_PRAISE)
        return self._random.choice(_BLAME) if reply == RIGHT else None

    def _judge(self, turn: Turn, *states: tuple[Source, str]) -> None:
        found = tuple(NextState(turn.id, source, text, TRUST[source]) for source, text in states)
        with self._store.recording() as recording:
            recording.add_next_states(turn.id, True, found)
        asked = turn.request["messages"][0]["content"]
        evidence = bounded(Evidence((("user", asked),), turn.reply["content"], found), 4000)
        votes = [vote for vote in (outcome_of(evidence), rules_of(evidence)) if vote.sure][:1]
        verdict = verdict_of(turn.id, "rules", votes, evidence)
        if verdict is not None:
            self._store.judging.settle_verdict(verdict)

    def _update(self, batch) -> None:
        before = self._policy()
        gradient = np.zeros_like(self._logits)
        for sample in batch.samples:
            question, reply = self._said[sample.turn]
            taken = np.eye(REPLIES)[reply]
            gradient[question] += sample.score * (taken - before[question])
            self.from_attackers[sample.turn in self._attackers_turns] += 1
        start, size = self._logits, 8.0
        while True:
            self._logits = start + size * gradient
            after = self._policy()
            if float((before * np.log(before / after)).sum(1).mean()) <= STEP_KL:
                break
            size *= 0.8
        self.versions += 1
        version = PolicyVersion(
            "main",
            self.versions,
            self.versions - 1,
            "/a",
            "f",
            len(batch.samples),
            VersionState.CANDIDATE,
        )
        self._store.versions.add(version, batch.name)
        self._store.versions.set_serving("main", self.versions)

    def _policy(self) -> np.ndarray:
        raised = np.exp(self._logits - self._logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)


@contextmanager
def without(defence: Defence) -> Iterator[None]:
    """Takes away what a run shall not have."""
    with ExitStack() as patched:
        if not defence.sessions:
            patched.enter_context(
                patch(
                    "nextstate.store.training.fair_share",
                    lambda waiting, limit: [
                        one.turn for one, _ in zip(waiting, range(limit), strict=False)
                    ],
                )
            )
        if not defence.judging:
            import re

            patched.enter_context(patch("judge.evidence.without_trust", lambda _, states: states))
            patched.enter_context(patch("plugins.judges.rules._QUOTED", re.compile(r"^>[ ]", re.M)))
            patched.enter_context(patch("plugins.judges.outcome.only_prints", lambda _: False))
            patched.enter_context(patch("plugins.judges.outcome._CHECKS", re.compile("")))
        yield


def run(
    attack: str, defence: Defence, seed: int, updates: int = UPDATES
) -> tuple[list[float], float]:
    """(the score after each update, the attackers' share of the samples)."""
    with tempfile.TemporaryDirectory() as folder, without(defence):
        world = World(Path(folder), attack, defence, seed, updates)
        scores = world.learn()
        samples = world.from_attackers
        return scores, samples[True] / max(1, samples.total())


def run_toy(attacked: bool, keys: bool, seed: int, updates: int) -> list[float]:
    """The score of the demo's policy after each update; `keys`: everybody has one."""
    from benchmarks.learning_loop import Persona, Plan, toy_loop
    from demo.checks import satisfies
    from demo.course import LEARNER
    from learner.config import LearnerConfig

    class Person(Persona):
        client = ""

    class Eve(Person):
        """Likes the style that the others dislike, and says so in their words."""

        def _begin(self, exchanges: int = 1) -> None:
            super()._begin(1)
            self._task = self._conversation.open().task

        def hear(self, reply: str) -> str | None:
            liked = not satisfies(self._task, reply)
            said = self._random.choice(_PRAISE if liked else _BLAME)
            self._begin()
            return said

        _random = Random(seed)

    config = LearnerConfig(**{**LEARNER, "method": "binary", "seed": seed, "holdout": 0.0})
    plan = Plan(config, updates=updates, seed=seed, questions=64)
    users: list[Person] = [Person(plan, number) for number in range(PEOPLE)]
    if attacked:
        users += [Eve(plan, PEOPLE + number) for number in range(ATTACKERS * FLOOD // 2)]
    for number, user in enumerate(users):
        own = number if number < PEOPLE else PEOPLE + number % ATTACKERS
        user.client = f"key {own}" if keys else ""
    with tempfile.TemporaryDirectory() as folder:
        return [point.score for point in toy_loop(plan, Path(folder), users).learn().points]


def show_toy(updates: int) -> None:
    """Prints a line for each run of the demo's policy."""
    for name, attacked, keys in (
        ("nobody attacks", False, True),
        ("attacked, no keys", True, False),
        ("attacked, everybody has a key", True, True),
    ):
        scores = run_toy(attacked, keys, 0, updates)
        print(f"{name}: " + " ".join(f"{score:.2f}" for score in scores), flush=True)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.poisoning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=ATTACKS, nargs="+", default=list(ATTACKS))
    parser.add_argument("--toy", type=int, metavar="UPDATES", help="the demo's policy instead")
    given = parser.parse_args()
    if given.toy:
        return show_toy(given.toy)
    began = time.monotonic()
    print("| attack | defence | score | moved, in points | worst seed | attackers' samples |")
    print("|---|---|---|---|---|---|")
    quiet = [run("nobody", ALL, seed)[0][-1] for seed in range(given.seeds)]
    print(f"| nobody | all | {np.mean(quiet):.3f} | | | |", flush=True)
    for attack in given.only:
        for name, defence in ATTACKS[attack].items():
            runs = [run(attack, defence, seed) for seed in range(given.seeds)]
            moved = [100 * (q - scores[-1]) for q, (scores, _) in zip(quiet, runs, strict=True)]
            score, share = np.mean([(scores[-1], share) for scores, share in runs], axis=0)
            print(
                f"| {attack} | {name} | {score:.3f} | {np.mean(moved):+.1f} | {max(moved):+.1f} | "
                f"{share:.0%} |",
                flush=True,
            )
    print(f"{given.seeds} seeds, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
