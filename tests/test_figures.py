"""Figures draw the numbers they are given, with units on their axes."""

import numpy as np
import pytest

from sftrl_utils import corpora, figures, stages, statements, tabular


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


HALF, SURE = (tabular.log_probabilities([[a, 1 - a]]) for a in (0.5, 0.9))
REWARD, ONE = np.array([[1.0, -1.0]]), np.ones(1)


def test_loss_changes_mark_where_rl_has_used_up_what_it_gave():
    figure = figures.loss_changes({"optimal": (SURE, SURE, REWARD), "unsure": (SURE, HALF, REWARD)}, longest=4)
    optimal, unsure, mark = figure.axes[0].get_lines()[:3]
    assert optimal.get_ydata()[-1] == pytest.approx(tabular.sft_loss_change(SURE, SURE, REWARD, 4.0, ONE))
    assert unsure.get_ydata().min() < 0 < unsure.get_ydata()[-1]
    assert mark.get_xdata()[0] == pytest.approx(tabular.break_even(SURE, HALF, REWARD, ONE))


def test_utilities_mark_their_highest_point():
    curve, mark = figures.utilities(SURE, REWARD, lam=1.0, longest=3).axes[0].get_lines()
    assert curve.get_xdata()[curve.get_ydata().argmax()] == pytest.approx(mark.get_xdata()[0], abs=0.01)


def test_the_joint_plane_has_no_path_below_its_frontier():
    m = statements.random_instances(1, seed=3)[0]
    figure = figures.joint_plane(m.log_q, m.reward, m.weights, longest=3)
    rl, sft, frontier = figure.axes[0].get_lines()
    assert (rl.get_xdata()[-1], rl.get_ydata()[-1]) == pytest.approx((sft.get_xdata()[0], sft.get_ydata()[0]))
    for path in (rl, sft):
        least = np.interp(path.get_xdata(), frontier.get_xdata(), frontier.get_ydata())
        assert np.all(path.get_ydata() >= least - 1e-3)  # the frontier is drawn in straight pieces


def test_grpo_rests_above_gibbs_and_k3_as_a_loss_below_for_small_beta():
    left, right = figures.grpo_at_rest(start=0.3, betas=np.array([0.3, 30.0]), group_size=8).axes
    assert line_values(left) == pytest.approx(np.sqrt(0.5))  # G = 2
    gibbs, grpo, k3 = (line_values(right, i) for i in range(3))
    assert k3[0] < gibbs[0] < grpo[0] and gibbs[1] == pytest.approx(0.3, abs=0.01)
