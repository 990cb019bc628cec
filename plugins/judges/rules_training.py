"""Makes the weights of the judge `rules`: `python -m plugins.judges.rules_training`.

It reads `judge/data/`: the cases with `"split": "dev"`, and `phrases.txt`, short reactions and
outputs without a context. Nothing else: the held-out cases are only measured. The classifier is
logistic regression over idf-weighted features with a ridge penalty; its probabilities are
calibrated by one temperature on cross-validated logits. The same data give the same file.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from plugins.judges import rules
from plugins.judges.features import (
    BITS,
    clipped,
    pairs_of,
    plain,
    row_of,
    signs_of,
    token_rows,
    tokens_of,
)
from plugins.judges.rules import ORDER, SCORES, SURE, TASK, TOOL, USER, WEIGHTS

DATA = Path(__file__).parents[2] / "judge" / "data"
CASES, PHRASES = DATA / "next_states.jsonl", DATA / "phrases.txt"
RIDGE = 1.5e-5
STEPS = 80
FOLDS = 4
_LEARNING_RATE = 0.05
_FOLLOWED, _NEXT_TASKS = 0.4, 0.2
"""Shares of cases that also count with the next task behind the reaction, or instead of it."""
_KIND_WEIGHT = 3.0
"""An order or a next task that is missed does more harm than another sentence taken for one."""
_LEADS = {
    "en": ("Next: ", "Next one: ", "Another question: ", "One more: ", "Now this one: ", "Also, "),
    "de": ("Weiter: ", "Nächste Frage: ", "Und jetzt: ", "Übrigens, ", "Noch eine: "),
    "fr": ("Suivant : ", "Question suivante : ", "Et maintenant : ", "Au fait, ", "Sinon "),
    "es": ("Siguiente: ", "Otra pregunta: ", "Y ahora: ", "Por cierto, ", "Ahora "),
    "zh": ("下一题:", "另外,", "对了,", "现在", "还有,"),
}
"""How people go on to the next task; as often they say nothing."""
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Example:
    """One text with its label."""

    text: str
    speaker: int
    label: int
    """1, 0 or -1; of a sentence's kind ORDER, TASK or 0."""
    asked: str = ""
    reply: str = ""
    language: str = ""
    weight: float = 1.0

    @property
    def fold(self) -> int:
        """Examples of one context are in one fold."""
        return zlib.crc32(f"{self.asked}|{self.reply}".encode()) % FOLDS


def read_cases(file: Path = CASES) -> tuple[list[Example], list[Example]]:
    """(examples of scores, examples of sentences' kinds) of the cases that may be learned from."""
    scored: list[Example] = []
    kinds: list[Example] = []
    for line in file.read_bytes().splitlines():
        case = json.loads(line)
        if case["split"] != "dev":
            continue
        states = case["next_states"]
        said = "\n".join(s["text"] for s in states if s["source"] in ("user", "feedback"))
        speaker = USER if said else TOOL
        text = said or "\n".join(s["text"] for s in states)
        one = Example(
            clipped(text).strip(),
            speaker,
            case["label"],
            next((text for role, text in reversed(case["tail"]) if role == "user"), ""),
            case["reply"],
            case["language"],
        )
        scored.append(one)
        if speaker == USER and case["category"] != "topic_change":
            wanted = " ".join(case.get("hint", []))
            for sentence in rules.sentences(one.text):
                kind = ORDER if sentence in wanted else 0
                if kind or case["label"] >= 0 or "hint" in case:
                    kinds.append(Example(sentence, USER, kind))
    return scored, kinds


def read_phrases(file: Path = PHRASES) -> tuple[list[Example], list[Example]]:
    """The same of the phrases. A line is `language label: phrase / phrase`."""
    scored: list[Example] = []
    kinds: list[Example] = []
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            head, _, phrases = line.partition(": ")
            language, mark = head.split()
            speaker = TOOL if language == "t" else USER
            for phrase in phrases.split(" / "):
                text = phrase.replace("\\n", "\n")
                label = {"+": 1, "0": 0, ">": 0}.get(mark, -1)
                one = Example(text, speaker, label, language=language)
                scored.append(one)
                if speaker == USER and mark != "0":
                    kinds.append(Example(text, USER, {"!": ORDER, ">": TASK}.get(mark, 0)))
    return scored, kinds


