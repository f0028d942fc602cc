"""The check on loading: it finds what the engine would drop, takes the next way that is right, and refuses in a sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from prefopt.errors import UserError
from prefopt.lm import attention, verify
from prefopt.lm.batching import Row
from prefopt.lm.engine import Engine, position_limit, score_head
from prefopt.lm.kl import completion_kls
from prefopt.lm.logprobs import _TokenLogprobs, completion_hidden_states, completion_logprobs
from prefopt.lm.models import load_scorer
from prefopt.lm.verify import try_engine, use_engine

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
_SHAPE: dict[str, Any] = {
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4},
    **{"intermediate_size": 32, "max_position_embeddings": 64, "vocab_size": 50, **_IDS},
}
_GEMMA2 = Gemma2Config(**_SHAPE, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
_MISTRAL = MistralConfig(**_SHAPE, sliding_window=6)
_SINKS = GptOssConfig(**_SHAPE, sliding_window=64, num_local_experts=4, num_experts_per_tok=2)

ROWS = [Row([2, 3, 4, 5, 6, 7, 8], ([9, 10, 1], [11, 12, 13, 14, 15, 1])), Row([2], ([3, 4, 5, 6, 7, 8, 9, 1],))]


def build(config: PreTrainedConfig, seed: int = 0, kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


def see_everything(self: attention.Mask, queries: Tensor, keys: Tensor) -> Tensor:
    return keys <= queries


@pytest.mark.parametrize(
    "config, name, value",
    [
        (_MISTRAL, "Mask.sees", see_everything),
        (_GEMMA2, "Scores.capped", lambda self, scores: scores),
        (_SINKS, "Scores.weights", lambda self, scores, sinks: scores.softmax(-1)),
    ],
    ids=["window", "softcap", "sinks"],
)
def test_what_is_dropped_is_found_and_padded_batches_are_taken(
    config: PreTrainedConfig, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = try_engine(build(config))
    assert right.engine is not None and (right.engine.rows, right.engine.sampling) == ("packed", "shared")
    assert right.error < verify.TOLERANCE / 10 and right.failures == ()

    owner, attribute = name.split(".")
    monkeypatch.setattr(getattr(attention, owner), attribute, value)
    wrong = try_engine(build(config))
    assert wrong.engine is not None and (wrong.engine.rows, wrong.engine.sampling) == ("padded", "cached")
    assert wrong.failures[0].startswith("packed rows: off by ")
    assert float(wrong.failures[0].split()[-1]) > 10 * verify.TOLERANCE


def test_an_argument_that_is_not_known_is_not_dropped() -> None:
    states = torch.zeros(1, 1, 2, 4)
    call = {"query": states, "key": states, "value": states, "attention_mask": None}
    module = torch.nn.Module()
    assert attention.prefopt_attention(module, **call, sliding_window=3, position_ids=states)[0].shape == (1, 2, 1, 4)
    with pytest.raises(NotImplementedError, match="takes no position_bias"):
        attention.prefopt_attention(module, **call, position_bias=states)
    with pytest.raises(NotImplementedError, match="is causal"):
        attention.prefopt_attention(module, **call, is_causal=False)


def test_what_neither_way_computes_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify, "_trials", {})
    monkeypatch.setattr(verify, "_rows_error", lambda *_: 0.53)
    expected = (
        rf"^MistralForCausalLM of {tmp_path} is not computed rightly here "
        r"\(packed rows: off by 0.53; padded batches: off by 0.53\): use another model.$"
    )
    with pytest.raises(UserError, match=expected):
        use_engine(build(_MISTRAL), tmp_path)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    from transformers import BertConfig

    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    with pytest.raises(UserError, match="later tokens change the probabilities of earlier ones by"):
        use_engine(build(BertConfig(**small, vocab_size=50)))


def test_a_model_is_tried_on_the_cpu_whatever_the_default_device_is() -> None:
    model = build(LlamaConfig(**_SHAPE))
    with torch.device("meta"):
        assert try_engine(model).engine == Engine("packed", "shared")


def test_a_large_model_is_tried_on_a_small_copy_of_all_kinds_of_its_layers() -> None:
    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(Gemma2Config())
    fewer = verify.small_copies(large)[0]
    copied = fewer()
    assert copied.config.layer_types == ["sliding_attention", "full_attention"]
    assert copied.config.sliding_window == 8 and copied.config.hidden_size == 72
    assert sum(parameter.numel() for parameter in copied.parameters()) < 500_000
    trial = try_engine(large)
    assert trial.engine == Engine("packed", "shared", 1.0, 30.0)


def test_the_log_names_the_way_and_how_far_it_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="prefopt"):
        use_engine(build(_MISTRAL), "some/folder")
    assert caplog.messages[-1].startswith(
        "MistralForCausalLM of some/folder: packed rows, one cache of each prompt for all its samples; at most "
    )


def test_the_check_draws_no_random_number_and_changes_no_weight() -> None:
    model = build(_MISTRAL)
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    use_engine(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("config, limit", [({}, 64), ({"max_position_embeddings": -1}, None)])
def test_positions(config: dict[str, Any], limit: int | None) -> None:
    assert position_limit(LlamaConfig(**{**_SHAPE, **config})) == limit


def longrope(**changes: Any) -> PreTrainedConfig:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}
    rope |= {"original_max_position_embeddings": 20, "partial_rotary_factor": 1.0}
    return Phi3Config(**{**_SHAPE, "original_max_position_embeddings": 20, "rope_parameters": rope, **changes})


def test_a_longrope_model_takes_its_original_positions() -> None:
    config = longrope()
    assert position_limit(config) == 20
    model = use_engine(build(config))
    assert model.engine.rows == "packed"
    with pytest.raises(UserError, match="has 22 tokens, the model has 20 positions"):
        completion_hidden_states(model, [Row([2] * 12, ([3] * 10,))])


def test_a_longrope_models_window_is_passed_before_its_positions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    config = longrope(sliding_window=12)
    assert try_engine(build(config)).engine == Engine("packed", "shared")
    monkeypatch.setattr(attention.Mask, "sees", see_everything)
    wrong = try_engine(build(config))
    assert wrong.engine is not None and wrong.engine.rows == "padded"


def test_a_dynamic_rotary_embedding_is_right_up_to_its_positions_and_refused_beyond() -> None:
    """Beyond them transformers turns all of a row by other angles."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = build(LlamaConfig(**{**_SHAPE, "max_position_embeddings": 16, "rope_parameters": rope}))
    generator = torch.Generator().manual_seed(0)
    row, other = torch.randint(2, 50, (2, 16), generator=generator).tolist()
    rows = [Row(row[:10], (row[10:],)), Row(other[:3], (other[3:],))]
    expected = []
    with torch.no_grad():
        for one in rows:
            ids = torch.tensor([[*one.prompt, *one.completions[0]]])
            logps = model(input_ids=ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1].log_softmax(-1)
            expected.append(logps.gather(1, torch.tensor(one.completions[0])[:, None]).squeeze(1))
        assert use_engine(model).engine.rows == "packed"
        found = completion_logprobs(model, rows).tokens
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="has 17 tokens, the model has 16 positions"):
        completion_logprobs(model, [Row(row, ([2],))])


