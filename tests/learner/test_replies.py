"""Replies decoded together with a cache, against the same replies alone and without one."""
# pyright: basic

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3Config

from learner.model import lora_config
from learner.replies import decode, gumbel_noise, up_to_end
from tests.learner.test_tiny_model import CONFIG, PROMPT, VOCABULARY, load_float64, save_tiny_model

PROMPTS = [PROMPT, (9, 8, 7, 6, 5)]
ENDS = frozenset({1, 30})
MOST, DRAWS, TEMPERATURE = 14, 2, 0.7


def with_adapter(folder: str) -> torch.nn.Module:
    """The tiny model in double precision, with an adapter; rounding decides no token then."""
    torch.set_num_threads(CONFIG.threads)
    return get_peft_model(load_float64(folder), lora_config(CONFIG)).double().eval()


def change_weights(model: torch.nn.Module, seed: int) -> None:
    """Another random adapter, with other replies."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw, dtype=weight.dtype) / 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return with_adapter(save_tiny_model(tmp_path_factory.mktemp("model")))


@torch.no_grad()
def alone(model, prompts=PROMPTS, ends=ENDS, seed=0) -> list[list[int]]:
    """Each reply by itself: no padding, no cache."""
    found = []
    for draw in (None, *range(DRAWS)):
        for prompt in prompts:
            ids = list(prompt)
            for place in range(MOST):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                if draw is not None:
                    noise = gumbel_noise(logits, (place, seed, draw, *prompt))
                    logits = logits + TEMPERATURE * noise
                ids.append(int(logits.argmax()))
            found.append(up_to_end(ids[len(prompt) :], ends))
    return found


def decoded(model, prompts=PROMPTS, ends=ENDS) -> list[list[int]] | None:
    return decode(
        model, prompts, ends, most_tokens=MOST, draws=DRAWS, temperature=TEMPERATURE, seed=0
    )


@pytest.mark.parametrize("weights", range(4))
def test_the_replies_are_those_of_each_prompt_alone(model, weights):
    change_weights(model, weights)
    assert decoded(model) == alone(model)
    assert decoded(model, ends=frozenset({0})) == alone(model, ends=frozenset({0}))


def test_a_model_with_a_sliding_window_gives_the_same_replies(tmp_path):
    whole = load_float64(save_tiny_model(tmp_path / "whole"))
    sliding = {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    folder = tmp_path / "sliding"
    type(whole)(Qwen3Config(**whole.config.to_dict() | sliding)).save_pretrained(folder)
    model = with_adapter(str(folder))
    change_weights(model, 5)
    assert decoded(model) == alone(model)


@contextmanager
def nan_after(model, token: int) -> Iterator[None]:
    """Logits are not numbers wherever that token was read."""

    def spoil(_module, _given, named, made):
        read = named["input_ids"][:, -made.logits.size(1) :]
        made.logits = made.logits.masked_fill((read == token)[..., None], math.nan)
        return made

    hook = model.get_base_model().register_forward_hook(spoil, with_kwargs=True)
    yield
    hook.remove()


def test_logits_that_are_not_numbers_count_where_they_decide_a_token(model):
    change_weights(model, 3)
    right = alone(model)
    said = {token for reply in right for token in reply}
    unsaid = next(token for token in range(40, VOCABULARY) if token not in said)
    with nan_after(model, unsaid):
        assert decoded(model) == right
    with nan_after(model, right[0][1]):
        assert decoded(model) is None


def test_a_token_with_the_most_noise_is_a_draw_from_the_softmax():
    """5 tokens at 8000 places: each count within 4 standard errors of its share."""
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, 0.5])
    places = 8000
    noise = torch.stack([gumbel_noise(logits, (place, 7, 5, 6)) for place in range(places)])
    drawn = (logits + noise).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=5) / places
    expected = logits.softmax(0)
    assert shares[2] == 0
    errors = (expected * (1 - expected) / places).sqrt()
    assert ((shares - expected).abs() <= 4 * errors).all()


def test_noise_belongs_to_each_number_that_it_is_made_of():
    logits = torch.zeros(6)
    first = gumbel_noise(logits, (0, 0, 5, 6))
    assert torch.equal(gumbel_noise(logits, (0, 0, 5, 6)), first)
    for other in ((1, 0, 5, 6), (0, 1, 5, 6), (0, 0, 6, 5)):
        assert not torch.isclose(gumbel_noise(logits, other), first).any()


def test_a_reply_ends_at_its_first_end():
    assert up_to_end([4, 5, 1, 6, 1], frozenset({1})) == [4, 5]
    assert up_to_end([4, 5], frozenset({1})) == [4, 5]
    assert up_to_end([1], frozenset({1})) == []
