"""What the benchmarks share: the model, its rows, a plain matrix product, and runs in processes of their own."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoXConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt.lm.precision import autocast

ROOT = Path(__file__).resolve().parent.parent
HH = ROOT.parent / "shared/data/hh_helpful_base.jsonl.gz"
TOKENIZER = ROOT.parent / "shared/tokenizers/gpt-neox-20b/tokenizer.json"
EOS = "<|endoftext|>"
VOCABULARY = 50_304
MAX_TOKENS = 500
WIDE = 1.5  # between the least and the largest ratio of the rounds, beyond which nothing can be told


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair as text and as tokens; completions end with EOS."""

    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class Clock:
    """Wall and CPU time from its creation on; CPU time says how far other processes disturbed the wall time."""

    def __init__(self) -> None:
        _finish_kernels()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self, prefix: str = "") -> dict[str, float]:
        """`seconds` and `cpu_seconds`, the names prefixed."""
        _finish_kernels()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {f"{prefix}seconds": wall, f"{prefix}cpu_seconds": cpu}


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _finish_kernels() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gpt_neox(width: int, layers: int, heads: int, **others: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        **others,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "small": gpt_neox(512, 6, 8),
    "pythia-1b": gpt_neox(2048, 16, 8),
    "pythia-2.8b": gpt_neox(2560, 32, 32),
    "gpt-j-6b": GPTJConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0),
}


def random_model(shape: str, device: str = "cpu") -> PreTrainedModel:
    """A model of one of `SHAPES` with random float32 weights, the same at every call."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(SHAPES[shape])
    return model


def neox() -> PreTrainedModel:
    """GPT-NeoX 512 x 6 with random weights, the same at every call."""
    return random_model("small")


def warm_up(model: PreTrainedModel, dtype: str) -> None:
    """One small pass forward and backward, in which a GPU's kernels are loaded."""
    ids = torch.randint(1, model.config.vocab_size, (2, 128), device=model.device)
    with autocast(dtype, model.device):
        model(input_ids=ids).logits.sum().backward()
    model.zero_grad(set_to_none=True)


def rows(pairs: int) -> tuple[list[Pair], PreTrainedTokenizerFast, str]:
    """Preference pairs of at most MAX_TOKENS tokens, their tokenizer, and in words where they come from.

    Shorter files of rows give fewer pairs.
    """
    if HH.is_file() and TOKENIZER.is_file():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token=EOS, pad_token=EOS)
        texts, source = _hh_texts(), f"HH rows of {HH.name}"
    else:
        tokenizer, texts, source = _made_tokenizer(), _made_texts(), "made rows (no shared data here)"
    found: list[Pair] = []
    for prompt, chosen, rejected in texts:
        ids, with_chosen, with_rejected = (
            tokenizer(text)["input_ids"] for text in (prompt, prompt + chosen + EOS, prompt + rejected + EOS)
        )
        length = min(_common(ids, with_chosen), _common(ids, with_rejected))
        if length and max(len(with_chosen), len(with_rejected)) <= MAX_TOKENS:
            found.append(Pair(prompt, chosen, rejected, ids[:length], with_chosen[length:], with_rejected[length:]))
        if len(found) == pairs:
            break
    return found, tokenizer, source


def _hh_texts() -> Iterator[tuple[str, ...]]:
    mark = "\n\nAssistant:"
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            chosen, rejected = record["chosen"], record["rejected"]
            end = chosen[: _common(chosen, rejected)].rfind(mark) + len(mark)
            if end >= len(mark) and chosen[end:] and rejected[end:]:
                yield chosen[:end], chosen[end:], rejected[end:]


def _made_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {EOS: 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def _made_texts() -> Iterator[tuple[str, ...]]:
    """Texts of lengths like HH's: prompts of 111 tokens on average, completions of 45."""
    generator = random.Random(0)
    while True:
        lengths = [min(300, 8 + int(generator.expovariate(1 / mean))) for mean in (103, 37, 37)]
        yield tuple("".join(f" w{generator.randrange(1, VOCABULARY)}" for _ in range(size)) for size in lengths)


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def peak_mib() -> float:
    """Peak memory of this process on its GPU, or else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gigaflops(device: str = "cpu", dtype: str = "float32") -> float:
    """Speed of a plain matrix product here and now."""
    size, repeats = (2048, 3) if device == "cpu" else (8192, 20)
    first, second = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    first @ second
    clock = Clock()
    for _ in range(repeats):
        first @ second
    return 2 * size**3 * repeats / clock.read()["seconds"] / 1e9


def bandwidth(device: str = "cpu") -> float:
    """GB/s of a copy, bytes read and written."""
    size = 2**26 if device == "cpu" else 2**31
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    clock = Clock()
    for _ in range(10):
        target.copy_(source)
    return 2 * size * 10 / clock.read()["seconds"] / 1e9


def run_contender(script: str, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Runs one contender in a process of its own and returns the JSON object of its last line."""
    command = [python, script, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print("  " + " ".join(arguments[:2]), "done", file=sys.stderr, flush=True)
    return result


def paired(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """How much faster ours is, by what both took in the same rounds, one after another.

    Args:
        theirs: seconds of each round.
        ours: those of the same rounds.

    Returns:
        `median` of the rounds' ratios theirs/ours, their `spread` from the least to the largest, and `can_be_told`: false
        where the largest is more than 1.5 times the least, as on a machine that did other work beside.
    """
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours, strict=True))
    spread = [round(ratios[0], 3), round(ratios[-1], 3)]
    return {
        "median": round(statistics.median(ratios), 3),
        "spread": spread,
        "can_be_told": ratios[-1] <= WIDE * ratios[0],
    }


def told(ratio: Mapping[str, Any]) -> str:
    """A ratio in words."""
    low, high = ratio["spread"]
    words = f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"
    return words if ratio["can_be_told"] else f"{words}: too wide to tell, the machine was busy"


def load() -> float:
    """Processes that wanted to run, this one among them, over the last minute."""
    return os.getloadavg()[0]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])
