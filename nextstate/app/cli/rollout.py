"""`nextstate rollout`: plays tasks through the running proxy, or the stage of `[rollout]` alone."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import socket
import sys
import time
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from nextstate.app.cli.common import add_command, add_json, print_json, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nextstate.app.settings import Settings
    from nextstate.store import Store
    from rollout.attempt import Attempt
    from rollout.exam import Exams
    from rollout.proxy import ProxyClient
    from rollout.runner import Plan
    from rollout.tasks import Task

_EPILOG = """\
A task is a line of JSON: {"id", "split"?, …}, with the fields of its environment. For terminal:
{"id": "count-1", "instruction": "Write the number of lines of a.txt to n.txt.",
 "files": {"a.txt": "x\\ny\\n"}, "check": "test $(cat n.txt) = 2"}

examples:
  nextstate rollout                                              what [rollout] says, without end
  nextstate rollout terminal --tasks tasks.jsonl                 four attempts at each task
  nextstate rollout terminal --tasks 200                         at 200 generated ones
  nextstate rollout terminal --tasks tasks.jsonl --parallel 32 --epochs 10
  nextstate rollout terminal --tasks tasks.jsonl --run night-1   after a kill, the same again
  nextstate rollout terminal --tasks tasks.jsonl --eval          the held-out tasks, once each
  nextstate rollout terminal --tasks tasks.jsonl --eval --version 0
  nextstate rollout terminal --tasks tasks.jsonl --json | jq .outcome
  nextstate rollout terminal --tasks tasks.jsonl --ray 10.0.0.1:6379 --parallel 64
  nextstate rollout command --tasks agent.jsonl                  an agent program of yours
  nextstate rollout command --tasks agent.jsonl --sampling '{"temperature": 1, "seed": null}'
  nextstate rollout openenv --tasks 'http://127.0.0.1:8000?action=message&show=text'
