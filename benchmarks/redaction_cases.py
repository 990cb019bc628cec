"""Labelled texts for `python -m benchmarks.redaction`: where secrets stand in them.

Each context of `redaction_contexts.txt` is filled a number of times with values that are made here:
with issuers' prefixes, valid check digits, and formats of the context's language. Nothing in them
was ever anybody's. A context is of the part `dev`, by which the rules were written, or of `test`.
"""

from __future__ import annotations

import base64
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nextstate.redaction.forms import Span

CONTEXTS = Path(__file__).with_name("redaction_contexts.txt")
_SLOT = re.compile(r"\{([a-z_]+|[A-Z0-9]+)\}")
_UPPER, _LOWER, _DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
_ALNUM = string.ascii_letters + _DIGITS
_HEX = "0123456789abcdef"
CERTAIN = frozenset(("api_key", "private_key", "card", "iban", "national_id", "url_password"))
"""Slots whose values have check digits, an issuer's form or a place of their own."""


@dataclass(frozen=True, slots=True)
class Case:
    """One text with its secrets."""

    part: str
    """`dev` or `test`."""
    language: str
    where: str
    text: str
    secrets: tuple[Span, ...]
    """The kind is the slot's name."""


def cases(part: str, seed: int = 7, times: int = 6) -> list[Case]:
    """All cases of a part, each context filled `times` times."""
    found: list[Case] = []
    for line in CONTEXTS.read_text().splitlines():
        if line and not line.startswith("#"):
            name, language, where, template = line.split("|", 3)
            if name == part:
                rng = random.Random(f"{seed}{line}")
                text = template.replace("\\n", "\n").replace("\\t", "\t")
                found += (_fill(name, language, where, text, rng) for _ in range(times))
    return found


def _fill(part: str, language: str, where: str, template: str, rng: random.Random) -> Case:
    parts, secrets, end, size = list[str](), list[Span](), 0, 0
    for slot in _SLOT.finditer(template):
        maker = _MAKERS.get(slot[1])
        if maker is None:
            continue
        value = maker(rng, language)
        before = template[end : slot.start()]
        size += len(before)
        if slot[1].islower():
            secrets.append(Span(size, size + len(value), slot[1]))
        parts += (before, value)
        size += len(value)
        end = slot.end()
    return Case(part, language, where, "".join((*parts, template[end:])), tuple(secrets))


def _some(rng: random.Random, size: int, letters: str = _ALNUM) -> str:
    while True:
        found = "".join(rng.choices(letters, k=size))
        if size < 12 or any(map(str.isdigit, found)):
            return found


def _api_key(rng: random.Random, _: str) -> str:
    part = _ALNUM + "_-"
    jwt = ".".join(("eyJ" + _some(rng, 33), "eyJ" + _some(rng, 60, part), _some(rng, 43, part)))
    return rng.choice(
        (
            "sk-proj-" + _some(rng, 48, part),
            "sk-ant-api03-" + _some(rng, 90, part) + "AA",
            "AKIA" + _some(rng, 16, _UPPER + "234567"),
            "ghp_" + _some(rng, 36),
            "github_pat_" + _some(rng, 22) + "_" + _some(rng, 59),
            "glpat-" + _some(rng, 20, part),
            f"xoxb-{_some(rng, 12, _DIGITS)}-{_some(rng, 12, _DIGITS)}-{_some(rng, 24)}",
            "sk_live_" + _some(rng, 24),
            "AIza" + _some(rng, 35, part),
            "hf_" + _some(rng, 34),
            "npm_" + _some(rng, 36),
            f"SG.{_some(rng, 22, part)}.{_some(rng, 43, part)}",
            "dop_v1_" + _some(rng, 64, _HEX),
            "gsk_" + _some(rng, 52),
            "hvs." + _some(rng, 90, part),
            "dapi" + _some(rng, 32, _HEX),
            jwt,
        )
    )


