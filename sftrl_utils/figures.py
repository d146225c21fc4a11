"""Every plot of the book, in seaborn: one function, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from sftrl_utils import tabular
from sftrl_utils.corpora import Corpus
from sftrl_utils.records import base_metrics, proxy_shares, second_stage
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


def swept(ends: pd.DataFrame, parameter: str, metrics: Sequence[str], base: pd.Series) -> Figure:
    """One panel a metric on dev: where the cells of a sweep end, over the values of `parameter`.

    `ends` is `effects.stage_ends`: dots are cells, the line their mean over seeds with its 95 % interval. `base` holds
    the metrics of the base model.
    """
    use_style()
    figure, axes = plt.subplots(1, len(metrics), figsize=(5.2 * len(metrics), 3.6), squeeze=False)
    least = ends[parameter][ends[parameter] > 0].min()
    for axis, metric in zip(axes[0], metrics, strict=True):
        column = f"{metric}_dev"
        sns.lineplot(ends, x=parameter, y=column, errorbar=("ci", 95), seed=0, ax=axis, label="mean over seeds")
        axis.plot(ends[parameter], ends[column], ".", color="0.4", label="one cell")
        axis.axhline(base[column], color="0.5", linestyle="--", linewidth=1, label="base model")
        axis.set_xscale("symlog", linthresh=least)  # 0 is among the values
        axis.set(xlabel=parameter, ylabel=f"{LABELS[metric]}, dev", xlim=(-least / 4, None))
        axis.legend(title=None)
    plt.close(figure)
    return figure


def gold_and_proxy(store: Path, preset: str = "tiny") -> Figure:
    """Mean reward on dev while GRPO follows a reward model, by the verifier (gold) and by that model (proxy).

    One panel a share of preference pairs flipped; mean over seeds and its 95 % interval.
    """
    use_style()
    shares = proxy_shares(store, preset)
    figure, axes = plt.subplots(1, len(shares), figsize=(3.8 * len(shares), 3.6), sharey=True, squeeze=False)
    names = {"mean_reward_dev": "gold: the verifier", "proxy_reward_dev": "proxy: what GRPO follows"}
    for axis, share in zip(axes[0], shares, strict=True):
        table = second_stage(store, "proxy_rl", preset, proxy_flipped=share)
        long = table.melt(["step", "seed"], list(names), "reward").replace({"reward": names})
        sns.lineplot(
            long, x="step", y="value", hue="reward", style="reward", markers=True, errorbar=("ci", 95), seed=0, ax=axis
        )
        axis.set(xlabel="update step", ylabel="mean reward, dev", title=f"{share:.0%} of the pairs flipped")
        axis.legend(title=None)
    plt.close(figure)
    return figure


def loss_changes(cases: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], longest: float) -> Figure:
    """Δ(η), the exact change of the SFT loss under RL, for named one-prompt cases (log q, log s, reward)."""
    use_style()
    figure, axis = plt.subplots()
    etas, one = np.linspace(0, longest, 200), np.ones(1)
    for color, (name, (log_q, log_s, reward)) in zip(sns.color_palette(), cases.items(), strict=False):
        change = tabular.sft_loss_change(log_q, log_s, reward, etas, one)
        axis.plot(etas, change, color=color, label=name)
        crossing = float(tabular.break_even(log_q, log_s, reward, one))
        if 0 < crossing < longest:
            axis.plot(crossing, 0, "o", color=color)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set(xlabel="η = 1/β, or the duration of natural-gradient RL", ylabel="change of the SFT loss (nats)")
    axis.legend()
    plt.close(figure)
    return figure


def utilities(log_q: np.ndarray, reward: np.ndarray, lam: float, longest: float) -> Figure:
    """U(T) = gain of mean reward − λ × rise of the SFT loss over the duration T of RL from s = q, one prompt."""
    use_style()
    figure, axis = plt.subplots()
    times, one = np.linspace(0, longest, 400), np.ones(1)
    gain = tabular.mean_reward(tabular.gibbs(log_q, reward, times), reward, one)
    utility = gain - gain[0] - lam * tabular.sft_loss_change(log_q, log_q, reward, times, one)
    axis.plot(times, utility)
    best = float(tabular.optimal_duration(log_q, reward, one, lam))
    axis.axvline(best, color="0.3", linestyle=":", label=f"optimal duration, {best:.2f}")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set(xlabel="duration T", ylabel="reward gained − λ × loss risen")
    axis.legend()
    plt.close(figure)
    return figure


def joint_plane(log_q: np.ndarray, reward: np.ndarray, weights: np.ndarray, longest: float) -> Figure:
    """The plane of mean reward and SFT loss: the frontier, RL from q, and SFT back towards q from RL's end."""
    use_style()
    figure, axis = plt.subplots()
    etas, parts = np.linspace(0, longest, 60), np.linspace(0, 1, 60) ** 4  # the first step of SFT gains most
    trained = tabular.gibbs(log_q, reward, np.array(longest))
    paths = {
        "RL after SFT": tabular.gibbs(log_q, reward, etas),
        "SFT after that RL": tabular.mixture(trained, log_q, parts),
    }
    for (name, path), style in zip(paths.items(), ("--", ":"), strict=True):
        axis.plot(tabular.mean_reward(path, reward, weights), tabular.sft_loss(path, log_q, weights), style, label=name)
    best = tabular.joint_optimum(log_q, reward, np.logspace(-2, 1.6, 60))
    axis.plot(
        tabular.mean_reward(best, reward, weights), tabular.sft_loss(best, log_q, weights), "0.2", label="frontier"
    )
    axis.set(xlabel="mean reward", ylabel="SFT loss (nats per response)")
    axis.legend()
    plt.close(figure)
    return figure


