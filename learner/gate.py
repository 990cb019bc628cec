"""Whether a candidate version may serve: what was measured of it, and what is wrong with that.

Four things can be wrong: the weights are not finite or outweigh the layers that they change; the
policy moved too far from its parent or from the base; it ranks held-out judged turns clearly worse
than its parent does; its own replies loop or are empty. `objection` decides, and
`learner/evaluator.py` measures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from learner.config import LearnerConfig

FEWEST_SESSIONS = 8
"""With fewer held-out sessions the ranking means nothing: a t-test needs a variance."""
GATE_LEVEL = 0.01
"""How often a version exactly at `gate_drop` is rejected for its ranking of held-out turns."""
_BROKEN_SHARE = 0.5
_SHORTEST_LOOP = 8


@dataclass(frozen=True, slots=True)
class Ranking:
    """How a candidate changed the log-probabilities of held-out turns, times their scores."""

    mean: float
    """Nats a token; above 0 if praised replies rose and blamed ones fell."""
    error: float
    """Standard error of the mean, over sessions."""
    sessions: int

    def upper(self, level: float) -> float:
        """The mean is below this with confidence 1 - `level` (Student's t, one side)."""
        return self.mean + student_quantile(1 - level, self.sessions - 1) * self.error


@dataclass(frozen=True, slots=True)
class Canaries:
    """Replies that a version generated itself."""

    count: int
    broken: int
    """How many are empty or run in a loop (`is_broken`)."""
    finite: bool
    """True if every logit was finite."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a candidate; None for what could not be measured."""

    weight_change: float
    """Largest ‖adapter's product‖ / ‖weight of its layer‖, Frobenius; not finite if it blew up."""
    kl_parent: float | None
    """KL(parent ‖ candidate), nats a token."""
    kl_base: float | None
    """KL(candidate ‖ base), nats a token."""
    ranking: Ranking | None
    """None with fewer than FEWEST_SESSIONS held-out sessions."""
    canaries: Canaries | None
    parents_canaries: Canaries | None
    """The parent's replies to the same prompts."""

    def metrics(self) -> dict[str, float]:
        """Numbers with `gate/what` names; a name is absent where nothing was measured."""
        found = {
            "gate/weight_change": self.weight_change,
            "gate/kl_parent": self.kl_parent,
            "gate/kl_base": self.kl_base,
            "gate/rank": self.ranking and self.ranking.mean,
            "gate/rank_error": self.ranking and self.ranking.error,
            "gate/sessions": self.ranking and self.ranking.sessions,
            "gate/canaries": self.canaries and self.canaries.count,
            "gate/canaries_broken": self.canaries and self.canaries.broken,
        }
        return {name: value for name, value in found.items() if value is not None}


def objection(found: Measured, config: LearnerConfig) -> str | None:
    """Why the candidate must not serve, with the key that decides; None if nothing is wrong."""
    bounds = (
        ("the adapter's largest change of a layer", found.weight_change, "gate_weight_change"),
        ("KL to its parent, nats a token", found.kl_parent, "gate_kl_parent"),
        ("KL to the base, nats a token", found.kl_base, "gate_kl_base"),
    )
    for what, value, key in bounds:
        limit = getattr(config, key)
        # Written so that a value that is not a number fails too.
        if value is not None and not value <= limit:
            return f"{what}, is {value:.3g}, over [learner] {key} = {limit:g}"
    if found.ranking is not None:
        upper = found.ranking.upper(GATE_LEVEL)
        if not upper >= -config.gate_drop:
            return (
                f"held-out turns of {found.ranking.sessions} sessions are ranked worse than by its "
                f"parent: {found.ranking.mean:.3g} nats a token, at most {upper:.3g} at the "
                f"{GATE_LEVEL:.0%} level, below -[learner] gate_drop = {-config.gate_drop:g}"
            )
    return _canary_objection(found.canaries, found.parents_canaries)


def _canary_objection(ours: Canaries | None, parents: Canaries | None) -> str | None:
    if ours is None:
        return None
    if not ours.finite:
        return "its own replies have logits that are not finite"
    if parents is not None and looks_bad(ours) and ours.broken >= 2 * parents.broken:
        return (
            f"{ours.broken} of {ours.count} replies of its own are empty or run in a loop, "
            f"{parents.broken} of its parent's"
        )
    return None


def looks_bad(canaries: Canaries) -> bool:
    """True if over half the replies are broken: the parent's must be looked at then."""
    return canaries.finite and 2 * canaries.broken > canaries.count


def ranking(changes: Sequence[tuple[str, float]]) -> Ranking | None:
    """From (session, score · mean change of log-probability a token) of held-out turns.

    Turns of one session are alike, so each session counts once, with its mean; the variance is
    theirs: s² / n over n sessions.
    """
    by_session: dict[str, list[float]] = {}
    for session, change in changes:
        by_session.setdefault(session, []).append(change)
    means = [statistics.fmean(values) for values in by_session.values()]
    if len(means) < FEWEST_SESSIONS:
        return None
    error = statistics.stdev(means) / math.sqrt(len(means))
    return Ranking(statistics.fmean(means), error, len(means))


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t by the expansion in 1/degrees (Abramowitz & Stegun 26.7.5).

    From 7 degrees on and for p up to 0.999 it is right to 2 %.
    """
    x = statistics.NormalDist().inv_cdf(p)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def is_broken(reply: Sequence[int]) -> bool:
    """True if a reply, without its end, is empty or at least half of it is a loop."""
    return not reply or loop_share(reply) >= _BROKEN_SHARE


def loop_share(ids: Sequence[int]) -> float:
    """Fraction of the reply in the longest run of one block, repeated at least three times.

    A run of fewer than 8 tokens does not count.

    >>> loop_share([9, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7])
    0.75
    """
    longest = 0
    for period in range(1, len(ids) // 3 + 1):
        equal = 0
        for at in range(period, len(ids)):
            equal = equal + 1 if ids[at] == ids[at - period] else 0
            if equal >= 2 * period:
                longest = max(longest, equal + period)
    return longest / len(ids) if longest >= _SHORTEST_LOOP else 0.0
