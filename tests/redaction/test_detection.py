"""What is found in a text, whoever wrote it, and that looking for it takes linear time."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.redaction_cases import cases
from nextstate.keys import key_of_nodes, new_key
from nextstate.redaction import KINDS, NOTHING, Redactor, placeholder
from nextstate.redaction.forms import KEY_FORMS, api_keys
from nextstate.store.episodes import API_KEY

ALL = Redactor()
NUMBERS = (4915117283645, 4539148803436467, 110105194912310029, 219099998, 5, 10**18)
BEGIN = "-----BEGIN PRIVATE KEY-----"
OF_JWT_IO = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0"
    "IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"
)
TEXT_URL = "data:text/plain;base64,aGFs="
CASES = cases("dev")
SECRETS = sorted({case.text[s.start : s.end] for case in CASES for s in case.secrets})
UNITS = [
    *("a", "1", "@", "1 ", "4 ", "sk-", "eyJ", "eyJa.", "password=", "password: ", "://a:"),
    *("a@b.", "12-", "-----BEGIN PRIVATE KEY-----", "AB12", "DE89 ", "+1", "(1", "token", "-u a:"),
    *("--token=x ", "--password ", "gh", "Ab1-", "é", "密码是", "0.", "12345678Z ", "\\n", "["),
    *(
        "ssh a@a.de ",
        "order 4539148803436467 ",
        '"tel": 4155552671,',
        "[secret:",
        "password: ab1",
        "call me 4155552671 ",
        "x@a.a.",
        "authorization: bearer ",
    ),
]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to ann.b@firma.de now", "write to [secret:email] now"),
        ("jdoe@example.com and git@github.com", "jdoe@example.com and git@github.com"),
        ("postgres://a:pX91kd@h/d", "postgres://a:[secret:password]@h/d"),
        ("IBAN DE89370400440532013000 x", "IBAN [secret:iban] x"),
        ("IBAN DE88370400440532013000 x", "IBAN DE88370400440532013000 x"),
        ("card 4539 1488 0343 6467", "card [secret:card]"),
        ("card 4539 1488 0343 6468", "card 4539 1488 0343 6468"),
        ("card 4242 4242 4242 4242", "card 4242 4242 4242 4242"),
        ("DNI 12345679S", "DNI [secret:national_id]"),
        ("DNI 12345679T", "DNI 12345679T"),
        (f"use ns-{'Ab3dEfGhIjKlMnOpQrStUvWxYz0182736459_-kqRtY'} now", "use [secret:api_key] now"),
        (f"node ns-{'0f1c8a7be24d9561' * 4}.", "node [secret:api_key]."),
        ("as ep-0f1c8a7be24d95613c7e0f1c8a7be24d here", "as [secret:api_key] here"),
        (
            "columns-2 and step-12 of dns-resolver-1234567",
            "columns-2 and step-12 of dns-resolver-1234567",
        ),
        (
            "Cookie: nextstate-8000=8fj3kd92mfk3kdl2mfkd9s8f7s6d5f4gabcdQRS-_12; a=b",
            "Cookie: [secret:api_key]; a=b",
        ),
        (
            "Cookie: sessionid=8fj3kd92mfk3kdl2mfkd9s8f7s6d5f4g",
            "Cookie: sessionid=[secret:api_key]",
        ),
        ("JSESSIONID=8FJ3KD92MFK3KDL2MFKD9S8F7S6D5F4G;", "JSESSIONID=[secret:api_key];"),
        ("PHPSESSID=8fj3kd92mfk3kdl2mfkd9s8f7s", "PHPSESSID=[secret:api_key]"),
        ("sessionid=your-session-id-goes-here-1", "sessionid=your-session-id-goes-here-1"),
        ("İ PASSWORD=tR1xkd9!", "İ PASSWORD=[secret:password]"),
        ("身份证11010519491231002X。", "身份证[secret:national_id]。"),
        ("身份证110105194912310021。", "身份证110105194912310021。"),
        ("password = get_password()", "password = get_password()"),
        ("API_KEY=${API_KEY}", "API_KEY=${API_KEY}"),
        ("cpf 529.982.247-25", "cpf [secret:national_id]"),
        ("cf RSSMRA85T10A562S", "cf [secret:national_id]"),
        ("nir 2 55 08 14 168 025 38", "nir [secret:national_id]"),
        ("NI AB 12 34 57 C", "NI [secret:national_id]"),
        ("SSN 219-09-9998", "SSN [secret:national_id]"),
        ("SSN 000-12-3456", "SSN 000-12-3456"),
        ('{"password": "aB3$kd(9,xY;zQ"}', '{"password": "[secret:password]"}'),
        ('password="Xk9(zz!Qw7"', 'password="[secret:password]"'),
        ("DB_PASS=hunter2Xy9", "DB_PASS=[secret:password]"),
        ("**Password:** hunter2Xy9", "**Password:** [secret:password]"),
        ("<password>hunter2Xy9</password>", "<password>[secret:password]</password>"),
        ("Das Passwort lautet: Geheim99x", "Das Passwort lautet: [secret:password]"),
        ("mysql -u root -phunter2Xy9 db", "mysql -u root -p[secret:password] db"),
        ("redis-cli -h h -a hunter2Xy9", "redis-cli -h h -a [secret:password]"),
        ("USER x IDENTIFIED BY 'hunter2Xy9';", "USER x IDENTIFIED BY '[secret:password]';"),
        ("curl -uadmin:hunter2Xy9 x", "curl -uadmin:[secret:password] x"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [secret:password]"),
        (f'{BEGIN}\n{"Ab1+" * 16}\n"}} and more.', '[secret:private_key]"} and more.'),
        ("data:text/plain;base64,aGFs= mail ann.b@firma.de", f"{TEXT_URL} mail [secret:email]"),
        ('{"phone": 4915117283645}', '{"phone": "[secret:phone]"}'),
        ('{"a": {"tel" : 4915117283645 , "b": 1}}', '{"a": {"tel" : "[secret:phone]" , "b": 1}}'),
        (r'{"x": "{\"phone\": 4915117283645}"}', r'{"x": "{\"phone\": \"[secret:phone]\"}"}'),
        ("password: Example2024!", "password: [secret:password]"),
        ('DB_PASSWORD="changeme#77"', 'DB_PASSWORD="[secret:password]"'),
        ("password: example123", None),
        ("password: your-password-here", None),
        ("ssh deploy@prod.company.com uptime", None),
        ("ssh -i key -p 22 deploy@prod.company.com", None),
        ("scp x.tgz deploy@prod.company.com:/srv", None),
        ("deploy@prod.company.com: please mail me", "[secret:email]: please mail me"),
        ("leaked: ann.b@firma.de:hunter2", "leaked: [secret:email]:hunter2"),
        ("order number 4539148803436467", None),
        ("Bestellung Nr. 4539148803436467", None),
        ("EAN 4006381333931, GTIN 36006381333930", None),
        ("order 77 with card 4539148803436467", "order 77 with card [secret:card]"),
        ("your order: card no. 4539148803436467", "your order: card no. [secret:card]"),
        (f"Authorization: Bearer {OF_JWT_IO}", None),
        *((text, None) for text in ("bypass: north99x", "first pass: 12 tests2")),
        *((text, None) for text in ("conv 224 224 1024", "a = q@k.transpose(-2, -1)")),
        ("postgres://postgres:postgres@localhost/db", None),
        ("commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904", None),
        ("at 2026-03-04 10:22:31, phone: 2026-03-04", None),
    ],
)
def test_what_is_replaced_and_what_stays(text: str, redacted: str | None) -> None:
    assert ALL.text(text) == (text if redacted is None else redacted)


def test_our_own_keys_are_found() -> None:
    """A client's, the nodes', and an episode's, where no name stands before them."""
    episode = API_KEY + secrets.token_hex(16)
    for key in (*(new_key() for _ in range(50)), key_of_nodes("a key"), episode):
        assert Redactor().text(f"use {key}, please") == "use [secret:api_key], please"
    assert Redactor().text("the ns-2.example of step-1f") == "the ns-2.example of step-1f"


