"""The whole loop without servers, for measuring what the learner learns.

The learner stage, its gate, the store, the `rules` judge and the demo's people are the real ones.
In the engine's place transformers generates, in this process, with the adapter that the stage has
published last. The people talk whenever the stage finds too few samples, so a run is a function
of its plan. `Loop` is the same for every model; `toy_loop` is the demo's policy with its personas,
`benchmarks/learning_model.py` a real model with a person.
"""
# pyright: basic

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.checks import is_right, satisfies
from demo.competence import user_message
from demo.personas import Conversation
from demo.tasks import Domain, held_out_tasks, task_stream
from judge.hinting import hinted_messages
from judge.verdict import verdict_of
from learner import stage
from learner.config import LearnerConfig
from nextstate.config import StoreConfig
from nextstate.hooks import Evidence
from nextstate.records import (
    TRUST,
    Json,
    NextState,
    PolicyVersion,
    Source,
    Timings,
    Turn,
    TurnKind,
    Verdict,
    VersionState,
)
from nextstate.store import Store
from plugins.judges.rules import vote_on

POLICY = Path(__file__).parent.parent / "demo" / "policy"
LINEAGE = "main"
TALKING = 16
"""Conversations that get a reply at the same time."""
MOST_ROUNDS = 40
"""Without a version for so long, too few replies have anything to learn from."""
MEASURED = (*range(9), 14, 19, 24, 29, 34)
"""Updates after which the version that serves answers the questions."""
_MAX_TOKENS = 96
_MAX_EXCHANGES = 4
_TAIL = 6
_ASKED_AT_ONCE = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    config: LearnerConfig
    persona: Domain = Domain.STUDENT
    updates: int = 4
    seed: int = 0
    flipped: float = 0.0
    """Share of the scores that a bad judge turns round."""
    questions: int = 128
    """Held-out questions that a version answers."""


@dataclass(frozen=True, slots=True)
class Point:
    """What the serving policy is worth after some updates; shares of held-out questions."""

    update: int
    score: float
    """Satisfied and right."""
    right: float
    elsewhere: float
    """Right, on questions of the domain that nobody trains on."""


@dataclass(slots=True)
class Run:
    """What became of a plan."""

    points: list[Any] = field(default_factory=list)
    """What was measured after some updates; a Point for the demo's policy."""
    turns: int = 0
    made: int = 0
    rejected: list[str] = field(default_factory=list)
    """The reasons."""
    rejected_served: int = 0
    """Turns and answers by versions that the gate rejected."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; `temperature` 0 takes the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = _MAX_TOKENS

    def asked(self) -> Json:
        """As a client's request says it; nothing for temperature 1 without truncation."""
        said = {"temperature": self.temperature, "top_p": self.top_p}
        return {key: value for key, value in said.items() if value != 1.0}


class Engine:
    """The policy as it serves: base and the adapter loaded last."""

    def __init__(
        self,
        seed: int,
        model: Path = POLICY,
        dtype: torch.dtype = torch.float32,
        sampling: Sampling | None = None,
    ) -> None:
        self.version = 0
        self.model_path = model
        self.sampling = sampling or Sampling()
        self._base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self._model = self._base
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._drawn = seed * 1_000_000

    def load(self, version: PolicyVersion) -> None:
        """Serves that version from now on."""
        if version.is_whole_model:
            dtype = self._base.dtype
            self._model = AutoModelForCausalLM.from_pretrained(version.path, dtype=dtype).eval()
        else:
            if isinstance(self._model, PeftModel):
                self._base = self._model.unload()
            self._model = PeftModel.from_pretrained(self._base, version.path).eval()
        self.version = version.number

    def render(self, messages: Sequence[Json]) -> list[int]:
        """The prompt that the chat template makes of the messages."""
        return self._tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )

    def text(self, ids: Sequence[int]) -> str:
        """A reply's text."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def finish_reason(self, ids: Sequence[int]) -> str:
        """Why a reply ended, in the API's words."""
        return "stop" if ids[-1] == self._end else "length"

    @torch.no_grad()
    def perplexity(self, text: str) -> float:
        """exp of the mean surprise at a text's tokens, in the order of reading."""
        ids = torch.tensor([self._tokenizer(text, add_special_tokens=False)["input_ids"]])
        return float(torch.exp(self._model(input_ids=ids, labels=ids).loss.float()))

    @torch.no_grad()
    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        logprobs: bool = True,
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """One reply to each prompt: ids with their end, and their log-probs in nats.

        The log-probs are of the distribution that was sampled, after temperature and truncation.
        """
        how = sampling or self.sampling
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.random.fork_rng(devices=()):
            self._drawn += 1
            torch.manual_seed(self._drawn)
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=how.max_tokens,
                do_sample=how.temperature > 0,
                temperature=how.temperature or 1.0,
                top_k=0,
                top_p=how.top_p,
                eos_token_id=self._end,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=logprobs,
            )
        said = made.sequences[:, width:]
        drawn = torch.zeros(said.shape)
        for place, scores in enumerate(made.scores or ()):
            found = torch.log_softmax(scores.float(), -1).gather(1, said[:, place, None])[:, 0]
            drawn[:, place] = found.clamp(max=0.0)
        found = []
        for tokens, values in zip(said.tolist(), drawn.tolist(), strict=True):
            length = tokens.index(self._end) + 1 if self._end in tokens else len(tokens)
            found.append((tuple(tokens[:length]), tuple(values[:length])))
        return found


