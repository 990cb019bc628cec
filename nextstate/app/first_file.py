"""The first configuration: three questions, and the file that their answers make."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextstate.config import EngineConfig, StoreConfig
from nextstate.errors import StartError

OTHER_AGENT = "other"
SMALL = "smollm2"
"""As an answer: the small model."""
JUDGES = {
    "engine": "the model itself says how good its reply was; a small model may not be able to",
    "rules": "without a model: reads what people and tools answer, in five languages",
    "rules,engine": "rules first, the model about what they are not sure of",
}
"""`[judge] kind`, and what it means."""
_HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_ASKED_AT_MOST = 100
_GPU_SHARE = "0.5"
"""Of one GPU's memory that vLLM gets; the learner needs some of the rest."""
_LONGEST = 4096
_FILE = """\
# Written by `nextstate up`. What is not here has its default. An unknown key is an error, and
# `nextstate doctor` checks this file. A change takes effect when `nextstate up` starts again.

[store]
# All that is recorded: the database, adapters, checkpoints, logs. Only you can read it; delete the
# folder to forget everything.
dir = {store}

[engine]
# What vLLM serves and what learns: a folder with weights, or a name from the local model cache,
# which `nextstate fetch NAME` fills.
model = {model}
# The name that your agent asks for; empty: the same as model.
served_model_name = {name}
# Tokens of context; 0: the model's own limit, or what its memory holds. Agents with many tools need
# 32768 or more.
max_model_len = 0
# The parser of tool calls must fit the model (hermes: Qwen), or tool calls stay text.{gpu_note}
args = [{args}]
{gpu_env}
[proxy]
# Agents ask http://127.0.0.1:{port}/v1, and http://127.0.0.1:{port}/ is the web page. Another port
# if this one is taken. For other machines: host = "0.0.0.0", and a key for each agent, which
# `nextstate keys create NAME` makes.
port = {port}

[judge]
# "engine": the model itself judges, by what came next; "rules": offline, without a model;
# "rules,engine": the model is asked only where the rules are not sure.
kind = {judge}

[learner]
# Judged turns that make one update, and so one version.
batch_size = 16
# "always"; "idle": it waits while the engine serves; "22:00-07:00": only at night.
schedule = "always"
{learner_note}{agent_note}"""
_GPU_NOTE = """
# vLLM would take 92 % of the one GPU: it leaves half to the learner."""

