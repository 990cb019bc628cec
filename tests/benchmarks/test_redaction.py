"""The goals of `python -m benchmarks.redaction`, on the part that the rules were not written by."""

from __future__ import annotations

from benchmarks.redaction import score
from benchmarks.redaction_cases import cases
from nextstate.redaction import Redactor


def test_there_are_enough_cases_in_four_languages() -> None:
    found = [*cases("dev"), *cases("test")]
    assert len(found) >= 600
    assert {case.language for case in found} == {"en", "de", "es", "zh"}
    assert len({case.text for case in found}) >= 600


def test_secrets_are_found_and_little_else_on_held_out_texts() -> None:
    result = score(cases("test"), Redactor().spans)
    assert result.recall(certain=True) >= 0.98
    assert result.recall(certain=False) >= 0.9
    assert result.precision >= 0.95
