"""`nextstate export`: recorded turns as datasets, and versions as adapters or whole models."""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command, find_version, whole_number

if TYPE_CHECKING:
    from nextstate.app.settings import Settings
    from nextstate.store import Store

_ADAPTER = "adapter"
_TAKES_IMPORTED = ("sft", "prompts")
_PRINTED = Path("-")
_BLOCK_BYTES = 10 << 20
"""What `datasets` reads at once."""
_EPILOG = """\
what:
  sft      praised turns as conversations               {messages}
  kto      praised and blamed turns                     {prompt, completion, label}
  dpo      a praised beside a blamed reply to one request, or to one that its user
           had to correct                               {prompt, chosen, rejected}
  prompts  each different request once                  {prompt}
  traces   token ids, log-probs and masks: OpenEnv's TrainingTrace, an episode a row
  turns    whole turns with verdicts and feedback, as JSON lines only
  adapter  one policy version, for PEFT or vLLM; with --merged a whole model

Turns of held-out episodes and side turns are left out. TRL's trainers read the first four as they
are: datasets.load_dataset("parquet", data_files="kto.parquet"), or "json" up to 10 MB.

Other programs read what is written here, so it is in clear. From an encrypted store it is written
only with --in-clear: keep it where you may, and delete it when it has been of use.

examples:
  nextstate export kto --out kto.parquet
  nextstate export dpo --out pairs.parquet --lineage work
  nextstate export turns --out - | gzip > turns.jsonl.gz
  nextstate export adapter --version 3 --out my-adapter
  nextstate export adapter --version 3 --out my-model --merged
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "export", run, "write datasets, adapters or whole models")
    parser.epilog = _EPILOG
    what = ("sft", "kto", "dpo", "prompts", "traces", "turns", _ADAPTER)
    parser.add_argument("what", choices=what, metavar="WHAT", help=", ".join(what))
    text = "a new file that ends in .jsonl or .parquet, or - (prints it); for an adapter a folder"
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help=text)
    text = "with --out -: Parquet instead of JSON lines"
    parser.add_argument("--parquet", action="store_true", help=text)
    text = "only turns of this lineage; for an adapter its own (default: all, and main)"
    parser.add_argument("--lineage", metavar="NAME", help=text)
    text = "the policy version of an adapter"
    parser.add_argument("--version", type=whole_number, metavar="N", help=text)
    text = "also what `nextstate import` took in (sft, prompts)"
    parser.add_argument("--imported", action="store_true", help=text)
    text = "merge the adapter into the base model, which [engine] model names"
    parser.add_argument("--merged", action="store_true", help=text)
    text = "write what an encrypted store holds as plain files, which other programs can read"
    parser.add_argument("--in-clear", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.export_files import check_target
    from nextstate.app.settings import Settings

    settings = Settings.read(args.config)
    if args.out != _PRINTED or args.what == _ADAPTER:
        check_target(args.out)
    (_export_adapter if args.what == _ADAPTER else _export_turns)(settings, args)
    return 0


def _export_turns(settings: Settings, args: argparse.Namespace) -> None:
    from nextstate.app.export_files import LINES, PARQUET, send_rows, write_rows
    from nextstate.app.exports import FORMATS, stored
    from nextstate.app.progress import progress
    from nextstate.errors import StartError

    format_ = FORMATS[args.what]
    suffixes = (LINES,) if format_.columns is None else (LINES, PARQUET)
    printed = args.out == _PRINTED
    suffix = (PARQUET if args.parquet else LINES) if printed else args.out.suffix
    if suffix not in suffixes:
        raise StartError(f"--out {args.out}: expected a name that ends in {' or '.join(suffixes)}")
    if args.parquet and not printed:
        raise StartError("--parquet is for --out - only: elsewhere the end of the name decides")
    if args.imported and args.what not in _TAKES_IMPORTED:
        raise StartError(f"--imported is for {' and '.join(_TAKES_IMPORTED)}: nobody judged these")
    if args.version is not None or args.merged:
        raise StartError("--version and --merged are for `nextstate export adapter` only")
    store = _opened(settings, args)
    turns = store.turns.last()
    with progress() as step:
        source = stored(
            store, args.lineage, lambda at: step(args.what, at, turns), imported=args.imported
        )
        rows = format_.rows(store, source)
        first = next(rows, None)  # nothing is written without one
        if first is None:
            count = 0
        elif printed:
            columns = format_.columns if args.parquet else None
            count = send_rows(sys.stdout.buffer, chain([first], rows), columns)
            sys.stdout.flush()
        else:
            count = write_rows(args.out, chain([first], rows), format_.columns)
    if not count:
        if args.lineage not in (None, *settings.all_lineages):
            known = ", ".join(settings.all_lineages)
            raise StartError(f"--lineage {args.lineage!r:.80} has no turn here; known: {known}")
        of = "judged " if args.what in ("sft", "kto", "dpo") else ""
        raise StartError(
            f"nothing is written: no {of}turn fits; `nextstate status` says how many there are"
        )
    if printed:
        return
    print(f"{args.out}: {count} rows")
    if suffix == LINES and args.out.stat().st_size > _BLOCK_BYTES and format_.columns:
        print(
            "datasets.load_dataset takes the columns from the first 10 MB of JSON lines and fails "
            "where a tool is called only later: for it, export to a name that ends in .parquet"
        )


def _export_adapter(settings: Settings, args: argparse.Namespace) -> None:
    from nextstate.app.export_files import copy_adapter, write_merged
    from nextstate.errors import StartError

    if args.version is None:
        raise StartError("--version is missing: `nextstate versions` lists them")
    store = _opened(settings, args)
    version = find_version(store, args.lineage or "main", args.version)
    folder = None if version.path is None else Path(version.path)
    if folder is None or not folder.is_dir():
        why = "it was deleted to make room" if version.sha256 else "it is the base model itself"
        raise StartError(f"version {version.number} has no adapter: {why}")
    if args.merged and not version.is_whole_model:
        write_merged(settings.engine.model, folder, args.out)
    else:
        copy_adapter(folder, args.out)
    print(f"{args.out}: version {version.number} of {version.lineage}")


def _opened(settings: Settings, args: argparse.Namespace) -> Store:
    """The store, if it may be written in clear. Raises StartError."""
    from nextstate.errors import StartError
    from nextstate.store import Store

    store = Store(settings.store)
    if store.vault is not None and not args.in_clear:
        store.close()
        raise StartError(
            f"the store in {settings.store.path} is encrypted, and what is exported is not: other "
            "programs read it. Add --in-clear if that is what you want"
        )
    return store