_SEVERAL_NOTE = """\
# vLLM computes on this GPU, and the learner on the first one. More for vLLM: see docs/scale.md.
env = {{ CUDA_VISIBLE_DEVICES = {second} }}
"""
_CPU_NOTE = """\
# Seconds after which an update starts with fewer turns: one correction soon makes a version. 0: it
# waits for all of them, which is steadier.
max_wait_s = 60.0
"""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a person decides before the first start."""

    model: str = EngineConfig().model
    agent: str = OTHER_AGENT
    judge: str = "engine"


def usual(gpus: int, small: Path) -> Answers:
    """The defaults. `small`: the folder of the small model that `nextstate fetch smollm2` makes."""
    if gpus:
        return Answers()
    return Answers(str(small), judge="rules")  # what a CPU serves does not understand how to judge


def ask(
    read: Callable[[str], str],
    say: Callable[[str], None],
    agents: Sequence[str],
    cached: Sequence[str],
    gpus: int,
    small: Path,
) -> Answers:
    """Asks the three questions. `read` shows a prompt and returns a line; it raises EOFError.

    `cached` are models of the local cache, `small` as in `usual`. Raises StartError if the answers
    end.
    """
    default = usual(gpus, small)
    try:
        say("Three questions. Enter takes the answer in [brackets].")
        say("\n1  Which model learns? A folder with weights, or a name on the model hub.")
        if cached:
            say(f"   In the local cache: {', '.join(cached)}")
        if not gpus and not small.is_dir():
            say("   Without a GPU, a small one: `nextstate fetch smollm2` downloads the default.")
        known = (SMALL, str(small))
        model = _answer(read, say, default.model, lambda m: None if m in known else _bad_model(m))
        say("\n2  Which agent talks to it?")
        say(f"   {', '.join(agents)} or {OTHER_AGENT} (any OpenAI client)")
        known = (*agents, OTHER_AGENT)
        agent = _answer(read, say, default.agent, lambda given: _not_in(given, known))
        say("\n3  Who judges its replies, by what came next?")
        for kind, text in JUDGES.items():
            say(f"   {kind:13} {text}")
        judge = _answer(read, say, default.judge, lambda given: _not_in(given, list(JUDGES)))
    except EOFError:
        raise StartError(
            "there was no answer, so no file was written: `nextstate up --yes` takes the defaults"
        ) from None
    return Answers(str(small) if model == SMALL else model, agent, judge)


def file_text(answers: Answers, gpus: Sequence[str]) -> str:
    """The configuration file for these answers, on a machine with these GPUs (`visible_gpus`)."""
    args = list(EngineConfig().args)
    if len(gpus) == 1:
        args += ["--gpu-memory-utilization", _GPU_SHARE]
    note = ""
    if answers.agent != OTHER_AGENT:
        note = f"\n# Your agent: `nextstate connect {answers.agent}` makes it talk to the proxy.\n"
    return _FILE.format(
        store=json.dumps(StoreConfig().dir),
        model=_quoted(answers.model),
        name=_quoted(_served_name(answers.model)),
        gpu_note=_GPU_NOTE if len(gpus) == 1 else "",
        gpu_env=_SEVERAL_NOTE.format(second=_quoted(gpus[1])) if len(gpus) > 1 else "",
        args=", ".join(map(json.dumps, args)),
        port=8080,
        judge=json.dumps(answers.judge),
        learner_note="" if gpus else _CPU_NOTE,
        agent_note=note,
    )


def _quoted(text: str) -> str:
    """A TOML string: JSON's, which leaves DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _served_name(model: str) -> str:
    """A folder's own name: its whole path is long, and nobody else's business."""
    try:
        folder = Path(model).expanduser()
        return folder.resolve().name if folder.is_absolute() or folder.is_dir() else ""
    except (OSError, ValueError, RuntimeError):  # no path: see `_bad_model`
        return ""


def write_file(file: Path, text: str) -> None:
    """Writes a new file. Raises StartError if it exists by now or cannot be written."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise StartError(f"{file} cannot be written: {error.strerror}") from error


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists, as CUDA_VISIBLE_DEVICES names them."""
    if shutil.which("nvidia-smi") is None:
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    argv = ["nvidia-smi", "--list-gpus"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(found))]


def cached_models() -> list[str]:
    """Models of the local cache that can chat, in the order of their names."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir()
    except CacheNotFound:
        return []
    return sorted(
        repo.repo_id
        for repo in found.repos
        if repo.repo_type == "model"
        and any(file.file_name == "config.json" for r in repo.revisions for file in r.files)
    )


def _answer(
    read: Callable[[str], str],
    say: Callable[[str], None],
    default: str,
    wrong: Callable[[str], str | None],
) -> str:
    for _ in range(_ASKED_AT_MOST):
        given = read(f"   [{default}] ").strip()[:_LONGEST] or default
        reason = wrong(given)
        if reason is None:
            return given
        say(f"   {reason}")
    raise EOFError


def _bad_model(given: str) -> str | None:
    try:
        folder = Path(given).expanduser()
        if folder.is_dir():
            has = (folder / "config.json").is_file()
            return None if has else f"{given} has no config.json: name a folder with weights"
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, "~nobody"
        return f"{given!r:.80} is neither a folder nor a name like OWNER/NAME"
    if given.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(given):
        return f"{given!r:.80} is neither a folder on this machine nor a name like OWNER/NAME"
    return None


def _not_in(given: str, known: Sequence[str]) -> str | None:
    return None if given in known else f"{given!r:.80} is not one of {', '.join(known)}"
