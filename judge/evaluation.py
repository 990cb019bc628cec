"""How well a judge agrees with people: labelled next states in, accuracy and Cohen's κ out.

A file holds one case a line: `{"id", "tail": [[role, text], …], "reply", "next_states": [{"source",
"text"}], "label": 1, 0 or -1}`. Optional keys group the cases: `language`, `category`, `family` and
`split`. A next state with `"repeat": N` has its text N times. `"wants"` is the score that an attack
on the judge tries to get; the report counts the attacks that got it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from judge.config import JudgeConfig
from judge.evidence import bounded
from judge.verdict import verdict_of
from judge.votes import votes_on
from nextstate.agreement import SCORES, agreement
from nextstate.errors import ConfigError, JudgeError
from nextstate.hooks import Evidence, JudgeKind
from nextstate.records import TRUST, NextState, Source, Vote

LABELLED = Path(__file__).parent / "data" / "next_states.jsonl"
"""The cases of this repository. Those of split `dev` are for training."""
GROUPS = ("language", "category", "family")


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled next state."""

    id: str
    evidence: Evidence
    label: int
    groups: Mapping[str, str]
    wants: int | None = None
    """The score that an attack on the judge tries to get; None for other cases."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The judge's answer to a case."""

    case: Case
    score: int | None
    """None when no vote was valid."""
    votes: tuple[Vote, ...]
    """The valid ones, in order."""
    seconds: float
    failure: str = ""
    """Why no vote was valid."""


def read_cases(file: Path, split: str | None = None) -> list[Case]:
    """The cases of a file, of one `split` if named. Raises ConfigError with the line at fault."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    cases: list[Case] = []
    for number, line in enumerate(lines, 1):
        try:
            data = orjson.loads(line)
            case = _case(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}, line {number}: expected a labelled next state with id, tail, reply, "
                f"next_states and a label of 1, 0 or -1; {type(error).__name__}: {error}"
            ) from error
        if split is None or case.groups.get("split") == split:
            cases.append(case)
    if not cases:
        raise ConfigError(f"{file} holds no case" + (f" of split {split!r}" if split else ""))
    return cases


def _case(data: dict[str, Any]) -> Case:
    if data["label"] not in SCORES:
        raise ValueError(f"label = {data['label']!r}")
    states = tuple(
        NextState(data["id"], source, state["text"] * state.get("repeat", 1), TRUST[source])
        for state in data["next_states"]
        if (source := Source(state["source"])) and state["text"]
    )
    tail = tuple((str(role), str(text)) for role, text in data["tail"])
    groups = {name: str(data[name]) for name in (*GROUPS, "split") if name in data}
    evidence = Evidence(tail, data["reply"], states)
    return Case(data["id"], evidence, data["label"], groups, data.get("wants"))


async def evaluate(
    cases: Sequence[Case], config: JudgeConfig, judge: JudgeKind, told: Callable[[int], object]
) -> list[Outcome]:
    """Judges the cases as the stage would, `config.parallel` at a time; `told` gets how many.

    Raises JudgeError if no case gets a valid vote: that says nothing of the judge.
    """
    done = itertools.count(1)
    places = asyncio.Semaphore(config.parallel)

    async def one(case: Case) -> Outcome:
        async with places:
            started = time.perf_counter()
            evidence = bounded(case.evidence, config.max_chars)
            votes, failure = list[Vote](), ""
            try:
                votes = await votes_on(evidence, case.id, config, judge)
            except JudgeError as error:
                failure = str(error)
            verdict = verdict_of(case.id, judge.name, votes, evidence)
            seconds = time.perf_counter() - started
            told(next(done))
            return Outcome(case, verdict and verdict.score, tuple(votes), seconds, failure)

    outcomes = await asyncio.gather(*(one(case) for case in cases))
    if not any(outcome.votes for outcome in outcomes):
        raise JudgeError(f"no case could be judged; the first: {outcomes[0].failure}")
    return outcomes


def report(outcomes: Sequence[Outcome]) -> str:
    """The agreement by group, the confusion matrix and the costs, as text."""
    rows = [("all", "", outcomes)]
    for name in GROUPS:
        values = sorted({o.case.groups[name] for o in outcomes if name in o.case.groups})
        rows += [(name, v, [o for o in outcomes if o.case.groups.get(name) == v]) for v in values]
    lines = [f"{'':28}{'cases':>6}{'accuracy':>10}{'κ':>7}{'abstained':>11}"]
    for name, value, part in rows:
        found = agreement([(o.case.label, o.score) for o in part])
        lines.append(
            f"{name:10}{value:18}{found.cases:6}{found.accuracy:10.2f}{found.kappa:7.2f}"
            f"{found.abstained:11}"
        )
    confusion = agreement([(o.case.label, o.score) for o in outcomes]).confusion
    lines += ["", f"{'people say':>12}{'judge: +1':>11}{'0':>5}{'-1':>5}{'none':>6}"]
    for label in SCORES:
        counts = [confusion.get((label, score), 0) for score in (*SCORES, None)]
        lines.append(f"{label:+12d}{counts[0]:11}{counts[1]:5}{counts[2]:5}{counts[3]:6}")
    if failures := [o.failure for o in outcomes if o.failure]:
        text = (
            f"{len(failures)} of {len(outcomes)} cases got no valid vote; the first: {failures[0]}"
        )
        lines += ["", text]
    attacks = [o for o in outcomes if o.case.wants not in (None, o.case.label)]
    if attacks:
        won = sum(o.score == o.case.wants for o in attacks)
        lines += ["", f"{won} of {len(attacks)} attacks got the score that they asked for"]
    judges = sorted({vote.judge for o in outcomes for vote in o.votes if vote.judge})
    voted = [f"votes of {', '.join(judges)}"] if judges else []
    return "\n".join([*lines, "", *voted, *costs(outcomes)])


def costs(outcomes: Sequence[Outcome]) -> list[str]:
    """Votes, tokens and seconds that judging took, one line each."""
    votes = [vote for o in outcomes for vote in o.votes]
    tokens = sum(vote.tokens for vote in votes) / len(outcomes)
    written = sum(vote.written for vote in votes) / len(outcomes)
    latencies = sorted(1000 * o.seconds for o in outcomes)
    slow = latencies[math.ceil(0.95 * len(latencies)) - 1]
    return [
        f"{len(votes) / len(outcomes):.1f} valid votes and {tokens:.0f} tokens a case, of which "
        f"{written:.1f} were written",
        f"{sum(not vote.sure for vote in votes)} of {len(votes)} votes unsure",
        f"latency: median {statistics.median(latencies):.1f} ms, p95 {slow:.1f} ms",
    ]
