"""How much each step of an episode should be learned, from the rewards of its group.

A group's episodes attempt the same task. An episode i has one outcome, a step t may have a process
reward (the mean of the judge's votes, or what the environment declares):

    A(i,t) = clip(z_outcome(i) + λ · (1 − success) · z_process(i,t), ±3)

Both z are (value − mean) / standard deviation, each over its own numbers: z_outcome over the
group's episodes, as in GRPO (arXiv 2402.03300, section 4.1.2); z_process over all judged steps of
the group together, not by step index, because steps of equal index are different situations once
the episodes have parted. Apart, because in a common deviation a noisy judge would drown the
outcome. `success` is the share of the episodes that are solved, so the judge's word fades as the
task is learned, and λ falls to 0 where the judge does not predict outcomes (`process_weight`). So:

- all solved alike: nothing to learn, all steps are dropped;
- all failed alike: z_outcome is 0, the judge speaks alone;
- one episode alone: its outcome is compared with earlier ones of its task family;
- an episode without an outcome counts nowhere, and its steps are dropped;
- a step without a process reward has z_process = 0.

`benchmarks/credit.py` compares this with the two other methods of `CreditMethod`. Nothing here
reads a clock, a file or the store.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from nextstate.episodes import FAMILY
from nextstate.errors import RecordError

CreditMethod = Literal["combined", "outcome", "step_sum"]
"""`combined` is the formula above; `outcome` only its first term, one number for all steps (GRPO).
`step_sum` is what OpenClaw-RL does (arXiv 2603.10165), for comparison; see `_step_sum`."""
LIMIT = 3.0
"""No advantage of `combined` and `outcome` is larger."""
WINDOW = 200
"""The newest judged episodes that decide whether the judge predicts outcomes. In groups of 8, half
of them solved, the AUC of a judge that guesses has a standard error of 0.04."""
ENOUGH = 32
"""With fewer judged episodes nothing is decided, and λ stays 1. The standard error is 0.11 then."""
PREDICTS = 0.55
"""The AUC from which on the judge's scores are used."""
_TINY = 1e-6
"""Of `step_sum`: added to each deviation; where the deviation is no larger, steps are dropped."""
_EQUAL = 1e-9
"""Numbers that differ by no more than this share of the largest are equal: they are sums of floats,
and rounding must not become an advantage."""

ALL_SOLVED = "all episodes that are compared are solved alike: nothing to learn"
NO_OUTCOME = "the episode has no outcome"
NO_DIFFERENCE = "neither outcomes nor process rewards tell the group's steps apart"
SAME_AT_STEP = "all episodes that reached this step have the same sum of rewards"


@dataclass(frozen=True, slots=True)
class StepScore:
    """A step of an episode; raises RecordError if its process reward is not finite."""

    turn: str
    process: float | None
    """None: nobody has judged this step."""

    def __post_init__(self) -> None:
        _check_finite(f"turn {self.turn}: process reward", self.process)


@dataclass(frozen=True, slots=True)
class EpisodeScores:
    """An episode's rewards; raises RecordError if its outcome is not finite."""

    episode: str
    outcome: float | None
    """None: it cannot be scored, because its infrastructure failed, or somebody has aborted it."""
    steps: tuple[StepScore, ...]
    """In the order in which they were taken."""

    def __post_init__(self) -> None:
        _check_finite(f"episode {self.episode}: outcome", self.outcome)


@dataclass(frozen=True, slots=True)
class Credit:
    """What a group's turns teach: each turn is in exactly one of the two."""

    advantages: dict[str, float]
    """By turn; positive: the step should become more likely."""
    dropped: dict[str, str]
    """By turn: why it has no advantage."""


@dataclass(frozen=True, slots=True)
class JudgedEpisode:
    """An episode with an outcome, and the judge's opinion of it."""

    group: str
    outcome: float
    process: float
    """The mean of the process rewards of its judged steps."""


