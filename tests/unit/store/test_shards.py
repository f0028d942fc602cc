"""How work is cut, and how shards come together again."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.errors import UserError
from prefopt.store import gather
from prefopt.store.shards import Shard, parse_shard
from prefopt.store.tables import read_manifest, read_table, write_table

RECIPE = {"n": 1, "dtype": "float32"}


@pytest.mark.parametrize(("blocks", "count"), [(7, 1), (7, 2), (7, 3), (7, 7), (7, 10), (0, 4), (96, 5)])
def test_every_block_is_in_one_shard_and_shards_are_of_like_size(blocks: int, count: int) -> None:
    parts = [Shard(i, count).part(blocks) for i in range(1, count + 1)]
    assert [block for part in parts for block in range(*part)] == list(range(blocks))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


def test_groups_stay_together_in_blocks_by_their_first_appearance() -> None:
    groups = ["a", "b", "c", "d", "e", "a", "b", "c", "d", "e"]
    shards = [Shard(i, 2).rows(groups, at_once=2) for i in (1, 2)]
    # Blocks are ab, cd and e.
    assert shards == [[0, 1, 5, 6], [2, 3, 4, 7, 8, 9]]
    assert [Shard(i, 4).rows(groups, at_once=2) for i in (1, 2, 3, 4)] == [[], [0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]
    assert Shard(1, 1).rows(groups, at_once=3) == list(range(10))


def test_a_shard_tells_its_rows_as_runs_and_the_whole_tells_nothing() -> None:
    assert Shard(2, 2).manifest([2, 3, 4, 7, 8]) == {"shard": {"number": 2, "of": 2, "rows": [[2, 5], [7, 9]]}}
    assert Shard(2, 2).manifest([]) == {"shard": {"number": 2, "of": 2, "rows": []}}
    assert Shard(1, 1).manifest([0, 1]) == {}


def test_the_form_of_a_shard() -> None:
    assert parse_shard("1-of-5") == Shard(1, 5) and parse_shard(None) == Shard(1, 1)
    for text in ("0-of-5", "6-of-5", "1/5", "1-of-", "-1-of-5", "1-of-5 "):
        with pytest.raises(UserError, match=r"--shard is .*; allowed: I-of-N with I from 1 to N, e.g. 2-of-5"):
            parse_shard(text)


def score(name: str, reward: float) -> dict[str, Any]:
    return {"prompt_id": name, "temperature": 1.0, "sample_index": 0, "reward": reward}


def used(seconds: float, tokens: int, **others: Any) -> dict[str, Any]:
    counts = {"examples": 2, "tokens": tokens, "seconds": seconds, "device_seconds": seconds / 2}
    rest = {"stage": "score", "device": "cpu", "peak_memory_mib": 100 + tokens, "tokens_per_second": 1.0}
    return {**counts, **rest, **others}


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Five rows in three shards: the first has rows 0 and 3, the second 1, 2 and 4, the third none."""
    paths = [tmp_path / f"{i}-of-3.parquet" for i in (1, 2, 3)]
    for number, (path, rows) in enumerate(zip(paths, ([0, 3], [1, 2, 4], []), strict=True), start=1):
        scores = [score(f"p{i}", -0.0 if i == 4 else i) for i in rows]
        shard = Shard(number, 3).manifest(rows)
        device = {} if number < 3 else {"device": "other"}
        values = {"recipe": RECIPE, "samples": "abc", "used": used(number, 10 * number, **device), "stopped": number}
        write_table(path, "scores", scores, **values, **shard)
    return paths


def rewrite(path: Path, **changes: Any) -> None:
    manifest = read_manifest(path)
    kept = {key: manifest[key] for key in ("recipe", "samples", "used", "stopped", "shard")}
    rows = read_table(path, "scores", shard=manifest["shard"])
    write_table(path, "scores", rows, **{**kept, **changes})


