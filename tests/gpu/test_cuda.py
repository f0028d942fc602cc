"""The engine on a CUDA device in bfloat16 against float32 on the CPU. Skipped where there is no such device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from prefopt.lm import attention
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.precision import autocast, product
from prefopt.lm.sampling import sample
from prefopt.lm.verify import use_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is seen")

# Nats of a completion of some twenty tokens; bfloat16 has eight bits.
TOLERANCE = 0.1
_SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "vocab_size": 1000}
_GPT2_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 1000}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**_GPT2_SHAPE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gpt_neox": GPTNeoXConfig(**_SHAPE, intermediate_size=1024),
    "gptj": GPTJConfig(**_GPT2_SHAPE, rotary_dim=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama": LlamaConfig(**_SHAPE, intermediate_size=688, num_key_value_heads=2),
}
ROWS = [
    Row(range(3, 3 + prompt), (range(50, 50 + first), range(90, 90 + second)))
    for prompt, first, second in ((60, 20, 25), (7, 3, 40), (200, 21, 1))
]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bfloat16_logps_and_gradients_are_near_float32_on_the_cpu(architecture: str) -> None:
    torch.manual_seed(0)
    cpu = use_engine(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture])).eval())
    gpu = copy.deepcopy(cpu).cuda()
    sums = []
    for model, dtype in ((cpu, "float32"), (gpu, "bfloat16")):
        with autocast(dtype, model.device):
            logps = completion_logprobs(model, ROWS).sums
        logps.sum().backward()
        sums.append(logps.detach().cpu())
    assert (sums[0] - sums[1]).abs().max() < TOLERANCE
    gradients = [
        torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters() if parameter.grad is not None])
        for model in (cpu, gpu)
    ]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("architecture", CONFIGS)
def test_flash_attention_is_used_and_equals_the_masks(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = use_engine(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[architecture])).eval()).cuda()
    calls, flash = [], attention._flash

    def counted(*given: Any) -> torch.Tensor:
        calls.append([tensor.dtype for tensor in given[:3]])
        return flash(*given)

    monkeypatch.setattr(attention, "_flash", counted)
    sums = []
    for _ in range(2):
        with torch.no_grad(), autocast("bfloat16", model.device):
            sums.append(completion_logprobs(model, ROWS).sums.cpu())
        monkeypatch.setattr(attention, "flash_can", lambda *_: False)
    # One call a layer, and the one by which `flash_can` finds out.
    assert len(calls) in (4, 5) and all(dtypes == [torch.bfloat16] * 3 for dtypes in calls)
    assert (sums[0] - sums[1]).abs().max() < TOLERANCE


def test_a_product_of_bfloat16_factors_is_not_rounded() -> None:
    left, right = (torch.randn(64, 64, device="cuda").bfloat16() for _ in range(2))
    exact = left.double() @ right.double()
    assert (product(left, right).double() - exact).abs().max() < 1e-4 < ((left @ right).double() - exact).abs().max()


def test_sampled_logps_are_those_of_a_full_pass() -> None:
    torch.manual_seed(0)
    model = use_engine(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt_neox"])).eval()).cuda()
    prompts = [list(range(5, 40)), list(range(7, 20))]
    with autocast("bfloat16", model.device):
        groups = sample(model, prompts, n=16, temperature=1.0, max_new_tokens=24, ends=[0], seeds=[1, 2])
        rows = [Row(p, tuple(c.token_ids for c in group)) for p, group in zip(prompts, groups, strict=True)]
        with torch.no_grad():
            expected = completion_logprobs(model, rows).sums.cpu()
    found = torch.tensor([sum(completion.logps) for group in groups for completion in group])
    assert (found - expected).abs().max() < TOLERANCE
