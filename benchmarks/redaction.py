"""How well secrets and personal data are found, on labelled texts.

    python -m benchmarks.redaction [--part dev|test] [--misses]

Recall counts a secret as found if all its characters are replaced, under whatever kind. Precision
is the share of replaced spans that hold a part of a secret.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.redaction_cases import CERTAIN, Case, cases
from nextstate.redaction import Redactor, Span

Finder = Callable[[str], Sequence[Span]]


class Score(NamedTuple):
    """What a detector found among some cases."""

    secrets: Counter[str]
    """By slot."""
    found: Counter[str]
    right: int
    """Spans that hold a part of a secret."""
    spans: int
    seconds: float
    wrong: tuple[tuple[Case, Span], ...]
    missed: tuple[tuple[Case, Span], ...]

    def recall(self, certain: bool) -> float:
        """Of the secrets with a form or check digits of their own, or of the others."""
        kinds = [kind for kind in self.secrets if (kind in CERTAIN) is certain]
        return sum(self.found[kind] for kind in kinds) / sum(self.secrets[kind] for kind in kinds)

    @property
    def precision(self) -> float:
        """The share of spans that hold a part of a secret."""
        return self.right / max(self.spans, 1)


def score(texts: Sequence[Case], finder: Finder) -> Score:
    """Runs a detector over cases."""
    secrets, found = Counter[str](), Counter[str]()
    right, spans = 0, 0
    wrong, missed = list[tuple[Case, Span]](), list[tuple[Case, Span]]()
    seconds = 0.0
    for case in texts:
        started = time.process_time()
        told = finder(case.text)
        seconds += time.process_time() - started
        covered = {at for span in told for at in range(span.start, span.end)}
        for secret in case.secrets:
            secrets[secret.kind] += 1
            if covered.issuperset(range(secret.start, secret.end)):
                found[secret.kind] += 1
            else:
                missed.append((case, secret))
        for span in told:
            spans += 1
            if any(span.start < one.end and one.start < span.end for one in case.secrets):
                right += 1
            else:
                wrong.append((case, span))
    return Score(secrets, found, right, spans, seconds, tuple(wrong), tuple(missed))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("dev", "test"), default="test")
    parser.add_argument("--misses", action="store_true", help="print what was wrong; not for test")
    asked = parser.parse_args(arguments)
    texts = cases(asked.part)
    result = score(texts, Redactor().search)
    print(f"{len(texts)} cases of {asked.part}, {sum(result.secrets.values())} secrets\n")
    print("| what | secrets | recall |\n|---|---|---|")
    for kind in sorted(result.secrets):
        share = result.found[kind] / result.secrets[kind]
        print(f"| {kind} | {result.secrets[kind]} | {share:.3f} |")
    print(f"\nrecall {result.recall(True):.3f} with a form or check digits, ", end="")
    print(f"{result.recall(False):.3f} of the others; precision {result.precision:.3f}; ", end="")
    print(f"{result.seconds / len(texts) * 1e6:.0f} µs a text")
    if asked.misses and asked.part == "dev":
        for case, span in (*result.wrong, *result.missed):
            print(f"{span.kind}: {case.text[span.start : span.end]!r} in {case.text[:150]!r}")


if __name__ == "__main__":
    main()
