"""Memory: what is certain to be held is summed up, and the largest batch is tried."""

from __future__ import annotations

import resource
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner import memory
from learner.memory import (
    can_divide,
    free_ram,
    held_by_pass,
    require_memory,
    try_largest_batch,
)
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.config import EngineConfig
from nextstate.engine import process as vllm
from nextstate.errors import ConfigError, StartError
from tests.learner.running_stage import FakeEngine, train
from tests.learner.test_tiny_model import CONFIG as ANYWHERE
from tests.learner.test_tiny_model import Recorded, save_tiny_model

CONFIG = replace(ANYWHERE, device="cpu")
KB = 1024
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8 + 3 * 32 * 64 + 2 * 32
WEIGHTS = 4 * (64 * 32 + 2 * LAYER + 32)  # the head is the embedding
PAIRS = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
ADAPTER = 2 * sum(4 * (rows + columns) for rows, columns in PAIRS)
"""Weights of the adapter of rank 4."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def machine(root: Path, available_kib: int = 1000) -> Path:
    """A file system that reports this much available memory, in no control group."""
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


def test_a_system_without_proc_has_no_known_free_memory(tmp_path: Path) -> None:
    assert free_ram(tmp_path) is None


@pytest.mark.parametrize(("lineages", "snapshots"), [(1, 1), (3, 4)])
def test_weights_optimizer_and_snapshots_are_counted_by_hand(
    model_path: str, monkeypatch: pytest.MonkeyPatch, lineages: int, snapshots: int
) -> None:
    needed = WEIGHTS + ADAPTER * 4 * 4 + snapshots * ADAPTER * 4 * 3
    monkeypatch.setattr(memory, "free_ram", lambda: needed)
    assert "needs 0.00 GB for the base" in require_memory(CONFIG, model_path, lineages)[1]
    monkeypatch.setattr(memory, "free_ram", lambda: needed - 1)
    with pytest.raises(StartError, match=r"alone, and 0\.00 GB are free: lower .*lora_rank"):
        require_memory(CONFIG, model_path, lineages)
    monkeypatch.setattr(memory, "free_ram", lambda: None)
    assert "does not say what is free" in require_memory(CONFIG, model_path, lineages)[1]


def test_on_a_gpu_the_engines_share_is_not_free_and_snapshots_are_in_the_machines_memory(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = WEIGHTS + ADAPTER * 4 * 4
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "pick_device", lambda config: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 2 * needed))
    monkeypatch.setattr(memory, "free_ram", lambda: ADAPTER * 4 * 3)
    config = replace(CONFIG, dtype="float32")
    assert require_memory(config, model_path, engine_share=0.5)
    with pytest.raises(StartError, match="on the GPU"):
        require_memory(config, model_path, engine_share=0.6)
    with pytest.raises(StartError, match=r"in the machine's memory.*fewer snapshots"):
        require_memory(config, model_path, 2)


def on_gpus(monkeypatch: pytest.MonkeyPatch, free: int, ram: int) -> None:
    """Two GPUs with so many bytes free each, in a machine with `ram` bytes of memory."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(memory, "pick_device", lambda config: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(memory, "free_ram", lambda: ram)


def test_ranks_divide_a_base_of_which_a_whole_one_for_each_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path = save_tiny_model(tmp_path, layers=8)
    rest, layers = 4 * (64 * 32 + 32), 8 * 4 * LAYER
    config, whole = replace(CONFIG, dtype="float32", ranks=2, lora_rank=1), rest + layers
    trained = ADAPTER * 4 * 4  # four times the layers, a fourth of the rank
    on_gpus(monkeypatch, whole + trained, ram=whole)
    assert require_memory(config, model_path)[0] == config
    on_gpus(monkeypatch, whole + trained - 1, ram=whole)
    found, said = require_memory(config, model_path)
    assert found == replace(config, divided=True)
    assert "for the base that is divided" in said
    assert require_memory(found, model_path)[0] == found
    least = rest + layers // 2 + 3 * 4 * LAYER + trained
    on_gpus(monkeypatch, least, ram=whole)
    assert require_memory(config, model_path)[0].divided
    on_gpus(monkeypatch, least - 1, ram=whole)
    with pytest.raises(StartError, match=r"each of the 2 ranks, which divide the base"):
        require_memory(config, model_path)
    on_gpus(monkeypatch, least, ram=whole - 1)
    with pytest.raises(StartError, match="in the machine's memory"):
        require_memory(config, model_path)


def test_on_a_cpu_all_ranks_share_one_memory_also_while_the_last_of_them_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path = save_tiny_model(tmp_path, layers=8)
    rest, layers = 4 * (64 * 32 + 32), 8 * 4 * LAYER
    held = rest + layers // 2 + 3 * 4 * LAYER
    config = replace(CONFIG, ranks=2, lora_rank=1)
    others = ADAPTER * (2 * 4 * 4 + 2 * 4 * 3)
    least = max(2 * held + others, held + rest + layers)
    assert least < 2 * (rest + layers) + others
    monkeypatch.setattr(memory, "free_ram", lambda: least)
    assert require_memory(config, model_path)[0].divided
    monkeypatch.setattr(memory, "free_ram", lambda: least - 1)
    with pytest.raises(StartError, match="in the machine's memory"):
        require_memory(config, model_path)


