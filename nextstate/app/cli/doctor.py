"""`nextstate doctor`: checks what `nextstate up` needs."""

from __future__ import annotations

import argparse
from pathlib import Path
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
    if args.egress:
        from nextstate.app.settings import Settings
        from nextstate.offline import SWITCHES

        settings = Settings.read(args.config)
        hosts = settings.hosts
        print("this machine: always")
        for host, key in hosts.items():
            print(f"{host}: {key}")
        if not hosts:
            print("no other host may be reached")
        for name, value in settings.engine.env.items():
            if name in SWITCHES and value != SWITCHES[name]:
                print(f"whatever vLLM asks for by itself: [engine] env sets {name}")
        return 0
    return 0 if show_checks(args.config) else EXIT_USAGE


def show_checks(config: Path) -> bool:
    """Prints each check; True if nothing is missing."""
    from nextstate.app.doctor import checks

    well = True
    for check in checks(config):
        well = well and check.problem is None
        mark = "FAIL" if check.problem else " ok "
        print(f"{mark}  {check.name}: {check.problem or check.found}", flush=True)
    return well
