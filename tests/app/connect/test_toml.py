"""An edit of TOML touches nothing but the one line, or refuses."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.app.connect.toml_edit import set_value

LINES = st.sampled_from(
    [
        *("# a comment", "", "key{} = 1", 'key{} = "a # b" # why', "key{} = [\n  1, # one\n]"),
        *(
            "key{} = '''\n[not.a.table]\nmodel = 3\n'''",
            "[table{}]",
            "[[tables{}]]",
            "  key{}.a = 2",
        ),
    ]
)
LINE_ENDS = st.sampled_from(["\n", "\r\n"])
PATHS = st.sampled_from([("model",), ("a", "b"), ("providers", "ours", "url"), ("providers", "x")])


@st.composite
def documents(draw: st.DrawFn) -> str:
    lines = [line.format(n) for n, line in enumerate(draw(st.lists(LINES, max_size=8)))]
    return ("\n".join(lines) + draw(st.sampled_from(["", "\n"]))).replace("\n", draw(LINE_ENDS))


@given(documents(), PATHS, st.booleans() | st.integers(0, 9) | st.text(max_size=9))
def test_an_edit_keeps_comments_unknown_keys_and_order(
    text: str, path: tuple[str, ...], value: object
) -> None:
    before = tomllib.loads(text)
    edited = set_value(text, path, value)
    after = tomllib.loads(edited)
    table = after
    for step in path[:-1]:
        table = table[step]
    assert table[path[-1]] == value
    assert {key: after[key] for key in before} == before
    assert text in edited
    assert set_value(edited, path, value) == edited
    again = set_value(edited, path, "another")
    assert [line for line in edited.splitlines() if line.startswith(("#", "[", "key"))] == [
        line for line in again.splitlines() if line.startswith(("#", "[", "key"))
    ]


def test_a_value_is_replaced_in_its_line() -> None:
    text = 'model = \'old\'  # mine\n[a . "b"] # there\n\tc="x\\"y"\n[z]\nc = 1\n'
    assert set_value(text, ("model",), 'n"w') == text.replace("'old'", '"n\\"w"')
    assert set_value(text, ("a", "b", "c"), 2) == text.replace('"x\\"y"', "2")
    assert set_value(text, ("a", "b", "d"), 2) == text.replace("# there", "# there\nd = 2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = [1]\n", 'model is written in a way that cannot be changed here: set it to "new"'),
        ('x = """\nmodel = 1\n"""\nmodel = 2\n', "cannot be changed here"),
        ("model =\n", "Invalid value"),
    ],
)
def test_what_one_line_cannot_say_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        set_value(text, ("model",), "new")


def test_a_value_in_the_place_of_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a table as the value of a"):
        set_value("a = 1\n", ("a", "b"), 1)
    with pytest.raises(ValueError, match=r"a\.b is written in a way"):
        set_value("a = {c = 1}\n", ("a", "b"), 1)
