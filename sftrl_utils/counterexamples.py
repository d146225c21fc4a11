"""Where a claim about SFT and RL needs an assumption: the smallest examples in which it fails without.

Each function returns the numbers of one example; `notebooks/01_theory.ipynb` says what they show.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from sftrl_utils import tabular
from sftrl_utils.tabular import kl, log_probabilities, mean_reward, sft_loss

ONE = np.ones(1)  # one prompt
RIGHT_OR_WRONG = np.array([[1.0, -1.0]])
DEV, ACCEPTABLE = 527, 365  # CoLA's public in-domain dev file: sentences, and how many are acceptable


def rl_lowers_the_sft_loss() -> dict[str, float]:
    """An SFT model less sure than its data: RL lowers the SFT loss, and raises it only after η*."""
    log_q, log_s = log_probabilities([[0.9, 0.1]]), log_probabilities([[0.6, 0.4]])
    setting = (log_q, log_s, RIGHT_OR_WRONG)
    best = float(tabular.best_duration(*setting, ONE))
    return {
        "loss after SFT": float(sft_loss(log_s, log_q, ONE)),
        "η of the least loss": best,
        "loss there": float(sft_loss(tabular.gibbs(log_s, RIGHT_OR_WRONG, best), log_q, ONE)),
        "η* of no change": float(tabular.break_even(*setting, ONE)),
    }


def single_labels_lower_it_for_ever() -> dict[str, float]:
    """One label a sentence and a verifier that agrees with it: no RL, however long, raises the SFT loss."""
    log_q, log_s = log_probabilities([[1.0, 0.0]]), log_probabilities([[0.6, 0.4]])
    change = tabular.sft_loss_change(log_q, log_s, RIGHT_OR_WRONG, np.array([0.5, 2.0, 50.0]), ONE)
    return {f"Δ at η = {eta}": float(value) for eta, value in zip((0.5, 2, 50), change, strict=True)}


def bounded_kl_is_not_enough() -> dict[str, float]:
    """SFT that moves away from RL's endpoint, by a KL above zero, and loses no reward: equal rewards; sharper data."""
    log_pi, elsewhere = log_probabilities([[0.6, 0.4]]), log_probabilities([[0.2, 0.8]])
    sharper = tabular.gibbs(log_pi, RIGHT_OR_WRONG, 2.0)
    values = {}
    for name, reward, after in (
        ("equal rewards", np.ones((1, 2)), elsewhere),
        ("sharper data", RIGHT_OR_WRONG, sharper),
    ):
        trained = tabular.gibbs(log_pi, reward, 1.0)
        values[f"{name}: KL moved"] = float(kl(after, trained)[0])
        values[f"{name}: change of R"] = float(mean_reward(after, reward, ONE) - mean_reward(trained, reward, ONE))
        objectives = [float(tabular.rl_objective(log_p, log_pi, reward, 1.0, ONE)) for log_p in (trained, after)]
        values[f"{name}: change of J"] = objectives[1] - objectives[0]
    return values


def distance_says_nothing_of_sign() -> dict[str, float]:
    """Two SFT stages that move equally far from RL's endpoint, in total variation: one loses what the other gains."""
    log_p = log_probabilities([[0.7, 0.3]])
    changes = {}
    for name, after in (("towards the wrong answer", [[0.6, 0.4]]), ("towards the right answer", [[0.8, 0.2]])):
        log_after = log_probabilities(after)
        changes[f"{name}: TV"] = float(tabular.total_variation(log_after, log_p)[0])
        changes[f"{name}: change of R"] = float(
            mean_reward(log_after, RIGHT_OR_WRONG, ONE) - mean_reward(log_p, RIGHT_OR_WRONG, ONE)
        )
    return changes


def pl_alone_bounds_nothing() -> dict[str, float]:
    """L = θ₁²/2 satisfies the PL condition with μ = 1 and J = θ₂: RL goes any distance and leaves L where it was."""
    theta = np.array([0.0, 0.0])
    for _ in range(1000):
        theta = theta + 0.1 * np.array([0.0, 1.0])
    return {"distance moved": float(np.linalg.norm(theta)), "change of L": float(theta[0] ** 2 / 2)}


