"""The benchmark measures what it says, and the page on costs shows what it measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import bench  # noqa: E402

from sftrl_utils import costs, figures, records  # noqa: E402

FIELDS = {"case", "device", "ours_s", "trl_tuned_s", "trl_default_s", "ratio", "ratio_min", "ratio_max", "floor_ratio"}
FIELDS |= {"peak_rss_ours_mb", "peak_rss_plain_mb"}


def test_a_row_holds_medians_ratios_and_the_floor_of_its_case():
    settings = dict(kind="grpo", name="tiny", length=64, group_size=4, steps=3)
    row = bench.row("grpo, tiny", settings, ("tuned float32 in parts",), repeats=1)
    assert set(row) >= FIELDS and row["trl_default_s"] is None
    assert row["ratio"] == pytest.approx(row["trl_tuned_s"] / row["ours_s"]) == row["ratio_min"] == row["ratio_max"]
    # 16 rows of 64 + 2 tokens, sampled once and scored with a gradient; at least 4 prompts of 64, encoded once for
    # both, and 16 tokens that are sampled from and scored.
    assert row["floor_ratio"] == pytest.approx((16 * 65 + 3 * 16 * 66) / (3 * 4 * 64 + 4 * 16))
    assert row["tuned"] == "float32 in parts" and row["commit"] == records.git_commit()
    assert row["peak_rss_ours_mb"] > 100 and row["tokens_per_s"] > 0


def test_an_unknown_family_is_one_line():
    run = subprocess.run([sys.executable, ROOT / "tests/bench/bench.py", "sgd"], capture_output=True, text=True)
    assert run.returncode and run.stderr.startswith("bench: no case begins with sgd") and run.stderr.count("\n") == 1


def test_the_published_benchmark_has_every_field_and_feeds_the_page_on_costs():
    table = costs.benchmark()
    assert table.index.is_unique and {*table.columns, *table.index.names} >= FIELDS
    seconds = costs.step_seconds(table)
    assert {"tiny", "smollm2"} <= set(seconds["model"]) and seconds["seconds"].gt(0).all()
    device = seconds["device"].iloc[0]
    figure = figures.step_costs(seconds[seconds["device"] == device], "tiny")
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2 and list(lines[0].get_xdata()) == [4, 8, 16]
    assert "ms each" in figure.axes[0].get_legend().get_texts()[0].get_text()
