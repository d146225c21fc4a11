"""Exact finite policies: every quantity of the theory by enumeration, in float64 (NumPy and SciPy only).

A policy is an array of log-probabilities of shape (..., prompts, responses): -inf stands for zero, and a
probability of 1e-300 keeps its precision. `weights` (..., prompts) are the probabilities of the prompts, `reward`
has the policy's shape; leading axes are instances, over which everything is vectorised. Functions return one number
an instance unless they say "per prompt". Divergences are in nats and `inf` where supports do not match.

Arguments that are no distributions, do not fit together, or are infinite where they must not be raise `ValueError`
naming the argument and its shape or value. Symbols are those of `book/notation.md`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.optimize.elementwise import bracket_root, find_root
from scipy.special import logsumexp, xlogy
from scipy.stats import binom

Array = np.ndarray
TOLERANCE = 1e-9  # by how much probabilities may miss a sum of one


# ---- policies and expectations


def log_probabilities(p: ArrayLike, name: str = "p") -> Array:
    """log p for probabilities p (..., prompts, responses); raises `ValueError` if a row does not sum to one."""
    p = np.asarray(p, dtype=float)
    if not np.all(p >= 0):
        raise ValueError(f"{name} holds {p[~(p >= 0)].flat[0]}, which is no probability")
    with np.errstate(divide="ignore"):
        return _log_policy(np.log(p), name)


def softmax(logits: ArrayLike) -> Array:
    """The policy of `logits` (..., prompts, responses): log p = logits − log Σ exp(logits)."""
    logits = np.asarray(logits, dtype=float)
    return _log_policy(logits - logsumexp(logits, axis=-1, keepdims=True), "logits")


def average(values: Array, weights: Array) -> Array:
    """E_ρ: values per prompt (..., prompts) averaged with the prompts' probabilities."""
    weights = _weights(weights)
    return np.where(weights > 0, weights * np.where(weights > 0, values, 0), 0).sum(-1)


def expectation(log_p: Array, values: Array) -> Array:
    """E_p[values] per prompt; responses of probability zero do not count, whatever their value."""
    log_p, values = _fit(log_p=_log_policy(log_p, "log_p"), values=values)
    values = np.where(np.isneginf(log_p), 0, values)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(values), values, np.exp(log_p) * values).sum(-1)


def variance(log_p: Array, values: Array) -> Array:
    """Var_p[values] per prompt."""
    return expectation(log_p, (values - expectation(log_p, values)[..., None]) ** 2)


def entropy(log_p: Array) -> Array:
    """H(p) per prompt."""
    return -expectation(log_p, log_p)


def kl(log_p: Array, log_s: Array) -> Array:
    """KL(p ‖ s) = E_p[log p − log s] per prompt."""
    log_p, log_s = _fit(log_p=log_p, log_s=_log_policy(log_s, "log_s"))
    gap = np.subtract(log_p, log_s, where=~np.isneginf(log_p), out=np.zeros_like(log_p))
    return np.maximum(expectation(log_p, gap), 0)  # not below, by rounding


def chi_square(log_q: Array, log_p: Array) -> Array:
    """χ²(q ‖ p) = E_p[(q/p − 1)²] per prompt."""
    log_q, log_p = _fit(log_q=_log_policy(log_q, "log_q"), log_p=_log_policy(log_p, "log_p"))
    p, gap = np.exp(log_p), np.exp(log_q) - np.exp(log_p)
    with np.errstate(divide="ignore", over="ignore"):
        terms = np.divide(gap**2, p, where=gap != 0, out=np.zeros_like(p))  # (q/p − 1)² alone could overflow
    return terms.sum(-1)


def total_variation(log_p: Array, log_s: Array) -> Array:
    """TV(p, s) = ½ Σ |p − s| per prompt."""
    log_p, log_s = _fit(log_p=_log_policy(log_p, "log_p"), log_s=_log_policy(log_s, "log_s"))
    return np.abs(np.exp(log_p) - np.exp(log_s)).sum(-1) / 2


# ---- the two objectives


def sft_loss(log_p: Array, log_q: Array, weights: Array) -> Array:
    """L(p) = E_ρ E_q[−log p], Eq. (tabular-sft-loss)."""
    return average(expectation(log_q, -np.asarray(log_p)), weights)


