"""How it runs: the parts, the engine, what waits where, the policy lag, what the judge is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from nextstate.app.child_states import read_child_states
from nextstate.app.episode_views import settled_text, settled_worth
from nextstate.app.exam_views import exams
from nextstate.app.judge_worth import judge_agreement, trained_worth
from nextstate.app.page.home import problems, why_paused
from nextstate.app.settings import Settings
from nextstate.app.status import engine_text
from nextstate.records import Json
from nextstate.store import Store
from nextstate.training_status import read_training_status
from nextstate.wire import objects

_QUEUES = (
    ("Turns that wait for the judge", "judgements/pending"),
    ("Turns that the judge has", "judgements/leased"),
    ("Steps that wait for their group of episodes", "samples/waiting"),
    ("Judged turns that are ready to train", "samples/ready"),
    ("Turns in training", "samples/leased"),
    ("Turns that trained", "samples/trained"),
    ("Turns that were dropped", "samples/dropped"),
    ("Turns held out to check versions on", "samples/held"),
    ("Open episodes", "episodes/open"),
)


def running(settings: Settings, store: Store, health: Json, lineage: str) -> Json:
    """All that the page says of how it runs."""
    counts = store.counts()
    training = read_training_status(settings.store.path, [lineage]).get(lineage)
    trained = trained_worth(settings)
    worth = settled_worth(store)
    return {
        "lineage": lineage,
        "problems": problems(settings, health, training),
        "paused": why_paused(store, lineage),
        "engine": _engine(settings, health),
        "parts": {"proxy": "up", **read_child_states(settings.store.path)},
        "queues": [
            ("Turns that wait for the store", int(health.get("turns_waiting") or 0)),
            *((name, counts.get(key, 0)) for name, key in _QUEUES),
        ],
        "recorded": counts.get("turns/main", 0) + counts.get("turns/side", 0),
        "lags": lags(store.training.ready_by_version(lineage), _serving(store, lineage)),
        "max_lag": settings.learner.max_lag,
        "judges": judge_agreement(store.judging.labels()),
        "trained_judge": None if trained is None else trained["text"],
        "exams": exams(settings, store, [lineage]).get(lineage),
        "environments": {
            name.partition("/")[2]: settled_text(one)
            for name, one in worth.items()
            if name.startswith(f"{lineage}/")
        },
    }


def lags(ready: Mapping[int, int], serving: int) -> list[tuple[int, int]]:
    """(policy lag, how many samples wait) in ascending order.

    What was answered by a version that came after the one that serves has no lag.

    >>> lags({3: 5, 1: 2, 6: 1, 5: 1}, 4)
    [(0, 2), (1, 5), (3, 2)]
    """
    found: Counter[int] = Counter()
    for version, count in ready.items():
        found[max(serving - version, 0)] += count
    return sorted(found.items())


def _serving(store: Store, lineage: str) -> int:
    return store.versions.serving(lineage).number


def _engine(settings: Settings, health: Json) -> list[tuple[str, str]]:
    """(name, value) of what is known of the engine."""
    found = [
        ("State", str(health.get("engine", "unknown"))),
        ("Kind", settings.engine.mode),
        ("Model", settings.engine.model),
    ]
    for one in objects(health.get("engines")):
        found.append((str(one["name"]), engine_text(one)))
    if trouble := health.get("engine_problem") or health.get("engine_trouble"):
        found.append(("Trouble", str(trouble)))
    lacks = ", ".join(map(str, health.get("learning_lacks") or ()))
    found.append(("For learning it lacks", lacks or "nothing"))
    return found