def _opaque(rng: random.Random, _: str) -> str:
    return rng.choice((_some(rng, 32, _HEX), _some(rng, 40), _some(rng, 24, _ALNUM + "_-")))


_WORDS = (
    *("Sommer", "Tiger", "dragon", "Verano", "perro", "Blume"),
    *("river", "Monkey", "cafe", "Winter"),
)


def _password(rng: random.Random, _: str) -> str:
    word = rng.choice(_WORDS)
    return rng.choice(
        (
            f"{word}{rng.randrange(10, 9999)}{rng.choice('!#?*')}",
            f"{word.lower()}-{rng.choice(('lamp', 'stone', 'gato'))}-{rng.randrange(2, 99)}",
            _some(rng, 10, _ALNUM + "!#%+=_") + rng.choice(_DIGITS),
            f"{word[0]}@{word[1:]}{rng.randrange(100, 999)}",
        )
    )


def _url_password(rng: random.Random, _: str) -> str:
    return rng.choice((_some(rng, 14), _some(rng, 20, _HEX), f"p{_some(rng, 9, _ALNUM + '_-!')}"))


def _email(rng: random.Random, language: str) -> str:
    names = {
        "de": "juergen.weiss petra_vogel",
        "es": "lucia.gomez pruiz",
        "zh": "wangfang li.lei88",
    }
    name = rng.choice(names.get(language, "maria.lopez jdoe+lists t.o-neil").split())
    host = rng.choice(
        ["gmail.com", "acme.io", "firma-nord.de", "correo.com.mx", "163.com", "mail.uni-bonn.de"]
    )
    return f"{name}{rng.choice(('', str(rng.randrange(99))))}@{host}"


def _phone(rng: random.Random, language: str) -> str:
    d = [str(rng.randrange(2, 10)) + _some(rng, size, _DIGITS) for size in (2, 2, 3, 6, 1)]
    forms = {
        "en": (
            f"({d[0]}) {d[1]}-{d[2]}",
            f"{d[0]}-{d[1]}-{d[2]}",
            f"+1 {d[0]} {d[1]} {d[2]}",
            f"+44 7{d[2][1:]} {d[3][1:]}",
        ),
        "de": (f"+49 17{d[0][1]} {d[3]}", f"0171 {d[3]}", f"030/{d[3]}4", f"0049 89 {d[3]}"),
        "es": (f"+34 6{d[0][1:]} {d[1]} {d[0]}", f"6{d[0][1:]} {d[4]} {d[4]} 47", f"612{d[3][1:]}"),
        "zh": (f"13{d[2][1]}{d[2]}{d[2]}", f"+86 138 {d[2]} {d[2]}", f"15{d[4][1]}-{d[2]}-{d[2]}"),
    }
    return rng.choice(forms[language])


def _card(rng: random.Random, _: str) -> str:
    head, size = rng.choice((("4", 16), ("5" + rng.choice("12345"), 16), ("37", 15), ("6225", 16)))
    body = head + _some(rng, size - len(head) - 1, _DIGITS)
    doubled = [2 * int(one) if at % 2 == 0 else int(one) for at, one in enumerate(reversed(body))]
    number = body + str(-sum(one - 9 * (one > 9) for one in doubled) % 10)
    if size == 15:
        return rng.choice((number, f"{number[:4]} {number[4:10]} {number[10:]}"))
    groups = [number[at : at + 4] for at in range(0, 16, 4)]
    return rng.choice((number, " ".join(groups), "-".join(groups)))


def _iban(rng: random.Random, _: str) -> str:
    country, digits = rng.choice((("DE", 18), ("ES", 20), ("FR", 23), ("AT", 16), ("NL", 0)))
    body = _some(rng, digits, _DIGITS) if digits else "INGB" + _some(rng, 10, _DIGITS)
    number = "".join(str(int(one, 36)) for one in body + country) + "00"
    found = f"{country}{98 - int(number) % 97:02d}{body}"
    groups = " ".join(found[at : at + 4] for at in range(0, len(found), 4))
    return rng.choice((found, groups))


