"""What does an update take while agents talk on the same cores, and how much slower do they get?

A real vLLM without a GPU answers agents through the proxy, and the learner makes updates beside it:
once with nothing divided, as vLLM and torch choose by themselves, and once with the cores divided
as `nextstate up` does. Each is also measured alone. All updates are the same. The agents ask the
demo's questions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.asking import Clients
from benchmarks.marks import READY, STEP
from benchmarks.publishing import make_zero_adapter, timed
from nextstate.app.cores import BINDING
from nextstate.app.settings import Settings
from nextstate.app.stack import Stack
from nextstate.app.supervisor import Supervisor
from nextstate.engine.process import free_port

NOTHING, OURS = "nothing divided", "cores divided"
_NAME = "model"
_SETTLE_S = 5.0
_UPDATE_TIMEOUT_S = 1800.0
_CONFIG = """\
[store]
dir = {state}
[engine]
model = {model}
served_model_name = "{name}"
dtype = "{dtype}"
max_model_len = 1024
args = ["--enforce-eager", "--max-num-seqs", "32"]
env = {{ TORCHDYNAMO_DISABLE = "1", VLLM_CPU_KVCACHE_SPACE = "1"{binding} }}
[proxy]
port = {port}
[judge]
kind = "rules"
[learner]
dtype = "{dtype}"
epochs = {epochs}
drift_limit = 99.0
step_kl = 99.0
"""


@dataclass(frozen=True, slots=True)
class Found:
    """One row of the table."""

    alone: float
    """Tokens a second of all agents while nothing trains."""
    quiet_s: float
    """Seconds of an update while nobody talks."""
    beside_s: float
    """Seconds of an update while the agents talk."""
    beside: float
    """Tokens a second of all agents during that update."""


def write_settings(given: argparse.Namespace, folder: Path, binding: str) -> Settings:
    """The configuration of one measurement."""
    file = folder / "nextstate.toml"
    file.write_text(
        _CONFIG.format(
            state=json.dumps(str(folder / "state")),
            model=json.dumps(str(given.model.absolute())),
            name=_NAME,
            dtype=given.dtype,
            epochs=given.epochs,
            binding=f', {BINDING} = "{binding}"' if binding else "",
            port=free_port(),
        )
    )
    return Settings.read(file)


async def measure(settings: Settings, agents: int, seconds: float, turns: int) -> Found:
    """The four numbers of one configuration."""
    await make_zero_adapter(settings)
    stack = Stack(settings)
    stack.supervisor = Supervisor([stack.children[name] for name in ("proxy", "engine")])
    async with stack.running() as running:
        await stack.wait_ready(running)
        clients = Clients(settings.proxy.port, _NAME)
        async with timed(settings, "updates", str(turns)) as learner:
            await learner.until(READY)

            async def update() -> tuple[float, float]:
                learner.go()
                step = (await learner.until(STEP, _UPDATE_TIMEOUT_S))[-1]
                return step.began, step.ended

            began, ended = await update()
            quiet_s = ended - began
            async with clients.asking(agents):
                await asyncio.sleep(_SETTLE_S)
                first = time.perf_counter()
                await asyncio.sleep(seconds)
                last = time.perf_counter()
                began, ended = await update()
            rate = tokens(clients, began, ended) / (ended - began)
            alone = tokens(clients, first, last) / (last - first)
            if clients.failures:
                raise SystemExit(f"{len(clients.failures)} requests failed: {clients.failures[0]}")
            return Found(alone, quiet_s, ended - began, rate)


def tokens(clients: Clients, began: float, ended: float) -> int:
    """Events that arrived in that time; vLLM sends one for each token."""
    return sum(began <= at < ended for reply in clients.replies for at in reply.times)


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside",
        description=__doc__,
        epilog="example: python -m benchmarks.beside --model ~/smollm2 --dtype bfloat16",
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", help="of engine and learner")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=16, help="of an update")
    parser.add_argument("--epochs", type=int, default=1, help="of an update")
    parser.add_argument("--seconds", type=float, default=30.0, help="of agents without an update")
    given = parser.parse_args()
    made = Table(box=box.MARKDOWN)
    for name in ("", "agents alone", "update alone", "update beside", "times", "agents", "of all"):
        made.add_column(name)
    with tempfile.TemporaryDirectory(prefix="nextstate-beside-") as temporary:
        first = 0.0
        for name, binding in ((NOTHING, "auto"), (OURS, "")):
            folder = Path(temporary, name.replace(" ", "-"))
            folder.mkdir()
            settings = write_settings(given, folder, binding)
            found = asyncio.run(measure(settings, given.agents, given.seconds, given.turns))
            first = first or found.alone
            made.add_row(
                name,
                f"{found.alone:.1f} tokens/s",
                f"{found.quiet_s:.1f} s",
                f"{found.beside_s:.1f} s",
                f"{found.beside_s / found.quiet_s:.2f}",
                f"{found.beside:.1f} tokens/s",
                f"{found.beside / first:.0%}",
            )
            Console(width=160).print(made)


if __name__ == "__main__":
    main()
