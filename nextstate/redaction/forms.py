"""Secrets that are known by their form: keys with a prefix, signed tokens, private keys, addresses.

The forms are what their issuers publish. An expression reads at most a bounded number of characters
before it fails, or takes all that it has read, so its time grows linearly with the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from nextstate.redaction import Span, words
from nextstate.redaction.gates import long_words


class _Form(NamedTuple):
    """Keys of one issuer."""

    mark: str
    """Stands in every one of them; looked for first, because that is fast."""
    pattern: str
    """Compiled when the mark was seen: compiling all would cost each process 0.2 s."""

    @property
    def expression(self) -> re.Pattern[str]:
        """The pattern, compiled."""
        return _compiled(self.pattern)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.ASCII)


def _form(mark: str, body: str, before: str = r"(?<![A-Za-z0-9])") -> _Form:
    return _Form(mark, before + body)


KEY_FORMS = (
    _form("ns-", r"ns-(?:[0-9a-f]{64}|[\w-]{43})(?![\w-])"),
    _form("ep-", r"ep-[0-9a-f]{32}(?![0-9A-Za-z])"),
    _form("sk-", r"sk-(?:proj-|svcacct-|admin-|ant-(?:api|admin|sid)\d\d-|or-v1-)?[\w-]{20,}+"),
    _form("sk_", r"[sr]k_(?:live|test|prod)_[A-Za-z0-9]{16,}+"),
    _form("rk_", r"rk_(?:live|test|prod)_[A-Za-z0-9]{16,}+"),
    _form("whsec_", r"whsec_[A-Za-z0-9+/=]{24,}+"),
    _form("AKIA", r"AKIA[A-Z2-7]{16}(?![A-Za-z0-9])"),
    _form("ASIA", r"ASIA[A-Z2-7]{16}(?![A-Za-z0-9])"),
    *(_form(f"gh{one}_", rf"gh{one}_[A-Za-z0-9]{{36,}}+") for one in "pousr"),
    _form("github_pat_", r"github_pat_\w{60,}+"),
    _form("glpat-", r"glpat-[\w-]{20,}+"),
    *(
        _form(f"gl{one}-", rf"gl{one}-[\w-]{{20,}}+")
        for one in ("dt", "rt", "cbt", "ptt", "ft", "soat", "agent")
    ),
    _form("xox", r"xox[abeoprs]-(?:\d-)?[A-Za-z0-9-]{10,}+"),
    _form("xapp-", r"xapp-\d-[A-Za-z0-9-]{20,}+"),
    _form("hooks.slack.com", r"hooks\.slack\.com/(?:services|workflows)/[\w/]{20,}+"),
    _form("discord", r"discord(?:app)?\.com/api/webhooks/\d{17,20}/[\w-]{30,}+"),
    _form("AIza", r"AIza[\w-]{35}(?![\w-])"),
    _form("GOCSPX-", r"GOCSPX-[\w-]{28}(?![\w-])"),
    _form("ya29.", r"ya29\.[\w-]{30,}+"),
    _form("hf_", r"hf_[A-Za-z0-9]{30,}+"),
    _form("npm_", r"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    _form("pypi-", r"pypi-AgE[\w-]{50,}+"),
    _form("SG.", r"SG\.[\w-]{22}\.[\w-]{43}(?![\w-])"),
    _form("SK", r"SK[0-9a-f]{32}(?![0-9A-Za-z])"),
    _form("key-", r"key-[0-9a-f]{32}(?![0-9A-Za-z])"),
    _form("dop_v1_", r"do[por]_v1_[0-9a-f]{64}(?![0-9A-Za-z])"),
    *(
        _form(f"shp{one}_", rf"shp{one}_[0-9a-fA-F]{{32}}(?![0-9A-Za-z])")
        for one in ("at", "ca", "pa", "ss")
    ),
    _form("gsk_", r"gsk_[A-Za-z0-9]{40,}+"),
    _form("xai-", r"xai-[A-Za-z0-9]{40,}+"),
    _form("r8_", r"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])"),
    _form("lin_", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}+"),
    _form("ntn_", r"ntn_[A-Za-z0-9]{40,}+"),
    _form("secret_", r"secret_[A-Za-z0-9]{43}(?![A-Za-z0-9])"),
    _form("hvs.", r"hv[sb]\.[\w-]{24,}+"),
    _form("dapi", r"dapi[0-9a-f]{32}(?![0-9A-Za-z])"),
    _form("PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}(?![0-9A-Za-z])"),
    _form("glsa_", r"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}(?![0-9A-Za-z])"),
    _form("glc_", r"glc_[A-Za-z0-9+/=]{32,}+"),
    _form("sntrys_", r"sntrys_[A-Za-z0-9+/=_]{40,}+"),
    _form("ATATT3", r"ATATT3[\w=-]{60,}+"),
    _form("sq0", r"sq0(?:atp|csp)-[\w-]{22,}+"),
    _form("EAAA", r"EAAA[\w-]{60}(?![\w-])"),
    _form("AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[0-9A-Z]{58}(?![0-9A-Za-z])"),
    _form("tfp_", r"tfp_[A-Za-z0-9]{40,}+"),
    _form(".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}+"),
    _form("FLWSECK", r"FLWSECK(?:_TEST)?-[0-9a-zA-Z]{12,}+"),
    _form("rubygems_", r"rubygems_[0-9a-f]{48}(?![0-9A-Za-z])"),
    _form("tskey-", r"tskey-(?:api|auth|client)-[\w-]{20,}+"),
    _form("pat.", r"pat\.[\w-]{22}\.[0-9a-f]{24}\.[\w-]{20}(?![\w-])"),
    _form("AccountKey=", r"(?<=AccountKey=)[A-Za-z0-9+/]{80,}+={0,2}", ""),
    _form("SharedAccessKey=", r"(?<=SharedAccessKey=)[A-Za-z0-9+/]{40,}+={0,2}", ""),
    _form(":AA", r"\d{8,10}:AA[\w-]{33}(?![\w-])", r"(?<![\w.:-])"),
    _form("nextstate-", r"nextstate-\d{1,5}=[\w-]{43}(?![\w-])"),
    *(
        _form(f"{name}=", rf"(?<={name}=)[\w.~+/-]{{20,}}+={{0,2}}", "")
        for name in ("sessionid", "JSESSIONID", "PHPSESSID", "_session")
    ),
    _form(
        "eyJ",
        r"eyJ[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]{16,}+",
        r"(?<![\w-])",
    ),
)
_MADE_UP_WORD = re.compile(
    r"example|your|placeholder|dummy|changeme|change-me|redacted|insert|replace"
)
_MADE_UP = re.compile(
    _MADE_UP_WORD.pattern + r"|xxxx|\*\*\*|0{8}|123456789|abcdefgh|abc123abc"
    r"|eyjzdwiioiixmjm0nty3odkwiiw"  # the token that jwt.io shows
)
"""Stands in what only shows how a secret looks, in small letters."""
_FEWEST_CHARACTERS = 6
"""A key with fewer different characters is made up."""
_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
_CUT_BODY = re.compile(r"(?:\\{0,4}[nr]|[A-Za-z0-9+/=\s:,-]){0,20000}+")
"""What a key without its end may be made of."""
_KEY_BODY = re.compile(r"[A-Za-z0-9+/]{32}")
_TO_BODY = 400
"""The body of a private key begins within this many characters."""
_URL_PASSWORD = re.compile(r"""://[^\s/:@"'<>\\`]{0,100}:([^\s/"'<>\\`]{1,200})@""")
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9][A-Za-z0-9-]{0,40}\.){1,6}[A-Za-z]{2,18}(?!\w)", re.ASCII)
_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-"
_LONGEST_LOCAL = 64
_NOBODY = frozenset(("git", "noreply", "no-reply", "donotreply", "do-not-reply", "hg", "svn"))
"""Names before the @ that are no person's."""
_LOGIN = re.compile(r"(?<!\w)(?:ssh|scp|sftp|sshfs|rsync|mosh|ssh-copy-id)\s[^\n|;&]{0,80}\Z")
_LONGEST_LOGIN = 96
"""A command that logs in: what it names is an account of a machine and no mailbox."""
_NO_DOMAINS = (
    *(".example.com", ".example.org", ".example.net", ".example.edu", ".noreply.github.com"),
    *(".example", ".test", ".invalid", ".localhost", ".local"),
)
"""Reserved for documents (RFC 2606), or not of the internet."""
_FILES = words(
    "png jpg jpeg gif svg webp ico js ts tsx jsx css py rb rs go json yaml yml toml md txt "
    "html xml lock whl gz zip tar tgz service timer socket target mount"
)
"""What looks like the end of a domain and is the end of a file's or unit's name."""


