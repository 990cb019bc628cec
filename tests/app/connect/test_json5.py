"""JSON5 is read as its standard says, and an edit touches nothing but the one value."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.connect.json5_edit import Item, set_value
from nextstate.app.connect.json5_text import parse, plain

Data = Any
TRIVIA = st.sampled_from(
    ["", " ", "\n", "\r\n\t", "// a } comment\n", "/* , */", "/*\n]*/ ", "\n  "]
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\u2028\u2029"), max_size=8)
NAMES = st.text("abcdäß_$", min_size=1, max_size=4)


@st.composite
def scalars(draw: st.DrawFn) -> tuple[str, Data]:
    value = draw(st.none() | st.booleans() | st.integers() | TEXTS)
    shown = json.dumps(value, ensure_ascii=draw(st.booleans()))
    if isinstance(value, str) and draw(st.booleans()):
        shown = "'" + shown[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"
    return shown, value


@st.composite
def containers(draw: st.DrawFn, inner: st.SearchStrategy[tuple[str, Data]]) -> tuple[str, Data]:
    children = draw(st.lists(st.tuples(NAMES, inner), max_size=3))
    is_object = draw(st.booleans())
    text, data = "", {}
    for number, (name, (shown, value)) in enumerate(children):
        key = draw(st.sampled_from([name, f'"{name}"', f"'{name}'"])) + draw(TRIVIA) + ":"
        before, between, after = draw(TRIVIA), draw(TRIVIA), draw(TRIVIA)
        last = number == len(children) - 1
        comma = "" if last and draw(st.booleans()) else ","
        text += f"{before}{key if is_object else ''}{between}{shown}{after}{comma}"
        data[name if is_object else number] = value
    text += draw(TRIVIA)
    return (f"{{{text}}}", data) if is_object else (f"[{text}]", list(data.values()))


VALUES = st.recursive(scalars(), containers, max_leaves=6)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[str, Data]]:
    """A JSON5 object in any layout, and what it means."""
    text, data = draw(containers(VALUES).filter(lambda found: isinstance(found[1], dict)))
    return f"{draw(TRIVIA)}{text}{draw(TRIVIA)}", data


def is_within(kept: str, text: str) -> bool:
    """Whether `text` has all characters of `kept` in their order."""
    rest = iter(text)
    return all(character in rest for character in kept)


@given(documents())
def test_a_document_means_what_it_says(document: tuple[str, Data]) -> None:
    text, data = document
    assert plain(parse(text)) == data


@given(documents(), st.lists(NAMES, min_size=1, max_size=3), VALUES)
def test_an_edit_keeps_comments_unknown_keys_and_order(
    document: tuple[str, Data], path: list[str], shown: tuple[str, Data]
) -> None:
    text, data = document
    wanted: Data = json.loads(json.dumps(data))
    table = wanted
    for step in path[:-1]:
        table = table.setdefault(step, {}) if isinstance(table, dict) else table
    if not isinstance(table, dict):
        with pytest.raises(ValueError, match=r"line \d+, column \d+: expected an object"):
            set_value(text, tuple(path), shown[1])
        return
    old = table.get(path[-1])
    is_new = path[-1] not in table
    table[path[-1]] = shown[1]
    edited = set_value(text, tuple(path), shown[1])
    found = plain(parse(edited))
    assert found == wanted
    assert set_value(edited, tuple(path), shown[1]) == edited
    if is_new:
        assert is_within(text, edited)
        assert list(found)[: len(data)] == list(data)
    elif not isinstance(old, dict | list):
        comments = r"// a } comment\n|/\* , \*/|/\*\n\]\*/"
        assert re.findall(comments, edited) == re.findall(comments, text)


@given(documents(), NAMES, NAMES)
def test_an_item_of_an_array_is_found_by_its_id(
    document: tuple[str, Data], key: str, name: str
) -> None:
    text, data = document
    if key in data:
        return
    text = set_value(text, (key, Item("other"), "n"), 1)
    text = set_value(text, (key, Item(name), "n"), 2)
    text = set_value(text, (key, Item(name), "m"), 3)
    text = set_value(text, (key, Item("plain")), "plain")
    assert plain(parse(text))[key] == [  # pyright: ignore[reportIndexIssue]
        {"id": "other", "n": 1},
        {"id": name, "n": 2, "m": 3},
        "plain",
    ]
    assert set_value(text, (key, Item("plain")), "plain") == text


def test_a_new_member_follows_the_comment_of_the_last_one_with_its_indentation() -> None:
    text = "{\n\ta: 1, // one\n\tb: [2] // two\n\t// the end\n}\n"
    assert set_value(text, ("c", "d"), 3) == (
        '{\n\ta: 1, // one\n\tb: [2], // two\n\t"c": {\n\t\t"d": 3\n\t}\n\t// the end\n}\n'
    )
    assert set_value('{"a":1}', ("b",), 2) == '{"a":1, "b": 2}'
    assert set_value("{}\r\n", ("b",), 2) == '{\n  "b": 2\n}\r\n'.replace("\n", "\r\n").replace(
        "\r\r", "\r"
    )


def test_every_form_of_the_standard_is_read() -> None:
    text = r"""
    // https://spec.json5.org
    {unquoted: 'a "b" \'c\'', "two": "line \
goes on", hex: 0xdecaf, lead: .5, trail: 5., plus: +1, minus: -Infinity,
     "esc": "\x41\u00e9\n\0", $id: [1, 2,], _a: null, \u0061b: true,}
    """
    assert plain(parse(text)) == {
        **{"unquoted": "a \"b\" 'c'", "two": "line goes on", "hex": 0xDECAF, "lead": 0.5},
        **{"trail": 5.0, "plus": 1, "minus": float("-inf"), "esc": "Aé\n\0", "$id": [1, 2]},
        **{"_a": None, "ab": True},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1, column 2: expected a key, the file ends here"),
        ("{\n  a: 1\n  b: 2}", "line 3, column 3: expected a comma or }, found 'b'"),
        ("[1,,2]", "line 1, column 4: expected a value, found ','"),
        ("{a: 'x\n'}", 'line 1, column 5: this text has no closing quote in its line, found "\'"'),
        ("{a: 01}", "line 1, column 5: expected a value, found '0'"),
        ("{} {}", "line 1, column 4: expected nothing more after the value, found '{'"),
        ("{a: no}", "line 1, column 5: expected a value, found 'n'"),
        ("{a 1}", "line 1, column 4: expected a colon after the key, found '1'"),
        ("/* {}", "line 1, column 6: expected a value, the file ends here"),
        ("[" * 999, "line 1, column 102: expected at most 100 values inside each other, found '['"),
        ('{"a": [1]}', "line 1, column 7: expected an object as the value of a"),
    ],
)
def test_a_malformed_text_is_an_error_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        set_value(text, ("a", "b"), 1)


def test_an_array_is_expected_where_an_item_is_looked_for() -> None:
    with pytest.raises(ValueError, match="expected an array as the value of the whole file"):
        set_value("{}", (Item("a"),), "a")
