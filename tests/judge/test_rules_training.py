from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from plugins.judges import rules
from plugins.judges.features import BITS, plain, signs_of, tokens_of
from plugins.judges.rules import ORDER, TASK, USER, WEIGHTS, logits
from plugins.judges.rules_training import (
    Example,
    cross_validated,
    data_mark,
    fit,
    fit_scores,
    matrix,
    next_tasks,
    read_cases,
    read_phrases,
    softmax,
    temperature,
)

CASE = {
    "id": "a", "language": "en", "category": "redo", "tail": [["user", "Name a river."]],
    "reply": "The Nile.", "next_states": [{"source": "user", "text": "Wrong. Use no bold."}],
    "label": -1, "hint": ["Use no bold."], "split": "dev",
}  # fmt: skip


def test_the_weights_are_those_of_the_data() -> None:
    head = json.loads(WEIGHTS.read_bytes().partition(b"\n")[0])
    assert head["data"] == data_mark(), "run python -m plugins.judges.rules_training"


def test_held_out_cases_are_never_read(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    others = [{**CASE, "split": split} for split in ("test", "unseen")]
    file.write_text("\n".join(map(json.dumps, [CASE, *others])))
    scored, kinds = read_cases(file)
    assert [(one.text, one.label, one.asked) for one in scored] == [
        ("Wrong. Use no bold.", -1, "Name a river.")
    ]
    assert [(one.text, one.label) for one in kinds] == [("Wrong.", 0), ("Use no bold.", ORDER)]


def test_phrases_are_read_by_language_and_label(tmp_path: Path) -> None:
    file = tmp_path / "phrases.txt"
    file.write_text(
        "# a comment\nen +: yes / fine\\nthanks\nde !: kürzer\nt -: error: no\nt 0: busy\n"
    )
    scored, kinds = read_phrases(file)
    assert [(one.text, one.label) for one in scored] == [
        ("yes", 1), ("fine\nthanks", 1), ("kürzer", -1), ("error: no", -1), ("busy", 0),
    ]  # fmt: skip
    assert [(one.text, one.label) for one in kinds] == [
        ("yes", 0), ("fine\nthanks", 0), ("kürzer", ORDER),
    ]  # fmt: skip


def test_a_task_behind_a_reaction_keeps_its_label_and_alone_it_is_neutral() -> None:
    cases = [
        Example(f"Great {n}!", USER, 1, f"What is the number after {n}?", "It is.", "en")
        for n in range(50)
    ]
    scored, kinds = next_tasks(cases, random.Random(1))
    behind = [one for one in scored if one.text.startswith("Great")]
    assert len(behind) > 5
    assert len(scored) - len(behind) > 3
    assert all(one.label == (1 if one in behind else 0) for one in scored)
    assert {one.label for one in kinds} == {TASK}


def examples() -> list[Example]:
    words = {1: ("good", "fine", "nice"), 0: ("why", "when", "how"), -1: ("bad", "wrong", "broken")}
    return [
        Example(f"{word} {n}", USER, label, f"question number {n}", "reply", "en")
        for label, mine in words.items()
        for word in mine
        for n in range(8)
    ]


def test_it_learns_to_tell_labels_apart_and_the_same_every_time() -> None:
    cases = examples()
    table, bias = fit_scores(cases, [])
    given = matrix(cases).times(table) + bias
    assert all(
        rules.SCORES[place] == one.label for place, one in zip(given.argmax(1), cases, strict=True)
    )
    again, _ = fit_scores(cases, [])
    assert np.array_equal(table, again)
    assert cross_validated(cases, []).shape == (len(cases), 3)


def test_weights_count_as_examples_do() -> None:
    pair = [Example("maybe", USER, 1, weight=3.0), Example("maybe", USER, 0)]
    table, bias = fit(matrix(pair), np.array([0, 1]), np.array([3.0, 1.0]), 2)
    chance = softmax(matrix(pair).times(table) + bias)[0, 0]
    assert chance == pytest.approx(0.75, abs=0.05)


def test_the_temperature_makes_overconfident_logits_honest() -> None:
    given = np.array([[4.0, 0.0]] * 3 + [[4.0, 0.0]])
    right = np.array([0, 0, 0, 1])  # right in three of four, so the logit should be ln 3
    assert 4 / temperature(given, right) == pytest.approx(np.log(3), abs=0.35)


def test_the_judge_adds_up_what_the_training_multiplied() -> None:
    """Packed integers of shipped weights and a product of matrices give the same logits."""
    rows, scale, bias = rules.weights()
    unpacked = np.array([rules._unpacked(row)[: rules.COLUMNS] for row in rows])
    assert unpacked.shape == (1 << BITS, rules.COLUMNS)
    for text in ("Thanks, but why not 12?", "no no no", "写错了,重来"):
        one = Example(text, USER, 1, "Name a river, please.", "The Nile is long.")
        product = matrix([one]).times(unpacked * np.array(scale))[0] + np.array(bias)
        tokens = tokens_of(plain(text))
        signs = signs_of(text, tokens, one.asked, one.reply)
        assert logits(tokens, signs, USER) == pytest.approx(product.tolist(), abs=1e-6)