def mean_reward(log_p: Array, reward: Array, weights: Array) -> Array:
    """R(p) = E_ρ E_p[r], Eq. (tabular-mean-reward)."""
    return average(expectation(log_p, _reward(reward)), weights)


def rl_objective(log_p: Array, log_pi: Array, reward: Array, beta: ArrayLike, weights: Array) -> Array:
    """J_β(p) = R(p) − β E KL(p ‖ π), Eq. (tabular-rl-objective); -inf where p leaves the support of π and β > 0."""
    beta = _scale(beta, "beta")
    divergence = average(kl(log_p, log_pi), weights)
    return mean_reward(log_p, reward, weights) - np.where(beta > 0, beta * np.where(beta > 0, divergence, 0), 0)


def log_partition(log_s: Array, reward: Array, eta: ArrayLike) -> Array:
    """log Z = log Σ s exp(ηr) per prompt."""
    return _tilted(log_s, reward, eta)[1]


def gibbs(log_s: Array, reward: Array, eta: ArrayLike) -> Array:
    """p_η = s exp(ηr) / Z, Eq. (gibbs): the optimum of J_β from s at β = 1/η, and natural-gradient RL for time η."""
    tilted, log_z = _tilted(log_s, reward, eta)
    return tilted - log_z[..., None]


def _tilted(log_s, reward, eta):
    log_s, reward = _fit(log_s=_log_policy(log_s, "log_s"), reward=_reward(reward))
    exponent = _scale(eta, "eta")[..., None, None] * reward
    log_z = logsumexp(log_s + exponent, axis=-1)
    slight = np.abs(exponent).max(-1) < 0.1
    if slight.any():  # log Z to relative precision, or short RL would be lost in rounding
        log_z = np.where(slight, np.log1p(expectation(log_s, np.expm1(np.clip(exponent, -0.1, 0.1)))), log_z)
    return log_s + exponent, log_z


def label_reward(log_q: Array) -> Array:
    """Expected reward (+1 match, −1 otherwise) of each response against a label drawn from q: 2q − 1."""
    return 2 * np.exp(_log_policy(log_q, "log_q")) - 1


# ---- RL after SFT


def sft_loss_change(log_q: Array, log_s: Array, reward: Array, eta: ArrayLike, weights: Array) -> Array:
    """Δ(η) = L(p_η) − L(s) = E[log Z − η E_q r]; needs q's support inside that of s."""
    advantage = _reward(reward) - expectation(log_q, reward)[..., None]
    return average(log_partition(log_s, advantage, eta), weights)


def best_duration(log_q: Array, log_s: Array, reward: Array, weights: Array) -> Array:
    """η that minimises Δ: where R(p_η) = R(q). 0 if RL only raises the SFT loss, inf if it lowers it for ever."""

    def slope(eta, log_q, log_s, reward, weights):
        return mean_reward(gibbs(log_s, reward, eta), reward, weights) - mean_reward(log_q, reward, weights)

    return _first_crossing(slope, log_q, log_s, reward, weights)


def break_even(log_q: Array, log_s: Array, reward: Array, weights: Array) -> Array:
    """η* > 0 with Δ(η*) = 0: RL lowers the SFT loss before it and raises it after. 0 or inf as `best_duration`."""

    def change(eta, log_q, log_s, reward, weights):
        # Δ/η: the same sign, and the root at η = 0 taken out.
        return sft_loss_change(log_q, log_s, reward, eta, weights) / eta

    return _first_crossing(change, log_q, log_s, reward, weights)


