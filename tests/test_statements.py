"""Every statement of the theory on random instances and on the worst that hypothesis can think of."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sftrl_utils import statements, tabular
from sftrl_utils.statements import STATEMENTS, Instances

# These divide by q, or start a flow from it: they assume q > 0.
POSITIVE_LABELS = {"rl_flow_bounds", "joint_optimum", "joint_frontier", "sequential_endpoints", "interleaving"}


@st.composite
def instances(draw, positive_labels=False):
    """Few prompts and responses: probabilities from 1e-300 to 1, labels of probability zero, rewards all equal."""
    n, prompts, responses = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = (n, prompts, responses)

    def policy():
        depth = draw(st.sampled_from([1.0, 30.0, 690.0]))
        return tabular.softmax(draw(hnp.arrays(float, shape, elements=st.floats(-depth, 0))))

    log_q = policy()
    if not positive_labels:
        impossible = draw(hnp.arrays(bool, shape))
        impossible[..., 0] = False
        log_q = np.where(impossible, -np.inf, log_q)
        log_q = log_q - np.logaddexp.reduce(log_q, axis=-1, keepdims=True)
    kind = draw(st.sampled_from(["equal", "two", "any"]))
    values = {"equal": st.just(1.5), "two": st.sampled_from([-1.0, 1.0]), "any": st.floats(-4, 4, width=16)}[kind]
    mass = draw(hnp.arrays(float, shape[:2], elements=st.floats(0.01, 1)))
    return Instances(
        weights=mass / mass.sum(-1, keepdims=True),
        **dict(log_q=log_q, log_s=policy(), log_pi=policy(), log_p=policy()),
        reward=draw(hnp.arrays(float, shape, elements=values)),
        beta=draw(hnp.arrays(float, n, elements=st.floats(0.05, 20))),
    )


def failures(statement, m):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NaN arithmetic would warn
        return [check for check in statement(m) if not check.holds]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda function: function.__name__)
def test_a_statement_holds_on_any_instance(statement):
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(instances(positive_labels=statement.__name__ in POSITIVE_LABELS))
    def holds(m):
        assert failures(statement, m) == []

    holds()


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda function: function.__name__)
def test_a_statement_holds_on_random_instances_and_says_by_how_much(statement):
    m = statements.random_instances(20, seed=1)
    checks = statement(m)
    assert checks and failures(statement, m) == []
    assert all(np.isfinite(check.worst) and check.line for check in checks)


def test_a_wrong_identity_and_a_violated_bound_are_seen():
    wrong = statements.identity("off by a millionth", np.ones(3), np.array([1, 1, 1 + 1e-6]))
    assert not wrong.holds and wrong.worst == pytest.approx(1e-6, rel=1e-3)
    assert not statements.identity("NaN", np.array([np.nan]), np.zeros(1)).holds
    assert not statements.identity("inf on one side", np.array([np.inf]), np.zeros(1)).holds
    assert statements.identity("inf on both", np.array([np.inf]), np.array([np.inf])).holds
    violated = statements.bound("above", np.array([0.0, 2.0]), np.array([1.0, 1.0]))
    assert not violated.holds and violated.worst == -0.5
    assert not statements.bound("NaN", np.zeros(1), np.array([np.nan])).holds
    assert statements.bound("below inf", np.zeros(1), np.array([np.inf])).holds


def test_random_instances_repeat_and_differ_with_the_seed():
    one, again, other = (statements.random_instances(3, 2, 4, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one.log_q, again.log_q) and not np.array_equal(one.log_q, other.log_q)
    assert one.log_p.shape == (3, 2, 4) and len(one) == 3 and len(one[:2]) == 2
    values = {tuple(np.unique(reward)) for reward in statements.random_instances(30).reward}
    assert {(-1.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)} < values and max(map(len, values)) > 100


def one_prompt(**policies):
    """One instance of one prompt; what is not given is a fair coin, rewarded on its first side."""
    logs = {name: tabular.log_probabilities([[p]]) for name, p in policies.items() if name.startswith("log_")}
    size = max([array.shape[-1] for array in logs.values()], default=2)
    coin = np.full((1, 1, size), -np.log(size))
    reward = np.eye(1, size)[None] if "reward" not in policies else np.array([[policies["reward"]]], dtype=float)
    names = ("log_q", "log_s", "log_pi", "log_p")
    return Instances(
        np.ones((1, 1)), *(logs.get(name, coin) for name in names), reward, np.array([policies.get("beta", 1.0)])
    )


FAIR, SKEW = [0.5, 0.5], [0.2, 0.8]


def worst(statement, m):
    return [check.worst for check in statement(m)]


def test_bounds_are_attained_where_they_should_be():
    # Half the mass moves from worst to best: TV is exact, and for short moves Pinsker nearly is.
    near = worst(statements.reward_change_bounds, one_prompt(log_p=[0.501, 0.499]))
    assert near == pytest.approx([0, 0], abs=1e-6)
    # On two prompts in opposite directions the changes cancel, and the distances do not.
    two = [[0.6, 0.4], [0.4, 0.6]], [FAIR, FAIR]
    log_p, log_s = (tabular.log_probabilities(p)[None] for p in two)
    m = Instances(FAIR * np.ones((1, 2)), *[log_s] * 3, log_p, np.array([[[1.0, -1.0]] * 2]), np.ones(1))
    assert worst(statements.reward_change_bounds, m)[0] == pytest.approx(0.2)
    # KL(p ‖ s) is finite and KL(s ‖ p) is not: the bound is on the first.
    assert np.isfinite(worst(statements.reward_change_bounds, one_prompt(log_p=[1.0, 0.0]))[1])
    # The whole spectrum is in the top eight: nothing is outside.
    m = one_prompt(log_p=[0.2, 0.3, 0.5], log_q=[0.6, 0.3, 0.1])
    assert worst(statements.spectral_bound, m)[1] == pytest.approx(0, abs=1e-7)
    # Outside the top one of two directions there is only the other.
    m = one_prompt(log_p=[0.2, 0.3, 0.5], log_q=[0.6, 0.3, 0.1], reward=[1.0, 0.0, -0.5])
    assert [check.worst for check in statements.spectral_bound(m, top=1)][1] == pytest.approx(0, abs=1e-7)
    # A parabola, crossed to its other side.
    m = one_prompt()
    m = Instances(m.weights, *[np.full((1, 1, 1), -2.0)] * 4, np.ones((1, 1, 1)), m.beta)
    assert worst(statements.strong_convexity, m) == pytest.approx([0], abs=1e-12)
    # A fair coin has the extreme fourth cumulant: what is left of the bound is of sixth order.
    m = one_prompt(reward=[-1.0, 1.0], beta=20.0)
    assert worst(statements.sft_optimality, m)[2] == pytest.approx(0, abs=2e-9)


EQUALITY = [
    # statement, its lines that are attained, where
    (statements.cross_entropy, [1], dict(log_p=SKEW, log_q=SKEW)),
    (statements.gibbs_optimum, [2], dict(log_p=[np.e / (np.e + 1), 1 / (np.e + 1)])),  # J(p*) itself
    (statements.sft_optimality, [1], dict(reward=[2.0, 2.0])),
    (statements.long_rl, [0, 1], dict(beta=0.02)),  # what is left is exp(−50)
    (statements.rl_threshold, [0], dict(reward=[1.0, 1.0])),
    (statements.near_optimality, [0], dict(log_q=SKEW, log_s=SKEW)),
    (statements.agreeing_verifier, [1, 2], dict(reward=[1.0, 1.0])),  # every response is accepted
    (statements.noisy_labels, [3], dict()),  # a fair coin: every response is best
    (statements.reward_change, [2], dict(log_p=FAIR, reward=[1.0, 1.0])),
    (statements.forgetting, [2], dict(reward=[1.0, 1.0])),
    (statements.pl_inequality, [0], dict(log_p=SKEW, log_q=SKEW)),
    (statements.spectral_bound, [0], dict(log_p=SKEW, log_q=FAIR)),
    (statements.joint_optimum, [2], dict(log_p=FAIR, reward=[1.0, 1.0])),
    (statements.joint_optimum_kl, [2, 4], dict(reward=[1.0, 1.0])),  # p = q = π
    (statements.sequential_endpoints, [0, 1], dict(log_q=SKEW)),
    (statements.clipped_surrogate, [0], dict(log_p=[0.52, 0.48])),  # within 1 ± ε
    (statements.clipped_surrogate, [1], dict(log_p=[0.9, 0.1])),  # beyond it on the side that pays
]


@pytest.mark.parametrize(("statement", "lines", "where"), EQUALITY, ids=lambda part: getattr(part, "__name__", ""))
def test_equality_is_attained_where_there_is_a_case_of_it(statement, lines, where):
    checks = statement(one_prompt(**where))
    assert [checks[i].kind for i in lines] == ["bound"] * len(lines)
    assert [checks[i].worst for i in lines] == pytest.approx([0] * len(lines), abs=1e-9)


def test_both_bounds_on_the_break_even_meet_for_short_rl_from_a_fair_coin():
    checks = statements.rl_threshold(one_prompt(log_q=[0.5005, 0.4995], reward=[1.0, -1.0]))
    assert [check.worst for check in checks[-2:]] == pytest.approx([0, 0], abs=1e-6)


def test_the_least_displacement_is_positive_where_it_is_checked():
    m = statements.random_instances(20, seed=2)
    steepest = np.sqrt((tabular.reward_gradient(m.log_q, m.reward, m.weights) ** 2).sum((-2, -1)))
    width = tabular.reward_range(m.reward).max(-1)
    [*_, last] = statements.rl_flow_bounds(m)
    # D is at least the left side, 4‖∇R‖²/(3w²), and at most T ‖∇R‖ by much: twice it, and what curvature adds.
    left = 4 * steepest**2 / (3 * width**2)
    assert left.min() > 1e-5 and 0 < last.worst < 1.1 * left.max()


def test_sequences_are_measured_where_they_are_said_to_end():
    m = one_prompt(log_q=[0.2, 0.3, 0.5], reward=[1.0, 0.2, -1.0])
    trained = tabular.gibbs(m.log_q, m.reward, 1.0)
    ends = [trained, np.log(0.75 * np.exp(trained) + 0.25 * np.exp(m.log_q))]
    excess = [tabular.excess_loss(log_p, m.log_q, m.reward, m.weights)[0] for log_p in ends]
    assert worst(statements.sequential_endpoints, m) == pytest.approx(excess) and min(excess) > 1e-3


def test_the_table_has_a_row_a_line_and_numbers_to_two_digits():
    m = statements.random_instances(3, 2, 4)
    one, two = (statements.table(m, *STATEMENTS[:count]) for count in (1, 2))
    checks = statements.results(STATEMENTS[0], m)
    assert list(one.index) == [check.line for check in checks] and one["holds"].all()
    assert [float(worst) for worst in one["worst"]] == pytest.approx([check.worst for check in checks], rel=0.05)
    assert list(two.loc["cross_entropy"].index) == list(one.index) and "gibbs_optimum" in two.index
