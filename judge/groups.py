"""Settles groups of episodes: when one is over, its steps get their advantages.

A group is settled once, in one transaction, so a kill at any moment leaves it as it was or settled.
It is over when it has as many closed episodes as it shall have, or when the time of all is past.
Then the judge has `JUDGING_S` for the steps that it has not judged; the others keep their outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from judge.advantages import (
    NO_DIFFERENCE,
    CreditMethod,
    EpisodeScores,
    JudgedEpisode,
    StepScore,
    group_credit,
    process_weight,
)
from nextstate.episodes import EpisodeState
from nextstate.store import Store
from nextstate.store.groups import (
    ScoredEpisode,
    SettledEpisode,
    Settlement,
    Unsettled,
)

log = logging.getLogger(__name__)

EPISODE_S = 3600.0
"""How long an episode without a deadline is waited for."""
CLOSING_S = 60.0
"""Seconds after its deadline in which an episode may still be closed; and seconds in which a failed
one may be replaced by another of its group."""
JUDGING_S = 600.0
"""Seconds that the judge has for the steps of a group that is over."""
MOST_APART = 4
"""By how many versions the newest that served a group may differ from the oldest. The outcomes of
versions further apart say more about the versions than about the steps."""


def is_over(group: Unsettled, now: float) -> bool:
    """True if no further episode of the group is waited for.

    A group without a size may always get another episode, so it waits until its deadline: that of
    the last of its episodes, and CLOSING_S more.
    """
    states = [member.state for member in group.members]
    if group.size is not None and EpisodeState.OPEN not in states:
        if states.count(EpisodeState.CLOSED) >= group.size:
            return True
        if len(states) >= group.size and now >= _closed_at(group) + CLOSING_S:
            return True  # some have failed, and nobody tries again
    return now >= _deadline(group) + CLOSING_S


def settle_over(
    store: Store, since: float, method: CreditMethod = "combined", judging_s: float = JUDGING_S
) -> int:
    """Settles the groups that are over, and whose steps are judged or have waited long enough.

    `since` is when the judge began to work, Unix time: a step that waited for a judge that was not
    there has its whole time from then on. Returns how many groups it settled.
    """
    settled = 0
    for group in store.groups.unsettled():
        now = store.database.now()
        if not is_over(group, now):
            continue
        if now < max(_closed_at(group), since) + judging_s and store.groups.unjudged(group):
            continue

        def decide(
            group: Unsettled,
            episodes: Sequence[ScoredEpisode],
            earlier: Sequence[SettledEpisode],
            outcomes: Sequence[float],
        ) -> Settlement | None:
            if not is_over(group, store.database.now()):
                return None  # another one was opened meanwhile
            return settlement(episodes, earlier, method, outcomes)

        try:
            done = store.groups.settle(group, decide)
        except Exception:  # the others must not wait for it
            log.exception("group %s cannot be settled", group.name)
            continue
        if done:
            settled += 1
            log.info("settled %s with %d episodes", group.name, len(group.members))
    return settled


async def settle_groups(
    store: Store, stop: asyncio.Event, method: CreditMethod, look_s: float
) -> None:
    """Settles groups until `stop`."""
    since = store.database.now()
    while not stop.is_set():
        try:
            await asyncio.to_thread(settle_over, store, since, method)
        except Exception:
            log.exception("settling failed; trying again")
        try:
            await asyncio.wait_for(stop.wait(), look_s)
        except TimeoutError:
            continue


def settlement(
    episodes: Sequence[ScoredEpisode],
    earlier: Sequence[SettledEpisode],
    method: CreditMethod,
    outcomes: Sequence[float] = (),
) -> Settlement:
    """What the steps of a group's closed episodes are worth.

    `earlier` are those of the environment, `outcomes` earlier ones of its task's family.
    Where neither outcomes nor process rewards tell steps apart, those with a hint stay, with the
    advantage 0: the hint is all that they teach. A group that versions far apart have served is
    not compared at all.
    """
    if (apart := _too_far_apart(episodes)) is not None:
        return Settlement({}, {step.turn: apart for e in episodes for step in e.steps})
    weight = process_weight(judged(earlier))
    credit = group_credit(
        [
            EpisodeScores(
                e.episode, e.outcome, tuple(StepScore(s.turn, s.process) for s in e.steps)
            )
            for e in episodes
        ],
        method,
        weight=weight,
        earlier=outcomes,
    )
    hinted = {step.turn for episode in episodes for step in episode.steps if step.hinted}
    taught = {
        turn: 0.0
        for turn, reason in credit.dropped.items()
        if reason == NO_DIFFERENCE and turn in hinted
    }
    dropped = {turn: why for turn, why in credit.dropped.items() if turn not in taught}
    return Settlement(credit.advantages | taught, dropped)


def _too_far_apart(episodes: Sequence[ScoredEpisode]) -> str | None:
    """Why the episodes cannot be compared; None if they can."""
    served = [e.versions for e in episodes if e.versions is not None and e.outcome is not None]
    oldest = min((low for low, _ in served), default=0)
    newest = max((high for _, high in served), default=0)
    if newest - oldest <= MOST_APART:
        return None
    return (
        f"its group was served by the versions {oldest} to {newest}: more than {MOST_APART} apart, "
        "so its episodes are not compared"
    )


def judged(episodes: Sequence[SettledEpisode]) -> list[JudgedEpisode]:
    """Those that have a process reward."""
    return [JudgedEpisode(e.group, e.outcome, e.process) for e in episodes if e.process is not None]


def _closed_at(group: Unsettled) -> float:
    """When the last one was closed; 0 if none is."""
    return max((m.closed_at for m in group.members if m.closed_at is not None), default=0.0)


def _deadline(group: Unsettled) -> float:
    return max(m.opened_at + (m.deadline_s or EPISODE_S) for m in group.members)
