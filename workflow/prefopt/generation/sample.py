"""Completions of one policy at every temperature, with their log-probability under policy and reference."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.generation import vllm
from prefopt.generation.prompting import cut_at_stop, with_shots
from prefopt.lm.batching import Row, micro_batches
from prefopt.lm.chat import answer_text, chat_of, end_tokens, finish_reason
from prefopt.lm.continuations import decode_continuation
from prefopt.lm.flops import sampling_flops
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import check_tokenizer, load_policy, max_positions, tokenizer_hash, weights_hash
from prefopt.lm.precision import DTYPES, autocast
from prefopt.lm.sampling import Completion, sample
from prefopt.lm.shape import shape_of
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.fingerprint import fingerprint
from prefopt.store.finite import require_finite
from prefopt.store.gather import BY_TEMPERATURE, total_usage
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import package_versions, read_table, write_table

logger = logging.getLogger(__name__)

# Completions of a block, between two progress lines.
_COMPLETIONS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """What is sampled: the first `train_prompts`, `validation_prompts` and `test_prompts` of the prompts table."""

    temperatures: tuple[float, ...]
    stop: tuple[str, ...]  # a completion ends before the first of these texts
    n: int  # completions a prompt; one at temperature 0, where all would be equal
    max_new_tokens: int
    train_prompts: int
    validation_prompts: int
    test_prompts: int
    token_budget: int
    dtype: Literal["float32", "bfloat16"]
    seed: int
    vllm: dict[str, Any] | None  # see `vllm.VLLMRecipe`; None: the engine here samples


@dataclasses.dataclass(frozen=True)
class Block:
    """Prompts that are sampled together, at one temperature; a shard of the work holds whole blocks."""

    temperature: float
    n: int  # completions a prompt
    start: int  # first prompt
    stop: int  # past the last prompt

    @property
    def samples(self) -> int:
        """How many completions are sampled."""
        return self.n * (self.stop - self.start)


def blocks_of(prompts: int, recipe: SampleRecipe) -> list[Block]:
    """The blocks of so many prompts, in the order of the samples table."""
    blocks = []
    for temperature in recipe.temperatures:
        n = 1 if temperature == 0 else recipe.n
        step = max(1, _COMPLETIONS_AT_ONCE // n)
        blocks += [Block(temperature, n, i, min(i + step, prompts)) for i in range(0, prompts, step)]
    return blocks


def prompt_seed(seed: int, prompt_id: str, temperature: float) -> int:
    """A seed of its own for each prompt and temperature, whatever else is sampled beside it."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{temperature!r}".encode()).digest()
    return int.from_bytes(digest[:7])


def chosen_prompts(prompts: pd.DataFrame, recipe: SampleRecipe) -> pd.DataFrame:
    """The first prompts of each split, as many as the recipe asks for."""
    limits = {"train": recipe.train_prompts, "validation": recipe.validation_prompts, "test": recipe.test_prompts}
    parts = [prompts[prompts["split"] == split].head(limit) for split, limit in limits.items()]
    return pd.concat(parts, ignore_index=True)


