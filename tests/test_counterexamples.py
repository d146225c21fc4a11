"""Each example shows what the notebook says of it."""

import numpy as np
import pytest

from sftrl_utils import counterexamples


def test_rl_lowers_the_sft_loss_before_it_raises_it():
    example = counterexamples.rl_lowers_the_sft_loss()
    assert example["loss there"] < example["loss after SFT"] - 0.2
    assert 0 < example["η of the least loss"] < example["η* of no change"] < np.inf


def test_single_labels_only_ever_gain():
    changes = list(counterexamples.single_labels_lower_it_for_ever().values())
    assert changes == sorted(changes, reverse=True) and changes[0] < 0


def test_a_bounded_kl_loses_no_reward():
    example = counterexamples.bounded_kl_is_not_enough()
    assert example["equal rewards: KL moved"] > 0.1 and example["sharper data: KL moved"] > 0.01
    assert example["equal rewards: change of R"] == pytest.approx(0) and example["sharper data: change of R"] > 0.1
    for name in ("equal rewards", "sharper data"):  # what always falls is J, by β KL
        assert example[f"{name}: change of J"] == pytest.approx(-example[f"{name}: KL moved"])


def test_equal_distances_opposite_signs():
    example = counterexamples.distance_says_nothing_of_sign()
    wrong, right = ({k: v for k, v in example.items() if word in k} for word in ("wrong", "right"))
    assert list(wrong.values()) == pytest.approx([0.1, -0.2]) and list(right.values()) == pytest.approx([0.1, 0.2])


def test_pl_lets_rl_move_for_nothing():
    example = counterexamples.pl_alone_bounds_nothing()
    assert example["distance moved"] == pytest.approx(100) and example["change of L"] == 0


def test_the_duration_has_three_solutions_and_the_last_is_best():
    example = counterexamples.several_best_durations()
    times, utilities = list(example.values())[::2], list(example.values())[1::2]
    assert times == sorted(times) and len(times) == 3
    assert utilities[1] < utilities[0] < utilities[2]


def test_cosines_differ_and_the_fisher_one_has_the_threshold_s_sign():
    example = counterexamples.cosines_differ_in_sign()
    assert example["euclidean cosine"] < 0 < example["fisher cosine"] and example["R(q) − R(p)"] > 0


def test_three_updates_rest_in_three_places():
    ends = sorted(counterexamples.grpo_is_not_gibbs().values())
    assert np.diff(ends).min() > 0.03


def test_the_paper_s_figures_are_those_of_the_constant_answer():
    table = counterexamples.paper_arithmetic()
    rewards = table["mean reward"]
    assert round(rewards["always `acceptable`"], 3) == rewards["paper: after RL"]
    assert round(rewards["354 of 527 right"], 3) == rewards["paper: after SFT"]
    assert round(table.loc["paper: after RL", "accuracy"], 4) == 0.6925
    assert counterexamples.unpaired_z() == pytest.approx(0.73, abs=0.005)
    nearest = counterexamples.unattainable_on_all_dev()
    assert all(round(value, 3) != float(name.split(":")[0]) for name, value in nearest.items())


def test_a_policy_that_reads_nothing_shows_the_paper_s_pattern():
    table = counterexamples.sentence_blind_rl()
    assert table["SFT loss"].is_monotonic_increasing and table["mean reward"].is_monotonic_increasing
    assert table["SFT loss"].round(3).tolist() == [0.617, 0.673, 0.814, 1.443, 2.618]
    assert table["mean reward"].iloc[0] == pytest.approx((2 * 365 / 527 - 1) ** 2)
    assert table["mean reward"].iloc[-1] == pytest.approx(0.385, abs=5e-4)
