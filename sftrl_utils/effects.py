"""What result tables say: per-seed changes, their mean and its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from sftrl_utils.config import data_dir
from sftrl_utils.records import PIPELINES, proxy_shares, reports, second_stage


def published_results() -> Path:
    """Store of the published stages (records and metrics, no weights)."""
    return data_dir() / "results"


def seed_table(store: Path, pipeline: str, metrics: list[str], preset: str = "tiny", beta: float = 0.0) -> pd.DataFrame:
    """One row per seed: each metric at the start and the end of the last stage of `pipeline`, and its change.

    Columns are a two-level index (metric, `start` | `end` | `change`). The last row, `mean`, is over seeds.
    """
    table = second_stage(store, pipeline, preset, beta).groupby("seed")[metrics]
    start, end = table.first(), table.last()
    parts = pd.concat({"start": start, "end": end, "change": end - start}, axis=1).swaplevel(axis=1)
    parts = parts[[(metric, part) for metric in metrics for part in ("start", "end", "change")]]
    parts.index = parts.index.astype(str)
    return pd.concat([parts, parts.mean().to_frame("mean").T]).rename_axis("seed")


def mean_change(values: np.ndarray | pd.Series) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, `(mean, low, high)`: Student's t on `values`, shape (seeds,).

    Two or more, else `ValueError`; equal values give a point interval. With a handful of seeds the bootstrap (BCa) is
    too narrow: of normal samples of 3, 5 and 10 it covers the mean in 73, 84 and 91 %, Student's in 95 %.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values, got {len(values)}")
    if np.allclose(values, values[0], rtol=0, atol=1e-12):  # no spread to divide by
        return float(values.mean()), float(values.min()), float(values.max())
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    return float(values.mean()), float(interval.low), float(interval.high)


def intervals(table: pd.DataFrame, by: str, columns: list[str]) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of each of `columns`, one row a value of `by`; seeds that are NaN are left out.

    Columns are a two-level index (column, `mean` | `low` | `high` | `seeds`).
    """
    rows = {}
    for value, part in table.groupby(by, sort=False):
        rows[value] = {}
        for column in columns:
            seeds = part[column].dropna()
            numbers = mean_change(seeds) if len(seeds) > 1 else (np.nan,) * 3
            rows[value] |= dict(zip(((column, name) for name in ("mean", "low", "high")), numbers, strict=True))
            rows[value][column, "seeds"] = len(seeds)
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis(by)
    found.columns = pd.MultiIndex.from_tuples(found.columns)
    return found


def change_intervals(
    store: Path, pipeline: str, control: str | None, metrics: list[str], preset: str = "tiny", beta: float = 0.0
) -> pd.DataFrame:
    """Mean change of each metric over the last stage of `pipeline`, of its control, and their difference.

    The difference is paired by seed: it is what the kind of the second stage does, beyond there being one. Without a
    control (None) there is the change alone.
    One row per (stage, metric) with a 95 % interval; `rose` counts the seeds with a positive change.
    """
    changes = {
        name: seed_table(store, name, metrics, preset, beta if _trains_rl(name) else 0.0)
        .drop("mean")
        .xs("change", axis=1, level=1)
        for name in (pipeline, control)
        if name
    }
    if control:
        changes["difference"] = changes[pipeline] - changes[control]
    rows = {
        (name, metric): [*mean_change(change[metric]), int((change[metric] > 0).sum()), len(change)]
        for name, change in changes.items()
        for metric in metrics
    }
    columns = ["change", "low", "high", "rose", "seeds"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["second stage", "metric"])
    return table


def _trains_rl(pipeline: str) -> bool:
    return any(set(kinds) - {"sft"} for kinds, name in PIPELINES.items() if name == pipeline)


def proxy_table(store: Path, preset: str = "tiny") -> pd.DataFrame:
    """What following a reward model does, by the share of preference pairs flipped before it learned.

    Means over seeds, on dev: accuracy of the reward model; change over the RL stage of the reward it gives (`proxy`)
    and of the verifier's (`gold`), each with its 95 % interval; MCC and acceptable rate at its end; how many seeds.
    """
    rows = {}
    for share in proxy_shares(store, preset):
        seeds = second_stage(store, "proxy_rl", preset, proxy_flipped=share).groupby("seed")
        row = {"proxy_accuracy": seeds["proxy_accuracy_dev"].first().mean()}
        for name, column in (("proxy", "proxy_reward_dev"), ("gold", "mean_reward_dev")):
            change = seeds[column].last() - seeds[column].first()
            row |= dict(zip((f"{name}_change", f"{name}_low", f"{name}_high"), mean_change(change), strict=True))
        row |= {name: seeds[f"{name}_dev"].last().mean() for name in ("mcc", "acceptable_rate")}
        rows[share] = row | {"seeds": len(seeds)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("flipped")


def judged(store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0) -> pd.DataFrame:
    """The harder judgement along `pipeline`, means over seeds: rows are metrics, columns the base and each stage."""
    table = reports(store, pipeline, preset, beta).groupby(["metric", "point"], sort=False)["value"].mean()
    return table.unstack("point").rename(columns={0: "base", 1: "after stage 1", 2: "after stage 2"})


def stage_ends(table: pd.DataFrame, pipeline: str) -> pd.DataFrame:
    """Rows of a sweep's table (`sweeps.results_table`) that are the last evaluation of a valid stage of `pipeline`.

    One row a stage: cells that share it are one training, not several.
    """
    rows = table[(table["pipeline"] == pipeline) & table["valid"]]
    return rows.sort_values("step", kind="stable").drop_duplicates("stage", keep="last").sort_index()
