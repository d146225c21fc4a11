"""Figures draw the numbers they are given, with units on their axes."""

import numpy as np
import pytest

from sftrl_utils import corpora, figures, stages


def line_values(axis, position=0):
    return axis.get_lines()[position].get_ydata()


def test_curves_draw_each_metric_of_each_split(sft_then_rl):
    figure = figures.curves(sft_then_rl, ["sft_loss", "mean_reward"])
    left, right = figure.axes
    assert "nats" in left.get_ylabel() and "reward" in right.get_ylabel()
    first, second = (stage.metrics["sft_loss_train"].to_numpy() for stage in sft_then_rl)
    assert line_values(left) == pytest.approx(np.concatenate([first, second[1:]]), abs=1e-6)
    texts = [text.get_text() for text in left.get_legend().get_texts()]
    assert {"train", "dev", "stage boundary", "base model, dev"} <= set(texts)


def test_one_stage_has_no_boundary(sft_then_rl):
    [axis] = figures.curves(sft_then_rl[0], ["mcc"]).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train", "dev"]


def test_reference_lines_are_the_corpus_s_own_limits(sft_then_rl, small_config):
    corpus = corpora.load_corpus(small_config)
    figure = figures.reward_references(figures.curves(sft_then_rl[0], ["mean_reward"]), corpus, panel=0)
    levels = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if len(line.get_ydata())]
    for limit in ("bayes_reward", "calibrated_reward"):
        assert any(np.isclose(level, corpus.summary().loc["dev", limit]) for level in levels)


def test_the_seeds_figure_draws_the_mean_over_seeds(small_config):
    runs = [stages.train_pipeline(small_config.model_copy(update={"seed": seed}), "sft_then_rl") for seed in (0, 1)]
    figure = figures.seeds_figure(small_config.out_dir, ["sft_then_rl"], "sft_loss", "dev", "smoke")
    values = line_values(figure.axes[0])
    seeds = {run[1].record.seed: run[1].metrics["sft_loss_dev"].iloc[-1] for run in runs}
    drawn = figures.second_stage(small_config.out_dir, "sft_then_rl", "smoke")
    last = drawn[drawn["step"] == drawn["step"].max()]
    assert values[-1] == pytest.approx(last["sft_loss_dev"].mean())
    for seed, end in seeds.items():
        assert last.set_index("seed")["sft_loss_dev"][seed] == end
