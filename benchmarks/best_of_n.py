"""Best-of-N sampling against transformers' `generate` and vLLM: samples per second. See README.md here."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import common
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefopt.generation.vllm import Server, VLLMRecipe, serving
from prefopt.lm.batching import Row
from prefopt.lm.flops import sampling_flops
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.sampling import Completion, sample
from prefopt.lm.shape import shape_of
from prefopt.lm.verify import use_engine

SAMPLES, MAX_NEW_TOKENS, EOS_ID = 128, 32, 0
END = 1 / 24  # chance of EOS at every step: completions of 18 tokens on average, cut at 32


def embedded() -> PreTrainedModel:
    """A model of the embedded policy's shape with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(common.ROOT / "workflow/models/tldr_base"))


MODELS = {"embedded": embedded, "neox": common.neox, "pythia-2.8b": lambda: common.random_model("pythia-2.8b")}


def end_at_random(model: PreTrainedModel) -> PreTrainedModel:
    """Gives the head a bias under which EOS has a chance of about END at every step."""
    old = model.get_output_embeddings()
    vocabulary, width = old.weight.shape
    head = nn.Linear(width, vocabulary, bias=True, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.weight[EOS_ID] = 0.0
        head.bias.zero_()
        ids = torch.randint(1, vocabulary, (4, 64)).to(model.device)
        hidden = model.base_model(ids).last_hidden_state
        head.bias[EOS_ID] = head(hidden)[..., 1:].logsumexp(dim=-1).mean() + math.log(END / (1 - END))
    model.set_output_embeddings(head)
    return model.eval()


def make_prompts(count: int, vocabulary: int, shortest: int = 70, longest: int = 110) -> list[list[int]]:
    """Random tokens, so many a prompt."""
    generator = random.Random(0)
    return [
        [generator.randrange(1, vocabulary) for _ in range(generator.randint(shortest, longest))] for _ in range(count)
    ]


def generate(model: PreTrainedModel, prompts: list[list[int]], at_once: int, end: int = EOS_ID) -> int:
    """transformers' generate, `at_once` prompts a call; returns the tokens sampled, EOS included."""
    tokens = 0
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        longest = max(map(len, part))
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in part])
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        output = model.generate(
            ids.to(model.device),
            attention_mask=real.to(model.device),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=SAMPLES,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
        )[:, longest:]
        ended = (output == end).long().cumsum(dim=1)
        tokens += int((ended == 0).sum()) + int(ended.any(dim=1).sum())
    return tokens


