"""Which secrets of our environment each part gets: those that it needs, and no others.

What a variable's name says is a secret counts as one, besides those that the configuration names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from nextstate import store_key
from nextstate.app.settings import Settings
from nextstate.config import StoreConfig

_SECRET = re.compile(
    r"(?:^|_)(?:PASS|PAT|PWD|AUTH|DSN|COOKIES?|JWTS?)(?:[_\d]|$)"
    r"|(?:KEYS?|TOKENS?|CREDENTIALS?)(?:[_\d]|$)"
    r"|SECRET|PASSWORD|PASSWD|PASSPHRASE|^SSH_AUTH_SOCK$|WEBHOOK"
)
_NOT_SECRET = frozenset(("PWD", "OLDPWD"))
_WITH_PASSWORD = re.compile(r"://[^/\s:@]{0,100}:[^/\s@]{1,200}@")
"""A URL that has a password in it."""
_PASSWORD = "PGPASSWORD"
"""Where PostgreSQL's driver looks for a password that [store] url does not hold."""
_PROXIES = frozenset(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"))
"""What clients of hosts outside go through; only one with a password is a secret."""
_RAY = frozenset(("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"))
_OWN_CODE = ":"
"""In `kind = "module:function"`: a person's own plugin, which may need what the person exported."""


def part_environment(settings: Settings, part: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables for `proxy`, `writer`, `judge`, `learner`, `rollout` or `engine`."""
    named, own = set(_named(settings)), _of_part(settings, part)
    more = _takes_others(settings, part)
    return {
        name: value
        for name, value in inherited.items()
        if name in own or not (name in named or (_looks_secret(name, value) and not more))
    }


def _looks_secret(name: str, value: str) -> bool:
    upper = name.upper()[-100:]
    if upper in _NOT_SECRET:
        return False
    return _SECRET.search(upper) is not None or _WITH_PASSWORD.search(value[:4096]) is not None


def _named(settings: Settings) -> Iterator[str]:
    """The variables that some key of the configuration names, and those that open the store."""
    yield from store_key.VARIABLES
    yield settings.engine.api_key_env
    yield settings.judge.api_key_env
    yield settings.proxy.api_key_env
    for lineage in settings.lineages.values():
        yield lineage.api_key_env


def _of_part(settings: Settings, part: str) -> set[str]:
    """The secrets that a part needs."""
    if part != "engine" and settings.store.url.startswith("postgres"):
        return {_PASSWORD, *_of_part(replace(settings, store=StoreConfig()), part)}
    engine = {settings.engine.api_key_env} if settings.engine.mode == "external" else set[str]()
    store = {*store_key.VARIABLES}
    match part:
        case "proxy":
            theirs = {lineage.api_key_env for lineage in settings.lineages.values()}
            return store | engine | theirs | {settings.proxy.api_key_env}
        case "writer":
            return store
        case "judge":
            return store | engine | {settings.judge.api_key_env}
        case "learner":
            wandb = {"WANDB_API_KEY", *_PROXIES, *map(str.lower, _PROXIES)}
            return store | engine | (wandb if settings.learner.wandb else set[str]())
        case "rollout":  # it asks the proxy with a key from the state folder
            return {*_RAY}
        case _:
            return set()


def _takes_others(settings: Settings, part: str) -> bool:
    """Whether a part also gets secrets that no key names: a provider's, or a plugin's own."""
    kinds = {
        "judge": settings.judge.kinds,
        "rollout": (settings.rollout.environment,),
    }.get(part, ())
    return any(kind == "litellm" or _OWN_CODE in kind for kind in kinds)
