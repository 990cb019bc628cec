"""What the judge is worth, in plain words: how its votes agree with what the person said."""

from __future__ import annotations

from collections.abc import Mapping

from nextstate.agreement import agreement, proportion_interval
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import judge_versions, trained_text
from nextstate.records import Json
from nextstate.wire import obj

NOBODY = "no labels yet: give `nextstate feedback` on judged turns"
_FEW = 10
"""With fewer rated turns the interval says little."""


def judge_agreement(labels: Mapping[str, Mapping[tuple[int, int], int]]) -> Json:
    """How each judge's votes agree with people's feedback on the same turns; {} without any.

    `interval` is where the share of agreement lies with 90 % confidence.

    >>> judge_agreement({"rules": {(1, 1): 2, (0, 0): 1, (-1, 1): 1}})["rules"]
    {'labels': 4, 'agreed': 3, 'accuracy': 0.75, 'interval': [0.3561, 0.9421], 'kappa': 0.5556}
    """
    found: Json = {}
    for judge, pairs in labels.items():
        measured = agreement(pairs)
        agreed = sum(count for (person, votes), count in pairs.items() if person == votes)
        found[judge] = {
            "labels": measured.cases,
            "agreed": agreed,
            "accuracy": round(measured.accuracy, 4),
            "interval": [round(end, 4) for end in proportion_interval(agreed, measured.cases)],
            "kappa": round(measured.kappa, 4),
        }
    return found


def agreement_text(found: Json) -> Json | str:
    """The same in plain words, by judge.

    >>> agreement_text(judge_agreement({"rules": {(1, 1): 14, (-1, 1): 2}}))
    {'rules': 'agrees with you on 14 of 16 turns you rated (68 to 96 %), κ 0.00'}
    """
    if not found:
        return NOBODY
    return {judge: _worth(obj(one)) for judge, one in found.items()}


def _worth(one: Json) -> str:
    low, high = (round(100 * end) for end in one["interval"])
    text = (
        f"agrees with you on {one['agreed']} of {one['labels']} turns you rated "
        f"({low} to {high} %), κ {one['kappa']:.2f}"
    )
    return text if one["labels"] >= _FEW else f"{text}; rate at least {_FEW} to know more"


def worth_line(labels: Mapping[str, Mapping[tuple[int, int], int]]) -> str:
    """All judges in one line, for the page of a version."""
    said = agreement_text(judge_agreement(labels))
    return said if isinstance(said, str) else "; ".join(f"{j} {text}" for j, text in said.items())


def trained_worth(settings: Settings) -> Json | None:
    """The newest trained judge: its version and its worth on held-out labels; None without one."""
    versions = judge_versions(settings) if settings.judge.uses_base else []
    if not versions:
        return None
    newest = versions[-1]
    return {"version": newest.number, **newest.metrics, "text": trained_text(newest)}
