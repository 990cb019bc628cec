"""docs/troubleshooting.md: each message stands in the code as it stands there."""

from __future__ import annotations

import re

import pytest

from tests.docs.messages import ROOT, said_by_the_code

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^```text\n(.+)\n```$", PAGE, re.M)
ENOUGH = 25


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_the_message(message: str) -> None:
    shown = message.strip("…. ")
    assert len(shown) >= 8, "nobody would recognise it"
    assert any(shown in text for text in said_by_the_code())


def test_there_is_help_for_many_symptoms_with_one_message_each() -> None:
    symptoms = re.findall(r"^### .+\n\n```text$", PAGE, re.M)
    assert len(symptoms) == len(PAGE.split("\n### ")) - 1 == len(set(MESSAGES)) >= ENOUGH
