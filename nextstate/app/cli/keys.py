"""`nextstate keys`: makes, lists and revokes the keys with which clients reach the proxy."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, add_json, print_json

if TYPE_CHECKING:
    from nextstate.keys import Key
    from nextstate.store import Store

_EPILOG = """\
A key is shown once, when it is made: the store keeps only its hash. As soon as there is a key,
every request needs one. Scopes: chat (ask the model), feedback (say how good a turn was), read
(look at the web page and the metrics), episodes (open and reward episodes), admin (everything). A
running proxy knows of a new or revoked key within two seconds.

examples:
  nextstate keys create laptop                       an agent's: chat and feedback
  nextstate keys create grafana --scope read         looks at the page and the metrics
  nextstate keys create alice --lineage alice        reaches the lineage alice only
  nextstate keys list                                who has one, and when it was used last
  nextstate keys revoke laptop                       out of force for good
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "keys", run, "make, list and revoke the proxy's keys")
    parser.epilog = _EPILOG
    parser.add_argument("action", choices=("create", "list", "revoke"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="what you call the key")
    parser.add_argument(
        "--scope",
        action="append",
        metavar="SCOPE",
        help="what it may do; several times for several (default: chat and feedback)",
    )
    parser.add_argument("--lineage", metavar="NAME", help="the only lineage that it reaches")
    text = "of revoke: forget that there was such a key; without any, this machine needs none again"
    parser.add_argument("--remove", action="store_true", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.errors import ConfigError
    from nextstate.store import Store

    settings = Settings.read(args.config)
    if args.action == "list":
        return _list(Store(settings.store), args.json)
    if args.name is None:
        raise ConfigError(f"name the key: nextstate keys {args.action} NAME")
    if args.action == "revoke":
        store = Store(settings.store)
        (store.keys.remove if args.remove else store.keys.revoke)(args.name)
        done = "removed" if args.remove else "revoked"
        print(f"{args.name} is {done}; a running proxy refuses it within two seconds")
        proxy = settings.proxy
        if args.remove and not store.keys.all() and not proxy.api_key_env and proxy.loopback:
            print("there is no key any more: every program of this machine may ask the proxy")
        return 0
    if args.lineage is not None and args.lineage not in settings.all_lineages:
        raise ConfigError(
            f"--lineage {args.lineage!r:.80}: known are {', '.join(settings.all_lineages)}; see "
            "[lineages.NAME]"
        )
    bound = settings.lineages.get(args.lineage or "")
    if bound is not None and not bound.api_key_env:
        print(
            f"keys without --lineage reach {args.lineage} too, by its model's name, as long as "
            f"[lineages.{args.lineage}] api_key_env is empty",
            file=sys.stderr,
        )
    return _create(Store(settings.store), args)


def _create(store: Store, args: argparse.Namespace) -> int:
    from nextstate.errors import ConfigError
    from nextstate.keys import Key, Scope, hashed, new_key

    scopes = args.scope or [Scope.CHAT, Scope.FEEDBACK]
    for scope in scopes:
        if scope not in {*Scope}:
            raise ConfigError(f"--scope {scope!r:.40}: expected one of {', '.join(Scope)}")
    secret = new_key()
    made = frozenset(map(Scope, scopes))
    store.keys.add(Key(args.name, hashed(secret), made, args.lineage, time.time()))
    if args.json:
        print_json({"name": args.name, "key": secret})
        return 0
    print(secret)
    told = (
        f"{args.name}: {', '.join(sorted(made))}. It is shown only now: keep it where the client "
    )
    print(told + "reads it, and send it as a bearer key.", file=sys.stderr)
    return 0


def _list(store: Store, as_json: bool) -> int:
    keys = store.keys.all()
    for key in keys:
        if as_json:
            print_json(_row(key))
        else:
            state = "revoked" if key.revoked_at else f"used {_when(key.used_at)}"
            where = "" if key.lineage is None else f"  lineage {key.lineage}"
            scopes = ",".join(sorted(key.scopes))
            print(f"{key.name:20}  {scopes:24}  made {_when(key.created_at)}  {state}{where}")
    if not keys and not as_json:
        print("there is no key: make one with `nextstate keys create NAME`")
    return 0


def _row(key: Key) -> dict[str, Any]:
    return {
        "name": key.name,
        "scopes": sorted(key.scopes),
        "lineage": key.lineage,
        "created_at": key.created_at,
        "used_at": key.used_at,
        "revoked_at": key.revoked_at,
    }


def _when(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
