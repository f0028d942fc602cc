"""What trainers logged, as the event files that TensorBoard reads (`python -m prefopt export tensorboard`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from prefopt.analysis.training_curves import Metrics, read_metrics
from prefopt.errors import UserError
from prefopt.store.files import atomic_directory

_CHECKPOINTS = "checkpoint_*/facts.json"  # below the folder of a training that has not ended


def trainings(source: Path) -> dict[str, tuple[Metrics, float]]:
    """Metrics of every trainer below a folder by its path there, "tldr/dpo" say, and when they were written.

    Args:
        source: `results/training` or a folder above or below it, a file of it, or `work`, where the last checkpoint of a
            training that has not ended holds its metrics so far.

    Raises:
        UserError: there is none, or a file holds something else.
    """
    if source.is_file():
        return {source.stem: (read_metrics(source), source.stat().st_mtime)}
    found: dict[str, tuple[Metrics, float]] = {}
    for path in source.rglob("*.jsonl"):
        found[str(path.relative_to(source).with_suffix(""))] = (read_metrics(path), _written(path))
    # A training whose values were changed has left its checkpoint: the newest counts.
    for path in sorted(source.rglob(_CHECKPOINTS), key=_written):
        if metrics := _metrics_so_far(path):
            found[str(path.parents[2].relative_to(source))] = (metrics, _written(path))
    if not found:
        raise UserError(
            f"{source} holds no metrics: name results/training, or work once a training has saved a checkpoint."
        )
    return found


def write_events(found: Mapping[str, tuple[Metrics, float]], out: Path) -> None:
    """Writes a folder for TensorBoard's `--logdir`.

    Each trainer and split is a run of TensorBoard's, each figure a tag, so that training and validation share a chart. All
    points of a trainer have the time at which its metrics were written.

    Args:
        found: by trainer's name, its metrics and that time, in seconds since the epoch.
        out: folder that is made, or replaced.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("Event files are written by TensorBoard's own code: pip install tensorboard.") from error
    with atomic_directory(out) as folder:
        for name, (metrics, written) in found.items():
            for split in dict.fromkeys(row["split"] for row in metrics):
                with SummaryWriter(str(folder / name / split)) as writer:
                    for row in metrics:
                        if row["split"] == split:
                            for tag, value in row.items():
                                if tag != "step" and isinstance(value, int | float):
                                    writer.add_scalar(tag, value, row["step"], walltime=written)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # a checkpoint that its trainer has just replaced


def _metrics_so_far(path: Path) -> Metrics:
    """Those that a checkpoint's facts hold; none where it has just been replaced."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return facts.get("metrics", []) if isinstance(facts, dict) else []
