"""However a reply is cut into tokens, none that is kept holds a part of a secret."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.redaction_cases import cases
from nextstate.redaction import NOTHING, Redactor
from nextstate.redaction.tokens import tokens_before

CASES = [case for case in cases("dev") if case.secrets]
ALL = Redactor()


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and its tokens."""
    text = draw(st.text(max_size=8)) + " " + draw(st.sampled_from(CASES)).text
    bounds = draw(st.lists(st.integers(0, len(text)), max_size=40))
    places = [0, *sorted(bounds), len(text)]
    return text, [text[a:b] for a, b in pairwise(places)]


@given(cut_texts())
def test_what_is_kept_ends_before_the_first_secret_and_no_earlier(
    cut: tuple[str, list[str]],
) -> None:
    text, pieces = cut
    spans = ALL.spans(text)
    kept = tokens_before(pieces, [], ALL)
    assert kept is not None
    size = len("".join(pieces[:kept]))
    first = spans[0].start if spans else len(text)
    assert size <= first
    if following := next(filter(None, pieces[kept:]), None):
        assert size + len(following) > first


@given(cut_texts())
def test_secrets_that_are_known_already_cut_the_tokens_too(cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    secrets = [text[span.start : span.end] for span in ALL.spans(text)]
    kept = tokens_before(pieces, secrets, NOTHING)
    assert kept is not None
    assert not any(secret in "".join(pieces[:kept]) for secret in secrets)


def test_a_token_without_text_before_a_secret_may_be_its_first_byte() -> None:
    assert tokens_before(["key: ", "", "ü9xk2pL"], ["ü9xk2pL"], NOTHING) == 1
    assert tokens_before(["hello", ""], [], ALL) == 2


def test_a_secret_that_the_tokens_spell_otherwise_cannot_be_placed() -> None:
    assert tokens_before(['{"p": "a\\u00f1b"}'], ["añb"], NOTHING) is None