def _first_crossing(function, log_q, log_s, reward, weights) -> Array:
    """Root in η > 0 of a function that rises from R(s) − R(q) to max R − R(q)."""
    log_q, log_s, reward = _fit(log_q=log_q, log_s=log_s, reward=_reward(reward))
    shape, flat = log_q.shape[:-2], (-1, *log_q.shape[-2:])
    log_q, log_s, reward = (array.reshape(flat) for array in (log_q, log_s, reward))
    weights = np.broadcast_to(_weights(weights), (*shape, flat[1])).reshape(-1, flat[1])
    lead = mean_reward(log_q, reward, weights) - mean_reward(log_s, reward, weights)
    best = np.where(np.isneginf(log_s), -np.inf, reward)
    short = average(best.max(-1) - expectation(log_q, reward), weights)
    spread, rounding = reward_range(reward).max(-1), 1e-14 * np.abs(reward).max((-2, -1))
    result = np.where(lead > rounding, np.inf, 0.0)
    [active] = np.nonzero((lead > rounding) & (short > rounding))

    def at(eta, i):
        return function(eta, log_q[i], log_s[i], reward[i], weights[i])

    low = lead[active] / spread[active] ** 2  # both functions are negative there: Var r <= range²/4
    bracket = bracket_root(at, low, 2 * low, xmin=low, args=(active,))
    found = find_root(at, bracket.bracket, args=(active,), tolerances={"xatol": 0, "xrtol": 1e-15})
    result[active] = np.where(bracket.success, found.x, np.inf)
    return result.reshape(shape)


def optimal_duration(log_q: Array, reward: Array, weights: Array, lam: ArrayLike) -> Array:
    """T that maximises R(p_T) − λ L(p_T) for natural-gradient RL from s = q, λ > 0; 0 where all rewards are equal.

    There E Var r = λ (R(p_T) − R(q)). That equation can have several solutions: the best is looked for on a grid of
    forty durations, a factor of 1.5 apart, and then refined.
    """
    log_q, reward = _fit(log_q=_log_policy(log_q, "log_q"), reward=_reward(reward))
    start = mean_reward(log_q, reward, weights)
    lam = np.broadcast_to(_scale(lam, "lam"), start.shape).astype(float)
    if not np.all(lam > 0):
        raise ValueError(f"lam={lam.min()} is not above 0: without a price RL never ends")

    def utility(time):
        gain = mean_reward(gibbs(log_q, reward, time), reward, weights) - start
        return gain - lam * sft_loss_change(log_q, log_q, reward, time, weights)

    def slope(time):
        trained = gibbs(log_q, reward, time)
        return average(variance(trained, reward), weights) - lam * (mean_reward(trained, reward, weights) - start)

    width = reward_range(reward).max(-1)
    unit = np.divide(1, width, where=width > 0, out=np.zeros_like(width))
    grid = unit * 1.5 ** np.arange(-20, 20).reshape(-1, *[1] * width.ndim)
    best = np.take_along_axis(grid, np.array([utility(time) for time in grid]).argmax(0)[None], 0)[0]
    low, high = best / 1.5, best * 1.5
    for _ in range(100):
        middle = (low + high) / 2
        rising = slope(middle) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
        if np.all(high - low <= 4e-16 * high):
            break
    return (low + high) / 2


def quadratic_duration(gradient: Array, hessian: Array, offset: Array, lam: ArrayLike) -> Array:
    """T* that maximises T ‖g‖² − λ L along θ = δ₀ + T g for L = ½ θᵀHθ, H positive definite; 0 if RL does not pay.

    T* = (‖g‖² − λ gᵀHδ₀) / (λ gᵀHg); `gradient` g and `offset` δ₀ (..., k), `hessian` (..., k, k).
    """
    pull = np.einsum("...ij,...j->...i", hessian, gradient)
    gain = (gradient**2).sum(-1) - lam * (pull * offset).sum(-1)
    cost = lam * (pull * gradient).sum(-1)
    return np.maximum(0, np.divide(gain, cost, where=cost > 0, out=np.zeros_like(gain)))


def safe_distance(excess: ArrayLike, mu: ArrayLike) -> Array:
    """2 √(2ε/μ): moved further than this, a μ-strongly convex loss that was ε above its minimum has risen."""
    return 2 * np.sqrt(2 * _scale(excess, "excess") / _scale(mu, "mu"))


def reward_range(reward: Array) -> Array:
    """w = max r − min r per prompt."""
    return np.ptp(_reward(reward), axis=-1)


# ---- gradients and flows, in the logits of a softmax policy


def sft_gradient(log_p: Array, log_q: Array, weights: Array) -> Array:
    """∇L = ρ (p − q), shape (..., prompts, responses)."""
    log_p, log_q = _fit(log_p=_log_policy(log_p, "log_p"), log_q=_log_policy(log_q, "log_q"))
    return _weights(weights)[..., None] * (np.exp(log_p) - np.exp(log_q))


