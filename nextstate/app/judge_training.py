"""`nextstate judge train`: a judge made from labelled next states, ours and the person's own.

The base model learns, as a LoRA adapter, to answer the engine judge's own question with the right
word. A fifth of the contexts is never trained on, in no version: on it the judge is calibrated by
one temperature, and checked. It is kept only if it agrees with the labels clearly better than the
base does (the whole 90 % interval of κ) and not worse than the version before it, from which
training goes on.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from judge.evaluation import Case
from judge.evidence import bounded, build_evidence
from learner.config import LearnerConfig
from nextstate.agreement import Agreement, agreement
from nextstate.app.cores import shared_cores
from nextstate.app.engine_access import engine_file
from nextstate.app.progress import Step
from nextstate.app.settings import Settings
from nextstate.app.trained_judge import (
    BASE_KAPPA,
    EXAMPLES,
    HELD_OUT,
    KAPPA,
    KAPPA_HIGH,
    KAPPA_LOW,
    NAME,
    OWN,
    TEMPERATURE,
    judge_folder,
    judge_path,
    judge_versions,
    judges_lock,
    newest_number,
)
from nextstate.engine.adapter_files import folder_sha256
from nextstate.errors import ConfigError, LearnerError
from nextstate.hooks import Calibration, load_plugin
from nextstate.private_files import make_state_folder
from nextstate.quick_imports import quick_imports
from nextstate.records import PolicyVersion
from nextstate.store import Store
from plugins.judges.one_word import (
    OBVIOUS,
    ORDERS,
    SURE,
    WORDS,
    calibrated_on,
    probabilities,
    word_question,
)

if TYPE_CHECKING:
    from learner.classifier import WordClassifier

MIN_EXAMPLES = 20
MAX_PROMPT_TOKENS = 1024
"""Longer next states are left out of training."""
_HELD_OUT = 5
"""One in so many sessions is held out."""
_SESSION = "session"
_PASS_TOKENS = 4096
_SCORES = list(WORDS)
_Answer = tuple[list[dict[int, float]], int]
"""The words' log-probs in each order, and the right score."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """The cases of one training."""

    train: list[Case]
    held_out: list[Case]
    own: frozenset[str]
    """Ids of the cases that the person labelled; they are ids of turns."""


def train_judge(
    settings: Settings, given: Sequence[Case], examples: int, epochs: int, told: Step
) -> str:
    """Trains on `given` and the person's own, checks and keeps a version; says what it is worth.

    Raises LearnerError if it is not kept, and ConfigError or StartError for what a person must fix.
    """
    make_state_folder(settings.store.path)
    with judges_lock(settings):
        own, seed = own_cases(settings, examples), newest_number(settings)
        labelled = chosen(own, given, examples, seed)
        return _trained(settings, labelled, epochs, told)


def own_cases(settings: Settings, most: int) -> list[Case]:
    """The newest turns that a person has rated, with what followed them; at most `most`."""
    store = Store(settings.store)
    profile = load_plugin("agents", settings.agents.profile, None)
    found: list[Case] = []
    for turn_id, score in store.judging.rated(most):
        turn, states = store.turns.get(turn_id), store.turns.next_states(turn_id)
        if turn is not None:
            evidence = build_evidence(turn, states, settings.judge.max_chars, (), profile)
            found.append(Case(turn_id, evidence, score, {_SESSION: turn.session}))
    store.close()
    return found