def asked(prompts: list[list[int]], end: int) -> dict[str, Any]:
    """What the engine here and vLLM are asked for, as `generate` is."""
    return {
        **{"n": SAMPLES, "temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS},
        **{"ends": [end], "seeds": list(range(len(prompts)))},
    }


@torch.no_grad()
def logp_difference(model: PreTrainedModel, prompts: list[list[int]], groups: list[list[Completion]]) -> float:
    """Largest difference between the returned log-probabilities and a full forward's."""
    largest = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group[:: max(1, SAMPLES // 32)]:
            full = completion_logprobs(model, [Row(prompt, (completion.token_ids,))]).tokens
            largest = max(largest, float((full.cpu() - torch.tensor(completion.logps)).abs().max()))
    return largest


def compare(
    name: str,
    theirs: PreTrainedModel,
    prompts: list[list[int]],
    end: int,
    per_call: list[int],
    rounds: int,
    server: Server | None = None,
) -> tuple[list[list[str]], dict[str, Any]]:
    """Table lines of one model, its ratio and difference; in each round all take their turn."""
    mine = use_engine(copy.deepcopy(theirs))
    groups: list[list[Completion]] = []

    def ours() -> int:
        groups[:] = sample(mine, prompts, **asked(prompts, end))
        return counted(groups)

    contestants: dict[str, Callable[[], int]] = {"ours": ours}
    for at_once in per_call:
        contestants[f"generate, {at_once} prompts a call"] = partial(generate, theirs, prompts, at_once, end)
    if server is not None:
        contestants["vLLM"] = lambda: counted(server.sample(prompts, **asked(prompts, end)))
        # Its first request takes what a graph or a kernel takes to be made.
        server.sample(prompts[:1], **asked(prompts[:1], end))
    sample(mine, prompts[:1], **asked(prompts[:1], end))
    generate(theirs, prompts[:1], 1, end)
    taken: dict[str, list[dict[str, float]]] = {who: [] for who in contestants}
    tokens = dict.fromkeys(taken, 0)
    for number in range(rounds):
        for who, turn in contestants.items():
            clock = common.Clock()
            tokens[who] = turn()
            taken[who].append(clock.read())
        print(f"  {name}: round {number + 1} of {rounds} done, load {common.load():.1f}", file=sys.stderr, flush=True)
    seconds = {who: [one["seconds"] for one in each] for who, each in taken.items()}
    ratios = {who: common.paired(seconds[who], seconds["ours"]) for who in contestants if who != "ours"}
    samples = SAMPLES * len(prompts)
    lines = []
    for who, each in taken.items():
        median, cpu = statistics.median(seconds[who]), statistics.median(one["cpu_seconds"] for one in each)
        # What a server takes of the processor is not this process's.
        words = [name, who, f"{samples / median:.1f}", f"{tokens[who] / samples:.1f}", f"{median:.1f}"]
        words.append("" if who == "vLLM" else f"{cpu:.1f}")
        lines.append([*words, common.told(ratios[who]) if who in ratios else ""])
    figures = {
        # Against the fastest of theirs.
        "ratio": min((ratios[who] for who in ratios if who != "vLLM"), key=lambda ratio: ratio["median"]),
        "share_of_bound": round(bound(mine, prompts, groups) / statistics.median(seconds["ours"]), 3),
        "difference": logp_difference(mine, prompts, groups),
    }
    return lines, {**figures, **({"vllm": ratios["vLLM"]} if server is not None else {})}


def counted(groups: list[list[Completion]]) -> int:
    """Tokens sampled, EOS included."""
    return sum(len(completion.token_ids) for group in groups for completion in group)


def bound(model: PreTrainedModel, prompts: list[list[int]], groups: list[list[Completion]]) -> float:
    """Seconds that reading the weights once a step, or else the operations, take at the measured rates."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    most = [max(len(completion.token_ids) for completion in group) for group in groups]
    flops = sum(
        sampling_flops(shape_of(model), len(prompt), [len(completion.token_ids) for completion in group])
        for prompt, group in zip(prompts, groups, strict=True)
    )
    rate = common.gigaflops(model.device.type, str(model.dtype).removeprefix("torch."))
    return max(max(most) * size / common.bandwidth(model.device.type), flops / rate) / 1e9


def load(name: str) -> PreTrainedModel:
    """One of `MODELS`, or a folder's, which ends where it does."""
    if name in MODELS:
        return end_at_random(MODELS[name]())
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=common.threads())
    parser.add_argument("--prompts", type=int, default=8, help="of the embedded policy")
    parser.add_argument("--other-prompts", type=int, default=4, help="of every other model")
    parser.add_argument("--prompt-tokens", nargs=2, type=int, default=[70, 110], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--per-call", nargs="+", type=int, default=[1, 2, 4], help="prompts that `generate` is given")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which all take their turn")
    parser.add_argument(
        "--models", nargs="+", default=["embedded", "neox"], help=f"of {', '.join(MODELS)}, and folders"
    )
    parser.add_argument("--vllm", help="vLLM's program, which samples from the folders too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines: list[list[str]] = []
    results: dict[str, Any] = {}
    for path in args.models:
        name = Path(path).name
        model = load(path).to(args.device, getattr(torch, args.dtype))
        count = args.prompts if name == "embedded" else args.other_prompts
        prompts = make_prompts(count, model.config.vocab_size, *args.prompt_tokens)
        with contextlib.ExitStack() as stack:
            server = None
            if args.vllm is not None and path not in MODELS:
                clock = common.Clock()
                server = stack.enter_context(served(Path(path), args))
                print(f"  {name}: vLLM came up in {clock.read()['seconds']:.0f} s", file=sys.stderr, flush=True)
            end = EOS_ID if path in MODELS else model.config.eos_token_id
            of_model, results[name] = compare(name, model, prompts, end, args.per_call, args.rounds, server)
        lines += of_model
    machine = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{SAMPLES} samples a prompt of {args.prompt_tokens[0]} to {args.prompt_tokens[1]} tokens, up to {MAX_NEW_TOKENS} new, "
        f"{args.dtype}, {machine}, load {common.load():.1f}; medians of {args.rounds} rounds"
    )
    header = ["model", "", "samples/s", "tokens a sample", "s", "CPU s", "ours is faster by [least, largest round]"]
    print(common.table(header, lines))
    ratios = {f"samples_per_second_ratio_{name}": result["ratio"] for name, result in results.items()}
    print(
        json.dumps(
            {
                "samples_per_second_ratio": min(ratio["median"] for ratio in ratios.values()),
                **ratios,
                **{f"vllm_ratio_{name}": result["vllm"] for name, result in results.items() if "vllm" in result},
                **{f"share_of_bound_{name}": result["share_of_bound"] for name, result in results.items()},
                "max_logp_difference": max(result["difference"] for result in results.values()),
            }
        )
    )


def served(folder: Path, args: argparse.Namespace) -> contextlib.AbstractContextManager[Server]:
    """vLLM with a folder's model, on as many threads as the others have."""
    dtype: Literal["float32", "bfloat16"] = args.dtype
    recipe = VLLMRecipe(program=args.vllm, gpus=int(args.device == "cuda"))
    return serving(folder, recipe, dtype, args.prompt_tokens[1] + MAX_NEW_TOKENS)


if __name__ == "__main__":
    main()
