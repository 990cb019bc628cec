"""Versions that are whole models: each has an engine of its own, which `nextstate up` runs.

Whoever wants to put such a version into service asks for its engine by a file in the state folder,
`engines/NAME.json`. The supervisor starts the engine beside those that run, and writes its address
or why it failed there (`nextstate/app/engine_pool.py`). Once the engine has agreed with the
learner's log-probs of fixed prompts, the version may serve.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nextstate.engine.adapter_files import unreadable, verify_adapter
from nextstate.engine.defaults import EXPLICIT
from nextstate.errors import AdapterError, EngineError
from nextstate.private_files import make_folder, replace_file
from nextstate.records import Json, PolicyVersion
from nextstate.wire import json_object

if TYPE_CHECKING:
    from nextstate.engine.client import EngineClient

log = logging.getLogger(__name__)

PROBE_FILE = "probe.json"
"""In a version's folder: the learner's own log-probs after fixed prompts."""
START_TIMEOUT_S = 900.0
"""How long a version's engine may take until it is ready: others may have to end before."""
EXACT_NATS, ROUNDED_NATS = 1e-4, 0.25
"""The largest difference from the learner's log-probs, of an engine that computes in float32 and of
one that rounds more. Another version differs by far more on some of the tokens."""
_POLL_S = 0.2
_COMPARED = 20
"""Log-probs that an engine is asked for; vLLM tells no more by default."""
WANTED, UP, FAILED = "wanted", "up", "failed"


@dataclass(frozen=True, slots=True)
class WholeEngine:
    """The engine of one version, as the files tell it."""

    name: str
    """The version's name in vLLM, which is also its file's."""
    lineage: str
    number: int
    path: str
    """The version's folder."""
    sha256: str
    state: str = WANTED
    url: str = ""
    """Once it is up."""
    exact: bool = False
    """Whether it computes in float32, as the learner does."""
    why: str = ""
    """Why it failed."""


def engine_of(version: PolicyVersion) -> WholeEngine:
    """What asks for a version's engine. Raises AdapterError if the version was deleted."""
    name, path, sha256 = version.adapter_name, version.path, version.sha256
    if name is None or path is None or sha256 is None:
        raise AdapterError(f"the weights of version {version.number} were deleted to make room")
    return WholeEngine(name, version.lineage, version.number, path, sha256)


def engines_folder(state_dir: Path) -> Path:
    """The folder of the files."""
    return state_dir / "engines"


def read_engines(state_dir: Path) -> dict[str, WholeEngine]:
    """The engines that are wanted, run or have failed, by their names."""
    found: dict[str, WholeEngine] = {}
    for file in sorted(engines_folder(state_dir).glob("*.json")):
        try:
            one = WholeEngine(**(json_object(file.read_bytes()) or {}))
        except (OSError, TypeError):  # it was removed meanwhile
            continue
        found[one.name] = one
    return found


def write_engine(state_dir: Path, engine: WholeEngine) -> None:
    """Writes one of them in one step. Raises OSError."""
    folder = engines_folder(state_dir)
    make_folder(folder)
    replace_file(folder / f"{engine.name}.json", json.dumps(asdict(engine)))


def forget_engine(state_dir: Path, name: str) -> None:
    """Removes one of them."""
    (engines_folder(state_dir) / f"{name}.json").unlink(missing_ok=True)


async def bring_up(state_dir: Path, beside: EngineClient, version: PolicyVersion) -> None:
    """Returns once the version's own engine runs and agrees with the learner.

    `beside` is the base's engine, whose key the other one has too. Raises EngineError if a later
    try may succeed, and AdapterError for weights that are not the registered ones or that the
    engine reads otherwise than the learner.
    """
    wanted = engine_of(version)
    await asyncio.to_thread(verify_adapter, Path(wanted.path), wanted.sha256)
    until = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < until:
            found = (await asyncio.to_thread(read_engines, state_dir)).get(wanted.name)
            if found is None:
                write_engine(state_dir, wanted)
            elif found.state == FAILED:
                forget_engine(state_dir, wanted.name)
                raise EngineError(f"the engine of version {version.number}: {found.why}")
            elif found.state == UP:
                async with beside.twin(found.url, wanted.name) as engine:
                    if await engine.healthy():
                        nats = await agree(engine, found)
                        log.info("version=%d its engine differs by %.1g nats", found.number, nats)
                        return
            await asyncio.sleep(_POLL_S)
    except OSError as error:
        raise EngineError(f"{engines_folder(state_dir)} cannot be written: {error}") from error
    raise EngineError(
        f"the engine of version {version.number} was not up within {START_TIMEOUT_S:.0f} s: see "
        f"{state_dir / 'logs'}"
    )


async def agree(engine: EngineClient, found: WholeEngine) -> float:
    """How far the engine's log-probs are from the learner's at most, in nats.

    Raises AdapterError if that is too far, EngineError if the engine does not answer.
    """
    largest = 0.0
    for prompt, expected in await asyncio.to_thread(_read_probe, Path(found.path)):
        told = await _likeliest(engine, prompt)
        for token, logprob in expected.items():
            if token not in told:
                raise AdapterError(_differs(found, f"token {token} is not among its likeliest"))
            largest = max(largest, abs(told[token] - logprob))
    limit = EXACT_NATS if found.exact else ROUNDED_NATS
    if not largest <= limit:
        raise AdapterError(_differs(found, f"up to {largest:.2g} nats, over {limit:g}"))
    return largest


def _read_probe(folder: Path) -> list[tuple[list[int], dict[int, float]]]:
    """Prompts, and the learner's log-probs of the likeliest tokens after each."""
    try:
        probes = json.loads((folder / PROBE_FILE).read_bytes())["probes"]
        found = [(p["prompt"], zip(p["tokens"], p["logprobs"], strict=True)) for p in probes]
        return [(prompt, dict(expected)) for prompt, expected in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(
            folder, f"the version in {folder} cannot be probed: {error!r}", error
        ) from error


async def _likeliest(engine: EngineClient, prompt: list[int]) -> dict[int, float]:
    """The log-probs of the likeliest next tokens, by token id, before any truncation."""
    body: Json = {"model": engine.model, "prompt": prompt, "max_tokens": 1}
    body |= {"logprobs": _COMPARED, "return_tokens_as_token_ids": True, **EXPLICIT}
    answer = await engine.post("/v1/completions", body)
    try:
        told = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(token.removeprefix("token_id:")): float(told[token]) for token in told}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"{engine.url} told no log-probs to compare: {error!r}") from error


def _differs(found: WholeEngine, how: str) -> str:
    return (
        f"the engine reads version {found.number} otherwise than the learner: {how}; see "
        "docs/scale.md"
    )


def failed(engine: WholeEngine, why: str) -> WholeEngine:
    """The engine, which has failed."""
    return replace(engine, state=FAILED, why=why)