def chosen(own: Sequence[Case], given: Sequence[Case], examples: int, seed: int) -> Labelled:
    """At most `examples` of the cases, a fifth of them held out, all labels in equal parts.

    Of each label the person's own come first. Whether a case is held out depends on its session
    alone, so none is ever trained on, and which of them are taken does not depend on `seed`. Raises
    ConfigError if there are too few.
    """
    order = random.Random(seed)
    shuffled = order.sample(list(given), len(given))
    train = [case for case in (*own, *shuffled) if not _is_held_out(case)]
    fixed = sorted(given, key=lambda case: _digest(case.id))
    held_out = [case for case in (*own, *fixed) if _is_held_out(case)]
    few = max(1, examples // _HELD_OUT)
    labelled = Labelled(
        _in_turn(train, examples - few),
        _in_turn(held_out, few),
        frozenset(case.id for case in own),
    )
    enough = len(own) + len(given) >= MIN_EXAMPLES
    if not enough or not labelled.train or not labelled.held_out:
        raise ConfigError(
            f"{len(own) + len(given)} labelled next states are too few to train a judge and to "
            f"check it: expected at least {MIN_EXAMPLES} in different conversations; rate turns "
            "with `nextstate feedback`, or name a file with more"
        )
    return labelled


def _in_turn(cases: Sequence[Case], most: int) -> list[Case]:
    """At most `most` of the cases, one of each label in turn while there are any, in order."""
    labels = sorted({case.label for case in cases})
    each = ([case for case in cases if case.label == label] for label in labels)
    rounds = zip_longest(*each)
    return [case for one in rounds for case in one if case is not None][:most]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])


def _is_held_out(case: Case) -> bool:
    """By the session, or by the first message known: the next ones follow in later turns."""
    begins = case.groups.get(_SESSION) or repr(case.evidence.tail[:1])
    return _digest(begins) % _HELD_OUT == 0


def _trained(settings: Settings, labelled: Labelled, epochs: int, told: Step) -> str:
    cores = shared_cores(settings) if engine_file(settings).exists() else None
    if cores is not None:
        os.sched_setaffinity(0, cores.learner)  # before torch chooses its number of threads

    with quick_imports():
        from learner.adapters import Card, sync
        from learner.classifier import Example, build_classifier, within_memory

    versions = judge_versions(settings)
    previous = versions[-1] if versions else None
    with within_memory():
        model_path, folder = settings.engine.model_path, judge_folder(settings)
        classifier = build_classifier(_config(settings), model_path, folder, list(WORDS.values()))
        held = _Checked(classifier, _short(classifier, settings, labelled.held_out), told)
        base, before = held.of_base(), held.of_version(previous)
        examples = [
            Example(prompts[place % len(ORDERS)], _SCORES.index(case.label))
            for place, (case, prompts) in enumerate(_short(classifier, settings, labelled.train))
        ]
        read = 0

        def trained_on(count: int) -> None:
            nonlocal read
            read += count
            told("training", read, epochs * len(examples))

        classifier.fit(examples, epochs, trained_on)
        found, calibration = held.of_trained("checking it")
    number = newest_number(settings) + 1
    kappa, (low, high) = found.kappa, found.kappa_interval
    if kappa < before or low <= base:
        expected = f"at least {before:.2f}, its version before, and " if before > base else ""
        raise LearnerError(
            f"the judge that was trained is not kept: κ {kappa:.2f} ({low:.2f} to {high:.2f}) on "
            f"{len(held.cases)} held-out next states, expected {expected}all of that over "
            f"{base:.2f}, the base model's; give more --examples or --epochs, or rate "
            "more turns with `nextstate feedback`"
        )
    own = [case.id for case in labelled.train if case.id in labelled.own]
    metrics = {
        **{KAPPA: kappa, KAPPA_LOW: low, KAPPA_HIGH: high},
        **{BASE_KAPPA: base, HELD_OUT: float(len(held.cases))},
        **{TEMPERATURE: calibration.temperature, EXAMPLES: float(len(examples))},
        OWN: float(len(own)),
    }
    parent = None if previous is None else previous.number
    path = judge_path(settings, number)
    draft = path.with_name(f".{path.name}.draft")  # it has no vote before the ledger tells of it
    classifier.trainer.weights.save(draft, Card(NAME, number, parent, "judge", own, metrics))
    with closing(Store(settings.store)) as store:
        store.ledger.tell_judge(number, parent, folder_sha256(draft, with_card=True))
    draft.rename(path)
    sync(path.parent)
    return (
        f"judge v{number} is kept in {path}: κ {kappa:.2f} ({low:.2f} to {high:.2f}) on "
        f"{len(held.cases)} next states that it had not seen (the base model {base:.2f}"
        + (f", v{previous.number} {before:.2f})" if previous else ")")
    )


