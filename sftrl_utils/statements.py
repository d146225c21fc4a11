"""The theorems of the book as programs: each function checks the statement whose label is its name.

A check takes `Instances` and returns one `Check` a line of the statement: an identity with its worst residual, or a
bound with its smallest slack, relative to the larger side (at least 1) and over all instances. Statements, assumptions
and proofs stand in `notebooks/01_theory.ipynb`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.integrate import quad_vec
from scipy.special import comb, logsumexp

from sftrl_utils import tabular
from sftrl_utils.tabular import Array, average, expectation, kl, mean_reward, sft_loss, variance

IDENTITY, BOUND = "identity", "bound"
RESIDUAL = 1e-10  # an identity holds to this, a bound is missed by no more


@dataclass(frozen=True, eq=False)  # hashable by identity: results are kept
class Instances:
    """Random problems: leading axis n. Policies are log-probabilities (n, prompts, responses).

    `weights` (n, prompts): the prompts' probabilities; `log_q`: data; `log_s`: where a stage starts; `log_pi`: the
    reference of RL; `log_p`: any policy; `reward` as the policies; `beta` (n,): weight of the KL term.
    """

    weights: Array
    log_q: Array
    log_s: Array
    log_pi: Array
    log_p: Array
    reward: Array
    beta: Array

    @property
    def eta(self) -> Array:
        """Inverse temperature 1/β."""
        return 1 / self.beta

    def __getitem__(self, which) -> Instances:
        return Instances(*(getattr(self, field.name)[which] for field in fields(self)))

    def __len__(self) -> int:
        return len(self.beta)


class Check(NamedTuple):
    """One line of a statement: worst residual of an identity, smallest slack of a bound (negative: violated)."""

    line: str
    kind: str
    worst: float

    @property
    def holds(self) -> bool:
        return self.worst <= RESIDUAL if self.kind == IDENTITY else self.worst >= -RESIDUAL


def random_instances(n: int = 1000, prompts: int = 32, responses: int = 16, seed: int = 0) -> Instances:
    """Dirichlet policies from nearly deterministic to nearly uniform; rewards of two values, of five, and Gaussian."""
    rng = np.random.default_rng(seed)
    shape = (n, prompts, responses)

    def policy() -> Array:
        concentration = 10 ** rng.uniform(-0.5, 1, (n, 1, 1))
        # Gamma draws below 1e-30 are lifted: the statements about flows need logits.
        return tabular.softmax(np.log(np.maximum(rng.gamma(concentration, size=shape), 1e-30)))

    rewards = (rng.choice([-1.0, 1.0], shape), rng.integers(0, 5, shape) / 2 - 1, rng.normal(size=shape))
    return Instances(
        weights=rng.dirichlet(np.full(prompts, 2.0), n),
        **{name: policy() for name in ("log_q", "log_s", "log_pi", "log_p")},
        reward=np.choose(rng.integers(0, 3, (n, 1, 1)), rewards),
        beta=10 ** rng.uniform(-1, 1, n),
    )


def identity(line: str, left: Array, right: Array) -> Check:
    """left = right everywhere; `inf` equals `inf`, NaN equals nothing."""
    left, right = np.broadcast_arrays(np.asarray(left, float), np.asarray(right, float))
    same = left == right  # infinities too
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0, np.abs(left - right) / np.maximum(1, np.maximum(np.abs(left), np.abs(right))))
    off = np.where(np.isnan(off), np.inf, off)
    return Check(line, IDENTITY, float(off.max(initial=0)))


def bound(line: str, small: Array, large: Array) -> Check:
    """small ≤ large everywhere; NaN violates."""
    small, large = np.broadcast_arrays(np.asarray(small, float), np.asarray(large, float))
    with np.errstate(invalid="ignore"):
        slack = (large - small) / np.maximum(1, np.maximum(np.abs(small), np.abs(large)))
    slack = np.where(small == large, 0, np.where((large == np.inf) & (small < np.inf), np.inf, slack))
    return Check(line, BOUND, float(np.where(np.isnan(slack), -np.inf, slack).min(initial=np.inf)))


# ---- SFT, RL and the Gibbs policy


def cross_entropy(m: Instances) -> list[Check]:
    loss = sft_loss(m.log_p, m.log_q, m.weights)
    floor = average(tabular.entropy(m.log_q), m.weights)
    return [
        identity("L(p) = H(q) + KL(q ‖ p)", loss, floor + average(kl(m.log_q, m.log_p), m.weights)),
        bound("L(q) ≤ L(p)", sft_loss(m.log_q, m.log_q, m.weights), loss),
    ]


def gibbs_optimum(m: Instances) -> list[Check]:
    best = tabular.gibbs(m.log_pi, m.reward, m.eta)
    value = tabular.rl_objective(best, m.log_pi, m.reward, m.beta, m.weights)
    other = tabular.rl_objective(m.log_p, m.log_pi, m.reward, m.beta, m.weights)
    log_z = average(tabular.log_partition(m.log_pi, m.reward, m.eta), m.weights)
    return [
        identity("J(p*) = β E log Z", value, m.beta * log_z),
        identity("J(p*) − J(p) = β KL(p ‖ p*)", value - other, m.beta * average(kl(m.log_p, best), m.weights)),
        bound("J(p) ≤ J(p*)", other, value),
    ]


def gibbs_composition(m: Instances) -> list[Check]:
    first = tabular.gibbs(m.log_s, m.reward, m.eta / 3)
    both, once = tabular.gibbs(first, m.reward, m.eta * 2 / 3), tabular.gibbs(m.log_s, m.reward, m.eta)
    rate = _derivative(lambda eta: (m.weights * _tilted_mean(m.log_s, m.reward, eta)).sum(-1), m.eta)
    return [
        identity("RL for η/3, then 2η/3, is RL for η", both, once),
        identity("dR/dη = E Var r", rate, average(variance(once, m.reward), m.weights)),
    ]


# ---- RL after SFT


def sft_loss_change(m: Instances) -> list[Check]:
    trained = tabular.gibbs(m.log_s, m.reward, m.eta)
    change = tabular.sft_loss_change(m.log_q, m.log_s, m.reward, m.eta, m.weights)
    direct = sft_loss(trained, m.log_q, m.weights) - sft_loss(m.log_s, m.log_q, m.weights)
    divergence = average(kl(m.log_q, trained) - kl(m.log_q, m.log_s), m.weights)
    gain = mean_reward(trained, m.reward, m.weights) - mean_reward(m.log_q, m.reward, m.weights)
    centred = m.reward - expectation(m.log_q, m.reward)[..., None]
    slope = _derivative(lambda eta: (m.weights * _log_partition(m.log_s, centred, eta)).sum(-1), m.eta)
    by_kl = m.eta * gain - average(kl(trained, m.log_s), m.weights)
    return [
        identity("Δ = E[log Z − η E_q r]", direct, change),
        identity("Δ = KL(q ‖ p_η) − KL(q ‖ s)", divergence, change),
        identity("Δ = η (R(p_η) − R(q)) − KL(p_η ‖ s)", by_kl, change),
        identity("dΔ/dη = R(p_η) − R(q)", slope, gain),
    ]


def sft_optimality(m: Instances) -> list[Check]:
    trained = tabular.gibbs(m.log_q, m.reward, m.eta)
    rise = tabular.sft_loss_change(m.log_q, m.log_q, m.reward, m.eta, m.weights)
    lines = [
        identity("Δ = KL(q ‖ p_η)", rise, average(kl(m.log_q, trained), m.weights)),
        bound("0 ≤ Δ", 0 * rise, rise),
    ]
    centred = m.reward - expectation(m.log_q, m.reward)[..., None]
    width = average(tabular.reward_range(m.reward) ** 4, m.weights)
    for eta in (m.eta, m.eta / 10):
        rise = tabular.sft_loss_change(m.log_q, m.log_q, m.reward, eta, m.weights)
        second = average(expectation(m.log_q, centred**2), m.weights)
        third = average(expectation(m.log_q, centred**3), m.weights)
        off = np.abs(rise - eta**2 * second / 2 - eta**3 * third / 6)
        lines.append(bound("|Δ − η²V/2 − η³κ₃/6| ≤ η⁴ E w⁴/192", off, eta**4 * width / 192))
    return lines


def long_rl(m: Instances) -> list[Check]:
    change = tabular.sft_loss_change(m.log_q, m.log_s, m.reward, m.eta, m.weights)
    best = m.reward == m.reward.max(-1, keepdims=True)
    gap = m.reward.max(-1) - np.where(best, -np.inf, m.reward).max(-1)
    log_best = logsumexp(np.where(best, m.log_s, -np.inf), axis=-1)
    log_rest = logsumexp(np.where(best, -np.inf, m.log_s), axis=-1)
    shortfall = average(m.reward.max(-1) - expectation(m.log_q, m.reward), m.weights)
    leading = m.eta * shortfall + average(log_best, m.weights)
    with np.errstate(over="ignore"):
        remainder = average(np.exp(log_rest - log_best - m.eta[:, None] * gap), m.weights)
    return [
        bound("η E[max r − E_q r] + E log s(A*) ≤ Δ", leading, change),
        bound("Δ ≤ the same + E (1/s(A*) − 1) exp(−η gap)", change, leading + remainder),
    ]


def rl_threshold(m: Instances) -> list[Check]:
    lead = mean_reward(m.log_q, m.reward, m.weights) - mean_reward(m.log_s, m.reward, m.weights)
    short = average(m.reward.max(-1), m.weights) - mean_reward(m.log_q, m.reward, m.weights)
    rounding = 1e-12 * np.abs(m.reward).max((-2, -1))
    ahead, behind = m[lead <= 0], m[lead > rounding]
    lines = [bound("R(q) ≤ R(s): 0 ≤ Δ", np.zeros(len(ahead)), _change(ahead, ahead.eta))]
    lines += _labels_that_earn_the_most(behind)
    turning = (lead > rounding) & (short > rounding)
    m, lead = m[turning], lead[turning]
    crossing = tabular.break_even(m.log_q, m.log_s, m.reward, m.weights)
    best = tabular.best_duration(m.log_q, m.log_s, m.reward, m.weights)
    trained = tabular.gibbs(m.log_s, m.reward, best)
    width = average(tabular.reward_range(m.reward) ** 2, m.weights)
    spreads = [
        average(variance(tabular.gibbs(m.log_s, m.reward, crossing * part), m.reward), m.weights)
        for part in np.linspace(0, 1, 9)
    ]
    with np.errstate(divide="ignore"):
        latest = 2 * lead / np.minimum.reduce([*spreads, np.full(len(m), np.inf)])
    return lines + [
        identity("0 < η* < ∞", (crossing > 0) & np.isfinite(crossing), np.ones(len(m))),
        identity("Δ(η*) = 0", _change(m, crossing), np.zeros(len(m))),
        bound("Δ(η*/2) ≤ 0", _change(m, crossing / 2), np.zeros(len(m))),
        bound("0 ≤ Δ(2η*)", np.zeros(len(m)), _change(m, 2 * crossing)),
        identity(
            "least Δ where R(p_η) = R(q)",
            mean_reward(trained, m.reward, m.weights),
            mean_reward(m.log_q, m.reward, m.weights),
        ),
        identity("least Δ = −KL(p_η ‖ s)", _change(m, best), -average(kl(trained, m.log_s), m.weights)),
        bound("8δ / E w² ≤ η*", 8 * lead / width, crossing),
        bound("η* ≤ 2δ / min E Var r", crossing, latest),
    ]


def _labels_that_earn_the_most(m):
    """Item 4 of the threshold: the data put on the best responses alone."""
    best = m.reward == m.reward.max(-1, keepdims=True)
    log_q = np.where(best, m.log_p, -np.inf)
    log_q = log_q - logsumexp(log_q, axis=-1, keepdims=True)
    change = tabular.sft_loss_change(log_q, m.log_s, m.reward, m.eta, m.weights)
    moved = average(kl(tabular.gibbs(m.log_s, m.reward, m.eta), m.log_s), m.weights)
    lead = mean_reward(log_q, m.reward, m.weights) - mean_reward(m.log_s, m.reward, m.weights)
    crossing = tabular.break_even(log_q, m.log_s, m.reward, m.weights)
    clear = lead > 1e-12 * np.abs(m.reward).max((-2, -1))
    return [
        bound("R(q) = E max r: Δ ≤ −KL(p_η ‖ s)", change, -moved),
        identity("R(q) = E max r: η* = ∞", crossing[clear], np.full(clear.sum(), np.inf)),
    ]


def agreeing_verifier(m: Instances) -> list[Check]:
    accepted = m.reward >= np.median(m.reward, axis=-1, keepdims=True)
    labelled = m.reward == m.reward.max(-1, keepdims=True)  # on some prompts all that is accepted, on others less
    log_q = np.where(labelled, m.log_p, -np.inf)
    log_q = log_q - logsumexp(log_q, axis=-1, keepdims=True)
    reward = np.where(accepted, 1.0, -1.0)
    with np.errstate(divide="ignore"):
        log_s_right = logsumexp(np.where(accepted, m.log_s, -np.inf), axis=-1)
        log_s_wrong = logsumexp(np.where(accepted, -np.inf, m.log_s), axis=-1)
    change = tabular.sft_loss_change(log_q, m.log_s, reward, m.eta, m.weights)
    closed = average(np.logaddexp(log_s_right, log_s_wrong - 2 * m.eta[:, None]), m.weights)
    later = tabular.sft_loss_change(log_q, m.log_s, reward, 2 * m.eta, m.weights)
    return [
        identity("Δ = E log(s(A) + (1 − s(A)) exp(−2η))", change, closed),
        bound("Δ ≤ 0", change, 0 * change),
        bound("longer RL, lower loss", later, change),
    ]


def noisy_labels(m: Instances) -> list[Check]:
    labels = 2 * np.eye(m.log_q.shape[-1]) - 1  # reward of each response (row) for each drawn label (column)
    enumerated = np.einsum("yl,nxl->nxy", labels, np.exp(m.log_q))
    earned = average(2 * np.exp(2 * m.log_q).sum(-1) - 1, m.weights)
    reward = tabular.label_reward(m.log_q)
    most = average(2 * np.exp(m.log_q.max(-1)) - 1, m.weights)
    return [
        identity("E r(y) = 2q(y) − 1", reward, enumerated),
        identity("R(q) = E[2 Σ q² − 1]", mean_reward(m.log_q, reward, m.weights), earned),
        identity("best response: E[2 max q − 1]", average(enumerated.max(-1), m.weights), most),
        bound("R(q) ≤ E[2 max q − 1]", mean_reward(m.log_q, reward, m.weights), most),
    ]


def near_optimality(m: Instances) -> list[Check]:
    trained = tabular.gibbs(m.log_s, m.reward, m.eta)
    miss = average(kl(m.log_q, m.log_s), m.weights)
    widest = tabular.reward_range(m.reward).max(-1)
    least = average(kl(m.log_s, trained), m.weights) - m.eta * widest * np.sqrt(miss / 2)
    return [bound("KL(s ‖ p_η) − η w √(ε/2) ≤ Δ", least, _change(m, m.eta))]


# ---- SFT after RL


def reward_change_bounds(m: Instances) -> list[Check]:
    change = mean_reward(m.log_p, m.reward, m.weights) - mean_reward(m.log_s, m.reward, m.weights)
    width = tabular.reward_range(m.reward)
    by_variation = average(width * tabular.total_variation(m.log_p, m.log_s), m.weights)
    by_kl = width.max(-1) * np.sqrt(average(kl(m.log_p, m.log_s), m.weights) / 2)
    return [
        bound("|ΔR| ≤ E w TV", np.abs(change), by_variation),
        bound("E w TV ≤ w √(KL/2)", by_variation, by_kl),
    ]


def reward_change(m: Instances) -> list[Check]:
    trained = tabular.gibbs(m.log_pi, m.reward, m.eta)
    change = mean_reward(m.log_p, m.reward, m.weights) - mean_reward(trained, m.reward, m.weights)
    after, apart, before = (
        average(kl(*pair), m.weights) for pair in ((m.log_p, m.log_pi), (m.log_p, trained), (trained, m.log_pi))
    )
    objective = tabular.rl_objective(trained, m.log_pi, m.reward, m.beta, m.weights)
    lost = objective - tabular.rl_objective(m.log_p, m.log_pi, m.reward, m.beta, m.weights)
    nearer = after <= before
    return [
        identity("ΔR = β [KL(p ‖ π) − KL(p ‖ p_R) − KL(p_R ‖ π)]", change, m.beta * (after - apart - before)),
        identity("J(p_R) − J(p) = β KL(p ‖ p_R)", lost, m.beta * apart),
        bound("KL(p ‖ π) ≤ KL(p_R ‖ π): ΔR ≤ 0", change[nearer], np.zeros(nearer.sum())),
    ]


def forgetting(m: Instances) -> list[Check]:
    trained = tabular.gibbs(m.log_pi, m.reward, m.eta)
    drop = mean_reward(trained, m.reward, m.weights) - mean_reward(m.log_pi, m.reward, m.weights)
    both = average(kl(trained, m.log_pi) + kl(m.log_pi, trained), m.weights)
    few = m[:10]  # an integral costs hundreds of policies

    def spread(part):
        log_p = tabular.gibbs(few.log_pi, few.reward, part * few.eta)
        return few.eta * average(variance(log_p, few.reward), few.weights)

    summed, _ = quad_vec(spread, 0, 1, epsabs=1e-12, epsrel=1e-11, norm="max", points=np.linspace(0, 1, 17)[1:-1])
    return [
        identity("R(p_R) − R(π) = β [KL(p_R ‖ π) + KL(π ‖ p_R)]", drop, m.beta * both),
        identity("R(p_R) − R(π) = ∫ E Var r", drop[:10], summed),
        bound("0 ≤ R(p_R) − R(π)", 0 * drop, drop),
    ]


# ---- gradients, flows, durations


def gradient_flow_rates(m: Instances) -> list[Check]:
    descent = -tabular.sft_gradient(m.log_p, m.log_q, m.weights)
    ascent = tabular.reward_gradient(m.log_p, m.reward, m.weights)
    reward_rate = _derivative(lambda t: (m.weights * _softmax_mean(m.log_p + t * descent, m.reward)).sum(-1), 0.0)
    loss_rate = _derivative(
        lambda t: (m.weights * (_log_partition(m.log_p, t * ascent, 1.0) - _mean(m.log_q, t * ascent))).sum(-1), 0.0
    )
    p, q = np.exp(m.log_p), np.exp(m.log_q)
    centred = m.reward - expectation(m.log_p, m.reward)[..., None]
    closed = (m.weights**2 * (p * centred * (q - p)).sum(-1)).sum(-1)
    return [
        identity("SFT: dR/dt = Σ ρ² Σ p (r − r̄)(q − p)", reward_rate, closed),
        identity("RL: dL/dt = −(dR/dt of SFT)", loss_rate, -closed),
    ]


def natural_flows(m: Instances) -> list[Check]:
    metric = tabular.fisher(m.log_p, m.weights)
    tilt = np.exp(m.log_q - m.log_p) - 1
    t = 0.9 * m.beta / (1 + m.beta)  # anywhere in (0, 1)
    mixed = tabular.mixture(m.log_s, m.log_q, t)
    ends = [mean_reward(log_p, m.reward, m.weights) for log_p in (m.log_s, m.log_q)]
    s, q, mask = np.exp(m.log_s), np.exp(m.log_q), ~np.isneginf(m.log_q)

    def loss(t):
        path = np.where(mask, s + t[:, None, None] * (q - s), 1)
        return -(m.weights * (q * np.log(path)).sum(-1)).sum(-1)

    chi = average(tabular.chi_square(m.log_q, mixed), m.weights)
    return [
        identity("Fisher · (q/p − 1) = −∇L", _apply(metric, tilt), -tabular.sft_gradient(m.log_p, m.log_q, m.weights)),
        identity("Fisher · r = ∇R", _apply(metric, m.reward), tabular.reward_gradient(m.log_p, m.reward, m.weights)),
        identity("SFT: R is affine in t", mean_reward(mixed, m.reward, m.weights), (1 - t) * ends[0] + t * ends[1]),
        identity("SFT: dL/dt = −χ²(q ‖ p_t)/(1 − t)", _derivative(loss, t), -chi / (1 - t)),
    ]


def pl_inequality(m: Instances) -> list[Check]:
    gradient = tabular.sft_gradient(m.log_p, m.log_q, m.weights)
    loss = sft_loss(m.log_p, m.log_q, m.weights)
    excess = loss - average(tabular.entropy(m.log_q), m.weights)
    least = m.weights.min(-1) * np.exp(m.log_p.min((-2, -1)))
    step = (m.log_s - m.log_p) / 10
    linear = loss + (gradient * step).sum((-2, -1))
    curved = linear + m.weights.max(-1) / 4 * (step**2).sum((-2, -1))
    there = sft_loss(tabular.softmax(m.log_p + step), m.log_q, m.weights)
    return [
        bound("ρ_min p_min (L − L*) ≤ ‖∇L‖²", least * excess, (gradient**2).sum((-2, -1))),
        bound("L(θ) + ⟨∇L, d⟩ ≤ L(θ + d)", linear, there),
        bound("L(θ + d) ≤ L(θ) + ⟨∇L, d⟩ + ρ_max ‖d‖²/4", there, curved),
    ]


def rl_flow_bounds(m: Instances, time: float = 3.0) -> list[Check]:
    trained, displacement = tabular.reward_flow(m.log_q, m.reward, m.weights, time)
    rise = sft_loss(trained, m.log_q, m.weights) - sft_loss(m.log_q, m.log_q, m.weights)
    moved = (displacement**2).sum((-2, -1))
    gain = mean_reward(trained, m.reward, m.weights) - mean_reward(m.log_q, m.reward, m.weights)
    least = m.weights.min(-1) * np.exp(np.minimum(trained, m.log_q).min((-2, -1)))
    steepest = _norm(tabular.reward_gradient(m.log_q, m.reward, m.weights))
    width = tabular.reward_range(m.reward).max(-1)
    most = m.weights.max(-1)
    turns = 3 * width**2 / 8  # ∇R turns no faster: the last bound is greatest at T = ‖∇R‖ / turns
    short = np.divide(steepest, turns, where=turns > 0, out=np.zeros_like(turns))
    _, step = tabular.reward_flow(m.log_q, m.reward, m.weights, short)
    return [
        bound("m D²/2 ≤ Δ", least * moved / 2, rise),
        bound("Δ ≤ ρ_max D²/4", rise, most * moved / 4),
        bound("D² ≤ T (R_T − R_0)", moved, time * gain),
        bound("T ‖∇R‖ − 3w²T²/16 ≤ D", short * steepest - turns * short**2 / 2, _norm(step)),
    ]


def quadratic_duration(m: Instances) -> list[Check]:
    gradient, start, factor = m.reward[:, 0], np.exp(m.log_s[:, 0]), np.exp(m.log_p[:, : m.log_p.shape[-1]])
    hessian = np.einsum("nki,nkj->nij", factor, factor) + np.eye(factor.shape[-1])
    lam = m.beta / 100
    best = tabular.quadratic_duration(gradient, hessian, start, lam)

    gain = (gradient**2).sum(-1)

    def loss(time):
        end = start + time[:, None] * gradient
        return np.einsum("ni,nij,nj->n", end, hessian, end) / 2

    def utility(time):
        return time * gain - lam * loss(time)

    pays = best > 0
    return [
        identity("‖g‖² = λ dL/dT at T* > 0", gain[pays], (lam * _derivative(loss, best))[pays]),
        bound("U(T) ≤ U(T*), shorter", utility(best / 2), utility(best)),
        bound("U(T) ≤ U(T*), longer", utility(2 * best + 1), utility(best)),
    ]


def optimal_duration(m: Instances) -> list[Check]:
    best = tabular.optimal_duration(m.log_q, m.reward, m.weights, m.beta)
    gain, rise, spread, back = _rl_from_data(m, best)
    utilities = [
        there[0] - m.beta * there[1] for there in (_rl_from_data(m, part * best) for part in (0.5, 0.9, 1.1, 2))
    ]
    two = (m.reward >= np.median(m.reward, axis=-1, keepdims=True)).astype(float)
    coin = Instances(np.ones((len(m), 1)), *(a[:, :1] for a in (m.log_q, m.log_s, m.log_pi, m.log_p, two)), m.beta)
    only = tabular.optimal_duration(coin.log_q, coin.reward, coin.weights, coin.beta)
    around = [_rl_from_data(coin, part * only) for part in (0.1, 0.5, 0.9, 1.1, 2, 10)]
    slopes = np.stack([there[2] - m.beta * there[0] for there in around])
    lines = [
        identity("E Var r = λ (R_T − R_0) at T*", spread, m.beta * gain),
        bound("U(T) ≤ U(T*)", np.maximum.reduce(utilities), gain - m.beta * rise),
        identity("Δ(T) + KL(p_T ‖ q) = T (R_T − R_0)", rise + back, best * gain),
    ]
    return lines + [
        bound("one prompt, two values: U′ ≥ 0 before T*", 0, slopes[:3]),
        bound("one prompt, two values: U′ ≤ 0 after T*", slopes[3:], 0),
    ]


def _rl_from_data(m, time):
    """R_T − R_0, Δ(T), E Var r and KL(p_T ‖ q) of RL from q."""
    trained = tabular.gibbs(m.log_q, m.reward, time)
    gain = mean_reward(trained, m.reward, m.weights) - mean_reward(m.log_q, m.reward, m.weights)
    rise = tabular.sft_loss_change(m.log_q, m.log_q, m.reward, time, m.weights)
    return gain, rise, average(variance(trained, m.reward), m.weights), average(kl(trained, m.log_q), m.weights)


def strong_convexity(m: Instances) -> list[Check]:
    start, direction, factor = m.log_s[:, 0], m.reward[:, 0], m.log_p[:, : m.log_p.shape[-1]]
    hessian = np.einsum("nki,nkj->nij", factor, factor) + np.eye(factor.shape[-1])
    mu = np.linalg.eigvalsh(hessian)[:, 0]
    loss = np.einsum("ni,nij,nj->n", start, hessian, start) / 2
    length = np.sqrt((direction**2).sum(-1))
    moves = length > 0
    step = tabular.safe_distance(loss, mu)[moves, None] * direction[moves] / length[moves, None]
    end = start[moves] + step
    return [
        bound("D = 2 √(2ε/μ): L does not fall", loss[moves], np.einsum("ni,nij,nj->n", end, hessian[moves], end) / 2)
    ]


def fisher_alignment(m: Instances) -> list[Check]:
    product, cosine = tabular.alignment(m.log_p, m.log_q, m.reward, m.weights, "fisher")
    gap = mean_reward(m.log_q, m.reward, m.weights) - mean_reward(m.log_p, m.reward, m.weights)
    by_gradient = -(tabular.sft_gradient(m.log_p, m.log_q, m.weights) * m.reward).sum((-2, -1))
    joint = m.weights[..., None] * np.exp(m.log_p)
    # r and q/p, each centred on its prompt; roots first, or a tiny p would overflow.
    right = np.sqrt(joint) * (m.reward - expectation(m.log_p, m.reward)[..., None])
    left = np.sqrt(m.weights)[..., None] * (np.exp(m.log_q) - np.exp(m.log_p)) / np.exp(m.log_p / 2)
    moments = [(a * b).sum((-2, -1)) for a, b in ((left, right), (left, left), (right, right))]
    defined = (moments[1] > 1e-20) & (moments[2] > 1e-20)  # else a gradient vanishes but for rounding
    correlation = moments[0][defined] / np.sqrt(moments[1] * moments[2])[defined]
    return [
        identity("⟨−∇L, ∇R⟩ = R(q) − R(p)", product, gap),
        identity("the same by F⁺∇R = r", by_gradient, gap),
        identity("cosine = correlation of q/p with r", cosine[defined], correlation),
    ]


def spectral_bound(m: Instances, top: int = 8) -> list[Check]:
    values, vectors = np.linalg.eigh(tabular.fisher(m.log_p, m.weights))
    loss = tabular.sft_gradient(m.log_p, m.log_q, m.weights)
    gain = tabular.reward_gradient(m.log_p, m.reward, m.weights)
    product = np.abs((loss * gain).sum((-2, -1)))
    natural = np.sqrt(
        average(variance(m.log_p, m.reward), m.weights) * average(tabular.chi_square(m.log_q, m.log_p), m.weights)
    )
    radius = values.max((-2, -1))
    moving = ((loss**2).sum((-2, -1)) > 0) & ((gain**2).sum((-2, -1)) > 0)
    values, vectors, loss, gain = (array[moving] for array in (values, vectors, loss, gain))
    spectrum = values.reshape(len(values), values.shape[1] * values.shape[2])
    floor = np.sort(spectrum, axis=-1)[:, -min(top, spectrum.shape[-1])]
    kept = values >= floor[:, None, None]
    parts = [np.einsum("nxyk,nxy->nxk", vectors, g / _norm(g)[:, None, None]) for g in (-loss, gain)]
    energies = [np.where(kept, part**2, 0).sum((-2, -1)) for part in parts]
    cosine = (parts[0] * parts[1]).sum((-2, -1))
    inside = np.where(kept, parts[0] * parts[1], 0).sum((-2, -1))
    outside = np.sqrt(np.clip(1 - energies[0], 0, 1) * np.clip(1 - energies[1], 0, 1))
    return [
        bound("|⟨∇L, ∇R⟩| ≤ λ₁ √(E Var r · χ²)", product, radius * natural),
        bound("|cos − top-k part| ≤ √((1 − e_L)(1 − e_R))", np.abs(cosine - inside), outside),
    ]


# ---- both objectives at once


def joint_optimum(m: Instances) -> list[Check]:
    best = tabular.joint_optimum(m.log_q, m.reward, m.beta)
    p, q, lam = np.exp(best), np.exp(m.log_q), m.beta[:, None, None]
    earned = (p * m.reward).sum(-1, keepdims=True)

    def objective(log_p):
        return sft_loss(log_p, m.log_q, m.weights) - m.beta * mean_reward(log_p, m.reward, m.weights)

    gap = objective(m.log_p) - objective(best)
    return [
        identity("p (1 + λ (R − r)) = q", p * (1 + lam * (earned - m.reward)), q),
        identity(
            "L − λR above its optimum = E_q[u − 1 − log u]",
            gap,
            tabular.joint_gap(m.log_p, m.log_q, m.reward, m.beta, m.weights),
        ),
        bound("optimal", 0 * gap, gap),
    ]


def joint_optimum_kl(m: Instances) -> list[Check]:
    lam, beta = m.beta, np.sqrt(m.beta)
    kappa = (lam * beta)[:, None]
    best = tabular.joint_optimum_kl(m.log_q, m.log_pi, m.reward, lam, beta)
    p, q = np.exp(best), np.exp(m.log_q)
    earned = expectation(best, m.reward) / beta[:, None] - kl(best, m.log_pi)
    level = 1 / kappa + earned
    log_z = tabular.log_partition(m.log_pi, m.reward, 1 / beta)
    log_ratio = best - m.log_pi - m.reward / beta[:, None, None] + level[..., None]  # 0 for q = 0, W elsewhere

    def objective(log_p):
        value = tabular.rl_objective(log_p, m.log_pi, m.reward, beta, m.weights)
        return sft_loss(log_p, m.log_q, m.weights) - lam * value

    log_u = m.log_p - best
    above = expectation(m.log_q, np.expm1(log_u) - log_u) + kappa * kl(m.log_p, best)
    gap = objective(m.log_p) - objective(best)
    return [
        identity("κ p (m − r/β + log p/π) = q", kappa[..., None] * p * log_ratio, q),
        identity("above the optimum: E_q[u − 1 − log u] + κ KL(p ‖ p*)", gap, average(above, m.weights)),
        bound("optimal", 0 * gap, gap),
        bound("log Z ≤ m", log_z, level),
        bound("m ≤ log Z + 1/κ", level, log_z + 1 / kappa),
    ]


def joint_frontier(m: Instances) -> list[Check]:
    lams = (m.beta, m.beta * 1.5)
    policies = [tabular.joint_optimum(m.log_q, m.reward, lam) for lam in lams]
    losses = [sft_loss(log_p, m.log_q, m.weights) for log_p in policies]
    rewards = [mean_reward(log_p, m.reward, m.weights) for log_p in policies]
    loss, reward = losses[1] - losses[0], rewards[1] - rewards[0]
    least, _ = tabular.frontier(m.log_q, m.reward, m.weights, rewards[0])
    return [
        bound("λ dR ≤ dL", lams[0] * reward, loss),
        bound("dL ≤ (λ + dλ) dR", loss, lams[1] * reward),
        identity("the frontier passes through p_λ", least, losses[0]),
    ]


def sequential_endpoints(m: Instances) -> list[Check]:
    sft_then_rl = tabular.gibbs(m.log_q, m.reward, m.eta)
    rl_then_sft = tabular.mixture(sft_then_rl, m.log_q, np.full(len(m), 0.25))
    checks = []
    for name, log_p in (("SFT → RL", sft_then_rl), ("RL → SFT, a quarter of the way", rl_then_sft)):
        excess = tabular.excess_loss(log_p, m.log_q, m.reward, m.weights)
        checks.append(bound(f"{name}: not outside the frontier", 0 * excess, excess))
    return checks


def interleaving(m: Instances) -> list[Check]:
    lam = m.beta
    best = np.exp(tabular.joint_optimum(m.log_q, m.reward, lam))
    alpha = 0.01 / max(1, (lam * tabular.reward_range(m.reward).max(-1)).max())  # small enough to be of first order
    ends = [tabular.interleaved(m.log_q, m.reward, lam, part) for part in (alpha, alpha / 2)]
    distances = [np.abs(np.exp(log_p) - best).sum(-1).max(-1) for log_p in ends]
    again = tabular.gibbs(tabular.mixture(ends[0], m.log_q, alpha), m.reward, alpha * lam)
    full = tabular.interleaved(m.log_q, m.reward, lam, 1.0)
    return [
        identity("one more round changes nothing", again, ends[0]),
        identity("full SFT steps: RL from q, then back to q", full, tabular.gibbs(m.log_q, m.reward, lam)),
        bound("half the SFT fraction, at most 0.6 times the distance to p_λ", distances[1], 0.6 * distances[0]),
    ]


# ---- GRPO


def grpo_update(m: Instances, group_size: int = 8) -> list[Check]:
    p = np.exp(m.log_p)
    # E over pairs of ½ Σ A ∇log p. Its two terms are equal in expectation, and A sums to zero: no −p is left.
    advantage = (m.reward[..., :, None] - m.reward[..., None, :]) / 2
    pairs = m.weights[..., None] * (p[..., :, None] * p[..., None, :] * advantage).sum(-1)
    success = m.reward >= np.median(m.reward, axis=-1, keepdims=True)
    a, b = ((p * side).sum(-1) for side in (success, ~success))
    weight, rates = np.zeros_like(a), [np.zeros_like(a), np.zeros_like(a)]
    for n in range(1, group_size):  # successes; a group of none, or of nothing else, has no advantages
        rewards = np.repeat([1.0, 0.0], [n, group_size - n])
        right, wrong = (rewards - rewards.mean())[[0, -1]] / np.std(rewards, ddof=1)
        groups = comb(group_size, n) / group_size
        # Of P(N = n) = C a^n b^(G − n), what one success, or one failure, is given its own probability.
        rates[0] += groups * a ** (n - 1) * b ** (group_size - n) * n * right
        rates[1] += groups * a**n * b ** (group_size - n - 1) * (group_size - n) * wrong
        weight += groups * a ** (n - 1) * b ** (group_size - n - 1) * np.sqrt(n * (group_size - n))
    enumerated = m.weights[..., None] * p * np.where(success, rates[0][..., None], rates[1][..., None])
    slope = m.weights[..., None] * p * np.where(success, b[..., None], -a[..., None])
    displayed = np.sqrt((group_size - 1) / group_size) * weight[..., None] * slope
    given = [
        tabular.grpo_gradient(m.log_p, m.reward, m.weights, 2, "none"),
        tabular.grpo_gradient(m.log_p, success.astype(float), m.weights, group_size),
    ]
    return [
        identity("means subtracted: (1 − 1/G) ∇R, G = 2", given[0], pairs),
        identity(f"divided by the spread, all N, G = {group_size}", given[1], enumerated),
        identity(f"c_G(a) ∇a as displayed, G = {group_size}", displayed, enumerated),
    ]


def euclidean_sharpening(m: Instances) -> list[Check]:
    order = np.argsort(m.reward, axis=-1)  # of equal rewards neighbours are enough: differences add up

    def apart(values):
        return np.where(equal, np.diff(np.take_along_axis(values, order, -1)), 0)

    rewards = np.take_along_axis(m.reward, order, -1)
    equal = np.diff(rewards) == 0
    centred = (rewards - expectation(m.log_p, m.reward)[..., None])[..., :-1]
    kept = apart(tabular.gibbs(m.log_p, m.reward, m.eta) - m.log_p)
    return [
        identity(
            "equal rewards: d log(p_y/p_z)/dt = ρ (p_y − p_z)(r − r̄)",
            apart(tabular.reward_gradient(m.log_p, m.reward, m.weights)),
            m.weights[..., None] * centred * apart(np.exp(m.log_p)),
        ),
        identity("equal rewards, Gibbs: log(p_y/p_z) stays", kept, 0 * kept),
    ]


def clipped_surrogate(m: Instances, epsilon: float = 0.2) -> list[Check]:
    advantage = m.reward - expectation(m.log_s, m.reward)[..., None]
    clipped = tabular.clipped_surrogate(m.log_p, m.log_s, advantage, epsilon, m.weights)
    plain = average(expectation(m.log_p, advantage), m.weights)
    ceiling = epsilon * average(expectation(m.log_s, np.abs(advantage)), m.weights)
    with np.errstate(over="ignore"):
        farthest = np.abs(np.expm1(m.log_p - m.log_s)).max((-2, -1))
    near = tabular.mixture(m.log_s, m.log_p, np.minimum(0.5, 0.99 * epsilon / np.maximum(farthest, 1e-9)))
    here = tabular.clipped_surrogate(near, m.log_s, advantage, epsilon, m.weights)
    return [
        bound("clipped ≤ unclipped", clipped, plain),
        bound("clipped ≤ ε E_s |A|", clipped, ceiling),
        identity("no clipping within 1 ± ε", here, average(expectation(near, advantage), m.weights)),
    ]


def grpo_kl_term(m: Instances) -> list[Check]:
    def k3(t):  # on samples from p, along θ + t r: the samples' masses, and the estimator
        log_p = m.log_p + t * m.reward - _log_partition(m.log_p, m.reward, t)[..., None]
        return log_p, m.log_pi - log_p

    def as_loss(t):
        log_p, gap = k3(t)
        return (m.weights * (np.exp(m.log_p + gap) - np.exp(m.log_p) * (gap + 1)).sum(-1)).sum(-1)

    def with_ratio(t):
        log_p, gap = k3(t)
        return (m.weights * (np.exp(log_p + gap) - np.exp(log_p) * (gap + 1)).sum(-1)).sum(-1)

    forward_slope = (tabular.sft_gradient(m.log_p, m.log_pi, m.weights) * m.reward).sum((-2, -1))
    reverse_slope = (tabular.kl_gradient(m.log_p, m.log_pi, m.weights) * m.reward).sum((-2, -1))
    forward = tabular.joint_optimum(m.log_pi, m.reward, m.eta)
    reverse = tabular.gibbs(m.log_pi, m.reward, m.eta)
    scale = m.beta[:, None, None]
    return [
        identity("k3 as a loss: ∇KL(π ‖ p)", _derivative(as_loss, 0.0), forward_slope),
        identity("ratio × k3: ∇KL(p ‖ π)", _derivative(with_ratio, 0.0), reverse_slope),
        identity(
            "k3 as a loss: at rest at π / (1 + (R − r)/β)",
            tabular.reward_gradient(forward, m.reward, m.weights),
            scale * tabular.sft_gradient(forward, m.log_pi, m.weights),
        ),
        identity(
            "ratio × k3: at rest at Gibbs",
            tabular.reward_gradient(reverse, m.reward, m.weights),
            scale * tabular.kl_gradient(reverse, m.log_pi, m.weights),
        ),
    ]


def grpo_fixed_point(m: Instances, group_size: int = 8) -> list[Check]:
    success = (m.reward >= np.median(m.reward, axis=-1, keepdims=True)).astype(float)
    log_p = tabular.grpo_fixed_point(m.log_pi, success, m.beta, group_size)
    push = tabular.grpo_gradient(log_p, success, m.weights, group_size)
    pull = m.beta[:, None, None] * tabular.kl_gradient(log_p, m.log_pi, m.weights)
    return [identity("c_G(a) ∇a = β ∇KL(p ‖ π)", push, pull)]


STATEMENTS: tuple[Callable[[Instances], list[Check]], ...] = (
    *(cross_entropy, gibbs_optimum, gibbs_composition),
    *(sft_loss_change, sft_optimality, long_rl, rl_threshold, agreeing_verifier, noisy_labels, near_optimality),
    *(reward_change_bounds, reward_change, forgetting),
    *(gradient_flow_rates, natural_flows, pl_inequality, rl_flow_bounds),
    *(quadratic_duration, optimal_duration, strong_convexity, fisher_alignment, spectral_bound),
    *(joint_optimum, joint_optimum_kl, joint_frontier, sequential_endpoints, interleaving),
    *(grpo_update, euclidean_sharpening, clipped_surrogate, grpo_kl_term, grpo_fixed_point),
)


@cache
def results(statement: Callable[[Instances], list[Check]], m: Instances) -> list[Check]:
    """The checks of one statement on `m`, computed once."""
    return statement(m)


def table(m: Instances, *which: Callable[[Instances], list[Check]]) -> pd.DataFrame:
    """One row a line of the statements in `which`: identities with their worst residual, bounds with least slack."""
    rows = [(statement.__name__, *check, check.holds) for statement in which for check in results(statement, m)]
    frame = pd.DataFrame(rows, columns=["statement", "line", "kind", "worst", "holds"])
    frame = frame.set_index(["statement", "line"] if len(which) > 1 else "line").rename_axis(columns=None)
    return frame.assign(worst=[f"{value:.1e}" for value in frame["worst"]])


# ---- helpers


def _derivative(function: Callable, x: Array | float) -> Array:
    """f'(x) by a complex step, exact to rounding: f must not take absolute values, maxima or comparisons of x."""
    return function(x + 1e-30j).imag / 1e-30


# Written out again for complex arguments, and as a second opinion on `tabular`.


def _log_partition(log_s, reward, eta):
    eta = np.asarray(eta)[..., None, None]
    shift = (log_s + eta * reward).real.max(-1, keepdims=True)
    return (np.log(np.exp(log_s + eta * reward - shift).sum(-1, keepdims=True)) + shift)[..., 0]


def _tilted_mean(log_s, reward, eta):
    eta = np.asarray(eta)[..., None, None]
    mass = np.exp(log_s + eta * reward - (log_s + eta * reward).real.max(-1, keepdims=True))
    return (mass * reward).sum(-1) / mass.sum(-1)


def _softmax_mean(logits, reward):
    mass = np.exp(logits - logits.real.max(-1, keepdims=True))
    return (mass * reward).sum(-1) / mass.sum(-1)


def _mean(log_p, values):
    return (np.exp(log_p) * values).sum(-1)


def _change(m, eta):
    return tabular.sft_loss_change(m.log_q, m.log_s, m.reward, eta, m.weights)


def _apply(matrices, vectors):
    return np.einsum("nxij,nxj->nxi", matrices, vectors)


def _norm(gradient):
    return np.sqrt((gradient**2).sum((-2, -1)))