def sample_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: pd.DataFrame,
    run: str,
    recipe: SampleRecipe,
    usage: Usage,
    blocks: Sequence[Block] | None = None,
    style: str = "plain",
    sampler: Callable[..., list[list[Completion]]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the samples table, block by block; `reference_logp` is still NaN.

    Where a completion is cut at a stop string, its row says so, and holds the tokens before it.

    Args:
        model: the policy.
        tokenizer: the policy's own.
        prompts: rows of the prompts table.
        run: name of the policy in the table.
        recipe: how is sampled.
        usage: counts what is sampled.
        blocks: some of `blocks_of`; None: every prompt at every temperature.
        style: of the prompts; "chat" leaves out of a text what the chat template puts before an answer.
        sampler: samples as `lm.sampling.sample` does with the policy, which is taken where it is None.
    """
    sampler = functools.partial(sample, model) if sampler is None else sampler
    rows: list[dict[str, Any]] = []
    shape, ends = shape_of(model), end_tokens(tokenizer, model)
    chat = chat_of(tokenizer) if style == "chat" else None
    blocks = blocks_of(len(prompts), recipe) if blocks is None else blocks
    with Progress(f"sample {run}", sum(block.samples for block in blocks), "samples") as progress:
        for block in blocks:
            n, temperature = block.n, block.temperature
            part = prompts.iloc[block.start : block.stop]
            sampled = sampler(
                [ids.tolist() for ids in part["prompt_ids"]],
                n=n,
                temperature=temperature,
                max_new_tokens=recipe.max_new_tokens,
                ends=ends,
                seeds=[prompt_seed(recipe.seed, name, temperature) for name in part["prompt_id"]],
            )
            require_finite(
                [[sum(completion.logps) for completion in completions] for completions in sampled],
                *(part["prompt_id"], f"The log-probability of a completion of {run}"),
                f"look at these prompts and at the weights of the policy; the temperature is {temperature:g}",
            )
            for (_, prompt), completions in zip(part.iterrows(), sampled, strict=True):
                for index, completion in enumerate(completions):
                    ids, stopped = cut_at_stop(tokenizer, completion.token_ids, recipe.stop)
                    rows.append(
                        {
                            "prompt_id": prompt["prompt_id"],
                            "sample_index": index,
                            "run": run,
                            "temperature": temperature,
                            "split": prompt["split"],
                            "text": decode_continuation(tokenizer, prompt["prompt_ids"], ids)
                            if chat is None
                            else answer_text(chat, prompt["prompt_ids"], ids),
                            "tokens": len(ids),
                            "token_ids": ids,
                            "finish_reason": "stop"
                            if stopped
                            else finish_reason(tokenizer, ids, completion.finish_reason),
                            "logp": float(torch.as_tensor(completion.logps[: len(ids)]).sum()),
                            "reference_logp": float("nan"),
                        }
                    )
                lengths = [len(completion.token_ids) for completion in completions]
                usage.add(
                    *(n, len(prompt["prompt_ids"]) + sum(lengths)),
                    flops=sampling_flops(shape, len(prompt["prompt_ids"]), lengths),
                    generated=sum(lengths),
                )
            progress.update(block.samples)
    return rows


@torch.no_grad()
def reference_logps(
    model: nn.Module,
    prompts: pd.DataFrame,
    samples: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    token_budget: int,
    dtype: str,
    temperature: float = 1.0,
) -> list[float]:
    """Log-probability of each sample under the reference policy, or another one, in the samples' order.

    Args:
        model: the reference policy.
        prompts: rows of the prompts table.
        samples: rows of the samples table.
        sizes: of blocks of samples that follow each other; only those of one block come into one micro-batch.
        token_budget: tokens per micro-batch.
        dtype: of the forward pass.
        temperature: logits are divided by it, > 0.

    Raises:
        UserError: one is not finite: names the prompts.
    """
    prompt_ids = dict(zip(prompts["prompt_id"], prompts["prompt_ids"], strict=True))
    rows = [Row(tuple(prompt_ids[s["prompt_id"]].tolist()), (tuple(s["token_ids"]),)) for s in samples]
    logps = torch.empty(len(rows))
    device = next(model.parameters()).device
    with Progress("reference of samples", len(rows), "samples") as progress:
        for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            for places in micro_batches(rows[stop - size : stop], token_budget):
                batch = [stop - size + i for i in places]
                with autocast(dtype, device):
                    logps[batch] = (
                        completion_logprobs(model, [rows[i] for i in batch], temperature=temperature).sums.float().cpu()
                    )
                progress.update(len(batch))
    require_finite(
        *(logps, (s["prompt_id"] for s in samples), "A sample's log-probability under the reference policy"),
        "look at these prompts and at the weights of the reference policy",
    )
    result: list[float] = logps.tolist()
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `sample`."""
    parser.add_argument("--model", required=True, type=Path, help="the policy")
    parser.add_argument("--reference-model", type=Path, help="the reference policy; none: no reference_logp")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--run", required=True, help="name of the run in the samples table")
    parser.add_argument("--shots", type=int, default=0, help="examples before each prompt")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument(
        "--earlier", type=Path, help="samples table that differs in temperatures alone: rows of those it has are kept"
    )
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="samples table that is made")


