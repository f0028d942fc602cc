"""How the time of a DPO step grows with pairs, prompt length and model size, and of sampling with N. See README.md here."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from dtypes import step_of, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefopt.lm.flops import sampling_flops
from prefopt.lm.sampling import sample
from prefopt.lm.shape import shape_of
from prefopt.lm.verify import use_engine

# What grows, and how far; all else stays at the values of the options.
PAIRS = (4, 8, 16, 32)
PROMPTS = (32, 128, 512, 1024)  # tokens
WIDTHS = {256: (256, 4, 4), 512: (512, 6, 8), 768: (768, 12, 12)}  # of a GPT-NeoX: width, layers, heads
SAMPLES = (1, 4, 16, 64, 128)

Turn = Callable[[], float]  # does the work once; returns its operations


def model_of(width: int) -> PreTrainedModel:
    """A GPT-NeoX of that width with random weights."""
    torch.manual_seed(0)
    return use_engine(AutoModelForCausalLM.from_config(common.gpt_neox(*WIDTHS[width]))).eval()


def steps(args: argparse.Namespace, model: PreTrainedModel, limit: int) -> dict[str, dict[int, Turn]]:
    """DPO steps by what grows and how far."""

    def step(of: PreTrainedModel, **values: Any) -> Turn:
        return step_of(of, argparse.Namespace(**{**vars(args), **values}), "float32")

    return {
        "pairs of a step": {pairs: step(model, pairs=pairs) for pairs in PAIRS[:limit]},
        "tokens of a prompt": {length: step(model, prompt=length) for length in PROMPTS[:limit]},
        "width of the model": {width: step(model_of(width)) for width in list(WIDTHS)[:limit]},
    }


def draws(args: argparse.Namespace, model: PreTrainedModel, limit: int) -> dict[str, dict[int, Turn]]:
    """Sampling N completions of one prompt, none of which ends."""
    (prompt,) = tokens(1, args.prompt, 0)

    def draw(n: int) -> Turn:
        def turn() -> float:
            how = {"n": n, "temperature": 1.0, "max_new_tokens": args.completion, "ends": [0], "seeds": [0]}
            (group,) = sample(model, [prompt], **how)
            return sampling_flops(shape_of(model), len(prompt), [len(one.token_ids) for one in group])

        return turn

    return {"completions of a prompt": {n: draw(n) for n in SAMPLES[:limit]}}


def main() -> None:
    """Runs every size in each round, and prints what each takes beside the smallest of its kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=48, help="tokens of a completion")
    parser.add_argument("--width", type=int, default=512, choices=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=5, help="in each of which all take their turn")
    parser.add_argument("--threads", type=int, default=common.threads())
    parser.add_argument("--sizes", type=int, default=5, help="of each kind, from the smallest; fewer to try the script")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = model_of(args.width)
    kinds = {**steps(args, model, args.sizes), **draws(args, model, args.sizes)}
    turns = {(kind, size): turn for kind, sizes in kinds.items() for size, turn in sizes.items()}
    operations = {name: turn() for name, turn in turns.items()}  # also what warms up
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in turns}
    for number in range(args.rounds):
        for name, turn in turns.items():
            clock = common.Clock()
            turn()
            seconds[name].append(clock.read()["seconds"])
        print(f"  round {number + 1} of {args.rounds} done, load {common.load():.1f}", file=sys.stderr, flush=True)
    lines, ratios = [], {}
    for kind, sizes in kinds.items():
        first = (kind, min(sizes))
        for size in sizes:
            grown = common.paired(seconds[kind, size], seconds[first])
            taken, counted = statistics.median(seconds[kind, size]), operations[kind, size] / operations[first]
            rate = operations[kind, size] / taken / 1e9
            lines.append([kind, str(size), f"{taken:.3f}", common.told(grown), f"{counted:.2f}", f"{rate:.0f}"])
            ratios[f"{kind}: {size}"] = {**grown, "operations": round(counted, 3)}
    print(
        f"GPT-NeoX of width {args.width}, {args.pairs} pairs, prompts of {args.prompt} tokens, completions of "
        f"{args.completion}, float32, {args.threads} threads, load {common.load():.1f}; medians of {args.rounds} rounds; a "
        f"product of matrices runs at {common.gigaflops():.0f} GFLOP/s"
    )
    header = ["what grows", "", "s", "times the first [least, largest round]", "operations, times the first", "GFLOP/s"]
    print(common.table(header, lines))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
