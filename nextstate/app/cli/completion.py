"""`nextstate completion`: prints the script with which a shell completes our commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from nextstate.app.cli.common import add_command

_SHELLS = "bash", "zsh", "fish"
_EPILOG = """\
examples (they take effect in the next shell):
  nextstate completion bash > ~/.local/share/bash-completion/completions/nextstate
  nextstate completion fish > ~/.config/fish/completions/nextstate.fish
  nextstate completion zsh > ~/.zfunc/_nextstate
          with `fpath+=~/.zfunc; autoload -Uz compinit; compinit` in ~/.zshrc
"""


def add(subparsers: Any) -> None:
    text = "print the script that completes commands and options in a shell"
    parser = add_command(subparsers, "completion", run, text, config=False)
    parser.epilog = _EPILOG
    parser.add_argument("shell", choices=_SHELLS, help="which shell")


def run(args: argparse.Namespace) -> int:
    import shtab

    from nextstate.app.cli import command_parser

    parser = command_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, how: object) -> None:
    """Lets every argument that is a path be completed as one."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            commands = cast("dict[str, argparse.ArgumentParser]", action.choices)
            for command in commands.values():
                _complete_files(command, how)
        elif action.type is Path:
            action.complete = how  # pyright: ignore[reportAttributeAccessIssue]