def group_credit(
    episodes: Sequence[EpisodeScores],
    method: CreditMethod = "combined",
    *,
    weight: float = 1.0,
    solved: float = 1.0,
    earlier: Sequence[float] = (),
) -> Credit:
    """The advantages of the steps of one group; see the module for the formula.

    `weight` is λ in [0, 1]. An episode is solved if its outcome is at least `solved`, which is 1.0
    in the usual environments. So `success` is the rate that evaluation reports as pass@1. It does
    not depend on what an environment pays for a failure, and a group in which all are stuck at the
    same part of the outcome still hears the judge. `earlier` are outcomes of the same task family,
    the newest last; they count only if a single episode of the group has an outcome.

    Raises RecordError if a turn occurs twice, or if a number is out of its range.
    """
    if not 0.0 <= weight <= 1.0:
        raise RecordError(f"weight is {weight!r}, expected 0 to 1")
    if math.isnan(solved):
        raise RecordError(f"solved is {solved!r}, expected the outcome of a solved episode")
    for outcome in earlier:
        _check_finite("an earlier outcome", outcome)
    turns = Counter(step.turn for e in episodes for step in e.steps)
    if turns and (most := turns.most_common(1)[0])[1] > 1:
        raise RecordError(f"turn {most[0]} is {most[1]} steps of a group, expected one")
    scored = [(e.outcome, e.steps) for e in episodes if e.outcome is not None]
    unscored = (step for e in episodes if e.outcome is None for step in e.steps)
    credit = Credit({}, {step.turn: NO_OUTCOME for step in unscored})
    if method == "step_sum":
        _step_sum(scored, credit)
    elif scored:
        weight = weight if method == "combined" else 0.0
        _combined(scored, weight, solved, earlier[-FAMILY:], credit)
    return credit


def judge_auc(episodes: Sequence[JudgedEpisode]) -> float | None:
    """How well process rewards predict outcomes, in [0, 1]; 0.5 is chance. None: nothing to tell.

    It is the share of the pairs of a group with different outcomes in which the better episode has
    the higher mean process reward; equal means count half. For two outcomes in one group that is
    the area under the ROC curve (Hanley & McNeil 1982). Pairs across groups are left out: a judge
    that only knows easy tasks from hard ones says nothing of steps. Episodes are compared, not
    steps, because most steps of a failed episode are right: with one wrong step of 12, a judge that
    is always right would have an AUC of 0.54 over steps.
    """
    wins = pairs = 0.0
    for group in _by_group(episodes).values():
        for better, worse in product(group, repeat=2):
            if _better(better.outcome, worse.outcome):
                pairs += 1.0
                wins += (better.process > worse.process) + (better.process == worse.process) / 2
    return wins / pairs if pairs else None


def process_weight(episodes: Sequence[JudgedEpisode]) -> float:
    """λ: 0.0 if the newest process rewards do not predict outcomes, else 1.0.

    `episodes` are those of settled groups, the newest last. What is `compared` decides, if it is at
    least ENOUGH.
    """
    newest = compared(episodes)
    auc = judge_auc(newest) if len(newest) >= ENOUGH else None
    return 0.0 if auc is not None and auc < PREDICTS else 1.0


def compared(episodes: Sequence[JudgedEpisode]) -> list[JudgedEpisode]:
    """The last WINDOW episodes of groups in which not all outcomes are equal."""
    mixed = {
        name
        for name, group in _by_group(episodes).items()
        if _better(max(e.outcome for e in group), min(e.outcome for e in group))
    }
    return [episode for episode in episodes if episode.group in mixed][-WINDOW:]


_Scored = tuple[float, tuple[StepScore, ...]]
"""Outcome and steps of an episode."""