def test_shards_in_any_order_make_the_table(parts: list[Path], tmp_path: Path) -> None:
    rows = [score(f"p{i}", -0.0 if i == 4 else i) for i in range(5)]
    whole = write_table(tmp_path / "whole.parquet", "scores", rows, recipe=RECIPE, samples="abc", stopped=6)
    for order in itertools.permutations(parts):
        out = tmp_path / "out" / "table.parquet"
        assert main(["gather", "--parts", *map(str, order), "--out", str(out)]) == 0
        manifest = read_manifest(out)
        # The hash sees that -0.0 is still -0.0.
        assert {key: value for key, value in manifest.items() if key not in ("used", "made_by")} == whole
    assert read_table(out, "scores")["prompt_id"].tolist() == [f"p{i}" for i in range(5)]


def test_what_the_jobs_used_comes_together(parts: list[Path]) -> None:
    _, _, manifest = gather.gather(parts)
    assert manifest["used"] == {
        **{"stage": "score", "device": ["cpu", "other"], "examples": 6, "tokens": 60},
        **{"seconds": 6.0, "device_seconds": 3.0, "peak_memory_mib": 130, "tokens_per_second": 10.0},
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"recipe": {**RECIPE, "n": 2}},
            r"2-of-3.parquet is a shard of other work .*: recipe.n is 2 in it and 1 there",
        ),
        ({"samples": "def"}, "samples is 'def' in it and 'abc' there; make all shards"),
        ({"more": 1}, "more is 1 in it and None there"),
        ({"shard": {"number": 2, "of": 4, "rows": [[1, 3], [4, 5]]}}, "is one of 4 shards and .* one of 3"),
        ({"shard": {"number": 1, "of": 3, "rows": [[1, 3], [4, 5]]}}, "shard 1-of-3 is there 2 times among"),
        ({"shard": {"number": 2, "of": 3, "rows": [[1, 3], [5, 6]]}}, "Row 4 of the table is missing in"),
        ({"shard": {"number": 2, "of": 3, "rows": [[1, 4]]}}, "Row 3 of the table is there twice in"),
        ({"shard": {"number": 2, "of": 3, "rows": [[1, 3]]}}, "has 3 rows and says where 2 belong"),
    ],
)
def test_shards_that_do_not_fit_are_refused(parts: list[Path], changes: dict[str, Any], said: str) -> None:
    rewrite(parts[1], **changes)
    with pytest.raises(UserError, match=said):
        gather.gather(parts)


def test_a_missing_shard_a_doubled_one_and_a_whole_table_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard 2-of-3 is missing among .*1-of-3.parquet and the others: give each"):
        gather.gather([parts[0], parts[2]])
    with pytest.raises(UserError, match="shard 1-of-3 is there 2 times"):
        gather.gather([*parts, parts[0]])
    write_table(tmp_path / "whole.parquet", "scores", [score("p", 1.0)])
    with pytest.raises(UserError, match=r"whole.parquet is a whole table and no shard of one"):
        gather.gather([tmp_path / "whole.parquet"])


def test_rows_that_two_shards_made_are_refused(parts: list[Path], tmp_path: Path) -> None:
    rows = [score("p1", 1.0), score("p2", 2.0), score("p3", 3.0)]
    kept = {key: value for key, value in read_manifest(parts[1]).items() if key in ("recipe", "samples", "used")}
    write_table(parts[1], "scores", rows, **kept, stopped=2, **Shard(2, 3).manifest([1, 2, 4]))
    name, table, manifest = gather.gather(parts)
    with pytest.raises(UserError, match=r"has the key .*'p3'.* more than once"):
        write_table(tmp_path / "out.parquet", name, table, **manifest)


def test_a_shard_is_not_taken_for_the_table(parts: list[Path]) -> None:
    with pytest.raises(UserError, match="is the shard 1-of-3 of a table: gather all its shards first"):
        read_table(parts[0], "scores")


def test_gathering_starts_without_torch() -> None:
    code = "import sys, prefopt.store.gather; print(sorted({'torch', 'transformers', 'scipy'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