def reward_gradient(log_p: Array, reward: Array, weights: Array) -> Array:
    """∇R = ρ p (r − E_p r), shape (..., prompts, responses)."""
    log_p, reward = _fit(log_p=_log_policy(log_p, "log_p"), reward=_reward(reward))
    return _weights(weights)[..., None] * np.exp(log_p) * (reward - expectation(log_p, reward)[..., None])


def kl_gradient(log_p: Array, log_s: Array, weights: Array) -> Array:
    """∇ E KL(p ‖ s) = ρ p (log p/s − KL(p ‖ s)), shape (..., prompts, responses)."""
    log_p, log_s = _fit(log_p=_log_policy(log_p, "log_p"), log_s=_log_policy(log_s, "log_s"))
    gap = np.subtract(log_p, log_s, where=~np.isneginf(log_p), out=np.zeros_like(log_p))
    return _weights(weights)[..., None] * np.exp(log_p) * (gap - kl(log_p, log_s)[..., None])


def fisher(log_p: Array, weights: Array) -> Array:
    """Fisher matrix per prompt, ρ (diag p − p pᵀ), shape (..., prompts, responses, responses)."""
    p = np.exp(_log_policy(log_p, "log_p"))
    return _weights(weights)[..., None, None] * (p[..., None] * np.eye(p.shape[-1]) - p[..., None] * p[..., None, :])


def fisher_radius(log_p: Array, weights: Array) -> Array:
    """λ₁, the largest eigenvalue of the Fisher matrix over all prompts."""
    return np.linalg.eigvalsh(fisher(log_p, weights)).max((-2, -1))


def mixture(log_s: Array, log_q: Array, t: ArrayLike) -> Array:
    """(1 − t) s + t q for t in [0, 1]: natural-gradient SFT from s for time −log(1 − t)."""
    t = np.asarray(t, dtype=float)[..., None, None]
    if not np.all((t >= 0) & (t <= 1)):
        raise ValueError(f"t={t[~((t >= 0) & (t <= 1))].flat[0]} is not between 0 and 1")
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-t) + _log_policy(log_s, "log_s"), np.log(t) + _log_policy(log_q, "log_q"))


def sft_flow(log_s: Array, log_q: Array, weights: Array, time: float) -> tuple[Array, Array]:
    """Gradient flow θ' = −∇L from s for `time`: the policy reached and the logits' displacement."""
    return _flow(log_s, lambda log_p: -sft_gradient(log_p, log_q, weights), time)


def reward_flow(log_s: Array, reward: Array, weights: Array, time: float) -> tuple[Array, Array]:
    """Gradient flow θ' = ∇R from s for `time`: the policy reached and the logits' displacement."""
    return _flow(log_s, lambda log_p: reward_gradient(log_p, reward, weights), time)


def _flow(log_s, field, time):
    log_s = _log_policy(log_s, "log_s")
    if not np.isfinite(log_s).all():
        raise ValueError("log_s holds a probability of zero, which no finite logits give")

    def derivative(_, displacement):
        return field(softmax(log_s + displacement.reshape(log_s.shape))).ravel()

    end = solve_ivp(derivative, (0, float(_scale(time, "time"))), np.zeros(log_s.size), "DOP853", rtol=1e-8, atol=1e-12)
    displacement = end.y[:, -1].reshape(log_s.shape)
    return softmax(log_s + displacement), displacement


def alignment(log_p: Array, log_q: Array, reward: Array, weights: Array, metric: str) -> tuple[Array, Array]:
    """Inner product of the two descents, ⟨−∇L, ∇R⟩, and its cosine, in the `metric` "euclidean" or "fisher".

    Fisher means the inverse Fisher metric, in which gradients are compared by what they do to the policy; there the
    product is R(q) − R(p). The cosine is NaN where a gradient vanishes.
    """
    if metric == "fisher":
        centred = _reward(reward) - expectation(log_p, reward)[..., None]
        product = average(expectation(log_q, centred), weights)
        squares = average(chi_square(log_q, log_p), weights) * average(variance(log_p, reward), weights)
    elif metric == "euclidean":
        loss, gain = -sft_gradient(log_p, log_q, weights), reward_gradient(log_p, reward, weights)
        product = (loss * gain).sum((-2, -1))
        squares = (loss**2).sum((-2, -1)) * (gain**2).sum((-2, -1))
    else:
        raise ValueError(f"metric={metric!r} is neither 'euclidean' nor 'fisher'")
    with np.errstate(divide="ignore", invalid="ignore"):
        return product, product / np.sqrt(squares)