def _combined(
    scored: Sequence[_Scored],
    weight: float,
    solved: float,
    earlier: Sequence[float],
    credit: Credit,
) -> None:
    outcomes = [outcome for outcome, _ in scored]
    if len(scored) > 1:
        references, z_outcomes = outcomes, _standardised(outcomes)
    else:
        references, z_outcomes = earlier, [_against(earlier, outcomes[0])]
    success = sum(_reaches(outcome, solved) for outcome in references) / max(len(references), 1)
    fading = weight * (1.0 - success)
    judged = {s.turn: s.process for _, steps in scored for s in steps if s.process is not None}
    z_process = dict(zip(judged, _standardised(list(judged.values())), strict=True))
    found = {
        step.turn: min(max(z + fading * z_process.get(step.turn, 0.0), -LIMIT), LIMIT)
        for z, (_, steps) in zip(z_outcomes, scored, strict=True)
        for step in steps
    }
    if any(found.values()):
        credit.advantages.update(found)
    else:
        reason = ALL_SOLVED if success == 1.0 else NO_DIFFERENCE
        credit.dropped.update(dict.fromkeys(found, reason))


def _step_sum(scored: Sequence[_Scored], credit: Credit) -> None:
    """OpenClaw-RL's step-wise advantage, of its code in March 2026, with its quirks.

    The outcome is added to each step's process reward, where no verdict counts as 0. The sum is
    standardised over the episodes of the group that reached the same step index. A step that only
    one episode reached keeps the raw sum. Steps at whose index all sums are equal are dropped.
    Nothing is clipped.
    """
    for bucket in _by_index(scored):
        largest, centred, deviation = _centred(list(bucket.values()))
        if len(bucket) == 1:
            credit.advantages.update(bucket)
        elif deviation * largest <= _TINY:
            credit.dropped.update(dict.fromkeys(bucket, SAME_AT_STEP))
        else:
            scale = deviation + _TINY / largest
            credit.advantages.update(zip(bucket, (value / scale for value in centred), strict=True))


def _by_index(scored: Sequence[_Scored]) -> Iterator[dict[str, float]]:
    """For each step index: outcome plus process reward, by turn."""
    for index in range(max((len(steps) for _, steps in scored), default=0)):
        yield {
            steps[index].turn: _within_range(outcome + (steps[index].process or 0.0))
            for outcome, steps in scored
            if index < len(steps)
        }


def _standardised(values: Sequence[float]) -> list[float]:
    """(value − mean) / standard deviation of the population; zeros if all are equal."""
    _, centred, deviation = _centred(values)
    if not centred or max(centred) - min(centred) <= _EQUAL:
        return [0.0] * len(values)
    return [value / deviation for value in centred]


def _centred(values: Sequence[float]) -> tuple[float, list[float], float]:
    """The largest magnitude; in units of it, the values less their mean and their deviation.

    In these units nothing overflows, and `fsum` makes the result independent of the values' order.
    """
    largest = max(map(abs, values), default=0.0) or 1.0
    scaled = [value / largest for value in values]
    mean = math.fsum(scaled) / max(len(scaled), 1)
    centred = [value - mean for value in scaled]
    return largest, centred, math.sqrt(math.fsum(c * c for c in centred) / max(len(scaled), 1))


def _against(earlier: Sequence[float], outcome: float) -> float:
    """An outcome less the mean of earlier ones, in standard deviations of all; 0 without any.

    The mean leaves the outcome itself out, so that it does not depend on what it is a baseline for
    (Williams 1992, REINFORCE). The deviation has it in, or the first success would have none.
    """
    if not earlier:
        return 0.0
    # all are n values with z-scores of sum 0: z − (mean of the others) = z · (1 + 1/(n − 1))
    return _standardised([*earlier, outcome])[-1] * (1.0 + 1.0 / len(earlier))


def _within_range(value: float) -> float:
    return min(max(value, -sys.float_info.max), sys.float_info.max)


def _better(outcome: float, other: float) -> bool:
    return outcome > other and not math.isclose(outcome, other, rel_tol=_EQUAL)


def _reaches(outcome: float, solved: float) -> bool:
    return outcome >= solved or math.isclose(outcome, solved, rel_tol=_EQUAL)


def _by_group(episodes: Sequence[JudgedEpisode]) -> dict[str, list[JudgedEpisode]]:
    groups: defaultdict[str, list[JudgedEpisode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.group].append(episode)
    return groups


def _check_finite(name: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise RecordError(f"{name} is {value!r}, expected a finite number")
