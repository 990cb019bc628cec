"""Numbers that stand for a person or their money: cards, IBANs, national ids, telephones.

Where a number has check digits, they are checked. Where it has none, how it is written or the words
before it must say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import date

from nextstate.redaction import Span, words
from nextstate.redaction.gates import joins_digits

# Each begins with what it takes first and looks back after it: then `re` jumps from one such
# character to the next, which is several times as fast as looking back everywhere.
_CARD = re.compile(r"\d(?<![\w.+#-].)(?:[ -]?\d){12,18}(?![\w-]|\.\d)", re.ASCII)
_CARD_BEGINNINGS = (
    (16, r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|4|6011|65|64[4-9]|62|35(?:2[89]|[3-8])"),
    (15, r"3[47]"),
    (14, r"3(?:0[0-5]|[68])"),
    (19, r"4|62|6011|65"),
)
_CARD_OF = {size: re.compile(beginning) for size, beginning in _CARD_BEGINNINGS}
_CARD_GROUPS = frozenset((*((n,) for n in range(13, 20)), (4, 4, 4, 4), (4, 6, 5), (4, 6, 4)))
_TEST_CARDS = words(
    "4242424242424242 4111111111111111 4012888888881881 5555555555554444 5105105105105100 "
    "378282246310005 371449635398431 6011111111111117 6011000990139424 30569309025904 "
    "3530111333300000 4000056655665556 2223003122003222 4222222222222"
)
"""Published by payment providers for tests."""
_ORDER_WORDS = re.compile(
    r"(?:order|bestell|pedido|invoice|rechnung|factura|tracking|sendung|shipment|\bean|gtin|isbn|imei"
    r"|serial|ticket|订单|单号)(?:(?!card|kart|tarj|卡)[^\n\d]){0,24}\Z"
)
"""Before digits in a row: they number a thing, and one in ten such numbers has a card's check."""
_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?:[ -]?[A-Z0-9]){11,30}", re.ASCII)
_IBAN_LENGTHS = {
    pair[:2]: int(pair[2:])
    for pair in words(
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 "
        "DO28 EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 "
        "IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MR27 "
        "MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 "
        "ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
    )
}
_LONGEST_WORDS = 48
"""Characters before a number in which words say what it is."""

_ID = re.compile(
    r"[\dA-Z](?:(?<=\d)(?<![\w.-].)(?:"
    r"\d\d(?P<dash>[ -])\d\d(?P=dash)\d{4}"
    r"|\d\d\.\d{3}\.\d{3}-\d\d"
    r"|\d(?: \d{3}){3}"
    r"| \d\d \d\d \d[\dAB] \d{3} \d{3} \d\d"
    r"|\d{6,17}(?:-?[A-Za-z])?"
    r"|\d{5}[AB]\d{8}"
    r")(?![\w-]|\.\d)"
    r"|(?<=[A-Z])(?<!\w.)(?:"
    r"-?\d{7}-?[A-Z]"
    r"|[A-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"
    r"|[A-Z]{5}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z]"
    r")(?![\w-]))",
    re.ASCII,
)
"""What has the shape of a national id. `_ID_FORMS` say whose it may be."""
_TAX_WORDS = re.compile(r"steuer|idnr|id-nr|tax id|tax number|tin\b|identifikationsnummer")
_SSN_WORDS = re.compile(r"ssn|social security|social-security")
_NO_NINO = frozenset(("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"))
_NIE = str.maketrans("XYZ", "012")
_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"
_CN_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_IT_ODD = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (
            *(1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21),
            *(2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        ),
        strict=True,
    )
)
_PHONE = re.compile(
    r"[+(\d](?<![\w.,:/$€£#+=(-].)(?:(?<=\()\+?\d|(?<=\+)\d|(?<=\d))"
    r"(?:[ ()./-]{0,2}\d){6,16}(?![\w-]|[.,:/]\d)",
    re.ASCII,
)
_PHONE_WORDS = re.compile(
    r"phone|t(?<![a-z]t)el(?![a-z])|f(?<![a-z]f)ax(?![a-z])|m(?<![a-z]m)obile(?![a-z])|"
    r"call (?:me|him|her|us|them)|text (?:me|him|her|us|them)|reach (?:me|him|her|us|them)|"
    r"ring (?:me|him|her|us|them)|c(?<![a-z]c)ell(?: is|:| at)|whatsapp|telefon|handy|mobil|"
    r"rufnummer|anruf|erreichbar|ruf mich|teléfono|tel[eé]f|móvil|movil|ll[aá]m[ae]|celular|"
    r"电话|手机|拨打|致电|联系方式"
)
"""Each begins with a letter, so that `re` skips all other letters."""
_PHONE_STEMS = (
    *("phone", "tel", "fax", "mobil", "vil", "cel", "ll", "text ", "reach", "ring ", "whatsapp"),
    *("handy", "ruf", "erreichbar", "电话", "手机", "拨打", "致电", "联系方式"),
)
"""One of these stands in what `_PHONE_WORDS` matches."""
_DATE = re.compile(r"(?:19|20)\d\d[-./]\d\d?[-./]\d|\d\d?[-./]\d\d?[-./](?:19|20)\d\d")
_COUNTING = "12345678"
"""Stands in no number that was given out."""
_CALLING_CODES = words(
    "1 7 20 27 30 31 32 33 34 36 39 40 41 43 44 45 46 47 48 49 51 52 53 54 55 56 57 58 60 "
    "61 62 63 64 65 66 81 82 84 86 90 91 92 93 94 95 98 211 212 213 216 218 350 351 352 "
    "353 354 355 356 357 358 359 370 371 372 373 374 375 376 377 380 381 382 385 386 387 "
    "389 420 421 423 502 503 504 505 506 507 509 591 593 595 598 852 853 855 880 886 960 "
    "961 962 963 964 965 966 967 968 970 971 972 973 974 975 976 977 992 993 994 995 996 "
    "998 234 254 255 256 233 221 225"
)
_NORTH_AMERICA = re.compile(r"(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}")
_CHINA = re.compile(r"1[3-9]\d(?:[ -]?\d{4}){2}")
_GERMANY = re.compile(r"01[567]\d{1,2}[ /-]?\d{3,8}(?:[ -]?\d{1,4}){0,3}")
_SPAIN = re.compile(r"[6789]\d\d (?:\d\d ){2}\d\d")
_HAN = re.compile(r"[一-鿿]")


