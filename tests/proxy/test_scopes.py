"""Every route says which scope it needs, and a key may do only what its scopes say."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextstate.app.page import routes
from nextstate.keys import Key, Scope, hashed, new_key
from nextstate.store import Store
from proxy.paths import EPISODES, GENERATING, MODELS, OURS, PROBED
from proxy.scopes import ANY, TABLE, needed
from tests.page.running_page import Site, on_site
from tests.proxy.running_proxy import Running, both, request
from tests.scripted_engine import ScriptedEngine


def add_key(store: Store, name: str, *scopes: Scope, lineage: str | None = None) -> str:
    """A new key of the store."""
    key = new_key()
    store.keys.add(Key(name, hashed(key), frozenset(scopes), lineage, 1.0))
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def page_templates() -> Iterator[str]:
    """The page's own routes, with `{}` for what a path names."""
    patterns = (*routes._SHOWN, *routes._CHANGED)  # pyright: ignore[reportPrivateUsage]
    for pattern, _ in patterns:
        for path in pattern.pattern.split("|") if "(" not in pattern.pattern else [pattern.pattern]:
            yield re.sub(r"\((?:[^()]|\([^()]*\))*\)", "{}", path)
    yield from routes._STATIC  # pyright: ignore[reportPrivateUsage]
    yield from ("/page/login", "/page/logout", "/page/events")


def test_every_route_is_in_the_table_and_the_table_has_no_other(
    store: Store, tmp_path: Path
) -> None:
    async def test(engine: ScriptedEngine, p: Running) -> None:
        ours = set(p.proxy._own_routes)  # pyright: ignore[reportPrivateUsage]
        assert ours == OURS
        one = {f"{EPISODES}/{{}}{path}" for path in ("", "/trace", "/rewards", "/close")}
        with pytest.raises(Exception, match="known are") as raised:
            p.proxy.episodes.routes_of_one(f"{EPISODES}/e-1/nothing")
        told = re.findall(r"/v1/episodes/\{id\}[a-z/]*", str(raised.value))
        assert {path.replace("{id}", "{}") for path in told} == one
        of_engine = {*GENERATING, MODELS, *PROBED}
        assert set(TABLE) == ours | one | of_engine | {*page_templates()}
        assert all(ANY in methods for methods in TABLE.values())

    both(test, store, tmp_path)


def test_what_the_table_does_not_know_is_not_open() -> None:
    assert needed("GET", "/v1/episodes/e-1/new") is Scope.ADMIN
    assert needed("POST", "/page/new") is Scope.ADMIN
    assert needed("GET", "/page/turns/a/b/c") is Scope.ADMIN
    assert needed("GET", "/v1/new") is Scope.CHAT
    assert needed("DELETE", "/page/turns") is Scope.ADMIN


CALLS: dict[Scope, tuple[str, str, Any]] = {
    Scope.CHAT: ("POST", "/v1/chat/completions", request()),
    Scope.FEEDBACK: ("POST", "/v1/feedback", {"turn_id": "turn_none", "score": 1}),
    Scope.READ: ("GET", "/metrics", None),
    Scope.EPISODES: ("POST", "/v1/episodes", {"environment": "e", "task": "t"}),
}
"""What only this scope and admin may do."""


@pytest.mark.parametrize("scope", Scope)
def test_a_key_may_do_what_its_scope_says_and_nothing_else(
    store: Store, tmp_path: Path, scope: Scope
) -> None:
    key = add_key(store, "k", scope)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        for other, (method, path, body) in CALLS.items():
            answer = await p.http.request(method, p.url + path, json=body, headers=bearer(key))
            told = (await answer.read()).decode()
            if scope in (other, Scope.ADMIN):
                assert answer.status in (200, 404)
                assert "scope" not in told
            else:
                assert answer.status == 403
                assert f"scope {other}" in told
                assert key not in told
        answer = await p.http.post(p.url + CALLS[Scope.CHAT][1], json=request())
        assert answer.status == 401  # the first key of the store closes the proxy
        assert (await p.http.get(f"{p.url}/healthz")).status == 200

    both(test, store, tmp_path)


def test_a_chat_key_cannot_speak_in_another_ones_episode(store: Store, tmp_path: Path) -> None:
    chat, runs = add_key(store, "chat", Scope.CHAT), add_key(store, "runs", Scope.EPISODES)

    async def test(engine: ScriptedEngine, p: Running) -> None:
        asked = {"environment": "e", "task": "t", "episode": "e-1"}
        answer = await p.http.post(f"{p.url}/v1/episodes", json=asked, headers=bearer(runs))
        opened = await answer.json()
        for path, more in (
            ("/v1/chat/completions", {"X-NextState-Episode": "e-1"}),
            ("/episodes/e-1/v1/chat/completions", {}),
        ):
            answer = await p.http.post(p.url + path, json=request(), headers=bearer(chat) | more)
            assert answer.status == 403
        own = bearer(opened["api_key"])
        url = opened["base_url"] + "/chat/completions"
        assert (await p.http.post(url, json=request(), headers=own)).status == 200
        named = bearer(chat) | {"X-Session-Id": "e-1"}  # a session that happens to be called so
        status, _, headers = await p.chat(request(), named)
        assert status == 200
        turn = store.turns.get(headers["x-nextstate-turn"])
        assert turn is not None
        assert turn.episode is None

    both(test, store, tmp_path)


@pytest.mark.parametrize(
    ("scope", "looks", "changes"),
    [
        (Scope.READ, True, False),
        (Scope.ADMIN, True, True),
        (Scope.CHAT, False, False),
        (Scope.EPISODES, False, False),
    ],
)
def test_the_page_is_for_keys_that_may_read_and_its_buttons_for_admins(
    store: Store, tmp_path: Path, scope: Scope, looks: bool, changes: bool
) -> None:
    key = add_key(store, "k", scope)

    async def test(site: Site) -> None:
        answer = await site.http.post(f"{site.url}/page/login", data={"key": key})
        assert answer.status == (200 if looks else 403)
        if not looks:
            return
        home = await site.get("/")
        assert "Is it learning?" in home
        assert ("Pause the training" in home) is changes
        pause = "/page/lineages/main/pause"
        answer = await site.http.get(site.url + pause)
        assert answer.status == (200 if changes else 403)
        export = "/page/export"
        assert ("<button>Download" in await site.get(f"{export}?what=sft")) is changes
        for path in (pause, export):
            sent = await site.http.post(site.url + path, data={"token": "x"})
            told = await sent.text()
            assert sent.status == 403  # an admin's, because the form has a wrong token
            assert ("too old" in told) is changes
        store.keys.revoke("k")
        async with asyncio.timeout(10):
            while "Log in" not in await site.get("/"):
                await asyncio.sleep(0.05)

    on_site(test, store, tmp_path)
