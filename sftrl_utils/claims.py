"""What result tables say: per-seed changes, their mean and its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from sftrl_utils.config import data_dir
from sftrl_utils.records import second_stage


def published_results() -> Path:
    """Store of the published stages (records and metrics, no weights)."""
    return data_dir() / "results"


def seed_table(store: Path, pipeline: str, metrics: list[str], preset: str = "tiny") -> pd.DataFrame:
    """One row per seed: each metric at the start and the end of the last stage of `pipeline`, and its change.

    Columns are a two-level index (metric, `start` | `end` | `change`). The last row, `mean`, is over seeds.
    """
    table = second_stage(store, pipeline, preset).groupby("seed")[metrics]
    start, end = table.first(), table.last()
    parts = pd.concat({"start": start, "end": end, "change": end - start}, axis=1).swaplevel(axis=1)
    parts = parts[[(metric, part) for metric in metrics for part in ("start", "end", "change")]]
    parts.index = parts.index.astype(str)
    return pd.concat([parts, parts.mean().to_frame("mean").T]).rename_axis("seed")


def mean_change(values: np.ndarray | pd.Series) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % BCa bootstrap interval, `(mean, low, high)`.

    `values`, shape (seeds,): paired changes. Needs two seeds or more; equal values give a point interval.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values, got {len(values)}")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0]), float(values[0])
    interval = bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def change_intervals(store: Path, pipelines: list[str], metrics: list[str], preset: str = "tiny") -> pd.DataFrame:
    """Mean change of each metric over the last stage of each pipeline, with interval.

    One row per (pipeline, metric); `rose` counts the seeds in which the metric rose.
    """
    rows = {}
    for pipeline in pipelines:
        table = seed_table(store, pipeline, metrics, preset).drop("mean")
        for metric in metrics:
            change = table[(metric, "change")]
            mean, low, high = mean_change(change)
            rows[pipeline, metric] = [mean, low, high, int((change > 0).sum()), len(change)]
    columns = ["change", "low", "high", "rose", "seeds"]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["pipeline", "metric"])
    return frame
