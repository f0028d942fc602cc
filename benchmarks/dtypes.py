"""A DPO step and sampling in float32 and in bfloat16, at the shape of SmolLM2-135M. See README.md here."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Literal

import common
import pandas as pd
import torch
from transformers import LlamaConfig, PreTrainedModel

from prefopt.lm.flops import reading_flops, sampling_flops
from prefopt.lm.sampling import sample
from prefopt.lm.shape import shape_of
from prefopt.lm.verify import use_engine
from prefopt.training.loop import accumulate_gradients
from prefopt.training.optimization import build_optimizer
from prefopt.training.preference import PreferenceRecipe, preference_examples
from prefopt.training.reference import preference_rows

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
    rope_theta=100000.0,
    bos_token_id=1,
    eos_token_id=2,
)
DTYPES = ("float32", "bfloat16")


def tokens(count: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, SMOLLM2.vocab_size, (count, length), generator=generator).tolist()


def step_of(
    model: PreTrainedModel, args: argparse.Namespace, dtype: Literal["float32", "bfloat16"]
) -> Callable[[], float]:
    """A DPO step of these pairs, its reference cached; returns the operations of its passes."""
    frame = pd.DataFrame(
        {
            "pair_id": [str(i) for i in range(args.pairs)],
            "prompt_ids": [torch.tensor(ids).numpy() for ids in tokens(args.pairs, args.prompt, 0)],
            "chosen_ids": [torch.tensor(ids).numpy() for ids in tokens(args.pairs, args.completion, 1)],
            "rejected_ids": [torch.tensor(ids).numpy() for ids in tokens(args.pairs, args.completion, 2)],
        }
    )
    recipe = PreferenceRecipe(
        objective="dpo",
        values={"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
        epochs=1,
        steps=None,
        batch_size=args.pairs,
        learning_rate=0.0,
        schedule="constant",
        warmup_steps=0,
        max_grad_norm=10.0,
        optimizer="rmsprop",
        weight_decay=0.0,
        evaluate_every=1,
        checkpoint_every=1,
        keep="last",
        token_budget=4096,
        dtype=dtype,
        activation_checkpointing=False,
        adapter=None,
        seed=0,
    )
    examples = preference_examples(frame, pd.DataFrame(0.0, frame.index, ["chosen_logp", "rejected_logp"]), recipe)
    optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate)
    shape = shape_of(model)
    lengths = [(len(row.prompt), [len(own) for own in row.completions]) for row in preference_rows(frame)]
    flops = 3 * sum(reading_flops(shape, *one) for one in lengths)

    def step() -> float:
        accumulate_gradients(model, examples, range(args.pairs), recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return flops

    return step


def sampling_of(model: PreTrainedModel, args: argparse.Namespace) -> Callable[[], float]:
    """Sampling of completions that do not end; returns the operations."""
    prompts, n = tokens(args.pairs, args.prompt, 0), 4

    def draw() -> float:
        how = {"n": n, "temperature": 1.0, "max_new_tokens": args.completion, "ends": [0]}
        groups = sample(model, prompts, seeds=range(len(prompts)), **how)
        made = [[len(one.token_ids) for one in group] for group in groups]
        shape = shape_of(model)
        return sum(sampling_flops(shape, args.prompt, own) for own in made)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=56, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=5, help="in each of which all take their turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SMOLLM2.num_hidden_layers, help="fewer, to try the script")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = copy.deepcopy(SMOLLM2)
    config.num_hidden_layers = args.layers
    model = use_engine(common.AutoModelForCausalLM.from_config(config)).eval()
    narrow = use_engine(copy.deepcopy(model).to(torch.bfloat16)).eval()
    turns = {
        ("DPO step", "float32"): step_of(model, args, "float32"),
        ("DPO step", "bfloat16"): step_of(model, args, "bfloat16"),
        ("sampling", "float32"): sampling_of(model, args),
        ("sampling", "bfloat16"): sampling_of(narrow, args),
    }
    for turn in turns.values():
        turn()
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in turns}
    shares: dict[tuple[str, str], list[float]] = {name: [] for name in turns}
    for _ in range(args.rounds):
        for name, turn in turns.items():
            rate = 1e9 * common.gigaflops("cpu", name[1])
            start = time.perf_counter()
            flops = turn()
            seconds[name].append(time.perf_counter() - start)
            shares[name].append(flops / seconds[name][-1] / rate)
    made = {"DPO step": args.pairs * (args.prompt + 2 * args.completion), "sampling": args.pairs * 4 * args.completion}
    lines, ratios = [], {}
    for what, count in made.items():
        for dtype in DTYPES:
            taken = statistics.median(seconds[what, dtype])
            share = statistics.median(shares[what, dtype])
            lines.append([what, dtype, f"{taken:.2f}", f"{count / taken:.0f}", f"{share:.2f}"])
        ratios[what] = common.paired(*(seconds[what, dtype] for dtype in DTYPES))
    print(f"{args.pairs} prompts of {args.prompt} tokens, completions of {args.completion}, {args.threads} threads")
    print(common.table(["", "dtype", "s", "tokens/s", "share of the product rate"], lines))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
