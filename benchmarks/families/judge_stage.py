"""`nextstate judge` with another way of giving credit, which no configuration can ask for.

python -m benchmarks.families.judge_stage step_sum nextstate.toml
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from pathlib import Path
from typing import get_args

from judge.advantages import CreditMethod
from nextstate.app.settings import Settings
from nextstate.app.stages import run_judge


def settings_with(file: Path, credit: CreditMethod) -> Settings:
    """The configuration of a file, but for the credit."""
    read = Settings.read(file)
    return replace(read, judge=replace(read.judge, credit=credit))


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families.judge_stage")
    parser.add_argument("credit", choices=get_args(CreditMethod))
    parser.add_argument("file", type=Path, help="a configuration")
    given = parser.parse_args()
    asyncio.run(run_judge(settings_with(given.file, given.credit)))


if __name__ == "__main__":
    main()
