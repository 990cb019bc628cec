"""Replies that agents write down otherwise and that mean the same."""

from __future__ import annotations

import json
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.records import Json
from nextstate.thoughts import without_thoughts
from proxy.linking.meaning import canonical_arguments, key_of, meaning_of
from proxy.linking.repair import repaired


def call(arguments: object) -> Json:
    function = {"name": "book", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    "spellings",
    [
        ('{"n": 5000.0}', '{"n":5000}', '{"n": 5e3}', '{"n": 50.00E+2}', {"n": 5000}),
        ('{"n": -0.0}', '{"n": 0}', '{"n": 0.000}', '{"n": -0}'),
        ('{"n": 0.1}', '{"n": 0.10}', '{"n": 1e-1}', '{"n": 0.1000000000000000055}'),
        ('{"n": 12345678901234567890}', '{"n":12345678901234567890 }', {"n": 12345678901234567890}),
        ("", "{}", "null", "  ", " { }\n", None, {}, '""', '" "'),
        ('{"a": "é", "b": [1, {"c": null}]}', '{"b":[1.0,{"c":null}],"a":"\\u00e9"}'),
        ('{"a": "x/y"}', '{"a": "x\\/y"}', '"{\\"a\\": \\"x/y\\"}"'),
        ('{"a": "one\\ntwo"}', '{"a": "one\ntwo"}'),
        ('{"path": "a.py", "text": "cut', ' {"path":"a.py","text":"cut'),
    ],
)
def test_arguments_that_mean_the_same_are_the_same(spellings: tuple[object, ...]) -> None:
    assert len({meaning_of(call(arguments)) for arguments in spellings}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"n": 9007199254740993}', '{"n": 9007199254740992}'),
        ('{"n": 18446744073709551617}', '{"n": 18446744073709551616}'),
        ('{"n": 5}', '{"n": "5"}'),
        ('{"n": 5}', '{"n": -5}'),
        ('{"n": 5}', '{"n": 50}'),
        ('{"n": 1e400}', '{"n": 1e401}'),
        ('{"n": true}', '{"n": 1}'),
        ("{}", '{"n": null}'),
        ('{"a": [1, 2]}', '{"a": [2, 1]}'),
        ('{"a": "b c"}', '{"a": "bc"}'),
    ],
)
def test_other_arguments_stay_apart(one: str, other: str) -> None:
    assert canonical_arguments(one) != canonical_arguments(other)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_arguments_come_to_the_same_as_text_and_as_an_object(value: object) -> None:
    text = json.dumps(value, indent=1)
    if not isinstance(value, str):
        assert canonical_arguments(text) == canonical_arguments(value)
    canonical_arguments(json.dumps(text))


@pytest.mark.parametrize(
    "hostile",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        "9" * 200_000,
        "1e" + "9" * 200_000,
        "-" * 100_000,
        '"' + "\\ud800" * 1000 + '"',
        "[]," * 500_000,
        json.loads("[" * 900 + "]" * 900),
    ],
)
def test_no_arguments_are_too_deep_or_too_long(hostile: object) -> None:
    assert meaning_of(call(hostile)) == meaning_of(call(hostile))


