"""The policy as a classifier of one word, on the demo's policy."""

from __future__ import annotations

import math

import pytest
import torch

from demo.course import POLICY
from learner.classifier import Example, WordClassifier, build_classifier, within_memory
from learner.config import LearnerConfig
from nextstate.errors import LearnerError

WORDS = ["good", "bad", "neutral"]
CONFIG = LearnerConfig(
    method="binary", kl_coef=0.0, adam_beta1=0.9, learning_rate=1e-3, gradient_checkpointing=False,
    micro_batch_tokens=64, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> WordClassifier:
    return build_classifier(CONFIG, str(POLICY), tmp_path_factory.mktemp("work"), WORDS)


def prompts_of(classifier: WordClassifier, *texts: str) -> list[tuple[int, ...]]:
    return [classifier.render([{"role": "user", "content": text}]) for text in texts]


def test_a_words_probability_is_the_sum_over_the_tokens_with_which_it_begins(
    classifier: WordClassifier,
) -> None:
    prompts = prompts_of(classifier, "2?", "What is 3 plus 4?", "no")
    found = classifier.logprobs(prompts, lambda _: None, base=True)
    model = classifier.trainer.policy.get_base_model()
    vocabulary = classifier.trainer.processing_class.get_vocab()
    for prompt, values in zip(prompts, found, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        # The adapter is fresh, so it changes nothing.
        mass = [
            sum(math.exp(logprobs[i]) for token, i in vocabulary.items() if word.startswith(token))
            for word in WORDS
        ]
        expected = [math.log(one / sum(mass)) for one in mass]
        assert values == pytest.approx(expected, abs=1e-4)


def test_training_makes_the_right_word_likelier_and_leaves_the_base_alone(
    classifier: WordClassifier,
) -> None:
    prompts = prompts_of(classifier, "yes", "no", "so")
    before = classifier.logprobs(prompts, lambda _: None, base=True)
    read: list[int] = []
    examples = [Example(prompt, place) for place, prompt in enumerate(prompts)] * 4
    losses = classifier.fit(examples, 12, read.append)
    assert losses[-1] < losses[0] / 2
    assert sum(read) == 12 * len(examples)
    after = classifier.logprobs(prompts, lambda _: None)
    assert [max(range(3), key=values.__getitem__) for values in after] == [0, 1, 2]
    unchanged = classifier.logprobs(prompts, lambda _: None, base=True)
    assert [v for one in unchanged for v in one] == pytest.approx(
        [v for one in before for v in one]
    )


def test_a_prompt_is_rendered_as_the_chat_template_says(classifier: WordClassifier) -> None:
    (prompt,) = prompts_of(classifier, "hi")
    text = classifier.trainer.processing_class.decode(prompt)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_words_that_begin_alike_are_refused(classifier: WordClassifier) -> None:
    with pytest.raises(LearnerError, match="begins several of the words"):
        WordClassifier(classifier.trainer, ["good", "great"])


def test_a_full_gpu_is_an_error_that_says_what_helps() -> None:
    with pytest.raises(LearnerError, match="did not fit: no room; end `nextstate up`"), \
            within_memory():  # fmt: skip
        raise torch.OutOfMemoryError("no room. And more")
