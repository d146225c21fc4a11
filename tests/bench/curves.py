"""Do both trainers learn alike? `python tests/bench/curves.py` trains SFT and GRPO from the base model, seeds 0 to 4.

Once with the prefix shared, once as plain TRL, all other settings the same, into `_build/curves/`; what is trained
already is loaded. Prints for each pipeline and metric of the dev split: the largest difference of the means over seeds
at any evaluation, beside the seeds' standard deviation there, and the smallest p of Welch's t over the evaluations,
Bonferroni-adjusted (which is the smallest of Holm's).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from sftrl_utils import stages, training
from sftrl_utils.config import RunConfig
from sftrl_utils.records import second_stage

ROOT = Path(__file__).parent.parent.parent
PIPELINES = ("sft", "grpo")
SEEDS = range(5)
METRICS = ("sft_loss_dev", "mean_reward_dev", "mcc_dev", "kl_start_dev")


def train(store: Path, shared_prefix: bool) -> Path:
    """Every pipeline and seed at the default preset, into `store`."""
    trainers = {
        name: partial(getattr(training, name), shared_prefix=shared_prefix)
        for name in ("PrefixSharingSFTTrainer", "PrefixSharingGRPOTrainer")
    }
    with mock.patch.multiple(training, **trainers):
        for seed in SEEDS:
            for pipeline in PIPELINES:
                stages.train_pipeline(RunConfig.from_parameters({"seed": seed, "out_dir": str(store)}), pipeline)
    return store


def compare(one: Path, other: Path, preset: str = "tiny") -> pd.DataFrame:
    """One row a pipeline and metric."""
    rows = []
    for pipeline in PIPELINES:
        tables = [second_stage(store, pipeline, preset) for store in (one, other)]
        for metric in METRICS:
            curves = [table.pivot(index="seed", columns="step", values=metric).to_numpy()[:, 1:] for table in tables]
            apart = np.abs(curves[0].mean(0) - curves[1].mean(0))
            spread = np.sqrt((curves[0].var(0, ddof=1) + curves[1].var(0, ddof=1)) / 2)
            at = (apart / spread).argmax()
            p = ttest_ind(*curves, equal_var=False).pvalue
            row = {"pipeline": pipeline, "metric": metric, "largest difference": apart[at]}
            rows.append(row | {"standard deviation there": spread[at], "least p, adjusted": min(1.0, len(p) * p.min())})
    return pd.DataFrame(rows).set_index(["pipeline", "metric"])


if __name__ == "__main__":
    folder = ROOT / "_build" / "curves"
    print(compare(train(folder / "shared", True), train(folder / "plain", False)).round(4).to_string())
