"""The command line: one file a command, each with `add(subparsers)` and `run(args)`.

Every start imports all of these files, so what a command needs is imported in its `run`.
"""

from __future__ import annotations

import argparse
import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from nextstate import file_descriptors
from nextstate.app.cli import (
    completion,
    connect,
    demo,
    doctor,
    encrypt,
    episodes,
    export,
    feedback,
    fetch,
    forget,
    import_,
    judge,
    keys,
    learner,
    ledger,
    logs,
    pause,
    proxy,
    resume,
    retain,
    review,
    rollback,
    rollout,
    service,
    sessions,
    status,
    store,
    turns,
    up,
    verify,
    versions,
)
from nextstate.config import DEFAULT_FILE
from nextstate.errors import (
    EXIT_LATER,
    EXIT_USAGE,
    FencedError,
    LostNodeError,
    LostRankError,
    NextStateError,
    TakenError,
    WaitError,
)
from nextstate.logs import to_stderr as log_to_stderr
from nextstate.offline import go_offline
from nextstate.private_files import only_for_owner

_COMMANDS = (
    up,
    connect,
    proxy,
    judge,
    learner,
    rollout,
    demo,
    status,
    logs,
    turns,
    sessions,
    episodes,
    versions,
    rollback,
    pause,
    resume,
    feedback,
    review,
    forget,
    retain,
    verify,
    ledger,
    store,
    keys,
    encrypt,
    export,
    import_,
    doctor,
    fetch,
    service,
    completion,
)
"""In the order in which `nextstate --help` lists them."""
_EPILOG = """\
examples:
  nextstate up                          start engine, proxy, judge and learner
  nextstate fetch                       download the model of nextstate.toml
  nextstate doctor                      is everything there that `nextstate up` needs?
  nextstate connect openclaw            make an agent talk to the proxy, by its own settings
  nextstate rollout terminal --tasks tasks.jsonl
                                        agents try tasks in a sandbox, and the policy learns
  nextstate turns --limit 20            who said what, and what does not train
  nextstate episodes --limit 20         attempts of agents at tasks, with their outcomes
  nextstate feedback turn_1a2b --score -1 --hint "Answer in one sentence."
  nextstate forget --session my-chat    as if it had not been said
  nextstate keys create laptop          a key for an agent; from then on the proxy asks for one
  nextstate versions 3                  what version 3 was made from, and how it was checked
  nextstate rollback 3                  serve version 3 again
  nextstate export kto --out kto.parquet  the judged turns as a dataset for TRL
  nextstate demo                        watch a small policy learn from two minutes of talk
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 2 for an error that a person can fix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    only_for_owner()
    go_offline()
    log_to_stderr()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    file_descriptors.raise_limit()
    try:
        args = command_parser().parse_args(arguments)
        if getattr(args, "config", None) == DEFAULT_FILE and args.run not in (up.run, fetch.run):
            _say_if_defaults()
        code = args.run(args)
        sys.stdout.flush()  # raises here if the reader has left, not at the interpreter's exit
        return code
    except (WaitError, FencedError, TakenError, LostNodeError, LostRankError) as error:
        return _fail(str(error), EXIT_LATER)
    except NextStateError as error:
        return _fail(str(error), EXIT_USAGE)
    except BrokenPipeError:  # `nextstate turns | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        return _fail(f"{error}; give yourself access to it, or name another", EXIT_USAGE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error}; make room there", EXIT_LATER)


def _say_if_defaults() -> None:
    if not DEFAULT_FILE.exists():
        print(
            f"nextstate: no {DEFAULT_FILE} in this folder, so every key has its default: "
            "--config names another file",
            file=sys.stderr,
        )


def _fail(message: str, code: int) -> int:
    print(f"nextstate: {message}", file=sys.stderr)
    return code


class _Version(argparse.Action):
    """Prints the installed version, which no other command has to look for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"nextstate {version('nextstate')}")
        parser.exit()


@functools.cache
def command_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="nextstate",
        description="A transparent proxy in front of vLLM that learns from what happens next.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(subparsers)
    return parser