def several_best_durations(lam: float = 3.0) -> dict[str, float]:
    """A common small reward and a rare large one: the condition for the optimal RL duration has three solutions."""
    log_q, reward = log_probabilities([[0.99 - 1e-9, 0.01, 1e-9]]), np.array([[0.0, 1.0, 10.0]])

    def slope(time):
        trained = tabular.gibbs(log_q, reward, time)
        gain = mean_reward(trained, reward, ONE) - mean_reward(log_q, reward, ONE)
        return float(tabular.variance(trained, reward)[0] - lam * gain)

    grid = np.linspace(1e-3, 6, 2000)
    signs = np.sign([slope(time) for time in grid])
    roots = [brentq(slope, grid[i], grid[i + 1]) for i in np.nonzero(np.diff(signs))[0]]
    values = {}
    for name, time in zip(("first (a maximum)", "second (a minimum)", "third (a maximum)"), roots, strict=True):
        gain = mean_reward(tabular.gibbs(log_q, reward, time), reward, ONE) - mean_reward(log_q, reward, ONE)
        utility = gain - lam * tabular.sft_loss_change(log_q, log_q, reward, time, ONE)
        values |= {f"{name}: T": time, f"{name}: U(T)": float(utility)}
    return values


def cosines_differ_in_sign() -> dict[str, float]:
    """Euclidean gradients of the two objectives oppose each other while natural-gradient RL lowers the SFT loss."""
    log_p, log_q = log_probabilities([[0.05, 0.15, 0.8]]), log_probabilities([[0.15, 0.15, 0.7]])
    reward = np.array([[1.0, 0.0, 0.5]])
    values = {}
    for metric in ("euclidean", "fisher"):
        values[f"{metric} cosine"] = float(tabular.alignment(log_p, log_q, reward, ONE, metric)[1])
    values["R(q) − R(p)"] = float(mean_reward(log_q, reward, ONE) - mean_reward(log_p, reward, ONE))
    return values


def grpo_is_not_gibbs(beta: float = 0.5, group_size: int = 8) -> dict[str, float]:
    """Success rate where three updates with the same β come to rest, from π = 0.3: only one is Gibbs."""
    log_pi, success = log_probabilities([[0.3, 0.7]]), np.array([[1.0, 0.0]])
    ends = {
        "Gibbs": tabular.gibbs(log_pi, success, 1 / beta),
        "GRPO, spread divided out": tabular.grpo_fixed_point(log_pi, success, beta, group_size),
        "k3 as a loss": tabular.joint_optimum(log_pi, success, 1 / beta),
    }
    return {name: float(np.exp(log_p[0, 0])) for name, log_p in ends.items()}


def paper_arithmetic() -> pd.DataFrame:
    """The paper's mean@1 as accuracy and as CoLA dev sentences, beside answers that do not look at the sentence."""
    constant = 2 * ACCEPTABLE / DEV - 1
    rows = {"paper: after RL": 0.385, "paper: after SFT": 0.343, "always `acceptable`": constant}
    rows["354 of 527 right"] = 2 * 354 / DEV - 1
    table = pd.DataFrame({"mean reward": rows})
    table["accuracy"] = (1 + table["mean reward"]) / 2
    table["sentences of 527"] = table["accuracy"] * DEV
    return table


def unpaired_z(before: float = 0.385, after: float = 0.343, n: int = DEV) -> float:
    """z of the fall in accuracy if each figure is one sample on each of `n` sentences."""
    shares = [(1 + before) / 2, (1 + after) / 2]
    return float((shares[0] - shares[1]) / np.sqrt(sum(share * (1 - share) for share in shares) / n))


def sentence_blind_rl(etas: tuple[float, ...] = (0, 1, 2, 5, 10)) -> pd.DataFrame:
    """SFT loss and reward under RL of a policy that gives every sentence the corpus's own rate of `acceptable`.

    Rewards are against a drawn label: 2q − 1 in expectation.
    """
    log_q = log_probabilities([[ACCEPTABLE / DEV, 1 - ACCEPTABLE / DEV]])
    reward = tabular.label_reward(log_q)
    trained = tabular.gibbs(log_q, reward, np.array(etas, dtype=float))
    return pd.DataFrame(
        {
            "SFT loss": sft_loss(trained, log_q, ONE),
            "mean reward": mean_reward(trained, reward, ONE),
            "P(acceptable)": np.exp(trained[:, 0, 0]),
        },
        index=pd.Index(etas, name="η"),
    )


def unattainable_on_all_dev(figures: tuple[float, ...] = (0.385, 0.343), n: int = 1043) -> dict[str, float]:
    """Nearest mean rewards to the paper's that one sample on each of CoLA's 1,043 dev sentences can give."""
    return {f"{figure}: nearest": float(2 * round((1 + figure) / 2 * n) / n - 1) for figure in figures}
