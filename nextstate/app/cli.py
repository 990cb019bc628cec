"""The command line."""

from __future__ import annotations

import argparse
import asyncio
import errno
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from nextstate import file_descriptors, logs
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.supervisor import EXIT_USAGE
from nextstate.config import DEFAULT_FILE
from nextstate.errors import NextStateError, StartError, StoreError, WaitError
from nextstate.hooks import load_plugin
from nextstate.offline import go_offline
from nextstate.private_files import only_for_owner
from nextstate.records import BASE_VERSION, MAIN_LINEAGE, Feedback, PolicyVersion
from nextstate.store.store import Store
from nextstate.wire import obj, one_line

_EXIT_LATER = os.EX_TEMPFAIL
"""The same command may succeed in a while."""
_EPILOG = """\
examples:
  nextstate doctor                      is everything there that `nextstate up` needs?
  nextstate up                          start engine, proxy, judge and learner
  nextstate turns --json | tail -1      the newest turn with its verdict
  nextstate feedback turn_1a2b --score -1 --hint "Answer in one sentence."
  nextstate versions 3                  what version 3 was made from, and how it was checked
  nextstate rollback 3                  serve version 3 again
  nextstate demo                        watch a small policy learn from two minutes of talk
"""

_FEEDBACK_EPILOG = """\
The last word on a turn counts, over any vote, until the turn has been trained on.

examples:
  nextstate feedback turn_1a2b --score 1
  nextstate feedback turn_1a2b --score -1 --hint "Answer in one sentence."
  nextstate feedback --session my-chat --score -1 --comment "It forgot the file."
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors that a person can fix exit with 2."""
    _print_anything()
    only_for_owner()
    go_offline()
    logs.to_stderr()
    file_descriptors.raise_limit()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        options = _parser().parse_args(arguments)
        code = options.run(options)
        sys.stdout.flush()  # here, where a reader that has left can still be told from an error
        return code
    except WaitError as error:  # nobody has done anything wrong: a supervisor starts a stage again
        print(f"nextstate: {error}", file=sys.stderr)
        return _EXIT_LATER
    except NextStateError as error:
        print(f"nextstate: {error}", file=sys.stderr)
        return EXIT_USAGE
    except BrokenPipeError:  # `nextstate turns | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        print(f"nextstate: {error}; give yourself access to it, or name another", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"nextstate: {error}; make room there", file=sys.stderr)
        return _EXIT_LATER


