"""The managed server's command line, environment and cause of death."""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from nextstate.config import EngineConfig
from nextstate.engine import process
from nextstate.engine.process import (
    cause_of_death,
    check_model,
    check_package,
    check_system,
    command,
    environment,
    free_port,
    on_cpu,
    port_is_free,
)
from nextstate.errors import ConfigError, StartError


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("INFO ok\napi_server.py: error: unrecognized arguments: --x\n", "unrecognized arguments"),
        (
            "(EngineCore pid=1) ERROR 11-22 10:00:00 [core.py:1] ValueError: head size 7\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: head size 7",
        ),
        (
            "(Worker pid=2) ERROR 11-22 10:00:00 [multiproc.py:9] ValueError: Available memory is "
            "less\n(EngineCore pid=1) ERROR 11-22 10:00:01 [core.py:1] Exception: WorkerProc "
            "initialization failed due to an exception in a background process.\n",
            "ValueError: Available memory is less",
        ),
        (
            "(APIServer pid=1) WARNING 11-27 12:00:00 [utils.py:2] fd errors like `OSError: [Errno "
            "24] Too many open files`. Consider increasing\nRuntimeError: no memory\n"
            "(APIServer pid=1) INFO 11-27 12:00:01 [launcher.py:3] error: none\n",
            "RuntimeError: no memory",
        ),
        ("", "its log is empty"),
        ("just words\n", "just words"),
    ],
)
def test_the_cause_of_death_is_the_most_specific_line(log: str, expected: str) -> None:
    found = cause_of_death(log)
    assert expected in found
    assert "pid=" not in found


@pytest.mark.parametrize(("rank", "accepted"), [(4, 16), (16, 16), (17, 32), (512, 512)])
def test_the_engine_holds_adapters_of_the_learners_rank_for_each_lineage(
    rank: int, accepted: int
) -> None:
    argv = command(EngineConfig(model="m"), 5, rank, kept=3)
    assert argv[argv.index("--max-lora-rank") + 1] == str(accepted)
    assert argv[argv.index("--max-loras") + 1] == "5"  # and two more while a version changes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (EngineConfig(model="m"), ["--max-model-len=-1"]),
        (EngineConfig(model="m", max_model_len=512), ["--max-model-len=512"]),
        (EngineConfig(model="m", args=("--max-model-len", "7")), ["--max-model-len", "7"]),
    ],
)
def test_a_context_that_does_not_fit_is_shortened_unless_it_was_chosen(
    config: EngineConfig, expected: list[str]
) -> None:
    argv = command(config, 5)
    at = next(n for n, word in enumerate(argv) if word.startswith("--max-model-len"))
    assert argv[at : at + len(expected)] == expected
    assert sum(word.startswith("--max-model-len") for word in argv) == 1


@pytest.mark.parametrize(
    ("config", "sized"),
    [
        (EngineConfig(model="m"), True),
        (EngineConfig(model="m", env={"VLLM_CPU_KVCACHE_SPACE": "4"}), False),
        (EngineConfig(model="m", args=("--gpu-memory-utilization", "0.3")), False),
        (EngineConfig(model="m", args=("--kv_cache_memory_bytes=1000000",)), False),
    ],
)
def test_on_a_cpu_the_cache_gets_a_part_of_what_is_free_unless_its_size_was_chosen(
    config: EngineConfig, sized: bool
) -> None:
    argv = command(config, 5)
    assert ("--kv-cache-memory-bytes" in argv) == (sized and on_cpu())
    if sized and on_cpu():
        size = int(argv[argv.index("--kv-cache-memory-bytes") + 1])
        several = command(replace(config, mode="managed", replicas=2), 5)
        half = int(several[several.index("--kv-cache-memory-bytes") + 1])
        assert 1.5 * half < size < 2.5 * half  # what is free changes meanwhile


def test_the_engine_starts_with_our_options_and_environment(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path), served_model_name="m", env={"X": "1"})
    argv = command(config, 5)
    assert argv[1:4] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert "--enable-lora" in argv
    assert argv[argv.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert "--generation-config" not in argv
    own = EngineConfig(model="m", args=("--logprobs-mode=raw_logprobs",))
    assert "--logprobs-mode" not in command(own, 5)
    env = environment(config, {"PATH": "/bin"})
    assert env["PYTHONSAFEPATH"] == env["X"] == env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"] == "/bin"
    assert env.get("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS") == ("3600" if on_cpu() else None)
    own = EngineConfig(model="m", env={"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "60"})
    assert environment(own, {})["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == "60"


@pytest.mark.parametrize("word", ["--trust-remote-code", "--trust_remote_code", "--trust=true"])
def test_code_that_comes_with_a_model_is_never_run(word: str) -> None:
    with pytest.raises(ConfigError, match=f"args: '{word}' would run code that comes with a model"):
        EngineConfig(model="m", args=("--seed", "1", word))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_model_of_pickles_is_refused_and_one_of_safetensors_is_not(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / name).touch()
    with pytest.raises(StartError, match="has its weights as pickles"):
        check_model(EngineConfig(model=str(tmp_path)))
    (tmp_path / "model.safetensors").touch()
    check_model(EngineConfig(model=str(tmp_path)))


def test_a_port_in_use_is_not_free() -> None:
    async def run() -> None:
        port = free_port()
        assert port_is_free("127.0.0.1", port)
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", port)
        assert not port_is_free("127.0.0.1", port)
        server.close()
        await server.wait_closed()

    asyncio.run(run())


def installed(folder: Path, name: str, version: str) -> None:
    """Makes a package as pip leaves its description."""
    described = folder / f"{name}-{version}.dist-info"
    described.mkdir()
    described.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("torch", "torchvision", "starts"),
    [
        ("2.13.0+cpu", "0.28.0", False),
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0", "0.28.0", True),
        ("2.13.0+cu130", "0.28.0", True),
    ],
)
def test_a_torchvision_that_the_torch_for_cpus_cannot_load_is_named_before_the_start(
    torch: str, torchvision: str, starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, "torch", torch)
    installed(tmp_path, "torchvision", torchvision)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with nullcontext() if starts else pytest.raises(StartError, match="pip uninstall torchvision"):
        check_package()


def test_without_libnuma_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    monkeypatch.setattr(process, "_NUMA", "libnuma-of-nobody.so.1")
    with pytest.raises(StartError, match=r"libnuma-of-nobody\.so\.1.*`apt install libnuma1`"):
        check_system(EngineConfig(model="m"))
    monkeypatch.setattr(process, "on_cpu", lambda: False)
    check_system(EngineConfig(model="m"))


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (EngineConfig(model="m"), "g++"),
        (EngineConfig(model="m", env={"CXX": "clang++"}), "clang++"),
        (EngineConfig(model="m", env={"TORCHDYNAMO_DISABLE": "1"}), ""),
        (EngineConfig(model="m", env={"TORCH_COMPILE_DISABLE": "1"}), ""),
        (EngineConfig(model="m", args=("--enforce-eager",)), "g++"),
    ],
)
def test_without_a_compiler_for_what_vllm_compiles_on_a_cpu_it_is_named(
    config: EngineConfig, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "on_cpu", lambda: True)
    monkeypatch.setattr(process, "_NUMA", "libc.so.6")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    missing = pytest.raises(StartError, match=rf"compiler {re.escape(needed)}, .*`apt install g")
    with missing if needed else nullcontext():
        check_system(config)
    (tmp_path / (needed or "g++")).touch(0o700)
    check_system(config)