# ---- both at once


def joint_optimum(log_q: Array, reward: Array, lam: ArrayLike) -> Array:
    """The policy that minimises L(p) − λ R(p): p_λ = q / (1 + λ (R_x − r)), Eq. (joint-optimum).

    R_x is the mean reward that p_λ itself earns on the prompt. Where the best responses have q = 0 and λ is large
    enough, what probability the formula leaves over goes to them, in equal parts.
    """
    log_q, reward = _fit(log_q=_log_policy(log_q, "log_q"), reward=_reward(reward))
    shortfall = _scale(lam, "lam")[..., None, None] * (reward.max(-1, keepdims=True) - reward)
    log_q, shortfall = np.broadcast_arrays(log_q, shortfall)
    q, best = np.exp(log_q), shortfall == 0
    # p = q / (t + shortfall). Σp = 1 is solved for t by Newton on 1/Σp, concave in t, from its left: monotone.
    t = np.where(best, q, 0).sum(-1, keepdims=True)
    ratio = np.divide(q, t + shortfall, where=q > 0, out=np.zeros_like(q))
    left_over = (t == 0) & (ratio.sum(-1, keepdims=True) <= 1)
    for _ in range(100):
        total = ratio.sum(-1, keepdims=True)
        slope = np.divide(ratio, t + shortfall, where=q > 0, out=np.zeros_like(q)).sum(-1, keepdims=True)
        step = np.where(left_over, 0, total * (total - 1) / slope)
        t = t + np.maximum(step, 0)
        ratio = np.divide(q, t + shortfall, where=q > 0, out=np.zeros_like(q))
        if np.all(step <= 1e-16 * t):
            break
    rest = np.where(left_over, 1 - ratio.sum(-1, keepdims=True), 0) * best / best.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.where(left_over & best, np.log(rest), log_q - np.log(t + shortfall))
    return log_p - logsumexp(log_p, axis=-1, keepdims=True)


def joint_gap(log_p: Array, log_q: Array, reward: Array, lam: ArrayLike, weights: Array) -> Array:
    """How far p is above the joint optimum: [L − λR](p) − [L − λR](p_λ) = E_q[u − 1 − log u], u = p/p_λ (q > 0)."""
    log_u = np.asarray(log_p) - joint_optimum(log_q, reward, lam)
    return average(expectation(log_q, np.expm1(log_u) - log_u), weights)


def frontier(log_q: Array, reward: Array, weights: Array, target: ArrayLike) -> tuple[Array, Array]:
    """The least SFT loss of any policy with mean reward `target` >= R(q), and the λ whose joint optimum attains it.

    At R(q) itself the answer is the entropy of q, with λ = 0. The best mean reward takes an infinite λ: the answer
    there is that for 1e-12 less.
    """
    log_q, reward = _fit(log_q=log_q, reward=_reward(reward))
    shape, flat = log_q.shape[:-2], (-1, *log_q.shape[-2:])
    log_q, reward = log_q.reshape(flat), reward.reshape(flat)
    weights = np.broadcast_to(_weights(weights), (*shape, flat[1])).reshape(-1, flat[1])
    target = np.broadcast_to(np.asarray(target, dtype=float), shape).ravel()
    least, most = mean_reward(log_q, reward, weights), average(reward.max(-1), weights)
    wrong = ~((target >= least - 1e-12) & (target <= most + 1e-12))
    if wrong.any():
        i = np.argmax(wrong)
        raise ValueError(f"target={target[i]} is not between R(q)={least[i]} and the best mean reward {most[i]}")
    target = np.minimum(target, most - 1e-12 * np.maximum(1, np.abs(most)))
    [active] = np.nonzero(target > least + 1e-12)
    lam = np.zeros(target.shape)

    def excess(log_lam, i):
        return mean_reward(joint_optimum(log_q[i], reward[i], np.exp(log_lam)), reward[i], weights[i]) - target[i]

    bracket = bracket_root(excess, np.full(active.shape, -1.0), np.full(active.shape, 1.0), args=(active,))
    lam[active] = np.exp(find_root(excess, bracket.bracket, args=(active,)).x)
    loss = sft_loss(joint_optimum(log_q, reward, lam), log_q, weights)
    return loss.reshape(shape), lam.reshape(shape)