"""
_STOP_S = 5.0
"""How long a run that is stopped still waits for the store."""
_STOPPED = 128 + signal.SIGTERM


def add(subparsers: Any) -> None:
    text = "play tasks of an environment through the running proxy"
    parser = add_command(subparsers, "rollout", run, text)
    parser.epilog = _EPILOG
    add_json(parser)
    text = "a file of plugins/environments/, as terminal, or module:function"
    text += " (default: what [rollout] says, without end)"
    parser.add_argument("environment", metavar="ENVIRONMENT", nargs="?", help=text)
    text = "the tasks: a file of one JSON object a line, the address of an OpenEnv server, or a "
    text += "folder of Harbor tasks; ?FIELD=VALUE after it gives every task a field. A number: so "
    text += "many that the environment generates"
    parser.add_argument("--tasks", metavar="SOURCE", help=text)
    text = "play the held-out tasks, which never train, instead of the others; without it they "
    text += "are the exams of candidates"
    parser.add_argument("--eval", action="store_true", help=text)
    numbers = {
        "parallel": (8, "episodes at once"),
        "group-size": (None, "attempts at each task (default: 4; with --eval 1)"),
        "epochs": (1, "times that all tasks are played"),
        "seed": (0, "the seed of the first task; each other one has one more"),
        "max-calls": (10, "replies of the model in an episode"),
        "max-tokens": (
            None,
            "tokens of all replies of an episode (default: what the engine takes)",
        ),
        "deadline": (600, "seconds of an episode"),
        "version": (None, "the policy version that serves them (default: the one that serves)"),
    }
    for name, (default, text) in numbers.items():
        if default is not None:
            text += f" (default: {default})"
        parser.add_argument(f"--{name}", type=whole_number, default=default, metavar="N", help=text)
    text = "a JSON object of settings that take the place of the agent's; null leaves its own out: "
    text += '\'{"temperature": 1, "seed": null}\''
    parser.add_argument("--sampling", type=_object, metavar="JSON", help=text)
    text = "a name for the run: started again with it, it goes on where it was"
    parser.add_argument("--run", dest="name", metavar="NAME", help=text)
    parser.add_argument("--lineage", metavar="NAME", help="whom they train (default: main)")
    text = "play on all nodes of the Ray cluster whose head is at HOST:PORT (default: in a Ray "
    text += "of this machine alone); needs Ray: `make ray` in a clone"
    parser.add_argument("--ray", nargs="?", const="", metavar="HOST:PORT", help=text)


def run(args: argparse.Namespace) -> int:
    from nextstate.app.settings import Settings
    from nextstate.egress import guard

    settings = Settings.read(args.config)
    guard(settings.hosts)
    if args.ray is None:
        return _run(args, settings, None, sys.stdout)
    from nextstate.app.stages import proxy_url
    from nextstate.ray_cluster import connect
    from rollout.nodes import host_of

    out = sys.stdout
    with redirect_stdout(sys.stderr):  # Ray prints what its nodes say between our results
        ray = connect(args.ray, settings.store.path)
        guard([*settings.hosts, host_of(proxy_url(settings, ray))])
        return _run(args, settings, ray, out)


def _run(args: argparse.Namespace, settings: Settings, ray: Any, out: TextIO) -> int:
    if args.environment is None:
        from nextstate.app.stages import run_rollout

        asyncio.run(run_rollout(settings, ray))
        return 0
    began = time.monotonic()
    try:
        attempts, in_exams = asyncio.run(_play(args, settings, ray, out))
    except asyncio.CancelledError:
        return _STOPPED
    if not args.json:
        from rollout.runner import summary

        print(summary(attempts, time.monotonic() - began), file=out)
        if in_exams:
            print(f"{in_exams} more in the exams of candidates: see `nextstate status`", file=out)
    return 0


async def _play(
    args: argparse.Namespace, settings: Settings, ray: Any, out: TextIO
) -> tuple[Sequence[Attempt], int]:
    """The episodes that were played, and how many more there were in exams."""
    import aiohttp

    from nextstate.app.own_key import proxy_key
    from nextstate.app.stages import nodes_for, proxy_url
    from nextstate.app.tls import proxy_connector
    from nextstate.episodes import Split
    from nextstate.errors import ConfigError
    from nextstate.hooks import EnvironmentKind, load_plugin
    from nextstate.pace import Pace
    from nextstate.store import Store
    from nextstate.store.waiting import Patience
    from rollout import runner
    from rollout.config import MOST_PARALLEL, environment_name
    from rollout.pictures import Pictures
    from rollout.proxy import ProxyClient
    from rollout.sources import tasks_of

    if args.tasks is None:
        raise ConfigError(
            f"--tasks is missing: name a file of tasks for {args.environment}, or say how many it "
            "shall generate"
        )
    sizes = (args.parallel, args.epochs, args.max_calls, args.deadline)
    if not all(sizes) or 0 in (args.group_size, args.max_tokens) or args.parallel > MOST_PARALLEL:
        raise ConfigError(f"expected numbers of at least 1, and --parallel up to {MOST_PARALLEL}")
    kind: EnvironmentKind = load_plugin("environments", args.environment, None)
    name = environment_name(args.environment)
    split = Split.EVAL if args.eval else Split.TRAIN
    read = await asyncio.to_thread(tasks_of, args.tasks, name, kind)
    tasks = [task for task in read if task.split is split]
    if not tasks:
        raise ConfigError(
            f"--tasks {args.tasks}: none of its {len(read)} tasks is for {split}; "
            f'give some "split": "{split}"'
        )
    if ray is None:
        await kind.check_machine()
    plan = runner.Plan(
        environment=name,
        parallel=args.parallel,
        group_size=args.group_size or (1 if args.eval else 4),
        seed=args.seed,
        max_calls=args.max_calls,
        max_tokens=args.max_tokens,
        deadline_s=args.deadline,
        name=args.name,
        lineage=args.lineage,
        version=args.version,
        sampling=args.sampling,
    )
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    key = proxy_key(settings)
    async with aiohttp.ClientSession(connector=proxy_connector(settings.proxy, 0)) as http:
        name, url = settings.engine.name, proxy_url(settings, ray)
        proxy = ProxyClient(http, url, key, name, args.deadline)
        pace = Pace(settings.rollout.share, proxy.people)
        tell = partial(_tell_json if args.json else _tell, out)
        # Agents run beneath this process: it gets no key to what people said.
        patience = Patience(math.inf)
        store = await asyncio.to_thread(Store, settings.store, patience=patience, with_key=False)
        exams = exams_of(args, settings, plan, read, proxy, store)
        pictures = Pictures(settings.store.path / "pictures")
        bounds = args.max_calls, args.deadline
        nodes = nodes_for(settings, ray, args.environment, *bounds, proxy) if ray else None
        try:
            with _alone(settings, args.name):
                given = plan, tasks * args.epochs, kind, proxy, tell
                played = await runner.run(*given, pictures, nodes, pace, exams)
                return played, exams.played if exams else 0
        finally:
            patience.end(_STOP_S)
            store.close()


def exams_of(
    args: argparse.Namespace,
    settings: Settings,
    plan: Plan,
    read: list[Task],
    proxy: ProxyClient,
    store: Store,
) -> Exams | None:
    """The exams that the run holds; None for one that trains nothing, or whose versions take none.

    A version that is a whole model is served by an engine of its own only once it serves.
    """
    from nextstate.records import MAIN_LINEAGE
    from rollout.exam import Exams, Given
    from rollout.sources import TaskFile

    if args.eval or settings.learner.trains_all:
        return None
    process = f", process {os.getpid()} on {socket.gethostname()}"
    source = TaskFile(args.tasks, read)
    limits = {name: getattr(plan, name) for name in ("max_calls", "max_tokens", "sampling")}
    given = Given(
        lineage=args.lineage or MAIN_LINEAGE,
        holder="nextstate rollout" + (f" --run {args.name}" if args.name else process),
        environment=plan.environment,
        tasks=partial(source.held_out, settings.rollout.exam_tasks),
        limits={name: value for name, value in limits.items() if value is not None},
        deadline_s=plan.deadline_s,
    )
    return Exams(given, proxy, store)


def _object(text: str) -> dict[str, Any]:
    from nextstate.wire import json_object

    if (found := json_object(text.encode())) is None:
        told = f"{text!r:.80}: expected a JSON object, as " + "'{\"temperature\": 1}'"
        raise argparse.ArgumentTypeError(told)
    return found


def _alone(settings: Settings, name: str | None) -> AbstractContextManager[None]:
    """Lets one process play a run of a name: two would take each other's episodes."""
    from nextstate.episodes import is_label
    from nextstate.errors import ConfigError
    from nextstate.private_files import make_folder
    from nextstate.process_lock import ProcessLock

    if name is None:
        return nullcontext()
    if not is_label(name):
        raise ConfigError(f"--run {name!r:.80}: expected 1 to 100 letters, digits and . _ : ~ + -")
    folder = settings.store.path / "rollout"
    make_folder(folder)
    return ProcessLock(
        folder / f"{name}.lock", f"--run {name} is played", "end it, or name another"
    )


def _row(attempt: Attempt) -> dict[str, Any]:
    return {
        "episode": attempt.episode,
        "task": attempt.task.id,
        "split": attempt.task.split,
        "status": attempt.status,
        "outcome": attempt.outcome,
        "calls": attempt.calls,
        "model_s": round(attempt.model_s, 3),
        "environment_s": round(attempt.environment_s, 3),
        "reason": attempt.reason,
    }


def _tell_json(out: TextIO, attempt: Attempt) -> None:
    print_json(_row(attempt), out)


def _tell(out: TextIO, attempt: Attempt) -> None:
    outcome = "·" if attempt.outcome is None else f"{attempt.outcome:g}"
    print(
        f"{attempt.episode}  {attempt.task.id}  {attempt.status}  outcome {outcome}  "
        f"{attempt.calls} calls",
        file=out,
        flush=True,
    )