def _config(settings: Settings) -> LearnerConfig:
    """How the adapter is trained: the shape and the device of the learner's, and plain AdamW."""
    from learner.classifier import RATE

    return replace(
        settings.learner,
        lora_rank=settings.learner.lora_rank or LearnerConfig().lora_rank,
        method="binary",
        kl_coef=0.0,
        learning_rate=RATE,
        adam_beta1=0.9,
        micro_batch_tokens=min(_PASS_TOKENS, settings.learner.micro_batch_tokens),
    )


_Prompts = tuple[tuple[int, ...], ...]
"""A case's prompts, one in each order."""


def _short(
    classifier: WordClassifier, settings: Settings, cases: Sequence[Case]
) -> list[tuple[Case, _Prompts]]:
    """The cases whose prompts are short enough, with these. Raises ConfigError if there is none."""
    longest = min(MAX_PROMPT_TOKENS, (settings.engine.max_model_len or MAX_PROMPT_TOKENS) - 1)
    found: list[tuple[Case, _Prompts]] = []
    for case in cases:
        evidence = bounded(case.evidence, settings.judge.max_chars)
        prompts = tuple(classifier.render(word_question(evidence, order)) for order in ORDERS)
        if max(map(len, prompts)) <= longest:
            found.append((case, prompts))
    if not found:
        raise ConfigError(
            f"all {len(cases)} labelled next states have more than {longest} tokens: name a file "
            "with shorter ones"
        )
    return found


class _Checked:
    """The held-out cases, and how a judge's votes agree with their labels."""

    def __init__(
        self, classifier: WordClassifier, cases: Sequence[tuple[Case, _Prompts]], told: Step
    ) -> None:
        self.cases = cases
        self._classifier = classifier
        self._told = told

    def of_base(self) -> float:
        """κ of the base model, calibrated on the obvious questions as the engine judge is."""
        asked = [
            (tuple(self._classifier.render(word_question(e, order)) for order in ORDERS), score)
            for e, score in OBVIOUS
        ]
        known = self._answers("looking at the base model", asked, base=True)
        calibration = calibrated_on(known, balanced=True)
        return _agreed(self._held_out("checking the base model", base=True), calibration).kappa

    def of_version(self, version: PolicyVersion | None) -> float:
        """κ of a version, whose weights are the trainer's afterwards; −1 if there is none.

        Its temperature is chosen again, as the new one's is.
        """
        if version is None or version.path is None:
            return -1.0
        self._classifier.trainer.weights.load(Path(version.path), version.sha256)
        return self.of_trained(f"checking v{version.number}")[0].kappa

    def of_trained(self, what: str) -> tuple[Agreement, Calibration]:
        """How the present weights agree, with the temperature that suits them best."""
        answers = self._held_out(what)
        calibration = calibrated_on(answers)
        return _agreed(answers, calibration), calibration

    def _held_out(self, what: str, *, base: bool = False) -> list[_Answer]:
        return self._answers(what, [(p, case.label) for case, p in self.cases], base=base)

    def _answers(
        self, what: str, asked: Sequence[tuple[_Prompts, int]], *, base: bool = False
    ) -> list[_Answer]:
        prompts = [prompt for both, _ in asked for prompt in both]
        read = 0

        def done(count: int) -> None:
            nonlocal read
            read += count
            self._told(what, read, len(prompts))

        values = self._classifier.logprobs(prompts, done, base=base)
        told = [dict(zip(_SCORES, one, strict=True)) for one in values]
        count = len(ORDERS)
        return [(told[count * i : count * (i + 1)], right) for i, (_, right) in enumerate(asked)]


def _agreed(answers: Sequence[_Answer], calibration: Calibration) -> Agreement:
    """How the votes agree: a word that is not sure counts as 0."""
    pairs: list[tuple[int, int | None]] = []
    for orders, right in answers:
        shares = probabilities(orders, calibration)
        score = max(shares, key=shares.__getitem__)
        pairs.append((right, score if shares[score] >= SURE else 0))
    return agreement(pairs)
