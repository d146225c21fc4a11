"""What training costs: published rows of `make bench`, beside plain TRL and the targets that were set."""

from __future__ import annotations

import json

import pandas as pd

from sftrl_utils.config import data_dir

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


def benchmark() -> pd.DataFrame:
    """Published rows of `make bench`, one a device and case: seconds, ratios to plain TRL, memory in MB."""
    files = sorted((data_dir() / "results" / "bench").glob("*.json"))
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
