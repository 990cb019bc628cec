"""How long an engine takes for a prompt and for a token, by how much it does at once.

    python -m benchmarks.service_times > benchmarks/service_times.json
    python -m benchmarks.service_times --url http://gpu1.lan:8000 --model NAME > mine.json

Without `--url` it starts vLLM with the demo's policy. The prompts are random token ids, so that
only what is asked again is cached. `benchmarks.cluster` reads the file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import numpy

from demo.course import MODEL, POLICY
from nextstate.config import EngineConfig
from nextstate.engine.client import EngineClient
from nextstate.engine.process import command, environment, free_port, managed_key

PROMPTS = (64, 256, 512, 1024, 1900)
"""Tokens, none of them cached."""
ENDINGS = (16, 256)
"""New tokens behind a prompt that is cached."""
STREAMS = (1, 2, 4, 8, 16, 32, 64, 128)
ASKED, GENERATED = 64, 48
"""Tokens of each stream."""
_IDS = range(100, 1000)
"""Ordinary tokens, also of a small vocabulary."""
_START_S = 300.0


class Times:
    """What was measured, as functions: least squares for prompts, lines between points for steps.

    Beyond what was measured both go on as they ended.
    """

    def __init__(
        self,
        prefill: Sequence[tuple[int, int, float]],
        step: Sequence[tuple[int, float]],
        about: str = "",
    ) -> None:
        """`prefill` holds (new tokens, cached tokens, s), `step` (replies at once, s a token)."""
        self.about = about
        self._step = [*step]
        rows = numpy.array([_terms(new, cached) for new, cached, _ in prefill])
        seconds = numpy.array([s for *_, s in prefill])
        # Relative errors count: a short prompt as much as a long one.
        found = numpy.linalg.lstsq(rows / seconds[:, None], numpy.ones(len(rows)), rcond=None)[0]
        self._prefill: list[float] = found.tolist()
        self.worst = max(abs(self.prefill_s(new, c) / s - 1) for new, c, s in prefill)
        """The largest relative difference between what was measured and the function."""
        self.most = self._step[-1][0]
        """The largest number of replies at once that was measured."""

    @classmethod
    def read(cls, file: Path) -> Times:
        """What this program has printed. Raises OSError, KeyError and ValueError."""
        found = json.loads(file.read_text())
        about = found["about"]
        text = f"{about['engine']}, {about['machine']}, load {about['load']}, {about['date']}"
        return cls(found["prefill_new_cached_s"], found["step_streams_s"], text)

    def prefill_s(self, new: int, cached: int) -> float:
        """Until the first token, of a prompt with so many new and cached tokens."""
        terms = zip(self._prefill, _terms(new, cached), strict=True)
        return max(0.0, sum(a * b for a, b in terms))

    def step_s(self, replies: int) -> float:
        """One token of each of so many replies."""
        before, after = self._step[0], self._step[0]
        for after in self._step:
            if after[0] >= replies:
                break
            before = after
        if after == before:
            if len(self._step) == 1 or after[0] == replies or after == self._step[0]:
                return after[1]
            before = self._step[-2]
        slope = (after[1] - before[1]) / (after[0] - before[0])
        return after[1] + slope * (replies - after[0])


def _terms(new: int, cached: int) -> tuple[float, ...]:
    """A fixed part, the layers', the attention's to all tokens before, and the look-up's."""
    return 1.0, new, new * (cached + new / 2), cached


def _prompt(tokens: int) -> list[int]:
    return random.choices(_IDS, k=tokens)


async def _ask(engine: EngineClient, prompt: Sequence[int], tokens: int) -> float:
    """Seconds until so many tokens were generated."""
    body = {"model": engine.model, "prompt": [*prompt], "max_tokens": tokens, "ignore_eos": True}
    began = time.perf_counter()
    await engine.post("/v1/completions", body)
    return time.perf_counter() - began


async def _streams(engine: EngineClient, count: int) -> float:
    """Seconds for one token of each of so many replies: long ones without their first token."""
    taken: list[float] = []
    for tokens in (1, GENERATED):
        prompts = [_prompt(ASKED) for _ in range(count)]
        began = time.perf_counter()
        await asyncio.gather(*(_ask(engine, prompt, tokens) for prompt in prompts))
        taken.append(time.perf_counter() - began)
    return max(0.0, taken[1] - taken[0]) / (GENERATED - 1)


async def measure(engine: EngineClient, rounds: int, longest: int) -> dict[str, object]:
    """Medians, in seconds, as `benchmarks.cluster` reads them."""
    await _streams(engine, 2)  # the first of a kind is slow
    prefill: list[tuple[int, int, float]] = []
    for tokens in (one for one in PROMPTS if one <= longest):
        found = [await _ask(engine, _prompt(tokens), 1) for _ in range(rounds)]
        prefill.append((tokens, 0, statistics.median(found)))
        for more in (one for one in ENDINGS if one < tokens // 2):
            found.clear()
            for _ in range(rounds):
                first = _prompt(tokens - more)
                await _ask(engine, first, 1)
                found.append(await _ask(engine, [*first, *_prompt(more)], 1))
            prefill.append((more, tokens - more, statistics.median(found)))
    step = [
        (count, statistics.median([await _streams(engine, count) for _ in range(rounds)]))
        for count in STREAMS
    ]
    return {"prefill_new_cached_s": prefill, "step_streams_s": step}


@asynccontextmanager
async def _started() -> AsyncGenerator[str]:
    """The URL of a vLLM with the demo's policy; its key is in the environment."""
    port = free_port()
    config = EngineConfig(
        model=str(POLICY),
        served_model_name=MODEL,
        dtype="float32",
        max_model_len=2048,
        args=("--enforce-eager",),
        env={"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    os.environ.pop("VLLM_API_KEY", None)
    key = managed_key(config)
    inherited = environment(config, os.environ)
    with tempfile.TemporaryDirectory(prefix="nextstate-times-") as name:
        with (Path(name) / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command(config, port),
                env={**inherited, "VLLM_API_KEY": key},
                stdout=log,
                stderr=log,
                cwd=name,
            )
        try:
            async with EngineClient(f"http://127.0.0.1:{port}", MODEL, key) as engine:
                async with asyncio.timeout(_START_S):
                    while not await engine.healthy():
                        if process.returncode is not None:
                            sys.exit((Path(name) / "log").read_text()[-2000:])
                        await asyncio.sleep(0.5)
            os.environ["NEXTSTATE_TIMES_KEY"] = key
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


async def _main(options: argparse.Namespace) -> None:
    given: AbstractAsyncContextManager[str] = (
        nullcontext(options.url) if options.url else _started()
    )
    async with given as url:
        key = os.environ.get("NEXTSTATE_TIMES_KEY", "")
        async with EngineClient(url, options.model, key) as engine:
            load = os.getloadavg()[0]
            found = await measure(engine, options.rounds, options.longest)
    about = {
        "engine": options.about,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps({"about": about, **found}, indent=1))


def main() -> None:
    """Prints the file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service_times",
        description="Service times of an engine, for benchmarks.cluster.",
    )
    parser.add_argument("--url", help="of a running vLLM; its key is read from NEXTSTATE_TIMES_KEY")
    parser.add_argument("--model", default=MODEL, help="as the engine calls it")
    parser.add_argument("--about", default="vllm-cpu 0.32.0 with the demo's policy (1.5 M)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=int, default=1900, help="tokens of the longest prompt")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
