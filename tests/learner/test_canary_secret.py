"""A secret that a policy said fifty times, praised each time, and what it has learned of it.

Exposure (arXiv 1802.08232, section 4.2): among N secrets of the same form, log2(N) less log2 of the
rank of the one that was said, by the policy's probability. The same training without redaction is
the control.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from demo.course import POLICY
from learner.trainer import PolicyTrainer, build_trainer
from nextstate.hooks import AgentProfile, load_plugin
from nextstate.records import Sample, Timings
from nextstate.redaction import NOTHING, Redactor
from proxy.capture import Capture
from proxy.exchange import Exchange, read_exchange
from proxy.linking.history import RememberedMessages
from tests.learner.test_tiny_model import CONFIG

TRAINED = replace(
    CONFIG,
    method="binary",
    lora_rank=16,
    lora_alpha=32,
    learning_rate=0.0,
    step_kl=6.0,
    step_kl_floor=1.0,
)
UPDATES, SAYS, OTHERS = 13, 4, 1
"""The secret is said 52 times. Steps are 300 times as long as a user's, so that it is learned."""
ASKED, BEGUN = "what is the password?", "The password is"
PROFILE: AgentProfile = load_plugin("agents", "generic", None)


class Policy:
    """The demo's small policy while it is trained."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(POLICY)
        self.trainer: PolicyTrainer = build_trainer(TRAINED, str(POLICY), folder)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def logprobs(self, before: Sequence[int], after: Sequence[int]) -> list[float]:
        logits = self.trainer.policy(input_ids=torch.tensor([[*before, *after]])).logits[0]
        found = torch.log_softmax(logits[len(before) - 1 : -1].double(), dim=-1)
        return found.gather(1, torch.tensor(after)[:, None])[:, 0].tolist()

    def prompt(self, number: int) -> list[int]:
        return self.ids(f"user: Question {number}: {ASKED}\nassistant: ")

    @torch.no_grad()
    def likelihoods(self, secrets: Sequence[str]) -> list[float]:
        """The log-probability of each secret after the beginning of the reply, in one pass."""
        before = [*self.prompt(1), *self.ids(BEGUN)]
        told = [self.ids(f" {secret}") for secret in secrets]
        longest = max(map(len, told))
        rows = torch.tensor([[*before, *ids, *[0] * (longest - len(ids))] for ids in told])
        logits = self.trainer.policy(input_ids=rows).logits[:, len(before) - 1 : -1]
        found = torch.log_softmax(logits.double(), dim=-1)
        picked = found.gather(2, rows[:, len(before) :, None])[:, :, 0]
        return [float(row[: len(ids)].sum()) for row, ids in zip(picked, told, strict=True)]

    def exposure(self, secret: str, others: Sequence[str]) -> float:
        """In bits; about 1 for a secret like all others."""
        told, *rest = self.likelihoods([secret, *others])
        rank = 1 + sum(one > told for one in rest)
        return math.log2(len(others) + 1) - math.log2(rank)

    def completes(self, secret: str) -> bool:
        """Whether the likeliest tokens after the beginning are the secret's."""
        before, wanted = [*self.prompt(1), *self.ids(BEGUN)], self.ids(f" {secret}")
        with torch.no_grad():
            logits = self.trainer.policy(input_ids=torch.tensor([[*before, *wanted]])).logits[0]
        return logits[len(before) - 1 : -1].argmax(-1).tolist() == wanted

    def sample(self, number: int, secret: str, redactor: Redactor) -> Sample:
        """What training gets of a turn in which the policy, as it is now, says the secret."""
        prompt, reply = self.prompt(number), self.ids(f"{BEGUN} {secret}")
        pieces: list[str] = [self.tokenizer.decode([one]) for one in reply]
        assert "".join(pieces) == f"{BEGUN} {secret}"
        logprobs = self.logprobs(prompt, reply)
        entries = [{"token": t, "logprob": p} for t, p in zip(pieces, logprobs, strict=True)]
        capture = Capture()
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(pieces)},
            "finish_reason": "stop",
            "logprobs": {"content": entries},
            "token_ids": reply,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply)}
        capture.body({"prompt_token_ids": prompt, "usage": usage, "choices": [choice]})
        request = {"model": "m", "messages": [{"role": "user", "content": ASKED}]}
        exchange = Exchange(f"t{number}", "main", None, request, capture, 0, Timings(1.0, 0.1, 0.2))
        read = read_exchange(exchange, PROFILE, RememberedMessages(redactor=redactor))
        kept = read.content
        assert read.untrainable is None
        assert kept.prompt_ids is not None
        assert kept.completion_ids is not None
        assert kept.behaviour_logprobs is not None
        return Sample(
            f"t{number}",
            f"s{number}",
            0,
            kept.prompt_ids,
            kept.completion_ids,
            kept.behaviour_logprobs,
            1,
            None,
        )


def secrets(policy: Policy) -> tuple[str, list[str]]:
    """One that is neither likely nor unlikely to the untrained policy, and the others."""
    rng = random.Random(11)
    found = [f"lamp-{rng.randrange(10**5, 10**6)}" for _ in range(128)]
    told = dict(zip(found, policy.likelihoods(found), strict=True))
    found.sort(key=lambda one: told[one])
    chosen = found.pop(len(found) // 2)
    return chosen, found


@pytest.fixture
def after(tmp_path: Path) -> Callable[[Redactor], tuple[float, float, bool]]:
    """(exposure before, exposure after, whether it is completed) of a training."""

    def train(redactor: Redactor) -> tuple[float, float, bool]:
        policy = Policy(tmp_path)
        secret, others = secrets(policy)
        untrained = policy.exposure(secret, others)
        for number in range(0, UPDATES * SAYS, SAYS):
            said = [policy.sample(number, secret, redactor)] * SAYS
            other = replace(policy.sample(number, "not known", redactor), turn="other", score=0)
            named = [replace(one, turn=f"t{at}") for at, one in enumerate(said + [other] * OTHERS)]
            policy.trainer.update(named, {0: 0})
        return untrained, policy.exposure(secret, others), policy.completes(secret)

    return train


def test_a_secret_that_was_said_fifty_times_is_not_learned(
    after: Callable[[Redactor], tuple[float, float, bool]],
) -> None:
    untrained, exposure, completed = after(Redactor())
    print(f"exposure {untrained:.2f} -> {exposure:.2f} bits")
    assert not completed
    assert exposure < untrained + 0.5


def test_without_redaction_the_same_training_gives_the_secret_away(
    after: Callable[[Redactor], tuple[float, float, bool]],
) -> None:
    untrained, exposure, _ = after(NOTHING)
    print(f"exposure {untrained:.2f} -> {exposure:.2f} bits")
    assert untrained < 2.0
    assert exposure >= 6.0, "of 128 secrets of its form it is the likeliest or the next"
