"""A model too small to know anything, with everything that a real one has on disk."""

import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from learner.config import LearnerConfig
from learner.trainer import PolicyTrainer
from nextstate.config import StoreConfig
from nextstate.records import Sample, Timings, Turn, TurnKind, Verdict
from nextstate.redaction.names import KEY_FILE
from nextstate.store import Store

VOCABULARY = 64
CONFIG = LearnerConfig(
    lora_rank=4,
    lora_alpha=8,
    learning_rate=1e-2,
    epochs=1,
    gradient_checkpointing=False,
    holdout_after=0,
    gate_canaries=0,
    dtype="float32",
    threads=1,
    poll_s=0.01,
)
WITH_CANARIES = replace(CONFIG, gate_canaries=LearnerConfig().gate_canaries)
"""For tests of the gate: a third of a small update is spent on its replies."""
HOLDS_OUT = b"key 9"
"""The secret by which a recorded store's sessions are held out; `s`, the usual one, trains."""
PROMPT = (5, 6, 7)
GOOD, BAD = (10, 11, 12), (20, 21, 22, 23)


def save_tiny_model(
    folder: Path, *, seed: int = 0, intermediate_size: int = 64, layers: int = 2
) -> str:
    """A random Qwen3 of width 32 with a tokenizer; returns the folder."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(2, VOCABULARY)} | {"<pad>": 0, "<eos>": 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    ).save_pretrained(folder)
    return str(folder)


def load_float64(folder: str) -> torch.nn.Module:
    """The saved base in double precision, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def distributions(
    model: torch.nn.Module, prompt: Sequence[int], reply: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities (T, V) of every token in each place of the reply, unpadded."""
    ids = torch.tensor([[*prompt, *reply]])
    return torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1)


def logprobs(model: torch.nn.Module, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (T,) of the reply, one unpadded sequence at a time."""
    return distributions(model, prompt, reply).gather(1, torch.tensor(reply)[:, None])[:, 0]


_Said = dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor]
_BASES: dict[bytes, tuple[torch.nn.Module, _Said]] = {}
"""By the digest of its files: a base that only reads, and what it has read. Most are the same."""


class Recorded:
    """A real store in which judged turns can be put, sampled from the tiny model's base."""

    def __init__(self, folder: Path, model_path: str) -> None:
        self.store = Store(StoreConfig(dir=str(folder)))
        (folder / KEY_FILE).write_bytes(HOLDS_OUT)
        files = [*Path(model_path).glob("*.safetensors"), Path(model_path, "config.json")]
        digest = sha256(b"".join(file.read_bytes() for file in sorted(files))).digest()
        if digest not in _BASES:
            _BASES[digest] = load_float64(model_path), {}
        self._model, self._said = _BASES[digest]
        self._count = 0

    def add(
        self,
        reply: tuple[int, ...] = GOOD,
        score: int = 1,
        *,
        prompt: tuple[int, ...] = PROMPT,
        hinted: tuple[int, ...] | None = None,
        version: int = 0,
        shift: float = 0.0,
        session: str = "s",
        trainable: bool = True,
        lineage: str = "main",
    ) -> str:
        """Adds one turn with its verdict; `shift` falsifies the log-probabilities, in nats."""
        turn = f"turn-{self._count:03d}"
        found = self._logprobs(prompt, reply) - shift
        with self.store.recording() as recording:
            recording.add_turn(
                Turn(
                    id=turn,
                    session=session,
                    index=self._count,
                    kind=TurnKind.MAIN,
                    lineage=lineage,
                    policy_version=version,
                    client_model="tiny",
                    request={"messages": [{"role": "user", "content": "?"}]},
                    reply={"role": "assistant", "content": "!"},
                    finish_reason="stop",
                    prompt_ids=prompt,
                    completion_ids=reply,
                    behaviour_logprobs=tuple(found.tolist()),
                    sampling={},
                    timings=Timings(0.0, None, 0.0),
                    untrainable=None if trainable else "told so",
                ),
                chain_key=turn.encode(),
                reply_key=turn.encode(),
            )
        hint = "Do it otherwise." if hinted else None
        self.store.judging.settle_verdict(Verdict(turn, (score,), score, "rules", hint, hinted))
        self._count += 1
        return turn

    def _logprobs(self, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
        """Of the base, which never changes: most turns say one of two replies."""
        if (prompt, reply) not in self._said:
            with torch.no_grad():
                self._said[prompt, reply] = logprobs(self._model, prompt, reply)
        return self._said[prompt, reply]

    def add_mixed(self, count: int) -> list[str]:
        """Good and bad replies by turns, of two lengths."""
        return [self.add(GOOD, 1) if i % 2 else self.add(BAD, -1) for i in range(count)]

    def states(self) -> dict[str, int]:
        """How many samples are in each state."""
        counts = self.store.counts()
        return {key.split("/")[1]: n for key, n in counts.items() if key.startswith("samples/")}

    def reason(self, turn: str) -> str | None:
        """Why the turn's sample was dropped."""
        return self._row(turn)["reason"]

    def trained_in(self) -> dict[str, int | None]:
        """The version that each turn trained."""
        return {turn: self._row(turn)["trained_in"] for turn in self.store.turns.ids()}

    def _row(self, turn: str) -> dict[str, Any]:
        with closing(sqlite3.connect(self.store.dir / "nextstate.sqlite3")) as connection:
            connection.row_factory = sqlite3.Row
            query = "select * from samples where turn = ?"
            return dict(connection.execute(query, (turn,)).fetchone())


def backbone_of(trainer: PolicyTrainer) -> torch.nn.Module:
    """The layers below the head: each pass of the learner calls them once."""
    return trainer.policy.get_base_model().base_model


def sample(
    turn: str = "t",
    *,
    prompt: Sequence[int] = PROMPT,
    reply: Sequence[int] = GOOD,
    behaviour: Sequence[float] | None = None,
    score: int = 1,
    hinted: Sequence[int] | None = None,
    version: int = 0,
) -> Sample:
    """A sample with plausible log-probabilities unless they are given."""
    return Sample(
        turn=turn,
        session="s",
        policy_version=version,
        prompt_ids=tuple(prompt),
        completion_ids=tuple(reply),
        behaviour_logprobs=tuple(behaviour or [-math.log(VOCABULARY)] * len(reply)),
        score=score,
        hinted_prompt_ids=None if hinted is None else tuple(hinted),
    )
