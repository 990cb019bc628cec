"""Secrets that are known by the name before them: `password = …`, `Authorization: …`, `-u a:…`.

The value decides too: code that fetches a secret, a type or a placeholder is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nextstate.redaction import Span, words
from nextstate.redaction.forms import made_up

_SAYS = (
    r"""(?:\\?["']|\*{1,2})?\]?\s{0,3}"""
    r"""(?::=|=>|==?|[:：＝是为>]|\s(?:is|ist|lautet|es|to|auf|a)(?::|\s))\*{0,2}\s{0,3}"""
)
_VALUE = (
    r"""(?P<quote>\\?["'`“「]|[rbf]["']|\*\*)?"""
    r"""(?P<value>[^\s"'`\\,;<>(){}\[\]|“”「」。，；]{4,200}+)"""
)
_QUOTED = r"""(?P<quote>\\?["'`])(?P<value>(?:(?!(?P=quote))\S){4,200}+)(?=(?P=quote))"""
"""A value up to its closing quote, whatever it is made of."""
_CORES = (
    *("pass", "pwd", "kennwort", "contrase", "clave", "密码", "口令"),
    *("key", "token", "secre", "schlüssel", "密钥", "令牌"),
)
"""One is in the middle of every name; none begins with another."""
_PASSWORDS = frozenset(("pass", "pwd", "kennwort", "contrase", "clave", "密码", "口令"))
_TAILS = {
    "pass": r"(?:w(?:or)?d|wort|phrase|)",
    "contrase": r"(?:ñ|n|\\u00f1)a",
    "clave": r"(?: secreta| de api)?",
    "key": r"(?:[ _-]?id)?",
    "secre": r"to?",
}
_AFTER = {core: re.compile(_TAILS.get(core, "") + _SAYS + _VALUE) for core in _CORES}
"""By the core: the end of the name, and its value."""
_WHOLE = {core: re.compile(_TAILS.get(core, "") + _SAYS + _QUOTED) for core in _CORES}
_SAID = {core: re.compile(_TAILS.get(core, "") + r"\s" + _VALUE) for core in sorted(_PASSWORDS)}
"""`log in with the password …`"""
_OF_KEYS = (
    *("api", "access", "secret", "private", "encryption", "signing"),
    *("master", "account", "auth", "webhook", "license"),
)
_OF_TOKENS = (
    *("access", "auth", "refresh", "bearer", "api", "id"),
    *("session", "bot", "deploy", "personal", "csrf", "oauth"),
)
_BEFORE = {
    "key": _OF_KEYS,
    "schlüssel": ("api",),
    "token": _OF_TOKENS,
    "secre": ("client", "app", "shared"),
}
"""What must stand before a core, or else no letter if it may stand alone."""
_NEVER_ALONE = frozenset(("key", "schlüssel"))
_LONGEST_BEFORE, _LONGEST_VALUE = 12, 200
_HEADER = re.compile(
    r"auth(?:orization)?[\"']?\]?\s{0,3}[:=]\s{0,3}\\?[\"']?(?:bearer|basic|token)\s{1,3}"
    r"(?P<value>[\w.~+/=-]{8,500}+)"
)
_FLAG = re.compile(
    r"--(?:(?P<password>password|passwd|pass|passphrase)|(?:auth-|access-|api-|client-)?"
    r"(?:token|key|apikey|secret|secret-key))[ =](?P<quote>\\?[\"'])?"
    r"(?P<value>[^\s\"'\\;|]{4,200}+)"
)
_FLAGS = (
    "--pass",
    "--token",
    "--api-key",
    "--apikey",
    "--secret",
    "--auth",
    "--access",
    "--client",
)
_USER = re.compile(r"(?<= -u) ?\\?[\"']?[\w.@-]{1,64}:(?P<value>[^\s\"'\\:/]{4,200}+)")
_LONG_OPTION = re.compile(r"--user[ =]\\?[\"']?[\w.@-]{1,64}:(?P<value>[^\s\"'\\:/]{4,200}+)")
_SSHPASS = re.compile(r"sshpass -p ?\\?[\"']?(?P<value>[^\s\"'\\;|]{4,200}+)")
_MYSQL = re.compile(r"mysql(?:dump|admin)? [^\n|;]{0,100}?-p(?P<value>[^\s\"'\\;|]{4,200}+)")
_REDIS = re.compile(r"redis-cli (?:-[hpn] ?\S{1,100} ){0,3}-a (?P<value>[^\s\"'\\;|]{4,200}+)")
_SQL = re.compile(r"IDENTIFIED BY '(?P<value>[^'\s]{4,200}+)'")
_COMMANDS = (
    ("IDENTIFIED BY", _SQL),
    ("mysql", _MYSQL),
    ("redis-cli", _REDIS),
    (" -u", _USER),
    ("--user", _LONG_OPTION),
    ("sshpass -p", _SSHPASS),
)
_CODE = re.compile(
    r"\A(?:[$%#&*@]*(?:[a-z_]\w*\.)+[a-z_]\w*|[$%*.x•<-]+.{0,3}|\$\{?\w+\}?|%\(?\w+\)?s?|"
    r"[a-z]+(?:_[a-z]+)*|[A-Z]+(?:_[A-Z]+)*|\w*(?:env|config|settings|getenv|input|prompt)\w*|"
    r"/(?:[\w.-]+/)*[\w.-]*|\.{1,2}/.*|https?:.*|\d{1,5}(?:\.\d+)?|v?\d+(?:\.\d+)+|file:.*|"
    r"\d{4}-\d\d-\d\d.*|[A-Za-z]+\.[A-Za-z.]+)\Z"
)
"""Values that are code, words, paths, numbers, dates; matched whole."""
_SHAPED = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.ASCII)
_PLAIN_WORD = re.compile(r"[^\W\d_]+")
_NOT_SECRET = words(
    "none null true false undefined string str text required optional hidden secret "
    "password token passwd username user admin root test invalid missing wrong incorrect "
    "expired changed reset forgot forgotten empty default value bytes object number "
    "boolean any unknown self this env postgres contraseña clave passwort kennwort kwargs "
    "args"
)