def run(args: argparse.Namespace) -> None:
    """Samples completions of `--model` and writes the samples table, or a shard of it."""
    recipe, shard = from_json(SampleRecipe, args.recipe), parse_shard(args.shard)
    table = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    prompts = chosen_prompts(table, recipe)
    device = default_device()
    usage = Usage(f"sample {args.run}", device, recipe.dtype)
    # A GPU is vLLM's until it has sampled.
    place = torch.device("cpu") if recipe.vllm else device
    model, tokenizer = load_policy(args.model, device=place, dtype=DTYPES[recipe.dtype])
    positions = max_positions(args.model)
    room = sys.maxsize if positions is None else positions - recipe.max_new_tokens
    style = table.attrs["manifest"].get("style", "plain")
    if args.shots and style == "chat":
        raise UserError(
            f"{args.run} puts {args.shots} examples before each prompt, which is for plain prompts, but those of "
            f"{args.prompts} are turns of a chat: leave the run out, or set the task's prompt.style to 'plain'."
        )
    asked, shots_cut = with_shots(prompts, table, args.shots, tokenizer, room, recipe.seed)
    facts = {
        "prompts": table.attrs["manifest"]["content_hash"],
        "code": fingerprint(__name__),
        "shots_cut": shots_cut,
        "shape": dataclasses.asdict(shape_of(model)),
        "model_weights": weights_hash(args.model),
    }
    if args.reference_model is not None:
        check_tokenizer(args.reference_model, args.model)
        facts["reference_weights"] = weights_hash(args.reference_model)
    earlier = _earlier(args.earlier, args.run, to_dict(recipe), facts)
    every = blocks_of(len(prompts), recipe)
    first, end = shard.part(len(every))
    rows: list[dict[str, Any]] = []
    used: dict[str, dict[str, Any]] = {}
    fresh: dict[float, tuple[list[Block], list[dict[str, Any]]]] = {}
    longest = max(map(len, asked["prompt_ids"]), default=0) + recipe.max_new_tokens
    server: vllm.Server | None = None
    with contextlib.ExitStack() as stack:
        for temperature, group in itertools.groupby(every[first:end], key=lambda block: block.temperature):
            blocks = list(group)
            if temperature in earlier:
                kept, took = earlier[temperature]
                logger.info("temperature %g: %s has it", temperature, args.earlier)
                rows += _rows_of(kept, prompts, blocks)
                if blocks[0].start == 0:  # of all shards one accounts for it
                    used[str(temperature)] = took
                continue
            usage = Usage(f"sample {args.run}", device, recipe.dtype) if used else usage
            if recipe.vllm and server is None:
                server = stack.enter_context(_served(args.model, recipe, longest))
                facts["vllm"] = {"version": server.version}
            sampler = None if server is None else server.sample
            sampled = sample_rows(model, tokenizer, asked, args.run, recipe, usage, blocks, style, sampler)
            fresh[temperature] = blocks, sampled
            used[str(temperature)] = usage.report()
            rows += sampled
    # What vLLM gives stands only where the model is spread over several GPUs, so that the engine here cannot read it.
    again = recipe.vllm is not None and recipe.vllm["gpus"] <= 1
    with contextlib.ExitStack() as stack:
        read = _reader(args.reference_model, recipe, device, longest, stack) if fresh and args.reference_model else None
        for temperature, (blocks, sampled) in fresh.items() if again or read else ():
            usage, sizes = (
                Usage(f"sample {args.run}", device, recipe.dtype),
                [block.samples for block in blocks],
            )
            took = {}
            if again:
                took["vllm_difference"] = _read_again(model.to(device), asked, sampled, sizes, recipe, temperature)
            if read is not None:
                for row, logp in zip(sampled, read(prompts, sampled, sizes), strict=True):
                    row["reference_logp"] = logp
            used[str(temperature)] = {**total_usage([used[str(temperature)], usage.report()]), **took}
    stopped = sum(row["finish_reason"] == "stop" for row in rows)
    if recipe.stop:
        logger.info("%d of %d completions were cut at a stop string", stopped, len(rows))
    sizes = [block.samples for block in every]
    write_table(
        args.out,
        "samples",
        rows,
        recipe=to_dict(recipe),
        used=total_usage([{**each, BY_TEMPERATURE: {name: each}} for name, each in used.items()] or [usage.report()]),
        stopped=stopped,
        **facts,
        **shard.manifest(range(sum(sizes[:first]), sum(sizes[:end]))),
    )


