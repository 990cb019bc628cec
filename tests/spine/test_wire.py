"""What the engine reads of a client's JSON is what we read, hold on to and send on."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate import wire
from nextstate.wire import integer, read_json, write_json

ODD = [
    b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1e999, "d": -1E400}',
    b'{"a": 18446744073709551616, "b": -9223372036854775809, "c": [126765060022822940149670]}',
    b'{"a": 1.0, "b": 1, "c": -0, "d": -0.0, "e": 0.1000000000000000055, "f": 1e22, "g": 5e-324}',
    b'{"a": "\\ud83d", "\\udc00": "\\ud83d\\ude00"}',
    b'{"a": "\xed\xa0\xbd"}',
    b'{"a": 1, "b": {"x": 1}, "a": 2}',
    b'\xef\xbb\xbf{"a": "\xc3\xa9"}',
    '{"a": "é"}'.encode("utf-16"),
    '{"a": "é"}'.encode("utf-16-be"),
    '{"a": "é"}'.encode("utf-32"),
    b' \r\n\t{"a":"\\/\\u00e9\x7f"} \n',
    b'{"a": "' + b"9" * 60 + b'", "b": 3}',
    b"[" * 300 + b"]" * 300,
]


@pytest.mark.parametrize("data", ODD, ids=range(len(ODD)))
def test_a_value_is_read_and_written_as_pythons_parser_reads_it(data: bytes) -> None:
    value = read_json(data)
    expected = repr(json.loads(data))
    assert repr(value) == expected
    assert repr(json.loads(write_json(value))) == expected
    assert repr(read_json(write_json(pickle.loads(pickle.dumps(value))))) == expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    )
)
def test_any_value_survives(value: Any) -> None:
    data = json.dumps(value).encode()
    assert repr(json.loads(write_json(read_json(data)))) == repr(json.loads(data))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\xfd", b"[1,]", b"9" * 5000, b"[" * 100_000, b'{"a":1}{"b":2}']
)
def test_what_pythons_parser_refuses_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_json(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" + b"NaN," * 300_000 + b"1]",
        b"[" + b"12345678901234567890," * 300_000 + b"1]",
        b'["\\ud800",' + b"1," * 300_000 + b"1]",
        b"\xef\xbb\xbf[" + b"1," * 300_000 + b"1]",
        ("[" + "1," * 300_000 + "1]").encode("utf-16"),
    ],
    ids=["NaN", "large numbers", "surrogate", "mark", "UTF-16"],
)
def test_many_values_that_only_pythons_parser_reads_are_refused(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three megabytes of NaN took it two seconds, while nobody else was served."""
    monkeypatch.setattr(wire.json, "loads", None)
    with pytest.raises(ValueError, match=r"."):
        read_json(data)


def test_many_values_are_read_whatever_their_strings_hold() -> None:
    ids = list(range(300_000))
    said = {"prompt": ids, "user": "9" * 30, "text": '\\" \\\\' + "1,2," * 300_000}
    assert read_json(json.dumps(said).encode()) == said
    odd = {"text": "\ud800" + "1,2," * 300_000, "n": 1 << 70}
    assert read_json(json.dumps(odd).encode()) == odd


NUMBERS = [
    *("2000.0", " 2000 ", "1_000", "1_0.00", "+5", "-0", "007", "\n7\t", "2000.", "2e3", "0x10"),
    *("1__0", "_1", "1_", "7.0_0", "2.5", "", "True", "٣", "５", "9" * 50, "--5", "1 000"),
    *(True, False, 3, -4, 10**30, 2000.0, -1.0, 2.5, 1e30, float("nan"), float("inf")),
    *("0" * 5000 + "7", "-" + "0" * 5000 + "7", "0_" * 4000 + "5.0", "9" * 4300, "9" * 4301),
    *(None, [5], {}),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:20])
def test_whole_numbers_are_read_as_the_engine_reads_them(value: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    try:
        expected = pydantic.TypeAdapter(int).validate_python(value)
    except pydantic.ValidationError:
        expected = None
    assert integer(value) == expected
