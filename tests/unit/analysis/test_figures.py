from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from made_up import words
from prefopt.analysis import figures, training_curves
from prefopt.analysis.figures import footnote, read_win_rates, win_rate_figure
from prefopt.analysis.style import display_name, line_styles, position_style
from prefopt.analysis.training_curves import read_metrics, training_figure
from prefopt.errors import UserError

MANIFEST: dict[str, Any] = {
    **words("tldr"),
    "judge": "oracle:embedded-v1",
    "test_prompts": 128,
    "synthetic": True,
    "recipe": {"confidence": 0.95},
}
RUNS = ["base", "sft", "preferred_ft", "dpo", "ppo", "best_of_128"]


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        {
            "task": "tldr",
            "run": run,
            "temperature": temperature,
            "selected": temperature == 0.5,
            "invalid": 0,
            "win_rate": rate,
            "ci_low": max(0.0, rate - 0.06),
            "ci_high": min(1.0, rate + 0.06),
            "band_low": max(0.0, rate - 0.08),
            "band_high": min(1.0, rate + 0.08),
            "flip_rate": float("nan"),
            "seed": 0,
            "judge": "oracle:embedded-v1",
        }
        for i, run in enumerate(RUNS)
        for temperature in (0.0, 0.5, 1.0)
        for rate in [0.05 + 0.11 * i]
    ]
    return pd.DataFrame(rows)


def texts(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text")))


def test_the_figure_names_runs_axes_judge_and_n(table: pd.DataFrame) -> None:
    figure = win_rate_figure(table, MANIFEST)
    shown = " ".join(texts(figure).split())
    for expected in (
        "DPO",
        "Best of 128",
        "Preferred-FT",
        "Sampling temperature",
        "Win rate against the reference summary",
        "oracle:embedded-v1",
        "128 test prompts",
        "Synthetic",
    ):
        assert expected in shown
    (axes,) = figure.axes
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in axes.lines)


@pytest.mark.parametrize(
    ("task", "against", "written"),
    [
        ("tldr", "the reference summary", "posts, references, preferences"),
        ("hh", "the chosen response", "dialogues, responses, preferences"),
        ("cnndm", "the reference summary", "articles, references"),
    ],
)
def test_nouns_are_the_tasks_own(table: pd.DataFrame, task: str, against: str, written: str) -> None:
    figure = win_rate_figure(table.assign(task=task), {**MANIFEST, **words(task)})
    assert figure.axes[0].get_ylabel() == f"Win rate against {against}"
    shown = " ".join(texts(figure).split())
    assert f"Synthetic: {written} and the judge are a program; no person was asked." in shown
    assert ("posts" in shown) == (task == "tldr") and ("summary" in shown) == (task in ("tldr", "cnndm"))


def test_what_takes_from_the_weight_stands_on_the_figure(table: pd.DataFrame) -> None:
    warnings = ["Only 8 test prompts: this tries the machinery and is no result.", "DPO wrote one text."]
    lost = "1,227 of 2,312 records of preferences (53%) are lost"
    manifest = {**MANIFEST, "synthetic": False, "warnings": warnings, "data_warnings": [lost]}
    figure = win_rate_figure(table, manifest)
    (box,) = [text for text in figure.axes[0].texts if "Only 8" in text.get_text()]
    assert box.get_text() == "\n".join(warnings) and box.get_bbox_patch() is not None
    assert f"{lost}." in " ".join(texts(figure).split()) and "Synthetic" not in texts(figure)


def test_each_seed_is_drawn_faintly(table: pd.DataFrame) -> None:
    by_seed = pd.concat(
        [table.assign(seed=seed, win_rate=table["win_rate"] + shift) for seed, shift in ((0, 0.02), (1, -0.02))]
    )
    figure = win_rate_figure(table, {**MANIFEST, "seeds": [0, 1]}, by_seed)
    faint = [line for line in figure.axes[0].lines if line.get_alpha() == 0.3]
    assert len(faint) == 2 * len(RUNS)
    assert faint[0].get_ydata().tolist() == pytest.approx([0.07] * 3) and faint[1].get_ydata()[0] == pytest.approx(0.03)
    assert "intervals over prompts and 2 seeds of training (faint: each of them)" in " ".join(texts(figure).split())


def test_a_name_is_no_formula(table: pd.DataFrame, tmp_path: Path) -> None:
    figure = win_rate_figure(table, {**MANIFEST, "judge": "chat:$\\frac{$/x@0", "warnings": ["$\\frac{$"]})
    figures.save(figure, tmp_path / "f.svg")
    assert "$\\frac{$" in texts(figure)


def test_points_do_not_lie_on_each_other(table: pd.DataFrame) -> None:
    (axes,) = win_rate_figure(table, MANIFEST).axes
    starts = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(set(starts)) == len(RUNS)
    assert max(map(abs, starts)) < 0.25