def cards(text: str) -> Iterator[Span]:
    """Numbers of payment cards: an issuer's beginning and length, and Luhn's check digit."""
    for match in _CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        beginning = _CARD_OF.get(len(digits))
        if (
            beginning is not None
            and beginning.match(digits) is not None
            and tuple(map(len, re.split("[ -]", match[0]))) in _CARD_GROUPS
            and _luhn(digits)
            and digits not in _TEST_CARDS
            and not (len(match[0]) == len(digits) and _numbers_a_thing(text, match.start()))
        ):
            yield Span(match.start(), match.end(), "card")


def _numbers_a_thing(text: str, start: int) -> bool:
    before = text[max(start - _LONGEST_WORDS, 0) : start].lower()
    return _ORDER_WORDS.search(before) is not None


def ibans(text: str) -> Iterator[Span]:
    """International bank account numbers: a country's length, and the check digits (ISO 13616)."""
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match[0][:2])
        if length is None:
            continue
        plain = [at for at, character in enumerate(match[0]) if character not in " -"]
        if len(plain) < length:
            continue
        end = plain[length - 1] + 1
        digits = "".join(match[0][at] for at in plain[:length])
        following = text[match.start() + end : match.start() + end + 1]
        number = "".join(str(int(one, 36)) for one in digits[4:] + digits[:4])
        if not following.isalnum() and int(number) % 97 == 1:
            yield Span(match.start(), match.start() + end, "iban")


def national_ids(text: str) -> Iterator[Span]:
    """Numbers that a state gives a person (US, GB, DE, ES, CN, FR, IT, BR)."""
    for match in _ID.finditer(text):
        start, found = match.start(), match[0]
        if found.isdigit() and len(found) not in _ID_SIZES:
            continue
        for form, holds in _FORMS_OF[found[0].isalpha(), found[-1].isalpha()]:
            if form.fullmatch(found) is not None:
                before = text[max(start - _LONGEST_WORDS, 0) : start].lower()
                if holds(found, before):
                    yield Span(start, match.end(), "national_id")
                    break


def phones(text: str) -> Iterator[Span]:
    """Telephone numbers: by their calling code, a country's way to write them, or words."""
    worded = not text.isascii() or _may_say_phone(text.lower())
    if not worded and not joins_digits(text):
        return
    for match in _PHONE.finditer(text):
        start, found = match.start(), match[0]
        if not worded and found.isdigit():
            continue
        digits = found.encode().translate(None, b" ()./+-").decode()
        if not 7 <= len(digits) <= 15 or len(set(digits)) < 3 or _COUNTING in digits:
            continue
        before = text[max(start - _LONGEST_WORDS, 0) : start].lower()
        before = before.rstrip("\n ").rpartition("\n")[2]  # words say what stands in their line
        before = before.rpartition("[secret:")[0] or before  # a placeholder of ours is no word
        if _is_phone(found, digits, before, text):
            opened = found.startswith("(") and ")" not in found
            yield Span(start + opened, match.end(), "phone")


