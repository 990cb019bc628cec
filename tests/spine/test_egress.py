"""What leaves this machine: nothing, unless the configuration names the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nextstate.app.cli import main
from nextstate.app.settings import Settings
from nextstate.egress import is_here
from nextstate.errors import ConfigError

_ROOT = Path(__file__).parents[2]
_TRIES = """
import asyncio, http.client, socket, sys, urllib.request
import aiohttp, httpx
from nextstate.egress import EgressError, guard
from nextstate.guarded_loop import GuardedLoop

guard(["allowed.test", "192.0.2.7"])


def udp(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.sendto(b"x", address)


def tcp(address):
    with socket.socket() as opened:
        opened.settimeout(0.01)
        opened.connect(address)


async def by_aiohttp():
    async with aiohttp.ClientSession() as session:
        await session.get("http://198.51.100.4/")


async def streams(host):
    await asyncio.wait_for(asyncio.open_connection(host, 9), 1)


async def datagrams(address):
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=address)


async def whose(address):
    await asyncio.get_running_loop().getnameinfo(address)


async def any_datagram():
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0))


def on_uvloop(work):
    with asyncio.Runner(loop_factory=GuardedLoop) as runner:
        runner.run(work)


tries = {
    "name": lambda: socket.getaddrinfo("elsewhere.test", 80),
    "scope in a name": lambda: socket.getaddrinfo("localhost%data.elsewhere.test", 80),
    "below localhost": lambda: socket.getaddrinfo("data.localhost", 80),
    "whose address": lambda: socket.getnameinfo(("198.51.100.4", 80), 0),
    "uvloop, whose address": lambda: on_uvloop(whose(("198.51.100.4", 80))),
    "old name": lambda: socket.gethostbyname("elsewhere.test"),
    "tcp": lambda: tcp(("198.51.100.4", 443)),
    "mapped": lambda: socket.socket(socket.AF_INET6).connect(("::ffff:198.51.100.4", 443)),
    "udp": lambda: udp(("198.51.100.4", 53)),
    "http": lambda: http.client.HTTPConnection("elsewhere.test").request("GET", "/"),
    "urllib": lambda: urllib.request.urlopen("http://198.51.100.4/"),
    "httpx": lambda: httpx.get("http://198.51.100.4/"),
    "aiohttp": lambda: asyncio.run(by_aiohttp()),
    "aiohttp on uvloop": lambda: on_uvloop(by_aiohttp()),
    "uvloop": lambda: on_uvloop(streams("198.51.100.4")),
    "uvloop name": lambda: on_uvloop(streams("elsewhere.test")),
    "uvloop datagrams": lambda: on_uvloop(datagrams(("198.51.100.4", 53))),
    "uvloop any datagram": lambda: on_uvloop(any_datagram()),
}
for name, tried in tries.items():
    error = None
    try:
        tried()
    except Exception as found:
        error = found
    while error is not None and not isinstance(error, EgressError):
        error = error.__cause__ or error.__context__
    print(name, "refused" if error is not None else "LEFT")
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
socket.create_connection(("localhost", server.getsockname()[1]))
try:
    tcp(("192.0.2.7", 9))
except EgressError:
    print("listed LEFT OUT")
except OSError:
    print("listed allowed")
"""


def test_every_way_out_is_refused_whichever_library_takes_it() -> None:
    found = subprocess.run(
        [sys.executable, "-P", "-c", _TRIES], cwd=_ROOT, env={"PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert len(lines) == 19
    assert [line for line in lines[:-1] if not line.endswith(" refused")] == []
    assert lines[-1] == "listed allowed"
    refusals = found.stderr.count("it is not in [privacy] allow_hosts")
    assert refusals == 6  # once a host: two addresses, three names, and whoever a datagram is for


def test_the_addresses_of_an_allowed_name_are_allowed_once_it_is_looked_up() -> None:
    code = """
import socket
known = socket.getaddrinfo
socket.getaddrinfo = lambda host, *_, **__: [(2, 1, 6, "", ("192.0.2.9", 80))]
from nextstate.egress import EgressError, check, guard
guard(["Allowed.Test."])
try:
    check("192.0.2.9")
except EgressError as error:
    print(error)
socket.getaddrinfo("localhost", 80)  # whatever a look-up of another name has found
try:
    check("192.0.2.9")
except EgressError as error:
    print(error)
socket.getaddrinfo("allowed.test", 80)
check("192.0.2.9")
"""
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=_ROOT, env={"PYTHONPATH": str(_ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert found.stdout.count("nothing may be sent to '192.0.2.9': name it in [privacy]") == 2


@pytest.mark.parametrize("name", ["", "localhost", "127.0.0.2", "::1", "0.0.0.0"])
def test_this_machine_is_always_allowed(name: str) -> None:
    assert is_here(name)


@pytest.mark.parametrize(
    "name",
    [
        *("localhost.example.com", "127.0.0.1.example.com", "192.168.1.2", "::ffff:8.8.8.8", "x"),
        *("a.localhost", "localhost%a"),
    ],
)
def test_nothing_else_is_this_machine(name: str) -> None:
    assert not is_here(name)


def test_the_hosts_that_other_sections_name_are_listed_with_their_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(
        '[engine]\nmode = "external"\nurl = "http://gpu.lan:8000/v1"\n'
        '[judge]\nbase_url = "http://127.0.0.1:9/v1"\n'
        '[proxy]\nhost = "192.168.1.5"\napi_key_env = "KEY"\n'
        '[privacy]\nallow_hosts = ["api.example.com"]\n'
    )
    assert main(["doctor", "--egress", "--config", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "this machine: always",
        "192.168.1.5: [proxy] host",
        "gpu.lan: [engine] url",
        "api.example.com: [privacy] allow_hosts",
    ]


def test_a_switch_that_a_person_turned_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text('[engine]\nenv = { HF_HUB_OFFLINE = "0", DO_NOT_TRACK = "1", A = "b" }\n')
    assert main(["doctor", "--egress", "--config", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "no other host may be reached",
        "whatever vLLM asks for by itself: [engine] env sets HF_HUB_OFFLINE",
    ]


@pytest.mark.parametrize("host", ["https://api.example.com", "a b", "host:443", "", "a/b"])
def test_a_host_is_named_without_scheme_port_and_path(tmp_path: Path, host: str) -> None:
    file = tmp_path / "nextstate.toml"
    file.write_text(f'[privacy]\nallow_hosts = ["{host}"]\n')
    with pytest.raises(ConfigError, match=r"\[privacy\] allow_hosts"):
        Settings.read(file)


def test_a_judges_provider_is_a_host_only_where_it_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nextstate.toml"
    text = (
        f'[store]\ndir = "{tmp_path}/state"\n[engine]\nmode = "external"\nurl = "http://127.0.0.1:9"\n'
        '[judge]\nkind = "litellm"\nmodel = "openai/m"\n[privacy]\n'
    )
    file.write_text(text)
    with pytest.raises(ConfigError, match=r'adding "api\.openai\.com" to \[privacy\] allow_hosts'):
        Settings.read(file)
    file.write_text(text + 'allow_hosts = ["api.openai.com"]\n')
    main(["doctor", "--config", str(file)])
    assert " ok   other hosts: api.openai.com" in capsys.readouterr().out
