"""DPO against TRL on one machine: pairs per second, peak memory, and losses step by step. See README.md here."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

import common
import pandas as pd
import torch

from prefopt.lm.sharding import recompute_activations
from prefopt.lm.verify import use_engine
from prefopt.runtime.usage import Usage
from prefopt.training.loop import accumulate_gradients, epoch_batches
from prefopt.training.optimization import build_optimizer
from prefopt.training.preference import PreferenceRecipe, preference_examples
from prefopt.training.reference import pair_logprobs, preference_rows

LEARNING_RATE, BETA, CLIP = 1e-6, 0.1, 10.0


def ours(args: argparse.Namespace, pairs: list[common.Pair], order: list[list[int]] | None) -> dict[str, Any]:
    """The project's reference pass and one epoch, over the given batches or its own."""
    model = use_engine(common.random_model(args.shape, args.device)).eval()
    common.warm_up(model, args.dtype)
    columns = {name: [torch.tensor(getattr(pair, name)).numpy() for pair in pairs] for name in _IDS}
    frame = pd.DataFrame({"pair_id": [str(i) for i in range(len(pairs))], **columns})
    usage = Usage("warm-up", model.device, args.dtype)
    pair_logprobs(model, preference_rows(frame[:8]), args.token_budget, usage, args.dtype)
    start = common.Clock()
    usage = Usage("reference", model.device, args.dtype)
    logps = pair_logprobs(model, preference_rows(frame), args.token_budget, usage, args.dtype)
    reference = start.read("reference_")
    recipe = PreferenceRecipe(
        objective="dpo",
        values={"loss": "sigmoid", "beta": BETA, "label_smoothing": 0.0},
        epochs=1,
        steps=None,
        batch_size=args.batch,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_steps=0,
        max_grad_norm=CLIP,
        optimizer="rmsprop",
        weight_decay=0.0,
        evaluate_every=1,
        checkpoint_every=1,
        keep="last",
        token_budget=args.token_budget,
        dtype=args.dtype,
        activation_checkpointing=args.activation_checkpointing,
        adapter=None,
        seed=0,
    )
    if args.activation_checkpointing:
        recompute_activations(model)
    examples = preference_examples(
        frame, pd.DataFrame({"chosen_logp": logps[:, 0], "rejected_logp": logps[:, 1]}), recipe
    )
    optimizer = build_optimizer(model, recipe.optimizer, recipe.learning_rate)
    losses, steps, batches = [], [], order or epoch_batches(len(pairs), args.batch, recipe.seed, 0)
    for batch in batches:
        start = common.Clock()
        losses.append(accumulate_gradients(model, examples, batch, recipe)["loss"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(start.read())
    # Forward and backward; operations of recomputed activations are not of use.
    used = {"step_flops": 3 * usage.flops}
    return {**reference, **_epoch(steps, [len(batch) for batch in batches], args), **used, "losses": losses}


def _epoch(steps: list[dict[str, float]], pairs: list[int], args: argparse.Namespace) -> dict[str, float]:
    """What an epoch takes by its steps, the first of them not counted."""
    share = sum(pairs) / sum(pairs[args.uncounted :])
    return {name: share * sum(step[name] for step in steps[args.uncounted :]) for name in steps[0]}


def trl(args: argparse.Namespace, pairs: list[common.Pair], tokenizer: Any, precompute: bool) -> dict[str, Any]:
    """TRL's epoch in its own batch order; `reference_seconds` is the time to precompute, 0 where it is live."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    row_of = {tuple(pair.prompt_ids + pair.chosen_ids): i for i, pair in enumerate(pairs)}
    result: dict[str, Any] = {"reference_seconds": 0.0, "reference_cpu_seconds": 0.0, "losses": [], "order": []}

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = common.Clock()
            table = super()._precompute_ref_logps(*args, **kwargs)
            result.update(start.read("reference_"))
            return table

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            chosen = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
            rows = [row_of[tuple(ids[mask].tolist())] for ids, mask in list(chosen)[: len(inputs["input_ids"]) // 2]]
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            result["order"].append(rows)
            result["losses"].append(float(loss.detach()))
            return loss

    steps: list[dict[str, float]] = []

    class Timer(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = common.Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(self.start.read())
            self.start = common.Clock()

    model = common.random_model(args.shape, args.device)
    common.warm_up(model, args.dtype)
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("prompt", "chosen", "rejected")}
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.batch // args.micro_batch,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="rmsprop",
            max_grad_norm=CLIP,
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=args.activation_checkpointing,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            bf16=args.dtype == "bfloat16",
            seed=0,
        )
        trainer = Timed(
            model=model,
            ref_model=None if precompute else common.random_model(args.shape, args.device),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=tokenizer,
            callbacks=[Timer()],
        )
        ids = [{name: list(row[name]) for name in _IDS} for row in trainer.train_dataset]
        if ids != [{name: getattr(pair, name) for name in _IDS} for pair in pairs]:
            raise SystemExit("TRL's tokens are not ours: the comparison would not be of the same work")
        trainer.train()
    # A step of theirs is some micro-batches.
    each = args.batch // args.micro_batch
    starts = range(0, len(result["losses"]), each)
    result["losses"] = [sum(result["losses"][i : i + each]) / len(result["losses"][i : i + each]) for i in starts]
    result["order"] = [[row for rows in result["order"][i : i + each] for row in rows] for i in starts]
    return {**result, **_epoch(steps, [len(rows) for rows in result["order"]], args)}


_MEASURED = ("seconds", "reference_seconds", "cpu_seconds", "reference_cpu_seconds", "gflops")
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def contend(args: argparse.Namespace) -> None:
    """Runs one contender and prints its figures as a JSON line."""
    torch.set_num_threads(args.threads)
    pairs, tokenizer, _ = common.rows(args.pairs)
    order = json.loads(args.order) if args.order else None
    if args.contender == "ours":
        figures = ours(args, pairs, order)
    else:
        figures = trl(args, pairs, tokenizer, precompute=args.contender == "trl_precomputed")
    peak = common.peak_mib()
    print(json.dumps({**figures, "peak_mib": peak, "gflops": common.gigaflops(args.device, args.dtype)}))


def compare(args: argparse.Namespace) -> None:
    """Runs the contenders in turn, round by round, and prints table and ratios."""
    pairs, _, source = common.rows(args.pairs)
    tokens = [len(getattr(pair, name)) for name in _IDS for pair in pairs]
    machine = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(
        f"{args.shape}, {len(pairs)} pairs ({source}), {sum(tokens)} tokens, batch {args.batch}, {args.dtype}, {machine}"
        + (f", the first {args.uncounted} steps not counted" if args.uncounted else "")
    )

    def contender(name: str, *extra: str) -> dict[str, Any]:
        return common.run_contender(__file__, "--contender", name, *sys.argv[1:], *extra)

    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ("ours", *args.rivals)}
    for number in range(args.rounds):
        # Before theirs and after theirs in turn, so that a drift of the machine's speed cancels.
        for name in list(rounds)[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(contender(name))
        print(f"  round {number + 1} of {args.rounds} done, load {common.load():.1f}", file=sys.stderr, flush=True)
    wholes = {name: [run["seconds"] + run["reference_seconds"] for run in each] for name, each in rounds.items()}
    alone = {name: [run["seconds"] for run in each] for name, each in rounds.items()}
    middle = {name: _medians(each) for name, each in rounds.items()}
    fastest = min(args.rivals, key=lambda name: middle[name]["seconds"])
    with_reference = min(args.rivals, key=lambda name: statistics.median(wholes[name]))
    # Losses step by step, on their batches in their order.
    theirs = rounds[fastest][0]
    on_theirs = contender("ours", "--order", json.dumps(theirs["order"]))["losses"]
    header = [
        "",
        "pairs/s",
        "pairs/s with reference",
        "reference pass, s",
        "CPU s in all",
        "peak MiB",
        "matmul GFLOP/s",
    ]
    lines = []
    for name, run in middle.items():
        # A live reference is part of every step.
        epoch = "-" if name == "trl_live" else f"{len(pairs) / run['seconds']:.2f}"
        lines.append(
            [
                *(name.replace("_", ", "), epoch, f"{len(pairs) / statistics.median(wholes[name]):.2f}"),
                f"{run['reference_seconds']:.1f}",
                f"{run['cpu_seconds'] + run['reference_cpu_seconds']:.0f}",
                *(f"{run['peak_mib']:.0f}", f"{run['gflops']:.0f}"),
            ]
        )
    print(common.table(header, lines))
    own = middle["ours"]
    of_epoch, of_whole = (
        common.paired(seconds[rival], seconds["ours"])
        for seconds, rival in ((alone, fastest), (wholes, with_reference))
    )
    print(
        f"\nOurs is faster by {common.told(of_epoch)} for the epoch, by {common.told(of_whole)} with the reference; medians of"
    )
    print(f"{args.rounds} rounds with the least and the largest, load {common.load():.1f}.")
    ratios = {
        "pairs_per_second_ratio": of_epoch,
        "pairs_per_second_ratio_with_reference": of_whole,
        "peak_memory_ratio": round(own["peak_mib"] / middle[fastest]["peak_mib"], 3),
        # Of the matrix products' speed that was measured beside it.
        "model_flops_utilisation": round(own["step_flops"] / own["seconds"] / own["gflops"] / 1e9, 3),
        "max_loss_difference": max(abs(a - b) for a, b in zip(on_theirs, theirs["losses"], strict=True)),
    }
    print(json.dumps(ratios))


def _medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    names = (*_MEASURED, *(["step_flops"] if "step_flops" in runs[0] else []))
    medians = {name: statistics.median(run[name] for run in runs) for name in names}
    return {**medians, "peak_mib": max(run["peak_mib"] for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=common.threads())
    parser.add_argument("--shape", choices=list(common.SHAPES), default="small", help="of the model, random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the passes")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="pairs that TRL reads at once")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens that we read at once")
    parser.add_argument("--activation-checkpointing", action="store_true", help="of both")
    parser.add_argument("--contender", choices=["ours", "trl_live", "trl_precomputed"], help="run this one only")
    parser.add_argument("--rivals", nargs="+", default=["trl_precomputed", "trl_live"], help="those of TRL's to run")
    parser.add_argument("--rounds", type=int, default=3, help="in each of which all take their turn")
    parser.add_argument("--uncounted", type=int, default=0, help="steps at the beginning, in which a GPU loads kernels")
    parser.add_argument("--order", help="batches of row numbers (JSON), for the contender ours")
    args = parser.parse_args()
    (contend if args.contender else compare)(args)


if __name__ == "__main__":
    main()