def passwords(text: str) -> Iterator[Span]:
    """Passwords and other secrets after their name."""
    lower = text.lower()
    if len(lower) != len(text):  # a letter that has two small ones: places must stay the same
        lower = "".join(one if len(one.lower()) > 1 else one.lower() for one in text)
    read = 0
    for at, core in _cores(lower):
        # What was read as a value is not searched for names: hostile texts would be read often.
        found = _value_after(lower, core, at) if at >= read else None
        if found is not None:
            start, read = found.span("value")
            quoted = found["quote"] is not None
            end = read if quoted else _without_end(text, start, read)
            if _is_secret(text[start:end], quoted=quoted, password=core in _PASSWORDS):
                yield Span(start, end, "password")
    if "auth" in lower:
        for match in _HEADER.finditer(lower):
            start, end = match.span("value")
            value = text[start:end]
            if not made_up(value) and (any(map(str.isdigit, value)) or len(value) >= 12):
                yield Span(start, end, "password")
    if "--" in lower and any(flag in lower for flag in _FLAGS):
        for match in _FLAG.finditer(lower):
            start, end = match.span("value")
            if lower[start] == "-":
                continue  # the next flag
            named = match["password"] is not None
            if _is_secret(text[start:end], quoted=named, password=named):
                yield Span(start, end, "password")
    for mark, expression in _COMMANDS:
        if mark in text:
            for match in expression.finditer(text):
                if _is_secret(match["value"], quoted=True, password=True):
                    yield Span(*match.span("value"), "password")


def _cores(lower: str) -> list[tuple[int, str]]:
    """The cores in a text and where each begins, in order; none overlaps another.

    A search for each of them is many times as fast as one for all by an expression.
    """
    found: list[tuple[int, str]] = []
    for core in _CORES:
        at = lower.find(core) if core in lower else -1
        while at >= 0:
            found.append((at, core))
            at = lower.find(core, at + len(core))
    if len(found) < 2:
        return found
    found.sort()
    apart: list[tuple[int, str]] = []
    end = 0
    for at, core in found:
        if at >= end:
            apart.append((at, core))
            end = at + len(core)
    return apart


def _value_after(lower: str, name: str, start: int) -> re.Match[str] | None:
    """The match of a value after a name with the core `name`; None if it is no such name."""
    after = start + len(name)
    before = lower[max(start - _LONGEST_BEFORE, 0) : start]
    if before.endswith("[") and lower.startswith("secret:", start):
        return None  # a placeholder of ours
    bare = name == "pass" and not lower.startswith(("w", "phrase"), after)
    if bare or name in _BEFORE or name in ("pwd", "clave"):
        qualified = before.rstrip(" _-").endswith(_BEFORE.get(name, ()))
        if not qualified and (name in _NEVER_ALONE or before[-1:].isalpha()):
            return None
    match = _WHOLE[name].match(lower, after) or _AFTER[name].match(lower, after)
    if match is None and name in _SAID:
        match = _SAID[name].match(lower, after)
        if match is not None and not _is_mixed(match["value"]):
            return None
    return None if match is None or match["value"].startswith("secret:") else match


def _is_mixed(value: str) -> bool:
    return any(map(str.isdigit, value)) and any(map(str.isalpha, value)) and len(value) >= 6


def _without_end(text: str, start: int, end: int) -> int:
    """Where a value ends without the sentence's full stop, or the next field of a query."""
    value = text[start:end]
    cut = value.find("&")
    if cut >= 4 and "=" in value[cut:]:
        value = value[:cut]
    return start + len(value.rstrip(".:)") if value[-1] in ".:)" else value)


def is_secret_of(name: str, value: str) -> bool:
    """Whether a field of an object holds a secret, by its name and its value."""
    if len(value) > _LONGEST_VALUE or not _cores(name.lower()):
        return False
    written = f"{name}: '{value}'"
    return any(span.end - span.start == len(value) for span in passwords(written))


def _is_secret(value: str, *, quoted: bool, password: bool) -> bool:
    low = value.lower()
    if low in _NOT_SECRET or made_up(f"{low}abcdefg"[: max(len(low), 8)]) or low[0] in "$<{%[*":
        return False
    if _SHAPED.fullmatch(low):
        return True
    has_digit = any(map(str.isdigit, value))
    if password:
        if _PLAIN_WORD.fullmatch(value):
            return quoted and len(value) >= 6
        if quoted and len(value) >= 6 and "." not in value and not value.startswith(("/", "http")):
            return not _is_name(value)
        has_other = has_digit or any(not one.isalnum() for one in value)
        return len(value) >= 6 and has_other and _CODE.match(value) is None
    if len(value) < 10 or not has_digit or _CODE.match(value) is not None:
        return False
    return any(map(str.isalpha, value)) or len(value) >= 20


def _is_name(value: str) -> bool:
    """True for what reads as the name of a field, not as its value: `user_password`."""
    parts = re.split("[_-]", value.lower())
    return (
        len(parts) > 1
        and all(part.isalpha() and len(part) > 1 for part in parts)
        and any(part in _NOT_SECRET for part in parts)
    )