def made_up(secret: str) -> bool:
    """True for what documents and tests write where a secret would stand.

    >>> made_up("sk-your-api-key-goes-here"), made_up("sk-0f1c8a7be24d95613c7e")
    (True, False)
    """
    return len(set(secret)) < _FEWEST_CHARACTERS or _MADE_UP.search(secret.lower()) is not None


def is_chosen(password: str) -> bool:
    """True for a password that somebody made of such a word: `Example2024!`, not `example123`."""
    rest = _MADE_UP_WORD.sub("", password.lower())
    digits = sum(map(str.isdigit, rest))
    marked = any(not one.isalnum() and one not in "-_ " for one in rest)
    return _MADE_UP.search(rest) is None and (digits > 3 or (digits > 0 and marked))


def api_keys(text: str) -> Iterator[Span]:
    """Keys and tokens with a form of their issuer."""
    long = long_words(text)
    for form in KEY_FORMS if long else ():
        if form.mark in long:
            for match in form.expression.finditer(text):
                if not made_up(match[0]) and any(map(str.isdigit, match[0])):
                    yield Span(match.start(), match.end(), "api_key")


def private_keys(text: str) -> Iterator[Span]:
    """Private keys in PEM form, also with escaped line ends or without their end."""
    if "PRIVATE KEY" not in text:
        return
    end = 0
    for match in _BEGIN.finditer(text):
        body = text[match.end() : match.end() + _TO_BODY].replace("\\n", "\n")
        if match.start() < end or _KEY_BODY.search(body) is None:
            continue
        closing = _END.search(text, match.end())
        cut = _CUT_BODY.match(text, match.end())
        end = closing.end() if closing else match.end() if cut is None else cut.end()
        yield Span(match.start(), end, "private_key")


