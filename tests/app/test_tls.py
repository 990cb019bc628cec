"""The proxy behind TLS: what it serves with, who trusts it, and which files it refuses."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import aiohttp.web
import pytest

from nextstate.app.cli import main
from nextstate.app.connect.first_turn import send, target_of, with_context
from nextstate.app.doctor import checks
from nextstate.app.settings import Settings
from nextstate.app.status import status
from nextstate.app.tls import certificate as tried
from nextstate.app.tls import client_context, server_context
from nextstate.engine.process import free_port
from nextstate.errors import ConfigError
from proxy import server
from proxy.config import ProxyConfig
from proxy.intervals import INTERVALS
from tests.certificates import Files, certificate
from tests.scripted_engine import MODEL, scripted_engine


def configured(folder: Path, engine: str, files: Files | None, more: str = "") -> Path:
    file = folder / "nextstate.toml"
    file.write_text(
        f'[store]\ndir = "{folder}/state"\n[engine]\nmode = "external"\nurl = "{engine}"\n'
        f'model = "{MODEL}"\n[proxy]\nport = {free_port()}\n{files.toml if files else ""}{more}'
    )
    return file


@asynccontextmanager
async def served(file: Path, engine: str) -> AsyncGenerator[Settings]:
    """`nextstate proxy` with this configuration; it answers."""
    settings, log = Settings.read(file), file.with_suffix(".log")
    command = [sys.executable, "-P", "-m", "nextstate", "proxy", "--config", str(file)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, cwd=file.parent
        )
    try:
        async with asyncio.timeout(200), aiohttp.ClientSession() as http:
            while not await _answers(http, settings):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.2)
        yield settings
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)


async def _answers(http: aiohttp.ClientSession, settings: Settings) -> bool:
    try:
        url = f"{settings.proxy.url}/healthz"
        async with http.get(url, ssl=client_context(settings.proxy)) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


def test_the_proxy_speaks_tls_and_our_commands_trust_its_very_certificate(tmp_path: Path) -> None:
    files, other = certificate(tmp_path), certificate(tmp_path, "other.test")

    async def test() -> None:
        async with scripted_engine() as engine:
            file = configured(tmp_path, engine.url, files)
            async with served(file, engine.url) as settings:
                assert settings.proxy.url.startswith("https://127.0.0.1:")
                found = await status(settings)
                assert found["proxy"] == "up"
                assert isinstance(found["unrecorded"], dict)
                target = await with_context(target_of(settings, "main"), 0)
                async with asyncio.timeout(30):
                    turn = await send(target, 20)
                assert turn is not None
                # Nobody else's certificate is trusted, and plain HTTP is no answer.
                stranger = client_context(ProxyConfig(**_keys(other)))
                async with aiohttp.ClientSession() as http:
                    url = f"{settings.proxy.url}/healthz"
                    with pytest.raises(aiohttp.ClientConnectorCertificateError):
                        await http.get(url, ssl=stranger)
                    with pytest.raises(aiohttp.ClientError):
                        await http.get(url.replace("https", "http"))
                    data = {"key": "x"}
                    login = url.replace("/healthz", "/page/login")
                    trusted = client_context(settings.proxy)
                    async with http.get(login.replace("/login", ""), ssl=trusted) as answer:
                        cookie = answer.headers["Set-Cookie"]
                    assert "Secure" in cookie.split("; ")
                    async with http.post(login, data=data, ssl=trusted) as answer:
                        assert answer.status == 403
                await asyncio.to_thread(_speaks_no_old_tls, settings.proxy.port)

    asyncio.run(test())


def test_another_certificate_of_the_same_issuer_is_not_trusted(tmp_path: Path) -> None:
    issuer = certificate(tmp_path, "issuer.test")
    ours = certificate(tmp_path, issuer=issuer)
    theirs = certificate(tmp_path, "theirs.test", issuer=issuer)
    assert ours.certificate.read_text().count("BEGIN CERTIFICATE") == 2
    trusted = client_context(ProxyConfig(**_keys(ours)))

    async def answer(request: aiohttp.web.BaseRequest) -> aiohttp.web.Response:
        return aiohttp.web.Response()

    async def asked(files: Files) -> int:
        runner = aiohttp.web.ServerRunner(aiohttp.web.Server(answer))
        await runner.setup()
        port, context = free_port(), server_context(ProxyConfig(**_keys(files)))
        await aiohttp.web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
        try:
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"https://127.0.0.1:{port}/", ssl=trusted) as told,
            ):
                return told.status
        finally:
            await runner.cleanup()

    assert asyncio.run(asked(ours)) == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        asyncio.run(asked(theirs))


def _keys(files: Files) -> dict[str, str]:
    return {"tls_certificate": str(files.certificate), "tls_key": str(files.key)}


def _speaks_no_old_tls(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", port), 10) as raw,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol version|eof occurred"),
    ):
        context.wrap_socket(raw)


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    good, other = certificate(tmp_path), certificate(tmp_path, "other.test")
    locked = certificate(tmp_path, "locked.test", passphrase=b"secret")
    text = tmp_path / "text"
    text.write_text("hello")
    broken = tmp_path / "broken"
    broken.write_text("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
    for certificate_, key, why in (
        (tmp_path / "none", good.key, "cannot be read: No such file"),
        (good.certificate, tmp_path / "none", r"tls_key = .* cannot be read"),
        (text, good.key, "no PEM file with a certificate"),
        (good.certificate, good.certificate, "no PEM file with a private key"),
        (broken, good.key, "OpenSSL cannot use them"),
        (good.certificate, other.key, "is not the key of tls_certificate"),
        (locked.certificate, locked.key, "needs a passphrase"),
    ):
        config = ProxyConfig(tls_certificate=str(certificate_), tls_key=str(key))
        with pytest.raises(ConfigError, match=why):
            server_context(config)


def test_one_of_the_two_files_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="tls_key is set without tls_certificate"):
        ProxyConfig(tls_key="key.pem")


def test_doctor_says_when_the_certificate_ends(tmp_path: Path) -> None:
    for days, said in ((90, "89 days"), (3, "in 2 days"), (-1, "certificate has expired")):
        files = certificate(tmp_path, days=days)
        file = configured(tmp_path, "http://127.0.0.1:1", files)
        (found,) = [check for check in checks(file) if check.name == "certificate"]
        assert said in (found.problem or found.found)
        assert (found.problem is None) is (days == 90)


def test_a_certificate_that_has_ended_is_told_at_the_start_of_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = certificate(tmp_path, days=-1)
    with pytest.raises(ConfigError, match="has expired"):
        tried(ProxyConfig(**_keys(files)))
    file = configured(tmp_path, "http://127.0.0.1:1", certificate(tmp_path, days=-1))
    assert main(["up", "--config", str(file)]) == 2
    assert "has expired" in capsys.readouterr().err


def test_a_client_that_says_nothing_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = certificate(tmp_path)
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)

    async def test() -> None:
        app = aiohttp.web.Application()
        runner = server.Runner(app, server.Connections(), INTERVALS)
        await runner.setup()
        context = server_context(ProxyConfig(**_keys(files)))
        site = server.Site(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        await runner.cleanup()

    asyncio.run(test())
