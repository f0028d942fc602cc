"""The command that measures a GPU, at tiny sizes on a CPU: what it writes, of a section cut off too."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402


def test_a_ratio_is_the_median_of_the_rounds_and_too_wide_a_spread_tells_nothing() -> None:
    """By hand: 3/1, 4/2 and 8/2 are 3, 2 and 4, which are twice apart; 4.4/2 in place of the last is not so far."""
    wide = common.paired([3.0, 4.0, 8.0], [1.0, 2.0, 2.0])
    assert wide == {"median": 3.0, "spread": [2.0, 4.0], "can_be_told": False}
    assert common.told(wide) == "3.00 [2.00, 4.00]: too wide to tell, the machine was busy"
    close = common.paired([3.0, 4.0, 4.4], [1.0, 2.0, 2.0])
    assert close == {"median": 2.2, "spread": [2.0, 3.0], "can_be_told": True}
    assert common.told(close) == "2.20 [2.00, 3.00]"


def test_what_each_size_takes_stands_beside_its_operations() -> None:
    words = ["--sizes", "2", "--rounds", "1", "--threads", "1", "--width", "256", "--pairs", "1", "--prompt", "8"]
    command = [sys.executable, str(ROOT / "benchmarks" / "growth.py"), *words, "--completion", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = json.loads(done.stdout.strip().splitlines()[-1])
    kinds = ("pairs of a step: {}", "tokens of a prompt: {}", "width of the model: {}", "completions of a prompt: {}")
    sizes = ((4, 8), (32, 128), (256, 512), (1, 4))
    assert list(ratios) == [kind.format(size) for kind, of in zip(kinds, sizes, strict=True) for size in of]
    assert ratios["pairs of a step: 8"]["operations"] == pytest.approx(2)
    assert all(ratios[kind.format(of[0])]["operations"] == 1 for kind, of in zip(kinds, sizes, strict=True))
    assert all(ratios[kind.format(of[1])]["operations"] > 1.1 for kind, of in zip(kinds, sizes, strict=True))


def measured(out: Path, *options: str) -> str:
    """The report of `gpu.sh` with these options."""
    words = ["--device", "cpu", "--tiny", "--out", str(out), *options]
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "5", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-.+-abc123\.md", file.name)
    return file.read_text(encoding="utf-8")


def test_a_report_has_the_rates_and_an_update_of_ppo(tmp_path: Path) -> None:
    text = measured(tmp_path, "--commit", "abc123", "--sections", "card", "ppo")
    assert float(re.findall(r"products: ([\d.]+) TFLOP/s", text)[0]) > 0
    assert text.count("masked products") == 4, "no flash attention on a CPU"
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (first|second) ", line)]
    assert [int(row[3]) for row in rows] == [4 * 16 + 4 * 2 * 8] * 2
    assert all(abs(float(row[5]) - 1) < 0.02 for row in rows), "the policy that sampled is the one that learns"
    assert "Failed" not in text and "Cut off" not in text


def test_a_section_without_time_is_said_to_be_cut_off(tmp_path: Path) -> None:
    text = measured(tmp_path, "--commit", "abc123", "--sections", "card", "--minutes", "0.02")
    assert "Cut off: 1 s were left for it." in text
