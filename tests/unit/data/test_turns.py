"""Records as turns of a chat, at `prepare`: ids, what is cut whole, what is dropped, and what the log says."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_prepare import SUFFIX, add_up, demonstration, pair, prepare, write_raw
from transformers import LlamaConfig, PreTrainedTokenizerBase

from prefopt.data.turns import Tokens, tokenize_conversations, turns_of
from prefopt.errors import UserError
from prefopt.lm.chat import Chat, chat_of, prompt_ids
from prefopt.lm.models import load_tokenizer
from prefopt.store.tables import read_table
from prefopt.training.pretrain import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ANSWER, SYSTEM = (
    {"role": role, "content": said} for role, said in zip(("user", "assistant", "system"), "uas", strict=True)
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_tokenizer(["user assistant system my cat ate the red shoe\n"], 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaConfig(max_position_embeddings=96, vocab_size=400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(model: Path) -> Chat:
    return chat_of(load_tokenizer(model))


def conversation(*turns: dict[str, str]) -> str:
    return json.dumps(turns)


def text(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    whole: str = tokenizer.decode(ids, skip_special_tokens=False)
    return whole


def tokens_of(chat: Chat, rows: list[dict[str, Any]], **options: Any) -> list[Tokens | str]:
    values: dict[str, Any] = {"suffix": SUFFIX, "system": None, "longest": 60, "path": Path("raw.parquet"), **options}
    return tokenize_conversations(chat, rows, "prompt_id", ("response",), **values)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": conversation(USER, ANSWER, USER), "prompt": "x"}, [USER, ANSWER, USER]),
        ({"messages": "", "prompt": f"  my post {SUFFIX}"}, [{"role": "user", "content": "my post"}]),
        ({"messages": "", "prompt": "\n\nHuman: u\n\nAssistant: a\n\nHuman: u"}, [USER, ANSWER, USER]),
    ],
)
def test_the_turns_of_a_record(row: dict[str, Any], turns: list[dict[str, str]]) -> None:
    assert turns_of(row, SUFFIX, None) == turns
    assert turns_of(row, SUFFIX, "s") == [SYSTEM, *turns]


def test_a_system_message_of_the_records_own_stays() -> None:
    row = {"messages": conversation({"role": "system", "content": "own"}, USER), "prompt": "x"}
    assert turns_of(row, "", "s")[0]["content"] == "own"


def test_the_oldest_turns_go_first_and_whole(chat: Chat) -> None:
    turns = [SYSTEM, *[{**turn, "content": f"{turn['content']}{i}"} for i in range(3) for turn in (USER, ANSWER)][:-1]]
    kept = [turns, [SYSTEM, *turns[3:]], [SYSTEM, *turns[5:]]]
    lengths = [len(prompt_ids(chat, part)) for part in kept]
    assert lengths[0] > lengths[1] > lengths[2]
    rows = [demonstration(0, messages=conversation(*turns), response=" red")]
    for number, length in enumerate(lengths):
        for longest in (length, lengths[number - 1] - 1 if number else length + 9):
            (found,) = tokens_of(chat, rows, longest=longest)
            assert isinstance(found, Tokens)
            assert (found.prompt, found.cut) == (prompt_ids(chat, kept[number]), number > 0)
            assert text(chat.tokenizer, found.completions[0]) == "red<|im_end|>"
    assert tokens_of(chat, rows, longest=lengths[2] - 1) == ["prompt_too_long"]


def test_what_the_template_refuses_is_named_dropped_and_counted(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    rows = [demonstration(i, messages=conversation(USER)) for i in range(20)]
    rows[7]["messages"] = conversation(USER, {"role": "tool", "content": "t"})
    with caplog.at_level(logging.WARNING):
        found = tokens_of(chat, rows)
    assert [row for row in found if isinstance(row, str)] == ["refused_by_template"] and found[
        7
    ] == "refused_by_template"
    name = chat.tokenizer.name_or_path
    assert (
        f"raw.parquet: the chat template of {name} does not take 'p7' (no tools here); 1 of 20 records are dropped for "
        f"this (refused_by_template)" in caplog.text
    )
    # A tenth is not more than a tenth.
    assert tokens_of(chat, rows[:10]).count("refused_by_template") == 1
    with pytest.raises(UserError) as error:
        tokens_of(chat, rows[1:9])
    assert str(error.value) == (
        f"raw.parquet: the chat template of {name} does not take 'p7' (no tools here), and so with 1 of 8 records in all: "
        f"give conversations that it takes, a base with another template, or prompt.style 'plain'."
    )


def stage(raw: Path, model: Path, out: Path, **values: Any) -> dict[str, Any]:
    assert prepare(raw, model, out, **values) == 0
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert add_up(summary)
    return summary


def test_the_stage(tmp_path: Path, model: Path, chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    turns = conversation(SYSTEM, USER)
    demonstrations = [demonstration(i, messages=turns, split="test" if i % 2 else "train") for i in range(20)]
    demonstrations[2]["response"] = " my <|im_end|> cat"
    pairs = [pair(i, messages=turns, split="gold_train" if i % 2 else "train") for i in range(20)]
    write_raw(tmp_path / "raw", demonstrations, pairs)
    with caplog.at_level(logging.INFO):
        summary = stage(tmp_path / "raw", model, tmp_path)
    assert (
        f"prompts are put as turns of a chat: 20 of 20 records are conversations, and {model} has a chat template"
        in caplog.text
    )
    assert "1 of 20 records hold one, which stays text" in caplog.text and "which is not used" not in caplog.text
    assert summary["tables"]["demonstrations"]["dropped"] == {"no_post": 2}
    tokenizer = chat.tokenizer
    asked = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    for name in ("demonstrations", "prompts", "preferences", "gold_preferences"):
        table = read_table(tmp_path / f"{name}.parquet", name.removeprefix("gold_"), style="chat")
        assert {text(tokenizer, ids) for ids in table["prompt_ids"]} == {asked}
        assert "messages" not in table
        if name == "demonstrations":
            assert text(tokenizer, table["response_ids"][2]) == "my <|im_end|> cat<|im_end|>"
            assert list(table["response_ids"][2]).count(chat.end) == 1
        if "preferences" in name:
            assert {text(tokenizer, ids) for ids in table["chosen_ids"]} == {"my cat<|im_end|>"}
            assert {text(tokenizer, ids) for ids in table["rejected_ids"]} == {"the shoe<|im_end|>"}


def test_plain_text_is_the_default_without_conversations_or_a_template(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_raw(tmp_path / "raw", [demonstration(0)], [pair(0)])
    with caplog.at_level(logging.INFO):
        stage(tmp_path / "raw", model, tmp_path / "out")
    assert f"prompts are put as plain text: 0 of 1 records are conversations, and {model} has a chat" in caplog.text
    table = read_table(tmp_path / "out" / "prompts.parquet", "prompts", style="plain")
    assert load_tokenizer(model).decode(table["prompt_ids"][0]) == f"post 0{SUFFIX}"
    # A chat where it is asked for.
    stage(tmp_path / "raw", model, tmp_path / "chat", style="chat", system="s")
    table = read_table(tmp_path / "chat" / "prompts.parquet", "prompts", style="chat")
    asked = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\npost 0<|im_end|>\n<|im_start|>assistant\n"
    assert text(load_tokenizer(model), table["prompt_ids"][0]) == asked


def test_a_new_suffix_takes_the_place_of_the_tasks_own(tmp_path: Path, model: Path) -> None:
    write_raw(tmp_path / "raw", [demonstration(0), demonstration(1, prompt="bare")], [pair(0)])
    stage(tmp_path / "raw", model, tmp_path, style="plain", new_suffix="\nshoe:")
    table = read_table(tmp_path / "prompts.parquet", "prompts")
    tokenizer = load_tokenizer(model)
    assert [tokenizer.decode(ids) for ids in table["prompt_ids"]] == ["post 0\nshoe:", "bare\nshoe:"]
    assert list(table["prompt"]) == [f"post 0{SUFFIX}", "bare"], "the record's own, as judges see it"


def test_a_chat_without_a_template_and_tables_that_differ(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    LlamaConfig(max_position_embeddings=96, vocab_size=400).save_pretrained(bare)
    write_raw(tmp_path / "raw", [demonstration(0, messages=conversation(USER))], [pair(0)])
    assert prepare(tmp_path / "raw", bare, tmp_path / "out", style="chat") == 2
    assert f"the chat template of {bare} does not serve (there is none" in capsys.readouterr().err
    assert prepare(tmp_path / "raw", model, tmp_path / "out") == 2
    told = "(demonstrations chat, preferences plain, prompts chat)"
    assert told in capsys.readouterr().err


def test_a_template_that_writes_the_date_is_named(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dated = tmp_path / "dated"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + TEMPLATE
    tokenizer.save_pretrained(dated)
    LlamaConfig(max_position_embeddings=96, vocab_size=400).save_pretrained(dated)
    write_raw(tmp_path / "raw", [demonstration(0)], [pair(0)])
    stage(tmp_path / "raw", dated, tmp_path / "out", style="chat")
    assert f"the chat template of {dated} writes today's date into prompts" in caplog.text


def test_records_that_a_template_has_written_are_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = conversation({"role": "user", "content": "<|im_start|>user\nu<|im_end|>"})
    row = demonstration(0, messages=twice, prompt="<|im_start|>user\nu<|im_end|>")
    write_raw(tmp_path / "raw", [row], [pair(0)])
    assert prepare(tmp_path / "raw", model, tmp_path / "out") == 2
    assert "as where a chat template was applied before: give the turns themselves" in capsys.readouterr().err
