"""`nextstate doctor`: checks what `nextstate up` needs."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command
from nextstate.errors import EXIT_USAGE


def add(subparsers: Any) -> None:
    text = "check that everything `nextstate up` needs is there"
    parser = add_command(subparsers, "doctor", run, text)
    parser.epilog = "example: nextstate doctor --config work.toml"


def run(args: argparse.Namespace) -> int:
    from nextstate.app.doctor import checks

    failed = False
    for check in checks(args.config):
        failed = failed or check.problem is not None
        mark = "FAIL" if check.problem else " ok "
        print(f"{mark}  {check.name}: {check.problem or check.found}")
    return EXIT_USAGE if failed else 0
