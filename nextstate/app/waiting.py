"""What the next update of a lineage waits for, in the learner's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from learner.config import LearnerConfig
from learner.schedule import contains, parse_schedule
from learner.selection import longest_wait_s
from nextstate.app.settings import Settings
from nextstate.store import Store


def signals(config: LearnerConfig) -> tuple[bool, bool]:
    """Whether samples with a score train, and whether those with a hint do."""
    return config.method not in ("opd", "opd_topk"), config.method != "binary"


def waits(
    settings: Settings,
    store: Store,
    lineage: str,
    counts: Mapping[str, int],
    now: datetime | None = None,
) -> str:
    """What the next update waits for, of a lineage that is neither paused nor stopped.

    `counts` are the store's; `now` is this machine's local time.
    """
    config, training = settings.learner, store.training
    size, ready = config.batch_size, training.ready_samples(lineage, *signals(config))
    found = [f"{_turns(ready)} ready; an update takes {size}"]
    if config.max_wait_s:
        found[0] += f", or those that are ready {config.max_wait_s:g} s after the first"
    if leased := training.leased_count(lineage):
        found.insert(0, f"An update with {leased} turns is under way")
    given = sum(training.allotted(lineage, size, *signals(config)).values())
    if given < min(ready, size):
        found += _held_back(config, ready, given)
    found += _scheduled(config.schedule, config.idle_patience_s, now or datetime.now())
    if pending := counts.get("judgements/pending", 0):
        found.append(f"The judge has {pending} turns to judge")
    return ". ".join(found) + "."


def _turns(count: int) -> str:
    return f"{count} judged turn{' is' if count == 1 else 's are'}"


def _held_back(config: LearnerConfig, ready: int, given: int) -> list[str]:
    """What the shares let train of what is ready, and when."""
    if not given:
        return ["The shares let none of them train before others give some, or for a day"]
    found = [f"The shares let {given} of them train now"]
    size, longest_s = config.batch_size, config.max_wait_s
    wait_s = longest_wait_s(ready, given, batch_size=size, max_wait_s=longest_s)
    if wait_s != longest_s:
        found.append(f"An update begins with these after {wait_s / 60:g} min")
    return found


def _scheduled(schedule: str, patience_s: float, now: datetime) -> list[str]:
    """How the schedule holds an update up."""
    said = f'([learner] schedule = "{schedule}")'
    kind, window = parse_schedule(schedule)
    if kind == "idle":
        return [f"While the engine serves, each pass waits up to {patience_s:g} s {said}"]
    if window is not None and not contains(window, now.time()):
        return [f"None begins before {window[0]:%H:%M} {said}"]
    return []