THOUGHT = "The person asks: 2 < 3? I add.\n\n"


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{THOUGHT}</think>Yes.",
        f"{THOUGHT}</think>\n\nYes.",
        f"<thinking>{THOUGHT}</thinking>Yes.",
        f"<Thought reason='x'>{THOUGHT}</Thought > Yes.",
        f"<reasoning>{THOUGHT}</reasoning>\nYes.",
        f"<seed:think>{THOUGHT}</seed:think>Yes.",
        f"[THINK]{THOUGHT}[/THINK]Yes.",
        f"◁think▷{THOUGHT}◁/think▷Yes.",
        f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final"
        "<|message|>Yes.<|return|>",
        f"<|channel>thought\n{THOUGHT}<channel|>Yes.",
        f"<|START_THINKING|>{THOUGHT}<|END_THINKING|>Yes.",
        f"<longcat_think>{THOUGHT}</longcat_think>Yes.",
        f"<REASONING_SCRATCHPAD>{THOUGHT}</REASONING_SCRATCHPAD>Yes.",
        f"<|think|>{THOUGHT}<|/think|>Yes.",
        f"<think/>{THOUGHT}</think>Yes.",
        f"{THOUGHT}</internal_thoughts>Yes.",
        f"<think>{THOUGHT}</think><final>Yes.</final>",
        f"<|begin_of_thought|>{THOUGHT}<|end_of_thought|>\n<|begin_of_solution|>Yes."
        "<|end_of_solution|>",
        f"<reflection>{THOUGHT}</reflection>\n<answer>Yes.</answer>",
        f"<analysis>{THOUGHT}</analysis>Yes.",
        f"<inner_monologue>{THOUGHT}</inner_monologue>Yes.",
        f"<think_fast>{THOUGHT}</think_fast>Yes.",
        f"<think:opsx>{THOUGHT}</think:opsx>\n<answer:opsx>Yes.</answer:opsx>",
        f"<｜begin▁of▁thinking｜>{THOUGHT}<｜end▁of▁thinking｜>Yes.<｜end▁of▁sentence｜>",
        f"<｜Assistant｜><think>{THOUGHT}</think>Yes.",
        f"<think>{THOUGHT}<think>more</think>{THOUGHT}</think>Yes.",
        f"<think>{THOUGHT}</think>Y<think>{THOUGHT}</think>es.",
        f"Yes.<think>{THOUGHT}",
        "Yes.",
    ],
)
def test_a_reply_is_the_same_with_its_thoughts_and_without(text: str) -> None:
    plain = meaning_of({"role": "assistant", "content": "Yes."})
    assert meaning_of({"role": "assistant", "content": text}) == plain
    parts = [{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": text}]
    assert meaning_of({"role": "assistant", "content": parts, "reasoning": THOUGHT}) == plain


@pytest.mark.parametrize(
    "text", ["if a < think > b: think()", "<thinker>x</thinker>", "think] [/think", "a <b> c"]
)
def test_what_only_looks_like_a_thought_stays(text: str) -> None:
    assert without_thoughts(text) == text


def test_a_reply_about_thoughts_is_still_itself_and_nobody_elses() -> None:
    about = [
        "Write `<think>` first:\n```\n<think>\n```\nthen close it.",
        "Use `</think>` so.",
        "Use `</think>` otherwise.",
    ]
    assert len({meaning_of({"role": "assistant", "content": text}) for text in about}) == 3


@pytest.mark.parametrize("content", ["", None, [], " \n", [{"type": "text", "text": ""}]])
def test_an_empty_content_is_one_in_every_form(content: object) -> None:
    message: Json = {"role": "assistant", "content": content}
    assert meaning_of(message) == meaning_of({"role": "assistant"})


def test_refusals_and_older_forms_of_calls_count() -> None:
    refused = {"role": "assistant", "content": None, "refusal": "I cannot."}
    in_parts = [{"type": "refusal", "refusal": "I cannot."}]
    assert meaning_of(refused) == meaning_of({"role": "assistant", "content": in_parts})
    assert meaning_of(refused) != meaning_of({"role": "assistant"})
    older = {"role": "assistant", "function_call": {"name": "book", "arguments": "{}"}}
    assert meaning_of(older) == meaning_of(call(""))


@given(st.lists(st.text("ab <>/", max_size=8), min_size=1, max_size=5), st.data())
def test_where_messages_are_cut_changes_no_key(texts: list[str], data: st.DataObject) -> None:
    def key(parts: list[str]) -> bytes:
        return key_of(
            [meaning_of({"role": "assistant", "content": part}) for part in [*parts, "end"]]
        )

    joined = "".join(texts)
    at = data.draw(st.integers(0, len(joined)))
    assert key(texts) == key([joined]) == key([joined[:at], joined[at:]])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text('a"\\\n[}é,'),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab'{:"), inner),
        max_leaves=8,
    ),
    st.data(),
)
def test_json_that_was_cut_anywhere_is_closed_and_whole_json_stays(
    value: object, data: st.DataObject
) -> None:
    text = json.dumps({"a": value}, ensure_ascii=data.draw(st.booleans()))
    assert json.loads(repaired(text) or "") == {"a": value}
    assert json.loads(repaired(repr({"a": value})) or "", strict=False) == {"a": value}
    assert isinstance(
        json.loads(repaired(text[: data.draw(st.integers(1, len(text)))]) or ""), dict
    )


@pytest.mark.parametrize("text", ["", "rm -r", '"a"', "*** Begin Patch\n[", "{]", "[}", "1"])
def test_what_is_no_object_and_no_list_is_not_repaired(text: str) -> None:
    assert repaired(text) is None


@pytest.mark.parametrize("letter", ["e\u0301", "각", "か\u3099"])
def test_letters_in_one_form_mean_the_same_in_texts_of_any_length(letter: str) -> None:
    text = f"{letter * 5}, no. " * 2000
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert len({meaning_of({"role": "assistant", "content": form}) for form in forms}) == 1


def test_the_time_for_marks_on_one_letter_grows_no_faster_than_their_number() -> None:
    def seconds(count: int) -> float:
        message = {"role": "assistant", "content": "a" + "\u0301\u0327" * count}
        taken: list[float] = []
        for _ in range(5):
            started = time.thread_time()
            meaning_of(message)
            taken.append(time.thread_time() - started)
        return min(taken)

    # Eight times the text: 64 times as long if it were quadratic.
    assert seconds(16_000) < 32 * seconds(2_000) + 0.005
