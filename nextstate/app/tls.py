"""The proxy's certificate: what it serves with, how our own commands trust it, when it ends."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from nextstate.errors import ConfigError
from proxy.config import ProxyConfig

_END = "-----END CERTIFICATE-----"


def server_context(config: ProxyConfig) -> ssl.SSLContext | None:
    """What the proxy serves with; None for plain HTTP. Raises ConfigError."""
    if not config.tls_certificate:
        return None
    certificate = _file("tls_certificate", config.tls_certificate, "CERTIFICATE")
    key = _file("tls_key", config.tls_key, "PRIVATE KEY")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def password() -> str:
        raise ConfigError(
            f"[proxy] tls_key = {config.tls_key!r} needs a passphrase, and nobody is there to type "
            "it: write the key without one (openssl pkey -in KEY -out NEW)"
        )

    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"[proxy] tls_key = {config.tls_key!r} is not the key of tls_certificate = "
                f"{config.tls_certificate!r}: name the two files that were made together"
            ) from None
        raise ConfigError(
            f"[proxy] tls_certificate = {config.tls_certificate!r}, tls_key = {config.tls_key!r}: "
            f"OpenSSL cannot use them ({error.reason or error}); expected PEM files"
        ) from None
    return context


def client_context(config: ProxyConfig) -> ssl.SSLContext | bool:
    """What our own commands reach the proxy with: they trust its very certificate, as aiohttp's
    `ssl`.

    The name in it need not be the address. Raises ConfigError if the file cannot be read.
    """
    if not config.tls_certificate:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    file = _file("tls_certificate", config.tls_certificate, "CERTIFICATE")
    try:
        # The first one is the proxy's own. Whoever signed it may have signed others' too.
        own, end, _ = file.read_text("ascii", "replace").partition(_END)
        context.load_verify_locations(cadata=own.replace("\ufffd", "?") + end + "\n")
    except ssl.SSLError as error:
        raise ConfigError(
            f"[proxy] tls_certificate = {config.tls_certificate!r}: OpenSSL cannot read it "
            f"({error.reason or error}); expected a PEM file"
        ) from None
    return context


def proxy_connector(config: ProxyConfig, limit: int = 100) -> aiohttp.TCPConnector:
    """For a session of ours with the proxy; inside a running event loop. Raises ConfigError."""
    return aiohttp.TCPConnector(limit=limit, ssl=client_context(config))


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says of its time."""

    ends_at: float
    """Unix time."""

    @property
    def days_left(self) -> int:
        """Whole days until it ends."""
        return int((self.ends_at - time.time()) // 86400)


def certificate(config: ProxyConfig) -> Certificate | None:
    """The configured certificate, tried as a client would; None for plain HTTP.

    Raises ConfigError, also for one that has ended or has not begun.
    """
    served, trusted = server_context(config), client_context(config)
    if served is None or isinstance(trusted, bool):
        return None
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = served.wrap_bio(to_server, to_client, server_side=True)
    client = trusted.wrap_bio(to_client, to_server)
    try:
        for _ in range(4):  # each side's turn to speak
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"[proxy] tls_certificate = {config.tls_certificate!r}: no client accepts it: "
            f"{error.verify_message}; get a new one"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"[proxy] tls_certificate = {config.tls_certificate!r}: no connection comes about with "
            f"it ({error.reason or error}); get another one"
        ) from None
    told = client.getpeercert() or {}
    return Certificate(ssl.cert_time_to_seconds(str(told["notAfter"])))


def _file(key: str, name: str, kind: str) -> Path:
    """The file that a key names, if it may hold a PEM of this kind. Raises ConfigError."""
    path = Path(name).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"[proxy] {key} = {name!r} cannot be read: {why}") from None
    if f"{kind}-----".encode() not in data:
        raise ConfigError(
            f"[proxy] {key} = {name!r} is no PEM file with a {kind.lower()}: expected a line "
            f"-----BEGIN {kind}-----"
        )
    return path
