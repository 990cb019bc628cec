"""The gates before the expressions of redaction stop nothing in which something would be found."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.redaction_cases import cases
from nextstate.redaction import Redactor, Span, forms, gates, named, numbers

parser: Any = importlib.import_module("re._parser")
_FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "iban": numbers.ibans,
    "card": numbers.cards,
    "national_id": numbers.national_ids,
    "phone": numbers.phones,
}


def _texts() -> list[str]:
    """Every labelled case, and pieces of them cut and joined at random."""
    whole = [case.text for part in ("dev", "test") for case in cases(part, times=2)]
    rng = random.Random(7)
    pieces = [text[rng.randrange(len(text)) :][: rng.randrange(8, 90)] for text in whole * 4]
    letters = "0123456789" * 3 + " -./()+:ABCXYZabkey@\n,é电ß\ud800"
    mixed = ["".join(rng.choices(letters, k=rng.randrange(6, 50))) for _ in range(3000)]
    return [*whole, *pieces, *map("".join, zip(pieces, pieces[::-1], strict=True)), *mixed]


def test_every_number_passes_its_gate() -> None:
    found = dict.fromkeys(_FINDERS, 0)
    for text in _texts():
        kinds = gates.number_kinds(text)
        for kind, finder in _FINDERS.items():
            if any(True for _ in finder(text)):
                found[kind] += 1
                assert kind in kinds, (kind, text)
    assert min(found.values()) > 20


def test_telephone_numbers_of_digits_alone_are_found_by_words_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = _texts()
    found = [list(numbers.phones(text)) for text in texts]
    monkeypatch.setattr(numbers, "_may_say_phone", lambda _: True)  # no text is left out
    assert found == [list(numbers.phones(text)) for text in texts]


@pytest.mark.parametrize("form", forms.KEY_FORMS, ids=lambda form: form.mark)
def test_no_key_is_shorter_than_the_gate_for_keys(form: Any) -> None:
    shortest = parser.parse(form.pattern).getwidth()[0]
    before = 15 if form.mark.endswith("Key=") else 0  # the mark is looked back at
    assert shortest + before >= gates.SHORTEST_KEY


def test_every_key_passes_its_gate() -> None:
    found = 0
    for text in _texts():
        for form in forms.KEY_FORMS:
            for match in form.expression.finditer(text):
                if any(map(str.isdigit, match[0])):
                    found += 1
                    assert form.mark in gates.long_words(text), (form.mark, text)
    assert found > 20


def test_names_of_secrets_do_not_overlap_and_come_in_order() -> None:
    text = "a passecret, a keytoken and the key of the pwd"
    assert [core for _, core in named._cores(text)] == ["pass", "key", "token", "key", "pwd"]  # pyright: ignore[reportPrivateUsage]


def test_a_plain_text_with_numbers_has_no_kinds() -> None:
    text = "".join(f" word{n}" for n in range(64))
    assert gates.number_kinds(text) == ()
    assert gates.long_words(text) == ""
    assert not Redactor().search(text)
