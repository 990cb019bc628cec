"""The watch: whether versions in service are worse than those before them, for the same sessions.

Sessions differ in how hard they are, and a version comes into service in the middle of some. So a
turn is compared only with the turns of its own session that earlier versions of the chain served
and that the same judge judged: harder questions in other sessions, or a stricter judge, say nothing
about a version. If no version is worse, the order of
a session's scores means nothing, and the sum of its later scores has the distribution of as many
scores drawn from the session without replacement. Over all sessions that is the exact conditional
test of stratified ordered categories (Mehta, Patel & Senchaudhuri 1992, "Exact stratified linear
rank tests for ordered categorical and binary data"); it asks nothing of how sessions differ.

One version serves few turns, so each version of the chain is a suspect, and the turns of all its
descendants count with its own. A suspect is tested once at each of LOOKS, on exactly as many later
turns, beside each of REFERENCES. The levels of these tests add up to LEVEL (a group-sequential test
that spends its level over its looks, by Bonferroni: Lan & DeMets 1983).

No client but the owner brings a version down alone: without any of them the others must have fallen
too.

Without a common session before and after, nothing tells a worse version from harder questions. And
if the questions of a session get harder while it lasts, versions are blamed for it: the test knows
no other order. `python -m benchmarks.watch` measures how often.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from nextstate.records import WATCHED_TURNS, JudgedTurn, PolicyVersion

LEVEL = 0.001
"""The level of all tests of one suspect together. So in ten versions, which serve about 150 judged
turns, the probability that one is blamed by chance is at most 1 %."""
LOOKS = {24: 0.05, 50: 0.05, 100: 0.2, 150: 0.6, 300: 0.1}
"""After so many judged turns a suspect is tested, at this share of the level. Most of it is spent
where a fall of 0.3 can be seen."""
REFERENCES = {160: 0.2, 640: 0.8}
"""A suspect is compared with so many judged turns before it, at this share of a look's level. The
short reference is for a lineage that still gets better; the long one sees smaller falls."""
TURNS = WATCHED_TURNS
OLD = TURNS - max(REFERENCES)
"""A suspect with more later turns, 400, has passed all its looks."""
_POWER = 0.8
_CLEAR = 2.5
"""Standard errors; a smaller fall is not worth the exact test, whose level is at most 0.00048."""
_AGREES = 1.65
"""Standard errors that the others must have fallen by: one case in twenty by chance."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Later turns beside earlier ones of the same sessions."""

    turns: int
    """Later turns, of all sessions."""
    comparable: int
    """Later turns of sessions that have earlier ones of the same judge too."""
    weight: float
    """Sum over sessions of n·m / (n + m), for n earlier and m later turns: what the change is
    worth, in turns that are compared with a known mean."""
    change: float
    """The mean change of the score within a session, by weight; 0 without weight."""
    variance: float
    """Of one score within its session, by weight."""

    @property
    def error(self) -> float:
        """Standard error of the change if no version is worse."""
        return math.sqrt(self.variance / self.weight) if self.weight else math.inf

    @property
    def standing(self) -> float:
        """The change in standard errors; 0 if all scores of each session are equal."""
        return self.change / self.error if self.error else 0.0


@dataclass(frozen=True, slots=True)
class Look:
    """A look that a suspect has passed, beside the reference with which it sees most."""

    turns: int
    """Later turns, as in LOOKS."""
    reference: int
    """Earlier turns, as in REFERENCES."""
    level: float
    visible: float
    """The fall of the mean score that it has found in four of five cases; inf if not even one by 2,
    the largest there is."""


@dataclass(frozen=True, slots=True)
class Fall:
    """A version, with all that were trained from it, is clearly worse than what served before."""

    suspect: int
    """Its number: the one with which the fall most probably began."""
    found: Comparison
    p: float
    """How probable what was tested is if no version is worse."""

    def __str__(self) -> str:
        return (
            f"since version {self.suspect} the mean score fell by {-self.found.change:.2f} within "
            f"the same sessions ({self.found.comparable} later verdicts; by chance in {self.p:.1g} "
            "of cases)"
        )


