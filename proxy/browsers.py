"""Refuses requests from other sites' pages if no key is configured.

Any web page can make its reader's browser send requests to this machine. The browser names the
page's site in Origin or Sec-Fetch-Site. A page whose own name was made to resolve to this machine
(DNS rebinding) is known by that name in Host. Programs send no Origin and are not concerned.

Pages that this machine serves are trusted as its programs are, for feedback too: a chat page on
http://localhost:3000 with thumbs up and down is what feedback is for. A client with a key may come
from anywhere.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from multidict import CIMultiDict, CIMultiDictProxy

_LOCAL_SUFFIXES = (".localhost", ".internal")
"""No web site has such a name. Containers call their host `host.docker.internal` or similar."""
_APPS = frozenset(("app", "tauri", "file", "vscode-webview", "vscode-file"))
"""Schemes of pages of an installed program: no web site has them."""
_OWN_SITES = frozenset(("same-origin", "same-site", "none"))
_KEY = "or set [proxy] api_key_env and send the key"


def foreign(headers: CIMultiDictProxy[str], own_host: str) -> str | None:
    """Why a request without a key may come from another site, and what to do about it, or None.

    `own_host` is what the proxy is bound to.
    """
    for host in filter(None, headers.getall("Host", ())):
        name = _host(host)
        if name is None or not (name == own_host or _is_local(name)):
            return (
                f"Host: {host[:100]!r} is not a name of this machine: use http://127.0.0.1 "
                f"or http://localhost with the port, {_KEY}."
            )
    origins = headers.getall("Origin", ())
    for origin in origins:
        if not _is_trusted(origin, own_host):
            return (
                f"Origin: {origin[:100]!r} is another site: without a key only pages on "
                f"http://localhost and http://127.0.0.1 may call; open the page there, {_KEY}."
            )
    for site in () if origins else headers.getall("Sec-Fetch-Site", ()):
        if site.strip().lower() not in _OWN_SITES:
            return (
                f"Sec-Fetch-Site: {site[:100]!r}: another site's page may not call without a key; "
                f"call from a page on http://localhost, {_KEY}."
            )
    return None


def is_preflight(method: str, headers: CIMultiDictProxy[str]) -> bool:
    """Whether this is a browser's question what a page may send. It carries no key."""
    return (
        method == "OPTIONS" and "Origin" in headers and "Access-Control-Request-Method" in headers
    )


def preflight_headers(asked: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers that allow all that a preflight asks for."""
    answer = CIMultiDict(
        {
            "Access-Control-Allow-Methods": asked["Access-Control-Request-Method"],
            "Access-Control-Max-Age": "600",
        }
    )
    if "Access-Control-Request-Headers" in asked:
        answer["Access-Control-Allow-Headers"] = asked["Access-Control-Request-Headers"]
    if asked.get("Access-Control-Request-Private-Network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    return answer


def shared_with(headers: CIMultiDictProxy[str], has_key: bool) -> dict[str, str]:
    """The headers that let the page that asked read the answer."""
    origin = headers.get("Origin")
    if origin is None:
        return {}
    return {
        "Access-Control-Allow-Origin": "*" if has_key else origin,
        "Access-Control-Expose-Headers": "x-nextstate-turn, x-nextstate-version, retry-after",
        "Vary": "Origin",
    }


def _is_trusted(origin: str, own_host: str) -> bool:
    scheme, found, rest = origin.lower().partition("://")
    if not found:
        return False
    if scheme in _APPS:
        return True
    name = _host(rest)
    if scheme not in ("http", "https") or name is None:
        return False
    return name == own_host or _is_loopback(name)


def _host(value: str) -> str | None:
    """The name or address in `name`, `name:port` or `[address]:port`; None for anything else."""
    value = value.strip().lower()
    if value.startswith("["):
        name, found, port = value[1:].partition("]")
        if not found or (port and not port.startswith(":")):
            return None
        port = port[1:]
    else:
        name, _, port = value.partition(":")
        name = name.removesuffix(".")
    return name if name and (not port or (port.isascii() and port.isdigit())) else None


@lru_cache(maxsize=64)
def _is_local(name: str) -> bool:
    """Whether a name or address is never a web site's. A web site's name has a dot."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_LOCAL_SUFFIXES)
    return address.is_loopback or address.is_private or address.is_unspecified


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
