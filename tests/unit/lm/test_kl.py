"""The exact KL against closed forms and enumeration."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prefopt.lm import kl
from prefopt.lm.batching import Row
from prefopt.lm.engine import head_logits
from prefopt.lm.kl import completion_kls
from prefopt.lm.logprobs import completion_hidden_states
from prefopt.lm.verify import use_engine

EOS = 1


def two_token_model(seed: int) -> PreTrainedModel:
    """A policy over the tokens 0 and EOS, with probabilities that depend on what came before."""
    torch.manual_seed(seed)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=2, max_position_embeddings=16, bos_token_id=EOS, eos_token_id=EOS, **shape)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(30)
    return use_engine(model)


@torch.no_grad()
def step_logps(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probabilities of the next token."""
    return F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float(), dim=-1)


def test_one_step_is_the_closed_form() -> None:
    policy, reference = two_token_model(0), two_token_model(1)
    prompt = (0, 0, 1)
    p, q = (step_logps(model, list(prompt)).exp().tolist() for model in (policy, reference))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert expected > 0.05
    # Whichever token was sampled.
    assert completion_kls(policy, reference, [Row(prompt, ((0,), (EOS,)))]).tolist() == pytest.approx(
        [expected, expected], abs=1e-5
    )


def test_the_mean_over_samples_is_the_kl_of_whole_sequences() -> None:
    policy, reference = two_token_model(0), two_token_model(1)
    prompt, longest = (0, 1, 0), 4
    completions = [(*[0] * n, EOS) for n in range(longest)] + [(0,) * longest]
    logps = [
        [sum(step_logps(model, [*prompt, *c[:t]])[c[t]].item() for t in range(len(c))) for c in completions]
        for model in (policy, reference)
    ]
    assert sum(map(math.exp, logps[0])) == pytest.approx(1, abs=1e-5)
    sequence_kl = sum(math.exp(p) * (p - q) for p, q in zip(*logps, strict=True))
    kls = completion_kls(policy, reference, [Row(prompt, tuple(completions))])
    expectation = sum(math.exp(p) * kl for p, kl in zip(logps[0], kls.tolist(), strict=True))
    assert expectation == pytest.approx(sequence_kl, abs=1e-5)
    # Of a single sample the two differ: the exact one spares the variance of the sampled token.
    assert max(abs(p - q - kl) for p, q, kl in zip(*logps, kls.tolist(), strict=True)) > 0.05


def test_a_policy_has_no_divergence_from_itself_and_rows_keep_their_order() -> None:
    policy, reference = two_token_model(0), two_token_model(1)
    rows = [Row((0, 0), ((0, EOS), (EOS,))), Row((1,), ((0, 0, 0, EOS),))]
    assert completion_kls(policy, copy.deepcopy(policy), rows).abs().max() < 1e-6
    together = completion_kls(policy, reference, rows)
    alone = [completion_kls(policy, reference, [row]) for row in rows]
    assert together.tolist() == pytest.approx(list(itertools.chain(*(kls.tolist() for kls in alone))), abs=1e-5)


@pytest.mark.parametrize("steps_of_a_chunk", [1, 3, 8])
def test_every_chunk_of_steps_counts(steps_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "_CHUNK_BYTES", steps_of_a_chunk * 4 * 2)
    policy, reference = two_token_model(0), two_token_model(1)
    prompt, completions = (0, 0), ((0, 0, EOS), (EOS,), (0, EOS, 0, EOS))
    expected = [
        sum(
            (p.exp() * (p - q)).sum().item()
            for p, q in (
                [step_logps(model, [*prompt, *completion[:t]]) for model in (policy, reference)]
                for t in range(len(completion))
            )
        )
        for completion in completions
    ]
    assert min(expected) > 0.01
    kls = completion_kls(policy, reference, [Row(prompt, completions)])
    assert kls.tolist() == pytest.approx(expected, abs=1e-5)


def test_pieces_of_the_vocabulary_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces, every step counts; a piece holds as many steps as the bytes allow, and at least one."""
    policy, reference = two_token_model(0), two_token_model(1)
    rows = [Row((0, 0), ((0, 0, EOS), (EOS,))), Row((1,), ((0, EOS), (0, 0, 0, EOS)))]
    whole = completion_kls(policy, reference, rows)
    assert whole.shape == (4,) and (whole > 0).all()
    sizes: list[int] = []

    def spied(model: nn.Module, hidden: Tensor) -> Tensor:
        sizes.append(len(hidden))
        return head_logits(model, hidden)

    monkeypatch.setattr(kl, "head_logits", spied)
    # A step of two tokens takes eight bytes.
    for bytes_, pieces in ((24, [3, 3, 3, 1]), (31, [3, 3, 3, 1]), (1, [1] * 10), (32 * 2**20, [10])):
        monkeypatch.setattr(kl, "_CHUNK_BYTES", bytes_)
        sizes.clear()
        torch.testing.assert_close(completion_kls(policy, reference, rows), whole, rtol=1e-5, atol=1e-6)
        assert sizes == [size for size in pieces for _ in ("policy", "reference")]


def test_each_models_head_is_its_own_and_computes_in_the_weights_precision() -> None:
    """In mixed precision what follows the hidden states is float32, also where those are narrower."""
    policy, reference = two_token_model(0), two_token_model(1)
    policy.model.norm.register_forward_hook(lambda module, arguments, hidden: hidden.bfloat16())
    rows = [Row((0, 1), ((0, 0, EOS),))]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = [completion_hidden_states(model, rows)[0] for model in (policy, reference)]
        found = completion_kls(policy, reference, rows)
    p, q = (
        F.log_softmax(h.float() @ model.get_output_embeddings().weight.T, dim=-1)
        for h, model in zip(hidden, (policy, reference), strict=True)
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum().reshape(1), rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


def test_a_policy_and_a_reference_of_other_precisions() -> None:
    policy, reference = two_token_model(0), two_token_model(1)
    rows = [Row((0, 1), ((0, 0, EOS),))]
    found = completion_kls(policy, reference.to(torch.bfloat16), rows)
    assert found.item() == pytest.approx(completion_kls(policy, two_token_model(1), rows).item(), rel=0.05)
