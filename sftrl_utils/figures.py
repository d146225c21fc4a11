"""Every plot of the book, in seaborn: one function, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sftrl_utils.corpora import Corpus
from sftrl_utils.records import base_metrics, second_stage
from sftrl_utils.stages import Stage

LABELS = {
    "sft_loss": "SFT loss (nats per response token)",
    "mean_reward": "mean reward (exact mean@1)",
    "mcc": "MCC of the greedy answer",
    "acceptable_rate": "share answered acceptable",
    "kl_start": "KL to the stage's start (nats per response)",
    "entropy": "entropy (nats per response)",
}
SPLIT_NAMES = {"train": "train", "dev": "dev", "heldout": "held-out"}
PIPELINE_NAMES = {
    "sft_then_rl": "RL after SFT",
    "rl_then_sft": "SFT after RL",
    "sft_then_sft": "control: more SFT instead",
    "rl_then_rl": "control: more RL instead",
}


def use_style() -> None:
    """The book's look: white grid, a palette that colour-blind readers can tell apart, vector output."""
    sns.set_theme(style="whitegrid", palette="colorblind", context="notebook")
    plt.rcParams.update({"figure.figsize": (7.0, 4.0), "figure.constrained_layout.use": True, "savefig.dpi": 144})


def curves(stages: Stage | Sequence[Stage], metrics: Sequence[str], splits: Sequence[str] = ("train", "dev")) -> Figure:
    """One panel per metric: its course over the update steps of `stages`, run one after the other."""
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    use_style()
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.6), squeeze=False)
    table, boundaries = _joined(stages)
    for axis, metric in zip(axes[0], metrics, strict=True):
        columns = {f"{metric}_{split}": SPLIT_NAMES[split] for split in splits}
        long = table.melt("step", list(columns), "split", metric).replace({"split": columns})
        sns.lineplot(long, x="step", y=metric, hue="split", style="split", markers=True, ax=axis)
        for boundary in boundaries:
            axis.axvline(boundary, color="0.3", linestyle=":", label="stage boundary")
        if boundaries:
            base = table[f"{metric}_dev"].iloc[0]
            axis.axhline(base, color="0.5", linestyle="--", linewidth=1, label="base model, dev")
        axis.set(xlabel="update step", ylabel=LABELS[metric])
        axis.legend(title=None)
    plt.close(figure)
    return figure


def reward_references(figure: Figure, corpus: Corpus, panel: int) -> Figure:
    """Draw into panel `panel` what the corpus's known q says is reachable: the Bayes and the calibrated reward."""
    dev = corpus.summary().loc["dev"]
    if dev.isna().any():  # a corpus whose q nobody knows
        return figure
    axis = figure.axes[panel]
    axis.axhline(dev["bayes_reward"], color="0.2", linestyle="-.", linewidth=1, label="likelier answer, dev")
    axis.axhline(dev["calibrated_reward"], color="0.2", linestyle=":", linewidth=1, label="answers drawn from q, dev")
    axis.legend(title=None)
    return figure


def seeds_figure(store: Path, pipelines: Sequence[str], metric: str, split: str, preset: str = "tiny") -> Figure:
    """Course of `metric` during the last stage of each pipeline: mean over seeds and its 95 % interval."""
    use_style()
    parts = [second_stage(store, name, preset).assign(stage=PIPELINE_NAMES[name]) for name in pipelines]
    table, column = pd.concat(parts, ignore_index=True), f"{metric}_{split}"
    figure, axis = plt.subplots()
    sns.lineplot(
        table, x="step", y=column, hue="stage", style="stage", markers=True, errorbar=("ci", 95), seed=0, ax=axis
    )
    base = base_metrics(store, preset)[column]
    axis.axhline(base, color="0.5", linestyle="--", linewidth=1, label="base model")
    axis.set(xlabel="update step of the second stage", ylabel=f"{LABELS[metric]}, {SPLIT_NAMES[split]}")
    axis.legend(title=None)
    plt.close(figure)
    return figure


def _joined(stages: list[Stage]) -> tuple[pd.DataFrame, list[int]]:
    """Metrics of successive stages on one step axis, and the steps at which one stage follows another."""
    tables, boundaries, offset = [], [], 0
    for stage in stages:
        tables.append(stage.metrics.assign(step=stage.metrics["step"] + offset))
        offset += int(stage.metrics["step"].iloc[-1])
        boundaries.append(offset)
    return pd.concat(tables, ignore_index=True), boundaries[:-1]
