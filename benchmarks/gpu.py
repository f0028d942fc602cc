"""What a GPU does with this project, in order of worth, within some minutes. See README.md here."""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import transformers
from ppo_update import recipe as ppo_recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt.lm import attention
from prefopt.lm.attention import flash_can
from prefopt.lm.batching import Row
from prefopt.lm.flops import reading_flops
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.precision import autocast
from prefopt.lm.shape import shape_of
from prefopt.lm.verify import use_engine
from prefopt.training import ppo
from prefopt.training.optimization import build_optimizer

HERE = Path(__file__).resolve().parent
TINY = {"pythia-2.8b": "small", "gpt-j-6b": "small", "pythia-1b": "small"}


def tests(args: argparse.Namespace) -> None:
    """What is computed on a GPU equals what is computed on a CPU, and takes the memory that `plan` says."""
    options = ["-q", "-n0", "-rfEsP", "-pno:cacheprovider", "-k", "cuda or gpu"]
    files = ["tests/gpu", "tests/unit/planning/test_measured_memory.py"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    found = [
        line
        for line in done.stdout.splitlines()
        if re.match(r"(measured|FAILED|ERROR|SKIPPED|E  )|\d+ (passed|failed|skip)|=.*=", line)
    ]
    print("```\n" + "\n".join(found[-30:]) + "\n```")


def card(args: argparse.Namespace) -> None:
    """Rates of the card, and the attention that is used."""
    print(f"- products: {common.gigaflops(args.device, 'bfloat16') / 1e3:.1f} TFLOP/s in bfloat16, ", end="")
    print(f"{common.gigaflops(args.device, 'float32') / 1e3:.1f} in float32")
    print(f"- memory: {common.bandwidth(args.device):.0f} GB/s, read and written, of a copy")
    device = torch.device(args.device)
    rows = [
        Row(range(2, 2 + prompt), (range(50, 50 + own), range(60, 60 + own))) for prompt, own in ((300, 90), (40, 7))
    ]
    for width in (64, 80, 128, 256):
        used = device.type == "cuda" and flash_can(device, torch.bfloat16, width)
        print(f"- heads of {width}: {'flash attention, equal to the masks' if used else 'masked products'}")
    torch.manual_seed(0)
    model = use_engine(AutoModelForCausalLM.from_config(copy.deepcopy(common.SHAPES["small"]))).to(device).eval()
    sums = []
    for usable in (flash_can, lambda *_: False):
        attention.flash_can = usable  # type: ignore[assignment]
        with torch.no_grad(), autocast("bfloat16", device):
            sums.append(completion_logprobs(model, rows).sums.cpu())
    with torch.no_grad():
        exact = completion_logprobs(model, rows).sums.cpu()
    off, plain = (float((one - other).abs().max()) for one, other in ((sums[0], sums[1]), (sums[0], exact)))
    print(
        f"- a GPT-NeoX in bfloat16: log-probabilities of completions of up to 90 tokens {off:.4f} nats from those by masks, "
        f"{plain:.3f} from float32"
    )


def dpo(shape: str, *options: str) -> Callable[[argparse.Namespace], None]:
    """A section: DPO steps of a shape against TRL."""

    def section(args: argparse.Namespace) -> None:
        sizes = ["--pairs", "8", "--batch", "4", "--micro-batch", "2"] if args.tiny else list(options)
        script = [str(HERE / "dpo_step.py"), "--device", args.device, "--dtype", "bfloat16", "--uncounted", "1"]
        run(*script, "--shape", TINY[shape] if args.tiny else shape, *sizes)

    section.__doc__ = f"DPO at the shape of {shape}: {' '.join(options)}"
    return section


def best_of_n(args: argparse.Namespace) -> None:
    """Best-of-128 at the shape of Pythia-2.8B against `generate`."""
    tiny, whole = ["embedded", "--prompts=1"], ["pythia-2.8b", "--other-prompts=16", "--per-call", "4", "16"]
    script = [str(HERE / "best_of_n.py"), "--device", args.device, "--dtype", "bfloat16", "--models"]
    run(*script, *(tiny if args.tiny else whole))


def ppo_update(args: argparse.Namespace) -> None:
    """PPO at the shape of Pythia-1B: the rollouts and the steps of one update."""
    config = copy.deepcopy(common.SHAPES[TINY["pythia-1b"] if args.tiny else "pythia-1b"])
    config.pad_token_id, config.num_labels = 0, 1
    prompts, n, new, length = (4, 2, 8, 16) if args.tiny else (128, 4, 64, 128)
    values = {"epochs": 1, "minibatches": 4, "token_budget": 16384}
    recipe = ppo_recipe(prompts, n, new, **values, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device(args.device):
        policy, reference = (use_engine(AutoModelForCausalLM.from_config(config)).eval() for _ in range(2))
        value, reward = (use_engine(AutoModelForSequenceClassification.from_config(config)).eval() for _ in range(2))
    models = ppo.Models(policy, value, reference, ppo.learned_reward(reward, recipe))
    both = torch.nn.ModuleList([policy, value])
    optimizer = build_optimizer(both, "adamw", recipe.learning_rate, adam_eps=recipe.adam_eps)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (prompts, length), generator=generator).tolist()
    rate = 1e9 * common.gigaflops(args.device, "bfloat16")
    print("| | rollouts, s | update, s | tokens | update, share of the product rate | first ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in ("first", "second"):  # a GPU loads its kernels in the first
        clock = common.Clock()
        rollouts = ppo.roll_out(models, ids, recipe, [0], range(prompts))
        sampled = clock.read()["seconds"]
        clock = common.Clock()
        figures = ppo.update(models, optimizer, rollouts, recipe, 0.1, generator)
        seconds = clock.read()["seconds"]
        lengths = [(len(row.prompt), [len(own) for own in row.completions]) for row in rollouts.rows]
        # Forward and backward.
        flops = 3 * sum(reading_flops(shape_of(model), *one) for model in (policy, value) for one in lengths)
        share = flops / seconds / rate
        tokens = sum(row.tokens for row in rollouts.rows)
        print(f"| {name} | {sampled:.2f} | {seconds:.2f} | {tokens} | {share:.2f} | {figures['first_ratio']:.4f} |")
    print(f"\nPeak memory {common.peak_mib():.0f} MiB.")


_PRECOMPUTED = ("--rivals", "trl_precomputed")

SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "tests": tests,
    "card": card,
    "dpo": dpo("pythia-2.8b", "--pairs=320", "--batch=64", "--micro-batch=8", "--token-budget=6144", *_PRECOMPUTED),
    "best_of_n": best_of_n,
    "ppo": ppo_update,
    "dpo_6b": dpo(
        *("gpt-j-6b", "--pairs=128", "--batch=32", "--micro-batch=4", "--token-budget=8192"),
        *("--activation-checkpointing", *_PRECOMPUTED),
    ),
}


def run(*command: str) -> None:
    """Runs a benchmark; its output is this section's."""
    subprocess.run([sys.executable, *command], check=True)


def report(args: argparse.Namespace) -> Path:
    """Runs every section that time is left for in a process of its own, and writes what each printed."""
    ends = time.monotonic() + 60 * args.minutes
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=common.ROOT, capture_output=True, text=True, check=False
    )
    commit_name = args.commit or commit.stdout.strip() or "unknown"
    today = datetime.date.today().isoformat()
    out = Path(args.out) / f"{today}-{re.sub('[^A-Za-z0-9]+', '-', name).strip('-')}-{commit_name}.md"
    lines = [
        f"# {name}, {today}, commit {commit_name}\n",
        f"`bash benchmarks/gpu.sh {args.minutes:g}`; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {common.threads()} cores.\n",
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        left = ends - time.monotonic()
        lines.append(f"## {(SECTIONS[section].__doc__ or section).strip()}\n")
        own = [sys.executable, __file__, "--section", section, "--device", args.device]
        own += ["--tiny"] if args.tiny else []
        start = time.monotonic()
        try:
            done = subprocess.run(own, capture_output=True, text=True, timeout=max(1.0, left), check=False)
            lines.append(done.stdout.strip())
            if done.returncode:
                lines.append("\nFailed: `" + (done.stderr.strip().splitlines() or ["without a word"])[-1][:300] + "`")
                print(done.stderr[-3000:], file=sys.stderr)
        except subprocess.TimeoutExpired as cut:
            lines += [(cut.stdout or b"").decode().strip(), f"\nCut off: {left:.0f} s were left for it."]
            print((cut.stderr or b"").decode()[-1500:], file=sys.stderr)
        lines.append(f"\n({time.monotonic() - start:.0f} s)\n")
        print(f"{section}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        out.write_text("\n".join(lines), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few rows, to try the script itself")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument("--commit", help="for the file's name, where there is no git")
    parser.add_argument("--section", choices=list(SECTIONS), help="run this one here")
    args = parser.parse_args()
    if args.section:
        os.environ.setdefault("PYTHONUNBUFFERED", "1")
        SECTIONS[args.section](args)
    else:
        print(report(args).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