def test_every_kind_can_be_left_out() -> None:
    for case in CASES:
        for kind in KINDS:
            others = Redactor(frozenset(KINDS) - {kind})
            assert all(span.kind != kind for span in others.spans(case.text))
        assert not NOTHING.spans(case.text)


def test_names_of_fields_say_what_their_values_are() -> None:
    value = {"password": "tiger-lamp-7", "host": "db", "to": ["ann@firma.de"], "n": 3}
    expected = {"password": placeholder("password"), "host": "db", "to": ["[secret:email]"], "n": 3}
    assert ALL.value(value) == expected
    assert value["password"] == "tiger-lamp-7"


def test_numbers_of_fields_are_found_by_their_names() -> None:
    value = {"phone": 4915117283645, "card": 4539148803436467, "seed": 4539148803436467, "n": 3}
    assert ALL.value(value) == {**value, "phone": "[secret:phone]", "card": "[secret:card]"}


def test_a_value_without_secrets_is_returned_itself() -> None:
    value = {"a": ["hello", {"b": 1.5}], "c": None}
    assert ALL.value(value) is value


def test_pictures_are_not_searched() -> None:
    picture = "data:image/png;base64," + "4155552671" * 10  # telephone numbers, by their digits
    assert ALL.text(picture) == picture


def test_a_password_is_found_in_an_object_whatever_it_is_made_of() -> None:
    for secret in ("aB3$kd(9,xY;zQ", "straße99XX", "p@ss\\w0rd99"):
        assert ALL.value({"password": secret}) == {"password": "[secret:password]"}