def next_tasks(cases: Sequence[Example], rng: random.Random) -> tuple[list[Example], list[Example]]:
    """The same of tasks that follow a reaction or stand alone.

    A task is what the user asked in another case; it says nothing about the reply.
    """
    tasks = [case for case in cases if len(case.asked) > 12]
    scored: list[Example] = []
    kinds: list[Example] = []
    for case in cases:
        task, draw = rng.choice(tasks), rng.random()
        if case.speaker != USER or task.language != case.language:
            continue
        lead = rng.choice(_LEADS[case.language]) if rng.random() < 0.5 else ""
        one = replace(case, text=clipped(lead + task.asked), label=0, weight=0.5)
        kinds += [Example(s, USER, TASK) for s in rules.sentences(one.text)]
        if case.label and draw < _FOLLOWED:
            text = f"{case.text}\n{one.text}"
            scored.append(replace(case, text=clipped(text), weight=0.5))
        elif draw > 1 - _NEXT_TASKS:
            scored.append(one)
    return scored, kinds


@dataclass(frozen=True, slots=True)
class Matrix:
    """Sparse rows: the features of each example and their values."""

    index: NDArray[np.intp]
    value: Array
    ends: NDArray[np.intp]
    """(N + 1,): where each example's features begin, and the end."""

    def times(self, table: Array) -> Array:
        """The logits (N, K) by a table (rows, K)."""
        sums = np.cumsum(self.value[:, None] * table[self.index], axis=0)
        sums = np.concatenate([np.zeros((1, table.shape[1])), sums])
        return sums[self.ends[1:]] - sums[self.ends[:-1]]


def matrix(examples: Sequence[Example]) -> Matrix:
    """The features of the examples, weighted as the judge weighs them."""
    index: list[int] = []
    value: list[Array] = []
    ends = [0]
    for one in examples:
        text, signs = _rows(one.text, one.asked, one.reply, one.speaker)
        index += (*text, *signs)
        value.append(np.full(len(text), max(len(text), rules.LEAST_FEATURES) ** -0.5))
        value.append(np.full(len(signs), rules.SIGN))
        ends.append(len(index))
    return Matrix(np.array(index), np.concatenate(value), np.array(ends))


@cache
def _rows(text: str, asked: str, reply: str, speaker: int) -> tuple[list[int], list[int]]:
    tokens = tokens_of(plain(text))
    rows = [row for token in sorted(set(tokens)) for row in token_rows(token, speaker)]
    rows += [row_of(pair, speaker) for pair in sorted(pairs_of(tokens))]
    signs = signs_of(plain(text), tokens, asked, reply) if asked or reply else []
    return rows, [row_of(sign, speaker) for sign in signs]


def fit(rows: Matrix, classes: NDArray[np.intp], weights: Array, kinds: int) -> tuple[Array, Array]:
    """(table (2 ** BITS, kinds), bias (kinds,)) of softmax regression, by Adam on all examples."""
    used, index = np.unique(rows.index, return_inverse=True)
    common = np.bincount(index, minlength=len(used))
    rarity = np.log((len(classes) + 1) / (common + 1)) / 4  # idf: a frequent feature counts less
    mine = Matrix(index, rows.value * rarity[index], rows.ends)
    owner = np.repeat(np.arange(len(classes)), np.diff(rows.ends))
    wanted = np.eye(kinds)[classes]
    state = np.zeros((3, len(used) + 1, kinds))  # weights with the bias, and Adam's two means
    table, mean, square = state
    for step in range(1, STEPS + 1):
        error = softmax(mine.times(table[:-1]) + table[-1]) - wanted
        error *= weights[:, None] / weights.sum()
        slope = np.empty_like(table)
        for kind in range(kinds):
            push = mine.value * error[owner, kind]
            slope[:-1, kind] = np.bincount(index, push, minlength=len(used))
        slope[:-1] += RIDGE * table[:-1]
        slope[-1] = error.sum(0)
        mean += 0.1 * (slope - mean)
        square += 0.02 * (slope**2 - square)
        rate = _LEARNING_RATE * (1 - step / (STEPS + 1))
        table -= rate * mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.98**step)) + 1e-8)
    full = np.zeros((1 << BITS, kinds))
    full[used] = table[:-1] * rarity[:, None]
    return full, table[-1]