class Watch:
    """Tests the suspects of one chain, each look once."""

    def __init__(self) -> None:
        self._tested: set[tuple[int, int]] = set()

    def fall(self, chain: Sequence[int], turns: Sequence[JudgedTurn], after: int) -> Fall | None:
        """A fall that is found now, and the version with which it most probably began.

        `chain`: the serving version's ancestors and itself, oldest first. `turns`: the chain's
        newest TURNS judged turns in the order in which they were recorded. Versions up to number
        `after` are no suspects.
        """
        suspects = later_turns(chain, turns, after)
        least: float | None = None
        for suspect, count in suspects.items():
            for look in LOOKS:
                if look <= count and (suspect, look) not in self._tested:
                    self._tested.add((suspect, look))
                    p = chance(*split(chain, turns, suspect), look)
                    if p is not None:
                        least = min(p, least or 1.0)
        if least is None:
            return None
        found = {suspect: beside(chain, turns, suspect) for suspect in suspects}
        began = min(suspects, key=lambda suspect: found[suspect].standing)
        return Fall(began, found[began], least)


def later_turns(chain: Sequence[int], turns: Sequence[JudgedTurn], after: int) -> dict[int, int]:
    """The suspects, newest first, each with the number of its later turns; as `Watch.fall`."""
    served = Counter(turn.version for turn in turns)
    found: dict[int, int] = {}
    count = 0
    for suspect in reversed(chain[1:]):
        count += served[suspect]
        if suspect <= after or count > OLD:
            break
        found[suspect] = count
    return found


def returns_to(chain: Sequence[int], turns: Sequence[JudgedTurn], after: int) -> set[int]:
    """The versions that may serve again after a fall: the parents of suspects that served."""
    served = {turn.version for turn in turns}
    suspects = later_turns(chain, turns, after)
    return {old for old, new in pairwise(chain) if new in suspects and new in served}


def beside(chain: Sequence[int], turns: Sequence[JudgedTurn], suspect: int) -> Comparison:
    """All later turns of a suspect beside the longest reference."""
    earlier, later = split(chain, turns, suspect)
    return compare(sessions(earlier[-max(REFERENCES) :], later), len(later))


def last_look(earlier: Sequence[JudgedTurn], later: Sequence[JudgedTurn]) -> Look | None:
    """The last look that so many later turns have passed; None before the first."""
    look = max((look for look in LOOKS if look <= len(later)), default=None)
    if look is None:
        return None
    looks: list[Look] = []
    for reference, part in REFERENCES.items():
        level = LEVEL * LOOKS[look] * part
        fall = visible(sessions(earlier[-reference:], later[:look]), level)
        looks.append(Look(look, reference, level, fall))
    return min(looks, key=lambda look: look.visible)


def chance(earlier: Sequence[JudgedTurn], later: Sequence[JudgedTurn], look: int) -> float | None:
    """How probable the fall is by chance, if the first `look` later turns are clearly worse."""
    for reference, part in REFERENCES.items():
        rows = sessions(earlier[-reference:], later[:look])
        found = compare(rows, look)
        if found.standing < -_CLEAR:
            p = probability(rows)
            if p <= LEVEL * LOOKS[look] * part and not _by_one(earlier[-reference:], later[:look]):
                return p
    return None


def _by_one(earlier: Sequence[JudgedTurn], later: Sequence[JudgedTurn]) -> bool:
    """Whether only one client that is limited has fallen, and there are others.

    To ask for more makes false alarms rarer, so the levels hold.
    """
    for client in {turn.client for turn in later} - {""}:
        others = [turn for turn in later if turn.client != client]
        rows = sessions([turn for turn in earlier if turn.client != client], others)
        if others and compare(rows, len(others)).standing >= -_AGREES:
            return True
    return False


def chain_of(versions: Sequence[PolicyVersion], number: int) -> list[int]:
    """The numbers of the version's ancestors, the base first, and its own."""
    parents = {version.number: version.parent for version in versions}
    chain = [number]
    while (parent := parents.get(chain[-1])) is not None:
        chain.append(parent)
    return chain[::-1]


def split(
    chain: Sequence[int], turns: Sequence[JudgedTurn], suspect: int
) -> tuple[list[JudgedTurn], list[JudgedTurn]]:
    """The turns that versions before `suspect` served, and those of it and later ones."""
    before = set(chain[: chain.index(suspect)])
    after = set(chain) - before
    return (
        [turn for turn in turns if turn.version in before],
        [turn for turn in turns if turn.version in after],
    )


