"""`python -m prefopt STAGE ...`: a stage a subcommand, in the order of the pipeline."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import sys
from contextlib import nullcontext

from prefopt.errors import UserError
from prefopt.experiment.methods import METHODS
from prefopt.runtime import devices, processes
from prefopt.runtime.interruption import RUN_AGAIN, Interrupted
from prefopt.runtime.launch import launch, nodes, over_nodes
from prefopt.store import provenance

STAGES = {
    "verify": (
        "prefopt.experiment.verify",
        "which results were made by other values, code or inputs than a config asks for",
    ),
    "config": ("prefopt.experiment.explained", "every value of a config, and where it comes from"),
    "plan": ("prefopt.planning.report", "what every stage of a config will take, before anything runs"),
    "preset": ("prefopt.planning.preset", "an overlay with what follows from the size of models and the machine"),
    "status": ("prefopt.runtime.status", "what every stage of a folder is doing or did"),
    "power": ("prefopt.analysis.power", "which difference of win rates so many prompts and seeds can show"),
    "records": ("prefopt.data.records", "raw records to raw tables"),
    "reviews": ("prefopt.data.reviews", "film reviews to raw tables"),
    "pretrain": ("prefopt.training.pretrain", "a tokenizer and a base model from scratch"),
    "model_card": ("prefopt.training.model_card", "what a pretrained base is and was made of"),
    "fetch": ("prefopt.lm.fetch", "a base model from a hub"),
    "prepare": ("prefopt.data.prepare", "raw tables to tokenized tables"),
    "summary": ("prefopt.data.summary", "what became of every record of a task"),
    "prefixes": ("prefopt.data.prefixes", "reviews to prompts of their first tokens"),
    "classifier": ("prefopt.training.classifier", "the true reward of real reviews"),
    "ngrams": ("prefopt.training.ngrams", "the true reward of real reviews by words and pairs of words"),
    "sft": ("prefopt.training.sft", "supervised fine-tuning; Preferred-FT"),
    "true_rewards": ("prefopt.rewards.stage", "the true reward of completions"),
    "sampled_pairs": ("prefopt.data.sampled_pairs", "preferences among a policy's own completions"),
    "pair_labels": ("prefopt.data.labels", "pairs among a policy's own completions to single labelled ones"),
    "round_prompts": ("prefopt.data.round_prompts", "the prompts of a round"),
    "reference": ("prefopt.training.reference", "reference log-probabilities of all pairs or labelled completions"),
    "preference": ("prefopt.training.preference", "DPO and other objectives on fixed pairs"),
    "kto": ("prefopt.training.kto", "KTO on single labelled completions"),
    "reward": ("prefopt.training.reward", "a reward model from pairs"),
    "ppo": ("prefopt.training.ppo", "PPO against the reward model, or the true reward"),
    "sample": ("prefopt.generation.sample", "completions of a policy"),
    "round_evaluations": (
        "prefopt.training.round_evaluations",
        "true reward and KL, or samples, of a run after each of its rounds",
    ),
    "evaluations": ("prefopt.generation.evaluations", "true reward and KL of what a run wrote while it trained"),
    "score": ("prefopt.generation.score", "rewards of completions"),
    "implicit_rewards": ("prefopt.generation.implicit_rewards", "a policy's own rewards of completions"),
    "best_of_n": ("prefopt.generation.best_of_n", "the best of n candidates"),
    "subsets": ("prefopt.generation.subsets", "the candidates that a paid judge sees"),
    "judge_accuracy": ("prefopt.judging.accuracy", "how often a reward model that judges agrees with people"),
    "judge": ("prefopt.judging.stage", "verdicts against the reference completions"),
    "judge_labels": (
        "prefopt.judging.labels",
        "rewards of a policy's completions, by a judge of every two of a prompt",
    ),
    "gather": ("prefopt.store.gather", "the shards of a table to the table"),
    "serve": ("prefopt.judging.serving", "a judge's model on this machine, for as long as a job asks it"),
    "store": ("prefopt.judging.stored", "verdicts of a chat judge to and from Parquet"),
    "win_rates": ("prefopt.analysis.win_rates", "win rates with intervals"),
    "human_study": ("prefopt.judging.human.study", "pages for blind comparison by people"),
    "simulated_votes": ("prefopt.judging.human.simulated", "votes of simulated raters"),
    "human_votes": ("prefopt.judging.human.votes", "votes of people, checked and unblinded"),
    "judge_items": ("prefopt.judging.items", "a judge's verdicts on what people compare"),
    "human_agreement": ("prefopt.analysis.human_agreement", "how far judges agree with people"),
    "judge_agreement": ("prefopt.analysis.judge_agreement", "how far judges agree"),
    "win_rate_by_step": ("prefopt.analysis.win_rate_by_step", "DPO's win rate over its training"),
    "win_rate_figure": ("prefopt.analysis.figures", "win rate against temperature"),
    "best_of_n_curve": ("prefopt.analysis.best_of_n_curve", "win rate, reward and cost of the best of N for every N"),
    "best_of_n_figure": ("prefopt.analysis.best_of_n_figure", "win rate against N and against cost"),
    "optimal_frontier": ("prefopt.analysis.optimal_frontier", "the reward that is possible at each KL"),
    "frontier": ("prefopt.analysis.frontier", "reward and KL of every checkpoint of the sweep"),
    "dominance": ("prefopt.analysis.dominance", "which method's frontier is above which"),
    "frontier_figure": ("prefopt.analysis.frontier_figure", "reward against KL"),
    "diagnosis": ("prefopt.analysis.diagnosis", "what became of every run's texts, and whether it collapsed"),
    "overoptimization": (
        "prefopt.analysis.overoptimization",
        "learned and true reward against the square root of KL, and where they part",
    ),
    "training_figure": ("prefopt.analysis.training_curves", "curves of every trainer"),
    "compute": ("prefopt.analysis.compute", "what each method cost, beside what it bought"),
    "compute_figure": ("prefopt.analysis.compute_figure", "win rate against cost"),
    "paper": ("prefopt.analysis.paper", "the paper's printed numbers and their counterparts"),
    "diff": ("prefopt.analysis.diff", "two result folders side by side"),
    "export": ("prefopt.analysis.export", "results in the forms of other tools"),
    "examples": ("prefopt.analysis.examples", "what the methods wrote, side by side"),
}

# Stages that several processes share, each with a device of its own.
_TRAINERS = {"pretrain", "classifier", "reference", "reward", *(method.trainer for method in METHODS.values())}
SHARED = tuple(stage for stage in STAGES if stage in _TRAINERS)


def build_parser(stage: str | None) -> argparse.ArgumentParser:
    """The parser; only the named stage's module is imported, since importing torch takes seconds."""
    parser = argparse.ArgumentParser(prog="prefopt", description=__doc__, allow_abbrev=False)
    parser.add_argument("--threads", type=int, help="CPU threads of the job's matrix products (default: torch's own)")
    parser.add_argument("--gpus", type=int, help="GPUs to lease; 0 is the CPU (default: all that are seen, unleased)")
    parser.add_argument("--no-lease", action="store_true", help="leave the GPUs to a server that the stage starts")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of this Slurm job that share the stage, and --gpus")
    parser.add_argument(
        "--processes", type=int, help=f"processes of {', '.join(SHARED)} (default: one for each GPU leased)"
    )
    subparsers = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, (module, summary) in STAGES.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name == stage:
            # Looking for garbage among thousands of modules finds none, and takes a fifth of their loading and more of pandas'.
            gc.disable()
            importlib.import_module(module).add_arguments(subparser)
            gc.enable()
            gc.freeze()
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one stage.

    Returns:
        0; 2 after printing one sentence where something can be put right by the user; 75 where a trainer was asked to
        stop, has saved, and goes on when it is run again.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    level = logging.INFO if processes.is_main() else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpx2", "openai", "matplotlib", "fontTools", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    stage = next((word for word in arguments if word in STAGES), None)
    args = build_parser(stage).parse_args(arguments)
    if getattr(args, "recipe", None) == "-":
        # A recipe that names more files than an argument can hold.
        args.recipe = sys.stdin.read()
    try:
        if processes.count() > 1 and args.stage not in SHARED:
            raise UserError(f"{processes.count()} processes are started, but one alone runs this stage: start one.")
        shares = processes.count() == 1 and args.stage in SHARED
        if shares and args.nodes > 1 and nodes() == 1:
            return over_nodes(arguments, args.nodes)
        # Before torch looks for devices. A process of several finds what was leased for all of them.
        lease = args.gpus is not None and processes.count() == 1 and not args.no_lease
        leased = devices.take(args.gpus // nodes()) if lease else []
        wanted = args.processes or max(1, len(leased))
        if shares and wanted * nodes() > 1:
            return launch(arguments, wanted, devices.held())
        if args.threads is not None:
            # Before torch makes its thread pools.
            threads = max(1, args.threads // processes.here())
            os.environ["OMP_NUM_THREADS"] = str(threads)
            importlib.import_module("torch").set_num_threads(threads)
        with (
            importlib.import_module("prefopt.runtime.collectives").joined() if processes.count() > 1 else nullcontext()
        ):
            module = STAGES[args.stage][0]
            provenance.begin(args.stage, module, args)
            importlib.import_module(module).run(args)
        if "PREFOPT_CODE" in os.environ:
            # A rule's job; `status` reads it.
            logging.getLogger(__name__).info("%s: done", args.stage)
    except UserError as error:
        print(f"prefopt {args.stage}: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        logging.getLogger(__name__).info("%s", stop)
        return RUN_AGAIN
    return 0