def softmax(given: Array) -> Array:
    """The probabilities (N, K) of logits (N, K)."""
    raised = np.exp(given - given.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def fit_scores(cases: Sequence[Example], phrases: Sequence[Example]) -> tuple[Array, Array]:
    """The table and bias for the three scores."""
    examples = [*cases, *next_tasks(cases, random.Random(5))[0], *phrases]
    classes = np.array([SCORES.index(one.label) for one in examples])
    return fit(matrix(examples), classes, np.array([one.weight for one in examples]), len(SCORES))


def cross_validated(cases: Sequence[Example], phrases: Sequence[Example]) -> Array:
    """Logits (N, 3) of cases by tables that saw neither them nor their context."""
    found = np.empty((len(cases), len(SCORES)))
    for fold in range(FOLDS):
        mine = [place for place, case in enumerate(cases) if case.fold == fold]
        table, bias = fit_scores([case for case in cases if case.fold != fold], phrases)
        found[mine] = matrix([cases[place] for place in mine]).times(table) + bias
    return found


def temperature(given: Array, classes: NDArray[np.intp]) -> float:
    """The divisor of logits (N, 3) under which the right classes are likeliest."""
    places = np.arange(len(classes))

    def loss(divisor: float) -> float:
        return -float(np.log(softmax(given / divisor)[places, classes] + 1e-12).mean())

    return min(np.arange(0.3, 3, 0.02).tolist(), key=loss)


def data_mark() -> int:
    """A checksum of the data that the weights are made from."""
    dev = [line for line in CASES.read_bytes().splitlines() if b'"split": "dev"' in line]
    return zlib.crc32(b"\n".join([*dev, PHRASES.read_bytes()]))


def main() -> None:
    """Trains, prints the cross-validated agreement by threshold, and writes the weights."""
    cases, case_kinds = read_cases()
    phrases, phrase_kinds = read_phrases()
    given = cross_validated(cases, phrases)
    labels = np.array([case.label for case in cases])
    classes = np.array([SCORES.index(case.label) for case in cases])
    divisor = temperature(given, classes)
    print(f"{len(cases)} cases, {len(phrases)} phrases, temperature {divisor:.2f}")
    report(softmax(given / divisor), labels)
    table, bias = fit_scores(cases, phrases)
    kinds = [*case_kinds, *phrase_kinds, *next_tasks(cases, random.Random(6))[1]]
    places = np.array([(0, ORDER, TASK).index(one.label) for one in kinds])
    amounts = np.where(places, _KIND_WEIGHT, 1.0)
    sides, side_bias = fit(matrix(kinds), places, amounts, 3)
    write(
        np.concatenate([table / divisor, sides[:, 1:] - sides[:, :1]], 1),
        np.concatenate([bias / divisor, side_bias[1:] - side_bias[0]]),
    )
    print(f"{WEIGHTS.name}: {WEIGHTS.stat().st_size} bytes")


def write(table: Array, bias: Array) -> None:
    """Writes the weights (2 ** BITS, COLUMNS) in signed bytes."""
    scale = np.abs(table).max(0) / 127
    head = {"scale": scale.tolist(), "bias": bias.tolist(), "data": data_mark()}
    small = np.rint(table / scale).astype(np.int8)
    WEIGHTS.write_bytes(json.dumps(head).encode() + b"\n" + zlib.compress(small.tobytes(), 9))


def report(chances: Array, labels: NDArray[np.intp]) -> None:
    """Prints κ and wrong votes for several thresholds."""
    scores = np.array(SCORES)[chances.argmax(1)]
    for least in (0.0, 0.5, SURE, 0.6, 0.65, 0.7, 0.8):
        votes = np.where(chances.max(1) < least, 0, scores)
        same = (votes == labels).mean()
        chance = sum((votes == s).mean() * (labels == s).mean() for s in SCORES)
        wrong = ((votes != 0) & (votes != labels)).mean()
        opposite = (votes * labels == -1).mean()
        kappa = (same - chance) / (1 - chance)
        print(f"threshold {least:.2f}: κ {kappa:.3f}, wrong {wrong:.3f}, opposite {opposite:.3f}")


if __name__ == "__main__":
    main()
