"""A rank that fails, ends or is stopped ends the wait of the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from learner.rank_processes import started
from learner.ranks import Ranks
from nextstate.errors import LostRankError
from nextstate.records import Sample
from tests.learner.acting_ranks import act_until_the_end, shared

_HANG_S = 2
_processes = multiprocessing.get_context("spawn")


class EndsWhenRead:
    """A rank's work that ends the process which unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)

    def __call__(self, ranks: Ranks) -> None:
        raise AssertionError


def stop_myself(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def be_killed_beside_a_stopped_rank(folder: Path) -> None:
    """Rank 0 as a process of its own."""
    with started(2, stop_myself, lambda: None, folder / "ranks"):
        (child,) = multiprocessing.active_children()
        while state_of(child.pid or 0) != "T":
            time.sleep(0.1)
        (folder / "pid").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)


def state_of(pid: int) -> str:
    """The letter of /proc: T if stopped, Z if it has ended, also if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_learner_of_one_process_starts_no_other_and_exchanges_nothing(tmp_path):
    with started(1, act_until_the_end, lambda: None, tmp_path / "file") as ranks:
        assert not dist.is_initialized()
        assert ranks.all(lambda: [1, 2]) == [1, 2]
        samples: list[Sample] = []
        assert ranks.mine(samples) is samples
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_ends_the_rank_and_the_block(tmp_path):
    with (
        pytest.raises(LostRankError, match="rank 1 of the learner: it went wrong"),
        started(2, act_until_the_end, lambda: None, tmp_path / "file") as ranks,
    ):
        shared(ranks, "bug")
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_different_passes_over_a_divided_base_end_the_ranks(tmp_path):
    with (
        pytest.raises(LostRankError, match="rank 1 of the learner ended with code 1") as raised,
        started(2, act_until_the_end, lambda: None, tmp_path / "file") as ranks,
    ):
        shared(ranks, "different passes")
    assert "different passes" in str(raised.value.__context__)


@pytest.mark.timeout(60)
def test_a_rank_that_ends_before_it_joins_ends_the_wait(tmp_path):
    with (
        pytest.raises(LostRankError, match="has ended"),
        started(2, EndsWhenRead(), lambda: None, tmp_path / "file"),
    ):
        raise AssertionError("nobody joined")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_a_process_has_one_group_of_ranks_and_a_second_is_refused_at_once(tmp_path):
    with started(2, act_until_the_end, lambda: None, tmp_path / "file") as ranks:
        with (
            pytest.raises(RuntimeError, match="has ranks already"),
            started(2, act_until_the_end, lambda: None, tmp_path / "other"),
        ):
            raise AssertionError
        assert shared(ranks, "sum"), "the first group goes on"


@pytest.mark.timeout(60)
def test_a_rank_that_is_stopped_at_once_is_killed_after_the_time_for_silence(tmp_path):
    """It stops itself within the second after which signs of life are repeated."""
    before = time.monotonic()
    with (
        pytest.raises(LostRankError, match="a rank was lost in a sum"),
        started(2, stop_myself, lambda: None, tmp_path / "file", _HANG_S) as ranks,
    ):
        shared(ranks, "sum")
    assert time.monotonic() - before > _HANG_S


@pytest.mark.timeout(60)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends once it goes on")
def test_a_stopped_rank_ends_with_rank_0(tmp_path):
    first = _processes.Process(target=be_killed_beside_a_stopped_rank, args=(tmp_path,))
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    try:
        while state_of(pid) != "Z" and time.monotonic() < until:
            time.sleep(0.05)
        assert state_of(pid) == "Z"
    finally:
        if state_of(pid) == "T":
            os.kill(pid, signal.SIGKILL)
