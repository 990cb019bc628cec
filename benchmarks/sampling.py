"""Are vLLM's log-probs those of what it samples from, and does the learner compute the same ones?

For each setting a real vLLM answers some questions, started as NextState starts it. Each reply's
tokens are then read by Hugging Face's model and logits processors, and by the learner's own code.
"""
# pyright: basic

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
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
from nextstate.config import EngineConfig
from nextstate.engine.defaults import sampling_defaults
from nextstate.engine.process import command, free_port, server_environment
from nextstate.records import Json, Sample
from nextstate.sampling import DEFAULTS, Sampling

QUESTIONS = ("What is the capital of Norway?", "Tell me something about bees.")
TOKENS = 32
START_TIMEOUT_S = 300.0
_KEY = "key"
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


async def ask(
    http: aiohttp.ClientSession, model: str, question: str, asked: Json, defaults: Json
) -> Sample:
    """One reply of vLLM as a sample."""
    body = {
        **{"model": model, "messages": [{"role": "user", "content": question}]},
        **{"max_tokens": TOKENS, "logprobs": True, "return_token_ids": True},
        **asked,
    }
    async with http.post("/v1/chat/completions", json=body) as answer:
        reply = await answer.json()
        assert answer.status == 200, reply
    choice = reply["choices"][0]
    told = tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"])
    held = Sampling.read({**asked, DEFAULTS: defaults})
    prompt, ids = tuple(reply["prompt_token_ids"]), tuple(choice["token_ids"])
    return Sample(question, question, 0, prompt, ids, told, 1, None, held)


async def ask_all(url: str, key: str, model: str, defaults: Json) -> dict[str, list[Sample]]:
    """Every case and question at the same time, so that one batch of vLLM has different rows."""
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(url, headers=headers) as http:
        asking = [
            ask(http, model, question, asked, defaults)
            for asked in CASES.values()
            for question in QUESTIONS
        ]
        done = await asyncio.gather(*asking)
    count = len(QUESTIONS)
    return {case: done[at * count : (at + 1) * count] for at, case in enumerate(CASES)}


async def _wait(url: str, server: subprocess.Popen[bytes]) -> None:
    async with aiohttp.ClientSession(url) as http:
        for _ in range(int(START_TIMEOUT_S)):
            try:
                async with http.get("/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            if server.poll() is not None:
                break
            await asyncio.sleep(1)
    raise SystemExit("vLLM did not come up: see its output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(Path(__file__).parent.parent / "demo" / "policy"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    chosen = parser.parse_args()
    config = EngineConfig(
        model=chosen.model, dtype=chosen.dtype, max_model_len=1024, args=("--enforce-eager",),
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"},
    )  # fmt: skip
    defaults, port = sampling_defaults(config), free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command(config, port), env=server_environment(config, _KEY), cwd=tempfile.gettempdir(),
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        began = time.monotonic()
        try:
            asyncio.run(_wait(url, server))
            up_s = time.monotonic() - began
            answered = asyncio.run(ask_all(url, _KEY, config.name, defaults))
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait(60)
    dtype = getattr(torch, chosen.dtype)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=dtype)
    table = Table(
        "Setting", "tokens", "vLLM - Hugging Face", "vLLM - learner", "vLLM - raw",
        title=f"{Path(chosen.model).name}, {chosen.dtype}, defaults {defaults}, up in {up_s:.0f} s",
        box=box.MARKDOWN,
    )  # fmt: skip
    for case, samples in answered.items():
        found = differences(model, samples)
        tokens = sum(len(sample.completion_ids) for sample in samples)
        numbers = (found.hugging_face, found.learner, found.raw)
        table.add_row(case, str(tokens), *(f"{number:.1e}" for number in numbers))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
