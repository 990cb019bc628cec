"""Pictures: what they say without words, and that a note beside one is nobody's words."""

from __future__ import annotations

import pytest

from nextstate.records import Json, NextState, Source
from tests.plugins.test_agents import IMAGE, states_of, user, votes

REMINDER = {"type": "text", "text": "<system-reminder>\nTests are slow.\n</system-reminder>"}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([IMAGE], "[image]"),
        ([{"type": "input_audio", "input_audio": {}}], "[audio]"),
        ([{"type": "file", "file": {}}, IMAGE], "[file] [image]"),
        ([{"type": "text", "text": " "}, IMAGE], "[image]"),
        ([{"image_url": "data:image/png;base64,AAAA"}], "[image]"),
        ([REMINDER, IMAGE], "[image]"),
        ([IMAGE, REMINDER, IMAGE], "[image] [image]"),
        (
            [{"type": "text", "text": "<environment_details>\nx\n</environment_details>"}, IMAGE],
            "[image]",
        ),
        ([{"type": "text", "text": "[Image: source: /tmp/a.png]"}, IMAGE], "[image]"),
        (
            [IMAGE, {"type": "text", "text": "[Image: original 2000x100, displayed at 1000x50.]"}],
            "[image]",
        ),
        ([REMINDER, {"type": "file", "file": {}}], "[file]"),
    ],
)
def test_a_picture_alone_says_that_the_user_went_on_and_nothing_else(
    parts: list[Json], text: str
) -> None:
    request: Json = {
        "messages": [
            user("Draw the image"),
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": parts},
        ]
    }
    (state,) = states_of(request)
    assert (state.source, state.text) == (Source.USER, text)
    assert votes([state]) == (0, False)
    said = NextState("t", Source.USER, "Thanks, perfect!", 0.9)
    assert votes([state, said]) == votes([said])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["[Image: source: /tmp/a.png]", "no, the blue one"], "no, the blue one"),
        (["[Image: source: /tmp/a.png]\nno, the blue one"], "no, the blue one"),
        (["[Image: source: /a.png]\n[Image: source: /b.png]", "wrong"], "wrong"),
        (["[Image #1] is wrong"], "[Image #1] is wrong"),
        (["[image] is missing"], "[image] is missing"),
        (["[Image: sources are wrong"], "[Image: sources are wrong"),
        ([REMINDER["text"], "no, shorter"], "no, shorter"),
    ],
)
def test_words_beside_a_picture_are_the_persons_alone(texts: list[str], words: str) -> None:
    parts = [*({"type": "text", "text": text} for text in texts), IMAGE]
    request: Json = {"messages": [user("Draw"), {"role": "assistant", "content": "x"}]}
    request["messages"].append({"role": "user", "content": parts})
    (state,) = states_of(request)
    assert (state.source, state.text) == (Source.USER, words)


def test_an_agents_note_alone_is_no_next_state() -> None:
    for parts in ([REMINDER], [{"type": "text", "text": "[Image: source: /tmp/a.png]"}]):
        said = {"role": "assistant", "content": "x"}
        assert not states_of({"messages": [user("Draw"), said, {"role": "user", "content": parts}]})
