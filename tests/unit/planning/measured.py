"""A process that trains, reads or samples with a random model, and prints the memory that it took.

Started as a program with a JSON object, see `Case`; prints one: `peak` bytes above the footprint of the same process
before the model is built, and `parameters`.

The footprint is that of a process that has already trained and sampled a tiny model, so that the interpreter, torch and
what they load on first use are in it. The peak is the kernel's own (VmHWM, reset before the model is built), which sees
what Python and torch's kernels allocate as well, not only tensors. glibc would keep freed memory for later and so count
it twice: the environment below makes it give every block of 64 KiB and more back to the kernel at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is run: `work` is train, read or sample; lengths are in tokens."""

    work: str
    model_type: str
    config: dict[str, Any]
    prompt: int
    completions: tuple[int, ...] = ()
    rows: int = 1  # prompts or pairs in all
    steps: int = 2
    token_budget: int = 100_000
    optimizer: str = "rmsprop"
    n: int = 1
    new_tokens: int = 1
    device: str = "cpu"


def measure(case: Case, keeps: bool = False) -> dict[str, int]:
    """Runs the case in a process of its own, whose allocator may keep freed memory, as that of a job does."""
    command = [sys.executable, __file__, json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if keeps else {**os.environ, **ENVIRONMENT}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, int] = json.loads(result.stdout)
    return found


def _main(case: Case) -> dict[str, int]:
    import torch

    _run(dataclasses.replace(case, config=case.config | _tiny(case), prompt=4, rows=2, steps=1))
    if case.device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        parameters = _run(case)
        return {"peak": torch.cuda.max_memory_allocated() - before, "parameters": parameters}
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    parameters = _run(case)
    return {"peak": _status("VmHWM") - before, "parameters": parameters}


def _tiny(case: Case) -> dict[str, int]:
    old = case.model_type in ("gpt2", "gptj")
    names = ("n_embd", "n_layer", "n_head") if old else ("hidden_size", "num_hidden_layers", "num_attention_heads")
    small = dict(zip(names, (16, 1, 2), strict=True)) | {"vocab_size": 20, "rotary_dim": 4, "num_key_value_heads": 2}
    return {name: value for name, value in small.items() if name in case.config}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _run(case: Case) -> int:
    """Builds the model, does the work, and returns the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from prefopt.lm.verify import use_engine

    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
    config = AutoConfig.for_model(case.model_type, **case.config, **ids)
    torch.manual_seed(0)
    with torch.device(case.device):
        model = use_engine(AutoModelForCausalLM.from_config(config).eval())
    {"train": _train, "read": _read, "sample": _sample}[case.work](model, case)
    return sum(parameter.numel() for parameter in model.parameters())


def _train(model: Any, case: Case) -> None:
    """DPO's steps as `prefopt.training.loop.train` makes them."""
    import torch

    from prefopt.training.loop import accumulate_gradients
    from prefopt.training.optimization import build_optimizer
    from prefopt.training.preference import PreferenceRecipe, preference_examples

    pairs, reference = _pairs(case)
    recipe = PreferenceRecipe(
        **{
            "epochs": 1,
            "steps": None,
            "batch_size": case.rows,
            "learning_rate": 1e-6,
            "schedule": "constant",
            "warmup_steps": 0,
        },
        **{"max_grad_norm": 1.0, "optimizer": case.optimizer, "weight_decay": 0.0, "evaluate_every": 1, "seed": 0},
        **{"checkpoint_every": 1, "keep": "last", "token_budget": case.token_budget, "dtype": "float32"},
        **{"activation_checkpointing": False, "adapter": None, "objective": "dpo"},
        values={"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    )
    examples = preference_examples(pairs, reference, recipe)
    optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate)
    for _ in range(case.steps):
        accumulate_gradients(model, examples, range(case.rows), recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _read(model: Any, case: Case) -> None:
    """The reference pass."""
    import torch

    from prefopt.runtime.usage import Usage
    from prefopt.training.reference import pair_logprobs, preference_rows

    rows = preference_rows(_pairs(case)[0])
    usage = Usage("reference", torch.device(case.device), "float32")
    pair_logprobs(model, rows, case.token_budget, usage)


def _sample(model: Any, case: Case) -> None:
    from prefopt.lm.sampling import sample

    prompts = [[2] * case.prompt] * case.rows
    options = {"temperature": 1.0, "max_new_tokens": case.new_tokens, "seeds": list(range(case.rows))}
    # No token has this id, so that every completion takes all its tokens.
    sample(model, prompts, n=case.n, ends=[10**6], **options)


def _pairs(case: Case) -> tuple[Any, Any]:
    import numpy as np
    import pandas as pd

    lengths = dict(zip(("chosen", "rejected"), case.completions, strict=True))
    rows = {"pair_id": [str(i) for i in range(case.rows)], "prompt_ids": [np.full(case.prompt, 2)] * case.rows}
    rows |= {f"{side}_ids": [np.full(length, 3)] * case.rows for side, length in lengths.items()}
    logps = {f"{side}_logp": np.zeros(case.rows, dtype=np.float32) for side in lengths}
    return pd.DataFrame(rows), pd.DataFrame(logps)


if __name__ == "__main__":
    print(json.dumps(_main(Case(**json.loads(sys.argv[1])))))
