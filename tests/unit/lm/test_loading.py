"""Folders that cannot be what they seem: each is one sentence that names the folder, and no weight is random."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.lm import models
from prefopt.lm.loading import read_model
from prefopt.lm.models import (
    encode,
    load_classifier,
    load_policy,
    load_scorer,
    load_tokenizer,
    max_positions,
    new_classifier,
    new_scorer,
    save_model,
    tokenizer_hash,
    weights_hash,
)
from prefopt.store.files import canonical_json
from prefopt.training.pretrain import EOS, train_tokenizer

SHAPE: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["my dog ate the red shoe"], 270)


@pytest.fixture(scope="module")
def whole(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is as it should be, with a head of its own."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "model"
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **SHAPE)
    save_model(path, LlamaForCausalLM(config), tokenizer, {"made": "by a test"})
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil, without a hash of its weights."""
    shutil.copytree(whole, tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    return tmp_path / "m"


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    changed = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    save_file(changed, path, metadata={"format": "pt"})


def refusal(load: Callable[[Path], object], folder: Path) -> str:
    """The sentence, which names the folder and is one line."""
    with pytest.raises(UserError) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("load", [load_policy, lambda path: new_scorer(path, 0)])
def test_tensors_under_other_names(load: Callable[[Path], object], prefix: str, folder: Path) -> None:
    change_weights(folder, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    text = refusal(load, folder)
    assert "lacks " in text and "model.embed_tokens.weight" in text and f"holds {prefix}" in text


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_missing(name: str, folder: Path) -> None:
    change_weights(folder, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    assert f"{folder} lacks {name}: name a folder" in refusal(load_policy, folder)


def test_a_tensor_that_no_layer_takes(folder: Path) -> None:
    set_config(folder, num_hidden_layers=1)
    text = refusal(load_policy, folder)
    assert "holds model.layers.1.input_layernorm.weight" in text and "and 6 more weights, unknown" in text


def test_a_tensor_of_another_shape(folder: Path) -> None:
    set_config(folder, intermediate_size=24)
    text = refusal(load_policy, folder)
    assert "holds model.layers.0.mlp.down_proj.weight with the shape [16, 32] where its config.json asks for" in text
    assert "[16, 24] (and 5 more of another shape)" in text


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_a_base_of_fewer_bits_is_said_to_be_so_and_read_as_float32(
    dtype: torch.dtype, name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level("INFO"):
        model, _ = load_policy(folder)
    assert f"{folder} is in {name}; its weights are read, and trained, as float32" in caplog.text
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, kept[key].float())
    caplog.clear()
    with caplog.at_level("INFO"):
        load_policy(folder, dtype=torch.bfloat16)
    assert "is in" not in caplog.text


def test_a_head_is_fresh_only_where_one_is_made(whole: Path) -> None:
    assert f"{whole} lacks score.weight" in refusal(load_scorer, whole)
    assert f"{whole} lacks score.weight" in refusal(load_classifier, whole)
    scorer, _ = new_scorer(whole, seed=3)
    again, _ = new_scorer(whole, seed=3)
    assert torch.equal(scorer.score.weight, again.score.weight) and scorer.score.weight.shape == (1, 16)
    made, _ = new_classifier(whole, 0, ("NEGATIVE", "POSITIVE"))
    assert made.score.weight.shape == (2, 16) and made.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    policy, _ = load_policy(whole)
    for model in (scorer, made):
        assert torch.equal(model.model.embed_tokens.weight, policy.model.embed_tokens.weight)


def test_a_reward_model_of_two_outputs(whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, _ = new_classifier(whole, 0, ("a", "b"))
    save_model(tmp_path / "m", model, tokenizer, {})
    text = refusal(load_scorer, tmp_path / "m")
    assert "holds score.weight with the shape [2, 16] where its config.json asks for [1, 16]" in text


def test_buffers_of_old_checkpoints_are_no_weights(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=len(tokenizer))
    save_model(tmp_path / "m", GPT2LMHeadModel(config), tokenizer, {})
    (tmp_path / "m" / "manifest.json").unlink()
    old = {
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8),
        "transformer.rotary.inv_freq": torch.ones(4),
        "transformer.h.0.attention.mask": torch.ones(16, 16, dtype=torch.bool),
    }
    change_weights(tmp_path / "m", lambda weights: {**weights, **old})
    load_policy(tmp_path / "m")
    new_scorer(tmp_path / "m", 0)
    change_weights(tmp_path / "m", lambda weights: {**weights, "v_head.summary.weight": torch.ones(1, 8)})
    assert "holds v_head.summary.weight, unknown" in refusal(load_policy, tmp_path / "m")


def test_a_tie_that_the_file_does_not_keep(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=True)
    text = refusal(load_policy, folder)
    assert "holds lm_head.weight and model.embed_tokens.weight with different values" in text
    change_weights(folder, lambda weights: {name: t for name, t in weights.items() if name != "lm_head.weight"})
    model, _ = load_policy(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def lfs(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def integers(folder: Path) -> None:
    change_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"].to(torch.int8)})


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "LFS pointer": (lfs, "model.safetensors is a pointer of Git LFS"),
    "LFS tokenizer": (
        lambda m: (m / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a pointer of Git LFS",
    ),
    "cut weights": (cut, "could not be loaded"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "model.safetensors is empty, as"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "could not be loaded"),
    "bitsandbytes": (
        lambda m: set_config(m, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "is quantized",
    ),
    "integers": (integers, "is quantized: lm_head.weight is stored as I8"),
    "code of its own": (
        lambda m: set_config(m, model_type="foonet", auto_map={"AutoConfig": "configuration_foo.Foo"}),
        "could not be read",
    ),
    "unknown type": (lambda m: set_config(m, model_type="foonet"), "model type `foonet`"),
    "T5": (lambda m: set_config(m, model_type="t5"), "T5Config"),
    "no layers": (lambda m: set_config(m, num_hidden_layers=-1), "says num_hidden_layers: -1"),
    "no heads": (lambda m: set_config(m, num_attention_heads=0), "could not be read"),
    "a word for a number": (lambda m: set_config(m, hidden_size="wide"), "could not be read"),
    "no JSON": (lambda m: (m / "config.json").write_text("{ no"), "could not be read"),
    "a list": (lambda m: (m / "config.json").write_text("[]"), "could not be read"),
    "empty config": (lambda m: (m / "config.json").write_bytes(b""), "config.json is empty, as"),
    "other weights": (lambda m: set_config(m, transformers_weights="../other.safetensors"), "transformers_weights"),
    "adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "holds no tokenizer"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "The tokenizer of"),
    "empty tokenizer": (lambda m: (m / "tokenizer.json").write_bytes(b""), "tokenizer.json is empty, as"),
    "broken manifest": (lambda m: (m / "manifest.json").write_text("{ no"), "manifest.json could not be read"),
    "manifest of another kind": (lambda m: (m / "manifest.json").write_text("[]"), "is not a JSON object"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_loaded(case: str, folder: Path) -> None:
    spoil, words = FOLDERS[case]
    spoil(folder)
    assert words in refusal(load_policy, folder)


def test_what_to_do_with_an_empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    expected = (
        f"{folder / 'model.safetensors'} is empty, as a full disk or a power cut may leave it: copy it again, or, if this "
        f"workflow made the model, delete {folder} and run its stage again."
    )
    for read in (load_policy, load_tokenizer, weights_hash):
        assert refusal(read, folder) == expected


@pytest.mark.parametrize("case", ["LFS pointer", "cut weights", "empty weights", "no weights"])
def test_a_hash_of_weights_that_are_not_there(case: str, folder: Path) -> None:
    FOLDERS[case][0](folder)
    refusal(weights_hash, folder)


def test_an_attention_that_a_config_asks_for_is_not_looked_for(folder: Path) -> None:
    set_config(folder, attn_implementation="kernels-community/flash-attn")
    model, _ = load_policy(folder)
    assert model.config._attn_implementation == "prefopt"


def test_an_encoder_is_no_language_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), **shape)
    save_model(tmp_path / "encoder", BertLMHeadModel(config), tokenizer, {})
    assert "is no causal language model" in refusal(load_policy, tmp_path / "encoder")
    config.is_decoder = True
    save_model(tmp_path / "decoder", BertLMHeadModel(config), tokenizer, {})
    # As a decoder it sees no later tokens, but it changes its states before the head, which the engine does not compute.
    assert "is not computed rightly here" in refusal(load_policy, tmp_path / "decoder")


def test_an_encoder_may_be_a_classifier(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=len(tokenizer), num_labels=2, **shape))
    save_model(tmp_path / "m", model, tokenizer, {})
    (tmp_path / "m" / "manifest.json").unlink()
    load_classifier(tmp_path / "m")
    change_weights(tmp_path / "m", lambda weights: {n: t for n, t in weights.items() if not n.startswith("classifier")})
    assert "lacks classifier.bias, classifier.weight" in refusal(load_classifier, tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers(name: str, value: float, folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights[name][3, 5] = value
        return weights

    change_weights(folder, spoil)
    text = refusal(load_policy, folder)
    assert f"What {folder} computes is not finite, as weights are not ({name})" in text


def test_a_head_that_is_no_number(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer, _ = new_scorer(folder, 0)
    with torch.no_grad():
        scorer.score.weight[0, 0] = float("nan")
    save_model(folder, scorer, tokenizer, {})
    assert "as weights are not (score.weight)" in refusal(load_scorer, folder)


def test_weights_that_were_changed_after_they_were_published(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {"made": "by a test", "weights_hash": weights_hash(folder)}
    load_policy(folder)
    stat = (folder / "model.safetensors").stat()

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["lm_head.weight"][0, 0] += 1e-3
        return weights

    change_weights(folder, change)
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / "model.safetensors").stat().st_mtime_ns == stat.st_mtime_ns
    for load in (load_policy, lambda path: new_scorer(path, 0), load_classifier, load_scorer):
        text = refusal(load, folder)
        assert "are not those that were published there" in text and manifest["weights_hash"][:12] in text


def test_weights_are_hashed_once(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    from prefopt.lm import models

    opened: list[str] = []
    real = models.safe_open
    monkeypatch.setattr(models, "safe_open", lambda file, **rest: opened.append(str(file)) or real(file, **rest))
    first = weights_hash(folder)
    seen = len(opened)
    assert seen > 0 and weights_hash(folder) == first
    load_policy(folder)
    assert len(opened) == seen


def test_a_hash_of_a_tokenizer_is_of_vocabulary_merges_and_a_probe(
    whole: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    merges = json.loads((whole / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > 5
    kept = {"vocabulary": tokenizer.get_vocab(), "merges": [" ".join(pair) for pair in merges], "scores": []}
    kept["probe"] = encode(tokenizer, [models._PROBE])
    digest = hashlib.sha256(canonical_json(kept).encode()).hexdigest()
    assert tokenizer_hash(whole) == f"{digest}, BOS none, EOS {tokenizer.eos_token_id}"


def test_positions_without_a_limit(folder: Path) -> None:
    assert max_positions(folder) == 64
    set_config(folder, max_position_embeddings=-1)
    assert max_positions(folder) is None


def test_a_tokenizer_with_more_tokens_than_the_embedding(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tokenizer)
    # A placeholder that no text is read as, as Gemma's for images, may lie beyond.
    larger = load_tokenizer(folder)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(folder)
    assert len(load_tokenizer(folder)) == size + 1
    for role in ("pad_token", "eos_token"):
        larger = PreTrainedTokenizerFast.from_pretrained(folder)
        larger.add_special_tokens({role: "<|stop|>"})
        larger.save_pretrained(folder)
        text = refusal(load_policy, folder)
        assert f"has {size + 2} tokens, the last of them '<|stop|>', but its model has embeddings of {size}:" in text
    larger = train_tokenizer(["my dog ate the red shoe"], 270)
    larger.add_tokens(["newword"])
    larger.save_pretrained(folder)
    assert "'newword'" in refusal(load_tokenizer, folder)


def test_a_tokenizer_without_an_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token"}))
    assert "has no EOS token" in refusal(load_tokenizer, folder)
    assert EOS == "<|endoftext|>"


def test_the_command_says_one_sentence(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_weights(folder, lambda weights: {"_orig_mod." + name: tensor for name, tensor in weights.items()})
    assert main(["fetch", "--name", str(folder), "--out", str(tmp_path / "out")]) == 2
    printed = capfd.readouterr().err.strip()
    assert printed.startswith(f"prefopt fetch: {folder} lacks lm_head.weight") and "\n" not in printed
    assert not (tmp_path / "out").exists()


def test_a_plain_folder_is_read_as_transformers_reads_it(whole: Path) -> None:
    ours = read_model(LlamaForCausalLM, whole)
    theirs = LlamaForCausalLM.from_pretrained(whole)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
