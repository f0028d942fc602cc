"""Data sets of a hub by configuration and split, and folders that `datasets` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.data.raw.hub import hub_rows, saved_rows
from prefopt.data.raw.limits import Limits
from prefopt.errors import UserError

MIB = 2**20
pytestmark = pytest.mark.usefixtures("offline")


def saved(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    return folder


def test_a_hubs_configuration_and_split_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    for kind in ("a", "b"):
        for split in ("train", "test"):
            (folder / kind / split).mkdir(parents=True)
            pq.write_table(
                pa.table({"text": [f"{kind} {split} {i}" for i in range(3)]}), folder / kind / split / "0.parquet"
            )
    kinds = [f"- config_name: {kind}\n  data_dir: {kind}\n" for kind in ("a", "b")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(kinds)}---\n")
    rows = list(hub_rows(str(folder), "b", split="test", exact=True))
    assert rows == [(f"{folder}/test:{i + 1}", {"text": f"b test {i}"}) for i in range(3)]
    (part,) = hub_rows(str(folder), "a", split="train[1:2]", exact=True)
    assert part == (f"{folder}/train[1:2]:1", {"text": "a train 1"})
    assert len(list(hub_rows(str(folder), "a", exact=True))) == 6
    for kind, split, problem in (
        (None, "train", "Config name is missing"),
        ("c", "train", "BuilderConfig 'c' not found"),
        ("a", "dev", 'Unknown split "dev"'),
    ):
        with pytest.raises(UserError, match=rf"own \(revision not pinned\) cannot be loaded \({problem}"):
            list(hub_rows(str(folder), kind, split=split, exact=True))


def test_a_folder_of_one_split_and_of_several(tmp_path: Path) -> None:
    several = saved(
        tmp_path / "several", train=[{"a": 1, "b": [{"c": "x"}]}], test=[{"a": 2, "b": []}, {"a": 3, "b": None}]
    )
    assert list(saved_rows(several)) == [
        (f"{several}/train:1", {"a": 1, "b": [{"c": "x"}]}),
        (f"{several}/test:1", {"a": 2, "b": []}),
        (f"{several}/test:2", {"a": 3, "b": None}),
    ]
    assert list(saved_rows(several, "test", lambda columns: columns[:1])) == [
        (f"{several}/test:1", {"a": 2}),
        (f"{several}/test:2", {"a": 3}),
    ]
    one = several / "train"
    assert [row["a"] for _, row in saved_rows(one)] == [1]
    assert [where for where, _ in saved_rows(one)] == [f"{one}:1"]


def test_a_folder_that_gives_no_records(tmp_path: Path) -> None:
    several = saved(tmp_path / "several", train=[{"a": 1}], test=[{"a": 2}])
    with pytest.raises(UserError, match=r"several has no split 'dev': name one of train, test\.$"):
        list(saved_rows(several, "dev"))
    with pytest.raises(
        UserError, match=r"train has no split 'train': it has one alone, so leave data\.records\.split out"
    ):
        list(saved_rows(several / "train", "train"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"empty is no folder that `datasets` has saved .*: name one, or files that end in"
    ):
        list(saved_rows(tmp_path / "empty"))
    (arrow,) = (several / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"several cannot be read to its end .*: replace the file"):
        list(saved_rows(several))


def test_a_folder_is_measured(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", train=[{"text": "a"}, {"text": "b" * MIB}])
    with pytest.raises(UserError, match=r"a/train:2: the record holds more than 1 MiB"):
        list(saved_rows(folder, limits=Limits(1, 9)))
    with pytest.raises(
        UserError, match=r"b/train: with this file the records hold more than 1 MiB after decompression"
    ):
        list(saved_rows(saved(tmp_path / "b", train=[{"text": "b" * (MIB // 2)}] * 3), limits=Limits(1, 1)))


def rewritten(folder: Path, table: pa.Table, **options: Any) -> None:
    """The table in the place of the folder's only file."""
    (arrow,) = (folder / "train").glob("*.arrow")
    with pa.ipc.new_stream(arrow, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)