def test_names_keep_a_distance(table: pd.DataFrame) -> None:
    table["win_rate"] = 0.4
    (axes,) = win_rate_figure(table, MANIFEST).axes
    heights = sorted(t.get_position()[1] for t in axes.texts)
    assert len(heights) == len(RUNS)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.03


def test_twenty_runs_and_many_caveats_have_room(table: pd.DataFrame) -> None:
    many = [table[table["run"] == "dpo"].assign(run=f"run_{i}") for i in range(20)]
    figure = win_rate_figure(pd.concat(many), {**MANIFEST, "warnings": [f"Caveat {i}." for i in range(9)]})
    (axes,) = figure.axes
    inches = figure.get_figheight() * axes.get_position().height / (axes.get_ylim()[1] - axes.get_ylim()[0])
    heights = sorted(text.get_position()[1] * inches for text in axes.texts if text.get_text().startswith("run_"))
    assert len(heights) == 20 and min(b - a for a, b in itertools.pairwise(heights)) > 0.17
    assert heights[0] > 0 and heights[-1] < axes.get_ylim()[1] * inches
    # The title lies above the frame, and both within the figure.
    figure.draw_without_rendering()
    title = axes.title if axes.title.get_text() else axes._left_title  # type: ignore[attr-defined]
    (box,) = [text for text in axes.texts if text.get_text().startswith("Caveat")]
    assert box.get_window_extent().y1 < title.get_window_extent().y0
    assert title.get_window_extent().y1 < figure.bbox.height
    # Points of one temperature stay apart from those of the next.
    starts = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 3]
    assert len(set(starts)) == 20 and max(map(abs, starts)) < 0.25


@pytest.mark.parametrize("rate", [0.02, 0.98])
def test_names_of_lines_at_an_edge_stay_beside_the_axes_and_in_the_figure(table: pd.DataFrame, rate: float) -> None:
    many = [
        table[table["run"] == "dpo"].assign(run=f"a_run_with_a_long_name_{i:02d}", win_rate=rate) for i in range(12)
    ]
    figure = win_rate_figure(pd.concat(many), MANIFEST)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("a_run")]
    frame = axes.get_window_extent()
    assert len(boxes) == 12 and min(box.y0 for box in boxes) > frame.y0 and max(box.y1 for box in boxes) < frame.y1
    assert max(box.x1 for box in boxes) < figure.bbox.width


def test_missing_win_rates_and_one_temperature_are_drawn(table: pd.DataFrame) -> None:
    one = table[table["temperature"] == 0.5].copy()
    one.loc[one["run"] == "base", ["win_rate", "ci_low", "ci_high"]] = float("nan")
    win_rate_figure(one, MANIFEST)


def test_an_uninterpretable_judge_is_called_so(table: pd.DataFrame) -> None:
    judge = {
        "judge_accuracy": 0.52,
        "judge_accuracy_low": 0.45,
        "judge_accuracy_high": 0.59,
        "longer_wins_accuracy": 0.6,
        "interpretable": False,
    }
    manifest = {**MANIFEST, **judge, "synthetic": False}
    shown = texts(win_rate_figure(table, manifest))
    assert "Uninterpretable" in shown
    assert "52% [45%, 59%]" in shown
    assert "with 60%" in footnote(table, manifest)
    assert "Uninterpretable" not in texts(win_rate_figure(table, {**manifest, "interpretable": True}))
    skilled = {"judge_accuracy": 0.66, "judge_accuracy_low": 0.6, "judge_accuracy_high": 0.72}
    shown = " ".join(texts(win_rate_figure(table, {**manifest, **skilled})).split())
    assert (
        'is not surely above that of "the longer one wins", 60%; it needs more comparisons to learn from, or' in shown
    )
    assert "chance" not in shown
    shown = " ".join(texts(win_rate_figure(table, {**manifest, **skilled, "n_needed": 1234})).split())
    assert "it needs some 1,200 held-out comparisons, if it stays as good, or a better model" in shown


def test_invalid_verdicts_are_mentioned(table: pd.DataFrame) -> None:
    table.loc[0, "invalid"] = 7
    assert "7 invalid verdicts" in footnote(table, MANIFEST)


def test_no_two_of_many_lines_look_alike() -> None:
    styles = [position_style(position) for position in range(49)]
    assert len(set(styles)) == 49
    for part in ("color", "marker", "dashes"):
        assert len({getattr(style, part) for style in styles[:7]}) == 7


def test_no_two_of_the_papers_runs_share_marker_or_colour() -> None:
    styles = list(line_styles(RUNS).values())
    assert len({s.color for s in styles}) == len({s.marker for s in styles}) == len(RUNS)
    assert len({str(s.dashes) for s in styles}) == len(RUNS)
    assert display_name("best_of_64") == "Best of 64"


