"""The managed vLLM server: its command line, its environment, and why it ended."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nextstate.config import EngineConfig, secret
from nextstate.engine.key_check import KEY_VARIABLE, KeyCheck
from nextstate.errors import ConfigError, StartError
from nextstate.free_memory import free_ram
from nextstate.offline import SWITCHES, switches
from nextstate.wire import json_object, obj

HOST = "127.0.0.1"
VOTE_PRIORITY = 10
"""Behind the requests of agents, which have 0."""

START_TIMEOUT_S = 600.0
"""How long a server may take to be ready: a large model is read from a slow disk."""
_LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Of those that vLLM's `--max-lora-rank` accepts."""
_BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM asks for and a model of text does not need."""
_NUMA = "libnuma.so.1"
_COMPILES_NOT = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""With one of these at 1 torch compiles nothing."""
_OWN_VARIABLES = "VLLM_"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU_SHARE = 0.92
"""vLLM's own default."""
_CACHE_PART = 4
"""On a CPU all engines' caches together get one part in so many of the free memory: the learner,
the weights and the rest of the machine need more."""
_LONGEST_STEP_S = 3600
"""How long one step of vLLM may take on a CPU, where a step reads whole prompts. By default it ends
after 300 s: it did so at votes of 8 000 tokens, with SmolLM2-135M on two busy cores."""
_MARK = re.compile(r"(?:Error|Exception)(?:\[[^\[\]\n]*\])?: |^ERROR|error:", re.MULTILINE)
_QUIET = re.compile(r"^(\(\w+ pid=\d+\) )?(INFO|WARNING) ")
_LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|INFO|WARNING) \S+ \S+ \[\S+\] )?")


