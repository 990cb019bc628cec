"""Who may see and change what: key, login, forms, other sites, and the headers of every answer."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from nextstate.app.page.logins import LASTS_S, MOST_LOGINS, Logins
from nextstate.keys import Key, Scope, hashed, new_key
from nextstate.store import Store
from proxy.allowance import Allowance
from proxy.keys import Keys
from proxy.lineages import Access, Lineages
from proxy.tries import Tries
from tests.page.running_page import Site, on_site, token_in
from tests.store.test_records import add, turn

KEY = "the-proxy-key"
DRAWN = "0f1c8a7be24d95613c7e0f1c8a7be24d95613c7e0f1c8a7be24d95613c7e0f1c"
"""As `openssl rand -hex 32` makes one."""
PAGES = (
    *("/", "/page", "/page/turns", "/page/turns/turn_0", "/page/turns/turn_0/text/reply"),
    *("/page/versions", "/page/versions/main/0", "/page/versions/main/0/rollback"),
    *("/page/lineages/main/pause", "/page/lineages/main/resume", "/page/nothing"),
    *("/page/turns/turn_0/forget", "/page/session/forget?name=s"),
    *("/page/sessions", "/page/session?name=s", "/page/episodes", "/page/episodes/e-1"),
    *("/page/episodes/e-1/pictures/0", "/page/running", "/page/export?what=sft"),
)
FORMS = (
    *("/page/turns/turn_0/feedback", "/page/versions/main/0/rollback"),
    *("/page/lineages/main/pause", "/page/lineages/main/resume", "/page/logout"),
    *("/page/turns/turn_0/forget", "/page/session/forget?name=s", "/page/export"),
)


@pytest.mark.parametrize("path", PAGES)
def test_with_a_key_no_page_is_shown_without_a_login(
    store: Store, tmp_path: Path, path: str
) -> None:
    add(store, turn(0))

    async def test(site: Site) -> None:
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}, {"Cookie": "nextstate-8080=x"}):
            answer = await site.http.get(site.url + path, headers=headers, allow_redirects=False)
            assert (answer.status, answer.headers["Location"]) == (303, "/page/login")
            assert await answer.read() == b""

    on_site(test, store, tmp_path, KEY)


def test_a_login_sets_a_cookie_without_the_key_and_a_logout_ends_it(
    store: Store, tmp_path: Path
) -> None:
    async def test(site: Site) -> None:
        answer = await site.http.post(
            f"{site.url}/page/login", data={"key": KEY}, allow_redirects=False
        )
        assert (answer.status, answer.headers["Location"]) == (303, "/")
        cookie = answer.headers["Set-Cookie"]
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {*cookie.split("; ")}
        assert KEY not in cookie
        token = cookie.split("=")[1].split(";")[0]
        (file,) = (store.dir / "logins").iterdir()
        assert KEY not in file.read_text()
        assert token not in file.read_text() + file.name
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "Is it learning?" in await site.get("/")
        assert "Log in" in await site.submit("/", "/page/logout")
        stolen = {"Cookie": cookie.split(";")[0]}
        answer = await site.http.get(site.url, headers=stolen, allow_redirects=False)
        assert answer.status == 303

    on_site(test, store, tmp_path, KEY)


def test_wrong_keys_are_slowed_down(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for n in range(Tries.AT_ONCE):
            wrong = await site.post("/page/login", {"key": f"no {n}"}, 403)
            assert "not the proxy&#39;s key" in wrong
        answer = await site.http.post(f"{site.url}/page/login", data={"key": KEY})
        assert answer.status == 429
        assert 0 < int(answer.headers["Retry-After"]) <= Tries.REFILL_S

    on_site(test, store, tmp_path, KEY)


def test_guesses_do_not_keep_a_key_out_that_nobody_can_guess(store: Store, tmp_path: Path) -> None:
    """Another account of this machine has the same address."""
    made = new_key()
    store.keys.add(Key("ann", hashed(made), frozenset((Scope.READ,)), None, 1.0))

    async def test(site: Site) -> None:
        for key in (made, DRAWN):
            for n in range(Tries.AT_ONCE):
                await site.http.post(f"{site.url}/page/login", data={"key": f"no {n}"})
            answer = await site.http.post(f"{site.url}/page/login", data={"key": "one more"})
            assert answer.status == 429
            answer = await site.http.post(
                f"{site.url}/page/login", data={"key": key}, allow_redirects=False
            )
            assert answer.status == 303
        bearer = {"Authorization": f"Bearer {DRAWN}"}
        assert (await site.http.get(f"{site.url}/v1/models", headers=bearer)).status == 200

    on_site(test, store, tmp_path, DRAWN)


def test_requests_for_the_page_count_with_those_of_the_api(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        now = [0.0]
        site.proxy.requests = site.page._requests = Allowance(3, 60.0, lambda: now[0])  # pyright: ignore[reportPrivateUsage]
        await site.post("/page/login", {"key": KEY})  # and the page that it leads to
        models = f"{site.url}/v1/models"
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert (await site.http.get(models, headers=bearer)).status == 200
        for asked in (site.http.get(site.url), site.http.get(models, headers=bearer)):
            answer = await asked
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        again = await site.http.post(f"{site.url}/page/login", data={"key": KEY})
        assert again.status == 429
        now[0] = 1.0
        assert "Is it learning?" in await site.get("/")

    on_site(test, store, tmp_path, KEY)


def test_tries_come_back_one_by_one_for_each_address() -> None:
    now = [100.0]
    tries = Tries(lambda: now[0])
    for _ in range(Tries.AT_ONCE):
        assert tries.wait_s("a") == 0
        tries.failed("a")
    assert tries.wait_s("a") == 10
    assert tries.wait_s("b") == 0
    now[0] += 10
    assert tries.wait_s("a") == 0
    tries.failed("a")
    assert tries.wait_s("a") == 10


def test_tries_forget_the_address_that_failed_longest_ago() -> None:
    tries = Tries(lambda: 0.0)
    for number in range(Tries.MOST_ADDRESSES + 1):
        for _ in range(Tries.AT_ONCE):
            tries.failed(str(number))
    assert tries.wait_s("0") == 0
    assert tries.wait_s("1") > 0


def logins(folder: Path, clock: float = 1000.0, main: str = "k", alice: str = "a") -> Logins:
    lineages = Lineages("m", main, {"alice": Access(None, alice)})
    return Logins(folder / "logins", Keys(lineages), lambda: clock)


def who(found: Logins, token: str) -> str | None:
    grant = found.caller(token)
    return None if grant is None else grant.lineage


def test_a_login_is_known_to_every_worker_until_it_ends(tmp_path: Path) -> None:
    token, other = logins(tmp_path).begin("k"), logins(tmp_path).begin("a")
    assert token is not None
    assert other is not None
    assert logins(tmp_path).begin("wrong") is None
    assert who(logins(tmp_path), token) == "main"
    assert who(logins(tmp_path), other) == "alice"
    assert logins(tmp_path, main="changed").caller(token) is None
    assert logins(tmp_path).caller(token) is None  # it has ended for good
    assert logins(tmp_path, 1000.0 + LASTS_S).caller(other) is None


@pytest.mark.parametrize(
    "text", ["", "x", "[]", '{"until": 1e999}', '{"caller": [], "proof": 3}', "\\ud800", '{"a":']
)
def test_a_broken_file_of_a_login_is_no_login(tmp_path: Path, text: str) -> None:
    token = "t" * 43
    file = tmp_path / "logins" / hashlib.sha256(token.encode()).hexdigest()
    file.parent.mkdir()
    file.write_text(text)
    assert logins(tmp_path).caller(token) is None


@pytest.mark.parametrize("until", [None, "soon", True, [], {}])
def test_a_login_without_a_time_is_over(tmp_path: Path, until: object) -> None:
    token = logins(tmp_path).begin("k")
    assert token is not None
    (file,) = (tmp_path / "logins").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"until": until}))
    assert logins(tmp_path).caller(token) is None


@pytest.mark.parametrize(
    "token", ["", "../x", "a/b", "é" * 43, "t" * 42, "t" * 44, "t" * 42 + "\n"]
)
def test_a_cookie_of_another_form_reads_no_file(tmp_path: Path, token: str) -> None:
    assert logins(tmp_path).caller(token) is None
    logins(tmp_path).end(token)


def test_the_oldest_login_ends_when_there_are_too_many(tmp_path: Path) -> None:
    tokens: list[str] = []
    for number in range(MOST_LOGINS + 1):
        token = logins(tmp_path).begin("k")
        assert token is not None
        file = tmp_path / "logins" / hashlib.sha256(token.encode()).hexdigest()
        os.utime(file, (number, number))
        tokens.append(token)
    assert logins(tmp_path).caller(tokens[0]) is None
    assert who(logins(tmp_path), tokens[1]) == "main"


@pytest.mark.parametrize("path", FORMS)
@pytest.mark.parametrize("key", [None, KEY])
def test_a_form_counts_only_with_its_token_from_the_page_itself(
    store: Store, tmp_path: Path, path: str, key: str | None
) -> None:
    add(store, turn(0))

    async def test(site: Site) -> None:
        if key is not None:
            await site.post("/page/login", {"key": key})
        token = token_in(await site.get("/page/turns/turn_0"))
        fields = {"score": "1", "token": token}
        for wrong in ({}, {"token": ""}, {"token": "0" * 64}, {"token": token[:-1] + "é"}):
            await site.post(path, {"score": "1"} | wrong, 403)
        for headers in (
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost:3000"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Origin": site.url, "Sec-Fetch-Site": "cross-site"},
        ):
            await site.post(path, fields, 403, headers)
        site.http.cookie_jar.clear()
        await site.post(path, fields, 403)
        assert store.judging.feedback("turn_0") is None
        assert store.versions.decisions("main").after == -1

    on_site(test, store, tmp_path, key)


def test_without_a_key_another_host_or_site_sees_nothing(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for path in (*PAGES, "/page/login", "/page/style.css"):
            for headers in (
                {"Host": "evil.example"},
                {"Origin": "http://evil.example"},
                {"Sec-Fetch-Site": "cross-site"},
            ):
                assert "question" not in await site.get(path, 403, headers)
        await site.get("/", 200, {"Host": "localhost:8080"})

    on_site(test, store, tmp_path)


def test_every_answer_forbids_foreign_scripts_and_frames(store: Store, tmp_path: Path) -> None:
    add(store, turn(0))

    async def test(site: Site) -> None:
        for path in (*PAGES, "/page/login", "/page/style.css", "/page/icon.svg"):
            answer = await site.http.get(site.url + path, headers={"Origin": site.url})
            page = await answer.text()
            policy = answer.headers["Content-Security-Policy"]
            assert policy == (
                "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
                "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
            )
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "same-origin"
            assert answer.headers["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert " style=" not in page
            for name in ("htmx.min.js", "hx-sse.min.js"):
                page = page.replace(f'<script src="/page/htmx/{name}"></script>', "")
            assert "<script" not in page
            assert "<style" not in page

    on_site(test, store, tmp_path)


def test_odd_requests_get_an_answer_in_words(store: Store, tmp_path: Path) -> None:
    add(store, turn(0))

    async def test(site: Site) -> None:
        for method, status in (("PUT", 405), ("DELETE", 405), ("OPTIONS", 405)):
            answer = await site.http.request(method, f"{site.url}/page/turns")
            assert answer.status == status
        answer = await site.http.head(f"{site.url}/page/turns")
        assert (answer.status, await answer.read()) == (200, b"")
        path = f"{site.url}/page/turns/turn_0/feedback"
        answer = await site.http.post(path, json={"score": 1})
        assert answer.status == 415
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for data in (b"a=%ff&b=\xff", b"&".join(b"f%d=1" % n for n in range(100))):
            answer = await site.http.post(path, data=data, headers=form)
            assert answer.status == 400
        answer = await site.http.post(path, data=b"x" * (1 << 17), headers=form)
        assert answer.status == 413
        await site.get("/page/turns?before=" + "9" * 400, 400)
        await site.get("/page/turns?session=%00%ff%ed%a0%80")
        await site.get("/page/turns?version=999999999999")

    on_site(test, store, tmp_path)


def test_the_api_answers_as_before(store: Store, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        answer = await site.http.get(f"{site.url}/v1/models")
        assert answer.status == 401
        answer = await site.http.get(f"{site.url}/pages")
        assert answer.status == 401

    on_site(test, store, tmp_path, KEY)
