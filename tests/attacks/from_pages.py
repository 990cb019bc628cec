"""What a web page can make a browser send, and what another account can without a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.attacks.lab import TAUGHT, Attack, Attacker
from tests.proxy.running_proxy import request

CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
ASKED = request(TAUGHT)
SAID = {"turn_id": "$open-turn$", "score": 1, "hint": TAUGHT}
FORM = "Content-Type: application/x-www-form-urlencoded"
CROSS = "Sec-Fetch-Site: cross-site"
EVIL = "Origin: http://evil.example"

SITES: list[tuple[tuple[str, ...], str]] = [
    ((EVIL,), "localhost"),
    (("Origin: https://evil.example:8080",), "127.0.0.1:8080"),
    (("Origin: null",), "localhost"),
    (("Origin:",), "localhost"),
    (("Origin: http://localhost.evil.example",), "localhost"),
    (("Origin: http://127.0.0.1.evil.example",), "localhost"),
    (("Origin: http://localhost@evil.example",), "localhost"),
    (("Origin: http://localhost:80@evil.example",), "localhost"),
    (("Origin: http://localhost\\.evil.example",), "localhost"),
    (("Origin: http://evil.example#@localhost",), "localhost"),
    (("Origin: http://evil.example/localhost",), "localhost"),
    (("Origin: http://10.1.2.3",), "10.1.2.3"),
    (("Origin: http://2130706433.evil.example",), "localhost"),
    (("Origin: http://ⓛocalhost",), "localhost"),
    (("Origin: data:text/html,x",), "localhost"),
    (("Origin: blob:http://localhost/x",), "localhost"),
    (("Origin: chrome-extension://abcdef",), "localhost"),
    (("Origin: javascript://localhost",), "localhost"),
    (("Origin: ftp://localhost",), "localhost"),
    (("Origin: http://localhost, http://evil.example",), "localhost"),
    (("Origin: http://localhost http://evil.example",), "localhost"),
    (("Origin: http://localhost", EVIL), "localhost"),
    (("Origin: HTTP://EVIL.EXAMPLE",), "localhost"),
    ((CROSS,), "localhost"),
    (("Sec-Fetch-Site: Cross-Site",), "localhost"),
    (("Sec-Fetch-Site: same-origin", CROSS), "localhost"),
    (("Sec-Fetch-Site: same-origin, cross-site",), "localhost"),
    (("Sec-Fetch-Site:",), "localhost"),
    ((), "evil.example"),
    ((), "evil.example:8080"),
    ((), "localhost.evil.example"),
    ((), "127.0.0.1.nip.io:8080"),
    ((), "93.184.216.34"),
    ((), "localhost:8080@evil.example"),
    ((), "[::1].evil.example"),
    ((), "[::1"),
    ((), "localhost:x"),
    ((), "evil.example, localhost"),
    ((), "localhost/evil.example"),
    (("Host: evil.example",), "localhost"),
    (("Origin: http://rebind.example", "Sec-Fetch-Site: same-origin"), "rebind.example"),
    (("X-Forwarded-Host: localhost", "X-Forwarded-For: 127.0.0.1"), "evil.example"),
    (("Forwarded: host=localhost;for=127.0.0.1",), "evil.example"),
    (("X-Original-Host: localhost", "X-Host: localhost"), "evil.example"),
]
"""Headers and Host of a page of another site, or of one whose name leads here."""
ROUTES: list[tuple[str, Any]] = [
    (CHAT, ASKED),
    (FEEDBACK, SAID),
    ("/v1/episodes", {"environment": "e", "task": TAUGHT}),
    ("/tokenize", ASKED),
    ("/v1/models", None),
    ("/metrics", None),
    ("/healthz", None),
    ("/page/turns/$open-turn$", None),
    ("/page/turns/$open-turn$/text/m0", None),
    ("/page/events", None),
]


def _sites() -> Iterator[Attack]:
    """Every way to look like our own page, each against one route; the plainest against all."""
    for number, (lines, host) in enumerate(SITES):
        chosen = ROUTES if number in (0, 23, 28) else [ROUTES[0], ROUTES[number % len(ROUTES)]]
        for target, body in {path: (path, body) for path, body in chosen}.values():
            name = f"{' '.join(lines) or 'a name'} at {host} asks {target}"
            yield Attack(name, Attacker.PAGE, target, 403, lines, body, closed=False, host=host)


def _simple() -> Iterator[Attack]:
    """Requests that a browser sends without asking first, by a form or a beacon."""
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        for path, body in (ROUTES[0], ROUTES[1], ROUTES[2]):
            lines = (f"Content-Type: {kind}", CROSS, "Sec-Fetch-Mode: no-cors")
            yield Attack(
                f"a form of {kind} to {path}", Attacker.PAGE, path, 403, lines, body, closed=False
            )
    # An old browser, or a program that a page talked into it, says nothing of where it comes from.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/json", "application/xml"):
        lines = (f"Content-Type: {kind}",)
        yield Attack(
            f"feedback as {kind} by no site",
            Attacker.PAGE,
            FEEDBACK,
            415,
            lines,
            SAID,
            closed=False,
        )
        yield Attack(
            f"an episode as {kind} by no site",
            Attacker.PAGE,
            "/v1/episodes",
            415,
            lines,
            ROUTES[2][1],
            closed=False,
        )


def _preflights() -> Iterator[Attack]:
    ask = "Access-Control-Request-Method: POST"
    for path in (CHAT, FEEDBACK, "/v1/episodes", "/healthz"):
        yield Attack(
            f"a preflight for {path}",
            Attacker.PAGE,
            path,
            403,
            (EVIL, ask),
            method="OPTIONS",
            closed=False,
        )
    private = "Access-Control-Request-Private-Network: true"
    yield Attack(
        "a preflight into the private network",
        Attacker.PAGE,
        CHAT,
        403,
        (EVIL, ask, private),
        method="OPTIONS",
        closed=False,
    )
    yield Attack(
        "a preflight for the page",
        Attacker.PAGE,
        "/page/turns",
        405,
        (ask, "Origin: http://localhost:3000"),
        method="OPTIONS",
        closed=False,
    )
    for override in ("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"):
        yield Attack(
            f"a GET that {override} calls a POST",
            Attacker.PAGE,
            "/page/lineages/main/pause",
            200,
            (f"{override}: POST",),
            closed=False,
            says="Pause",
        )
    yield Attack(
        "a field that calls a GET a POST",
        Attacker.PAGE,
        "/page/lineages/main/pause?_method=POST&token=x",
        200,
        closed=False,
        says="Pause",
    )


def _upgrades() -> Iterator[Attack]:
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ==")
    for path in (CHAT, "/page/events", "/v1/realtime"):
        yield Attack(
            f"a websocket to {path}",
            Attacker.PAGE,
            path,
            403,
            (*upgrade, "Sec-WebSocket-Version: 13", EVIL),
            closed=False,
        )
    yield Attack(
        "h2c with a request in its settings",
        Attacker.PAGE,
        "/page/turns",
        403,
        ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk", EVIL),
        closed=False,
    )


FORMS = (
    "/page/turns/$open-turn$/feedback",
    "/page/turns/$open-turn$/forget",
    "/page/lineages/main/pause",
    "/page/versions/main/0/rollback",
    "/page/export",
)
COOKIE = "Cookie: nextstate-8080=" + "t" * 43


def _forms() -> Iterator[Attack]:
    """Forms of our page that another page sends, or that nobody was shown."""
    for path in FORMS:
        yield Attack(
            f"{path} with another's token",
            Attacker.PAGE,
            path,
            403,
            (FORM, COOKIE),
            "score=1&token=" + "0" * 64,
            closed=False,
        )
    path, sound = FORMS[2], "token=" + "0" * 64
    headers: list[tuple[str, tuple[str, ...]]] = [
        ("without a cookie", (FORM,)),
        ("from a page of this machine", (FORM, COOKIE, "Origin: http://localhost:3000")),
        ("from nowhere", (FORM, COOKIE, "Origin: null")),
        ("from a site beside ours", (FORM, COOKIE, "Sec-Fetch-Site: same-site")),
        ("from another scheme", (FORM, COOKIE, "Origin: https://localhost:1")),
        ("with two cookies of our name", (FORM, f"{COOKIE}; nextstate-8080=" + "u" * 43)),
    ]
    for how, lines in headers:
        yield Attack(f"a form {how}", Attacker.PAGE, path, 403, lines, sound, closed=False)
    for how, body in (
        ("without a token", "score=1"),
        ("with an empty token", "token="),
        ("with two tokens", f"token={'0' * 64}&token=x"),
        ("with a token that is no text", "token=%ff%fe"),
        ("with a token in its address only", "a=b"),
    ):
        statuses = (400, 403)
        yield Attack(
            f"a form {how}",
            Attacker.PAGE,
            f"{path}?token={'0' * 64}",
            statuses,
            (FORM, COOKIE),
            body,
            closed=False,
        )
    yield Attack(
        "a form as JSON", Attacker.PAGE, path, 415, (COOKIE,), {"token": "0" * 64}, closed=False
    )
    yield Attack(
        "a form of many fields",
        Attacker.PAGE,
        path,
        400,
        (FORM, COOKIE),
        "&".join(f"f{n}=1" for n in range(200)),
        closed=False,
    )
    yield Attack(
        "a form of 128 kB", Attacker.PAGE, path, 413, (FORM, COOKIE), "a" * (1 << 17), closed=False
    )
    yield Attack(
        "a form that grows when it is unpacked",
        Attacker.PAGE,
        path,
        415,
        (FORM, COOKIE, "Content-Encoding: gzip"),
        b"\x1f\x8b\x08\0",
        closed=False,
    )


def _logins() -> Iterator[Attack]:
    """Logins that another page wants its victim to have, or that are guessed."""
    for how, lines in (
        ("another site", (EVIL,)),
        ("another port", ("Origin: http://localhost:3000",)),
        ("a frame", (CROSS, "Sec-Fetch-Dest: iframe")),
    ):
        yield Attack(
            f"a login for the victim by {how}",
            Attacker.PAGE,
            "/page/login",
            403,
            (FORM, *lines),
            "key=$read$",
        )
    yield Attack(
        "a logout by another site", Attacker.PAGE, "/page/logout", 403, (FORM, EVIL), "a=b"
    )
    for how, key in (
        ("no key", ""),
        ("a key of another scope", "$chat$"),
        ("a revoked key", "$revoked$"),
        ("an episode's key", "$episode-key$"),
        ("a hash", "%00" * 32),
        ("a list", "a&key[]=$read$x"),
    ):
        yield Attack(
            f"a login with {how}",
            Attacker.ACCOUNT,
            "/page/login",
            (403, 429),
            (FORM,),
            f"key={key}",
        )
    for how, value in (
        ("a path", "../" * 14 + "x"),
        ("another's file", "/etc/passwd"),
        ("43 letters", "t" * 43),
        ("no letters", "é" * 43),
        ("a line's end", "t" * 42 + "%0a"),
        ("a hash", "0" * 64),
        ("a NUL", "t" * 20 + "%00" + "t" * 22),
    ):
        cookie = f"Cookie: nextstate-8080={value}"
        yield Attack(
            f"a cookie that is {how}",
            Attacker.ACCOUNT,
            "/page/turns",
            303,
            (cookie,),
            says="/page/login",
        )


def _without_key() -> Iterator[Attack]:
    """Another account, which reaches the port and has no key."""
    api: list[tuple[str, Any]] = [
        (CHAT, ASKED),
        ("/v1/completions", {"model": "base", "prompt": TAUGHT}),
        ("/v1/messages", ASKED | {"max_tokens": 5}),
        ("/v1/responses", {"model": "base", "input": TAUGHT}),
        ("/v1/messages/count_tokens", ASKED),
        (FEEDBACK, SAID),
        ("/v1/episodes", {"environment": "e", "task": TAUGHT}),
        ("/v1/groups", {"environment": "e", "task": TAUGHT, "group_size": 2}),
        ("/v1/episodes/e-main", None),
        ("/v1/episodes/e-main/trace", None),
        ("/v1/episodes/e-main/rewards", [{"kind": "outcome", "value": 1.0}]),
        ("/v1/episodes/e-main/close", {"status": "done"}),
        ("/episodes/e-main/v1/chat/completions", ASKED),
        ("/v1/models", None),
        ("/metrics", None),
        ("/tokenize", ASKED),
        ("/detokenize", {"tokens": [1]}),
        ("/version", None),
        ("/load", None),
        ("/v1/embeddings", {"model": "base", "input": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/tmp"}),
        ("/docs", None),
    ]
    for path, body in api:
        yield Attack(f"{path} without a key", Attacker.ACCOUNT, path, 401, (), body)
    for path in (
        *("/", "/page", "/page/turns", "/page/turns/$turn$", "/page/turns/$turn$/text/m0"),
        *("/page/turns/$turn$/forget", "/page/sessions", "/page/session?name=$session$"),
        *("/page/session/forget?name=$session$", "/page/episodes", "/page/episodes/e-main"),
        *("/page/episodes/e-main/pictures/0", "/page/versions", "/page/versions/main/0"),
        *("/page/versions/main/0/rollback", "/page/lineages/main/pause", "/page/running"),
        *("/page/lineages/main/resume", "/page/export?what=sft", "/page/nothing"),
    ):
        yield Attack(f"{path} without a login", Attacker.ACCOUNT, path, 303)
    yield Attack("events without a login", Attacker.ACCOUNT, "/page/events", 403)
    wrong: list[tuple[str, tuple[str, ...]]] = [
        ("a wrong key", ("Authorization: Bearer ns-wrong",)),
        ("a key that was revoked", ("Authorization: Bearer $revoked$",)),
        ("a key in small letters", ("Authorization: Bearer $CHAT$",)),
        ("a key with more behind it", ("Authorization: Bearer $chat$x",)),
        ("two keys", ("Authorization: Bearer $chat$, Bearer $chat$",)),
        ("a key as Basic", ("Authorization: Basic $chat$",)),
        ("a key without its kind", ("Authorization: $chat$",)),
        ("a key in a query", ()),
        ("a key in a cookie", ("Cookie: key=$chat$; Authorization=$chat$",)),
        ("a key of the proxy before this one", ("Proxy-Authorization: Bearer $chat$",)),
        ("the hash of no key", ("Authorization: Bearer " + "0" * 64,)),
        ("an episode's key that nobody has", ("Authorization: Bearer ep-" + "0" * 32,)),
        ("a key of 100 kB", ("Authorization: Bearer " + "k" * 100_000,)),
        ("a key that is no text", ("Authorization: Bearer \udcff\udcfe",)),
        ("no key, by an address that is trusted elsewhere", ("X-Forwarded-For: 127.0.0.1",)),
        ("no key, by a name that is trusted elsewhere", ("X-Remote-User: admin",)),
        ("no key, for an episode", ("X-NextState-Episode: e-main",)),
        ("no key, by a path that a proxy wrote", ("X-Original-URL: /healthz", "X-Rewrite-URL: /x")),
    ]
    for how, lines in wrong:
        path = f"{CHAT}?api_key=$chat$&key=$chat$" if how.endswith("query") else CHAT
        yield Attack(f"a chat with {how}", Attacker.ACCOUNT, path, (401, 429), lines, ASKED)


ATTACKS = [
    *_sites(),
    *_simple(),
    *_preflights(),
    *_upgrades(),
    *_forms(),
    *_logins(),
    *_without_key(),
]
