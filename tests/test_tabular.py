"""The exact finite policies: every quantity against its definition written out, equality cases, and bad input."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import lambertw
from scipy.stats import entropy as scipy_entropy

from sftrl_utils import tabular

HALF = np.log([[0.5, 0.5]])
ONE = np.ones(1)  # one prompt


def policies(size=4, prompts=2):
    """Logits down to probabilities of 1e-300."""
    logits = hnp.arrays(float, (prompts, size), elements=st.floats(-690, 0))
    return logits.map(tabular.softmax)


def rewards(size=4, prompts=2):
    return hnp.arrays(float, (prompts, size), elements=st.floats(-5, 5, allow_subnormal=False))


def logs(*rows):
    return tabular.log_probabilities(np.array(rows))


# ---- definitions


@given(policies(), policies(), rewards())
def test_divergences_and_moments_are_their_definitions(log_p, log_s, reward):
    p, s = np.exp(log_p), np.exp(log_s)
    assert tabular.kl(log_p, log_s) == pytest.approx((p * (log_p - log_s)).sum(-1), abs=1e-12)
    assert tabular.entropy(log_p) == pytest.approx(scipy_entropy(p, axis=-1), abs=1e-12)
    assert tabular.total_variation(log_p, log_s) == pytest.approx(np.maximum(p - s, 0).sum(-1), abs=1e-12)
    assert tabular.chi_square(log_p, log_s) == pytest.approx((p**2 / s).sum(-1) - 1, rel=1e-9, abs=1e-9)
    mean = (p * reward).sum(-1)
    assert tabular.variance(log_p, reward) == pytest.approx((p * (reward - mean[:, None]) ** 2).sum(-1), abs=1e-12)
    weights = np.array([0.25, 0.75])
    assert tabular.mean_reward(log_p, reward, weights) == pytest.approx(mean @ weights, abs=1e-12)
    assert tabular.sft_loss(log_p, log_s, weights) == pytest.approx((-s * log_p).sum(-1) @ weights, abs=1e-12)


def test_support_mismatch_is_infinite_and_never_nan():
    log_p, log_s = logs([1.0, 0.0]), logs([0.0, 1.0])
    for divergence in (tabular.kl, tabular.chi_square):
        assert divergence(log_p, log_s) == np.inf
        assert divergence(log_p, HALF) < np.inf and divergence(HALF, log_p) == np.inf
    assert tabular.kl(log_p, log_p) == tabular.chi_square(log_p, log_p) == 0
    assert tabular.total_variation(log_p, log_s) == 1
    assert tabular.sft_loss(log_p, log_s, ONE) == np.inf and tabular.sft_loss(log_p, log_p, ONE) == 0
    assert tabular.rl_objective(HALF, log_p, np.zeros((1, 2)), 1.0, ONE) == -np.inf
    assert tabular.rl_objective(HALF, log_p, np.ones((1, 2)), 0.0, ONE) == 1
    two = np.concatenate([HALF, log_p])
    assert tabular.average(tabular.kl(two, np.concatenate([HALF, log_s])), np.array([1.0, 0.0])) == 0


@given(policies(), rewards(), st.floats(0, 100))
def test_the_gibbs_policy_is_the_tilted_start(log_s, reward, eta):
    mass = np.exp(log_s + eta * reward - (log_s + eta * reward).max(-1, keepdims=True))
    expected = mass / mass.sum(-1, keepdims=True)
    assert np.exp(tabular.gibbs(log_s, reward, eta)) == pytest.approx(expected, abs=1e-12)


def test_short_rl_keeps_relative_precision():
    reward = np.array([[-1.0, 1.0]])
    for eta in (1e-3, 1e-7):
        rise = tabular.sft_loss_change(HALF, HALF, reward, eta, ONE)
        assert rise == pytest.approx(np.log1p(2 * np.sinh(eta / 2) ** 2), rel=1e-9)


@given(policies(), policies(), rewards())
def test_gradients_are_those_of_automatic_differentiation(log_p, log_q, reward):
    weights = np.array([0.3, 0.7])
    logits = torch.tensor(log_p, requires_grad=True)
    log_policy = torch.log_softmax(logits, -1)
    q, r, rho = (torch.tensor(array) for array in (np.exp(log_q), reward, weights))
    quantities = {
        "sft": (-(q * log_policy).sum(-1) @ rho, tabular.sft_gradient(log_p, log_q, weights)),
        "reward": ((log_policy.exp() * r).sum(-1) @ rho, tabular.reward_gradient(log_p, reward, weights)),
        "kl": (
            (log_policy.exp() * (log_policy - torch.tensor(log_q))).sum(-1) @ rho,
            tabular.kl_gradient(log_p, log_q, weights),
        ),
    }
    for name, (value, gradient) in quantities.items():
        [expected] = torch.autograd.grad(value, logits, retain_graph=True)
        assert gradient == pytest.approx(expected.numpy(), abs=1e-9), name


@given(policies(), policies(), st.floats(0, 1))
def test_the_mixture_mixes_probabilities(log_s, log_q, t):
    expected = (1 - t) * np.exp(log_s) + t * np.exp(log_q)
    assert np.exp(tabular.mixture(log_s, log_q, t)) == pytest.approx(expected, abs=1e-12)


def test_flows_follow_their_gradients_and_end_where_they_should():
    log_s, log_q, reward = logs([0.2, 0.3, 0.5]), logs([0.6, 0.3, 0.1]), np.array([[1.0, 1.0, -1.0]])
    short, step = tabular.sft_flow(log_s, log_q, ONE, 1e-4)
    assert step == pytest.approx(-1e-4 * tabular.sft_gradient(log_s, log_q, ONE), abs=1e-7)
    assert short == pytest.approx(tabular.softmax(log_s + step), abs=1e-12)
    assert np.exp(tabular.sft_flow(log_s, log_q, ONE, 200.0)[0]) == pytest.approx(np.exp(log_q), abs=1e-6)
    _, step = tabular.reward_flow(log_s, reward, ONE, 1e-4)
    assert step == pytest.approx(1e-4 * tabular.reward_gradient(log_s, reward, ONE), abs=1e-7)
    trained, _ = tabular.reward_flow(log_s, reward, ONE, 200.0)
    assert tabular.mean_reward(trained, reward, ONE) > 0.98
    # Euclidean RL sharpens among equally right answers; the Gibbs policy keeps their odds.
    assert (trained[0, 1] - trained[0, 0]) > 1.2 * np.log(0.3 / 0.2)


def test_the_fisher_matrix_is_the_covariance_of_scores():
    p, rho = np.array([0.2, 0.3, 0.5]), np.array([0.4, 0.6])
    scores = np.eye(3) - p
    expected = sum(p[y] * np.outer(scores[y], scores[y]) for y in range(3))
    matrices = tabular.fisher(np.log([p, p]), rho)
    assert matrices == pytest.approx(rho[:, None, None] * expected, abs=1e-15)
    assert tabular.fisher_radius(np.log([p, p]), rho) == pytest.approx(0.6 * np.linalg.eigvalsh(expected)[-1])
    assert tabular.fisher_radius(HALF, ONE) == pytest.approx(0.5)  # the largest there is


def test_the_range_is_from_the_worst_to_the_best_reward():
    assert tabular.reward_range([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]) == pytest.approx([3.0, 0.0])


# ---- equality cases


def test_equal_rewards_change_nothing():
    log_q, log_s, reward = logs([0.1, 0.9]), logs([0.6, 0.4]), np.full((1, 2), 3.0)
    assert tabular.gibbs(log_s, reward, 7.0) == pytest.approx(log_s, abs=1e-12)
    assert tabular.sft_loss_change(log_q, log_s, reward, 7.0, ONE) == pytest.approx(0, abs=1e-12)
    assert tabular.break_even(log_q, log_s, reward, ONE) == tabular.best_duration(log_q, log_s, reward, ONE) == 0
    assert tabular.optimal_duration(log_q, reward, ONE, 1.0) == 0
    assert np.isnan(tabular.alignment(log_s, log_q, reward, ONE, "fisher")[1])
    assert tabular.joint_optimum(log_q, reward, 5.0) == pytest.approx(log_q, abs=1e-12)


def test_one_response_is_all_there_is():
    log_p, reward = np.zeros((1, 1)), np.full((1, 1), 2.0)
    assert tabular.gibbs(log_p, reward, 3.0) == 0 and tabular.joint_optimum(log_p, reward, 3.0) == 0
    assert tabular.sft_loss_change(log_p, log_p, reward, 3.0, ONE) == 0
    assert tabular.interleaved(log_p, reward, 3.0, 0.5) == 0


def test_the_fourth_order_constant_is_attained_by_a_fair_coin():
    reward, eta = np.array([[-1.0, 1.0]]), 0.05
    rise = tabular.sft_loss_change(HALF, HALF, reward, eta, ONE)
    assert abs(rise - eta**2 / 2) / (eta**4 * 2**4 / 192) == pytest.approx(1, abs=0.01)


def test_total_variation_bound_is_attained_between_the_extremes():
    log_p, log_s, reward = logs([0.9, 0.1]), logs([0.3, 0.7]), np.array([[2.0, -1.0]])
    change = tabular.mean_reward(log_p, reward, ONE) - tabular.mean_reward(log_s, reward, ONE)
    assert change == pytest.approx(3 * tabular.total_variation(log_p, log_s)[0])
    near = logs([0.501, 0.499])
    assert tabular.total_variation(near, HALF) == pytest.approx(np.sqrt(tabular.kl(near, HALF) / 2), rel=1e-5)


def test_the_break_even_bounds_meet_for_short_rl_from_a_fair_coin():
    reward, lead = np.array([[-1.0, 1.0]]), 1e-3
    log_q = logs([0.5 - lead / 2, 0.5 + lead / 2])
    crossing = tabular.break_even(log_q, HALF, reward, ONE)
    assert crossing == pytest.approx(8 * lead / 4, rel=1e-5)  # Var r = w²/4: both bounds
    assert tabular.best_duration(log_q, HALF, reward, ONE) == pytest.approx(np.arctanh(lead), rel=1e-9)


def test_break_even_is_never_for_agreeing_labels_and_at_once_without_a_lead():
    reward = np.array([[1.0, -1.0]])
    right, wrong = logs([1.0, 0.0]), logs([0.0, 1.0])
    for duration in (tabular.break_even, tabular.best_duration):
        assert duration(right, HALF, reward, ONE) == np.inf
        assert duration(wrong, HALF, reward, ONE) == duration(HALF, HALF, reward, ONE) == 0
    assert tabular.sft_loss_change(right, HALF, reward, 400.0, ONE) == pytest.approx(-np.log(2))
    assert tabular.sft_loss_change(right, right, reward, 400.0, ONE) == pytest.approx(0)


def test_strong_convexity_threshold_is_attained_in_one_dimension():
    loss, mu = 0.7, 3.0
    start = -np.sqrt(2 * loss / mu)
    assert mu * (start + tabular.safe_distance(loss, mu)) ** 2 / 2 == pytest.approx(loss)


def test_the_spectral_bound_and_the_cosines_are_attained_by_one_coin():
    log_p, log_q, reward = logs([0.4, 0.6]), logs([0.7, 0.3]), np.array([[1.0, 0.0]])
    product, cosine = tabular.alignment(log_p, log_q, reward, ONE, "euclidean")
    natural = np.sqrt(tabular.variance(log_p, reward) * tabular.chi_square(log_q, log_p))
    assert product == pytest.approx(tabular.fisher_radius(log_p, ONE) * natural[0])
    assert cosine == pytest.approx(1) == tabular.alignment(log_p, log_q, reward, ONE, "fisher")[1]
    assert tabular.alignment(log_p, log_q, reward, ONE, "fisher")[0] == pytest.approx(0.3)
    assert tabular.alignment(log_p, log_q, -reward, ONE, "fisher")[1] == pytest.approx(-1)


def test_the_fisher_cosine_of_two_nearly_certain_policies_is_still_one():
    log_p, log_q = logs([1 - 3e-7, 3e-7]), logs([1 - 8e-7, 8e-7])
    _, cosine = tabular.alignment(log_p, log_q, np.array([[1.0, 0.0]]), ONE, "fisher")
    assert cosine == pytest.approx(-1, abs=1e-12)


def test_one_prompt_with_two_rewards_is_where_sequences_are_optimal():
    log_q, reward = logs([0.2, 0.1, 0.3, 0.4]), np.array([[1.0, -1.0, 1.0, -1.0]])
    trained = tabular.gibbs(log_q, reward, 0.8)
    assert tabular.excess_loss(trained, log_q, reward, ONE) == pytest.approx(0, abs=1e-10)
    assert tabular.excess_loss(tabular.mixture(trained, log_q, 0.3), log_q, reward, ONE) == pytest.approx(0, abs=1e-10)
    three = np.array([[1.0, 0.0, -1.0, 0.5]])
    assert tabular.excess_loss(tabular.gibbs(log_q, three, 0.8), log_q, three, ONE) > 1e-4


# ---- solutions against other ways to find them


def test_the_joint_optimum_beats_what_an_optimiser_finds():
    rng = np.random.default_rng(0)
    log_q, reward = tabular.softmax(rng.normal(size=(3, 5))), rng.normal(size=(3, 5))
    weights, lam = np.array([0.2, 0.3, 0.5]), 1.7
    logits = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    q, r, rho = (torch.tensor(array) for array in (np.exp(log_q), reward, weights))
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimiser.zero_grad()
        log_p = torch.log_softmax(logits, -1)
        value = (-(q * log_p).sum(-1) - lam * (log_p.exp() * r).sum(-1)) @ rho
        value.backward()
        return value

    optimiser.step(objective)
    found = torch.log_softmax(logits, -1).detach().numpy()
    assert tabular.joint_optimum(log_q, reward, lam) == pytest.approx(found, abs=1e-3)
    assert tabular.joint_gap(found, log_q, reward, lam, weights) == pytest.approx(0, abs=1e-9)


def test_a_rewarded_response_without_labels_gets_what_is_left_over():
    log_q, reward = logs([0.5, 0.5, 0.0]), np.array([[0.0, 0.0, 1.0]])
    assert np.exp(tabular.joint_optimum(log_q, reward, 0.5))[0] == pytest.approx([0.5, 0.5, 0])
    assert np.exp(tabular.joint_optimum(log_q, reward, 4.0))[0] == pytest.approx([0.125, 0.125, 0.75])
    least = min(
        0.5 * -np.log((1 - x) / 2) * 2 - 4 * x for x in np.linspace(0, 0.999, 100_000)
    )  # by symmetry one free number
    best = tabular.joint_optimum(log_q, reward, 4.0)
    value = tabular.sft_loss(best, log_q, ONE) - 4 * tabular.mean_reward(best, reward, ONE)
    assert value == pytest.approx(least, abs=1e-8)


def test_the_frontier_is_the_least_loss_at_its_reward():
    rng = np.random.default_rng(1)
    log_q, reward = tabular.softmax(rng.normal(size=(2, 4))), rng.normal(size=(2, 4))
    weights = np.array([0.5, 0.5])
    target = tabular.mean_reward(log_q, reward, weights) + 0.4
    least, lam = tabular.frontier(log_q, reward, weights, target)
    best = tabular.joint_optimum(log_q, reward, lam)
    assert tabular.mean_reward(best, reward, weights) == pytest.approx(target, abs=1e-10)
    others = tabular.softmax(best + rng.normal(size=(2000, 2, 4)) * 0.3)
    enough = tabular.mean_reward(others, reward, weights) >= target
    assert enough.sum() > 100 and np.all(tabular.sft_loss(others[enough], log_q, weights) >= least - 1e-12)
    assert tabular.excess_loss(others[enough][0], log_q, reward, weights) == pytest.approx(
        tabular.sft_loss(others[enough][0], log_q, weights)
        - tabular.frontier(log_q, reward, weights, tabular.mean_reward(others[enough][0], reward, weights))[0]
    )
    # Where only the best response has no label, all that is needed goes to it: λ = 1 / E[max r − r].
    unlabelled, lams = tabular.frontier(logs([0.0, 1.0]), np.array([[1.0, -1.0]]), ONE, np.array([-0.5, 0.5]))
    assert lams == pytest.approx([1 / 1.5, 2]) and unlabelled == pytest.approx(-np.log([0.75, 0.25]))
    top = tabular.average(reward.max(-1), weights)
    assert 20 < tabular.frontier(log_q, reward, weights, top)[0] < np.inf
    floor = tabular.mean_reward(log_q, reward, weights)
    at_q, none = tabular.frontier(log_q, reward, weights, floor)
    assert none == 0 and at_q == pytest.approx(tabular.sft_loss(log_q, log_q, weights))


def test_the_frontier_knows_rewards_only_up_to_a_constant():
    log_q, reward = logs([0.2, 0.3, 0.5], [0.6, 0.3, 0.1]), np.array([[1.0, 0.0, -0.5], [-1.0, 0.5, 0.2]])
    weights, target = np.array([0.5, 0.5]), 0.4
    expected = tabular.frontier(log_q, reward, weights, target)
    for shift in (-50, 50):
        moved = tabular.frontier(log_q, reward + shift, weights, target + shift)
        assert np.array(moved) == pytest.approx(np.array(expected), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.05])
def test_interleaving_ends_where_many_rounds_end(alpha):
    rng = np.random.default_rng(2)
    log_q, reward = tabular.softmax(rng.normal(size=(3, 4))), rng.normal(size=(3, 4))
    log_p = log_q
    for _ in range(round(40 / alpha)):
        log_p = tabular.softmax(tabular.mixture(log_p, log_q, alpha) + alpha * 1.5 * reward)
    assert tabular.interleaved(log_q, reward, 1.5, alpha) == pytest.approx(log_p, abs=1e-9)


def test_the_optimal_duration_is_the_best_of_a_fine_search():
    rng = np.random.default_rng(3)
    log_q, reward = tabular.softmax(rng.normal(size=(2, 5))), rng.normal(size=(2, 5))
    weights, lam = np.array([0.4, 0.6]), 0.7
    times = np.linspace(0, 20, 20_001)
    gains = tabular.mean_reward(tabular.gibbs(log_q, reward, times), reward, weights)
    utility = gains - lam * tabular.sft_loss_change(log_q, log_q, reward, times, weights)
    assert tabular.optimal_duration(log_q, reward, weights, lam) == pytest.approx(times[utility.argmax()], abs=1e-3)


def utility(time, log_q, reward, weights, lam):
    gain = tabular.mean_reward(tabular.gibbs(log_q, reward, time), reward, weights)
    gain = gain - tabular.mean_reward(log_q, reward, weights)
    return gain - lam * tabular.sft_loss_change(log_q, log_q, reward, time, weights)


@pytest.mark.parametrize("lam", [1e-12, 1e-4, 1.0, 1e4, 1e5, 1e12])
def test_the_optimal_duration_of_a_fair_coin_solves_its_equation_at_any_price(lam):
    # Var = 1 − tanh² and gain = tanh: 2 sinh T cosh T = 2/λ
    found = tabular.optimal_duration(HALF, np.array([[1.0, -1.0]]), ONE, lam)
    assert found == pytest.approx(np.arcsinh(2 / lam) / 2, rel=1e-9)


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_no_duration_is_better_than_the_optimal_one(scale):
    rng = np.random.default_rng(scale)
    weights = np.array([0.5, 0.5])
    for _ in range(20):
        log_q = tabular.softmax(rng.normal(size=(2, 4)) * scale)
        reward = rng.normal(size=(2, 4)) * rng.choice([0.01, 1, 10], size=(2, 1))
        lam = 10 ** rng.uniform(-3, 2)
        best = tabular.optimal_duration(log_q, reward, weights, lam)
        times = np.concatenate([np.linspace(0, 10 * best, 2000), np.logspace(-3, 5, 2000) / np.ptp(reward)])
        others = utility(times, log_q, reward, weights, lam)
        assert others.max() - utility(best, log_q, reward, weights, lam) <= 1e-12 * max(1, abs(others.max()))


def test_the_optimal_duration_sees_rare_rewards_and_small_gaps():
    log_q, reward = logs([1e-12, 1 - 1e-12], [0.5, 0.5]), np.array([[0.0, 1000.0], [0.0, 0.01]])
    weights = np.array([0.5, 0.5])
    best = tabular.optimal_duration(log_q, reward, weights, 1e-3)
    assert utility(best, log_q, reward, weights, 1e-3) > utility(500.0, log_q, reward, weights, 1e-3) > 1.5e-3
    log_q, reward = logs([1 / 3] * 3), np.array([[0.0, 1.0, 1.0001]])
    best = tabular.optimal_duration(log_q, reward, ONE, 1e-9)
    times = best * np.array([0.1, 0.99, 1.01, 10])
    assert np.all(utility(times, log_q, reward, ONE, 1e-9) < utility(best, log_q, reward, ONE, 1e-9))
    rare = logs([1 - 1e-300, 1e-300])
    late = tabular.optimal_duration(rare, np.array([[-1.0, 1.0]]), ONE, 0.01)
    assert late > np.log(1e300) / 2  # not before the rare response is likely
    assert tabular.optimal_duration(logs([1.0, 0.0]), np.array([[-1.0, 1.0]]), ONE, 1.0) == 0
    two = tabular.optimal_duration(HALF, np.array([[1.0, -1.0]]), ONE, np.array([0.5, 2.0]))
    assert two == pytest.approx(np.arcsinh([4, 1]) / 2)


def test_very_long_rl_keeps_a_policy():
    log_s, reward = logs([0.2, 0.3, 0.5]), np.array([[1.0, 1.0, -1.0]])
    assert np.exp(tabular.gibbs(log_s, reward, 1e12)) == pytest.approx(np.array([[0.4, 0.6, 0]]))


def test_flows_take_a_time_an_instance():
    log_s, reward = np.stack([logs([0.2, 0.3, 0.5])] * 2), np.array([[1.0, 0.0, -1.0]])
    both, _ = tabular.reward_flow(log_s, reward, ONE, np.array([0.5, 2.0]))
    for log_p, time in zip(both, (0.5, 2.0), strict=True):
        assert log_p == pytest.approx(tabular.reward_flow(log_s[0], reward, ONE, time)[0], abs=1e-7)


def test_the_joint_optimum_with_kl_lies_between_its_three_pulls():
    rng = np.random.default_rng(4)
    log_q, log_pi = tabular.softmax(rng.normal(size=(3, 5)) * 2), np.full((3, 5), -np.log(5))
    reward = rng.normal(size=(3, 5))
    joint = tabular.joint_optimum_kl
    assert joint(log_q, log_pi, reward, 2.0, 1e-9) == pytest.approx(tabular.joint_optimum(log_q, reward, 2.0), abs=1e-6)
    assert joint(log_q, log_pi, reward, 1e9, 0.5) == pytest.approx(tabular.gibbs(log_pi, reward, 2.0), abs=1e-6)
    assert joint(log_q, log_pi, reward, 1e-9, 0.5) == pytest.approx(log_q, abs=1e-6)
    assert joint(log_q, log_pi, 0 * reward, 1e-9, 1e18) == pytest.approx(log_pi, abs=1e-6)
    extreme = joint(
        logs([1.0, 0.0, 0.0]), tabular.softmax([[-690.0, 0.0, -1.0]]), np.array([[-5.0, 5.0, 5.0]]), 1e3, 1e-3
    )
    assert np.exp(extreme).sum() == pytest.approx(1) and extreme[0, 1] - extreme[0, 2] == pytest.approx(1)


def test_the_joint_optimum_with_kl_is_stationary_and_lambert_s():
    rng = np.random.default_rng(5)
    log_q, log_pi = tabular.softmax(rng.normal(size=(2, 1, 5)))
    reward, lam, beta = rng.normal(size=(1, 5)), 1.7, 0.4
    best = tabular.joint_optimum_kl(log_q, log_pi, reward, lam, beta)
    q, p = np.exp(log_q), np.exp(best)
    stationary = -q / p - lam * reward + lam * beta * (best - log_pi)
    assert stationary - stationary[..., :1] == pytest.approx(np.zeros((1, 5)), abs=1e-10)
    # κ p W(q/(κπ) exp(m − r/β)) = q, W itself by SciPy
    kappa = lam * beta
    level = 1 / kappa + (tabular.expectation(best, reward) / beta - tabular.kl(best, log_pi))[:, None]
    w = lambertw(q / (kappa * np.exp(log_pi)) * np.exp(level - reward / beta)).real
    assert kappa * p * w == pytest.approx(q, abs=1e-12)


def test_the_quadratic_duration_is_zero_where_rl_does_not_pay():
    gradient, hessian = np.array([1.0, 0.0]), np.diag([2.0, 1.0])
    assert tabular.quadratic_duration(gradient, hessian, np.zeros(2), 0.5) == pytest.approx(1.0)
    assert tabular.quadratic_duration(gradient, hessian, np.array([3.0, 0.0]), 0.5) == 0
    assert tabular.quadratic_duration(0 * gradient, hessian, np.zeros(2), 0.5) == 0
    lams = tabular.quadratic_duration(gradient, hessian, np.zeros(2), np.array([0.5, 1.0]))
    assert lams == pytest.approx([1.0, 0.5])


# ---- GRPO


def enumerated_update(p, reward, group_size, scale):
    """E over all groups of 1/G Σ A ∇log p, advantages as TRL computes them."""
    update = np.zeros(len(p))
    for group in itertools.product(range(len(p)), repeat=group_size):
        sampled = torch.tensor(reward[list(group)])
        advantage = sampled - sampled.mean()
        if scale == "group":
            spread = sampled.std()
            advantage = advantage / spread if spread > 0 else advantage
        scores = np.eye(len(p))[list(group)] - p
        update += np.prod(p[list(group)]) * (advantage.numpy()[:, None] * scores).mean(0)
    return update


@pytest.mark.parametrize("group_size", [2, 3, 5])
@pytest.mark.parametrize(("scale", "reward"), [("none", [0.3, -1.0, 2.0]), ("group", [1.0, -1.0, 1.0])])
def test_the_expected_update_is_that_of_all_groups(group_size, scale, reward):
    p, reward = np.array([0.2, 0.5, 0.3]), np.array(reward)
    update = tabular.grpo_gradient(np.log([p]), reward[None], ONE, group_size, scale)
    assert update[0] == pytest.approx(enumerated_update(p, reward, group_size, scale), abs=1e-12)


def test_group_weights_at_the_ends_and_in_large_groups():
    assert tabular.group_weight(np.array([0.0, 0.3, 1.0]), 2) == pytest.approx(np.sqrt([0.5] * 3))
    assert tabular.group_weight(np.array([0.0, 1.0]), 8) == pytest.approx([7 / np.sqrt(8)] * 2)
    assert tabular.group_weight(np.array([0.3]), 4000) == pytest.approx(1 / np.sqrt(0.21), rel=1e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_grpo_with_kl_rests_where_following_it_ends(beta):
    log_pi, success = logs([0.2, 0.3, 0.5]), np.array([[1.0, 0.0, 0.0]])
    logits = log_pi
    for _ in range(3000):
        log_p = tabular.softmax(logits)
        step = tabular.grpo_gradient(log_p, success, ONE, 8) - beta * tabular.kl_gradient(log_p, log_pi, ONE)
        logits = logits + step
    expected = tabular.grpo_fixed_point(log_pi, success, beta, 8)
    assert log_p == pytest.approx(expected, abs=1e-6)
    assert np.abs(tabular.gibbs(log_pi, success, 1 / beta) - expected).max() > 0.1


def test_the_clipped_surrogate_gains_no_more_than_its_ceiling():
    log_s, advantage = logs([0.25, 0.75]), np.array([[1.5, -0.5]])
    far = logs([0.9, 0.1])
    # ratios 3.6 and 0.133 are beyond 1 ± 0.2 on the sides that pay: the ceiling ε E_s|A| is attained
    assert tabular.clipped_surrogate(far, log_s, advantage, 0.2, ONE) == pytest.approx(0.2 * 0.75)
    assert tabular.clipped_surrogate(log_s, log_s, advantage, 0.2, ONE) == pytest.approx(0)
    wrong_way = logs([0.05, 0.95])
    assert tabular.clipped_surrogate(wrong_way, log_s, advantage, 0.2, ONE) == pytest.approx(0.05 * 1.5 - 0.95 * 0.5)


# ---- bad input

P, R = HALF, np.array([[1.0, -1.0]])
BAD, SURE, TWO = P - 1, logs([1.0, 0.0]), np.full(2, 0.5)  # no policy; a probability of zero; weights of two prompts
THREE = np.full((3, 1, 2), np.log(0.5))  # instances


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tabular.log_probabilities([[0.5, 0.6]], "q"), r"q of shape \(1, 2\) has a row that sums to 1.1"),
        (lambda: tabular.log_probabilities([[1.5, -0.5]], "q"), "q holds -0.5, which is no probability"),
        (lambda: tabular.log_probabilities([[np.nan, 1.0]], "q"), "q holds nan"),
        (lambda: tabular.log_probabilities([0.5, 0.5], "q"), r"q has shape \(2,\): it needs prompts and responses"),
        (lambda: tabular.softmax([[np.nan, 0.0]]), "logits of shape"),
        (lambda: tabular.sft_loss(P, P - 1, ONE), r"log_q of shape \(1, 2\) has a row that sums to 0.36"),
        (lambda: tabular.kl(P, np.zeros((1, 3)) - np.log(3)), r"do not match: log_p \(1, 2\), log_s \(1, 3\)"),
        (lambda: tabular.gibbs(P, np.zeros((1, 3)), 1.0), r"do not match: log_s \(1, 2\), reward \(1, 3\)"),
        (lambda: tabular.gibbs(P, R, -1.0), "eta=-1.0 is not a finite number >= 0"),
        (lambda: tabular.gibbs(P, R, np.inf), "eta=inf is not a finite number >= 0"),
        (lambda: tabular.gibbs(P, R * np.inf, 1.0), "reward holds inf: rewards must be finite"),
        (lambda: tabular.rl_objective(P, P, R, -0.1, ONE), "beta=-0.1 is not a finite number >= 0"),
        (lambda: tabular.mean_reward(P, R, np.array([0.5])), r"weights of shape \(1,\) are not probabilities"),
        (lambda: tabular.mean_reward(P, R * np.nan, ONE), "reward holds nan"),
        (lambda: tabular.mixture(P, P, 1.5), "t=1.5 is not between 0 and 1"),
        (lambda: tabular.alignment(P, P, R, ONE, "other"), "metric='other' is neither"),
        (lambda: tabular.group_weight(np.array([0.5]), 1), "group_size=1 is below 2"),
        (lambda: tabular.group_weight(np.array([1.5]), 4), "success=1.5 is no probability"),
        (lambda: tabular.grpo_gradient(P, R, ONE, 0, "none"), "group_size=0 is below 1"),
        (lambda: tabular.grpo_gradient(P, R, ONE, 4, "std"), "scale='std' is neither"),
        (
            lambda: tabular.grpo_gradient(logs([0.2, 0.3, 0.5]), np.array([[1.0, 2.0, 3.0]]), ONE, 4),
            r"reward of shape \(1, 3\) has a prompt with more than two values",
        ),
        (lambda: tabular.grpo_fixed_point(P, R > 0, 0.0, 8), "beta=0.0 is not above 0"),
        (lambda: tabular.optimal_duration(P, R, ONE, 0.0), "lam=0.0 is not above 0"),
        (
            lambda: tabular.frontier(P, R, ONE, 1.1),
            r"target=1.1 is not between R\(q\)=0.0 and the best mean reward 1.0",
        ),
        (lambda: tabular.frontier(P, R, ONE, -0.5), "target=-0.5 is not between"),
        (lambda: tabular.interleaved(P, R, 1.0, 0.0), "alpha=0.0 is not above 0 and at most 1"),
        (lambda: tabular.reward_flow(logs([1.0, 0.0]), R, ONE, 1.0), "log_s holds a probability of zero"),
        # the right argument is blamed
        (lambda: tabular.sft_loss(BAD, P, ONE), r"log_p of shape \(1, 2\) has a row that sums to 0.36"),
        (lambda: tabular.joint_gap(BAD, P, R, 1.0, ONE), r"log_p of shape \(1, 2\) has a row"),
        (lambda: tabular.sft_loss_change(BAD, P, R, 1.0, ONE), r"log_q of shape \(1, 2\) has a row"),
        (lambda: tabular.best_duration(BAD, P, R, ONE), r"log_q of shape \(1, 2\) has a row"),
        (lambda: tabular.break_even(P, BAD, R, ONE), r"log_s of shape \(1, 2\) has a row"),
        (lambda: tabular.clipped_surrogate(P, BAD, R, 0.2, ONE), r"log_s of shape \(1, 2\) has a row"),
        (
            lambda: tabular.clipped_surrogate(P, P, R * np.inf, 0.2, ONE),
            "advantage holds inf: advantages must be finite",
        ),
        # supports
        (lambda: tabular.kl_gradient(P, SURE, ONE), r"log_s of shape \(1, 2\) excludes a response that log_p does not"),
        (lambda: tabular.sft_loss_change(P, SURE, R, 1.0, ONE), "log_s .* excludes a response that log_q does not"),
        (lambda: tabular.break_even(P, SURE, R, ONE), "log_s .* excludes a response that log_q does not"),
        (lambda: tabular.joint_gap(P, SURE, R, 0.1, ONE), r"log_q of shape \(1, 2\) holds a probability of 0"),
        (lambda: tabular.interleaved(SURE, -R, 1.0, 0.5), r"log_q of shape \(1, 2\) holds a probability of 0"),
        (lambda: tabular.clipped_surrogate(P, SURE, R, 0.2, ONE), r"log_s of shape \(1, 2\) holds a probability of 0"),
        (lambda: tabular.joint_optimum_kl(P, SURE, R, 1.0, 1.0), r"log_pi of shape \(1, 2\) holds a probability of 0"),
        # numbers
        (lambda: tabular.joint_optimum_kl(P, P, R, 0.0, 1.0), "lam=0.0 is not above 0"),
        (lambda: tabular.joint_optimum_kl(P, P, R, 1.0, 0.0), "beta=0.0 is not above 0"),
        (lambda: tabular.grpo_fixed_point(P, R, 1.0, 8), "success holds -1.0, which is neither 1 nor 0"),
        (lambda: tabular.clipped_surrogate(P, P, R, -1.0, ONE), "epsilon=-1.0 is not a finite number >= 0"),
        *[
            (lambda lam=lam: tabular.quadratic_duration(np.ones(2), np.eye(2), np.zeros(2), lam), f"lam={lam} is not")
            for lam in (-1.0, 0.0, np.nan, np.inf)
        ],
        (lambda: tabular.quadratic_duration(np.ones(2), np.eye(3), np.zeros(2), 1.0), r"hessian \(3, 3\)"),
        (lambda: tabular.safe_distance(0.0, 0.0), "mu=0.0 is not above 0"),
        (lambda: tabular.optimal_duration(P, R, ONE, 5e-324), "lam=5e-324 encloses no optimal duration"),
        # shapes of what is not a policy
        *[
            (lambda call=call, weights=weights: call(weights), rf"do not match: weights \({len(weights)},\), prompts")
            for weights, policy, reward in ((ONE, np.vstack([P, P]), np.vstack([R, R])), (TWO, P, R))
            for call in (
                lambda rho, p=policy, r=reward: tabular.average(tabular.entropy(p), rho),
                lambda rho, p=policy, r=reward: tabular.mean_reward(p, r, rho),
                lambda rho, p=policy, r=reward: tabular.sft_loss(p, p, rho),
                lambda rho, p=policy, r=reward: tabular.sft_gradient(p, p, rho),
                lambda rho, p=policy, r=reward: tabular.reward_gradient(p, r, rho),
                lambda rho, p=policy, r=reward: tabular.kl_gradient(p, p, rho),
                lambda rho, p=policy, r=reward: tabular.fisher(p, rho),
                lambda rho, p=policy, r=reward: tabular.best_duration(p, p, r, rho),
                lambda rho, p=policy, r=reward: tabular.optimal_duration(p, r, rho, 1.0),
                lambda rho, p=policy, r=reward: tabular.frontier(p, r, rho, 0.5),
                lambda rho, p=policy, r=reward: tabular.reward_flow(p, r, rho, 1.0),
            )
        ],
        (lambda: tabular.mean_reward(P, R, np.full(3, 1 / 3)), r"do not match: weights \(3,\), prompts \(1,\)"),
        (lambda: tabular.mean_reward(THREE, R, np.ones((2, 1))), r"do not match: weights \(2, 1\), prompts \(3, 1\)"),
        *[
            (lambda call=call: call(TWO), rf"do not match: {name} \(2,\), instances \(3,\)")
            for name, call in {
                "eta": lambda two: tabular.gibbs(THREE, R, two),
                "beta": lambda two: tabular.rl_objective(THREE, P, R, two, ONE),
                "lam": lambda two: tabular.joint_optimum(THREE, R, two),
                "t": lambda two: tabular.mixture(THREE, P, two),
                "target": lambda two: tabular.frontier(THREE, R, ONE, two),
                "time": lambda two: tabular.reward_flow(THREE, R, ONE, two),
            }.items()
        ],
        (lambda: tabular.optimal_duration(THREE, R, ONE, TWO), r"do not match: lam \(2,\), instances \(3,"),
        (lambda: tabular.interleaved(THREE, R, TWO, 0.5), r"do not match: lam \(2,\), instances \(3,"),
        (lambda: tabular.grpo_fixed_point(THREE, R > 0, TWO, 8), r"do not match: beta \(2,\), instances \(3,"),
        (lambda: tabular.mixture(P, np.vstack([P, P]), 0.5), r"do not match: log_s \(1, 2\), log_q \(2, 2\)"),
        (lambda: tabular.mixture(P, logs([0.2, 0.3, 0.5]), 0.5), r"do not match: log_s \(1, 2\), log_q \(1, 3\)"),
    ],
)
def test_bad_input_names_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
