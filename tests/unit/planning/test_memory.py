"""The parts of a stage's memory by hand, and what makes them smaller."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from prefopt.lm import attention, batching, logprobs
from prefopt.planning import memory
from prefopt.planning.architecture import Architecture, from_hub, language_model_parameters, scorer_parameters
from prefopt.planning.memory import Engine, MicroBatch, Resident, Rows, Trained, micro_batch

PYTHIA = from_hub("EleutherAI/pythia-160m")
GPTJ = from_hub("EleutherAI/gpt-j-6b")
PAIR = Rows(100, (40, 60))
SMALL = Architecture("gpt_neox", 10, 64, 8, 2, 2, 2, 4, 16, False, True, True)


def step(model: Architecture, engine: Engine, micro_batches: int = 1, **options: int) -> memory.Parts:
    trained = Trained(model, None, 1, **options)
    return memory.training([trained], micro_batch(PAIR, engine, 64), engine, micro_batches=micro_batches)


def test_what_stands_in_the_engine_stands_here_too() -> None:
    assert memory.KEEP_BYTES == logprobs._KEEP_BYTES
    assert memory.CHUNK_BYTES == {False: logprobs._CHUNK_BYTES, True: logprobs._GPU_CHUNK_BYTES}
    assert memory.GROUP_TOKENS == attention._GROUP_TOKENS
    assert memory.prompts_at_once is batching.prompts_at_once


def test_the_snakefile_imports_nothing_heavy_with_it() -> None:
    code = "import sys, prefopt.planning.needs; print(sorted({'torch', 'pandas', 'numpy', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_micro_batches_keep_the_budget_and_share_a_step() -> None:
    assert micro_batch(PAIR, Engine(token_budget=1000), 64).count == 5
    assert micro_batch(PAIR, Engine(token_budget=1000, processes=32), 64).count == 2
    assert micro_batch(PAIR, Engine(token_budget=10), 64).count == 1, "a row longer than the budget stands alone"
    assert MicroBatch(PAIR, 3).tokens == 3 * 200
    assert MicroBatch(Rows(10, (100, 100, 50)), 1).groups() == [100, 150]


def test_weights_optimizer_and_gradients_of_a_step_of_two_micro_batches() -> None:
    parts, floats = step(PYTHIA, Engine(), micro_batches=2), 4 * language_model_parameters(PYTHIA)
    assert parts["weights"] == parts["optimizer"] == parts["gradients"] == floats
    assert parts["gradient of the output head"] == 4 * 50304 * 768
    adam = memory.training([Trained(PYTHIA, None, 2)], micro_batch(PAIR, Engine(), 64), Engine(), micro_batches=2)
    assert adam["optimizer"] == 2 * floats


def test_activations_by_hand() -> None:
    # One row of 4 + 3 tokens, all floats: 10 times the width, twice the feed-forward, the prompt's and the completion's
    # keys and values (7 tokens each), a mask of 3 x 7, and for each token 2 heads and 4 statistics of the norms.
    layer = 4 * (7 * 8 * 10 + 7 * 16 * 2 + 2 * 7 * 8 + 3 * 7 + 7 * (2 + 4))
    outside = 3 * 7 * 8 * 4
    batch = MicroBatch(Rows(4, (3,)), 1)
    assert memory.activations(Trained(SMALL, None, 1), batch, Engine()) == 2 * layer + outside
    kept = memory.activations(Trained(SMALL, None, 1), batch, Engine(checkpointing=True))
    assert kept == 2 * 7 * 8 * 4 + layer + outside


def test_processes_share_what_is_trained_but_not_the_activations() -> None:
    one, eight = Engine(dtype="bfloat16", gpu=True), Engine(dtype="bfloat16", gpu=True, processes=8)
    batch = MicroBatch(PAIR, 8)
    alone, shared = (memory.training([Trained(GPTJ, None, 1)], batch, e, micro_batches=2) for e in (one, eight))
    for part in ("weights", "optimizer", "gradients"):
        assert shared[part] == alone[part] // 8
    # In bfloat16 throughout, where one process's autocast keeps the residual stream and GELU's powers in float32.
    assert alone["activations"] / 2 < shared["activations"] < alone["activations"]
    # Embeddings, head and two layers with their gradients in bfloat16, in place of a copy of every layer.
    layer, outside = 201_355_264, 2 * 50400 * 4096 + 50400 + 2 * 4096
    assert shared["gathered weights"] == 2 * 2 * (outside + 2 * layer)
    assert alone["gathered weights"] == 2 * 28 * layer


@pytest.mark.parametrize("model", [PYTHIA, GPTJ])
def test_checkpointing_and_adapters_take_less(model: Architecture) -> None:
    plain, kept = step(model, Engine(), 2), step(model, Engine(checkpointing=True), 2)
    assert kept["activations"] < 0.25 * plain["activations"]
    adapted = step(model, Engine(), 2, adapter_rank=16)
    assert adapted["gradients"] == adapted["optimizer"] < 0.03 * plain["gradients"]
    assert adapted["weights"] == plain["weights"] + adapted["gradients"]


def test_a_smaller_budget_takes_less_until_the_weights_are_left() -> None:
    peaks = [memory.total(step(PYTHIA, Engine(token_budget=budget), 2)) for budget in (16384, 4096, 1024)]
    assert peaks == sorted(peaks, reverse=True) and peaks[2] > 3 * 4 * language_model_parameters(PYTHIA)


def test_the_four_models_of_ppo() -> None:
    policy, value = Trained(PYTHIA, None, 2), Trained(PYTHIA, 1, 2)
    others = [Resident(language_model_parameters(PYTHIA)), Resident(scorer_parameters(PYTHIA))]
    batch = MicroBatch(Rows(50, (50,)), 40)
    parts = memory.training([policy, value], batch, Engine(), micro_batches=2, others=others)
    trained = 4 * (language_model_parameters(PYTHIA) + scorer_parameters(PYTHIA))
    assert parts["weights"] == parts["gradients"] == trained and parts["optimizer"] == 2 * trained
    assert parts["other models"] == trained, "reference and reward have the shapes of policy and value"
    # One loss: both models' activations are kept until it is differentiated.
    alone = memory.activations(policy, batch, Engine())
    assert parts["activations"] == 2 * alone
    frozen = memory.training([policy, value], batch, Engine(processes=4), micro_batches=2, others=others)
    assert frozen["other models"] == sum(4 * other.parameters // 4 for other in others)


def test_the_cache_of_shared_prompts() -> None:
    options = {"prompt": 100, "new_tokens": 20, "n": 16, "prompts": 8, "dtype": "float32", "gpu_bytes": None}
    token = 4 * 2 * 12 * 768
    cache = memory.sampling([], PYTHIA, **options)["cache"]  # type: ignore[arg-type]
    assert cache == (8 * 100 + 8 * 16 * 20) * token


def test_a_gpt_j_is_sampled_within_the_limit_of_the_cache() -> None:
    weights = [Resident(6_050_882_784, "bfloat16")]
    options: dict[str, Any] = {"prompt": 512, "new_tokens": 53, "n": 1, "prompts": 384, "dtype": "bfloat16"}
    parts = memory.sampling(weights, GPTJ, **options, gpu_bytes=80 * 2**30)
    assert 0.9 * batching.CACHE_BYTES[True] < parts["cache"] <= batching.CACHE_BYTES[True]
    assert memory.total(parts) < 60 * 2**30
    # Of a smaller card it takes two fifths of what the weights leave, less with other models beside them.
    small = memory.sampling(weights, GPTJ, **options, gpu_bytes=24 * 2**30)
    room = 0.4 * (24 * 2**30 - 2 * 6_050_882_784)
    assert 0.9 * room < small["cache"] <= room and memory.total(small) < 20 * 2**30
    beside = memory.sampling(weights, GPTJ, **options, gpu_bytes=24 * 2**30, beside=5 * 2**30)
    assert beside["cache"] == pytest.approx(small["cache"] - 2 * 2**30, rel=0.1)


def test_vllm_spreads_weights_and_keys_over_its_gpus() -> None:
    llama = from_hub("meta-llama/Llama-2-70b-hf")
    parameters = language_model_parameters(llama)
    for devices in (1, 4):
        parts = memory.served(parameters, llama, 1000, Engine("bfloat16", processes=devices))
        # Keys and values of 80 layers with 8 heads of 128; a layer's 3 x 28,672 + 4 x 8,192 numbers for each of 8,192 tokens.
        assert parts == {
            "weights": 2 * parameters // devices,
            "cache": 1000 * 2 * 80 * 8 * 128 * 2 // devices,
            "passing": 8192 * (3 * 28672 + 4 * 8192) * 2 // devices,
        }
    small = memory.served(parameters, llama, 1000, Engine("bfloat16", processes=64))
    assert small["passing"] == 2 * 256 * 32000 * 4, "a step's logits are whole on each GPU"


def test_lengths_are_at_least_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Rows(0, (3,))