def command(
    config: EngineConfig,
    port: int,
    lora_rank: int | None = 16,
    kept: int = 1,
    host: str = HOST,
) -> list[str]:
    """The server's command line on a port of `host`, for adapters of up to `lora_rank`.

    With None it loads none: it serves one version that is a whole model.
    `kept` adapters stay loaded: one version of each lineage, and a trained judge. There are two
    more while a version changes: the one that ends its replies, and the one that is tried.
    """
    argv = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", config.model_path, "--served-model-name", config.name]
    argv += ["--host", host, "--port", str(port), "--dtype", config.dtype]
    argv += ["--disable-uvicorn-access-log"]
    if lora_rank is not None:
        rank = min(known for known in _LORA_RANKS if known >= lora_rank)
        argv += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(kept + 2)]
    argv += ["--middleware", f"{KeyCheck.__module__}.{KeyCheck.__name__}"]
    if config.option("--max-model-len") is None:
        # -1: the model's own limit, or as many tokens as the memory for its cache holds.
        argv += [f"--max-model-len={config.max_model_len or -1}"]
    if config.option("--logprobs-mode") is None:
        # Those of the sampler: after penalties, temperature and truncation. The raw ones are of a
        # distribution from which no token was drawn.
        argv += ["--logprobs-mode", "processed_logprobs"]
    if "--enable-prompt-tokens-details" not in config.args:
        # Without it only vLLM's own /v1/responses says how much of a prompt was cached, and the
        # chat route does not.
        argv += ["--enable-prompt-tokens-details"]
    if config.option("--scheduling-policy") is None:
        # The judge's votes carry a priority, so that agents go first.
        argv += ["--scheduling-policy", "priority"]
    if on_cpu() and not any("enable-chunked-prefill" in argument for argument in config.args):
        # On a CPU vLLM ends at a sampled request with a seed if its prompt comes in chunks: its
        # random generator cannot be reset.
        argv += ["--no-enable-chunked-prefill"]
    free = None if _sizes_cache(config) or not on_cpu() else free_ram()
    if free is not None:
        # On a CPU vLLM takes 92 % of the machine's memory, or ends if that is not free.
        argv += ["--kv-cache-memory-bytes", str(free // (_CACHE_PART * config.replicas))]
    return argv + list(config.args)


def _sizes_cache(config: EngineConfig) -> bool:
    """Whether the configuration says how much memory the cache of keys and values has."""
    options = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
    return "VLLM_CPU_KVCACHE_SPACE" in config.env or any(map(config.option, options))


def by_priority(config: EngineConfig) -> bool:
    """Whether requests may name a priority: yes, unless `[engine] args` set another policy."""
    policy = config.option("--scheduling-policy")
    return config.mode == "managed" and policy in (None, "priority")


def gpu_share(config: EngineConfig, inherited: Mapping[str, str]) -> float:
    """The share of the first visible GPU's memory that a managed server takes.

    Raises ConfigError if it is not a number.
    """
    elsewhere = config.env.get(VISIBLE, inherited.get(VISIBLE)) != inherited.get(VISIBLE)
    if config.mode != "managed" or elsewhere or on_cpu():
        return 0.0
    name = "--gpu-memory-utilization"
    given = config.option(name) or _GPU_SHARE
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"[engine] args: {name} {given}: expected a share, such as 0.5") from None


def managed_key(config: EngineConfig) -> str:
    """The key for a server that will be started: the user's own, or a new one.

    Raises ConfigError for a key on the command line, which every user of the machine can read.
    """
    if config.option("--api-key") is not None:
        raise ConfigError(
            "[engine] args: --api-key can be read by every user of this machine: put the key into "
            "an environment variable and name that in [engine] api_key_env; without it each start "
            "makes a key of its own"
        )
    chosen = secret(config.api_key_env, "[engine] api_key_env") or config.env.get(KEY_VARIABLE)
    return chosen or secrets.token_urlsafe(32)


def environment(config: EngineConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: adapters at run time, no downloads, no usage reports.

    vLLM's own variables are not inherited: they were not meant for this server.
    """
    left_out = not_passed(config, inherited)
    return {
        **{name: value for name, value in inherited.items() if name not in left_out},
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        **({"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(_LONGEST_STEP_S)} if on_cpu() else {}),
        **switches(sends_metrics=False),
        # Our folders `proxy`, `judge` and `plugins` must not shadow modules inside vLLM.
        "PYTHONSAFEPATH": "1",
        **config.env,
    }


def not_passed(config: EngineConfig, inherited: Mapping[str, str]) -> list[str]:
    """vLLM's own variables that the server does not get: `[engine] env` does not name them."""
    ours = [name for name in inherited if name.startswith(_OWN_VARIABLES)]
    return sorted(name for name in ours if name not in config.env and name not in SWITCHES)


def free_port(host: str = HOST) -> int:
    """A port of `host` that is free at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def free_ports(count: int) -> list[int]:
    """As many different ones."""
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


def check_replicas(config: EngineConfig) -> None:
    """Raises ConfigError if several servers cannot divide the GPUs."""
    devices = _devices(config)
    if config.replicas == 1 or on_cpu() or (devices and len(devices) % config.replicas == 0):
        return
    given = f"names {len(devices)} of them" if devices else "does not name them"
    raise ConfigError(
        f"[engine] replicas = {config.replicas} divide the GPUs that [engine] env names, and it "
        f'{given}: name as many for each, such as env = {{ {VISIBLE} = "0,1" }}'
    )


def of_replica(config: EngineConfig, number: int) -> EngineConfig:
    """The configuration of one server: of several on GPUs each gets an equal share of these."""
    devices = _devices(config)
    share = len(devices) // config.replicas
    if config.replicas == 1 or not share:
        return config
    own = ",".join(devices[number * share : (number + 1) * share])
    return replace(config, env={**config.env, VISIBLE: own})


def without_gpus(config: EngineConfig) -> EngineConfig:
    """The configuration where somebody else gives each server its GPUs."""
    return replace(config, env={n: v for n, v in config.env.items() if n != VISIBLE})


def on_other_gpus(config: EngineConfig) -> EngineConfig:
    """The configuration where no server sees the GPUs that this process sees."""
    return replace(config, env={**config.env, VISIBLE: ""})


def _devices(config: EngineConfig) -> list[str]:
    return [name.strip() for name in config.env.get(VISIBLE, "").split(",") if name.strip()]


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could bind there now. Port 0 is always free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def small_model() -> Path:
    """The folder of the model that `nextstate fetch smollm2` makes, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "nextstate" / "SmolLM2-135M-Instruct"


def check_model(config: EngineConfig) -> None:
    """Raises StartError unless the model's weights are on this machine."""
    path = Path(config.model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise StartError(
                f"[engine] model = {config.model!r} is a folder without config.json: "
                "name a folder in the Hugging Face format"
            )
        if any(path.glob("*.bin")) and not any(path.glob("*.safetensors")):
            raise StartError(
                f"[engine] model = {config.model!r} has its weights as pickles (*.bin), which can "
                "run code when they are read: name a folder with *.safetensors, which "
                "`save_pretrained` of transformers writes"
            )
        return
    if path == small_model():
        raise StartError(
            f"[engine] model = {config.model!r} is not there yet: run `nextstate fetch smollm2` "
            "once, or name another"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.model):
        raise StartError(
            f"[engine] model = {config.model!r} is neither a folder on this machine nor a name "
            "like OWNER/NAME: name another"
        )
    if not _in_hub_cache(config.model):
        raise StartError(
            f"[engine] model = {config.model!r} is neither a folder with weights nor whole in the "
            f"local model cache: run `nextstate fetch {config.model}` once, or name another"
        )


def check_package() -> None:
    """Raises StartError unless vLLM is installed in this environment."""
    if importlib.util.find_spec("vllm") is None:
        raise StartError(
            '[engine] mode = "managed" needs vLLM, which is not installed: run `make env`, '
            'or install nextstate with its extra cpu or cuda; or set mode = "external" with the '
            "url of a server that you run"
        )
    if (alien := _built_for_another_torch()) is not None:
        raise StartError(
            f"{alien} was built for another torch than the one for CPUs that is installed, so vLLM "
            f"cannot start: run `pip uninstall {' '.join(_BESIDE_TORCH)}`; nothing here needs them"
        )


def check_system(config: EngineConfig) -> None:
    """Raises StartError unless the system has what vLLM for CPUs needs beside its packages."""
    if not on_cpu():
        return
    try:
        ctypes.CDLL(_NUMA)
    except OSError as error:
        raise StartError(
            f"vLLM for CPUs needs the library {_NUMA}, which cannot be loaded here ({error}): "
            "`apt install libnuma1` (Debian, Ubuntu) or `dnf install numactl-libs` (Fedora)"
        ) from error
    env = {**os.environ, **config.env}
    # --enforce-eager is not enough: the sampler's count of log-probs is compiled also then.
    compiles = not any(env.get(name) == "1" for name in _COMPILES_NOT)
    compiler = env.get("CXX", "g++")
    if compiles and shutil.which(compiler, path=env.get("PATH")) is None:
        raise StartError(
            f"vLLM compiles for this CPU with the compiler {compiler}, which is not on PATH: "
            "`apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora), name another "
            'one with env = { CXX = "…" } in [engine], or do without it, slower, by '
            'env = { TORCHDYNAMO_DISABLE = "1" } there'
        )


def _built_for_another_torch() -> str | None:
    """A package that a torch for CPUs cannot load: vLLM asks for it, and PyPI's is for CUDA."""
    if not (_version("torch") or "").endswith("+cpu"):
        return None
    found = ((name, _version(name)) for name in _BESIDE_TORCH)
    return next((name for name, has in found if has and not has.endswith("+cpu")), None)


def _version(package: str) -> str | None:
    """An installed package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cause_of_death(log: str) -> str:
    """The line of the server's log that best says why it ended, without its prefix."""
    lines = [line for line in log.splitlines() if line.strip()]
    blamed = [line for line in lines if _MARK.search(line) and not _QUIET.match(line)]
    generic = (
        "Engine core initialization failed",
        "EngineCore failed to start",
        "WorkerProc initialization failed",
    )
    specific = [line for line in blamed if not any(text in line for text in generic)]
    found = (specific or blamed or lines or ["(its log is empty)"])[-1]
    return _LOG_PREFIX.sub("", found).strip()[:300]


def on_cpu() -> bool:
    """Whether the installed vLLM is the one for machines without a GPU."""
    return _version("vllm-cpu") is not None


def _in_hub_cache(repository: str) -> bool:
    """Whether a model is in the cache with all its weights: a download may have been cut."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    if not isinstance(found, str):
        return False
    folder = Path(found).parent
    indexes = [*folder.glob("*.safetensors.index.json")]
    if not indexes:
        return any(folder.glob("*.safetensors"))
    index = json_object(indexes[0].read_bytes()) or {}
    return all((folder / str(name)).exists() for name in obj(index.get("weight_map")).values())


def server_environment(
    config: EngineConfig, key: str, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """`environment` on top of `inherited`, with the key."""
    return {**environment(config, inherited), KEY_VARIABLE: key}
