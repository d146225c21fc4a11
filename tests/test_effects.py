"""Changes over seeds and their intervals."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from sftrl_utils import corpora, effects, figures, records, sources, stages
from sftrl_utils.config import RunConfig

CHANGES = st.lists(st.integers(-1000, 1000).map(lambda n: n / 100), min_size=3, max_size=8)


@pytest.fixture(scope="module")
def three_seeds(small_config):
    for seed in range(3):
        for pipeline in ("sft_then_rl", "sft_then_sft"):
            stages.train_pipeline(small_config.model_copy(update={"seed": seed}), pipeline)
    return small_config.out_dir


@given(CHANGES)
def test_the_interval_is_student_s_and_around_the_mean(values):
    mean, low, high = effects.mean_change(values)
    assert mean == pytest.approx(np.mean(values))
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    assert (high - mean, mean - low) == pytest.approx((half, half), abs=1e-9 * max(1, np.abs(values).max()))


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for sample in rng.normal(1.0, 2.0, size=(200, 20)):
        _, low, high = effects.mean_change(sample)
        hits += low <= 1.0 <= high
    assert 170 <= hits <= 199


def test_shifting_the_data_shifts_the_interval():
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.4])
    shifted = np.subtract(effects.mean_change(values + 3), effects.mean_change(values))
    assert shifted == pytest.approx([3, 3, 3])


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        effects.mean_change([0.3])


def test_the_seed_table_holds_start_end_and_change(three_seeds):
    table = effects.seed_table(three_seeds, "sft_then_rl", ["sft_loss_dev", "mcc_dev"], "smoke")
    assert list(table.index) == ["0", "1", "2", "mean"]
    runs = records.runs_table(three_seeds)
    for seed in range(3):
        row = runs[(runs["pipeline"] == "sft_then_rl") & (runs["seed"] == seed)].iloc[0]
        start, end = table.loc[str(seed), "sft_loss_dev"][["start", "end"]]
        assert (start, end) == pytest.approx((row["sft_loss_dev_start"], row["sft_loss_dev_end"]))
    pd.testing.assert_series_equal(table.loc["mean"], table.iloc[:3].mean(), check_names=False)


def test_change_intervals_hold_the_paired_difference_to_the_control(three_seeds):
    table = effects.change_intervals(three_seeds, "sft_then_rl", "sft_then_sft", ["sft_loss_dev"], "smoke")
    changes = [
        effects.seed_table(three_seeds, name, ["sft_loss_dev"], "smoke")[("sft_loss_dev", "change")].drop("mean")
        for name in ("sft_then_rl", "sft_then_sft")
    ]
    first, difference = (table.loc[(name, "sft_loss_dev")] for name in ("sft_then_rl", "difference"))
    assert first["rose"] == (changes[0] > 0).sum() and first["seeds"] == 3
    assert first["change"] == pytest.approx(changes[0].mean())
    assert difference["change"] == pytest.approx((changes[0] - changes[1]).mean())
    assert difference["low"] <= difference["change"] <= difference["high"]


def test_a_second_stage_for_one_seed_or_none_is_refused(three_seeds, tmp_path):
    with pytest.raises(LookupError, match="no valid stage with pipeline='sft_then_rl'"):
        effects.seed_table(tmp_path, "sft_then_rl", ["sft_loss_dev"], "smoke")
    records.publish(three_seeds, tmp_path)
    first = next(path for path in records.finished_stages(tmp_path) if path.name.startswith("sft"))
    shutil.copytree(first, tmp_path / "sft-copy")
    record = json.loads((first / "record.json").read_text()) | {"stage": "sft-copy"}
    (tmp_path / "sft-copy" / "record.json").write_text(json.dumps(record))
    with pytest.raises(LookupError, match="several stages"):
        effects.seed_table(tmp_path, records.read_record(first).pipeline, ["sft_loss_dev"], "smoke")


def test_an_invalid_stage_counts_for_nothing(three_seeds, tmp_path):
    records.publish(three_seeds, tmp_path)
    for path in records.finished_stages(tmp_path):
        record = json.loads((path / "record.json").read_text())
        if record["seed"] == 1:
            record["gates"]["finite_loss"] = "loss is not finite from step 3"
            (path / "record.json").write_text(json.dumps(record))
    assert list(effects.seed_table(tmp_path, "sft_then_rl", ["sft_loss_dev"], "smoke").index) == ["0", "2", "mean"]


def test_the_published_runs_cover_both_claims_and_rest_on_what_ships():
    published = effects.published_results()
    runs = records.runs_table(published)
    for pipeline in ("sft_then_rl", "rl_then_sft", "sft_then_sft", "rl_then_rl"):
        chosen = runs[(runs["pipeline"] == pipeline) & (runs["preset"] == "tiny") & (runs["beta"] == 0)]
        assert sorted(chosen["seed"]) == list(range(10))
        assert set(chosen["gates"]) == {"ok"}
    corpus = corpora.load_corpus(RunConfig.from_parameters({}))
    for path in records.finished_stages(published):
        record = records.read_record(path)
        assert record.key["corpus"] == corpus.revision
        if record.parent == "base":
            assert record.key["parent"] == sources.revision("embedded")


def test_the_proxy_table_holds_changes_of_both_rewards(small_config, tmp_path):
    config = small_config.model_copy(update={"sft_steps": 2, "rl_steps": 2, "out_dir": tmp_path})
    for share in (0.0, 0.5):
        for seed in (0, 1):
            stages.train_pipeline(config.model_copy(update={"seed": seed, "proxy_flipped": share}), "proxy_rl")
    table = effects.proxy_table(tmp_path, "smoke")
    assert list(table.index) == [0.0, 0.5] and (table["seeds"] == 2).all()
    runs = records.metrics_table(tmp_path, proxy_flipped=0.5)
    change = runs.groupby("seed")["mean_reward_dev"].agg(lambda part: part.iloc[-1] - part.iloc[0])
    assert table.loc[0.5, "gold_change"] == pytest.approx(change.mean())
    assert table.loc[0.5, "gold_low"] <= table.loc[0.5, "gold_change"] <= table.loc[0.5, "gold_high"]
    figure = figures.gold_and_proxy(tmp_path, "smoke")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["0% of the pairs flipped", "50% of the pairs flipped"]
    drawn = figure.axes[1].get_lines()[0].get_ydata()
    assert drawn[-1] == pytest.approx(runs.groupby("step")["mean_reward_dev"].mean().iloc[-1])


def test_the_judgement_follows_each_seed_from_the_base_to_the_end(three_seeds):
    table = effects.judged(three_seeds, "sft_then_rl", "smoke")
    assert list(table.columns) == ["base", "after stage 1", "after stage 2"]
    ends = records.second_stage(three_seeds, "sft_then_rl", "smoke").groupby("seed")["mean_reward_dev"]
    assert table.loc["mean_reward", "after stage 2"] == pytest.approx(ends.last().mean(), abs=1e-6)
    assert table.loc["mean_reward", "after stage 1"] == pytest.approx(ends.first().mean(), abs=1e-6)
    base = records.base_metrics(three_seeds, "smoke")["mean_reward_dev"]
    assert table.loc["mean_reward", "base"] == pytest.approx(base, abs=1e-6)


def test_what_stages_cost_is_counted_by_kind(three_seeds):
    table = records.costs_table(three_seeds)
    runs = [record for record in records.read_records(three_seeds) if record.kind == "grpo"]
    not_run = table.loc[("paper", "not run", "")]
    assert not_run["stages"] == 0 and np.isnan(not_run["wall_s"])
    [row] = [row for (preset, _, kind), row in table.iterrows() if (preset, kind) == ("smoke", "grpo")]
    assert row["stages"] == len(runs) and row["wall_s"] == np.median([record.wall_s for record in runs])


def test_intervals_leave_seeds_without_a_value_out():
    table = pd.DataFrame({"way": ["a"] * 4 + ["b"] * 2, "loss": [0.1, 0.2, 0.3, np.nan, np.nan, 0.5]})
    found = effects.intervals(table, "way", ["loss"])
    assert found.loc["a", ("loss", "seeds")] == 3 and found.loc["b", ("loss", "seeds")] == 1
    assert found.loc["a", "loss"][["mean", "low", "high"]].tolist() == pytest.approx(
        effects.mean_change([0.1, 0.2, 0.3])
    )
    assert np.isnan(found.loc["b", ("loss", "mean")])
