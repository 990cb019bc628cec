"""Several processes that take each update together: the ranks of `[learner] ranks`.

Rank 0 is the learner, and it alone sees the store. The others keep nothing between updates: each
update begins with what rank 0 sends, its state and the samples. Every rank deals the same sequences
in the same way, reads its share, and learns from all what they found. So each decision is made on
every rank, from the same numbers. `learner/rank_processes.py` starts the ranks.
"""
# pyright: basic

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from learner.tensors import sequence_length, sequences_of
from nextstate.errors import LearnerError, LostRankError, NoRoomError, StartError
from nextstate.records import Sample

_Found = TypeVar("_Found")
_LEND = "lend"
log = logging.getLogger(__name__)
SHARED_ERRORS = (NoRoomError, StartError, LearnerError)
"""Errors that mean the same on every rank, whichever met them. Any other one ends the learner."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a rank's part of the work came to."""

    values: Sequence[Any] = ()
    error: tuple[type[Exception], str] | None = None


class Ranks:
    """This process's place among the ranks; `Ranks()` is alone and exchanges nothing."""

    def __init__(self, rank: int = 0, count: int = 1, links: Sequence[Connection] = ()) -> None:
        """`links`: of rank 0 to each other rank, and of each other rank to rank 0."""
        self.rank = rank
        self.count = count
        self.lend: Callable[[bool], None] | None = None
        """Of a divided base: takes part in another rank's pass, with a gradient or without."""
        self._links = links
        self._together = 0
        """How many calls of `all` this process is in."""
        self._lends = False
        self._told: Exception | None = None
        """The last error that all ranks know."""

    def tell(self, work: object) -> None:
        """Sends work from rank 0 to all others, which wait for it in `receive`."""
        if self.count > 1:
            self._send(pickle.dumps(tree_map_only(Tensor, Tensor.cpu, work)))

    def receive(self) -> Any:
        """The next work from rank 0. Raises EOFError when there will be none.

        Meanwhile it takes part in the passes that rank 0 makes by itself.
        """
        while (work := self._received()) == _LEND:
            self._lend(False)
        return work

    def all(self, work: Callable[[], Sequence[_Found]]) -> list[_Found]:
        """What `work` returns on all ranks as one list, in their order, with tensors on the CPU.

        If it raises on any rank, this raises on all; too little memory is a LearnerError. Raises
        LostRankError if a rank is gone. The ranks may make different numbers of passes in `work`.
        """
        if self.count == 1:
            return [*work()]
        raised = None
        self._together += 1
        try:
            answer = _Answer(tree_map_only(Tensor, Tensor.cpu, [*work()]))
            self._lend_to_others()
        except Exception as error:
            if error is self._told:
                raise
            raised = error
            if isinstance(error, torch.OutOfMemoryError):
                # A divided base is as the pass left it: only new processes can go on.
                kind = LearnerError if self.lend is None else LostRankError
                raised = kind(
                    f"an update did not fit: {str(error).split('. ')[0]}; lower [learner] "
                    "max_tokens or micro_batch_tokens"
                )
                log.error("%s", raised)  # over NCCL the others may be killed before they know
            kind = next((kind for kind in SHARED_ERRORS if isinstance(raised, kind)), LostRankError)
            answer = _Answer(error=(kind, str(raised)))
        finally:
            self._together -= 1
        return self._agreed(answer, raised)

    def together(self, work: Callable[[], _Found]) -> _Found:
        """What `work` returns on this rank; raises on all ranks if it raises on any."""
        found: list[_Found] = []

        def act() -> Sequence[None]:
            found.append(work())
            return ()

        self.all(act)
        return found[0]

    def in_turn(self, work: Callable[[], _Found]) -> _Found:
        """Like `together`, but one rank after the other: for what needs much of the machine."""
        found: list[_Found] = []
        for rank in range(self.count):
            self.together(lambda mine=rank == self.rank: found.append(work()) if mine else None)
        return found[0]

    def join_pass(self) -> None:
        """Called before each pass over a divided base, which all ranks make together.

        Inside `all` each rank may have a pass of its own to make; elsewhere only rank 0 has, and
        without a gradient. Raises what another rank has met with.
        """
        if self._lends:
            return
        if self._together:
            self._meet(torch.is_grad_enabled())
        elif self.rank == 0 and not torch.is_grad_enabled():
            self.tell(_LEND)
        else:
            raise RuntimeError("a pass over a divided base that the other ranks do not know of")

    def sum_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Makes each weight's gradient the sum of all ranks'; None stays None if it is on all."""
        if self.count == 1:
            return
        parts = [w.grad if w.grad is not None else torch.zeros_like(w) for w in weights]
        known = torch.tensor([float(w.grad is not None) for w in weights])
        flat = torch.cat([known, *(part.detach().float().flatten().cpu() for part in parts)])
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise LostRankError("a rank was lost in a sum of gradients") from error
        known, *summed = flat.split([len(weights), *(w.numel() for w in weights)])
        for weight, has_gradient, values in zip(weights, known, summed, strict=True):
            if has_gradient:
                weight.grad = values.view_as(weight).to(weight)

    def require_equal(self, weights: Sequence[Tensor]) -> None:
        """Raises LearnerError on every rank unless the weights have the same bits on all."""
        if self.count == 1:
            return
        digest = sha256()
        for weight in weights:
            digest.update(weight.detach().cpu().numpy().tobytes())
        if len(set(self.all(lambda: [digest.digest()]))) > 1:
            raise LearnerError(
                "the ranks of the learner have come to different weights, so their devices compute "
                "differently: nothing was kept; set [learner] ranks = 1, or give it equal devices"
            )

    def mine(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """This rank's share of an update's samples."""
        return samples if self.count == 1 else deal(samples, self.count)[self.rank]

    def _lend_to_others(self) -> None:
        """Takes part in the passes of the other ranks until none has any left."""
        while self.lend is not None and (kind := self._meet(None)) is not None:
            self._lend(kind)

    def _meet(self, mine: bool | None) -> bool | None:
        """Waits for all ranks, each with a pass to make next, with a gradient or without, or None.

        Returns which kind it is; None if no rank has any.
        """
        kinds = {*self._agreed(_Answer([mine]))} - {None}
        if len(kinds) > 1:
            raise RuntimeError("the ranks have come to different passes over a divided base")
        return kinds.pop() if kinds else None

    def _lend(self, with_gradient: bool) -> None:
        assert self.lend is not None
        self._lends = True
        try:
            self.lend(with_gradient)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "allocate memory" in str(error):  # of a CPU
                raise
            raise LostRankError(f"a pass of another rank failed: {error}") from error
        finally:
            self._lends = False

    def _agreed(self, mine: _Answer, raised: Exception | None = None) -> list[Any]:
        """The values of all ranks as one list. If any rank has an error, this raises on all.

        The first that all know of is raised: a rank that is lost makes the others fail.
        """
        answers = self._exchange(mine)
        errors = [(rank, *a.error) for rank, a in enumerate(answers) if a.error is not None]
        if not errors:
            return [value for answer in answers for value in answer.values]
        rank, kind, text = min(errors, key=lambda e: (e[1] is LostRankError, e[0] != self.rank))
        own = raised if rank == self.rank else None
        self._told = own or kind(f"rank {rank} of the learner: {text}")
        raise self._told from (None if own else raised)

    def _received(self) -> Any:
        try:
            return pickle.loads(self._links[0].recv_bytes())
        except OSError as error:  # it has ended and left something unread
            raise EOFError from error

    def _exchange(self, mine: _Answer) -> list[_Answer]:
        """Every rank's answer, on every rank."""
        try:
            if self.rank == 0:
                answers = [mine, *(pickle.loads(link.recv_bytes()) for link in self._links)]
                self._send(pickle.dumps(answers))
                return answers
            self._send(pickle.dumps(mine))
            return self._received()
        except (EOFError, OSError) as error:
            raise LostRankError(f"a rank of the learner has ended ({error!r})") from error

    def _send(self, message: bytes) -> None:
        try:
            for link in self._links:
                link.send_bytes(message)
        except OSError as error:
            raise LostRankError(f"a rank of the learner has ended ({error!r})") from error


def deal(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """The samples in `count` shares of about equal length, each in the given order.

    The turns of one sequence stay together. The longest sequence is dealt first, each to the share
    that is the shortest by then, so no share is longer than 4/3 of the best possible one (Graham
    1969).
    """
    lengths, owner = [0] * count, dict[str, int]()
    for turns in sorted(sequences_of(samples), key=sequence_length, reverse=True):
        share = lengths.index(min(lengths))
        lengths[share] += sequence_length(turns)
        owner |= {turn.turn: share for turn in turns}
    return [[s for s in samples if owner[s.turn] == share] for share in range(count)]
