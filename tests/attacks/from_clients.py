"""What a client with a key that may too little, or an agent with a key of its own, can ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tests.attacks.from_pages import ASKED, CHAT, FEEDBACK
from tests.attacks.lab import TAUGHT, Attack, Attacker
from tests.proxy.running_proxy import request
from tests.proxy.test_guard import BOMBS

SAID = {"turn_id": "$turn$", "score": 1, "hint": TAUGHT}
EPISODE = {"environment": "e", "task": TAUGHT}
REWARDS = [{"kind": "outcome", "value": 1.0}]

BY_SCOPE: Sequence[tuple[str, str, str, Any]] = (
    # (route, which scope may, method, body), written down apart from proxy/scopes.py
    (CHAT, "chat", "POST", ASKED),
    ("/v1/completions", "chat", "POST", {"model": "base", "prompt": TAUGHT}),
    ("/v1/messages", "chat", "POST", ASKED | {"max_tokens": 5}),
    ("/v1/responses", "chat", "POST", {"model": "base", "input": TAUGHT}),
    ("/v1/models", "chat", "GET", None),
    ("/tokenize", "chat", "POST", ASKED),
    ("/v1/embeddings", "chat", "POST", {"model": "base", "input": TAUGHT}),
    (FEEDBACK, "feedback", "POST", SAID),
    ("/metrics", "read", "GET", None),
    ("/v1/episodes", "episodes", "POST", EPISODE),
    ("/v1/groups", "episodes", "POST", EPISODE | {"group_size": 2}),
    ("/v1/episodes/e-main", "episodes", "GET", None),
    ("/v1/episodes/e-main/trace", "episodes", "GET", None),
    ("/v1/episodes/e-main/rewards", "episodes", "POST", REWARDS),
    ("/v1/episodes/e-main/close", "episodes", "POST", {"status": "done"}),
    ("/v1/episodes/e-main/turns", "admin", "GET", None),
    ("/v1/feedback/all", "chat", "GET", None),
)


def bearer(key: str, *more: str) -> tuple[str, ...]:
    return (f"Authorization: Bearer ${key}$", *more)


def _scopes() -> Iterator[Attack]:
    for path, may, method, body in BY_SCOPE:
        for scope in ("chat", "feedback", "read", "episodes"):
            if scope != may:
                yield Attack(
                    f"{method} {path} with a key for {scope}",
                    Attacker.CLIENT,
                    path,
                    403,
                    bearer(scope),
                    body,
                    method,
                )
        if may != "chat":
            yield Attack(
                f"{method} {path} with an episode's key",
                Attacker.CLIENT,
                path,
                403,
                bearer("episode-key"),
                body,
                method,
            )


def _lineages() -> Iterator[Attack]:
    """A key that is bound to one lineage, or to none, and what belongs to another one."""
    bound = bearer("alice-episodes")
    for path, body in (
        ("/v1/episodes/e-main", None),
        ("/v1/episodes/e-main/trace", None),
        ("/v1/episodes/e-main/rewards", REWARDS),
        ("/v1/episodes/e-main/close", {"status": "aborted"}),
    ):
        yield Attack(f"another lineage's {path}", Attacker.CLIENT, path, 404, bound, body)
    for how, body, status in (
        ("an episode in main", EPISODE | {"lineage": "main"}, 400),
        ("an episode in bob's", EPISODE | {"lineage": "bob"}, 400),
        ("an episode in no lineage", EPISODE | {"lineage": "../main"}, 400),
        ("main's episode again", EPISODE | {"episode": "e-main", "task": "x"}, 409),
        ("a version of no lineage", EPISODE | {"version": 10**9}, 400),
    ):
        yield Attack(f"alice opens {how}", Attacker.CLIENT, "/v1/episodes", status, bound, body)
    for key, turn in (("alice-chat", "turn"), ("chat", "bob-turn"), ("feedback", "bob-turn")):
        status = 404 if key == "feedback" else 403
        yield Attack(
            f"feedback on ${turn}$ by {key}",
            Attacker.CLIENT,
            FEEDBACK,
            status,
            bearer(key),
            SAID | {"turn_id": f"${turn}$"},
        )
    for model in ("bob", "main", "main-v000001-0123456789abcdef", "alice-v000001-x", "/tmp/x", ""):
        key = "alice-chat" if model != "" else "read"
        status = (400, 404, 403)
        yield Attack(
            f"the model {model!r} by {key}",
            Attacker.CLIENT,
            CHAT,
            status,
            bearer(key),
            ASKED | {"model": model},
            reaches=True,
        )
    yield Attack(
        "the metrics of all by one lineage", Attacker.CLIENT, "/metrics", 403, bearer("alice-read")
    )
    for how, lines in (
        ("a header", ("X-NextState-Episode: e-main",)),
        ("our own header", ("X-NextState-Path-Episode: e-main",)),
    ):
        yield Attack(
            f"alice speaks in main's episode by {how}",
            Attacker.CLIENT,
            CHAT,
            403,
            bearer("alice-chat", *lines),
            ASKED,
        )
    for path in ("/episodes/e-main/v1/chat/completions", "/episodes/e-main/v1/v1/messages"):
        yield Attack(
            f"alice speaks in {path}",
            Attacker.CLIENT,
            path,
            403,
            bearer("alice-chat"),
            ASKED | {"max_tokens": 5},
        )
    yield Attack(
        "main's episode by alice's key for episodes",
        Attacker.CLIENT,
        "/episodes/e-main/v1/chat/completions",
        (403, 404),
        bearer("alice-episodes"),
        ASKED,
    )
    yield Attack(
        "another episode by an episode's key",
        Attacker.CLIENT,
        "/episodes/e-other/v1/chat/completions",
        404,
        bearer("episode-key"),
        ASKED,
    )


def _ids() -> Iterator[Attack]:
    """Ids that are paths, patterns, numbers or nothing."""
    for how, name in (
        ("a path", "..%2f..%2fetc%2fpasswd"),
        ("dots", ".."),
        ("a dot", "."),
        ("a NUL", "e%00"),
        ("a line's end", "e%0d%0aX:%20y"),
        ("a query", "e-main%3fx"),
        ("a quote", "e'--"),
        ("a pattern", "%25"),
        ("a wildcard", "*"),
        ("long", "e" * 4000),
        ("no text", "%ff%fe"),
        ("full width", "%ef%bd%85-main"),
        ("another case", "E-MAIN"),
        ("a space", "e-main%20"),
    ):
        yield Attack(
            f"an episode whose id is {how}",
            Attacker.CLIENT,
            f"/v1/episodes/{name}",
            (403, 404),
            bearer("episodes"),
        )
        yield Attack(
            f"a chat in an episode whose id is {how}",
            Attacker.CLIENT,
            f"/episodes/{name}/v1/chat/completions",
            (400, 404),
            bearer("player"),
            ASKED,
        )
    for how, name in (
        ("a path", "../../x"),
        ("empty", ""),
        ("a NUL", "e\0"),
        ("a line's end", "e\r\nx"),
        ("long", "e" * 101),
        ("a number", 7),
        ("a list", ["e"]),
        ("markup", "<script>"),
        ("half a letter", "\ud800"),
        ("an escape", "\x1b[2J"),
    ):
        body: Any = EPISODE | {"episode": name}
        if how == "half a letter":
            body = '{"environment": "e", "task": "t", "episode": "\\ud800"}'
        yield Attack(
            f"opens an episode whose id is {how}",
            Attacker.CLIENT,
            "/v1/episodes",
            400,
            bearer("episodes", "Content-Type: application/json"),
            body,
        )
    for how, turn in (
        ("a path", "../turn"),
        ("a pattern", "turn_%"),
        ("a NUL", "turn_\0"),
        ("long", "t" * 9999),
        ("SQL", "x' OR '1'='1"),
        ("a template", "{{7*7}}"),
        ("an escape", "\x1b]0;x\x07"),
    ):
        yield Attack(
            f"feedback on a turn whose id is {how}",
            Attacker.CLIENT,
            FEEDBACK,
            (400, 404),
            bearer("feedback"),
            SAID | {"turn_id": turn},
        )


def _named_things() -> Iterator[Attack]:
    """Names that are shown, counted and written into files."""
    for what, name in (
        ("a metric", 'e"} 1\nnextstate_evil{x="'),
        ("a path", "../../e"),
        ("a script", "<script>"),
        ("an escape", "\x1b[2J"),
        ("a NUL", "e\0"),
        ("nothing", ""),
        ("a list", ["e"]),
        ("a line's end", "e\nf"),
        ("from right to left", "a\u202eb"),
        ("at length", "e" * 1000),
    ):
        for field in ("environment", "group", "lineage"):
            more = {"group_size": 2} if field == "group" else {}
            yield Attack(
                f"an episode whose {field} is called {what}",
                Attacker.CLIENT,
                "/v1/episodes",
                400,
                bearer("episodes"),
                EPISODE | more | {field: name},
            )


def _engine_administration() -> Iterator[Attack]:
    """The agent's shell asks the proxy for what administers the engine."""
    load = {"lora_name": "evil", "lora_path": "/tmp/evil"}
    for path in (
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/load%5flora%5fadapter",
        "/v1/./load_lora_adapter",
        "/v1/x/../load_lora_adapter",
        "/v1//load_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/%2e%2e/load_lora_adapter",
        "/load_lora_adapter",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/v1/sleep",
        "/v1/reset_prefix_cache?x=1",
        "/pause",
        "/resume",
        "/collective_rpc",
        "/start_profile",
        "/shutdown",
        "/server_info",
        "/invocations",
        "/inference/v1/generate",
        "/abort_requests",
        "/update_weights",
        "/v1/../metrics",
        "/v1/%252e%252e/sleep",
        "/openapi.json",
        "/redoc",
        "/is_sleeping",
        "/scale_elastic_ep",
        "/v1\\..\\sleep",
        "/\\sleep",
        "/v1/chat/completions/../../../sleep",
    ):
        statuses = (400, 403, 404)
        yield Attack(f"asks for {path}", Attacker.SHELL, path, statuses, bearer("chat"), load)
    for path in (
        "/v1//chat/completions",
        "/V1/chat/completions",
        "/v1/chat/completions;v=1",
        "/v1/%2563hat/completions",
        "/chat/completions",
        "//v1/chat/completions",
    ):
        yield Attack(
            f"generates unseen by {path}", Attacker.SHELL, path, (403, 404), bearer("chat"), ASKED
        )


