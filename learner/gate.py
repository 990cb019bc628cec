"""Whether a candidate version may serve: what was measured of it, and what is wrong with that.

Four things can be wrong: the weights are not finite or outweigh the layers that they change; the
policy moved too far from its parent or from the base; it ranks held-out judged turns clearly worse
than its parent does; its own replies are clearly worse than the base's (`learner/canaries.py`).
`objection` decides, and `learner/evaluator.py` measures.

In a lineage that learns in environments a candidate that has passed takes an exam too: it must not
solve clearly fewer held-out tasks than its parent (`exam_objection`, `learner/examining.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from learner.canaries import Comparison
from learner.config import LearnerConfig
from learner.means import Mean
from nextstate.exams import Exam

GATE_LEVEL = 0.01
"""How often a version exactly at `gate_drop` is rejected for its ranking of held-out turns, and at
most how often one that is as good as its parent fails its exam."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a candidate; None for what could not be measured."""

    weight_change: float
    """Largest ‖adapter's product‖ / ‖weight of its layer‖, Frobenius; not finite if it blew up."""
    kl_parent: float | None
    """KL(parent ‖ candidate), nats a token."""
    kl_base: float | None
    """KL(candidate ‖ base), nats a token."""
    ranking: Mean | None
    """How the log-probabilities of held-out turns changed, times their scores: nats a token, over
    sessions; above 0 if praised replies rose and blamed ones fell."""
    replies: Comparison | None
    """Its own replies beside the base's."""
    is_finite: bool = True
    """False if a logit that decides a token of its own replies is not a number."""

    def metrics(self) -> dict[str, float]:
        """Numbers with `gate/what` names; a name is absent where nothing was measured."""
        found = {
            "gate/weight_change": self.weight_change,
            "gate/kl_parent": self.kl_parent,
            "gate/kl_base": self.kl_base,
            "gate/rank": self.ranking and self.ranking.value,
            "gate/rank_error": self.ranking and self.ranking.error,
            "gate/sessions": self.ranking and self.ranking.count,
            **(self.replies.metrics() if self.replies else {}),
        }
        return {name: value for name, value in found.items() if value is not None}


def objection(found: Measured, config: LearnerConfig) -> str | None:
    """Why the candidate must not serve, with the bound that decides; None if nothing is wrong."""
    bounds = (
        ("the adapter's largest change of a layer", found.weight_change, config.gate_weight_change),
        ("KL to its parent, nats a token", found.kl_parent, config.gate_kl_parent),
        ("KL to the base, nats a token", found.kl_base, config.gate_kl_base),
    )
    for what, value, limit in bounds:
        # Written so that a value that is not a number fails too.
        if value is not None and not value <= limit:
            return f"{what}, is {value:.3g}, over the bound of {limit:g}"
    if found.ranking is not None:
        upper = found.ranking.upper(GATE_LEVEL)
        if not upper >= -config.gate_drop:
            return (
                f"held-out turns of {found.ranking.count} sessions are ranked worse than by its "
                f"parent: {found.ranking.value:.3g} nats a token, at most {upper:.3g} at the "
                f"{GATE_LEVEL:.0%} level, below the bound of {-config.gate_drop:g}"
            )
    if not found.is_finite:
        return "its own replies have logits that are not finite"
    return found.replies and found.replies.objection()


def exam_objection(exam: Exam) -> str | None:
    """Why the candidate must not serve after its exam; None if it solves no fewer tasks, clearly.

    By the exact test of McNemar (1947): of the tasks that only one of both solved, a candidate that
    is as good as its parent solved each with probability 1/2.
    """
    apart = exam.gained + exam.lost
    at_least = sum(math.comb(apart, lost) for lost in range(exam.lost, apart + 1)) / 2**apart
    if at_least > GATE_LEVEL:
        return None
    return (
        f"it solves fewer held-out tasks than its parent: {exam.solved} of {exam.tasks}, its "
        f"parent {exam.by_parent}; by chance that happens with probability {at_least:.1g}, below "
        f"the bound of {GATE_LEVEL:g}"
    )