texts = st.lists(
    st.one_of(
        st.sampled_from(SECRETS), st.text(max_size=12), st.sampled_from([" ", "\n", "password: "])
    ),
    max_size=6,
).map(" ".join)


def test_what_is_redacted_once_stays_as_it_is() -> None:
    for case in CASES:
        once = ALL.text(case.text)
        assert ALL.text(once) == once


@given(texts)
def test_spans_are_in_order_apart_and_not_empty(text: str) -> None:
    end = 0
    for span in ALL.spans(text):
        assert end <= span.start < span.end <= len(text)
        end = span.end


@given(st.dictionaries(st.text(max_size=8), texts, max_size=4))
def test_arguments_of_calls_stay_json(arguments: dict[str, str]) -> None:
    for written in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)):
        assert isinstance(json.loads(ALL.text(written)), dict)


@given(st.dictionaries(st.sampled_from(["phone", "card", "ssn", "a"]), st.sampled_from(NUMBERS)))
def test_numbers_of_calls_leave_json(arguments: dict[str, int]) -> None:
    for written in (json.dumps(arguments), json.dumps({"arguments": json.dumps(arguments)})):
        found = json.loads(ALL.text(written))
        assert isinstance(json.loads(found.get("arguments", "{}")), dict)


MOST_GROWTH, MEASUREMENTS = 9.0, 6
"""Quadratic time grows sixteenfold; a busy machine slows single measurements only."""


def grows(unit: str, search: Callable[[str], object], size: int) -> bool:
    def cost(size: int) -> float:
        text = unit * (size // len(unit))
        started = time.process_time()
        search(text)
        return time.process_time() - started

    return all(cost(4 * size) > MOST_GROWTH * cost(size) for _ in range(MEASUREMENTS))


@pytest.mark.parametrize("unit", UNITS)
def test_searching_a_hostile_text_takes_linear_time(unit: str) -> None:
    assert not grows(unit, ALL.search, 4_000)


@pytest.mark.parametrize("mark", [form.mark for form in KEY_FORMS])
def test_marks_of_keys_over_and_over_take_linear_time(mark: str) -> None:
    for unit in (mark, f"{mark}a1B2", f"{mark}-", f"{mark}.", f"{mark}a1B2."):
        assert not grows(unit, lambda text: list(api_keys(text)), 8_000)


def test_a_process_that_searches_nothing_does_not_load_the_rules() -> None:
    code = "import sys, nextstate.config; print([m for m in sys.modules if 'redaction.' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert "numbers" not in found.stdout
    assert "named" not in found.stdout
