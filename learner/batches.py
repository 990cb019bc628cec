"""Which samples make the next batch of a lineage: leased, dropped or held out."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from learner.advantages import SIGNALS
from learner.config import LearnerConfig
from learner.selection import Parents, is_due, is_held_out, longest_wait_s, policy_lag, unfit
from learner.tensors import token_count
from nextstate.private_files import secret_of
from nextstate.records import Sample
from nextstate.redaction.names import KEY_FILE
from nextstate.store import Store

log = logging.getLogger(__name__)

_HELD_PER_SESSION = 4
_HELD_OUT_TURNS = 32
"""The newest held-out turns that a candidate is checked on."""


@dataclass(frozen=True, slots=True)
class LeasedBatch:
    """The samples of one update."""

    name: str
    """The name under which they are leased."""
    samples: list[Sample]
    lags: Mapping[int, int]
    """For each version of the samples, the updates between it and the one that trains."""

    @property
    def turns(self) -> list[str]:
        """The ids of the samples' turns."""
        return [sample.turn for sample in self.samples]


class Batches:
    """The batches of one lineage."""

    def __init__(self, store: Store, config: LearnerConfig, lineage: str) -> None:
        self._store = store
        self._config = config
        self._lineage = lineage
        signals = SIGNALS[config.method]
        self._scored, self._hinted = signals.rl != 0, signals.distils
        self._key = secret_of(store.dir / KEY_FILE)
        self._waits_since: float | None = None
        """When `min_batch` samples became ready, on the monotonic clock."""
        self._trained_before: frozenset[str] | None = None
        """Sessions that trained before any was held out; None until sessions are held out."""

    def lease(self, current: int) -> LeasedBatch | None:
        """The next batch for the weights of version `current`, or None if none is due.

        Drops the samples that must not train and holds out those that must not be seen.
        """
        parents = self._parents()
        self._drop_stale(parents, current)
        self._begin_to_hold_out(len(parents))
        while self._is_due():
            if self._hold_out():  # reads every ready sample, so only when a batch is due
                continue
            name = uuid.uuid4().hex
            samples = self._store.training.lease_samples(
                self._lineage,
                self._config.batch_size,
                name,
                scored=self._scored,
                hinted=self._hinted,
            )
            if not samples:  # somebody else took what others had given
                return None
            lags = {
                version: policy_lag(parents, current, version)
                for version in {sample.policy_version for sample in samples}
            }
            dropped = self._drop_unfit(samples, lags)
            # A sample of a held-out session may have become ready meanwhile.
            if not dropped and not any(self._is_held_out(s.session) for s in samples):
                self._waits_since = None
                return LeasedBatch(name, samples, lags)
            self._store.training.release_samples(self._lineage)
        return None

    def held_out(self) -> list[Sample]:
        """The samples that the next candidate is checked on."""
        if self._trained_before is None:
            return []
        return self._store.training.held_samples(self._lineage, _HELD_OUT_TURNS, _HELD_PER_SESSION)

    def _parents(self) -> Parents:
        return {v.number: v.parent for v in self._store.versions.all(self._lineage)}

    def _is_due(self) -> bool:
        ready = self._store.training.ready_samples(self._lineage, self._scored, self._hinted)
        size, longest_s = self._config.batch_size, self._config.max_wait_s
        if ready >= self._config.min_batch:
            found = self._store.training.allotted(self._lineage, size, self._scored, self._hinted)
            given = sum(found.values())
            longest_s = longest_wait_s(ready, given, batch_size=size, max_wait_s=longest_s)
            ready = min(ready, given)
        now = time.monotonic()
        if ready < self._config.min_batch:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        return is_due(
            ready,
            now - (self._waits_since or now),
            batch_size=self._config.batch_size,
            min_batch=self._config.min_batch,
            max_wait_s=longest_s,
        )

    def _begin_to_hold_out(self, versions: int) -> None:
        """From `holdout_after` versions on, except for sessions that trained before."""
        config = self._config
        if self._trained_before is None and config.holdout and versions >= config.holdout_after:
            self._trained_before = self._store.training.begin_holding_out(self._lineage)

    def _hold_out(self) -> int:
        """Keeps ready samples of held-out sessions from training; returns how many."""
        if self._trained_before is None:
            return 0
        return self._store.training.hold_out(self._lineage, self._is_held_out)

    def _is_held_out(self, session: str) -> bool:
        return (
            self._trained_before is not None
            and is_held_out(self._lineage, session, self._config.holdout, self._key)
            and session not in self._trained_before
        )

    def _drop_stale(self, parents: Parents, current: int) -> None:
        """Drops ready samples whose version is too far from the one that trains."""

        def reason(version: int) -> str | None:
            return self._unfit(0, policy_lag(parents, current, version))

        for text, count in self._store.training.drop_stale(self._lineage, reason).items():
            log.info("samples dropped count=%d reason=%s", count, text)

    def _drop_unfit(self, samples: list[Sample], lags: Mapping[int, int]) -> int:
        """Drops the samples that must not train; returns how many."""
        dropped = 0
        for sample in samples:
            reason = self._unfit(token_count(sample), lags[sample.policy_version])
            if reason is not None:
                self._store.training.drop_samples([sample.turn], reason)
                log.info("sample dropped turn=%s reason=%s", sample.turn, reason)
                dropped += 1
        return dropped

    def _unfit(self, tokens: int, lag: int) -> str | None:
        config = self._config
        return unfit(tokens, lag, max_lag=config.max_lag, max_tokens=config.max_tokens)