def _print_anything() -> None:
    """Lets no text fail that the terminal's encoding does not have: it is shown escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _count(text: str) -> int:
    """A number of things, or the name of one, as an argument."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number from 0 to 999999999")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nextstate",
        description="A transparent proxy in front of vLLM that learns from what happens next.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, config: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if config:
            sub.add_argument(
                "--config",
                type=Path,
                default=DEFAULT_FILE,
                metavar="FILE",
                help=f"the TOML file (default: {DEFAULT_FILE})",
            )
        sub.set_defaults(run=run)
        return sub

    command("up", _up, "start engine, proxy, judge and learner, and keep them running")
    for name in ("proxy", "judge", "learner"):
        stage = command(name, _stage, f"run the {name} alone")
        stage.set_defaults(stage=name)
        if name == "proxy":
            stage.add_argument("--worker", type=int, help=argparse.SUPPRESS)
        if name == "learner":
            text = "train this one alone (default: all in turn, over one copy of the base model)"
            stage.add_argument("--lineage", metavar="NAME", help=text)
        if name == "judge":
            actions = stage.add_subparsers(metavar="eval")
            text = "compare the configured judge with labelled next states"
            evaluation = actions.add_parser("eval", help=text, description=text)
            evaluation.epilog = "example: nextstate judge eval judge/data/next_states.jsonl"
            evaluation.add_argument("file", type=Path, help="one labelled next state a line, JSON")
            evaluation.add_argument("--split", help="only the cases of this split, as dev or test")
            evaluation.add_argument("--config", type=Path, default=DEFAULT_FILE, metavar="FILE")
            evaluation.set_defaults(run=_judge_eval)
    text = "watch a small policy learn from talk, on a real vLLM"
    demo = command("demo", _demo, text, config=False)
    demo.epilog = "example: nextstate demo --persona teacher --method opd --seed 1"
    demo.add_argument(
        "--method",
        choices=("binary", "opd", "opd_topk", "combined", "combined_sampled"),
        default="combined",
        help="learn from scores, from hints, or from both (default); see [learner] method",
    )
    demo.add_argument(
        "--persona",
        choices=("student", "teacher"),
        default="student",
        help="student: nothing that looks machine-written; teacher: specific, friendly comments",
    )
    demo.add_argument("--seed", type=_count, default=0, help="of the conversations and the adapter")
    demo.add_argument(
        "--updates", type=_count, default=0, help="adapters to train (0: the default)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        help="folder for its configuration, records and curve (default: demo-output)",
    )
    for name, run, text in (
        ("status", _status, "show each part's health and what is stored"),
        ("turns", _turns, "list recorded turns with next states and verdicts"),
        ("versions", _versions, "list the policy versions"),
    ):
        sub = command(name, run, text)
        sub.add_argument("--json", action="store_true", help="one JSON object a line")
        if name == "turns":
            sub.add_argument("--limit", type=_count, default=0, help="only the newest N (0: all)")
        if name == "versions":
            sub.add_argument("number", type=int, nargs="?", help="show what made this one")
            text = "only this one's (of a NUMBER: default main)"
            sub.add_argument("--lineage", metavar="NAME", help=text)
    rollback = command("rollback", _rollback, "serve an earlier version again")
    rollback.add_argument("number", type=int, help="its number; 0 is the base model")
    rollback.add_argument(
        "--lineage", default=MAIN_LINEAGE, metavar="NAME", help="default: %(default)s"
    )
    feedback = command("feedback", _feedback, "say yourself how good a turn was")
    feedback.epilog = _FEEDBACK_EPILOG
    feedback.formatter_class = argparse.RawDescriptionHelpFormatter
    which = feedback.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "turn", nargs="?", help="as in `nextstate turns` or the x-nextstate-turn header"
    )
    which.add_argument(
        "--session", metavar="NAME", help="its newest main turn; by our name or your agent's own"
    )
    feedback.add_argument(
        "--score", type=int, choices=(-1, 0, 1), required=True, help="bad, neither, or good"
    )
    feedback.add_argument(
        "--hint", help="what should have been done, in one to three sentences; it is trained on"
    )
    feedback.add_argument("--comment", help="a note for people; it is only kept")
    command("doctor", _doctor, "check that everything `nextstate up` needs is there")
    return parser


def _up(options: argparse.Namespace) -> int:
    return asyncio.run(_run_stack(Settings.read(options.config)))


async def _run_stack(settings: Settings) -> int:
    stack = Stack(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stack.supervisor.stop)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"starting on {stack.dir} (logs in {stack.dir / 'logs'})")
    async with stack.running() as task:
        ready = asyncio.create_task(stack.wait_ready(task))
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        loading = "vLLM loads the model (half a minute and more)"
        waiting = loading if stack.managed else f"waiting for the engine at {stack.engine_url}"
        with console.status(waiting, spinner=spinner):
            await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        if not stack.supervisor.stopping.is_set():
            ready.result()
            console.print(f"ready: point your agent at {settings.proxy.url}/v1 (Ctrl-C ends it)")
        await asyncio.gather(ready, return_exceptions=True)
        await task
    return 0


def _stage(options: argparse.Namespace) -> int:
    from nextstate.app import stages

    settings = Settings.read(options.config)
    if options.stage == "learner":
        stages.run_learner(settings, options.lineage)
    elif options.stage == "judge":
        asyncio.run(stages.run_judge(settings))
    else:
        import uvloop

        uvloop.run(stages.run_proxy(settings, options.worker))
    return 0


def _judge_eval(options: argparse.Namespace) -> int:
    from nextstate.app import stages

    settings = Settings.read(options.config)
    print(asyncio.run(stages.evaluate_judge(settings, options.file, options.split)))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from demo.run import run_demo

    return run_demo(
        method=options.method,
        persona=options.persona,
        seed=options.seed,
        updates=options.updates,
        out=options.out,
    )


def _status(options: argparse.Namespace) -> int:
    from nextstate.app.status import agreement_shown, status

    found = asyncio.run(status(Settings.read(options.config)))
    if options.json:
        _print_json(found)
        return 0
    found["judge_agreement"] = agreement_shown(found["judge_agreement"])
    for name, value in found.items():
        if isinstance(value, dict):
            for key, inner in obj(value).items():  # pyright: ignore[reportUnknownArgumentType]
                print(f"{name}/{key:{27 - len(name)}} {inner}")
        else:
            print(f"{name:28} {value}")
    return 0