def _national_id(rng: random.Random, language: str) -> str:
    if language == "en":
        return f"{rng.randrange(101, 665)}-{rng.randrange(10, 99)}-{rng.randrange(1000, 9999)}"
    if language == "es":
        number = rng.randrange(20_000_000, 99_999_999)
        return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"
    if language == "zh":
        born = f"{rng.randrange(1950, 2010)}{rng.randrange(1, 13):02d}{rng.randrange(1, 29):02d}"
        body = f"{rng.choice(('110101', '310115', '440305'))}{born}{rng.randrange(100, 999)}"
        total = sum(int(one) * (2 ** (17 - at) % 11) for at, one in enumerate(body))
        return body + "10X98765432"[total % 11]
    digits = rng.sample(_DIGITS[1:], 8)
    digits += [digits[3], "0"]  # one of them stands twice, and one is missing
    product = 10
    for one in digits:
        product = 2 * ((int(one) + product) % 10 or 10) % 11
    found = "".join(digits) + str((11 - product) % 10)
    return rng.choice((found, f"{found[:2]} {found[2:5]} {found[5:8]} {found[8:]}"))


def _private_key(rng: random.Random, _: str) -> str:
    kind = rng.choice(("RSA ", "EC ", "OPENSSH ", ""))
    lines = "\n".join(_some(rng, 64, _ALNUM + "+/") for _ in range(rng.randrange(3, 9)))
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n-----END {kind}PRIVATE KEY-----"


def _of(letters: str, size: int) -> Callable[[random.Random, str], str]:
    return lambda rng, _: _some(rng, size, letters)


def _uuid(rng: random.Random, _: str) -> str:
    return "-".join(_some(rng, size, _HEX) for size in (8, 4, 4, 4, 12))


def _base64(size: int) -> Callable[[random.Random, str], str]:
    return lambda rng, _: base64.b64encode(rng.randbytes(size)).decode()


def _order(rng: random.Random, _: str) -> str:
    year = rng.randrange(2019, 2027)
    return rng.choice(
        (
            f"{year}-{rng.randrange(10**5):05d}",
            f"A{rng.randrange(10**9):09d}",
            f"{rng.randrange(10**7, 10**8)}",
            f"PO-{year}/{rng.randrange(10**4):04d}",
            f"4{year}0000{rng.randrange(10**3):03d}",
        )
    )


def _date(rng: random.Random, _: str) -> str:
    month, day, hour = rng.randrange(1, 13), rng.randrange(1, 29), rng.randrange(24)
    return f"2026-{month:02d}-{day:02d} {hour:02d}:17:45"


_MAKERS: Mapping[str, Callable[[random.Random, str], str]] = {
    "api_key": _api_key,
    "opaque": _opaque,
    "password": _password,
    "password_said": _password,
    "url_password": _url_password,
    "email": _email,
    "phone": _phone,
    "card": _card,
    "iban": _iban,
    "national_id": _national_id,
    "private_key": _private_key,
    "UUID": _uuid,
    "SHA": _of(_HEX, 40),
    "HASH": _of(_HEX, 64),
    "MD5": _of(_HEX, 32),
    "HEX16": _of(_HEX, 16),
    "WORD": lambda rng, _: rng.choice(("lamp", "north", "cedar")),
    "VERSION": lambda rng, _: f"{rng.randrange(9)}.{rng.randrange(40)}.{rng.randrange(300)}",
    "ORDER": _order,
    "NUMBER": lambda rng, _: str(rng.randrange(10**3, 10**9)),
    "PID": lambda rng, _: str(rng.randrange(10**3, 10**6)),
    "TIMESTAMP": lambda rng, _: str(rng.randrange(1_700_000_000_000, 1_800_000_000_000)),
    "NANOS": lambda rng, _: str(rng.randrange(17 * 10**17, 18 * 10**17)),
    "DATE": _date,
    "BASE64": _base64(900),
    "BASE64SHORT": _base64(32),
    "BASE64LINE": _base64(64),
}
