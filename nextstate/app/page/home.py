"""The first page: is it learning, what changed last, what it waits for, and what is wrong."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

from learner.means import FEWEST, mean_over_groups
from learner.rejections import MANY_REJECTIONS, rejected_in_a_row
from nextstate.app.child_states import read_child_states
from nextstate.app.judge_worth import agreement_text, judge_agreement
from nextstate.app.page import charts
from nextstate.app.page.charts import Score
from nextstate.app.settings import Settings
from nextstate.app.waiting import waits
from nextstate.records import Json, JudgedTurn, VersionState
from nextstate.store import Store
from nextstate.store.ledger import Entry, Kind
from nextstate.training_status import read_training_status

_JUDGED = 1000
"""The scores are those of so many of the newest judged turns."""
_VERSIONS, _CHANGES, _DAYS = 20, 5, 14
_LEDGER = 100
"""So many of its newest entries are looked at."""
_LEVEL = 0.05
"""At each end of the interval: 90 % lie within."""
_WELL = "up", "not started"
"""The states of a process that is well."""


def home(settings: Settings, store: Store, health: Json, lineage: str) -> Json:
    """All that the first page says of one lineage."""
    found = scores(store.versions.judged_turns(lineage, _JUDGED))[-_VERSIONS:]
    counts = store.counts()
    problem = read_training_status(settings.store.path, [lineage]).get(lineage)
    paused = why_paused(store, lineage)
    newest = store.versions.newest(lineage, _CHANGES)[::-1]
    days = turns_a_day(store)
    return {
        "lineage": lineage,
        "serving": store.versions.serving(lineage).number,
        "answer": answer(found),
        "scores": found,
        "chart_width": charts.WIDTH,
        "chart_height": charts.HEIGHT,
        "score_marks": charts.score_marks(found),
        "score_lines": charts.score_lines(),
        "days": days,
        "day_marks": charts.day_marks(days),
        "most": max(count for _, count in days),
        "chosen": chosen(store, lineage),
        "changes": newest,
        "made_at": store.versions.made_at(lineage, [version.number for version in newest]),
        "waits": problem or paused or waits(settings, store, lineage, counts),
        "paused": paused,
        "problems": [*problems(settings, health, problem), *_reviews(store)],
        "judges": _judges(store),
    }


def scores(turns: Sequence[JudgedTurn]) -> list[Score]:
    """The mean score of each version, in ascending order, over its sessions.

    Turns of one session are alike, so each session counts once. For the interval one good and one
    bad session are added, as Agresti and Coull (1998) do for shares: otherwise the same score in
    eight sessions would look certain.
    """
    by_version: dict[int, list[JudgedTurn]] = defaultdict(list)
    for turn in turns:
        by_version[turn.version].append(turn)
    found: list[Score] = []
    for version, ours in sorted(by_version.items()):
        by_session: dict[str, list[int]] = defaultdict(list)
        for turn in ours:
            by_session[turn.session].append(turn.score)
        means = [math.fsum(values) / len(values) for values in by_session.values()]
        value, low, high = math.fsum(means) / len(means), None, None
        mean = mean_over_groups(enumerate([*means, 1.0, -1.0]))
        if mean is not None and len(means) >= FEWEST:
            low = max(min(mean.lower(_LEVEL), value), -1.0)
            high = min(max(mean.upper(_LEVEL), value), 1.0)
        found.append(Score(version, value, low, high, len(ours), len(means)))
    return found


def answer(found: Sequence[Score]) -> str:
    """Whether it is learning, as far as the scores can tell."""
    if not found:
        return "Nothing can be said yet: no turn has been judged."
    known = [score for score in found if score.low is not None]
    if len(known) < 2:
        return (
            "Too early to say: that takes two versions with judged turns in 8 sessions each, and "
            "one conversation is one session."
        )
    first, last = known[0], known[-1]
    change = (
        f"from {first.value:+.2f} (version {first.version}) to {last.value:+.2f} "
        f"(version {last.version})"
    )
    assert first.low is not None and first.high is not None  # noqa: PT018
    assert last.low is not None and last.high is not None  # noqa: PT018
    if last.low > first.high:
        return f"It looks so: the score went {change}, more than chance explains."
    if last.high < first.low:
        return f"No: the score fell {change}, more than chance explains."
    return f"Not clear yet: the score went {change}, which may be chance."


def turns_a_day(store: Store, now: float | None = None) -> list[tuple[str, int]]:
    """(day, recorded turns) of the last two weeks, in this machine's time zone."""
    today = datetime.fromtimestamp(time.time() if now is None else now)
    midnight = today.replace(hour=0, minute=0, second=0, microsecond=0)
    days = [midnight - timedelta(days=back) for back in reversed(range(-1, _DAYS))]
    counts = store.lookup.recorded([day.timestamp() for day in days])
    return [(f"{day:%Y-%m-%d}", count) for day, count in zip(days, counts, strict=False)]


def why_paused(store: Store, lineage: str) -> str | None:
    """Why a lineage does not train until it is resumed, in a sentence; None if it may train."""
    decisions = store.versions.decisions(lineage)
    if decisions.pause is not None:
        return f"{decisions.pause.by} paused it."
    newest = store.versions.newest(lineage, MANY_REJECTIONS)
    if len(rejected_in_a_row(newest, decisions.after)) < MANY_REJECTIONS:
        return None
    return (
        "The gate rejected its last versions, so it paused. If nothing else changed, it may reject "
        "the next ones too."
    )


def chosen(store: Store, lineage: str) -> Entry | None:
    """What the ledger has of a person who put the version that serves into service."""
    serving = store.versions.serving(lineage).number
    for entry in reversed(store.ledger.newest(_LEDGER)):
        told = entry.content
        if told.get("lineage") != lineage:
            continue
        if entry.kind == Kind.CHOICE:
            return entry if told["number"] == serving else None
        if told.get("state") == VersionState.SERVING and told["number"] != serving:
            return None
    return None


def problems(settings: Settings, health: Json, training: str | None) -> list[str]:
    """What is wrong now, the worst first; [] if all is well."""
    found: list[str] = []
    if wrong := health.get("engine_problem"):
        found.append(f"The engine cannot be used: {wrong}")
    elif health.get("engine") != "up":
        found.append(f"The engine is down: {health.get('engine_trouble') or 'it does not answer'}")
    found += [
        f"The part {name}: {state}"
        for name, state in read_child_states(settings.store.path).items()
        if state not in _WELL
    ]
    if lacks := health.get("learning_lacks"):
        found.append(f"The engine lacks what learning needs: {', '.join(map(str, lacks))}")
    if training is not None:
        found.append(f"The learner: {training}")
    if waiting := health.get("turns_waiting"):
        found.append(f"{waiting} turns wait for the store")
    return found


def _reviews(store: Store) -> list[str]:
    """What waits for a review, by the key that said it."""
    return [
        f"{count} verdicts of {client} wait for a review: `nextstate review`, or say yourself what "
        "their turns are worth"
        for client, count in store.reviewing.counts().items()
    ]


def _judges(store: Store) -> dict[str, str]:
    """By judge: how it agrees with people."""
    said = agreement_text(judge_agreement(store.judging.labels()))
    return {"": said} if isinstance(said, str) else {str(k): str(v) for k, v in said.items()}
