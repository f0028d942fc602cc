"""What a run goes on from: whole checkpoints of its own, read without running what stands in them."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import metadata as torch_metadata

from prefopt.errors import UserError
from prefopt.store.files import sha256_of_file
from prefopt.store.tables import write_table
from prefopt.training.checkpoint import RunFolder, TrainingState
from prefopt.training.checkpoint_files import _IndexUnpickler, require_own

IDENTITY = {"run": 1}
OBJECTIVES = [0.5, 0.9, 0.2]  # of steps 0, 1 and 2: the middle one is the best
SCORES = [{"prompt_id": "p", "temperature": 0.0, "sample_index": 0, "reward": 1.0}]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work" / "tldr" / "sft"


def opened(work: Path) -> RunFolder:
    return RunFolder(work, IDENTITY, needed_bytes=0)


def state_of(run: RunFolder) -> TrainingState:
    """A toy model, each of whose steps is one of AdamW's."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    state = TrainingState("toy", run, model, model, torch.optim.AdamW(model.parameters(), lr=0.1), keep="best")
    state.model = model  # type: ignore[attr-defined]
    return state


def train(work: Path, steps: int, finish: bool = False) -> list[float]:
    """Goes on to so many steps, with a checkpoint and a table after each; returns the weights."""
    with opened(work) as run:
        state = state_of(run)

        def evaluate() -> None:
            write_table(run.path / f"samples_{state.step}.parquet", "scores", SCORES)
            state.keep_if_best(OBJECTIVES[state.step])

        if state.step == 0:
            evaluate()
        model, optimizer = state.model, state._optimizer  # type: ignore[attr-defined]
        while state.step < steps:
            model(torch.tensor([[1.0, 2.0]])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            evaluate()
            state.save()
        if finish:
            state.finish()
        weights: list[float] = model.weight.flatten().tolist()
        return weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    weights = train(folder / "published", 2, finish=True)
    assert weights == train(folder / "best", 1) != train(folder / "last", 2)
    return weights


def run_folder(work: Path) -> Path:
    return opened(work).path


def last(work: Path, name: str) -> Path:
    return sorted(run_folder(work).glob(f"{name}_*"))[-1]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("damage", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "facts.json"])
