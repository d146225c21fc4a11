"""Do two stores' learning curves agree within seed noise? `python tests/bench/curves.py STORE OTHER`.

For each pipeline and metric of the dev split: the largest difference of the means over seeds at any evaluation, beside
the seeds' standard deviation there, and the smallest p of Welch's t over the evaluations, Holm-adjusted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from sftrl_utils.records import PIPELINES, second_stage

METRICS = ("sft_loss_dev", "mean_reward_dev", "mcc_dev", "kl_start_dev")


def compare(one: Path, other: Path, preset: str = "tiny") -> pd.DataFrame:
    """One row a pipeline and metric."""
    rows = []
    for pipeline in PIPELINES.values():
        try:
            tables = [second_stage(store, pipeline, preset) for store in (one, other)]
        except LookupError:
            continue  # not in both
        for metric in METRICS:
            curves = [table.pivot(index="seed", columns="step", values=metric).to_numpy()[:, 1:] for table in tables]
            apart = np.abs(curves[0].mean(0) - curves[1].mean(0))
            spread = np.sqrt((curves[0].var(0, ddof=1) + curves[1].var(0, ddof=1)) / 2)
            at = (apart / spread).argmax()
            p = np.sort(ttest_ind(*curves, equal_var=False).pvalue)
            holm = min(1.0, (p * np.arange(len(p), 0, -1)).min())
            row = {"pipeline": pipeline, "metric": metric, "largest difference": apart[at]}
            rows.append(row | {"standard deviation there": spread[at], "least p (Holm)": holm})
    return pd.DataFrame(rows).set_index(["pipeline", "metric"])


if __name__ == "__main__":
    print(compare(*map(Path, sys.argv[1:3])).round(4).to_string())
