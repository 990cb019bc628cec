"""What several commands share: their arguments, their output, and finding a version."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from nextstate.config import DEFAULT_FILE
from nextstate.errors import StartError
from nextstate.records import MAIN_LINEAGE

if TYPE_CHECKING:
    from nextstate.app.settings import Settings
    from nextstate.records import PolicyVersion
    from nextstate.store import Store

Run = Callable[[argparse.Namespace], int]


def add_command(
    subparsers: Any, name: str, run: Run, text: str, *, config: bool = True
) -> argparse.ArgumentParser:
    """Adds a command that calls `run`; `config` gives it `--config FILE`.

    Its description and epilog keep their line breaks.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(name, help=text, description=text, formatter_class=raw)
    if config:
        parser.add_argument(
            "--config",
            type=Path,
            default=DEFAULT_FILE,
            metavar="FILE",
            help=f"the TOML file (default: {DEFAULT_FILE})",
        )
    parser.set_defaults(run=run)
    return parser


def stage_settings(args: argparse.Namespace) -> Settings:
    """The configuration of a stage that runs from now on: it reaches the allowed hosts alone."""
    from nextstate.app.engine_access import reached_hosts
    from nextstate.app.settings import Settings
    from nextstate.egress import guard
    from nextstate.tracing import allow

    settings = Settings.read(args.config)
    allow(settings.hosts)
    guard(reached_hosts(settings))
    return settings


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def add_lineage(parser: argparse.ArgumentParser) -> None:
    """Adds a lineage, by its place or as `--lineage NAME`; see `lineage_of`."""
    which = parser.add_mutually_exclusive_group()
    text = f"which one (default: {MAIN_LINEAGE})"
    which.add_argument("named", nargs="?", metavar="LINEAGE", help=text)
    which.add_argument("--lineage", metavar="NAME", help="the same")


def lineage_of(args: argparse.Namespace, known: Sequence[str]) -> str:
    """The lineage that `add_lineage`'s arguments name. Raises StartError if it is unknown."""
    lineage = args.named or args.lineage or MAIN_LINEAGE
    if lineage not in known:
        raise StartError(
            f"there is no lineage {lineage!r:.80}; known: {', '.join(known)}: see [lineages.NAME]"
        )
    return lineage


def user_name() -> str:
    """Who gives the command, for the ledger."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "a person"


def counted(number: int, what: str) -> str:
    """A number of things, such as "1 turn" and "2 turns"."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def whole_number(text: str) -> int:
    """An argument's value: a number from 0 to 999 999 999."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 to 999999999")
    return int(text)


def print_json(value: Any, to: TextIO | None = None) -> None:
    """Prints one line of JSON; on a terminal without UTF-8 with JSON's own escapes."""
    import orjson

    out = to or sys.stdout
    line = orjson.dumps(value).decode()
    encoding = (out.encoding or "").lower().replace("_", "-")
    print(line if encoding in ("utf-8", "utf8") else json.dumps(orjson.loads(line)), file=out)


def find_version(store: Store, lineage: str, number: int) -> PolicyVersion:
    """The version of that number. Raises StartError."""
    version = store.versions.get(lineage, number)
    if version is None:
        known = ", ".join(str(v.number) for v in store.versions.all(lineage)) or "only 0"
        raise StartError(f"there is no version {number} of lineage {lineage!r}; known: {known}")
    return version
