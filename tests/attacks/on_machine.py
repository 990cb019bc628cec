"""Another account, the agent's own shell and a stolen disk: files, environments, logins."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from nextstate.app.own_key import own_key_file, write_own_key
from nextstate.app.page.logins import form_token
from nextstate.app.part_environment import part_environment
from nextstate.config import StoreConfig
from nextstate.errors import NextStateError
from nextstate.keys import Scope, hashed
from nextstate.store import Store
from tests.attacks.from_pages import FORMS
from tests.attacks.lab import WORD, Attacker, Lab, condition
from tests.page.running_page import settings_of

NOBODY = 65534
_READS = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
root, pid = sys.argv[1:]
found = []
for folder, _, files in os.walk(root):
    found += [os.path.join(folder, name) for name in files]
for name in (*found, f"/proc/{pid}/environ", f"/proc/{pid}/mem", *sys.stdin.read().split("\\n")):
    try:
        open(name, "rb").read(1)
        print("read", name)
    except OSError:
        pass
    try:
        os.rename(name, name + "-x")
        print("moved", name)
    except OSError:
        pass
try:
    os.kill(int(pid), 0)
    print("may signal")
except OSError:
    pass
"""


@condition(Attacker.ACCOUNT)
async def another_account_reads_moves_and_signals_nothing(lab: Lab) -> None:
    if os.geteuid() != 0:
        return  # nobody else can be played
    for door in (lab.open, lab.closed):
        folder = door.proxy.store.dir
        files = [str(path) for path in folder.rglob("*")]
        assert files
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            _READS,
            str(folder),
            str(os.getpid()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        told, wrong = await process.communicate("\n".join(files).encode())
        assert (process.returncode, told) == (0, b""), (told, wrong)


@condition(Attacker.ACCOUNT)
async def no_file_of_the_state_is_open_to_others(lab: Lab) -> None:
    for door in (lab.open, lab.closed):
        folder = door.proxy.store.dir
        for path in (folder, *folder.rglob("*")):
            assert not path.lstat().st_mode & 0o077, path


def _planted(name: str, plant: Callable[[Path], None]) -> None:
    """A state folder in which another account could write before we took it."""

    async def happens(lab: Lab) -> None:
        if os.geteuid() != 0:
            return
        with tempfile.TemporaryDirectory() as outer:
            folder = Path(outer) / "state"
            Store(StoreConfig(dir=str(folder))).close()
            folder.chmod(0o777)
            secret = Path(outer) / "secret"
            secret.write_text("mine")
            plant(folder)
            with pytest.raises(NextStateError) as raised:
                Store(StoreConfig(dir=str(folder))).close()
            assert str(folder) in str(raised.value)
            assert secret.read_text() == "mine"

    happens.__name__ = f"a_state_folder_in_which_another_account_left_{name}"
    condition(Attacker.ACCOUNT)(happens)


def _theirs(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def _database(folder: Path) -> None:
    _theirs(folder / "nextstate.sqlite3")


def _login(folder: Path) -> None:
    file = folder / "logins" / ("0" * 64)
    file.parent.mkdir()
    file.write_text("{}")
    _theirs(file)


def _subfolder(folder: Path) -> None:
    (folder / "versions").mkdir()
    _theirs(folder / "versions")


def _hash_key(folder: Path) -> None:
    (folder / "episodes.key").write_bytes(b"k" * 32)
    _theirs(folder / "episodes.key")


def _symlink(folder: Path) -> None:
    (folder / "proxy.key").symlink_to(folder.parent / "secret")
    _theirs(folder / "proxy.key")


for _name, _plant in (
    ("a_database", _database),
    ("a_login", _login),
    ("a_folder_of_its_own", _subfolder),
    ("a_key_that_it_knows", _hash_key),
    ("a_link", _symlink),
):
    _planted(_name, _plant)


@condition(Attacker.ACCOUNT)
async def links_are_left_where_our_own_key_is_written(lab: Lab) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name) / "state", Path(name) / "target"
        folder.mkdir()
        target.write_text("mine")
        settings = replace(
            settings_of(lab.open.proxy.store, Path(name)), store=StoreConfig(dir=str(folder))
        )
        file = own_key_file(settings)
        for link in (file, file.with_suffix(f".{os.getpid()}")):
            link.symlink_to(target)
        write_own_key(settings, "a-new-key")
        assert target.read_text() == "mine"
        assert (file.read_text(), file.is_symlink()) == ("a-new-key", False)


def _hidden(name: str, value: str) -> None:
    async def happens(lab: Lab) -> None:
        settings = settings_of(lab.open.proxy.store, lab.open.proxy.store.dir.parent)
        for part in ("rollout", "engine", "writer"):
            got = part_environment(settings, part, {name: value, "PATH": "/bin", "HOME": "/root"})
            assert name not in got, part
            assert got["PATH"] == "/bin"

    happens.__name__ = f"an_agent_reads_{name}_in_its_environment"
    condition(Attacker.SHELL)(happens)


for _name, _value in (
    ("OPENAI_API_KEY", "x"),
    ("AWS_SECRET_ACCESS_KEY", "x"),
    ("GITHUB_TOKEN", "x"),
    ("GITHUB_PAT", "x"),
    ("DB_PASS", "x"),
    ("MYSQL_PWD", "x"),
    ("PGPASSWORD", "x"),
    ("DATABASE_URL", "postgres://app:hunter2Xy9@db/app"),
    ("SENTRY_DSN", "https://a1b2:c3@s.io/1"),
    ("OPENAI_API_KEY_2", "x"),
    ("SECRET_KEY_BASE", "x"),
    ("NPM_CONFIG__AUTH", "x"),
    ("GOOGLE_APPLICATION_CREDENTIALS", "/x"),
    ("AZURE_CLIENT_SECRET", "x"),
    ("gh_token", "x"),
    ("SLACK_WEBHOOK_URL", "https://hooks.slack.com/services/T0/B0/x"),
    ("SESSION_COOKIE", "x"),
    ("SSH_AUTH_SOCK", "/tmp/agent.1"),
    ("API_TOKEN_FILE_CREDENTIAL", "x"),
):
    _hidden(_name, _value)


@condition(Attacker.DISK)
async def no_file_of_a_stolen_disk_has_a_key(lab: Lab) -> None:
    folder = lab.closed.proxy.store.dir
    found = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert hashed(lab.words[Scope.ADMIN]) in found  # what is there is the hash
    for key in lab.keys:
        assert key.encode() not in found
        assert key.partition("-")[2].encode() not in found


def _hashes(name: str, made: Callable[[bytes], str]) -> None:
    async def happens(lab: Lab) -> None:
        status, _, _ = await lab.chat("x", made(hashed(lab.words[Scope.ADMIN])))
        assert status in (401, 429)

    happens.__name__ = f"a_hash_from_a_stolen_disk_is_sent_as_{name}"
    condition(Attacker.DISK)(happens)


_hashes("hexadecimal_digits", bytes.hex)
_hashes("a_key_of_ours", lambda found: f"ns-{found.hex()}")
_hashes("an_episodes_key", lambda found: f"ep-{found.hex()[:32]}")
_hashes("bytes", lambda found: "".join(filter(str.isprintable, found.decode("latin-1"))))


async def _logged_in(lab: Lab, key: str) -> aiohttp.ClientSession:
    """A browser at the closed door."""
    jar = aiohttp.CookieJar(unsafe=True)
    http = aiohttp.ClientSession(cookie_jar=jar, timeout=aiohttp.ClientTimeout(total=20))
    data = {"key": lab.words[key]}
    answer = await http.post(f"{lab.closed.url}/page/login", data=data, allow_redirects=False)
    assert answer.status == 303, answer.status
    return http


@condition(Attacker.DISK)
async def a_stolen_file_of_a_login_is_no_login(lab: Lab) -> None:
    http = await _logged_in(lab, Scope.READ)
    async with http:
        (cookie,) = [*http.cookie_jar]
        folder = lab.closed.proxy.store.dir / "logins"
        for file in folder.iterdir():
            for stolen in (file.name, file.name[:43], file.read_text()[:43]):
                headers = {"Cookie": f"{cookie.key}={quote(stolen)}"}
                url = f"{lab.closed.url}/page/turns"
                answer = await lab.http.get(url, headers=headers, allow_redirects=False)
                assert answer.status == 303


@condition(Attacker.DISK)
async def logins_copied_to_another_proxy_are_worth_nothing(lab: Lab) -> None:
    http = await _logged_in(lab, Scope.READ)
    async with http:
        (cookie,) = [*http.cookie_jar]
        other = lab.open.proxy.store.dir / "logins"
        shutil.copytree(lab.closed.proxy.store.dir / "logins", other, dirs_exist_ok=True)
        page: Any = lab.open.proxy.pages
        assert page._logins.caller(cookie.value) is None
        shutil.rmtree(other)


@condition(Attacker.PAGE)
async def a_login_under_a_cookie_that_the_attacker_chose(lab: Lab) -> None:
    chosen = "t" * 43
    page: Any = lab.closed.proxy.pages
    headers = {"Cookie": f"{page._cookie}={chosen}"}
    data, url = {"key": lab.words[Scope.READ]}, f"{lab.closed.url}/page/login"
    answer = await lab.http.post(url, data=data, headers=headers, allow_redirects=False)
    assert answer.status == 303
    assert chosen not in answer.headers["Set-Cookie"]
    turns = f"{lab.closed.url}/page/turns"
    assert (await lab.http.get(turns, headers=headers, allow_redirects=False)).status == 303


def _own_pages(path: str) -> None:
    async def happens(lab: Lab) -> None:
        http = await _logged_in(lab, "alice-read")
        async with http:
            answer = await http.get(lab.closed.url + lab.fill(path), allow_redirects=False)
            told = await answer.text()
            assert answer.status in (200, 403, 404), answer.status
            assert not re.search(rf"(?:The|His)[^<]{{0,20}}{WORD}", told)
            assert str(lab.closed.proxy.store.dir) not in told, "a path"
            if {"$turn$", "$bob-turn$", "e-main", "main"} & {*path.partition("?")[0].split("/")}:
                assert answer.status != 200

    happens.__name__ = f"a_reader_of_one_lineage_looks_at_{path}"
    condition(Attacker.CLIENT)(happens)


for _path in (
    "/",
    "/page/turns",
    "/page/turns/$turn$",
    "/page/turns/$turn$/text/m0",
    "/page/turns/$bob-turn$",
    "/page/turns?before=$turn$",
    "/page/session?name=$session$",
    "/page/sessions",
    "/page/episodes",
    "/page/episodes/e-main",
    "/page/episodes?before=e-main",
    "/page/episodes/e-main/pictures/0",
    "/page/versions?lineage=main",
    "/page/versions/main/0",
    "/page/versions/bob/0",
    "/page/running",
    "/page/running?lineage=main",
    "/page/versions",
    "/page/export?what=sft&lineage=main",
    "/page/turns/$turn$/forget",
    "/page/lineages/main/pause",
    "/page/session/forget?name=$session$",
    "/page/turns?session=$session$",
):
    _own_pages(_path)


def _forms_of_a_reader(path: str, key: str) -> None:
    async def happens(lab: Lab) -> None:
        before = lab.hold()
        http = await _logged_in(lab, key)
        async with http:
            (cookie,) = [*http.cookie_jar]
            target = lab.fill(path.replace("$open-turn$", "$turn$"))
            data = {"token": form_token(cookie.value), "score": "1", "yes": "yes"}
            answer = await http.post(lab.closed.url + target, data=data)
            assert answer.status == 403
        assert [one for one in lab.harm(before) if "logins" not in one] == []

    happens.__name__ = f"a_key_for_{key}_sends_the_form_{path}"
    condition(Attacker.CLIENT)(happens)


for _path in (*FORMS, "/page/session/forget?name=$session$", "/page/lineages/main/resume"):
    for _key in (Scope.READ, "alice-read"):
        _forms_of_a_reader(_path, _key)


@condition(Attacker.CLIENT)
async def a_form_with_another_logins_token(lab: Lab) -> None:
    before = lab.hold()
    first, second = await _logged_in(lab, Scope.ADMIN), await _logged_in(lab, Scope.ADMIN)
    async with first, second:
        (cookie,) = [*second.cookie_jar]
        data = {"token": form_token(cookie.value)}
        url = f"{lab.closed.url}/page/lineages/main/pause"
        assert (await first.post(url, data=data)).status == 403
    assert [one for one in lab.harm(before) if "logins" not in one] == []


@condition(Attacker.CLIENT)
async def one_key_takes_every_place_of_the_pages_that_update_themselves(lab: Lab) -> None:
    http = await _logged_in(lab, Scope.READ)
    async with http, asyncio.timeout(30):
        url = f"{lab.closed.url}/page/events"
        streams = [await http.get(url) for _ in range(20)]
        assert {stream.status for stream in streams} == {200, 503}
        assert (await http.get(f"{lab.closed.url}/page/turns")).status == 200
        for stream in streams:
            stream.close()


def _names(what: str, name: str) -> None:
    """A session that is called so: where its name is shown or counted, it stays a name."""

    async def happens(lab: Lab) -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
        headers = {"X-Session-Id": name}
        url = f"{lab.open.url}/v1/chat/completions"
        try:
            answer = await lab.http.post(url, json=body, headers=headers)
        except ValueError:
            return  # this client does not even send it; tests/attacks/from_network.py does
        assert answer.status in (200, 400), answer.status
        assert name == " " or name not in str(answer.headers)
        for path in ("/page/sessions", "/page/turns", f"/page/session?name={quote(name)}"):
            page = await (await lab.http.get(lab.open.url + path)).text()
            assert "<script>" not in page.replace("<script src=", "")
            assert not {"\x1b", "\u202e", "\x00"} & {*page}
        told = await (await lab.http.get(f"{lab.open.url}/metrics")).text()
        assert "nextstate_evil" not in told
        assert not list(lab.open.proxy.store.dir.parent.rglob("*passwd*"))

    happens.__name__ = f"a_session_called_{what}"
    condition(Attacker.SHELL)(happens)


for _what, _text in (
    ("by_a_path", "../../../../tmp/passwd"),
    ("by_a_script", "<script>alert(1)</script>"),
    ("by_a_template", "{{7*7}}{% include 'x' %}"),
    ("by_an_escape", "\x1b[2J\x1b]0;x\x07"),
    ("by_a_metric", 'a"} 1\\nnextstate_evil{x="'),
    ("from_right_to_left", "a\u202egnp.exe"),
    ("at_length", "s" * 60_000),
    ("by_SQL", "x'); DROP TABLE turns;--"),
    ("by_a_pattern", "%_%"),
    ("as_an_episode", "e-main"),
    ("by_a_format", "{0.__class__}%s%n"),
    ("by_nothing", " "),
    ("by_a_shell", "$(touch /tmp/passwd)`id`"),
    ("by_a_line_end", "a\r\nX-Y: z"),
):
    _names(_what, _text)
