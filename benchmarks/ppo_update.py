"""An update of PPO, rollouts and steps, against the last TRL that had one: seconds and memory. See README.md here."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import common
import torch
from best_of_n import EOS_ID, MAX_NEW_TOKENS, end_at_random, make_prompts
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.lm.verify import use_engine
from prefopt.training import ppo
from prefopt.training.optimization import build_optimizer

LEARNING_RATE, KL_COEF, CLIP, VALUE_COEF = 1e-6, 0.1, 0.2, 0.1
CONTENDERS = ("ours", "ours, four of each prompt", "trl")


def recipe(
    prompts: int,
    samples: int,
    new_tokens: int,
    *,
    epochs: int,
    minibatches: int,
    token_budget: int,
    dtype: Literal["float32", "bfloat16"],
) -> ppo.PPORecipe:
    """PPO's values for one update after another."""
    return ppo.PPORecipe(
        updates=1,
        prompts_per_update=prompts,
        samples_per_prompt=samples,
        epochs=epochs,
        minibatches=minibatches,
        temperature=1.0,
        max_new_tokens=new_tokens,
        kl_coef=KL_COEF,
        kl_target=None,
        kl_horizon=1e4,
        normalize_rewards=True,
        gamma=1.0,
        lam=0.95,
        clip=CLIP,
        value_clip=CLIP,
        value_coef=VALUE_COEF,
        true_reward=None,
        missing_eos_reward=None,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_steps=0,
        adam_eps=1e-5,
        max_grad_norm=1.0,
        validation_prompts=1,
        evaluate_every=1,
        checkpoint_every=1,
        keep="last",
        token_budget=token_budget,
        dtype=dtype,
        activation_checkpointing=False,
        seed=0,
    )


def scorer(shape: str) -> PreTrainedModel:
    """A scorer of one of the shapes with random weights, the same at every call."""
    torch.manual_seed(1)
    config = copy.deepcopy(common.SHAPES[shape])
    config.num_labels, config.pad_token_id = 1, EOS_ID
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def policy(shape: str) -> PreTrainedModel:
    """A policy whose completions end by chance, so that they have the lengths of `best_of_n`."""
    return end_at_random(common.random_model(shape)).eval()


def ours(args: argparse.Namespace, samples: int) -> list[dict[str, float]]:
    """Seconds of each update by this package, so many completions of each prompt."""
    reward, value = (use_engine(scorer(args.shape)) for _ in range(2))
    values = {"epochs": args.epochs, "minibatches": args.minibatches, "token_budget": args.token_budget}
    of_run = recipe(args.rollouts // samples, samples, MAX_NEW_TOKENS, **values, dtype="float32")
    trained, reference = (use_engine(policy(args.shape)) for _ in range(2))
    models = ppo.Models(trained, value, reference, ppo.learned_reward(reward, of_run))
    both = nn.ModuleList([trained, value])
    optimizer = build_optimizer(both, "adamw", LEARNING_RATE, adam_eps=of_run.adam_eps)
    generator = torch.Generator().manual_seed(0)
    prompts = make_prompts(of_run.prompts_per_update, common.VOCABULARY)
    turns = []
    for _ in range(args.updates + 1):
        clock = common.Clock()
        rollouts = ppo.roll_out(models, prompts, of_run, [EOS_ID], range(len(prompts)))
        ppo.update(models, optimizer, rollouts, of_run, KL_COEF, generator)
        turns.append(clock.read())
    return turns[1:]


def trl(args: argparse.Namespace) -> list[dict[str, float]]:
    """The same by TRL's PPOTrainer, which samples one completion of each prompt."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    turns: list[dict[str, float]] = []

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock = common.Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.append(self.clock.read())
            self.clock = common.Clock()

    _, tokenizer, _ = common.rows(1)
    tokenizer.padding_side = "left"
    prompts = Dataset.from_dict({"input_ids": make_prompts(args.rollouts, common.VOCABULARY)})
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            num_ppo_epochs=args.epochs,
            num_mini_batches=args.minibatches,
            per_device_train_batch_size=args.rollouts // args.minibatches,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=args.rollouts,
            total_episodes=args.rollouts * (args.updates + 1),
            response_length=MAX_NEW_TOKENS,
            stop_token="eos",
            temperature=1.0,
            kl_coef=KL_COEF,
            cliprange=CLIP,
            cliprange_value=CLIP,
            vf_coef=VALUE_COEF,
            num_sample_generations=0,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy(args.shape),
            ref_model=policy(args.shape),
            reward_model=scorer(args.shape),
            value_model=scorer(args.shape),
            train_dataset=prompts,
            eval_dataset=prompts,
            callbacks=[Timer()],
        )
        trainer.train()
    return turns[1:]


def contend(args: argparse.Namespace) -> None:
    """Prints one contender's figures as JSON."""
    torch.set_num_threads(args.threads)
    samples = 4 if args.contender == CONTENDERS[1] else 1
    turns = trl(args) if args.contender == "trl" else ours(args, samples)
    print(json.dumps({"turns": turns, "peak_mib": common.peak_mib()}))


def compare(args: argparse.Namespace) -> None:
    """All contenders in turn, in every round, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        for name in CONTENDERS:
            python = args.peer if name == "trl" else sys.executable
            runs[name].append(common.run_contender(__file__, "--contender", name, *sys.argv[1:], python=str(python)))
        print(f"  round {number + 1} of {args.rounds} done, load {common.load():.1f}", file=sys.stderr, flush=True)
    seconds = {
        name: [statistics.median(turn["seconds"] for turn in run["turns"]) for run in runs[name]] for name in runs
    }
    lines = []
    for name, made in runs.items():
        taken = statistics.median(seconds[name])
        cpu = statistics.median(turn["cpu_seconds"] for run in made for turn in run["turns"])
        peak = max(run["peak_mib"] for run in made)
        lines.append([name, f"{taken:.2f}", f"{cpu:.2f}", f"{args.rollouts / taken:.1f}", f"{peak:.0f}"])
    print(
        f"{args.rollouts} completions an update, of up to {MAX_NEW_TOKENS} tokens, {args.epochs} epochs of {args.minibatches} "
        f"minibatches, shape {args.shape}, float32, {args.threads} threads\n"
    )
    print(common.table(["", "update, s", "CPU s", "completions/s", "peak MiB"], lines))
    ratios = {name: common.paired(seconds["trl"], seconds[name]) for name in CONTENDERS[:2]}
    for name, ratio in ratios.items():
        print(
            f"\n{name}: {common.told(ratio)} times as fast as TRL's, over {args.rounds} rounds, load {common.load():.1f}"
        )
    print(json.dumps({"updates_per_second_ratio": ratios}))


def main() -> None:
    """Compares, or is one contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, help="Python of an environment with this package and trl==1.12.0")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=list(common.SHAPES), default="small", help="of the four models")
    parser.add_argument("--rollouts", type=int, default=32, help="completions of an update")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--updates", type=int, default=2, help="that are timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=common.threads())
    parser.add_argument("--token-budget", type=int, default=4096)
    args = parser.parse_args()
    if args.contender is not None:
        contend(args)
    elif args.peer is None:
        parser.error("--peer is needed: `python -m venv FOLDER && FOLDER/bin/pip install -e . trl==1.12.0`")
    else:
        compare(args)


if __name__ == "__main__":
    main()
