"""The log-probs of sampled tokens, by Hugging Face's logits processors and by the learner."""
# pyright: basic

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from learner.divergence import head_of
from learner.likelihood import TokenLogprobs, completion_logprobs
from learner.tensors import place
from nextstate.records import Json, Sample
from nextstate.sampling import Sampling

_PLAIN: Json = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}


class OutputPenalty:
    """The penalties of OpenAI's API, which Hugging Face lacks: scores of tokens already said."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        said = ids[0, self._prompt :].tolist()
        for token in set(said):
            scores[0, token] -= self._presence + self._frequency * said.count(token)
        return scores


class OnlyThese:
    """Bars every token but some."""

    def __init__(self, allowed: Sequence[int]) -> None:
        self._allowed = list(allowed)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        barred = torch.full_like(scores, -torch.inf)
        barred[:, self._allowed] = scores[:, self._allowed]
        return barred


CASES: Mapping[str, Json] = {
    "model's own": {},
    "plain": _PLAIN,
    "temperature 0.7": {**_PLAIN, "temperature": 0.7},
    "temperature 1.5": {**_PLAIN, "temperature": 1.5},
    "greedy": {"temperature": 0},
    "top-p 0.8": {**_PLAIN, "top_p": 0.8},
    "top-k 20": {**_PLAIN, "top_k": 20},
    "min-p 0.1": {**_PLAIN, "min_p": 0.1},
    "0.7, top-p 0.8, top-k 20": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "presence 0.8": {**_PLAIN, "presence_penalty": 0.8},
    "frequency 0.8": {**_PLAIN, "frequency_penalty": 0.8},
    "repetition 1.3": {**_PLAIN, "repetition_penalty": 1.3},
    "logit bias": {**_PLAIN, "logit_bias": {"5": 4.0, "40": -3.0}},
    "allowed tokens": {**_PLAIN, "allowed_token_ids": [*range(2, 300)]},
    "seed": {"temperature": 0.8, "seed": 7},
    "all": {
        **{"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "logit_bias": {"5": 2.0}},
        **{"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    },
}
"""What a request asks for."""


def processors(sampling: Sampling, prompt: int) -> LogitsProcessorList:
    """Hugging Face's processors for the same settings, in vLLM's order; `prompt` is its length."""
    found: list[Any] = []
    if sampling.allowed_token_ids:
        found.append(OnlyThese(sampling.allowed_token_ids))
    if sampling.logit_bias:
        biases = [[[token], bias] for token, bias in sampling.logit_bias]
        found.append(SequenceBiasLogitsProcessor(biases))
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    found.append(OutputPenalty(prompt, sampling.presence_penalty, sampling.frequency_penalty))
    if not sampling.is_greedy:
        found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.min_p:
            found.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(found)


def expected(logits: Tensor, sample: Sample) -> list[float]:
    """The completion's log-probs by Hugging Face; `logits` (L, V) of prompt and completion."""
    start = len(sample.prompt_ids)
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    shape = processors(sample.sampling, start)
    return [
        shape(ids[:, :at], logits[None, at - 1].clone().float()).log_softmax(-1)[0, token].item()
        for at, token in enumerate(sample.completion_ids, start)
    ]


@torch.no_grad()
def read_again(model: PreTrainedModel, sample: Sample) -> tuple[list[float], TokenLogprobs]:
    """The completion's log-probs by Hugging Face, and by the learner."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
    made = model(ids, output_hidden_states=True)
    found = completion_logprobs(made.hidden_states[-1], head_of(model), place([[sample]]))
    return expected(made.logits[0], sample), found


@dataclass(frozen=True, slots=True)
class Differences:
    """The largest differences of one case, in nats a token."""

    hugging_face: float
    learner: float
    raw: float
    """Of the raw log-probs from the sampler's."""


def differences(model: PreTrainedModel, samples: Sequence[Sample]) -> Differences:
    """Over all tokens of some replies."""
    rows = []
    for sample in samples:
        theirs, ours = read_again(model, sample)
        told = torch.tensor(sample.behaviour_logprobs)
        both = (torch.tensor(theirs), ours.sampled[0], ours.raw[0])
        rows.append([(told - one).abs().max().item() for one in both])
    return Differences(*(max(column) for column in zip(*rows, strict=True)))
