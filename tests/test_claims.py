"""Changes over seeds and their intervals."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils import claims, records, stages

CHANGES = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=3, max_size=8)


@pytest.fixture(scope="module")
def three_seeds(small_config):
    for seed in range(3):
        stages.train_pipeline(small_config.model_copy(update={"seed": seed}), "sft_then_rl")
    return small_config.out_dir


@given(CHANGES)
def test_the_interval_lies_within_the_data_and_around_the_mean(values):
    mean, low, high = claims.mean_change(values)
    assert mean == pytest.approx(np.mean(values))
    slack = 1e-9 * max(1, np.abs(values).max())
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for sample in rng.normal(1.0, 2.0, size=(200, 20)):
        _, low, high = claims.mean_change(sample)
        hits += low <= 1.0 <= high
    assert 170 <= hits <= 199


def test_shifting_the_data_shifts_the_interval():
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.4])
    shifted = np.subtract(claims.mean_change(values + 3), claims.mean_change(values))
    assert shifted == pytest.approx([3, 3, 3])


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        claims.mean_change([0.3])


def test_the_seed_table_holds_start_end_and_change(three_seeds):
    table = claims.seed_table(three_seeds, "sft_then_rl", ["sft_loss_dev", "mcc_dev"], "smoke")
    assert list(table.index) == ["0", "1", "2", "mean"]
    runs = records.runs_table(three_seeds)
    for seed in range(3):
        row = runs[(runs["pipeline"] == "sft_then_rl") & (runs["seed"] == seed)].iloc[0]
        start, end = table.loc[str(seed), "sft_loss_dev"][["start", "end"]]
        assert (start, end) == pytest.approx((row["sft_loss_dev_start"], row["sft_loss_dev_end"]))
    pd.testing.assert_series_equal(table.loc["mean"], table.iloc[:3].mean(), check_names=False)


def test_change_intervals_count_the_seeds_that_rose(three_seeds):
    table = claims.change_intervals(three_seeds, ["sft_then_rl"], ["sft_loss_dev"], "smoke")
    change = claims.seed_table(three_seeds, "sft_then_rl", ["sft_loss_dev"], "smoke")[("sft_loss_dev", "change")]
    row = table.loc[("sft_then_rl", "sft_loss_dev")]
    assert row["rose"] == (change.drop("mean") > 0).sum() and row["seeds"] == 3
    assert row["change"] == pytest.approx(change["mean"])


def test_the_published_runs_answer_both_claims():
    published = claims.published_results()
    runs = records.runs_table(published)
    for pipeline in ("sft_then_rl", "rl_then_sft", "sft_then_sft", "rl_then_rl"):
        chosen = runs[(runs["pipeline"] == pipeline) & (runs["preset"] == "tiny") & (runs["beta"] == 0)]
        assert sorted(chosen["seed"]) == [0, 1, 2, 3, 4]
        assert set(chosen["gates"]) == {"ok"}
