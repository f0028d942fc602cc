"""Results in the forms of other tools."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from prefopt.analysis import export
from prefopt.errors import UserError
from prefopt.store.tables import read_table, write_table


def do(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    export.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def tables(tmp_path: Path) -> tuple[Path, Path]:
    shared = {"facts": "", "prompt_ids": [1]}
    prompts = [
        {"prompt_id": name, "prompt": f"say {name}", "reference": " ref", "split": split, **shared}
        for name, split in (("a", "test"), ("b", "test"), ("c", "validation"))
    ]
    write_table(tmp_path / "prompts.parquet", "prompts", prompts)
    hashed = read_table(tmp_path / "prompts.parquet", "prompts").attrs["manifest"]["content_hash"]
    of_each = {"tokens": 2, "token_ids": [1, 2], "finish_reason": "eos", "logp": -1.0, "reference_logp": None}
    samples = [
        {
            **{"prompt_id": one["prompt_id"], "run": "dpo", "temperature": t, "sample_index": k, "split": one["split"]},
            "text": f" {one['prompt_id']} at {t}, {k} <|ü|>",
            **of_each,
        }
        for t in (0.0, 0.5)
        for one in prompts
        for k in (0, 1)
    ]
    write_table(tmp_path / "samples.parquet", "samples", samples, prompts=hashed)
    return tmp_path / "samples.parquet", tmp_path / "prompts.parquet"


def test_alpaca_eval_has_the_first_completion_of_each_test_prompt(tables: tuple[Path, Path], tmp_path: Path) -> None:
    samples, prompts = tables
    do("alpaca_eval", samples, "--prompts", prompts, "--temperature", "0.5", "--out", tmp_path / "outputs.json")
    assert json.loads((tmp_path / "outputs.json").read_text()) == [
        {"dataset": "prefopt", "instruction": f"say {x}", "output": f"{x} at 0.5, 0 <|ü|>", "generator": "dpo"}
        for x in ("a", "b")
    ]
    with pytest.raises(UserError, match=r"--temperature must name one of 0\.0, 0\.5\."):
        do("alpaca_eval", samples, "--prompts", prompts, "--out", tmp_path / "no.json")
    with pytest.raises(UserError, match=r"--run must name one of dpo\."):
        do("alpaca_eval", samples, "--prompts", prompts, "--run", "ppo", "--out", tmp_path / "no.json")
    with pytest.raises(UserError, match="give --prompts"):
        do("alpaca_eval", samples, "--out", tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()


def test_arena_hard_has_questions_answers_and_the_references_as_a_model(
    tables: tuple[Path, Path], tmp_path: Path
) -> None:
    samples, prompts = tables
    out = tmp_path / "bench"
    do("arena_hard", samples, "--prompts", prompts, "--temperature", "0.5", "--out", out)
    files = {
        str(path.relative_to(out)): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.rglob("*.jsonl"))
    }
    assert files["question.jsonl"] == [{"uid": x, "category": "prefopt", "prompt": f"say {x}"} for x in ("a", "b")]
    for model, answer, length in (("dpo", "{} at 0.5, 0 <|ü|>", 2), ("reference", "ref", 1)):
        assert files.pop(f"model_answer/{model}.jsonl") == [
            {
                **{"uid": x, "ans_id": f"{model}-{x}", "model": model, "tstamp": 0.0},
                "messages": [
                    {"role": "user", "content": f"say {x}"},
                    {"role": "assistant", "content": {"answer": answer.format(x)}},
                ],
                "metadata": {"token_len": length},
            }
            for x in ("a", "b")
        ]
    assert set(files) == {"question.jsonl"}
    with pytest.raises(UserError, match="arena_hard holds the prompts too: give --prompts"):
        do("arena_hard", samples, "--out", tmp_path / "no")


def test_pairs_become_a_folder_of_datasets(tmp_path: Path) -> None:
    rows = [
        {
            **{"pair_id": name, "prompt_id": name, "prompt": f"p{name}", "chosen": " good", "rejected": " bad"},
            **{"split": split, "source": "s", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
        }
        for name, split in (("1", "train"), ("2", "train"), ("3", "validation"))
    ]
    write_table(tmp_path / "pairs.parquet", "preferences", rows)
    do("datasets", tmp_path / "pairs.parquet", "--out", tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    assert {name: len(part) for name, part in saved.items()} == {"train": 2, "validation": 1}
    assert saved["train"][1] == {"prompt": "p2", "chosen": " good", "rejected": " bad"}


def test_tables_in_markdown_and_latex(tmp_path: Path) -> None:
    pd.DataFrame(
        {"run": ["dpo_0.1", "a|b & c"], "win_rate": [0.8765, None], "n": [192, 3], "tokens|a": [123456.0, None]}
    ).to_csv(tmp_path / "table.csv", index=False)
    do("markdown", tmp_path / "table.csv", "--out", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == (
        "| run | win\\_rate | n | tokens\\|a |\n| --- | --- | --- | --- |\n"
        "| dpo\\_0.1 | 0.876 | 192 | 123456 |\n| a\\|b \\& c |  | 3 |  |\n"
    )
    do("latex", tmp_path / "table.csv", "--columns", "n", "run", "--out", tmp_path / "table.tex")
    assert (tmp_path / "table.tex").read_text() == (
        "\\begin{tabular}{rl}\n\\toprule\nn & run \\\\\n\\midrule\n192 & dpo\\_0.1 \\\\\n3 & a\\textbar{}b \\& c \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )
    pd.DataFrame({"interval": ["[57, 70]"], "a~^\\{<>%$#}": [1]}).to_csv(tmp_path / "odd.csv", index=False)
    do("latex", tmp_path / "odd.csv", "--out", tmp_path / "table.tex")
    head, row = (tmp_path / "table.tex").read_text().splitlines()[2:5:2]
    escaped = r"a\textasciitilde{}\textasciicircum{}\textbackslash{}\{\textless{}\textgreater{}\%\$\#\}"
    assert (head, row) == (rf"interval & {escaped} \\", r"{[}57, 70] & 1 \\")
    with pytest.raises(UserError, match=r"has no column 'rate'; it has run, win_rate, n, tokens\|a"):
        do("latex", tmp_path / "table.csv", "--columns", "rate", "--out", tmp_path / "table.tex")