Row = tuple[list[int], list[int]]
"""A session's numbers of scores -1, 0 and 1: of all its turns, and of the later ones."""


def sessions(earlier: Sequence[JudgedTurn], later: Sequence[JudgedTurn]) -> list[Row]:
    """The rows of the sessions that have turns on both sides: one for each judge of a session."""
    rows: dict[tuple[str, str], Row] = {}
    for turn in earlier:
        row = rows.setdefault((turn.session, turn.judge), ([0, 0, 0], [0, 0, 0]))
        row[0][turn.score + 1] += 1
    for turn in later:
        if (row := rows.get((turn.session, turn.judge))) is not None:
            row[0][turn.score + 1] += 1
            row[1][turn.score + 1] += 1
    return [row for row in rows.values() if any(row[1])]


def compare(rows: Sequence[Row], turns: int) -> Comparison:
    """What the sessions' rows say; `turns` is the number of all later ones."""
    weight = fall = spread = 0.0
    for of_all, of_later in rows:
        n, later = sum(of_all), sum(of_later)
        mean = (of_all[2] - of_all[0]) / n
        weight += later * (n - later) / n
        fall += of_later[2] - of_later[0] - later * mean
        squares = (of_all[2] + of_all[0]) / n - mean**2
        spread += later * (n - later) / (n - 1) * squares
    comparable = sum(sum(of_later) for _, of_later in rows)
    if not weight:
        return Comparison(turns, 0, 0.0, 0.0, 0.0)
    return Comparison(turns, comparable, weight, fall / weight, spread / weight)


def visible(rows: Sequence[Row], level: float) -> float:
    """The fall that a test at `level` finds in four of five cases, if these rows have none.

    To 0.01; inf if it is over 2. A fall spreads the scores of its session, so it has to be larger
    than what these scores' own spread would hide.
    """
    by_chance, sure = NormalDist().inv_cdf(1 - level), NormalDist().inv_cdf(_POWER)

    def is_found(percent: int) -> bool:
        fall, weight, if_none, if_so = percent / 100, 0.0, 0.0, 0.0
        for (bad, neutral, good), of_later in rows:
            n, later = bad + neutral + good, sum(of_later)
            mean, squares, earlier = (good - bad) / n, (good + bad) / n, n - later
            after = max(mean - fall, -1.0)
            both = (earlier * mean + later * after) / n
            squares_after = max(squares, abs(after))
            squares_both = (earlier * squares + later * squares_after) / n
            part = later * earlier / n
            weight += part * (mean - after)
            if_none += part * n / (n - 1) * (squares_both - both**2)
            spread = (squares_after - after**2) / later + (squares - mean**2) / earlier
            if_so += part**2 * spread
        return weight > by_chance * math.sqrt(if_none) + sure * math.sqrt(if_so)

    least = bisect(range(1, 201), x=False, key=is_found)
    return (least + 1) / 100 if least < 200 else math.inf


def probability(rows: Sequence[Row]) -> float:
    """That the later scores have at most their sum, if every order of a session is as probable."""
    found, observed = {0: 1.0}, 0
    for of_all, of_later in rows:
        observed += of_later[2] - of_later[0]
        sums = dict(_sums(of_all, sum(of_later)))
        joined: Counter[int] = Counter()
        for a, p in found.items():
            for b, q in sums.items():
                joined[a + b] += p * q  # pyright: ignore[reportArgumentType]
        found = dict(joined)
    return min(1.0, sum(p for total, p in found.items() if total <= observed))


def _sums(of_all: list[int], draws: int) -> Iterator[tuple[int, float]]:
    """The sums of `draws` scores without replacement: multivariate hypergeometric."""
    bad, neutral, good = of_all
    total = _log_choose(sum(of_all), draws)
    found: dict[int, float] = {}
    for b in range(max(0, draws - neutral - good), min(bad, draws) + 1):
        of_bad = _log_choose(bad, b) - total
        for g in range(max(0, draws - b - neutral), min(good, draws - b) + 1):
            log = of_bad + _log_choose(good, g) + _log_choose(neutral, draws - b - g)
            found[g - b] = found.get(g - b, 0.0) + math.exp(log)
    yield from found.items()


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
