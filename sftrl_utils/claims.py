"""What result tables say: per-seed changes, their mean and its interval."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from sftrl_utils.config import data_dir
from sftrl_utils.records import PIPELINES, proxy_shares, reports, second_stage

# Ratios to tuned TRL that the trainers and the evaluation were built to reach, by case of `make bench`.
SPEED_TARGETS = {
    "grpo, smollm2, 40 + 2, G = 8": 10.0,
    "grpo, smollm2, 256 + 2, G = 8": 12.0,
    "grpo, tiny, 40 + 2, G = 8": 2.5,
    "sft, smollm2": 1.3,
    "sft, tiny": 1.3,
    "eval, smollm2": 3.0,
    "eval, smollm2, every metric": 3.0,
    "eval, tiny": 3.0,
    "eval, tiny, every metric": 3.0,
}


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
    """Mean over seeds and its 95 % BCa bootstrap interval, `(mean, low, high)`.

    `values`, shape (seeds,): paired changes; two or more, else `ValueError`. Equal values give a point
    interval. With five seeds the bootstrap is known to be too narrow: read it beside the count of seeds.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 values, got {len(values)}")
    if np.allclose(values, values[0], rtol=0, atol=1e-12):  # BCa is undefined there
        return float(values.mean()), float(values.min()), float(values.max())
    interval = bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def change_intervals(
    store: Path, pipeline: str, control: str | None, metrics: list[str], preset: str = "tiny", beta: float = 0.0
) -> pd.DataFrame:
    """Mean change of each metric over the last stage of `pipeline`, of its control, and their difference.

    The difference is paired by seed: it is what the kind of the second stage does, beyond there being one. Without a
    control (None) there is the change alone.
    One row per (stage, metric) with a 95 % BCa interval; `rose` counts the seeds with a positive change.
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


def benchmark() -> pd.DataFrame:
    """Published rows of `make bench`, one a device and case: seconds, ratios to plain TRL, memory in MB."""
    files = sorted((published_results() / "bench").glob("*.json"))
    rows = [row for path in files for row in json.loads(path.read_text(encoding="utf-8"))]
    return pd.DataFrame(rows).set_index(["device", "case"])


def speed_targets(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `benchmark` that were given a target ratio to tuned TRL: target, ratio with its range, floor, verdict."""
    targets = table.index.get_level_values("case").map(SPEED_TARGETS)
    rows = table[["ratio", "ratio_min", "ratio_max", "floor_ratio"]].assign(target=targets).dropna()
    return rows.assign(reached=rows["ratio"] >= rows["target"])


def step_profiles(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `benchmark` that were profiled: shares of a step's time by operation, and of all else.

    Only the costliest operations of a row are recorded: NaN says that this one is part of `all else`.
    """
    profiles = table["profile"].dropna()
    shares = pd.DataFrame(list(profiles), index=profiles.index)
    return shares.assign(**{"all else": 1 - shares.sum(axis=1)})


def step_seconds(table: pd.DataFrame) -> pd.DataFrame:
    """GRPO rows of `benchmark` as columns device, model, prompt_tokens, group_size, trainer and seconds a step."""
    cases = table.index.get_level_values("case").str.extract(r"grpo, (\w+), (\d+) \+ 2, G = (\d+)")
    cases.columns = ["model", "prompt_tokens", "group_size"]
    long = table.reset_index("device")[["device", "ours_s", "trl_tuned_s"]].reset_index(drop=True).join(cases).dropna()
    long = long.astype({"prompt_tokens": int, "group_size": int})
    long = long.rename(columns={"ours_s": "prefix shared", "trl_tuned_s": "tuned TRL"})
    return long.melt(["device", *cases.columns], var_name="trainer", value_name="seconds")
