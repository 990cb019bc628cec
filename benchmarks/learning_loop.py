"""The whole loop without servers, for measuring what the learner learns.

The learner stage, its gate, the store, the `rules` judge and the demo's personas are the real ones.
In the engine's place transformers generates, in this process, with the adapter that the stage has
published last. The personas talk whenever the stage finds too few samples, so a run is a function
of its plan.
"""
# pyright: basic

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

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

    points: list[Point] = field(default_factory=list)
    turns: int = 0
    made: int = 0
    rejected: list[str] = field(default_factory=list)
    """The reasons."""
    rejected_served: int = 0
    """Turns and answers by versions that the gate rejected."""


class Engine:
    """The policy as it serves: base and the adapter loaded last."""

    def __init__(self, seed: int) -> None:
        self.version = 0
        self._base = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()
        self._model = self._base
        self._tokenizer = AutoTokenizer.from_pretrained(POLICY)
        self._end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._drawn = seed * 1_000_000

    def load(self, version: PolicyVersion) -> None:
        """Serves that version from now on."""
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

    @torch.no_grad()
    def replies(
        self, prompts: Sequence[Sequence[int]]
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """One reply to each prompt at temperature 1: ids with their end, and log-probs in nats."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.random.fork_rng(devices=()):
            self._drawn += 1
            torch.manual_seed(self._drawn)
            made = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=_MAX_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=self._end,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        said = made.sequences[:, width:]
        all_logprobs = torch.log_softmax(torch.stack(made.logits, 1).float(), -1)
        logprobs = all_logprobs.gather(2, said[..., None])[..., 0].clamp(max=0.0)
        found = []
        for tokens, values in zip(said.tolist(), logprobs.tolist(), strict=True):
            length = tokens.index(self._end) + 1 if self._end in tokens else len(tokens)
            found.append((tuple(tokens[:length]), tuple(values[:length])))
        return found


class Persona:
    """One user with one question after another, in conversations of a few turns."""

    def __init__(self, plan: Plan, number: int) -> None:
        self._rng = Random(f"{plan.persona}/{plan.seed}/{number}")
        self._tasks = task_stream(plan.persona, plan.seed * 1000 + number, held_out=False)
        self._number = number
        self._conversations = 0
        # Of different lengths at first, or all would end and begin together for ever.
        self._begin(1 + number % _MAX_EXCHANGES)

    def _begin(self, exchanges: int = _MAX_EXCHANGES) -> None:
        self._conversations += 1
        self.session = f"{self._number}.{self._conversations}"
        self.index = 0
        self._conversation = Conversation(self._tasks, self._rng, max_exchanges=exchanges)
        self.messages: list[Json] = [user_message(self._conversation.open().text)]

    def hear(self, reply: str) -> str | None:
        """The next message after a reply; None where the conversation ends and a new one begins."""
        message = self._conversation.answer(reply)
        if message is None:
            self._begin()
            return None
        self.index += 1
        answered = {"role": "assistant", "content": reply}
        self.messages = [*self.messages, answered, user_message(message.text)]
        return message.text


class Loop(threading.Event):
    """The stage's event to stop: waiting for it lets the personas talk."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        super().__init__()
        self.run = Run()
        self._plan = plan
        self._store = Store(StoreConfig(dir=str(folder)))
        self._engine = Engine(plan.seed)
        self._personas = [Persona(plan, number) for number in range(TALKING)]
        self._judge_errs = Random(f"judge/{plan.seed}")
        self._rounds = 0
        other = next(domain for domain in Domain if domain != plan.persona)
        self._tasks = held_out_tasks(plan.persona, plan.questions)
        self._other_tasks = held_out_tasks(other, plan.questions)

    def learn(self) -> Run:
        """Runs the stage until the plan's last update, or until nothing is left to learn from."""
        self._measure(0)
        try:
            config = self._plan.config
            stage.run(self._store, config, str(POLICY), [LINEAGE], self._publish, self)
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

    def _publish(self, version: PolicyVersion, withdraw: bool = False) -> None:
        if withdraw:
            raise AssertionError("the watch is off: a version is compared at the same questions")
        self._engine.load(version)
        self._store.versions.set_serving(LINEAGE, version.number)
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
        if self.run.made in MEASURED:
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
                        finish_reason="stop",
                        prompt_ids=tuple(prompt),
                        completion_ids=ids,
                        behaviour_logprobs=logprobs,
                        sampling={},
                        timings=Timings(0.0, None, 0.0),
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
        score, right = self._share(self._tasks)
        _, elsewhere = self._share(self._other_tasks)
        self.run.points.append(Point(update, score, right, elsewhere))

    def _share(self, tasks: Sequence) -> tuple[float, float]:
        both = right = 0
        for start in range(0, len(tasks), _ASKED_AT_ONCE):
            part = tasks[start : start + _ASKED_AT_ONCE]
            prompts = [self._engine.render([user_message(task.question)]) for task in part]
            for task, (ids, _) in zip(part, self._engine.replies(prompts), strict=True):
                reply = self._engine.text(ids)
                right += (is_so := is_right(task, reply))
                both += is_so and satisfies(task, reply)
        return both / len(tasks), right / len(tasks)
