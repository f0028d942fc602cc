"""Best-of-N sampling against transformers' `generate`: samples per second. See README.md here."""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import sys
from typing import Any

import common
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, 70 to 110 a prompt."""
    generator = random.Random(0)
    return [[generator.randrange(1, vocabulary) for _ in range(generator.randint(70, 110))] for _ in range(count)]


def generate(model: PreTrainedModel, prompts: list[list[int]], at_once: int) -> int:
    """transformers' generate, `at_once` prompts a call; returns the tokens sampled, EOS included."""
    tokens = 0
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        longest = max(map(len, part))
        ids = torch.tensor([[EOS_ID] * (longest - len(prompt)) + prompt for prompt in part])
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
            eos_token_id=EOS_ID,
            pad_token_id=EOS_ID,
        )[:, longest:]
        ended = (output == EOS_ID).long().cumsum(dim=1)
        tokens += int((ended == 0).sum()) + int(ended.any(dim=1).sum())
    return tokens


def ours(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[Completion]]:
    """The project's sampling with its default row budget."""
    return sample(
        model,
        prompts,
        n=SAMPLES,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        ends=[EOS_ID],
        seeds=range(len(prompts)),
    )


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
    name: str, model: PreTrainedModel, prompts: list[list[int]], per_call: list[int], rounds: int
) -> tuple[list[list[str]], dict[str, Any]]:
    """Table lines of one model, its ratio and difference; in each round all take their turn."""
    theirs = end_at_random(model)
    mine = use_engine(copy.deepcopy(theirs))
    ours(mine, prompts[:1])
    generate(theirs, prompts[:1], 1)
    groups: list[list[Completion]] = []
    taken: dict[int, list[dict[str, float]]] = {at_once: [] for at_once in (0, *per_call)}  # 0: ours
    tokens = dict.fromkeys(taken, 0)
    for number in range(rounds):
        clock = common.Clock()
        groups = ours(mine, prompts)
        taken[0].append(clock.read())
        tokens[0] = sum(len(completion.token_ids) for group in groups for completion in group)
        for at_once in per_call:
            clock = common.Clock()
            tokens[at_once] = generate(theirs, prompts, at_once)
            taken[at_once].append(clock.read())
        print(f"  {name}: round {number + 1} of {rounds} done, load {common.load():.1f}", file=sys.stderr, flush=True)
    seconds = {who: [one["seconds"] for one in each] for who, each in taken.items()}
    ratios = {at_once: common.paired(seconds[at_once], seconds[0]) for at_once in per_call}
    samples = SAMPLES * len(prompts)
    lines = []
    for who, each in taken.items():
        median, cpu = statistics.median(seconds[who]), statistics.median(one["cpu_seconds"] for one in each)
        words = [name, f"generate, {who} prompts a call" if who else "ours", f"{samples / median:.1f}"]
        words += [f"{tokens[who] / samples:.1f}", f"{median:.1f}", f"{cpu:.1f}"]
        lines.append([*words, common.told(ratios[who]) if who else ""])
    return lines, {
        "ratio": min(ratios.values(), key=lambda ratio: ratio["median"]),  # against the fastest of theirs
        "share_of_bound": round(bound(mine, prompts, groups) / statistics.median(seconds[0]), 3),
        "difference": logp_difference(mine, prompts, groups),
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=common.threads())
    parser.add_argument("--prompts", type=int, default=8, help="of the embedded policy")
    parser.add_argument("--neox-prompts", type=int, default=4)
    parser.add_argument("--per-call", nargs="+", type=int, default=[1, 2, 4], help="prompts that `generate` is given")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which all take their turn")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["embedded", "neox"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines: list[list[str]] = []
    results: dict[str, Any] = {}
    for name in args.models:
        model = MODELS[name]().to(args.device, getattr(torch, args.dtype))
        count = args.prompts if name == "embedded" else args.neox_prompts
        prompts = make_prompts(count, model.config.vocab_size)
        of_model, results[name] = compare(name, model, prompts, args.per_call, args.rounds)
        lines += of_model
    machine = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{SAMPLES} samples a prompt, up to {MAX_NEW_TOKENS} tokens, {args.dtype}, {machine}, load {common.load():.1f}; "
        f"medians of {args.rounds} rounds"
    )
    header = ["model", "", "samples/s", "tokens a sample", "s", "CPU s", "ours is faster by [least, largest round]"]
    print(common.table(header, lines))
    ratios = {f"samples_per_second_ratio_{name}": result["ratio"] for name, result in results.items()}
    print(
        json.dumps(
            {
                "samples_per_second_ratio": min(ratio["median"] for ratio in ratios.values()),
                **ratios,
                **{f"share_of_bound_{name}": result["share_of_bound"] for name, result in results.items()},
                "max_logp_difference": max(result["difference"] for result in results.values()),
            }
        )
    )


if __name__ == "__main__":
    main()
