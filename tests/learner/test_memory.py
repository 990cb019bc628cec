"""What training needs: counted from a configuration, compared with what is free, and explained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from learner import memory
from learner.machine import free_ram
from learner.memory import Blueprint, Need, require_memory
from nextstate.config import EngineConfig
from nextstate.engine import process as vllm
from nextstate.errors import ConfigError, StartError
from tests.learner.test_tiny_model import CONFIG as ANYWHERE
from tests.learner.test_tiny_model import save_tiny_model

CONFIG = replace(ANYWHERE, device="cpu")
KB = 1024


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    path = save_tiny_model(folder)
    (folder / "model.safetensors").unlink()  # only the configuration may be read
    return path


@pytest.fixture(scope="module")
def blueprint(model_path: str) -> Blueprint:
    return Blueprint(CONFIG, model_path)


def machine(root: Path, available_kib: int = 1000) -> Path:
    """A file system that says that so much memory is available, in no control group."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:  9999999 kB\nMemFree:  1 kB\nMemAvailable:   {available_kib} kB\n"
    )
    return root


def group(root: Path, folder: str, limit: str, usage: int, cache: int = 0) -> None:
    """A control group of version 2."""
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{limit}\n")
    (path / "memory.current").write_text(f"{usage}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def test_free_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert free_ram(machine(tmp_path)) == 1000 * KB


def test_a_container_has_what_its_group_and_every_group_above_have_left(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    group(root, "a/b", "max", 10)
    assert free_ram(root) == 1000 * KB
    group(root, "a", "5000", 4000, cache=300)
    assert free_ram(root) == 1300
    group(root, "a/b", "2000", 1900)
    assert free_ram(root) == 100
    group(root, "a/b", "2000", 2500)
    assert free_ram(root) == 0


def test_the_first_version_of_control_groups_counts_too(tmp_path: Path) -> None:
    root = machine(tmp_path)
    (root / "proc/self/cgroup").write_text("5:cpu,memory:/x\n4:devices:/y\n")
    folder = root / "sys/fs/cgroup/memory/x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9000\n")
    (folder / "memory.usage_in_bytes").write_text("8000\n")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 50\n")
    assert free_ram(root) == 1050


def test_a_system_that_does_not_tell_has_no_known_free_memory(tmp_path: Path) -> None:
    assert free_ram(tmp_path) is None


def test_weights_and_adapter_are_counted_by_hand(blueprint: Blueprint) -> None:
    need = blueprint.need(CONFIG)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8  # q, k and v, o, two norms of a head
    layer = attention + 3 * 32 * 64 + 2 * 32
    assert need.weights == (64 * 32 + 2 * layer + 32) * 4  # the head is the embedding
    pairs = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    adapter = 2 * sum(4 * (rows + columns) for rows, columns in pairs)
    assert need.adapter == adapter * 5 * 4
    assert need.tokens == 128, "no sample is longer than the model's positions"
    assert need.rows == 16
    assert need.total == need.weights + need.adapter + need.activations


@pytest.mark.parametrize(("teacher", "values"), [("policy", 3), ("average", 4)])
def test_lineages_share_the_base_and_each_waits_with_weights_moments_and_average(
    model_path: str, blueprint: Blueprint, teacher: Literal["policy", "average"], values: int
) -> None:
    alone = blueprint.need(CONFIG)
    assert alone.parked == 0
    weights = alone.adapter // (5 * 4)
    shared = Blueprint(replace(CONFIG, teacher=teacher), model_path, 3).need(CONFIG)
    assert shared.parked == 3 * values * 4 * weights
    assert replace(shared, parked=0) == alone
    assert shared.total == alone.total + shared.parked
    assert "Adam 0.00, lineages that wait 0.00, activations" in str(shared)


def test_on_a_gpu_lineages_wait_in_the_machines_memory(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "pick_device", lambda config: torch.device("cuda"))
    monkeypatch.setattr(memory, "free_memory", lambda device, share: 10**9)
    monkeypatch.setattr(memory, "free_ram", lambda: 100)
    assert Blueprint(CONFIG, model_path, 2).need(CONFIG).parked == 0
    assert require_memory(CONFIG, model_path)
    with pytest.raises(StartError, match=r"2 lineages .* lora_rank lower than 4, or fewer"):
        require_memory(CONFIG, model_path, 2)


def test_longer_and_more_samples_need_more_and_checkpointing_needs_less(
    blueprint: Blueprint,
) -> None:
    one = replace(CONFIG, micro_batch_tokens=128)
    short = blueprint.need(replace(one, max_tokens=64)).total
    plain = blueprint.need(one).total
    assert short < plain < blueprint.need(CONFIG).total
    assert blueprint.need(replace(one, gradient_checkpointing=True)).total < plain
    assert blueprint.need(replace(CONFIG, batch_size=1)).total == plain


def test_a_deep_model_is_counted_from_two_shallow_ones(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (Path(model_path) / "config.json").read_text()
    deep = re.sub(r'("num_hidden_layers": )2', r"\g<1>12", config)
    deep = re.sub(r'("max_window_layers": )\d+', r"\g<1>12", deep)
    deep = re.sub(
        r'"layer_types": \[[^]]*\]',
        '"layer_types": ["' + '", "'.join(["full_attention"] * 12) + '"]',
        deep,
    )
    (tmp_path / "config.json").write_text(deep)
    sampled = Blueprint(CONFIG, str(tmp_path)).need(CONFIG)
    monkeypatch.setattr(memory, "_SAMPLED_LAYERS", 6)
    whole = Blueprint(CONFIG, str(tmp_path)).need(CONFIG)
    assert sampled.activations == pytest.approx(whole.activations, rel=0.01)


def test_four_bits_are_half_a_byte_and_the_scales(blueprint: Blueprint) -> None:
    plain, small = (blueprint.need(replace(CONFIG, quantization=q)) for q in ("none", "4bit"))
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert plain.weights - small.weights == pytest.approx(linear * (4 - 0.5159), rel=1e-4)


def test_what_does_not_fit_is_refused_with_numbers_and_settings_that_fit(
    model_path: str, blueprint: Blueprint
) -> None:
    config = replace(CONFIG, memory_gb=blueprint.need(CONFIG).total / memory.GB * 0.9)
    with pytest.raises(StartError) as refused:
        require_memory(config, model_path)
    message = str(refused.value)
    assert "\n" not in message, "the supervisor shows the last line of a part's log"
    assert "activations of 16 x 128 tokens" in message
    assert "allowed by [learner] memory_gb" in message
    assert "[learner] micro_batch_tokens = 128 (" in message
    assert require_memory(replace(config, micro_batch_tokens=128), model_path)


def test_the_length_that_is_offered_fits(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STEP_TOKENS", 8)
    config = replace(CONFIG, micro_batch_tokens=128, gradient_checkpointing=True)
    half = Blueprint(config, model_path).need(replace(config, max_tokens=64)).total
    config = replace(config, memory_gb=half / memory.GB)
    with pytest.raises(StartError) as refused:
        require_memory(config, model_path)
    offered = re.search(r"\[learner\] max_tokens = (\d+) \(", str(refused.value))
    assert offered is not None
    assert 8 <= int(offered[1]) <= 64
    assert require_memory(replace(config, max_tokens=int(offered[1])), model_path)


@pytest.mark.parametrize(("free", "share", "expected"), [(70, 0.6, 32), (20, 0.6, 20), (70, 0, 70)])
def test_what_vllm_will_take_of_a_gpu_is_not_free(
    free: int, share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    assert memory.free_memory(torch.device("cuda", 0), share) == expected


def test_a_managed_vllm_takes_its_share_of_the_gpu_that_the_learner_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "_on_cpu", lambda: False)
    ours = EngineConfig(model="m")
    half = replace(ours, args=("--gpu-memory-utilization=0.5",))
    other = replace(ours, env={"CUDA_VISIBLE_DEVICES": "0"})
    external = EngineConfig(model="m", mode="external", url="http://127.0.0.1:1")
    assert vllm.gpu_share(ours, {}) == 0.92
    assert vllm.gpu_share(half, {"CUDA_VISIBLE_DEVICES": "1"}) == 0.5
    assert vllm.gpu_share(other, {"CUDA_VISIBLE_DEVICES": "1"}) == 0
    assert vllm.gpu_share(external, {}) == 0
    with pytest.raises(ConfigError, match=r"--gpu-memory-utilization half: expected a share"):
        vllm.gpu_share(replace(ours, args=("--gpu-memory-utilization", "half")), {})
    monkeypatch.setattr(vllm, "_on_cpu", lambda: True)
    assert vllm.gpu_share(ours, {}) == 0


def test_a_model_that_is_too_large_in_itself_is_told_so(model_path: str) -> None:
    with pytest.raises(StartError, match="no setting makes it fit"):
        require_memory(replace(CONFIG, memory_gb=1e-6), model_path)


def test_what_is_free_is_the_limit_unless_a_smaller_budget_is_set(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device, share: 10)
    with pytest.raises(StartError, match=r"0\.00 GB are free on cpu"):
        require_memory(replace(CONFIG, memory_gb=50.0), model_path)
    monkeypatch.setattr(memory, "free_memory", lambda device, share: None)
    assert "does not say what is free" in require_memory(CONFIG, model_path)


def test_a_model_whose_shapes_hang_on_its_tokens_is_counted_without_activations(
    blueprint: Blueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def routed(*_: object, **__: object) -> int:
        found = torch._subclasses.fake_tensor.DynamicOutputShapeException("nonzero")
        raise found

    monkeypatch.setattr(Blueprint, "_peak", routed)
    need = blueprint.need(CONFIG)
    assert need.activations is None
    assert need.total == need.weights + need.adapter
    assert str(need).startswith("more than ")
    assert str(need).endswith("tokens unknown")


def test_a_need_reads_as_one_line_of_gigabytes() -> None:
    need = Need(8_040_000_000, 660_000_000, 0, 20_000_000_000, 1, 2048)
    assert str(need) == (
        "28.70 GB: base 8.04, adapter with gradients and Adam 0.66, activations of 1 x 2048 "
        "tokens 20.00"
    )


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[learner\] memory_gb = -1"):
        replace(CONFIG, memory_gb=-1)