def url_passwords(text: str) -> Iterator[Span]:
    """Passwords before the host of a URL."""
    if "://" not in text:
        return
    for match in _URL_PASSWORD.finditer(text):
        found = match[1]
        user = match[0][len("://") : -len(found) - len(":@")]
        if (
            found[0] not in "$<{%[*"
            and found != user  # `postgres:postgres`
            and not made_up(found + "_abcdefg1"[:6])
            and found != "password"
        ):
            yield Span(match.start(1), match.end(1), "password")


def emails(text: str) -> Iterator[Span]:
    """E-mail addresses of people."""
    if "@" not in text:
        return
    for match in _DOMAIN.finditer(text):
        at = match.start()
        before = text[max(at - _LONGEST_LOCAL, 0) : at]
        local = before[len(before.rstrip(_LOCAL)) :].lstrip(".%+-")
        domain = match[0][1:].lower()
        if (
            "://" in before[: -len(local) or None][-_LONGEST_LOCAL:]
            and before[-len(local) - 1 :][:1] == ":"
        ):
            continue  # a URL's password and host
        if (
            local
            and local.lower() not in _NOBODY
            and domain.rpartition(".")[2] not in _FILES
            and text[match.end() : match.end() + 1] != "("  # `q@k.transpose(0, 1)`
            and text[match.end() : match.end() + 2] not in (":/", ":~")  # `scp x a@b.c:/d`
            and not _LOGIN.search(text[max(at - _LONGEST_LOGIN, 0) : at - len(local)])
            and not f".{domain}".endswith(_NO_DOMAINS)
        ):
            yield Span(at - len(local), match.end(), "email")