def grpo_at_rest(start: float, betas: np.ndarray, group_size: int) -> Figure:
    """Left: GRPO's weight c_G(a) over the success rate a. Right: success rate at rest over β, for three updates."""
    use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6))
    success_rate = np.linspace(0.005, 0.995, 200)
    for size in (2, group_size, 64):
        left.plot(success_rate, tabular.group_weight(success_rate, size), label=f"G = {size}")
    left.plot(success_rate, 1 / np.sqrt(success_rate * (1 - success_rate)), "0.2", linestyle=":", label="G → ∞")
    left.set(xlabel="success rate a of the prompt", ylabel="weight of its gradient, c(a)", ylim=(0, 8))
    left.legend()
    shape = (len(betas), 1, 2)
    log_pi = np.broadcast_to(np.log([start, 1 - start]), shape)
    success = np.broadcast_to([1.0, 0.0], shape)
    ends = {
        "Gibbs": tabular.gibbs(log_pi, success, 1 / betas),
        "GRPO, spread divided out": tabular.grpo_fixed_point(log_pi, success, betas, group_size),
        "k3 as a loss": tabular.joint_optimum(log_pi, success, 1 / betas),
    }
    for (name, log_p), style in zip(ends.items(), ("-", "--", ":"), strict=True):
        right.plot(betas, np.exp(log_p[:, 0, 0]), style, label=name)
    right.axhline(start, color="0.5", linewidth=1)
    right.set(xlabel="β", ylabel="success rate at rest", xscale="log")
    right.legend()
    plt.close(figure)
    return figure


def step_costs(seconds: pd.DataFrame, model: str) -> Figure:
    """Seconds a GRPO step over group size (left) and prompt length (right), with the slope of each straight line.

    `seconds` is one device's part of `costs.step_seconds`.
    """
    use_style()
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 3.6))
    names = {"group_size": "completions a prompt", "prompt_tokens": "tokens a prompt"}
    rows = seconds[seconds["model"] == model]
    for axis, name, held in zip(axes, names, reversed(names), strict=True):
        fixed = rows[held].mode().min()
        for trainer, part in rows[rows[held] == fixed].sort_values(name).groupby("trainer"):
            slope = np.polyfit(part[name], part["seconds"], 1)[0]
            axis.plot(part[name], part["seconds"], "o-", label=f"{trainer}: {1000 * slope:.2g} ms each")
        axis.set(xlabel=names[name], ylabel="seconds a step", ylim=(0, None), title=f"{fixed} {names[held]}")
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
