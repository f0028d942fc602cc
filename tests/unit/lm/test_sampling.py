"""Sampling against transformers' generate, full forward passes and exact probabilities."""

from __future__ import annotations

import copy
import dataclasses
from typing import Literal

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from prefopt.errors import UserError
from prefopt.lm.batching import CACHE_BYTES, Row, cache_room, prompts_at_once
from prefopt.lm.engine import backbone
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.sampling import Completion, _Expanded, _token_bytes, sample
from prefopt.lm.verify import use_engine
from tiny_models import EOS, make_model

PROMPTS = [[2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15]]


def draw(model: PreTrainedModel, prompts: list[list[int]], n: int, **options: object) -> list[list[Completion]]:
    values = {"temperature": 1.0, "max_new_tokens": 12, "ends": [EOS], "seeds": range(len(prompts)), **options}
    return sample(model, prompts, n=n, **values)  # type: ignore[arg-type]


def test_greedy_equals_generate(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    ours = draw(model, PROMPTS, 1, temperature=0.0)
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        theirs = plain.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert completion.token_ids == theirs
        assert completion.logps == [0.0] * len(theirs)
        assert completion.finish_reason == ("eos" if theirs[-1] == EOS else "length")


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("n", [1, 7])
def test_log_probabilities_equal_a_full_forward(n: int, temperature: float, model: PreTrainedModel) -> None:
    groups = draw(model, PROMPTS, n, temperature=temperature)
    rows = [Row(p, tuple(c.token_ids for c in group)) for p, group in zip(PROMPTS, groups, strict=True)]
    returned = torch.tensor([logp for group in groups for c in group for logp in c.logps])
    with torch.no_grad():
        full = completion_logprobs(model, rows, temperature=temperature).tokens
    torch.testing.assert_close(returned, full, rtol=1e-4, atol=1e-4)
    assert len({len(c.token_ids) for group in groups for c in group}) > 1 or n == 1


def test_a_window_of_attention_goes_on_with_what_is_sampled() -> None:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = MistralConfig(**shape, num_key_value_heads=1, vocab_size=50, sliding_window=4, eos_token_id=EOS)
    plain = MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model = use_engine(copy.deepcopy(plain))
    assert model.engine.sampling == "shared"
    for prompt, group in zip(PROMPTS, draw(model, PROMPTS, 3), strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logps = plain(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            expected = logps[len(prompt) - 1 :].tolist()
            assert completion.logps == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_cache_that_grows_too_large_takes_fewer_prompts_at_once() -> None:
    token, room = 1000, 1_000_000  # bytes of a token's keys and values: a thousand tokens fit
    # Four completions of 10 tokens after a prompt of 60: 100 tokens where they share it, 280 where each has a copy.
    assert prompts_at_once(4, 60, 10, token, 512, room, shared_prefix=True) == 10
    assert prompts_at_once(4, 60, 10, token, 512, room, shared_prefix=False) == 3
    assert prompts_at_once(4, 60, 10, token, 8, room, shared_prefix=True) == 2, "no more completions than asked for"
    assert prompts_at_once(400, 60, 10, token, 512, room, shared_prefix=True) == 1, "one prompt goes on however large"


def test_the_room_for_a_cache_follows_from_what_a_gpu_has_free() -> None:
    assert cache_room(None) == CACHE_BYTES[False] == 4 * 2**30
    assert cache_room(130 * 2**30) == CACHE_BYTES[True] == 24 * 2**30
    assert cache_room(10 * 2**30) == 4 * 2**30
    assert cache_room(-1) == 0


def test_the_size_of_a_cache_is_what_the_model_holds(plain: PreTrainedModel) -> None:
    cache = plain(torch.tensor([[2, 3, 4]]), use_cache=True).cache
    held = sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    assert 3 * _token_bytes(plain) == held


@pytest.mark.parametrize("way", ["shared", "one_row", "cached", "whole"])
def test_what_is_sampled_lies_where_the_model_does(way: Literal["shared", "one_row", "cached", "whole"]) -> None:
    model = make_model("llama", engine=True)
    expected = draw(model, PROMPTS, 1, temperature=0.0)
    model.engine = dataclasses.replace(model.engine, sampling=way)
    with torch.device("meta"):  # where whatever is made without a device would be
        assert draw(model, PROMPTS, 1, temperature=0.0) == expected


def test_a_row_of_the_cache_is_seen_from_its_first_token_on_and_no_padding_is() -> None:
    model = make_model("gpt_neo", engine=True)
    assert model.engine.sampling == "cached"
    masks: list[list[list[int]]] = []
    parts = backbone(model).register_forward_pre_hook(
        lambda module, inputs, options: masks.append(options["attention_mask"].tolist()), with_kwargs=True
    )
    _Expanded(model, [[2, 3, 4], [5]], 2, 4).step(torch.tensor([6, 7, 8, 9]), torch.tensor([3, 3, 1, 1]))
    parts.remove()
    assert masks == [[[1, 1, 1], [0, 0, 1]], [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]]


def test_completions_do_not_depend_on_the_batch(model: PreTrainedModel) -> None:
    whole = draw(model, PROMPTS, 5)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = draw(model, [prompt], 5, seeds=[i])
        assert [c.token_ids for c in alone] == [c.token_ids for c in whole[i]]
    small = draw(model, PROMPTS, 5, row_budget=5)
    assert [[c.token_ids for c in g] for g in small] == [[c.token_ids for c in g] for g in whole]


def test_eos_ends_a_completion_and_nothing_else_does(model: PreTrainedModel) -> None:
    completions = [c for group in draw(model, PROMPTS, 40, max_new_tokens=20) for c in group]
    assert {c.finish_reason for c in completions} == {"eos", "length"}
    for c in completions:
        assert EOS not in c.token_ids[:-1]
        assert (c.token_ids[-1] == EOS) == (c.finish_reason == "eos")
        assert len(c.token_ids) == len(c.logps) <= 20
        assert c.finish_reason == "eos" or len(c.token_ids) == 20


def test_a_further_end_token_ends_what_would_go_on(model: PreTrainedModel) -> None:
    whole = [c for group in draw(model, PROMPTS, 40, max_new_tokens=20) for c in group]
    other = max(range(2, 50), key=lambda token: sum(token in c.token_ids for c in whole))
    ended = [c for group in draw(model, PROMPTS, 40, max_new_tokens=20, ends=[EOS, other]) for c in group]
    sooner = 0
    for longer, c in zip(whole, ended, strict=True):
        length = longer.token_ids.index(other) + 1 if other in longer.token_ids else len(longer.token_ids)
        sooner += length < len(longer.token_ids)
        assert c.token_ids == longer.token_ids[:length]
        assert c.logps == pytest.approx(longer.logps[:length], abs=1e-4)
        assert (c.finish_reason == "eos") == (c.token_ids[-1] in (EOS, other))
    assert sooner > 5


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_match_exact_probabilities(temperature: float) -> None:
    """The first token of many samples against the softmax, by a chi-square bound."""
    model = make_model("llama", engine=True)
    prompt, n = [2, 3, 4], 20_000
    with torch.no_grad():
        exact = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    (group,) = draw(model, [prompt], n, temperature=temperature, max_new_tokens=1, row_budget=n)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=50)
    expected = exact * n
    likely = expected > 5
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum().item()
    degrees = int(likely.sum()) - 1
    assert degrees > 5
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_same_seed_same_text_other_seed_other_text() -> None:
    model = make_model("gpt2", engine=True)
    ids = [[c.token_ids for c in draw(model, [[2, 3]], 8, seeds=[seed])[0]] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(UserError, match="do not fit the model's 64 positions"):
        draw(make_model("gpt2", engine=True), [[2] * 60], 1)


def test_greedy_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="greedy completions are all equal"):
        draw(make_model("gpt2", engine=True), [[2]], 3, temperature=0.0)
