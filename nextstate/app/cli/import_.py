"""`nextstate import`: takes old conversations into the store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from nextstate.app.cli.common import add_command
from nextstate.records import MAIN_LINEAGE

_NAMED = 20
"""Broken lines of a file that are named one by one."""
_EPILOG = """\
forms, recognised by themselves, as JSON lines or as one list:
  ShareGPT       {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", …}]}
  OpenAI's chat  {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}
  OpenClaw       a session's transcript, ~/.openclaw/agents/…/sessions/*.jsonl

They are kept as imported: never judged and never trained by the learner, since nobody said these
words to this policy. `nextstate export sft --imported` writes them for a warm start with TRL.

A broken line is named and left out, and the rest is taken; then the status is 2. Importing a file
again adds only what is new.

examples:
  nextstate import chats.json
  nextstate import ~/.openclaw/agents/main/sessions/*.jsonl --lineage alice
  nextstate export sft --imported --out warm.jsonl
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "import", run, "take old conversations into the store")
    parser.epilog = _EPILOG
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="conversations")
    text = "whom they belong to (default: %(default)s)"
    parser.add_argument("--lineage", default=MAIN_LINEAGE, metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.importing import Imported, import_file
    from nextstate.app.progress import progress
    from nextstate.app.settings import Settings
    from nextstate.errors import EXIT_USAGE, ConfigError
    from nextstate.store import Store

    settings = Settings.read(args.config)
    known = settings.all_lineages
    if args.lineage not in known:
        raise ConfigError(f"--lineage {args.lineage!r:.80}: known are {', '.join(known)}")
    if missing := next((path for path in args.files if not path.is_file()), None):
        raise ConfigError(f"there is no file {missing}")
    store = Store(settings.store)
    is_whole = True
    with progress() as step:
        for path in args.files:
            counts = Imported()
            size = path.stat().st_size
            named = islice(count(1), _NAMED)

            def complain(text: str, named: Iterator[int] = named) -> None:
                if next(named, None):
                    print(f"nextstate: {text}", file=sys.stderr)

            try:
                import_file(
                    store,
                    path,
                    args.lineage,
                    lambda read, path=path, size=size: step(path.name, read, size),
                    complain,
                    counts,
                    settings.privacy.redactor,
                )
            except ConfigError as error:
                is_whole = False
                print(f"nextstate: {error}", file=sys.stderr)
            finally:
                print(
                    f"{path}: {counts.added} conversations imported, {counts.known} were known, "
                    f"{counts.unanswered} without an answer, {counts.broken} broken",
                    flush=True,
                )
            if counts.broken > _NAMED:
                more = f"{path}: {counts.broken - _NAMED} more are broken, which are not named"
                print(f"nextstate: {more}", file=sys.stderr)
            is_whole = is_whole and not counts.broken
    return 0 if is_whole else EXIT_USAGE
