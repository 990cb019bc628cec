"""How values, names and words are sealed, without a store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextstate.errors import SealError
from nextstate.records import new_id
from nextstate.store.vault import HexName, Vault, Word, open_column, seal_column

VAULT = Vault(bytes(range(32)))


@given(st.binary(), st.binary())
def test_values_come_back_and_no_other_place_opens_them(place: bytes, value: bytes) -> None:
    sealed = VAULT.seal(place, value)
    assert VAULT.open(place, sealed) == value
    assert len(sealed) == len(value) + 40
    assert value not in sealed or len(value) < 4
    for wrong in (place + b"x", place[1:]):
        if wrong != place:
            with pytest.raises(SealError):
                VAULT.open(wrong, sealed)
    at = len(sealed) * 7 // 11
    with pytest.raises(SealError):
        VAULT.open(place, sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
    with pytest.raises(SealError):
        Vault(bytes(32)).open(place, sealed)


@given(
    st.lists(st.binary(min_size=16, max_size=16)), st.binary(min_size=32, max_size=32), st.text()
)
def test_names_come_back_and_stay_equal(names: list[bytes], key: bytes, word: str) -> None:
    joined = b"".join(names)
    sealed = VAULT.seal_names(joined)
    assert VAULT.open_names(sealed) == joined
    assert sealed == b"".join(map(VAULT.seal_names, names)), "each is found in a list"
    assert VAULT.open_prefix(VAULT.seal_prefix(key)) == key
    assert VAULT.seal_prefix(key)[:24] == VAULT.seal_prefix(key[:24]), "what begins alike does"
    assert VAULT.seal_prefix(key)[:16] == VAULT.seal_prefix(key[:16])
    if word.isprintable() and not any("\ud800" <= letter <= "\udfff" for letter in word):
        assert VAULT.open_word(VAULT.seal_word(word)) == word
        assert VAULT.seal_word(word) == VAULT.seal_word(word)
    seal, back = HexName(40).ways(VAULT)
    for text in (word, f"sk-{key[:16].hex()}"):
        assert back(seal(text)) == text
    assert seal(key[:16].hex()) != key[:16].hex()


def test_no_two_values_share_their_random_bits() -> None:
    sealed = {VAULT.seal(b"", b"")[12:24] for _ in range(20_000)}
    assert len(sealed) == 20_000


def test_a_process_changes_its_key_before_its_nonces_could_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nextstate.store.vault._MOST_VALUES", 3)
    vault = Vault(bytes(range(32)))
    sealed = [vault.seal(b"", b"value") for _ in range(9)]
    assert len({one[:12] for one in sealed}) == 3
    assert {VAULT.open(b"", one) for one in sealed} == {b"value"}


def test_settings_with_a_text_are_sealed_and_those_of_numbers_are_not() -> None:
    for clear in ('{"temperature":0.5,"seed":null}', "{}", '{"logit_bias":{"7":-1}}'):
        assert seal_column(VAULT, "turn_1", "sampling", clear) == clear
        assert open_column(VAULT, "turn_1", "sampling", clear) == clear
    for text in ('{"stop":["a"]}', '{"stop":"a"}', '{"a":{"b":"c"}}', '{"a":[1,["b"]]}', '"a"'):
        sealed = seal_column(VAULT, "turn_1", "sampling", text)
        assert text not in sealed
        assert open_column(VAULT, "turn_1", "sampling", sealed) == text


@pytest.mark.parametrize(
    "plain", ['{"stop":["a"]}', '{"stop": "a"}', '{"stop": [ "a" ]}', '{"a" : "b"}']
)
def test_a_plain_text_is_not_taken_for_settings_of_numbers(plain: str) -> None:
    with pytest.raises(SealError):
        open_column(VAULT, "turn_1", "sampling", plain)


def test_a_session_that_we_named_keeps_its_name_and_a_clients_does_not() -> None:
    seal, back = Word(200).ways(VAULT)
    ours = new_id("session")
    assert (seal(ours), back(ours)) == (ours, ours)
    for name in ("my chat", "session_of_ann", f"{ours}0", ""):
        assert seal(name) != name
        assert back(seal(name)) == name