ONE, MANY = pa.array(["b" * 9999]), pa.array(["b" * 9999] * 2**10)
RUNS = pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), pa.array(["b"]))


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (ONE, {"compression": "zstd"}),
        (ONE, {"compression": "lz4"}),
        (MANY.dictionary_encode(), {}),
        (RUNS, {}),
        (ONE.cast(pa.string_view()), {}),
        (pa.StructArray.from_arrays([pa.ListArray.from_arrays([0, 1], ONE.dictionary_encode())], ["x"]), {}),
    ],
    ids=["zstd", "lz4", "dictionary", "runs", "view", "within"],
)
def test_what_takes_few_bytes_and_is_unpacked_at_once_is_refused(
    tmp_path: Path, column: pa.Array, options: dict[str, Any]
) -> None:
    """`datasets` writes none of it."""
    folder = saved(tmp_path / "a", train=[{"text": "a"}])
    rewritten(folder, pa.table({"text": column}), **options)
    with pytest.raises(
        UserError, match=r"\.arrow holds compressed batches or packed columns, which are not read: save it"
    ):
        list(saved_rows(folder))
    rewritten(folder, pa.table({"text": ONE}))
    assert len(list(saved_rows(folder))) == 1


@pytest.mark.parametrize("fixed", [True, False])
def test_a_list_of_nothing_is_measured_before_it_is_decoded(tmp_path: Path, fixed: bool) -> None:
    nulls, size = pa.nulls(2**31 - 1), 2**31 - 1
    column = pa.FixedSizeListArray.from_arrays(nulls, size) if fixed else pa.ListArray.from_arrays([0, size], nulls)
    datasets.Dataset(pa.table({"text": column})).save_to_disk(tmp_path / "a")
    with pytest.raises(UserError, match=r"a:1: the record holds more than 16 MiB"):
        list(saved_rows(tmp_path / "a", limits=Limits(16, 99)))


def test_rows_are_numbered_on_where_a_batch_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.data.raw.columns._BATCH_BYTES", 2**21)
    texts = ["a" * (MIB * 9 // 10)] * 4 + ["b"]
    folder = saved(tmp_path / "a", train=[{"text": text, "of": [{"m": text[:3]}]} for text in texts])
    rows = list(saved_rows(folder, limits=Limits(1, 9)))
    assert [where.rpartition(":")[2] for where, _ in rows] == ["1", "2", "3", "4", "5"]
    assert [row["of"] for _, row in rows] == [[{"m": text[:3]}] for text in texts]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (
            '{"_data_files": [{"filename": "../other.arrow"}]}',
            r"names the file '\.\./other\.arrow', which is none of its",
        ),
        ('{"_data_files": [{"filename": "data.bin"}]}', r"names the file 'data\.bin', which is none of its folder"),
        ('{"_data_files": [{}]}', r"is no folder that `datasets` has saved \('filename'\)"),
        ('{"_data_files": 3}', "is no folder that `datasets` has saved"),
        ("[]", "is no folder that `datasets` has saved"),
        ("{", "cannot be read to its end"),
    ],
)
def test_a_folder_names_files_of_its_own(tmp_path: Path, state: str, problem: str) -> None:
    folder = saved(tmp_path / "a", train=[{"text": "a"}])
    (folder / "train" / "state.json").write_text(state)
    with pytest.raises(UserError, match=problem):
        list(saved_rows(folder))


def test_a_revision_is_asked_for_however_a_data_set_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    table = datasets.Dataset.from_list([{"a": 1}])

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        if "data_dir" in options:
            raise FileNotFoundError
        return datasets.DatasetDict({"train": table})

    def configurations(*args: Any, **options: Any) -> list[str]:
        asked.append((args, options))
        return ["comparisons", "axis"] if args[0] == "several" else ["default"]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", configurations)
    assert list(hub_rows("several", "comparisons", "abc")) == [("several/train:1", {"a": 1})]
    assert asked == [(("several",), {"revision": "abc"}), (("several", "comparisons"), {"revision": "abc"})]
    asked.clear()
    assert list(hub_rows("one", "posts", "abc")) == [("one/train:1", {"a": 1})]
    pinned = {"revision": "abc"}
    assert [options for _, options in asked] == [pinned, {"data_dir": "posts", **pinned}, pinned]
