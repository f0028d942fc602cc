"""The engine's log-probabilities and hidden states against a plain full-vocabulary forward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.errors import UserError
from prefopt.lm import logprobs
from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.logprobs import completion_hidden_states, completion_logprobs, pad_flat
from tiny_models import CONFIGS, make_model

PAIR = Row([2, 3, 4, 5, 6], ([7, 8, 1], [9, 10, 11, 12, 13, 1]))
ROWS = [PAIR, Row([2], ([1], [3, 4, 1], [5, 1], [6, 7, 8, 9, 1], [10, 1])), Row([20, 21, 22], ([30, 31, 1],))]


def plain_logps(model: PreTrainedModel, rows: list[Row], temperature: float = 1.0) -> list[Tensor]:
    """One sequence at a time, all logits, float32."""
    parts = []
    for row in rows:
        for completion in row.completions:
            ids = torch.tensor([[*row.prompt, *completion]])
            logps = (model(input_ids=ids).logits / temperature).log_softmax(-1)[0, :-1]
            parts.append(logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(row.prompt) - 1 :])
    return parts


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_equals_a_plain_forward(temperature: float, model: PreTrainedModel, plain: PreTrainedModel) -> None:
    result = completion_logprobs(model, ROWS, temperature=temperature)
    expected = plain_logps(plain, ROWS, temperature)
    torch.testing.assert_close(result.tokens, torch.cat(expected), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(result.sums, torch.stack([part.sum() for part in expected]), rtol=1e-5, atol=2e-5)
    assert result.lengths.tolist() == [3, 6, 1, 3, 2, 5, 2, 3]


def test_one_row_alone_equals_the_row_in_a_batch(model: PreTrainedModel) -> None:
    together = completion_logprobs(model, ROWS).sums
    alone = torch.cat([completion_logprobs(model, [row]).sums for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("keep_bytes", [logprobs._KEEP_BYTES, 0])
def test_gradients_equal_the_plain_forwards(
    keep_bytes: int, model: PreTrainedModel, plain: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits kept for the backward pass, and with logits computed again in small chunks."""
    monkeypatch.setattr(logprobs, "_KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * 50 * 3)
    weights = torch.linspace(-1, 1, 8)
    (completion_logprobs(model, ROWS, temperature=0.7).sums * weights).sum().backward()
    sums = torch.stack([part.sum() for part in plain_logps(plain, ROWS, 0.7)])
    (sums * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("keep_bytes", [logprobs._KEEP_BYTES, 0])
def test_the_heads_bias_counts_and_learns(keep_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * 50 * 3)
    engine, plain = (make_model("gptj", engine=flag) for flag in (True, False))
    for model in (engine, plain):
        torch.nn.init.normal_(model.lm_head.bias, std=3, generator=torch.Generator().manual_seed(0))
    result = completion_logprobs(engine, ROWS, temperature=0.7)
    expected = torch.cat(plain_logps(plain, ROWS, 0.7))
    torch.testing.assert_close(result.tokens, expected, rtol=1e-5, atol=2e-5)
    weights = torch.linspace(-1, 1, len(expected))
    (result.tokens * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(engine.lm_head.bias.grad, plain.lm_head.bias.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keep_bytes", [logprobs._KEEP_BYTES, 0])
def test_hidden_states_in_half_precision_add_up_the_heads_gradient_over_all_chunks(
    keep_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten chunks, of which up to four make one gradient of the weights."""
    monkeypatch.setattr(logprobs, "_KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(logprobs, "_CHUNK_BYTES", 4 * 50 * 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(29, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16().float().requires_grad_()
    targets, weights = torch.arange(29), torch.linspace(-1, 2, 29)
    engine = make_model("llama", engine=True).engine
    logps = logprobs._TokenLogprobs.apply(hidden, weight, None, targets, 1.0, engine)
    ours = torch.autograd.grad((logps * weights).sum(), (weight, hidden))
    expected = (hidden.float() @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    theirs = torch.autograd.grad((expected * weights).sum(), (weight, hidden))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_logits_of_one_position_are_not_scaled_by_those_of_another() -> None:
    hidden, weight = torch.tensor([[300.0], [0.1]]), torch.tensor([[1.0], [2.0]])
    logps = logprobs._TokenLogprobs.apply(
        hidden, weight, None, torch.tensor([0, 0]), 1.0, make_model("llama", True).engine
    )
    assert logps.tolist() == pytest.approx([-300, -math.log(1 + math.exp(0.1))])


def test_hidden_states_before_each_token_and_at_the_last(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    predicting, last = completion_hidden_states(model, ROWS)
    expected_predicting, expected_last = [], []
    for row in ROWS:
        for completion in row.completions:
            ids = torch.tensor([[*row.prompt, *completion]])
            hidden = plain.base_model(input_ids=ids).last_hidden_state[0]
            expected_predicting.append(hidden[len(row.prompt) - 1 : -1])
            expected_last.append(hidden[-1])
    torch.testing.assert_close(predicting, torch.cat(expected_predicting), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, torch.stack(expected_last), rtol=1e-4, atol=1e-5)


def test_completions_of_a_row_do_not_see_each_other(model: PreTrainedModel) -> None:
    before = completion_logprobs(model, [PAIR]).sums
    other = Row(PAIR.prompt, ([14, 15, 1], PAIR.completions[1]))
    after = completion_logprobs(model, [other]).sums
    assert after[1].item() == pytest.approx(before[1].item(), abs=2e-5)
    assert abs(after[0].item() - before[0].item()) > 1e-2


def test_both_completions_see_the_whole_prompt(model: PreTrainedModel) -> None:
    before = completion_logprobs(model, [PAIR]).sums
    for changed in ([14, 3, 4, 5, 6], [2, 3, 4, 5, 14]):
        after = completion_logprobs(model, [Row(changed, PAIR.completions)]).sums
        assert (after - before).abs().min() > 1e-3


def test_prompt_tokens_do_not_count(model: PreTrainedModel) -> None:
    result = completion_logprobs(model, [PAIR])
    assert len(result.tokens) == 9
    assert result.tokens.max() <= 0


def test_a_row_beyond_the_positions_is_one_sentence() -> None:
    model = make_model("llama", engine=True)
    with pytest.raises(UserError, match="66 tokens, the model has 64 positions"):
        completion_logprobs(model, [Row([2] * 60, ([3] * 6,))])


def test_many_completions_are_grouped() -> None:
    """More tokens than one attention group takes."""
    engine, plain = (make_model("llama", engine=flag) for flag in (True, False))
    row = Row([2, 3], tuple([i % 48 + 2] * 20 for i in range(25)))
    result = completion_logprobs(engine, [row]).sums
    expected = torch.stack([part.sum() for part in plain_logps(plain, [row])])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_pad_flat() -> None:
    padded = pad_flat(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1]), value=-9)
    assert padded.tolist() == [[1.0, 2.0], [3.0, -9.0]]


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    rows = [Row([0] * length, ([1],)) for length in (5, 1, 9, 30, 3)]
    batches = micro_batches(rows, 12)
    assert batches == [[1, 4, 0], [2], [3]]
    assert micro_batches([], 12) == []


def test_configs_are_what_they_are_taken_for() -> None:
    engines = {name: make_model(name, engine=True).config._attn_implementation for name in CONFIGS}
    registered = dict.fromkeys(("gpt2", "gpt_neox", "gptj", "llama"), "prefopt")
    assert engines == {**registered, "gpt_neo": "eager"}


def test_a_micro_batch_is_filled_to_the_budget_and_counts_a_prompt_once() -> None:
    rows = [Row([0] * 4, ([1, 1], [1] * 3)), Row([0] * 6, ([1] * 3,)), Row([0] * 2, ([1] * 4, [1] * 3))]
    assert [row.tokens for row in rows] == [9, 9, 9]
    # Of equal lengths the earlier comes first; 18 tokens are within 18, and not within 17.
    assert micro_batches(rows, 18) == [[0, 1], [2]]
    assert micro_batches(rows, 17) == [[0], [1], [2]]
    assert micro_batches(rows, 27) == [[0, 1, 2]]
    assert micro_batches(rows, 1) == [[0], [1], [2]]