def test_a_damaged_checkpoint(
    work: Path, undisturbed: list[float], file: str, damage: Any, fallback: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on from an older one, or else begins anew, and ends with the same weights."""
    train(work, 1)
    if fallback:  # as a kill leaves it that comes before the older one is removed
        older = shutil.copytree(last(work, "checkpoint"), work / "kept")
        train(work, 2)
        older.rename(run_folder(work) / "checkpoint_000000")
    path = last(work, "checkpoint")
    if damage is flip and file == "facts.json":
        (path / file).write_text("[]")
    else:
        damage(path / file)
    caplog.clear()
    assert train(work, 2, finish=True) == undisturbed
    resumed = [record.message for record in caplog.records if "resumed after step" in record.message]
    assert resumed == (["toy: resumed after step 1"] if fallback else [])
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    # Without facts a checkpoint was never finished, which is no damage.
    assert len(warned) == (0 if damage is Path.unlink and file == "facts.json" else 1)
    assert all(f"{path} is not whole (" in message for message in warned)
    assert len(list(run_folder(work).glob("checkpoint_*"))) == 1


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("INFO", "prefopt"):
        yield


@pytest.mark.parametrize("file", [None, "facts.json", "__0_0.distcp", ".metadata"])
def test_without_the_best_weights_that_its_facts_name_training_begins_anew(
    work: Path, undisturbed: list[float], file: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    train(work, 2, finish=True)  # killed before it is published
    best = last(work, "best")
    if file is None:
        shutil.rmtree(best)
    else:
        (best / file).unlink()
    assert train(work, 2, finish=True) == undisturbed
    assert (
        f"{run_folder(work)} is not whole (the best weights so far are not there): the training begins" in caplog.text
    )


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
def test_without_a_table_of_a_step_that_is_done_training_begins_anew(
    work: Path, undisturbed: list[float], damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train(work, 1)
    damage(run_folder(work) / "samples_0.parquet")
    assert train(work, 2, finish=True) == undisturbed
    assert "samples_0.parquet" in caplog.text and "the training begins anew" in caplog.text
    assert len(list(run_folder(work).glob("samples_*.parquet"))) == 3


def test_best_weights_of_a_run_that_never_saved_are_not_published(work: Path, undisturbed: list[float]) -> None:
    train(work, 0)
    assert last(work, "best") and not list(run_folder(work).glob("checkpoint_*"))
    assert train(work, 2, finish=True) == undisturbed


def test_a_deleted_run_leaves_nothing_but_its_lock(work: Path) -> None:
    train(work, 1)
    with opened(work) as run:
        run.delete()
    assert [path.name for path in work.iterdir()] == [f"{run.path.name}.lock"]
    with opened(work) as run:
        run.delete()
        run.delete()


def test_leftovers_of_the_dead_are_removed_by_the_next_run(work: Path) -> None:
    train(work, 1)
    dead = 2**22 + 1  # above the kernel's largest number
    shutil.copytree(run_folder(work), work / f".{run_folder(work).name}.{dead}.old")
    shutil.copytree(run_folder(work), work / f".another.{dead}.old")
    (run_folder(work) / f".facts.json.{dead}.tmp").write_text("half")
    alive = work / f".another.{os.getppid()}.old"
    alive.mkdir()
    train(work, 1)
    assert {path.name for path in work.iterdir()} == {
        run_folder(work).name,
        f"{run_folder(work).name}.lock",
        alive.name,
    }
    assert not list(run_folder(work).glob(".*"))


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self._sign = sign

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._sign}",)


def replant(folder: Path) -> None:
    """Makes the facts agree with the files, as whoever plants them would."""
    facts = json.loads((folder / "facts.json").read_text())
    facts["files"] = {path.name: sha256_of_file(path) for path in folder.iterdir() if path.name != "facts.json"}
    (folder / "facts.json").write_text(json.dumps(facts))


def planted_index(folder: Path, sign: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Planted(sign)))


def planted_in_the_index(folder: Path, sign: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = Planted(sign)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def planted_no_index(folder: Path, sign: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))


def another_place(folder: Path, sign: Path) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = f"../{folder.name}/{place.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (planted_index, "it names posix.system, which no checkpoint holds"),
        (planted_in_the_index, "it names posix.system, which no checkpoint holds"),
        (planted_no_index, "UnpicklingError: it is no index of a checkpoint"),
        (another_place, "it leads to '../checkpoint_000000/__0_0.distcp'"),
    ],
)
def test_an_index_that_was_planted_runs_nothing(
    work: Path, undisturbed: list[float], plant: Any, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(work, 1)
    plant(last(work, "checkpoint"), tmp_path / "sign")
    replant(last(work, "checkpoint"))
    assert train(work, 2, finish=True) == undisturbed
    assert why in caplog.text and not (tmp_path / "sign").exists()


class Asked:
    """An attribute that is asked for on unpickling, as Python 3.11.2 writes an enum's member."""

    def __init__(self, of: Any, name: str) -> None:
        self._asked = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._asked


def test_an_index_that_an_early_python_3_11_wrote_is_read() -> None:
    formats = torch_metadata._MEM_FORMAT_ENCODING
    written = pickle.dumps([Asked(formats, one.name) for one in formats])
    assert _IndexUnpickler(io.BytesIO(written)).load() == list(formats)
    for of, name in ((formats, "__init__"), (formats, "mro"), (torch_metadata.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match=f"for {name!r}, which no checkpoint does"):
            _IndexUnpickler(io.BytesIO(pickle.dumps(Asked(of, name)))).load()


def test_a_value_that_was_planted_runs_nothing(work: Path, tmp_path: Path) -> None:
    """Learning rate and betas lie in the checkpoint as pickles too."""
    with opened(work) as run:
        run.save("checkpoint", {"optimizer": {"lr": 0.1}}, {})
        read: dict[str, Any] = {"optimizer": {"lr": 0.0}}
        run.load("checkpoint", read)
        assert read == {"optimizer": {"lr": 0.1}}
        run.save("checkpoint", {"optimizer": {"lr": Planted(tmp_path / "sign")}}, {})
        with pytest.raises(UserError, match=r"checkpoint_000001 cannot be read \(.*delete .* and run its stage again"):
            run.load("checkpoint", read)
    assert not (tmp_path / "sign").exists()


def test_a_checkpoint_that_holds_something_else_is_one_sentence(work: Path) -> None:
    with opened(work) as run:
        run.save("checkpoint", {"a": torch.ones(2)}, {})
        with pytest.raises(UserError, match=r"checkpoint_000000 cannot be read \(.*delete .* and run its stage again"):
            run.load("checkpoint", {"b": torch.ones(2)})


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_a_run_makes_is_its_own_under_every_umask(work: Path, undisturbed: list[float], umask: int) -> None:
    before = os.umask(umask)
    try:
        train(work, 1)
        assert train(work, 2, finish=True) == undisturbed
        assert run_folder(work).stat().st_mode & 0o777 == 0o700
        assert all(folder.stat().st_mode & 0o022 == 0 for folder in (work, *list(work.parents)[:2]))
    finally:
        os.umask(before)


@pytest.mark.parametrize("place", ["work", "work/tldr", "work/tldr/sft", "run", "run/checkpoint", "run/facts"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, work: Path, place: str, mode: int) -> None:
    train(work, 1)
    folder = run_folder(work)
    folder.chmod(0o755)
    places = {"run": folder, "run/checkpoint": last(work, "checkpoint")}
    places["run/facts"] = places["run/checkpoint"] / "facts.json"
    path = places.get(place, tmp_path / place)
    path.chmod(path.stat().st_mode | mode)
    refused = rf"^{path} may be written by others \(mode .*\), .*run `chmod -R go-w {tmp_path / 'work'}` if you trust"
    with pytest.raises(UserError, match=refused):
        train(work, 2)
    (tmp_path / "work").chmod(0o700)  # as the sentence says, here by hand
    for entry in (tmp_path / "work").rglob("*"):
        entry.chmod(entry.stat().st_mode & ~0o022)
    train(work, 2)


def test_above_work_nothing_is_looked_at(tmp_path: Path, work: Path) -> None:
    tmp_path.chmod(0o777)
    train(work, 1)


@pytest.mark.parametrize("place", ["work", "run", "checkpoint", "facts"])
def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, work: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(work, 1)
    folder = run_folder(work)
    places = {"work": tmp_path / "work", "run": folder, "checkpoint": last(work, "checkpoint")}
    path = places.get(place, last(work, "checkpoint") / "facts.json")
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        who = path
    else:  # all is another's in the eyes of a user 12345
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        who = folder
    with pytest.raises(UserError, match=rf"^{who} belongs to the user .*, who could change what training goes on from"):
        train(work, 2)


def test_what_is_roots_is_taken(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_root(real: Any) -> Any:
        def stat(*args: Any, **options: Any) -> os.stat_result:
            found = list(real(*args, **options))
            found[4] = 0  # st_uid
            return os.stat_result(found)

        return stat

    train(work, 1)
    monkeypatch.setattr(Path, "stat", of_root(Path.stat))
    monkeypatch.setattr(Path, "lstat", of_root(Path.lstat))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    require_own(run_folder(work))


def test_links_inside_are_refused_and_a_link_of_work_itself_is_not(tmp_path: Path, work: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "work").symlink_to(tmp_path / "disk")
    train(work, 1)
    (tmp_path / "disk").chmod(0o777)
    with pytest.raises(UserError, match=r"work may be written by others \(mode 777\)"):
        train(work, 1)
    (tmp_path / "disk").chmod(0o755)
    facts = last(work, "checkpoint") / "facts.json"
    facts.rename(tmp_path / "facts.json")
    facts.symlink_to(tmp_path / "facts.json")
    with pytest.raises(UserError, match=rf"^{facts} is a link, which no run makes"):
        train(work, 1)
    folder = run_folder(work)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"^{folder} is a link, which no run makes"):
        require_own(folder)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_training_goes_on_and_says_so(
    work: Path, undisturbed: list[float], number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    assert train(work, 2, finish=True) == undisturbed
    assert "has no locks" in caplog.text and str(work) in caplog.text


def test_a_run_that_another_process_holds(work: Path) -> None:
    with opened(work), pytest.raises(UserError, match="is in use by another training process"), opened(work):
        pass


def test_a_file_in_the_place_of_work(tmp_path: Path, work: Path) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(UserError, match=r"sft cannot be used for checkpoints \(Not a directory\): choose another"):
        train(work, 1)
