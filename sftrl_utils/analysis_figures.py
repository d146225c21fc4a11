"""Plots of what the analysis finds, in seaborn: one function, one figure."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sftrl_utils.figures import LABELS, SPLIT_NAMES, use_style


def plane(ends: pd.DataFrame, corner: pd.DataFrame) -> Figure:
    """Where each method ends in the plane (expected reward, SFT loss): `analysis.plane` and `analysis.frontier_line`.

    A small dot is a seed, a large one their mean; lower and further right is better, below the line is impossible.
    """
    use_style()
    figure, axis = plt.subplots(figsize=(8.0, 5.0))
    axis.plot(corner["reward"], corner["loss"], color="0.2", label="frontier of all policies")
    axis.plot(*corner[["reward", "loss"]].iloc[0], "*", color="0.2", markersize=14, label="the data, q")
    means = ends.groupby("method", sort=False)[["reward", "loss"]].mean()
    palette = dict(zip(means.index, sns.color_palette("colorblind", len(means)), strict=True))
    markers = ["o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "d"]
    for (name, mean), marker in zip(means.iterrows(), markers * 2, strict=False):
        seeds = ends[ends["method"] == name]
        axis.plot(seeds["reward"], seeds["loss"], marker, color=palette[name], markersize=3, alpha=0.6)
        axis.plot(mean["reward"], mean["loss"], marker, color=palette[name], markersize=9, label=name)
    top = ends["loss"].max() + 0.1 * (ends["loss"].max() - corner["loss"].min())  # the line goes up for ever
    axis.set(xlabel="expected reward, dev", ylabel="SFT loss, dev (nats per response)", ylim=(None, top))
    axis.legend(title=None, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


def predicted_losses(table: pd.DataFrame) -> Figure:
    """SFT loss after RL over β, measured and predicted: `analysis.loss_predictions`; mean over seeds, 95 % interval."""
    use_style()
    names = {
        "measured": "trained",
        "fitted": "Gibbs policy of the fitted duration",
        "fixed_point": "GRPO's fixed point",
        "gibbs": "Gibbs policy of 1/β",
    }
    long = table.melt(["beta", "seed"], list(names), "loss").replace({"loss": names}).dropna()
    figure, axis = plt.subplots()
    sns.lineplot(
        long, x="beta", y="value", hue="loss", style="loss", markers=True, errorbar=("ci", 95), seed=0, ax=axis
    )
    axis.axhline(table["before"].mean(), color="0.5", linestyle="--", linewidth=1, label="after SFT, before RL")
    least = table["beta"][table["beta"] > 0].min()
    axis.set_xscale("symlog", linthresh=least)  # 0 is among the values
    axis.set(xlabel="β", ylabel="SFT loss, dev (nats per response)", yscale="log", xlim=(-least / 4, None))
    axis.legend(title=None)
    plt.close(figure)
    return figure


def loss_along_rl(runs: pd.DataFrame, stops: pd.DataFrame) -> Figure:
    """SFT loss on dev over RL steps, one line a seed; dots where T2's rule stops, rings where the loss is least.

    `runs` are evaluations of `sft_then_rl`, `stops` is `analysis.stopping_steps`.
    """
    use_style()
    figure, axis = plt.subplots()
    palette = dict(zip(stops.index, sns.color_palette("colorblind", len(stops)), strict=True))
    for seed, part in runs.sort_values("step").groupby("seed"):
        line = part.groupby("step")["sft_loss_dev"].first()
        axis.plot(line.index, line, color=palette[seed], linewidth=1)
        for column, style in (("predicted", {"marker": "o"}), ("measured", {"marker": "o", "fillstyle": "none"})):
            step = stops.loc[seed, column]
            if np.isfinite(step):
                axis.plot(step, line.loc[step], color=palette[seed], markersize=9, linestyle="", **style)
    axis.plot([], [], "o", color="0.3", label="the model's reward reaches the data's")
    axis.plot([], [], "o", color="0.3", fillstyle="none", label="least SFT loss")
    axis.set_xscale("symlog", linthresh=10)
    axis.set(xlabel="RL update step", ylabel=LABELS["sft_loss"] + ", dev", xlim=(0, None))
    axis.legend(title=None)
    plt.close(figure)
    return figure


def gradient_cosines(table: pd.DataFrame, labels: str = "population") -> Figure:
    """Cosine of −∇L and ∇R over RL steps, by layer: `analysis.gradient_cosines`; mean over seeds, 95 % interval."""
    use_style()
    chosen = table[table["labels"] == labels]
    figure, axis = plt.subplots()
    sns.lineplot(
        chosen, x="rl_steps", y="cosine", hue="layer", style="layer", markers=True, errorbar=("ci", 95), seed=0, ax=axis
    )
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set_xscale("symlog", linthresh=10)
    axis.set(xlabel="RL update step", ylabel="cosine of −∇L and ∇R", ylim=(-1.05, 1.05), xlim=(-0.5, None))
    axis.legend(title=None, fontsize="small")
    plt.close(figure)
    return figure


def gradient_spectrum(before: pd.DataFrame, after: pd.DataFrame) -> Figure:
    """Spectrum of the gradients of the answers, and the energy of both objectives in its first k directions.

    `before` and `after` are rows of `spectra.parquet` (see `alignment.spectrum`) before and after RL, of several seeds.
    """
    use_style()
    figure, axes = plt.subplots(1, 3, figsize=(14.0, 3.8))
    long = pd.concat({"after SFT": before, "after RL": after}, names=["when"]).reset_index("when")
    for axis, (column, label) in zip(
        axes,
        {"eigenvalue": "eigenvalue of J Jᵀ", "energy_sft": "share of |∇L|²", "energy_rl": "share of |∇R|²"}.items(),
        strict=True,
    ):
        sns.lineplot(long, x="k", y=column, hue="when", style="when", errorbar=("ci", 95), seed=0, ax=axis)
        axis.set(xlabel="direction k" if column == "eigenvalue" else "first k directions", ylabel=label, xscale="log")
        axis.legend(title=None)
    axes[0].set_yscale("log")
    plt.close(figure)
    return figure


def effect_parts(parts: dict[str, pd.DataFrame], columns: Sequence[str]) -> Figure:
    """Stacked bars: how a change divides into `columns`, means over seeds; dots are the totals of single seeds."""
    use_style()
    figure, axis = plt.subplots(figsize=(7.0, 1.0 + 0.7 * len(parts)))
    for place, table in enumerate(parts.values()):
        ends = {1: 0.0, -1: 0.0}
        for column, color in zip(columns, sns.color_palette("colorblind"), strict=False):
            value = table[column].mean()
            side = 1 if value >= 0 else -1
            axis.barh(place, value, left=ends[side], color=color, label=None if place else column, height=0.6)
            ends[side] += value
        axis.plot(
            table["total"], np.full(len(table), place), "|", color="0.1", label=None if place else "total, one seed"
        )
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set(yticks=range(len(parts)), yticklabels=list(parts), ylim=(len(parts) - 0.5, -0.5))
    axis.legend(title=None, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


def phenomena(table: pd.DataFrame, column: str, label: str) -> Figure:
    """Change of `column` by phenomenon and split: `analysis.by_phenomenon`; mean over seeds, 95 % interval."""
    use_style()
    order = table.groupby("phenomenon", observed=True)[column].mean().sort_values().index
    figure, axis = plt.subplots(figsize=(7.5, 0.6 + 0.35 * len(order)))
    named = table.assign(split=table["split"].astype(str).map(SPLIT_NAMES))
    sns.pointplot(
        named, x=column, y="phenomenon", hue="split", order=order, errorbar=("ci", 95), seed=0, dodge=0.4,
        linestyle="none", markers=["o", "s", "D"], ax=axis,
    )  # fmt: skip
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set(xlabel=label, ylabel="")
    axis.legend(title=None)
    plt.close(figure)
    return figure


def verdicts(table: pd.DataFrame) -> Figure:
    """Effects of the claims in the ledger, `claims.table`, with their 95 % intervals; the mark says the verdict.

    Left: claims in nats. Right: all others, on the scale of their own statistic.
    """
    use_style()
    found = table[table["verdict"] != "missing"]
    nats = found["unit"].str.startswith("nats")
    looks = {"supported": ("o", 0), "refuted": ("X", 3), "inconclusive": ("D", 7)}
    colors = sns.color_palette("colorblind")
    figure, axes = plt.subplots(1, 2, figsize=(13.0, 0.9 + 0.27 * max(nats.sum(), (~nats).sum())))
    for axis, rows, label in zip(axes, (found[nats], found[~nats]), ("nats", "unit of the statistic"), strict=True):
        for place, row in enumerate(rows.itertuples()):
            marker, color = looks[row.verdict]
            axis.plot([row.low, row.high], [place, place], color=colors[color], linewidth=2)
            axis.plot(row.effect, place, marker, color=colors[color], markersize=7)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_xscale("symlog", linthresh=0.05)
        axis.set_xticks([-1, -0.1, 0, 0.1, 1], ["−1", "−0.1", "0", "0.1", "1"])
        axis.set(yticks=range(len(rows)), yticklabels=rows.index, ylim=(len(rows) - 0.5, -0.5), xlabel=label)
        axis.tick_params(axis="y", labelsize=8)
    for verdict, (marker, color) in looks.items():
        axes[1].plot([], [], marker, color=colors[color], label=verdict)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(looks), fontsize="small")
    plt.close(figure)
    return figure