def _bombs() -> Iterator[Attack]:
    """Bodies that could end the engine, or the proxy that reads them."""
    fields: list[tuple[str, Any]] = [
        ("prompt log-probs", {"prompt_logprobs": 0}),
        ("an echo", {"echo": True, "logprobs": 1}),
        ("many choices", {"n": 100_000}),
        ("choices as a text", {"n": "1_000_000"}),
        ("a long bias", {"logit_bias": {str(n): 1 for n in range(2000)}}),
        ("many log-probs", {"logprobs": True, "top_logprobs": 10**6}),
        ("many words", {"bad_words": ["x"] * 999}),
        ("many stops", {"stop": ["x"] * 9999}),
        ("a repetition", {"repetition_detection": {"max_pattern_size": 10**6}}),
        ("a long choice", {"structured_outputs": {"choice": ["a" * 20_000]}}),
        ("a hungry grammar", {"structured_outputs": {"grammar": 'root ::= "a"{1000000000}'}}),
        ("a hungry pattern", {"structured_outputs": {"regex": "(a{5}){100001}"}}),
    ]
    for how, more in fields:
        yield Attack(f"asks with {how}", Attacker.SHELL, CHAT, 400, bearer("chat"), ASKED | more)
    for schema, message in BOMBS[:20:2]:
        body = ASKED | {"structured_outputs": {"json": schema}}
        yield Attack(f"a schema: {message}", Attacker.SHELL, CHAT, 400, bearer("chat"), body)
    for how, text in (
        ("deep arrays", "[" * 100_000),
        ("deep objects", '{"a":' * 100_000),
        ("deep within a message", '{"messages":' + "[" * 50_000 + "]" * 50_000 + "}"),
        ("a million values", '{"a":[' + "1," * 1_100_000 + "1]}"),
        ("300 000 objects", '{"a":[' + "{}," * 300_000 + "{}]}"),
        ("300 000 keys", "{" + ",".join(f'"k{n}":1' for n in range(300_000)) + "}"),
        ("a number of 100 000 digits", '{"model":"base","n":' + "9" * 100_000 + "}"),
        ("no JSON", "{'model': 'base'}"),
        ("half a body", '{"model": "base", "messages": [{'),
        ("a text alone", '"x"'),
        ("nothing but space", " " * 1000),
        ("NaN", '{"a": NaN}'),
        ("UTF-16", "\ufeff{}"),
        ("two objects", "{}{}"),
        ("bytes", "\udcff\udcfe{}"),
    ):
        only = (FEEDBACK,) if how in ("NaN", "UTF-16") else (CHAT,)  # the engine takes both
        for path in (CHAT, FEEDBACK) if len(text) < 200_000 and len(how) > 6 else only:
            key = "chat" if path == CHAT else "feedback"
            yield Attack(
                f"{how} to {path}",
                Attacker.SHELL,
                path,
                400,
                bearer(key, "Content-Type: application/json"),
                text,
                reaches=True,
            )
    for how, value in (
        ("infinite", "1e999"),
        ("huge", "9" * 400),
        ("no number", '"1"'),
        ("true", "true"),
        ("NaN", "NaN"),
        ("beyond", "2"),
        ("a list", "[1]"),
    ):
        text = f'{{"turn_id": "$turn$", "score": {value}}}'
        yield Attack(
            f"a score that is {how}",
            Attacker.CLIENT,
            FEEDBACK,
            400,
            bearer("feedback", "Content-Type: application/json"),
            text,
        )
        reward = f'[{{"kind": "outcome", "value": {value}}}]'
        if how != "beyond":
            yield Attack(
                f"a reward that is {how}",
                Attacker.CLIENT,
                "/v1/episodes/e-main/rewards",
                400,
                bearer("episodes", "Content-Type: application/json"),
                reward,
            )
    for coding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x-gzip", "GZIP"):
        yield Attack(
            f"a body in {coding}",
            Attacker.SHELL,
            CHAT,
            415,
            bearer("chat", f"Content-Encoding: {coding}", "Content-Type: application/json"),
            b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\0" * 64,
        )
    yield Attack(
        "a body beyond the limit",
        Attacker.SHELL,
        CHAT,
        413,
        bearer("chat", "Content-Type: application/json"),
        b" " * (9 << 20),
    )


def _headers() -> Iterator[Attack]:
    """Headers by which a client would like to be more than it is, or to leave no trace."""
    for how, line in (
        ("records half", "X-NextState-Record: perhaps"),
        ("records by a list", "X-NextState-Record: off, on"),
        ("an episode that is a path", "X-NextState-Episode: ../../e-main"),
        ("an episode of 9 kB", "X-NextState-Episode: " + "e" * 9000),
        ("an episode that is a script", "X-NextState-Episode: <script>alert(1)</script>"),
    ):
        yield Attack(
            how, Attacker.SHELL, CHAT, (400, 403, 404), bearer("episodes", line), request(TAUGHT)
        )


ATTACKS = [
    *_scopes(),
    *_lineages(),
    *_ids(),
    *_named_things(),
    *_engine_administration(),
    *_bombs(),
    *_headers(),
]