def test_the_stage_writes_the_same_bytes_twice(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "m.json").write_text(json.dumps(MANIFEST))
    parser = argparse.ArgumentParser()
    figures.add_arguments(parser)
    made = []
    for name in ("a", "b"):
        out = [str(tmp_path / f"{name}.{ending}") for ending in ("svg", "png", "pdf")]
        inputs = [
            "--win-rates",
            str(tmp_path / "t.csv"),
            "--by-seed",
            str(tmp_path / "t.csv"),
            "--manifest",
            str(tmp_path / "m.json"),
        ]
        figures.run(parser.parse_args([*inputs, "--out", *out]))
        made.append([Path(path).read_bytes() for path in out])
    assert made[0] == made[1]
    assert b"<dc:date>" not in made[0][0]
    assert made[0][1].startswith(b"\x89PNG") and made[0][2].startswith(b"%PDF")


def test_a_table_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: run the stage that makes it"):
        read_win_rates(tmp_path / "absent.csv")
    (tmp_path / "t.csv").write_text("task,run\n")
    with pytest.raises(UserError, match="lacks the column 'temperature'"):
        read_win_rates(tmp_path / "t.csv")


def metrics(**series: float) -> list[dict[str, Any]]:
    train = [{"step": s, "split": "train", "learning_rate": 1e-4, **series} for s in (1, 2, 3)]
    return [*train, {"step": 3, "split": "validation", **series}]


def titles(figure: Any) -> list[list[str]]:
    rows = [figure.axes[i : i + 4] for i in range(0, len(figure.axes), 4)]
    return [[axes.get_title(loc="left") for axes in row if axes.axison] for row in rows]


@pytest.mark.parametrize(
    ("synthetic", "title"), [(True, "Mine: training curves (synthetic records)"), (False, "Mine: training curves")]
)
def test_curves_say_whose_they_are_and_that_records_are_synthetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthetic: bool, title: str
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(training_curves, "save", lambda figure, path: drawn.append(figure))
    (tmp_path / "sft.jsonl").write_text("\n".join(map(json.dumps, metrics(loss=1.0))))
    (tmp_path / "summary.json").write_text(json.dumps({"synthetic": synthetic}))
    words = {"metrics": [tmp_path / "sft.jsonl"], "summary": tmp_path / "summary.json", "out": [tmp_path / "a.svg"]}
    training_curves.run(argparse.Namespace(**words, recipe='{"title": "Mine"}'))
    assert drawn[0].get_suptitle() == title


def test_other_seeds_of_a_trainer_are_drawn_faintly() -> None:
    figure = training_figure("TL;DR", {"sft": metrics(loss=1.0)}, {"sft": [metrics(loss=2.0), metrics(loss=3.0)]})
    faint = [line for line in figure.axes[0].lines if line.get_alpha() == 0.3]
    assert [line.get_ydata()[0] for line in faint] == [2.0, 3.0]


def test_a_row_of_panels_a_trainer() -> None:
    figure = training_figure(
        "TL;DR",
        {
            "sft": metrics(loss=1.0),
            "dpo": metrics(
                loss=0.69, margin=0.0, accuracy=0.5, chosen_logp=-40.0, rejected_logp=-41.0, chosen_reward=0.0
            ),
            "kto": metrics(loss=0.5, kl=0.0, kto_margin=0.0, kto_accuracy=0.5),
            "reward_model": metrics(loss=0.69, accuracy=0.5, margin=1.0),
            "ppo": metrics(reward=0.1, kl=0.0, clip_fraction=0.0, value_loss=1.0, loss=0.0, tokens=30.0),
        },
    )
    assert titles(figure) == [
        ["Loss", "Learning rate"],
        ["Loss", "Implicit reward margin", "Accuracy", "Log-probability"],
        ["Loss", "Margin of a label", "Accuracy", "KL to the reference"],
        ["Loss", "Accuracy", "Learning rate"],
        ["Reward", "KL to the reference", "Clip fraction", "Value loss"],
    ]
    for axes in figure.axes:
        if axes.axison:
            assert axes.get_xlabel()
            assert axes.get_ylabel()


def test_the_training_stage(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in metrics(loss=float("nan"))))
    parser = argparse.ArgumentParser()
    training_curves.add_arguments(parser)
    (tmp_path / "summary.json").write_text('{"synthetic": true}')
    made = []
    for name in ("a.svg", "b.svg"):
        about = ["--summary", str(tmp_path / "summary.json"), "--recipe", '{"title": "Mine"}']
        training_curves.run(parser.parse_args(["--metrics", str(path), *about, "--out", str(tmp_path / name)]))
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no metrics"), ("{\n", "line 1 is not JSON"), ('{"step": 1}\n', "line 1 lacks")],
)
def test_bad_metrics_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "dpo.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_metrics(path)


def test_the_flip_rate_of_both_orders_is_told_and_only_an_oracle_is_a_program(table: pd.DataFrame) -> None:
    chat = {**MANIFEST, "judge": "chat:m/tldr_simple@0", "synthetic": True}
    said = texts(win_rate_figure(table.assign(flip_rate=0.125), chat)).replace("\n", " ")
    assert "the judge changed its verdict in 12%" in said
    assert "posts, references, preferences are by a program" in said
