"""`nextstate doctor`: checks what `nextstate up` needs."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command
from nextstate.errors import EXIT_USAGE


def add(subparsers: Any) -> None:
    text = "check that everything `nextstate up` needs is there"
    parser = add_command(subparsers, "doctor", run, text)
    parser.epilog = "example: nextstate doctor --egress"
    text = "list the hosts that our processes may reach, and which key allows each"
    parser.add_argument("--egress", action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.doctor import checks
    from nextstate.app.settings import Settings

    if args.egress:
        hosts = Settings.read(args.config).hosts
        print("this machine: always")
        for host, key in hosts.items():
            print(f"{host}: {key}")
        if not hosts:
            print("no other host may be reached")
        return 0
    failed = False
    for check in checks(args.config):
        failed = failed or check.problem is not None
        mark = "FAIL" if check.problem else " ok "
        print(f"{mark}  {check.name}: {check.problem or check.found}")
    return EXIT_USAGE if failed else 0
