"""`nextstate connect`: edits an agent's own settings so that it talks to the proxy."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextstate.app.cli.common import add_command
from nextstate.config import DEFAULT_FILE
from nextstate.records import MAIN_LINEAGE

if TYPE_CHECKING:
    from nextstate.app.connect.agents import EnvironmentAgent, FileAgent
    from nextstate.app.connect.target import Target

AGENT_NAMES = (
    *("openclaw", "codex", "qwen-code", "opencode", "claude-code", "aider", "mini-swe-agent"),
    *("open-webui", "langchain", "openai-agents", "pydantic-ai", "litellm"),
)
"""Listed here too: the others are imported only when the command runs."""
_EPILOG = f"""\
AGENT is one of {", ".join(AGENT_NAMES[:6])},
{", ".join(AGENT_NAMES[6:])}.

examples:
  nextstate connect openclaw --dry-run     show what would change in ~/.openclaw/openclaw.json
  nextstate connect openclaw               change it, keep a copy, and send a first turn
  nextstate connect openclaw --plugin      also /good, /bad and exact kinds of turns
  nextstate connect openclaw --undo        put back the file that was there before
  nextstate connect codex --file ./config.toml
  eval "$(nextstate connect claude-code)"  set the variables that Claude Code reads
"""


def add(subparsers: Any) -> None:
    text = "make an agent talk to the proxy, by its own settings"
    parser = add_command(subparsers, "connect", run, text)
    parser.epilog = _EPILOG
    parser.add_argument(
        "agent", metavar="AGENT", choices=AGENT_NAMES, help="which agent; see below"
    )
    text = "its settings file (default: where the agent itself looks)"
    parser.add_argument("--file", type=Path, metavar="PATH", help=text)
    parser.add_argument("--lineage", default=MAIN_LINEAGE, metavar="NAME", help="whom it trains")
    text = "the variable with this agent's own key, of `nextstate keys create`"
    parser.add_argument("--key-env", default="", metavar="NAME", help=text)
    parser.add_argument("--plugin", action="store_true", help="also load NextState's plugin")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="show the change; write nothing")
    only.add_argument("--undo", action="store_true", help="put back what was there before")


def run(args: argparse.Namespace) -> int:
    from nextstate.app.connect import agents
    from nextstate.errors import ConfigError

    agent = next(one for one in agents.AGENTS if one.name == args.agent)
    if args.plugin and not (isinstance(agent, agents.FileAgent) and agent.plugin):
        raise ConfigError(f"NextState has no plugin for {agent.name}: leave out --plugin")
    if isinstance(agent, agents.EnvironmentAgent):
        return _run_environment(args, agent)
    path = args.file or agent.find(os.environ, Path.home())
    return _undo(path) if args.undo else _run_file(args, agent, path)


def _undo(path: Path) -> int:
    from nextstate.app.connect import settings_file

    found = settings_file.find(path)
    older = settings_file.undo(found)
    if older is None:
        print(f"{found.path} is as it was before")
    else:
        print(
            f"{found.path} is as it was before the last `nextstate connect`; it had changed since "
            f"an earlier one, and what was there before that is in {older}"
        )
    return 0


def _again(args: argparse.Namespace, *more: str) -> str:
    """The command that does more with the same file, configuration, lineage and key."""
    words = ["nextstate", "connect", args.agent, *more]
    given = {"--file": args.file, "--key-env": args.key_env}
    if args.config != DEFAULT_FILE:
        given["--config"] = args.config
    if args.lineage != MAIN_LINEAGE:
        given["--lineage"] = args.lineage
    for name, value in given.items():
        words += [name, str(value)] if value else []
    return shlex.join(words)


def _run_file(args: argparse.Namespace, agent: FileAgent, path: Path) -> int:
    from nextstate.app.connect import settings_file
    from nextstate.app.connect.editing import connected, settings_in
    from nextstate.app.connect.shown_diff import shown_diff

    target, hold_s = _target(args)
    found = settings_file.find(path)
    text = connected(agent, target, found, args.plugin)
    mode = settings_file.readers(found) if target.key and target.key in text else 0
    if text.encode() == found.data:
        print(f"{found.path} names the proxy already")
        if mode and not args.dry_run:
            settings_file.make_private(found)
    else:
        print(shown_diff(str(found.path), found.text, text))
        if not args.dry_run:
            copy = settings_file.write(found, text.encode(), private=mode != 0)
            print(f"\nwrote {found.path}; before: {copy}")
            print(f"back again: {_again(args, '--undo')}")
    if mode:
        holds = "would hold" if args.dry_run else "holds"
        print(
            f"{found.path} {holds} the proxy's key, so only its owner may read it then: its mode "
            f"was {mode:04o}. --undo restores that; if the agent runs as another user: "
            f"chmod {mode:o} {shlex.quote(str(found.path))}"
        )
    if target.context is None:
        print(
            "the model's context is not known: once the proxy is up, run this again, or set "
            "[engine] max_model_len"
        )
    if needs := agent.needs(target, settings_in(agent, text)):
        print(needs)
    if agent.plugin and connected(agent, target, found, plugin=True) != text:
        print(f"its plugin adds /good and /bad to the chat: {_again(args, '--plugin')}")
    return 0 if args.dry_run else _first_turn(target, hold_s)


def _run_environment(args: argparse.Namespace, agent: EnvironmentAgent) -> int:
    from nextstate.errors import ConfigError

    if args.undo or args.file:
        raise ConfigError(
            f"{agent.name} is connected by environment variables, without a file: `nextstate "
            f"connect {agent.name}` prints them, and `unset NAME` takes one back"
        )
    target, hold_s = _target(args)
    for name, value in agent.variables(target).items():
        print(f"export {name}={shlex.quote(value)}")
    key = f'"${target.key_variable}"' if target.key else "unused"
    print(f"export {agent.key_variable}={key}", flush=True)
    if agent.note:
        print(agent.note.replace("{model}", target.model), file=sys.stderr)
    return 0 if args.dry_run else _first_turn(target, hold_s, sys.stderr)


def _target(args: argparse.Namespace) -> tuple[Target, float]:
    """The proxy, and how long it may wait for its engine."""
    from nextstate.app.connect.first_turn import target_of, with_context
    from nextstate.app.settings import Settings

    settings = Settings.read(args.config)
    hold_s = settings.proxy.hold_s
    target = asyncio.run(with_context(target_of(settings, args.lineage, args.key_env), hold_s))
    return target, hold_s


def _first_turn(target: Target, hold_s: float, stream: Any = None) -> int:
    from nextstate.app.connect.first_turn import send
    from nextstate.errors import EXIT_LATER

    turn = asyncio.run(send(target, hold_s))
    if turn is None:
        print(
            f"no proxy listens at {target.url}: start it with `nextstate up`, then run this again "
            "to send a first turn",
            file=sys.stderr,
        )
        return EXIT_LATER
    print(f"a first turn arrived: {turn}", file=stream)
    return 0