class Persona:
    """One user with one question after another, in conversations of a few turns."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._rng = Random(f"{plan.persona}/{plan.seed}/{number}")
        self._tasks = task_stream(plan.persona, plan.seed * 1000 + number, held_out=False)
        self._start(number, _MAX_EXCHANGES)

    def _start(self, number: int, exchanges: int) -> None:
        self._number, self._exchanges = number, exchanges
        self._conversations = 0
        # Of different lengths at first, or all would end and begin together for ever.
        self._begin(1 + number % exchanges)

    def _new(self, exchanges: int) -> Any:
        return Conversation(self._tasks, self._rng, max_exchanges=exchanges)

    def _begin(self, exchanges: int) -> None:
        self._conversations += 1
        self.session = f"{self._number}.{self._conversations}"
        self.index = 0
        self._conversation = self._new(exchanges)
        self.messages: list[Json] = [user_message(self._conversation.open().text)]

    def hear(self, reply: str) -> str | None:
        """The next message after a reply, or what the user says at the end; then a new one begins.

        None where the conversation ends without a word.
        """
        message = self._conversation.answer(reply)
        if message is None or self._conversation.is_over:
            self._begin(self._exchanges)
            return message and message.text
        self.index += 1
        answered = {"role": "assistant", "content": reply}
        self.messages = [*self.messages, answered, user_message(message.text)]
        return message.text


class User(Protocol):
    """Somebody who talks: `messages` is the conversation that waits for a reply."""

    session: str
    index: int
    messages: list[Json]

    def hear(self, reply: str) -> str | None:
        """The next message after a reply; None where the conversation ends without one."""
        ...


class Loop(threading.Event):
    """The stage's event to stop: waiting for it lets the users talk.

    `measure` is called with the number of updates so far, at first with 0, and returns what the
    run records, or None.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        engine: Engine,
        users: Sequence[User],
        measure: Callable[[int], Any],
    ) -> None:
        super().__init__()
        self.run = Run()
        self._plan = plan
        self._store = Store(StoreConfig(dir=str(folder)))
        self._engine = engine
        self._personas = users
        self._measure_version = measure
        self._judge_errs = Random(f"judge/{plan.seed}")
        self._rounds = 0

    def learn(self) -> Run:
        """Runs the stage until the plan's last update, or until nothing is left to learn from."""
        self._measure(0)
        try:
            config = self._plan.config
            model = str(self._engine.model_path)
            stage.run(self._store, config, model, [LINEAGE], self._publish, self)
        finally:
            self._store.close()
        return self.run

    def wait(self, timeout: float | None = None) -> bool:
        """One reply to every persona; `timeout` is the stage's and means nothing here."""
        self._count_versions()
        if not self.is_set():
            self._rounds += 1
            self._talk()
            if self._rounds >= MOST_ROUNDS:
                self.set()
        return self.is_set()

    def _publish(self, version: PolicyVersion, withdraw: object = None) -> None:
        if withdraw:
            raise AssertionError("the watch is off: a version is compared at the same questions")
        self._engine.load(version)
        self._store.versions.serve_candidate(version)
        self._count_versions()

    def _count_versions(self) -> None:
        """Measures after each update, whether its version serves or was rejected."""
        versions = self._store.versions.all(LINEAGE)
        if len(versions) == self.run.made:
            return
        self._rounds = 0
        self.run.made = len(versions)
        rejected = {v.number: v for v in versions if v.state is VersionState.REJECTED}
        self.run.rejected = [version.reason or "" for version in rejected.values()]
        self.run.rejected_served += self._engine.version in rejected
        self._measure(self.run.made)
        if self.run.made >= self._plan.updates:
            self.set()

    def _talk(self) -> None:
        prompts = [self._engine.render(persona.messages) for persona in self._personas]
        for persona, prompt, (ids, logprobs) in zip(
            self._personas, prompts, self._engine.replies(prompts), strict=True
        ):
            session, index, messages = persona.session, persona.index, persona.messages
            reply = self._engine.text(ids)
            answer = persona.hear(reply)
            self.run.turns += 1
            if answer is None:
                continue
            turn = f"{session}.{index}"
            with self._store.recording() as recording:
                recording.add_turn(
                    Turn(
                        id=turn,
                        session=session,
                        index=index,
                        kind=TurnKind.MAIN,
                        lineage=LINEAGE,
                        policy_version=self._engine.version,
                        client_model="seed-policy",
                        request={"messages": messages},
                        reply={"role": "assistant", "content": reply},
                        finish_reason=self._engine.finish_reason(ids),
                        prompt_ids=tuple(prompt),
                        completion_ids=ids,
                        behaviour_logprobs=logprobs,
                        sampling=self._engine.sampling.asked(),
                        timings=Timings(0.0, None, 0.0),
                        client=getattr(persona, "client", ""),
                    ),
                    chain_key=turn.encode(),
                    reply_key=turn.encode(),
                )
            self._store.judging.settle_verdict(self._judged(turn, messages, reply, answer))

    def _judged(self, turn: str, messages: list[Json], reply: str, answer: str) -> Verdict:
        evidence = Evidence(
            tail=tuple((m["role"], m["content"]) for m in messages[-_TAIL:]),
            reply=reply,
            next_states=(NextState(turn, Source.USER, answer, TRUST[Source.USER]),),
        )
        verdict = verdict_of(turn, "rules", [vote_on(evidence)], evidence)
        assert verdict is not None
        score, hint = verdict.score, verdict.hint
        if self._judge_errs.random() < self._plan.flipped:
            score, hint = -score, None
        hinted = hint and tuple(self._engine.render(hinted_messages(messages, hint)))
        return Verdict(turn, (score,), score, "rules", hint, hinted or None)

    def _measure(self, update: int) -> None:
        if point := self._measure_version(update):
            self.run.points.append(point)


def toy_loop(plan: Plan, folder: Path, users: Sequence[User] | None = None) -> Loop:
    """The demo's policy with its personas, or with others."""
    engine = Engine(plan.seed)
    other = next(domain for domain in Domain if domain != plan.persona)
    tasks = held_out_tasks(plan.persona, plan.questions)
    other_tasks = held_out_tasks(other, plan.questions)

    def measure(update: int) -> Point | None:
        if update not in MEASURED:
            return None
        score, right = _share(engine, tasks)
        return Point(update, score, right, _share(engine, other_tasks)[1])

    users = users or [Persona(plan, number) for number in range(TALKING)]
    return Loop(plan, folder, engine, users, measure)


def _share(engine: Engine, tasks: Sequence) -> tuple[float, float]:
    both = right = 0
    for start in range(0, len(tasks), _ASKED_AT_ONCE):
        part = tasks[start : start + _ASKED_AT_ONCE]
        prompts = [engine.render([user_message(task.question)]) for task in part]
        for task, (ids, _) in zip(part, engine.replies(prompts), strict=True):
            reply = engine.text(ids)
            right += (is_so := is_right(task, reply))
            both += is_so and satisfies(task, reply)
    return both / len(tasks), right / len(tasks)
