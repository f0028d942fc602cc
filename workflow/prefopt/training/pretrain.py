"""A tokenizer and a small causal language model trained from scratch on the task's text."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.models import encode
from prefopt.lm.verify import use_engine
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.files import stable_hash
from prefopt.store.tables import read_table
from prefopt.training import stage
from prefopt.training.loop import Examples, train
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.sft import completion_examples

EOS = "<|endoftext|>"
_VALIDATION_SHARE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe(TrainingRecipe):
    """A byte-level BPE tokenizer and a Llama-shaped model with tied embeddings.

    A small model learns to copy, on which all else hangs, many times faster from short documents, and forgets it
    again when they stop at once; hence some of them come first and the others among the long ones, in random order.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_positions: int
    initializer_range: float  # standard deviation of the initial weights
    short_tokens: int  # a document of at most this many tokens is short
    short_first: int  # so many short documents come before all others


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, so that any text can be encoded, with one special token, EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def new_model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised model of the recipe's shape; the seed is set here."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_positions,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config)


def documents_to_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_positions: int
) -> Iterator[list[int]]:
    """Token ids of each document with EOS at its end, cut into pieces that fit the model after one EOS."""
    room = max_positions - 1
    for ids in encode(tokenizer, texts):
        whole = [*ids, tokenizer.eos_token_id]
        for start in range(0, len(whole), room):
            yield whole[start : start + room]


def short_documents_first(documents: Sequence[list[int]], short_tokens: int, first: int) -> list[list[int]]:
    """The first `first` documents of at most `short_tokens` tokens, then all others in their order."""
    short = [i for i, ids in enumerate(documents) if len(ids) <= short_tokens][:first]
    moved = set(short)
    return [documents[i] for i in [*short, *(i for i in range(len(documents)) if i not in moved)]]


def recipe_hash(recipe: PretrainRecipe, text_hash: str) -> str:
    """Names what a checkpoint was made of: the content of its text, and all of the recipe that can change a weight.

    How a batch is cut and computed and how often a checkpoint is written change rounding at most; there is no adapter, and
    epochs say how long it lasts.
    """
    values = to_dict(recipe)
    for name in ("token_budget", "checkpoint_every", "evaluate_every", "activation_checkpointing", "adapter", "steps"):
        del values[name]
    return stable_hash({"recipe": values, "text": text_hash})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `pretrain`."""
    stage.add_arguments(parser)
    parser.add_argument("--text", required=True, type=Path, help="pretraining table")


def run(args: argparse.Namespace) -> None:
    """Trains tokenizer and model on `--text` and publishes them as one model folder."""
    recipe = from_json(PretrainRecipe, args.recipe)
    table = read_table(args.text, "pretraining")
    texts: list[str] = table["text"].tolist()
    random.Random(recipe.seed).shuffle(texts)
    held_out = max(1, int(len(texts) * _VALIDATION_SHARE))
    if len(texts) < 2:
        raise UserError(f"{args.text} has {len(texts)} documents: pretraining needs at least two.")
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    model = stage.prepared(use_engine(new_model(recipe, tokenizer)), recipe)

    def examples(part: Sequence[str]) -> Examples:
        pieces = list(documents_to_ids(part, tokenizer, recipe.max_positions))
        pieces = short_documents_first(pieces, recipe.short_tokens, recipe.short_first)
        names = [f"document {i}" for i in range(len(pieces))]
        return completion_examples(names, [[tokenizer.eos_token_id]] * len(pieces), pieces)

    training, validation = examples(texts[held_out:]), examples(texts[:held_out])
    usage = Usage("pretrain", default_device(), recipe.dtype)
    text_hash = table.attrs["manifest"]["content_hash"]
    identity = stage.describe_run(__name__, recipe, {"text": text_hash})
    with stage.open_run(args.work, identity, model) as folder:
        metrics = train("pretrain", model, training, validation, recipe, folder, usage, shuffle=False)
        stage.publish(
            *(args, model, tokenizer, identity, metrics, usage, folder),
            recipe_hash=recipe_hash(recipe, text_hash),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
