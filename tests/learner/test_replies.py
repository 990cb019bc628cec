"""Replies decoded several tokens to a pass, against the same replies token by token."""
# pyright: basic

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import Qwen3Config

from learner.model import lora_config
from learner.replies import Phrases, answers, croppable_cache, gumbel_noise, up_to_end
from tests.learner.test_tiny_model import CONFIG, PROMPT, VOCABULARY, load_float64, save_tiny_model

PROMPTS = [PROMPT, (9, 8, 7, 6, 5)]
ENDS = frozenset({1, 30})
MOST = 14
WEIGHTS = 8
"""Adapters that are tried."""
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=MOST + 3)


def with_adapter(folder: str) -> torch.nn.Module:
    """The tiny model in double precision, with an adapter; rounding decides no token then."""
    torch.set_num_threads(CONFIG.threads)
    return get_peft_model(load_float64(folder), lora_config(CONFIG)).double().eval()


def change_weights(model: torch.nn.Module, seed: int) -> None:
    """Another random adapter, whose replies are others."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw, dtype=weight.dtype) / 8)


@pytest.fixture(scope="module")
def plain(model) -> list[list[list[int]]]:
    """By the seed of the adapter, the replies with all that would follow their ends."""
    found = []
    for seed in range(WEIGHTS):
        change_weights(model, seed)
        found.append(token_by_token(model, PROMPTS, frozenset()))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return with_adapter(save_tiny_model(tmp_path_factory.mktemp("model")))


@torch.no_grad()
def token_by_token(model, prompts, ends=ENDS, seed=0) -> list[list[int]]:
    """Each reply alone: no draft, no padding, no cache."""
    found = []
    for is_sampled in (False, True):
        for prompt in prompts:
            ids = list(prompt)
            for place in range(MOST):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                if is_sampled:
                    logits = logits + gumbel_noise(logits, (seed, *prompt), place, place + 1)[0]
                ids.append(int(logits.argmax()))
            found.append(up_to_end(ids[len(prompt) :], ends))
    return found


def decoded(model, drafts=(), others=(), prompts=PROMPTS, ends=ENDS):
    return answers(model, prompts, ends, most_tokens=MOST, seed=0, drafts=drafts, others=others)


@contextmanager
def counted_passes(model) -> Iterator[list[int]]:
    """The tokens that each forward pass reads of every row."""
    widths: list[int] = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda _module, _given, named: widths.append(named["input_ids"].size(1)), with_kwargs=True
    )
    yield widths
    hook.remove()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, WEIGHTS - 1),
    st.lists(TOKENS, max_size=4),
    st.lists(TOKENS, max_size=3),
    st.frozensets(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
)
def test_whatever_the_draft_the_replies_are_those_of_one_token_at_a_time(
    model, plain, weights, drafts, others, ends
):
    change_weights(model, weights)
    with counted_passes(model) as passes:
        found = decoded(model, drafts, others, ends=ends)
    assert 1 <= len(passes) <= MOST
    assert found == [up_to_end(reply, ends) for reply in plain[weights]]


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, WEIGHTS - 1),
    st.integers(0, 3),
    st.integers(0, MOST - 1),
    st.integers(0, VOCABULARY - 1),
)
def test_a_draft_costs_no_more_passes_than_follow_its_first_wrong_token(
    model, plain, weights, row, place, token
):
    change_weights(model, weights)
    drafts = [list(reply) for reply in plain[weights]]
    drafts[row][place] = token
    with counted_passes(model) as passes:
        found = decoded(model, drafts)
    assert found == [up_to_end(reply, ENDS) for reply in plain[weights]]
    assert len(passes) <= MOST - place


def test_a_right_draft_takes_one_pass_and_its_end_need_not_be_in_it(model):
    change_weights(model, 3)
    right = token_by_token(model, PROMPTS)
    assert any(len(reply) < MOST for reply in right)
    with counted_passes(model) as passes:
        assert decoded(model, right) == right
    assert passes == [max(map(len, PROMPTS)) + MOST - 1]


def test_what_is_right_is_not_read_again(model):
    change_weights(model, 3)
    with counted_passes(model) as passes:
        decoded(model)
    assert len(passes) > 1
    assert all(width <= 8 for width in passes[1:])


def test_a_reply_that_leaves_its_draft_goes_on_as_others_did(model):
    change_weights(model, 4)
    right = token_by_token(model, PROMPTS, frozenset({1}))
    assert all(len(reply) > 8 for reply in right)
    # Only the first token is wrong, but nothing of the rest is in its place.
    drafts = [[2, 2, *reply[1:]] for reply in right]
    with counted_passes(model) as alone:
        decoded(model, drafts, ends=frozenset({1}))
    with counted_passes(model) as helped:
        decoded(model, drafts, right, ends=frozenset({1}))
    assert len(helped) == 3  # the draft's, then 8 tokens at a time
    assert len(helped) < len(alone)


def test_the_memory_of_a_pass_is_bounded_by_its_rows_of_logits(model, plain):
    change_weights(model, 3)
    prompts = [prompt for prompt in PROMPTS for _ in range(20)]
    sizes: list[int] = []
    hook = model.get_base_model().register_forward_hook(
        lambda _module, _given, made: sizes.append(made.logits.flatten(0, 1).size(0))
    )
    found = answers(model, prompts, ENDS, most_tokens=MOST, seed=0)
    hook.remove()
    assert max(sizes) == 80  # 128 // 80 = 1 for each reply
    assert found == [up_to_end(reply, ENDS) for reply in plain[3] for _ in range(20)]


def test_a_model_whose_cache_cannot_go_back_reads_one_token_at_a_time(tmp_path):
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
    assert croppable_cache(model) is None
    right = token_by_token(model, PROMPTS)
    with counted_passes(model) as passes:
        assert decoded(model, right) == right
    assert passes[1:] == [1] * (len(passes) - 1)


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
    right = token_by_token(model, PROMPTS)
    said = {token for reply in right for token in reply}
    unsaid = next(token for token in range(40, VOCABULARY) if token not in said)
    wrong = [[*reply[:2], unsaid, *reply[3:]] for reply in right]
    with nan_after(model, unsaid):
        assert decoded(model, wrong) == right
    with nan_after(model, right[0][1]):
        assert decoded(model, right) is None
        assert decoded(model, wrong) is None
        assert decoded(model) is None


def test_weights_that_are_not_numbers_give_no_replies(tmp_path):
    model = with_adapter(save_tiny_model(tmp_path / "model"))
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "lora_B" in n)[0, 0] = math.nan
    assert decoded(model) is None


def test_a_token_with_the_most_noise_is_a_draw_from_the_softmax():
    """5 tokens at 8000 places: each count within 4 standard errors of its share."""
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, 0.5])
    places = 8000
    drawn = (logits + gumbel_noise(logits, (7, 5, 6), 0, places)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=5) / places
    expected = logits.softmax(0)
    assert shares[2] == 0
    errors = (expected * (1 - expected) / places).sqrt()
    assert ((shares - expected).abs() <= 4 * errors).all()


def test_noise_belongs_to_seed_prompt_and_place_and_not_to_the_window():
    logits = torch.zeros(6)
    whole = gumbel_noise(logits, (0, 5, 6), 0, 9)
    assert torch.equal(gumbel_noise(logits, (0, 5, 6), 4, 7), whole[4:7])
    for other in ((1, 5, 6), (0, 5, 7), (0, 6, 5)):
        assert not torch.isclose(gumbel_noise(logits, other, 0, 9), whole).any()
    assert len(whole.unique()) == whole.numel()


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ([], []),
        ([5], [6, 7, 8, 9]),  # a beginning and one token
        ([3, 6, 7], [8, 9]),  # 2 tokens; the first reply that has them
        ([4, 6, 7, 8], [1]),  # 4 tokens, in spite of an earlier reply with the last 2
        ([7, 6], []),
        ([8, 9], []),  # nothing followed
    ],
)
def test_how_a_reply_may_go_on_is_looked_up(begun: Sequence[int], expected: Sequence[int]):
    phrases = Phrases([[5, 6, 7, 8, 9], [4, 6, 7, 8, 1]])
    assert list(phrases.after(begun)) == expected


def test_a_reply_ends_at_its_first_end():
    assert up_to_end([4, 5, 1, 6, 1], frozenset({1})) == [4, 5]
    assert up_to_end([4, 5], frozenset({1})) == [4, 5]
    assert up_to_end([1], frozenset({1})) == []