def _is_phone(found: str, digits: str, before: str, text: str) -> bool:
    if found.startswith(("+", "(+")):
        known = any(digits[:size] in _CALLING_CODES for size in (1, 2, 3))
        return known and len(digits) >= 9 and (before != "" or "@@ -" not in text)
    if found == digits and before.isascii():  # what none of the countries' forms match
        return _says_phone(before)
    # Digits and spaces alone may be sizes of anything: they need words.
    if _NORTH_AMERICA.fullmatch(found) and not found.replace(" ", "").isdigit():
        return True
    if _SPAIN.fullmatch(found):
        return True
    if _CHINA.fullmatch(found) and (len(found) > len(digits) or _HAN.search(before) is not None):
        return True
    if _GERMANY.fullmatch(found) and 10 <= len(digits) <= 12 and len(found) > len(digits):
        return True
    return _DATE.search(found) is None and _says_phone(before)


def _says_phone(before: str) -> bool:
    return _may_say_phone(before) and _PHONE_WORDS.search(before) is not None


def _may_say_phone(before: str) -> bool:
    return any(stem in before for stem in _PHONE_STEMS)


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(one), 10)) for one in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _de_tax(found: str, before: str) -> bool:
    digits = found.replace(" ", "")
    counts = sorted(digits[:10].count(one) for one in set(digits[:10]))
    if counts[-1] not in (2, 3) or (len(counts) > 1 and counts[-2] > 1):
        return False
    product = 10
    for one in digits[:10]:
        product = 2 * ((int(one) + product) % 10 or 10) % 11
    words = " " in found or _TAX_WORDS.search(before) is not None
    return words and (11 - product) % 10 == int(digits[10])


def _cn_id(found: str, _: str) -> bool:
    try:
        born = date(int(found[6:10]), int(found[10:12]), int(found[12:14]))
    except ValueError:
        return False
    total = sum(int(one) * weight for one, weight in zip(found, _CN_WEIGHTS, strict=False))
    return 1900 <= born.year <= 2100 and "10X98765432"[total % 11] == found[17].upper()


def _dni(found: str, _: str) -> bool:
    plain = found.replace("-", "")
    number = plain[:-1].translate(_NIE)
    if len(number) != 8 or len(set(number)) < 3:
        return False
    return number != "12345678" and _DNI_LETTERS[int(number) % 23] == plain[-1]


def _it_code(found: str, _: str) -> bool:
    total = sum(_IT_ODD[one] for one in found[0:15:2])
    total += sum(int(one, 36) - (0 if one.isdigit() else 10) for one in found[1:15:2])
    return chr(65 + total % 26) == found[15]


def _cpf(found: str, _: str) -> bool:
    digits = [int(one) for one in found if one.isdigit()]
    for size in (9, 10):
        total = sum(one * (size + 1 - at) for at, one in enumerate(digits[:size]))
        if total * 10 % 11 % 10 != digits[size]:
            return False
    return len(set(digits)) > 2


def _fr_id(found: str, _: str) -> bool:
    plain = found.replace(" ", "")
    number = plain[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(plain[13:])


def _nino(found: str, _: str) -> bool:
    return found[:2] not in _NO_NINO and "123456" not in found.replace(" ", "")


def _ssn(found: str, before: str) -> bool:
    digits = found.replace("-", "").replace(" ", "")
    if digits in ("123456789", "078051120", "219099999") or len(set(digits)) < 3:
        return False  # never anybody's
    return "-" in found or _SSN_WORDS.search(before) is not None


_ID_FORMS: tuple[tuple[re.Pattern[str], Callable[[str, str], bool]], ...] = (
    (re.compile(r"(?!000|666|9)\d{3}([ -]?)(?!00)\d\d\1(?!0000)\d{4}"), _ssn),
    (re.compile(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]"), _nino),
    (re.compile(r"[1-9]\d( ?)\d{3}\1\d{3}\1\d{3}"), _de_tax),
    (re.compile(r"(?:[XYZ]-?\d{7}|\d{8})-?[A-HJ-NP-TV-Z]"), _dni),
    (re.compile(r"\d{17}[\dXx]"), _cn_id),
    (re.compile(r"[12]( ?)\d\d\1[01]\d\1\d[\dAB]\1\d{3}\1\d{3}\1\d\d"), _fr_id),
    (re.compile(r"[A-Z]{6}\d\d[ABCDEHLMPRST]\d\d[A-Z]\d{3}[A-Z]"), _it_code),
    (re.compile(r"\d{3}\.\d{3}\.\d{3}-\d\d"), _cpf),
)
_FORMS_OF = {
    (True, True): (_ID_FORMS[1], _ID_FORMS[3], _ID_FORMS[6]),
    (False, True): (_ID_FORMS[3], _ID_FORMS[4]),
    (False, False): (_ID_FORMS[0], _ID_FORMS[2], *_ID_FORMS[4:6], _ID_FORMS[7]),
}
"""By whether the first and the last character is a letter."""
_ID_SIZES = frozenset((9, 11, 15, 18))
"""The lengths of those that are digits alone."""
