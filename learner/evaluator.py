"""Measures a candidate version for the gate: on held-out turns and by its own replies.

The parent's log-probabilities of held-out turns are read before the step and kept: a candidate that
passes is the next parent. So a candidate costs one forward pass over the held-out turns, and a new
held-out turn two more.

The base answers each canary once, and its replies are kept. The learner generates the replies, not
the engine: the base must read them here anyway, and a rejected candidate never leaves the learner.
"""
# pyright: basic

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.canaries import Comparison, Reply, compare, is_broken, knows, surprise
from learner.config import LearnerConfig
from learner.gate import Measured
from learner.kl import kl_divergence
from learner.means import mean_over_groups
from learner.questions import QUESTIONS, Question
from learner.replies import decode
from learner.tensors import fill_passes, micro_batches, place, token_count
from learner.trainer import PolicyTrainer, UpdateResult
from nextstate.records import Sample

Logprobs = dict[str, Tensor]
"""Log-probabilities (T,) of completions by their turn, float32 on the CPU, nats."""
REPLY_TOKENS = 48
"""The most tokens of a reply to a canary."""
DRAWS = 2
"""Sampled replies to each canary, beside a greedy one."""


class Evaluator:
    """Measures the candidates of one lineage, each against the version that its step began at."""

    def __init__(self, config: LearnerConfig, trainer: PolicyTrainer) -> None:
        self._config = config
        self._trainer = trainer
        self._held: list[Sample] = []
        self._questions = question_prompts(trainer.processing_class)
        self._canaries: dict[tuple[int, ...], Question | None] = {}
        self._replies_of_base: dict[tuple[int, ...], list[Reply]] = {}
        self._recorded = ""
        """Text of recorded turns, whose scripts a reply may use."""
        self._parent: int | None = None
        self._of_base: Logprobs = {}
        self._of_parent: Logprobs = {}
        self._of_candidate: Logprobs = {}

    def prepare(self, held: Sequence[Sample], batch: Sequence[Sample], parent: int) -> None:
        """Reads the held-out turns before the step on `batch`, with the weights of `parent`."""
        self._held = [s for s in held if token_count(s) <= self._config.max_tokens]
        self._choose_canaries(self._held or batch)
        if parent != self._parent:
            self._of_parent = {}
        self._parent = parent
        turns = [sample.turn for sample in self._held]
        self._of_base = {t: self._of_base[t] for t in turns if t in self._of_base}
        self._of_parent = {t: self._of_parent[t] for t in turns if t in self._of_parent}
        with self._trainer.weights.base():
            self._of_base |= self._logprobs([s for s in self._held if s.turn not in self._of_base])
        self._of_parent |= self._logprobs([s for s in self._held if s.turn not in self._of_parent])

    def measure(self, result: UpdateResult) -> Measured:
        """Measures the trainer's weights after the update that was prepared for.

        Each divergence is the larger of two: on the held-out turns, and on the update's own turns,
        as the trainer has measured it there. Those turns are recent, so the policy's present
        behaviour shows there first.
        """
        self._of_candidate = self._logprobs(self._held)
        replies, is_finite = self._compare_replies()
        return Measured(
            weight_change=self._trainer.weights.change(),
            kl_parent=self._divergence(
                self._of_parent, self._of_candidate, result.metrics.get("step/kl")
            ),
            kl_base=self._divergence(
                self._of_candidate, self._of_base, result.metrics.get("kl/base")
            ),
            ranking=mean_over_groups(
                [(s.session, s.credit * self._change(s.turn)) for s in self._held if s.score]
            ),
            replies=replies,
            is_finite=is_finite,
        )

    def accept(self, number: int) -> None:
        """The candidate measured last is the version `number` and the next one's parent."""
        self._parent, self._of_parent = number, self._of_candidate

    def _change(self, turn: str) -> float:
        return float((self._of_candidate[turn] - self._of_parent[turn]).mean())

    def _divergence(self, old: Logprobs, new: Logprobs, on_trained: float | None) -> float | None:
        if not self._held:
            return on_trained
        turns = [sample.turn for sample in self._held]
        recorded = torch.cat([torch.tensor(s.behaviour_logprobs) for s in self._held])
        found = kl_divergence(
            torch.cat([old[t] for t in turns]), torch.cat([new[t] for t in turns]), recorded
        )
        # The comparison in this form keeps what is not a number.
        return found if on_trained is None or not found <= on_trained else on_trained

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[Sample]) -> Logprobs:
        found: Logprobs = {}
        device = self._trainer.args.device
        for sequences in micro_batches(samples, self._config.micro_batch_tokens):
            self._trainer.before_pass()
            turns = [turn for sequence in sequences for turn in sequence]
            rows = self._trainer.completion_logprobs(place(sequences).to(device)).float().cpu()
            for sample, row in zip(turns, rows, strict=True):
                found[sample.turn] = row[: len(sample.completion_ids)].clone()
        return found

    def _choose_canaries(self, samples: Sequence[Sample]) -> None:
        """The built-in questions and the shortest prompts among the samples: cheap to answer."""
        count = self._config.gate_canaries
        if not count:
            return
        recorded = canary_prompts(samples, count)
        tokenizer: Any = self._trainer.processing_class
        self._canaries = self._questions | dict.fromkeys(recorded)
        said = [s.prompt_ids + (s.completion_ids if s.score > 0 else ()) for s in samples]
        self._recorded = "\n".join(tokenizer.batch_decode(said, skip_special_tokens=True))

    def _compare_replies(self) -> tuple[Comparison | None, bool]:
        """What the gate sees of the replies to the canaries, and whether all logits were finite."""
        if not self._canaries:
            return None, True
        of_base = {p: r for p, r in self._replies_of_base.items() if p in self._canaries}
        with self._trainer.weights.base():
            new = self._ask([prompt for prompt in self._canaries if prompt not in of_base])
        if new is None:
            return None, False
        for reply in new:
            of_base.setdefault(reply.prompt, []).append(reply)
        if not knows(new):
            for prompt in self._questions:
                del of_base[prompt], self._canaries[prompt]
            self._questions = {}
        self._replies_of_base = of_base
        ours = self._ask([*self._canaries])
        if ours is None:
            return None, False
        theirs = [reply for replies in of_base.values() for reply in replies]
        return compare(ours, theirs, self._recorded), True

    def _ask(self, prompts: Sequence[tuple[int, ...]]) -> list[Reply] | None:
        """One greedy and DRAWS sampled replies to each; None if a logit was not a number."""
        model = self._trainer.policy
        lengths = [(1 + DRAWS) * (len(prompt) + REPLY_TOKENS) for prompt in prompts]
        answered: list[tuple[tuple[int, ...], list[int]]] = []
        was_training = model.training
        model.eval()  # gradient checkpointing would turn the cache off
        try:
            for group in fill_passes(prompts, lengths, self._config.micro_batch_tokens):
                self._trainer.before_pass()
                with self._trainer.accelerator.autocast():
                    replies = self._replies(group)
                if replies is None:
                    return None
                answered += zip(group * (1 + DRAWS), replies, strict=True)
        finally:
            model.train(was_training)
        return self._read_by_base(answered)

    def _read_by_base(self, answered: Sequence[tuple[tuple[int, ...], list[int]]]) -> list[Reply]:
        """The replies, each with its surprise."""
        samples = [
            Sample(str(at), str(at), 0, prompt, tuple(reply), (0.0,) * len(reply), 0, None)
            for at, (prompt, reply) in enumerate(answered)
            if reply
        ]
        with self._trainer.weights.base():
            read = self._logprobs(samples)
        found: list[Reply] = []
        tokenizer: Any = self._trainer.processing_class
        for at, (prompt, reply) in enumerate(answered):
            text = tokenizer.decode(reply, skip_special_tokens=True)
            question, logprobs = self._canaries[prompt], read.get(str(at))
            found.append(
                Reply(
                    prompt,
                    text,
                    is_broken(reply),
                    None if logprobs is None else surprise(logprobs.tolist()),
                    question and question.text,
                    question is not None and question.is_right(text),
                )
            )
        return found

    def _replies(self, prompts: Sequence[tuple[int, ...]]) -> list[list[int]] | None:
        return decode(
            self._trainer.policy,
            prompts,
            end_ids(self._trainer),
            most_tokens=REPLY_TOKENS,
            draws=DRAWS,
            temperature=self._trainer.policy.generation_config.temperature or 1.0,
            seed=self._config.seed,
        )


def canary_prompts(samples: Sequence[Sample], count: int) -> list[tuple[int, ...]]:
    """The `count` shortest prompts among the samples, each once: the cheapest to answer."""
    return sorted({sample.prompt_ids for sample in samples}, key=lambda p: (len(p), p))[:count]


def question_prompts(tokenizer: Any) -> dict[tuple[int, ...], Question | None]:
    """The built-in questions by their prompts; none for a model without a chat template."""
    if tokenizer.chat_template is None:
        return {}
    return {
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.text}],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
        ): question
        for question in QUESTIONS
    }


def end_ids(trainer: PolicyTrainer) -> frozenset[int]:
    """The tokens with which the model ends a reply."""
    found = trainer.policy.generation_config.eos_token_id
    listed = found if isinstance(found, list) else [found]
    of_tokenizer: Any = trainer.processing_class
    return frozenset(id_ for id_ in (*listed, of_tokenizer.eos_token_id) if id_ is not None)