def excess_loss(log_p: Array, log_q: Array, reward: Array, weights: Array) -> Array:
    """How far p lies above the frontier: its SFT loss less the least at its own mean reward, which is >= R(q)."""
    least, _ = frontier(log_q, reward, weights, mean_reward(log_p, reward, weights))
    return sft_loss(log_p, log_q, weights) - least


def interleaved(log_q: Array, reward: Array, lam: ArrayLike, alpha: float) -> Array:
    """Where rounds of an SFT step p ← (1 − α) p + α q and RL for time α λ come to rest (seen after RL), 0 < α <= 1.

    p = α q / (c exp(α λ (max r − r)) − 1 + α), c such that it sums to one: `joint_optimum` in the limit α → 0.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} is not above 0 and at most 1")
    log_q, reward = _fit(log_q=_log_policy(log_q, "log_q"), reward=_reward(reward))
    rise = np.exp(alpha * _scale(lam, "lam")[..., None, None] * (reward.max(-1, keepdims=True) - reward))
    q, rise = np.broadcast_arrays(np.exp(log_q), rise)
    q, rise, shape = q.reshape(-1, q.shape[-1]), rise.reshape(-1, q.shape[-1]), q.shape
    # With c = 1 − α + α t the best responses have q/t: one solves for t between their q and 1.
    least = np.where(rise == 1, q, 0).sum(-1)

    def policy(t, i):
        return q[i] / (t[:, None] * rise[i] + (1 - alpha) / alpha * (rise[i] - 1))

    def excess(t, i):
        return policy(t, i).sum(-1) - 1

    rows = np.arange(len(q))
    t = find_root(excess, (np.maximum(least, 1e-300), np.ones(len(q))), args=(rows,)).x
    with np.errstate(divide="ignore"):
        log_p = np.log(policy(t, rows)).reshape(shape)
    return log_p - logsumexp(log_p, axis=-1, keepdims=True)


# ---- GRPO


def group_weight(success: Array, group_size: int) -> Array:
    """c_G(a): GRPO's expected update on a two-valued reward is c_G(a) ∇a, a the probability of the higher value.

    c_G(a) = E √(N (G − N)) √((G − 1)/G) / (G a (1 − a)), N ~ Bin(G, a): advantages are divided by the group's sample
    standard deviation, as TRL does (but for the 1e-4 that it adds). Finite up to a = 0 and 1.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} is below 2: a group of one has no spread to divide by")
    a = np.asarray(success, dtype=float)[..., None]
    if not np.all((a >= 0) & (a <= 1)):
        raise ValueError(f"success={a[~((a >= 0) & (a <= 1))].flat[0]} is no probability")
    n = np.arange(1, group_size)
    # P(N = n) / (a (1 − a)) without dividing by zero: n and G − n are at least 1.
    log_choose = binom.logpmf(n, group_size, 0.5) + group_size * np.log(2)
    mass = np.exp(log_choose + xlogy(n - 1, a) + xlogy(group_size - n - 1, 1 - a))
    return np.sqrt((group_size - 1) / group_size) * (mass * np.sqrt(n * (group_size - n))).sum(-1) / group_size


def grpo_gradient(log_p: Array, reward: Array, weights: Array, group_size: int, scale: str = "group") -> Array:
    """Expected GRPO update at the sampling policy, without a KL term, shape (..., prompts, responses).

    `scale="none"` only subtracts the group's mean: (1 − 1/G) ∇R. `scale="group"` divides by its standard deviation
    too: c_G(a) ∇a on each prompt, for rewards of at most two values a prompt (else `ValueError`).
    """
    reward = _reward(reward)
    if scale == "none":
        if group_size < 1:
            raise ValueError(f"group_size={group_size} is below 1")
        return (1 - 1 / group_size) * reward_gradient(log_p, reward, weights)
    if scale != "group":
        raise ValueError(f"scale={scale!r} is neither 'group' nor 'none'")
    low, high = reward.min(-1, keepdims=True), reward.max(-1, keepdims=True)
    if not np.all((reward == low) | (reward == high)):
        raise ValueError(f"reward of shape {reward.shape} has a prompt with more than two values")
    success = (reward > low).astype(float)
    a = np.clip(expectation(log_p, success), 0, 1)
    return group_weight(a, group_size)[..., None] * reward_gradient(log_p, success, weights)