@pytest.mark.parametrize("config", [_GEMMA2, _MISTRAL, _SINKS], ids=["gemma2", "mistral", "gpt_oss"])
def test_scores_equal_the_models_own(config: PreTrainedConfig) -> None:
    one = {"num_labels": 1}
    scorer = build(type(config).from_dict({**config.to_dict(), **one}), kind=AutoModelForSequenceClassification)
    sequences = [torch.tensor([[*row.prompt, *c]]) for row in ROWS for c in row.completions]
    with torch.no_grad():
        expected = torch.cat([scorer(input_ids=ids).logits for ids in sequences])
        _, last = completion_hidden_states(use_engine(scorer), ROWS)
        torch.testing.assert_close(score_head(scorer)(last), expected, rtol=1e-4, atol=1e-4)
    assert scorer.engine.rows == "packed" and scorer.engine.sampling is None


def test_no_reward_model_where_transformers_has_no_classifier(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(GraniteConfig(**_SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot become a reward model, .* no sequence classifier .* granite: "):
        load_scorer(tmp_path)


def test_kl_of_soft_capped_policies_is_that_of_their_own_logits() -> None:
    policies = [build(_GEMMA2, seed) for seed in (0, 1)]
    expected = []
    for row in ROWS:
        for completion in row.completions:
            ids = torch.tensor([[*row.prompt, *completion]])
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1) for model in policies)
            expected.append((p.exp() * (p - q)).sum())
    found = completion_kls(*map(use_engine, policies), ROWS)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep_bytes", [None, 0])
@pytest.mark.parametrize("scale, softcap", [(0.25, None), (1.0, 2.0), (3.0, 5.0)])
def test_gradients_through_scale_soft_cap_bias_and_temperature(
    scale: float, softcap: float | None, keep_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if keep_bytes is not None:
        monkeypatch.setattr("prefopt.lm.logprobs._KEEP_BYTES", keep_bytes)
    monkeypatch.setattr("prefopt.lm.logprobs._CHUNK_BYTES", 4 * 11 * 2)
    torch.manual_seed(0)
    inputs = [torch.randn(5, 6), torch.randn(11, 6), torch.randn(11)]
    targets, temperature = torch.tensor([0, 3, 10, 4, 4]), 0.7
    results = []
    for ours in (True, False):
        hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        if ours:
            engine = Engine("packed", "shared", scale, softcap)
            logps = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, engine)
        else:
            logits = scale * F.linear(hidden, weight, bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            logps = (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        (logps * torch.linspace(-1, 2, 5)).sum().backward()
        results.append((logps, hidden.grad, weight.grad, bias.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
