"""The stage `judge`: samples against their prompts' reference texts, or against a run's completions."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

import pandas as pd

from prefopt.analysis.verdicts import read_verdicts, select_temperatures
from prefopt.data.synthetic.hidden import well_formed
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.judging.judge import PROMPTS_AT_ONCE, Judge, OrderRule, Pair, judge_pairs
from prefopt.judging.judges import JudgeRecipe, add_judge_arguments, build_judge
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import SCHEMAS, read_table, write_table

_KEPT = ["prompt_id", "run", "temperature", "sample_index", "split", "tokens"]  # of a sample's columns

logger = logging.getLogger(__name__)


def judge_samples(
    judge: Judge,
    samples: pd.DataFrame,
    prompts: pd.DataFrame,
    reference_tokens: dict[str, int],
    rule: OrderRule,
    seed: int,
) -> pd.DataFrame:
    """Judges each sample against the reference text of its prompt.

    Args:
        judge: who judges.
        samples: rows of a samples table.
        prompts: rows of the prompts table, each sample's prompt among them.
        reference_tokens: tokens of each prompt's reference, EOS included, counted as `samples.tokens` is.
        rule: whether a pair is shown in one random order, or in both.
        seed: of the random order.

    Returns:
        Rows of a verdicts table, in the order of `samples`: one a sample, or two that follow each other.

    Raises:
        UserError: a sample's prompt is unknown, lies in another split, or its reference was never tokenized.
    """
    by_id = {prompt["prompt_id"]: prompt for prompt in prompts.to_dict("records")}
    pairs: list[Pair] = []
    for sample in samples[[*_KEPT, "text"]].to_dict("records"):
        prompt_id, text = sample["prompt_id"], sample["text"]
        prompt = by_id.get(prompt_id)
        if prompt is None or prompt["split"] != sample["split"]:
            found = "is not among the prompts" if prompt is None else f"is of split {prompt['split']!r} there"
            raise UserError(
                f"The sample's prompt {prompt_id!r} (split {sample['split']!r}) {found}: the samples were made "
                f"from other prompts, run the stage `sample` again."
            )
        if not prompt["reference"] and prompt_id not in reference_tokens:
            raise UserError(
                f"The prompt {prompt_id!r} has no response to compare with, as it came alone: give it one among the "
                f"records, or name a run that completions are held against, evaluation.against."
            )
        if prompt_id not in reference_tokens:
            raise UserError(
                f"The demonstrations lack prompt {prompt_id!r}, so that its reference has no length: run the "
                f"stage `prepare` again."
            )
        row = {
            **{str(name): value for name, value in sample.items() if name != "text"},
            "reference_tokens": reference_tokens[prompt_id],
            "well_formed": well_formed(prompt["facts"], text),
        }
        key = (prompt_id, sample["run"], sample["temperature"], sample["sample_index"])
        pairs.append(Pair(row, key, prompt["prompt"], prompt["facts"], text, prompt["reference"]))
    # Named, since a shard may be without a row.
    return pd.DataFrame(judge_pairs(judge, pairs, rule, seed), columns=SCHEMAS["verdicts"].names)


def held_against(
    prompts: pd.DataFrame, opponent: pd.DataFrame, temperature: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The prompts with a run's completions in the place of their reference texts, and the tokens of each.

    Args:
        prompts: rows of the prompts table.
        opponent: rows of the run's samples table.
        temperature: of the completions, the first of each prompt.

    Raises:
        UserError: the run was not sampled at this temperature.
    """
    chosen = opponent[(opponent["temperature"] == temperature) & (opponent["sample_index"] == 0)]
    if chosen.empty:
        raise UserError(
            f"--against holds no completion at temperature {temperature:g}: take one of those at which the run was sampled."
        )
    texts = dict(zip(chosen["prompt_id"], chosen["text"].str.strip(), strict=True))
    sampled = prompts[prompts["prompt_id"].isin(texts)]
    lengths = dict(zip(chosen["prompt_id"], chosen["tokens"].astype(int), strict=True))
    return sampled.assign(reference=sampled["prompt_id"].map(texts)), lengths


def selected_samples(samples: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """A run's samples on test prompts at the temperature that another judge's settled verdicts select for it."""
    temperatures = samples["run"].map(select_temperatures(verdicts))
    return samples[(samples["temperature"] == temperatures) & (samples["split"] == "test")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `judge`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table of one run")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table, with the references")
    parser.add_argument("--demonstrations", required=True, type=Path, help="demonstrations table")
    parser.add_argument(
        "--selected-by",
        type=Path,
        help="verdicts of the task's own judge: only the temperature that they select is judged, on test prompts",
    )
    parser.add_argument("--against", type=Path, help="samples of a run, which take the place of the references")
    parser.add_argument("--against-temperature", type=float, help="the temperature of these")
    add_judge_arguments(parser)
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="verdicts table that is made")


def run(args: argparse.Namespace) -> None:
    """Judges all samples of a run and writes the verdicts, or a shard of them."""
    recipe, shard = from_json(JudgeRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts")
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    demonstrations = read_table(args.demonstrations, "demonstrations")
    lengths = dict(zip(demonstrations["prompt_id"], demonstrations["response_ids"].map(len), strict=True))
    judged = samples if args.selected_by is None else selected_samples(samples, read_verdicts(args.selected_by))
    if recipe.kind == "human":
        judged = judged[judged["split"] == "test"]  # what people are shown
    # All samples of a prompt are in one shard, so that a text that a policy writes twice is read and paid once.
    places = shard.rows(judged["prompt_id"].tolist(), PROMPTS_AT_ONCE)
    judged = judged.iloc[places]
    judge = build_judge(args, recipe, prompts)
    shown = prompts
    if args.against is not None:
        opponent = read_table(args.against, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
        shown, lengths = held_against(prompts, opponent, args.against_temperature)
    verdicts = judge_samples(judge, judged, shown, lengths, recipe.order, recipe.seed)
    orders = 2 if recipe.order == "both" else 1
    verdict_rows = [place * orders + order for place in places for order in range(orders)]
    outcomes = Counter(verdicts["outcome"])
    logger.info("%s judged %d samples: %s", judge.name, len(judged), dict(sorted(outcomes.items())))
    write_table(
        args.out,
        "verdicts",
        verdicts,
        judge=judge.name,
        recipe=to_dict(recipe),
        inputs={
            name: table.attrs["manifest"]["content_hash"]
            for name, table in (
                ("samples", samples),
                ("prompts", prompts),
                ("demonstrations", demonstrations),
                *([] if args.against is None else [("against", opponent)]),
            )
        },
        **judge.report(),
        **shard.manifest(verdict_rows),
    )