def _turns(options: argparse.Namespace) -> int:
    store = Store(Settings.read(options.config).store)
    ids = store.turn_ids(options.limit or None, newest_first=bool(options.limit))
    for turn_id in reversed(ids) if options.limit else ids:
        turn, verdict = store.turn(turn_id), store.verdict(turn_id)
        if turn is None:
            continue
        states, said = store.next_states(turn_id), store.feedback(turn_id)
        if options.json:
            _print_json(
                {
                    "turn": turn.id,
                    "session": turn.session,
                    "index": turn.index,
                    "kind": turn.kind,
                    "lineage": turn.lineage,
                    "version": turn.policy_version,
                    "trainable": turn.trainable,
                    "reason": turn.untrainable,
                    "next_state": [{"source": s.source, "text": s.text} for s in states],
                    "verdict": verdict
                    and {"score": verdict.score, "votes": verdict.votes, "hint": verdict.hint},
                    "feedback": said and {"score": said.score, "comment": said.comment},
                }
            )
            continue
        score = "  ·" if verdict is None else f"{verdict.score:+3d}"
        followed = " | ".join(s.text[:90] for s in states)
        print(f"{turn.id} v{turn.policy_version} {score}  {one_line(followed[:90])}")
    return 0


def _versions(options: argparse.Namespace) -> int:
    from nextstate.app import version_views as version_cards

    store = Store(Settings.read(options.config).store)
    if options.number is not None:
        version = _version(store, options.lineage or MAIN_LINEAGE, options.number)
        used = store.used_turns(version.lineage, version.number)
        if options.json:
            _print_json(version_cards.row(version) | {"turns": version_cards.turn_rows(used)})
        else:
            print(version_cards.card(version, used))
        return 0
    versions = store.versions(options.lineage)
    if options.json:
        for version in versions:
            _print_json(version_cards.row(version))
    elif versions:
        print(version_cards.table(versions))
    return 0


def _version(store: Store, lineage: str, number: int) -> PolicyVersion:
    version = store.version(lineage, number)
    if version is None:
        known = ", ".join(str(v.number) for v in store.versions(lineage)) or "only 0"
        raise StartError(f"there is no version {number} of lineage {lineage!r}; known: {known}")
    return version


def _rollback(options: argparse.Namespace) -> int:
    from nextstate.app.stages import publish_version

    settings = Settings.read(options.config)
    store = Store(settings.store)
    version = _version(store, options.lineage, options.number)
    if options.lineage not in settings.all_lineages:
        raise StartError(f"there is no lineage {options.lineage!r}: see [lineages.NAME]")
    if version.path is None and version.number != BASE_VERSION:
        raise StartError(
            f"version {version.number} was rejected before it was written and cannot serve: "
            f"{version.reason}; choose another one of `nextstate versions`"
        )
    asyncio.run(publish_version(settings, store, version))
    print(f"version {version.number} serves {version.lineage}")
    return 0


def _feedback(options: argparse.Namespace) -> int:
    settings = Settings.read(options.config)
    store = Store(settings.store)
    turn = options.turn
    if turn is None:
        from proxy.linking.continuation import session_names

        profile = load_plugin("agents", settings.agents.profile, None)
        turn = store.newest_turn(session_names(options.session, profile))
        if turn is None:
            raise StoreError(
                f"there is no main turn in a session {options.session!r}: "
                "see `nextstate turns --json`"
            )
    found = store.give_feedback(Feedback(turn, options.score, options.hint, options.comment))
    print(f"{turn}: score {options.score:+d}" + ("" if found.applied else f" ({found.reason})"))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from nextstate.app.doctor import checks

    failed = False
    for check in checks(options.config):
        failed = failed or check.problem is not None
        print(
            f"{'FAIL' if check.problem else ' ok '}  {check.name}: {check.problem or check.found}"
        )
    return EXIT_USAGE if failed else 0


def _print_json(value: Any) -> None:
    """Prints one line of JSON; where the terminal has no UTF-8, with JSON's own escapes."""
    line = orjson.dumps(value).decode()
    plain = (sys.stdout.encoding or "").lower().replace("_", "-") not in ("utf-8", "utf8")
    print(json.dumps(orjson.loads(line)) if plain else line)
