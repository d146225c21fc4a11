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
    # A bound that is never near would say little: some line of every statement is within 1 of equality.
    assert min(abs(check.worst) for check in checks) < 1


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