def grpo_fixed_point(log_pi: Array, success: Array, beta: ArrayLike, group_size: int) -> Array:
    """A policy at which GRPO with reverse KL rests: c_G(a) ∇a = β ∇KL(p ‖ π), β > 0, `success` 1 or 0.

    It is Gibbs at the inverse temperature c_G(a)/β, which depends on its own success rate a: not the Gibbs policy of
    1/β. If there are several, one of them.
    """
    log_pi, success = _fit(log_pi=_log_policy(log_pi, "log_pi"), success=success)
    shape = log_pi.shape[:-1]
    start = np.clip(expectation(log_pi, success), 0, 1).ravel()
    beta = np.broadcast_to(_scale(beta, "beta")[..., None], shape).ravel()
    if not np.all(beta > 0):
        raise ValueError(f"beta={beta.min()} is not above 0: without the KL term GRPO rests only at success 0 or 1")
    odds = np.full(start.shape, 0.0)
    [active] = np.nonzero((start > 0) & (start < 1))

    def excess(eta, i):  # inverse temperature that the success rate at eta asks for, less eta
        return group_weight(start[i] / (start[i] + (1 - start[i]) * np.exp(-eta)), group_size) / beta[i] - eta

    most = (group_size - 1) / np.sqrt(group_size) / beta[active]  # c_G is largest at a = 0 and 1
    odds[active] = find_root(excess, (0 * most, 2 * most), args=(active,)).x
    tilted = log_pi + odds.reshape(shape)[..., None] * success
    return tilted - logsumexp(tilted, axis=-1, keepdims=True)


def clipped_surrogate(log_p: Array, log_s: Array, advantage: Array, epsilon: float, weights: Array) -> Array:
    """E_ρ E_s min(u A, clip(u, 1 − ε, 1 + ε) A), u = p/s: what GRPO ascends between two samplings from s > 0."""
    log_p, log_s, advantage = _fit(log_p=_log_policy(log_p, "log_p"), log_s=log_s, advantage=_reward(advantage))
    with np.errstate(over="ignore"):
        ratio = np.exp(log_p - log_s)
    inside = np.clip(ratio, 1 - epsilon, 1 + epsilon)
    # s · min(uA, clip(u) A), with s · u = p so that a tiny s does not overflow.
    return average(np.minimum(np.exp(log_p) * advantage, np.exp(log_s) * inside * advantage).sum(-1), weights)


# ---- what is accepted


def _log_policy(log_p, name):
    log_p = np.asarray(log_p, dtype=float)
    if log_p.ndim < 2:
        raise ValueError(f"{name} has shape {log_p.shape}: it needs prompts and responses")
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.exp(log_p).sum(-1)
    wrong = ~(np.abs(total - 1) <= TOLERANCE)
    if wrong.any():
        raise ValueError(f"{name} of shape {log_p.shape} has a row that sums to {total[wrong].flat[0]}, not to 1")
    return log_p


def _weights(weights):
    weights = np.asarray(weights, dtype=float)
    if weights.ndim < 1 or not np.all(weights >= 0) or not np.all(np.abs(weights.sum(-1) - 1) <= TOLERANCE):
        raise ValueError(f"weights of shape {weights.shape} are not probabilities of prompts that sum to 1")
    return weights


def _reward(reward):
    reward = np.asarray(reward, dtype=float)
    if not np.isfinite(reward).all():
        raise ValueError(f"reward holds {reward[~np.isfinite(reward)].flat[0]}: rewards must be finite")
    return reward


def _scale(value, name):
    value = np.asarray(value, dtype=float)
    if not np.all((value >= 0) & (value < np.inf)):
        raise ValueError(f"{name}={value[~((value >= 0) & (value < np.inf))].flat[0]} is not a finite number >= 0")
    return value


def _fit(**arrays):
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    try:
        if len({shape[-2:] for shape in shapes.values()}) > 1:
            raise ValueError
        return np.broadcast_arrays(*arrays.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes do not match: {listed}") from None