def test_a_base_that_one_rank_has_for_itself_or_in_4_bits_is_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_path = save_tiny_model(tmp_path, layers=8)
    on_gpus(monkeypatch, free=40_000, ram=10**9)
    monkeypatch.setattr(memory, "check_quantization", lambda *_: None)
    alone = replace(CONFIG, dtype="float32")
    for config in (alone, replace(alone, ranks=2, quantization="4bit")):
        assert not can_divide(config, model_path)
        with pytest.raises(StartError, match=r"training needs .* on the GPU"):
            require_memory(config, model_path)
    assert can_divide(replace(alone, ranks=2), model_path)
    assert not can_divide(replace(alone, ranks=2, divided=True), model_path)


def test_the_largest_batch_that_samples_can_make_is_tried_and_leaves_no_trace(
    model_path: str, tmp_path: Path
) -> None:
    config = replace(CONFIG, micro_batch_tokens=300)
    trainer = build_trainer(config, model_path, tmp_path)
    before = trainer.snapshot()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    assert try_largest_batch(trainer) == (2, 128), "no sample is longer than the model's positions"
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    after = trainer.snapshot()
    assert all(torch.equal(after.weights[n], v) for n, v in before.weights.items())
    assert after.training["step"] == 0
    assert all(weight.grad is None for weight in trainer.policy.parameters())


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the passes that are made; the short ones have 32 and 64 tokens."""
    monkeypatch.setattr(memory, "_SHORT_PASSES", (32, 64))
    made: list[tuple[int, int]] = []
    attempt = PolicyTrainer.try_batch

    def noted(trainer: PolicyTrainer, rows: int, tokens: int) -> None:
        made.append((rows, tokens))
        attempt(trainer, rows, tokens)

    monkeypatch.setattr(PolicyTrainer, "try_batch", noted)
    return made


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_short_pass_in_proportion_holds_at_least_as_much_as_a_long_one(
    model_path: str, tmp_path: Path, checkpointing: bool
) -> None:
    config = replace(CONFIG, gradient_checkpointing=checkpointing)
    trainer = build_trainer(config, model_path, tmp_path)
    short, long = (held_by_pass(trainer, 1, tokens)[0] for tokens in (32, 128))
    assert short < long <= 128 / 31 * short
    assert short > 32 * 64 * 4, "the logits of the short pass alone take that much"


def test_the_largest_batch_is_run_only_if_the_shorter_ones_leave_doubt(
    model_path: str,
    tmp_path: Path,
    tried: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = build_trainer(replace(CONFIG, micro_batch_tokens=300), model_path, tmp_path)
    short, middle = (256 * held_by_pass(trainer, 1, n)[0] // (n - 1) for n in (32, 64))
    assert middle < short - 10**4, "the longer of the two says more"
    monkeypatch.setattr(memory, "_allocations_limited_to", lambda free: nullcontext())
    for free, passes in (
        (10**9, [(1, 32)]),
        (2 * short - 10**4, [(1, 32), (1, 64)]),
        (2 * middle - 10**4, [(1, 32), (1, 64), (2, 128)]),
    ):
        tried.clear()
        monkeypatch.setattr(memory, "free_ram", lambda free=free: free)
        assert try_largest_batch(trainer) == (2, 128)
        assert tried == passes


def test_attention_over_all_pairs_of_tokens_is_tried_at_full_length(
    model_path: str, tmp_path: Path, tried: list[tuple[int, int]]
) -> None:
    trainer = build_trainer(CONFIG, model_path, tmp_path)
    trainer.policy.get_base_model().set_attn_implementation("eager")
    rows, tokens = try_largest_batch(trainer)
    assert tried == [(1, 32), (rows, tokens)]


@pytest.mark.parametrize(("free", "numbers"), [(10**8, 4 * 10**8), (10**9, 95 * 10**7 // 4)])
def test_a_batch_that_does_not_fit_is_refused_with_the_keys_before_anything_is_leased(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, numbers: int
) -> None:
    """The limit is real: torch cannot allocate more than nine tenths of what is called free."""
    recorded = Recorded(tmp_path / "state", model_path)
    recorded.add_mixed(16)

    def allocate_much(trainer: object, rows: int, tokens: int) -> None:
        torch.ones(numbers)

    monkeypatch.setattr(memory, "free_ram", lambda: free)
    monkeypatch.setattr(PolicyTrainer, "try_batch", allocate_much)
    with pytest.raises(StartError, match=r"largest possible batch.*allocate memory.*max_tokens"):
        train(recorded, model_path, FakeEngine(recorded.store), CONFIG)
    assert recorded.states() == {"ready": 16}
    assert len(torch.ones(100_000_000)) == 100_000_000, "the limit is gone afterwards"


def test_another_error_of_the_trial_pass_is_not_called_a_lack_of_memory(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: object, rows: int, tokens: int) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(PolicyTrainer, "try_batch", fail)
    with pytest.raises(RuntimeError, match="something else"):
        try_largest_batch(build_trainer(CONFIG, model_path, tmp_path))


def test_a_managed_vllm_takes_its_share_of_the_gpu_that_the_learner_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "on_cpu", lambda: False)
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
    monkeypatch.setattr(vllm, "on_cpu", lambda: True)
    assert vllm.gpu_share(ours, {}) == 0