def _served(folder: Path, recipe: SampleRecipe, longest: int) -> contextlib.AbstractContextManager[vllm.Server]:
    return vllm.serving(folder, from_dict(vllm.VLLMRecipe, recipe.vllm or {}), recipe.dtype, longest)


def _reader(
    folder: Path, recipe: SampleRecipe, device: torch.device, longest: int, stack: contextlib.ExitStack
) -> Callable[[pd.DataFrame, Sequence[dict[str, Any]], Sequence[int]], list[float]]:
    """What gives samples' log-probabilities under the reference policy: vLLM where it is spread over GPUs, else the engine.

    Its arguments are the first of `reference_logps` after the model.
    """
    if recipe.vllm is None or recipe.vllm["gpus"] <= 1:
        model, _ = load_policy(folder, device=device, dtype=DTYPES[recipe.dtype])
        return functools.partial(reference_logps, model, token_budget=recipe.token_budget, dtype=recipe.dtype)
    server = stack.enter_context(_served(folder, recipe, longest + 1))

    def read(prompts: pd.DataFrame, samples: Sequence[dict[str, Any]], _: Sequence[int]) -> list[float]:
        ids = dict(zip(prompts["prompt_id"], prompts["prompt_ids"], strict=True))
        return server.logps([ids[row["prompt_id"]].tolist() for row in samples], [row["token_ids"] for row in samples])

    return read


def _read_again(
    model: nn.Module,
    prompts: pd.DataFrame,
    samples: Sequence[dict[str, Any]],
    sizes: Sequence[int],
    recipe: SampleRecipe,
    temperature: float,
) -> float:
    """Puts the engine's log-probabilities in the place of vLLM's; returns how far these were off, in nats a token."""
    if temperature == 0:
        return 0.0  # where either gives 0
    logps = reference_logps(model, prompts, samples, sizes, recipe.token_budget, recipe.dtype, temperature)
    off = 0.0
    for row, logp in zip(samples, logps, strict=True):
        off += abs(row["logp"] - logp)
        row["logp"] = logp
    return off / max(1, sum(row["tokens"] for row in samples))


def _earlier(
    path: Path | None, run: str, recipe: dict[str, Any], facts: dict[str, Any]
) -> dict[float, tuple[pd.DataFrame, dict[str, Any]]]:
    """Rows, and what they took, of each temperature of an earlier table that differs in its temperatures alone.

    A table of the same temperatures is not taken: whoever runs the stage again wants it made again.
    """
    if path is None or not path.exists():
        return {}
    try:
        table = read_table(path, "samples", **facts, versions=package_versions())
    except UserError:
        return {}
    manifest = table.attrs["manifest"]
    same = {**manifest["recipe"], "temperatures": recipe["temperatures"]} == recipe
    if not same or manifest["recipe"] == recipe or set(table["run"]) != {run}:
        return {}
    used = manifest["used"][BY_TEMPERATURE]
    return {float(name): (table[table["temperature"] == float(name)], used[name]) for name in used}


def _rows_of(table: pd.DataFrame, prompts: pd.DataFrame, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The rows of some blocks at one temperature, in their order."""
    wanted = {name for block in blocks for name in prompts["prompt_id"].iloc[block.start : block.stop]}
    rows: list[dict[str, Any]] = [
        {str(key): value for key, value in row.items()}
        for row in table[table["prompt_id"].isin(wanted)].to_dict("records")
    ]
    if len(rows) != sum(block.samples for block in blocks):
        raise AssertionError(f"the earlier table has {len(rows)} rows at {blocks[0].temperature}")
    return rows
