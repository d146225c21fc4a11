"""Exact finite policies: every quantity of the theory by enumeration, in float64 (NumPy and SciPy only).

A policy is an array of log-probabilities of shape (..., prompts, responses): -inf stands for zero, and a
probability of 1e-300 keeps its precision. `weights` (..., prompts) are the probabilities of the prompts, `reward`
has the policy's shape; leading axes are instances, over which everything is vectorised. Functions return one number
an instance unless they say "per prompt". Divergences are in nats and `inf` where supports do not match.

Arguments that are no distributions, do not fit together, or are infinite where they must not be raise `ValueError`
naming the argument and its shape or value; so does a number for each instance (η, β, λ, a target) of another shape than
the instances. Symbols are those of `book/notation.md`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.optimize.elementwise import bracket_root, find_root
from scipy.special import logsumexp, wrightomega, xlogy
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
    weights = _weights(weights, np.shape(values))
    return np.where(weights > 0, weights * np.where(weights > 0, values, 0), 0).sum(-1)


def expectation(log_p: Array, values: Array) -> Array:
    """E_p[values] per prompt; responses of probability zero do not count, whatever their value."""
    return _mean(*_fit(log_p=log_p, values=values))


def _mean(log_p, values):
    p, values = np.exp(log_p), np.where(np.isneginf(log_p), 0, values)
    with np.errstate(invalid="ignore"):
        return np.where(np.isinf(values), values, p * values).sum(-1)


def _centred(log_p, values):
    """values − E_p[values], counted from the likeliest response: else what is rare loses its digits."""
    values = values - np.take_along_axis(values, log_p.argmax(-1)[..., None], -1)
    return values - _mean(log_p, values)[..., None]


def variance(log_p: Array, values: Array) -> Array:
    """Var_p[values] per prompt."""
    log_p, values = _fit(log_p=log_p, values=values)
    return _mean(log_p, (values - _mean(log_p, values)[..., None]) ** 2)


def entropy(log_p: Array) -> Array:
    """H(p) per prompt."""
    log_p = _log_policy(log_p, "log_p")
    return -_mean(log_p, log_p)


def kl(log_p: Array, log_s: Array) -> Array:
    """KL(p ‖ s) = E_p[log p − log s] per prompt."""
    log_p, log_s = _fit(log_p=log_p, log_s=log_s)
    gap = np.subtract(log_p, log_s, where=~np.isneginf(log_p), out=np.zeros_like(log_p))
    return np.maximum(_mean(log_p, gap), 0)  # not below, by rounding


def chi_square(log_q: Array, log_p: Array) -> Array:
    """χ²(q ‖ p) = E_p[(q/p − 1)²] per prompt."""
    log_q, log_p = _fit(log_q=log_q, log_p=log_p)
    p, gap = np.exp(log_p), np.exp(log_q) - np.exp(log_p)
    with np.errstate(divide="ignore", over="ignore"):
        terms = np.divide(gap**2, p, where=gap != 0, out=np.zeros_like(p))  # (q/p − 1)² alone could overflow
    return terms.sum(-1)


def total_variation(log_p: Array, log_s: Array) -> Array:
    """TV(p, s) = ½ Σ |p − s| per prompt."""
    log_p, log_s = _fit(log_p=log_p, log_s=log_s)
    return np.abs(np.exp(log_p) - np.exp(log_s)).sum(-1) / 2


# ---- the two objectives


def sft_loss(log_p: Array, log_q: Array, weights: Array) -> Array:
    """L(p) = E_ρ E_q[−log p], Eq. (tabular-sft-loss)."""
    log_p, log_q = _fit(log_p=log_p, log_q=log_q)
    return average(_mean(log_q, -log_p), weights)


def mean_reward(log_p: Array, reward: Array, weights: Array) -> Array:
    """R(p) = E_ρ E_p[r], Eq. (tabular-mean-reward)."""
    return average(_mean(*_fit(log_p=log_p, reward=reward)), weights)


def rl_objective(log_p: Array, log_pi: Array, reward: Array, beta: ArrayLike, weights: Array) -> Array:
    """J_β(p) = R(p) − β E KL(p ‖ π), Eq. (tabular-rl-objective); -inf where p leaves the support of π and β > 0."""
    log_p, log_pi, reward = _fit(log_p=log_p, log_pi=log_pi, reward=reward)
    divergence = average(kl(log_p, log_pi), weights)
    beta = _scale(beta, "beta", divergence.shape)
    return mean_reward(log_p, reward, weights) - np.where(beta > 0, beta * np.where(beta > 0, divergence, 0), 0)


def log_partition(log_s: Array, reward: Array, eta: ArrayLike) -> Array:
    """log Z = log Σ s exp(ηr) per prompt."""
    log_s, reward = _fit(log_s=log_s, reward=reward)
    return _log_partition(log_s, _scale(eta, "eta", log_s.shape[:-2])[..., None, None] * reward)


def _log_partition(log_s, exponent):
    most = exponent.max(-1, keepdims=True)
    log_z = logsumexp(log_s + (exponent - most), axis=-1) + most[..., 0]
    slight = np.abs(exponent).max(-1) < 0.1
    if slight.any():  # log Z to relative precision, or short RL would be lost in rounding
        log_z = np.where(slight, np.log1p(_mean(log_s, np.expm1(np.clip(exponent, -0.1, 0.1)))), log_z)
    return log_z


def gibbs(log_s: Array, reward: Array, eta: ArrayLike) -> Array:
    """p_η = s exp(ηr) / Z, Eq. (gibbs): the optimum of J_β from s at β = 1/η, and natural-gradient RL for time η."""
    log_s, reward = _fit(log_s=log_s, reward=reward)
    return _tilt(log_s, _scale(eta, "eta", log_s.shape[:-2])[..., None, None] * reward)


def _tilt(log_s, exponent):
    tilted = log_s + (exponent - exponent.max(-1, keepdims=True))  # the best keep all digits, however long RL runs
    return tilted - logsumexp(tilted, axis=-1, keepdims=True)


def label_reward(log_q: Array) -> Array:
    """Expected reward (+1 match, −1 otherwise) of each response against a label drawn from q: 2q − 1."""
    return 2 * np.exp(_log_policy(log_q, "log_q")) - 1


# ---- RL after SFT


def sft_loss_change(log_q: Array, log_s: Array, reward: Array, eta: ArrayLike, weights: Array) -> Array:
    """Δ(η) = L(p_η) − L(s) = E[log Z − η E_q r]; `ValueError` where q's support is not inside that of s."""
    log_q, log_s, reward = _fit(log_q=log_q, log_s=log_s, reward=reward)
    _inside(log_q=log_q, log_s=log_s)
    advantage = reward - _mean(log_q, reward)[..., None]
    exponent = _scale(eta, "eta", log_q.shape[:-2])[..., None, None] * advantage
    return average(_log_partition(log_s, exponent), weights)


def best_duration(log_q: Array, log_s: Array, reward: Array, weights: Array) -> Array:
    """η that minimises Δ: where R(p_η) = R(q). 0 if RL only raises the SFT loss, inf if it lowers it for ever."""

    def slope(log_s, exponent, advantage):
        return _mean(_tilt(log_s, exponent), advantage)

    return _first_crossing(slope, log_q, log_s, reward, weights)


def break_even(log_q: Array, log_s: Array, reward: Array, weights: Array) -> Array:
    """η* > 0 with Δ(η*) = 0: RL lowers the SFT loss before it and raises it after. 0 or inf as `best_duration`."""

    def change(log_s, exponent, advantage):
        return _log_partition(log_s, exponent)

    return _first_crossing(change, log_q, log_s, reward, weights)


def _first_crossing(function, log_q, log_s, reward, weights) -> Array:
    """Root in η > 0 of E function, which rises from below zero if R(s) < R(q), and above it if R(q) < max R."""
    log_q, log_s, reward = _fit(log_q=log_q, log_s=log_s, reward=reward)
    _inside(log_q=log_q, log_s=log_s)
    shape, weights, log_q, log_s, reward = _flatten(weights, [log_q, log_s, reward])
    advantage = reward - _mean(log_q, reward)[..., None]
    lead = -average(_mean(log_s, advantage), weights)
    short = average(np.where(np.isneginf(log_s), -np.inf, advantage).max(-1), weights)
    spread, rounding = reward_range(reward).max(-1), 1e-14 * np.abs(reward).max((-2, -1))
    result = np.where(lead > rounding, np.inf, 0.0)
    [active] = np.nonzero((lead > rounding) & (short > rounding))

    def at(eta, i):
        values = function(log_s[i], eta[:, None, None] * advantage[i], advantage[i])
        return (weights[i] * values).sum(-1) / eta  # the same sign, and a root at η = 0 taken out

    low = lead[active] / spread[active] ** 2  # E function is negative there: Var r <= range²/4
    bracket = bracket_root(at, low, 2 * low, xmin=low, args=(active,))
    found = find_root(at, bracket.bracket, args=(active,), tolerances={"xatol": 0, "xrtol": 1e-15})
    result[active] = np.where(bracket.success, found.x, np.inf)
    return result.reshape(shape)


def optimal_duration(log_q: Array, reward: Array, weights: Array, lam: ArrayLike) -> Array:
    """T that maximises U(T) = R(p_T) − λ L(p_T) for natural-gradient RL from s = q, λ > 0.

    There E Var r = λ (R(p_T) − R(q)), which can have several solutions. Gain and loss only rise, so between two
    durations U is at most the later's gain less λ times the earlier's loss: intervals are halved until that is no
    better than the best known, but for a part in 1e9, or they are too short for U to turn twice. 0 where r is constant
    on the support of q.
    """
    log_q, reward = _fit(log_q=log_q, reward=reward)
    lam = _positive(lam, "lam", log_q.shape[:-2])
    shape, weights, log_q, reward, lam = _flatten(weights, [log_q, reward], lam)
    possible = np.exp(log_q) > 0
    centred = np.where(possible, _centred(log_q, reward), 0)
    highest, lowest = (np.where(possible, sign * centred, -np.inf).max(-1) for sign in (1, -1))
    width = np.where(weights > 0, highest + lowest, 0).max(-1)
    gain_at_most = average(highest, weights)

    def at(time, i):  # duration, gain, loss, utility and its slope: all sums are of terms of one sign, or nearly
        a = centred[i]
        moved = -np.expm1(-np.abs(time[:, None, None] * a))
        exponent = log_q[i] + time[:, None, None] * np.maximum(a, 0)
        shift = exponent.max(-1)
        mass = np.exp(exponent - shift[..., None])
        excess = (np.sign(a) * moved * mass).sum(-1)  # Z − 1, this and the next over exp(shift)
        z = np.exp(-shift) + excess
        gain = (np.abs(a) * moved * mass).sum(-1) / z
        spread = (np.where(a > 0, mass, mass * (1 - moved)) * (a - gain[..., None]) ** 2).sum(-1) / z
        rise = np.where(shift < 1, np.log1p(excess * np.exp(np.minimum(shift, 1))), shift + np.log(z))
        gain, rise, spread = ((weights[i] * each).sum(-1) for each in (gain, rise, spread))
        return np.stack([time, gain, rise, gain - lam[i] * rise, spread - lam[i] * gain])

    best, result = np.zeros(len(lam)), np.zeros(len(lam))
    [i] = np.nonzero(width > 0)
    # d Var/dT is at most w Var, so U rises up to log(1 + w/λ)/w; it is negative once λ times the loss is the most gain.
    left = at(np.logaddexp(0, np.log(width[i]) - np.log(lam[i])) / width[i] / 2, i)
    right = left
    for _ in range(1000):
        if not (on := (lam[i] * right[2] < gain_at_most[i]) | (right[4] >= 0)).any():
            break
        right = np.where(on, at(2 * right[0], i), right)
    else:
        raise ValueError(f"lam={lam[i][on][0]} encloses no optimal duration among finite numbers")
    cells = []
    while len(i):
        np.maximum.at(best, i, np.maximum(left[3], right[3]))
        on = (right[1] - lam[i] * left[2] > best[i] * (1 + 1e-9)) & ((right[0] - left[0]) * width[i] > 0.25)
        cells.append((i[~on], left[:, ~on], right[:, ~on]))
        i, left, right = i[on], left[:, on], right[:, on]
        middle = at(np.sqrt(left[0] * right[0]), i)
        i, left, right = np.tile(i, 2), np.hstack([left, middle]), np.hstack([middle, right])
    if cells:
        i, left, right = (np.concatenate(part, axis=-1) for part in zip(*cells, strict=True))
        turns = (left[4] > 0) & (right[4] <= 0)
        i, left, right = i[turns], left[:, turns], right[:, turns]
        order = np.lexsort((np.maximum(left[3], right[3]), i))
        last = order[np.diff(i[order], append=-1) != 0]  # of each instance the best interval with a maximum in it
        found = find_root(lambda time, i: at(time, i)[4], (left[0, last], right[0, last]), args=(i[last],))
        result[i[last]] = found.x
    return result.reshape(shape)


def quadratic_duration(gradient: Array, hessian: Array, offset: Array, lam: ArrayLike) -> Array:
    """T* that maximises T ‖g‖² − λ L along θ = δ₀ + T g for L = ½ θᵀHθ, H positive definite; 0 if RL does not pay.

    T* = (‖g‖² − λ gᵀHδ₀) / (λ gᵀHg), λ > 0; `gradient` g and `offset` δ₀ (..., k), `hessian` (..., k, k).
    """
    gradient, hessian, offset = (np.asarray(array, dtype=float) for array in (gradient, hessian, offset))
    if not hessian.shape[-2:] == 2 * gradient.shape[-1:] == 2 * offset.shape[-1:]:
        shapes = f"gradient {gradient.shape}, hessian {hessian.shape}, offset {offset.shape}"
        raise ValueError(f"shapes do not match: {shapes}")
    lam = _positive(lam, "lam", gradient.shape[:-1])
    pull = np.einsum("...ij,...j->...i", hessian, gradient)
    gain = (gradient**2).sum(-1) - lam * (pull * offset).sum(-1)
    cost = lam * (pull * gradient).sum(-1)
    return np.maximum(0, np.divide(gain, cost, where=cost > 0, out=np.zeros_like(gain)))


def safe_distance(excess: ArrayLike, mu: ArrayLike) -> Array:
    """2 √(2ε/μ), μ > 0: moved further than this, a μ-strongly convex loss that was ε above its minimum has risen."""
    return 2 * np.sqrt(2 * _scale(excess, "excess") / _positive(mu, "mu", np.shape(excess)))


def reward_range(reward: Array) -> Array:
    """w = max r − min r per prompt."""
    return np.ptp(_reward(reward), axis=-1)


# ---- gradients and flows, in the logits of a softmax policy


def sft_gradient(log_p: Array, log_q: Array, weights: Array) -> Array:
    """∇L = ρ (p − q), shape (..., prompts, responses)."""
    log_p, log_q = _fit(log_p=log_p, log_q=log_q)
    return _weights(weights, log_p.shape[:-1])[..., None] * (np.exp(log_p) - np.exp(log_q))


def reward_gradient(log_p: Array, reward: Array, weights: Array) -> Array:
    """∇R = ρ p (r − E_p r), shape (..., prompts, responses)."""
    log_p, reward = _fit(log_p=log_p, reward=reward)
    centred = reward - _mean(log_p, reward)[..., None]
    return _weights(weights, log_p.shape[:-1])[..., None] * np.exp(log_p) * centred


def kl_gradient(log_p: Array, log_s: Array, weights: Array) -> Array:
    """∇ E KL(p ‖ s) = ρ p (log p/s − KL(p ‖ s)), shape (..., prompts, responses); p's support inside that of s."""
    log_p, log_s = _fit(log_p=log_p, log_s=log_s)
    _inside(log_p=log_p, log_s=log_s)
    gap = np.subtract(log_p, log_s, where=~np.isneginf(log_p), out=np.zeros_like(log_p))
    centred = gap - _mean(log_p, gap)[..., None]
    return _weights(weights, log_p.shape[:-1])[..., None] * np.exp(log_p) * centred


def fisher(log_p: Array, weights: Array) -> Array:
    """Fisher matrix per prompt, ρ (diag p − p pᵀ), shape (..., prompts, responses, responses)."""
    p = np.exp(_log_policy(log_p, "log_p"))
    joint, each = _weights(weights, p.shape[:-1])[..., None] * p, np.arange(p.shape[-1])
    matrix = -joint[..., None] * p[..., None, :]
    matrix[..., each, each] += joint
    return matrix


def fisher_radius(log_p: Array, weights: Array) -> Array:
    """λ₁, the largest eigenvalue of the Fisher matrix over all prompts."""
    return np.linalg.eigvalsh(fisher(log_p, weights)).max((-2, -1))


def mixture(log_s: Array, log_q: Array, t: ArrayLike) -> Array:
    """(1 − t) s + t q for t in [0, 1]: natural-gradient SFT from s for time −log(1 − t)."""
    log_s, log_q = _fit(log_s=log_s, log_q=log_q)
    t = _scale(t, "t", log_s.shape[:-2])[..., None, None]
    if not np.all(t <= 1):
        raise ValueError(f"t={t[~(t <= 1)].flat[0]} is not between 0 and 1")
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-t) + log_s, np.log(t) + log_q)


def sft_flow(log_s: Array, log_q: Array, weights: Array, time: ArrayLike) -> tuple[Array, Array]:
    """Gradient flow θ' = −∇L from s for `time`: the policy reached and the logits' displacement."""
    log_s, log_q = _fit(log_s=log_s, log_q=log_q)
    q = np.exp(log_q)
    return _flow(log_s, lambda p: q - p, weights, time)


def reward_flow(log_s: Array, reward: Array, weights: Array, time: ArrayLike) -> tuple[Array, Array]:
    """Gradient flow θ' = ∇R from s for `time`: the policy reached and the logits' displacement."""
    log_s, reward = _fit(log_s=log_s, reward=reward)
    return _flow(log_s, lambda p: p * (reward - (p * reward).sum(-1, keepdims=True)), weights, time)


def _flow(log_s, field, weights, time):
    if not np.isfinite(log_s).all():
        raise ValueError("log_s holds a probability of zero, which no finite logits give")
    pace = _weights(weights, log_s.shape[:-1]) * _scale(time, "time", log_s.shape[:-2])[..., None]

    def derivative(_, displacement):  # in units of `time`
        mass = np.exp(log_s + displacement.reshape(log_s.shape))  # logits move by no more than rewards and times allow
        return (pace[..., None] * field(mass / mass.sum(-1, keepdims=True))).ravel()

    end = solve_ivp(derivative, (0, 1), np.zeros(log_s.size), "DOP853", rtol=1e-8, atol=1e-12)
    displacement = end.y[:, -1].reshape(log_s.shape)
    return softmax(log_s + displacement), displacement


def alignment(log_p: Array, log_q: Array, reward: Array, weights: Array, metric: str) -> tuple[Array, Array]:
    """Inner product of the two descents, ⟨−∇L, ∇R⟩, and its cosine, in the `metric` "euclidean" or "fisher".

    Fisher means the inverse Fisher metric, in which gradients are compared by what they do to the policy; there the
    product is R(q) − R(p). The cosine is NaN where a gradient vanishes.
    """
    if metric == "fisher":
        product = average(expectation(log_q, _centred(*_fit(log_p=log_p, reward=reward))), weights)
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
    log_q, reward = _fit(log_q=log_q, reward=reward)
    shortfall = _scale(lam, "lam", log_q.shape[:-2])[..., None, None] * (reward.max(-1, keepdims=True) - reward)
    log_q, shortfall = np.broadcast_arrays(log_q, shortfall)
    q, best = np.exp(log_q), shortfall == 0
    # p = q / (t + shortfall). Σp = 1 is solved for t by Newton on 1/Σp, concave in t, from its left: monotone.
    t = np.where(best, q, 0).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        left_over = (t == 0) & (np.where(q > 0, q / shortfall, 0).sum(-1) <= 1)
    rows = np.nonzero(~left_over)
    q_left, shortfall_left = q[rows], shortfall[rows]
    for _ in range(100):
        scale = t[rows][:, None] + shortfall_left
        ratio = np.divide(q_left, scale, where=q_left > 0, out=np.zeros_like(scale))
        total = ratio.sum(-1)
        step = total * (total - 1) / np.divide(ratio, scale, where=q_left > 0, out=scale).sum(-1)
        moving = step > 1e-16 * t[rows]
        t[rows] += np.maximum(step, 0)
        rows, q_left, shortfall_left = tuple(axis[moving] for axis in rows), q_left[moving], shortfall_left[moving]
        if not moving.any():
            break
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.where(q > 0, log_q - np.log(t[..., None] + shortfall), -np.inf)
        rest = np.where(left_over, 1 - np.exp(log_p).sum(-1), 0) / best.sum(-1)
        log_p = np.where(left_over[..., None] & best, np.log(np.maximum(rest, 0))[..., None], log_p)
    return log_p - logsumexp(log_p, axis=-1, keepdims=True)


def joint_gap(log_p: Array, log_q: Array, reward: Array, lam: ArrayLike, weights: Array) -> Array:
    """How far p is above the joint optimum: [L − λR](p) − [L − λR](p_λ) = E_q[u − 1 − log u], u = p/p_λ, q > 0."""
    log_p, log_q, reward = _fit(log_p=log_p, log_q=log_q, reward=reward)
    _above_zero(log_q=log_q)
    log_u = log_p - joint_optimum(log_q, reward, lam)
    return average(_mean(log_q, np.expm1(log_u) - log_u), weights)


def joint_optimum_kl(log_q: Array, log_pi: Array, reward: Array, lam: ArrayLike, beta: ArrayLike) -> Array:
    """The policy that minimises L(p) − λ J_β(p), λ, β and π > 0: p = q / (κ W(q/(κπ) exp(m − r/β))), κ = λβ.

    W is Lambert's function and m, one number a prompt, makes p sum to one. Where q = 0, p = π exp(r/β − m).
    """
    log_q, log_pi, reward = _fit(log_q=log_q, log_pi=log_pi, reward=reward)
    _above_zero(log_pi=log_pi)
    lam, beta = (_positive(value, name, log_q.shape[:-2]) for value, name in ((lam, "lam"), (beta, "beta")))
    log_kappa = np.log(lam * beta)[..., None, None]
    tilted = log_pi + (reward - reward.max(-1, keepdims=True)) / beta[..., None, None]

    def policy(m):  # log p, and W by Wright's ω(x) = W(exp x), which does not overflow
        w = wrightomega(log_q - log_kappa - tilted + m)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(w > 1, log_q - log_kappa - np.log(w), tilted - m + w), w

    # log Σp is convex and falls in m, and log Z, where W would be 0, is on its left: Newton is monotone.
    m = logsumexp(tilted, axis=-1, keepdims=True)
    for _ in range(100):
        log_p, w = policy(m)
        log_total = logsumexp(log_p, axis=-1, keepdims=True)
        step = log_total / np.exp(logsumexp(log_p - np.log1p(w), axis=-1, keepdims=True) - log_total)
        m = m + np.maximum(step, 0)
        if np.all(step <= 1e-15 * np.maximum(1, np.abs(m))):
            break
    log_p, _ = policy(m)
    return log_p - logsumexp(log_p, axis=-1, keepdims=True)


def frontier(log_q: Array, reward: Array, weights: Array, target: ArrayLike) -> tuple[Array, Array]:
    """The least SFT loss of any policy with mean reward `target` >= R(q), and the λ whose joint optimum attains it.

    At R(q) itself the answer is the entropy of q, with λ = 0. The best mean reward takes an infinite λ: the answer
    there is that for 1e-12 less.
    """
    log_q, reward = _fit(log_q=log_q, reward=reward)
    target = np.asarray(target, dtype=float)
    _broadcasts(target.shape, log_q.shape[:-2], "target")
    shape, weights, log_q, reward, target = _flatten(weights, [log_q, reward], target)
    least, most = mean_reward(log_q, reward, weights), average(reward.max(-1), weights)
    wrong = ~((target >= least - 1e-12) & (target <= most + 1e-12))
    if wrong.any():
        i = np.argmax(wrong)
        raise ValueError(f"target={target[i]} is not between R(q)={least[i]} and the best mean reward {most[i]}")
    target = np.minimum(target, most - 1e-12 * np.maximum(1, np.abs(most)))
    shortfall = reward.max(-1, keepdims=True) - reward
    lam = np.zeros(target.shape)
    [i] = np.nonzero(target > least + 1e-12)
    # λ (R − R(q)) is at least the loss, and that at least 2 (R − R(q))²/w²; λ E[max r − r] is at most 1.
    goal = (most - target)[i]
    low, high = 2 * (target - least)[i] / reward_range(reward)[i].max(-1) ** 2, 1 / goal
    lam[i] = np.sqrt(low * high)
    for _ in range(200):  # Newton on log E[max r − r] over log λ, between bounds that close
        log_p = joint_optimum(log_q[i], reward[i], lam[i])
        missed, slope = _shortfall(log_p, log_q[i], shortfall[i], weights[i])
        off = np.log(missed / goal)
        low, high = np.where(off > 0, lam[i], low), np.where(off > 0, high, lam[i])
        with np.errstate(divide="ignore", invalid="ignore"):  # no slope while labels leave nothing to shift
            step = off * missed / (lam[i] * slope)
        onward = lam[i] * np.exp(np.clip(step, -50, 50))
        lam[i] = np.where((low <= onward) & (onward <= high), onward, np.sqrt(low * high))
        on = (np.abs(step) > 1e-9) & (np.abs(off) > 1e-15) & (high > low * (1 + 1e-15))
        i, low, high, goal = i[on], low[on], high[on], goal[on]
        if not on.any():
            break
    log_p = joint_optimum(log_q, reward, lam)
    return sft_loss(log_p, log_q, weights).reshape(shape), lam.reshape(shape)


def _shortfall(log_p, log_q, shortfall, weights):
    """E[max r − r] at a joint optimum, and how fast it falls in λ."""
    possible = ~np.isneginf(log_q)
    p = np.exp(log_p)
    share = np.exp(np.subtract(2 * log_p, log_q, where=possible, out=np.full_like(log_p, -np.inf)))  # p²/q
    moments = [(share * shortfall**k).sum(-1) for k in range(3)]
    left_over = (p > 0) & ~possible
    pull = np.where(left_over.any(-1), 0, moments[1] ** 2 / moments[0])
    return tuple((weights * part).sum(-1) for part in ((p * shortfall).sum(-1), moments[2] - pull))


def excess_loss(log_p: Array, log_q: Array, reward: Array, weights: Array) -> Array:
    """How far p lies above the frontier: its SFT loss less the least at its own mean reward, which is >= R(q)."""
    least, _ = frontier(log_q, reward, weights, mean_reward(log_p, reward, weights))
    return sft_loss(log_p, log_q, weights) - least


def interleaved(log_q: Array, reward: Array, lam: ArrayLike, alpha: float) -> Array:
    """Where rounds of an SFT step p ← (1 − α) p + α q and RL for time α λ come to rest (seen after RL), 0 < α <= 1.

    p = α q / (c exp(α λ (max r − r)) − 1 + α), c such that it sums to one: `joint_optimum` in the limit α → 0. q > 0.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha={alpha} is not above 0 and at most 1")
    log_q, reward = _fit(log_q=log_q, reward=reward)
    _above_zero(log_q=log_q)
    time = alpha * _scale(lam, "lam", log_q.shape[:-2])[..., None, None]
    log_q, fall = np.broadcast_arrays(log_q, time * (reward - reward.max(-1, keepdims=True)))
    shape, (log_q, fall) = log_q.shape, (array.reshape(-1, log_q.shape[-1]) for array in (log_q, fall))
    held = -np.expm1(fall) * (1 - alpha) / alpha
    tilted = log_q + fall
    # With c = 1 − α + α t the best responses have q/t: one solves for t between their q and 1.
    least = np.where(fall == 0, np.exp(log_q), 0).sum(-1)

    def excess(t, i):
        return (np.exp(tilted[i]) / (t[:, None] + held[i])).sum(-1) - 1

    rows, slack = np.arange(len(log_q)), 2 * TOLERANCE
    ends = np.maximum(least, 1e-300) * (1 - slack), np.full(len(rows), 1 + slack)
    t = find_root(excess, ends, args=(rows,)).x
    log_p = (tilted - np.log(t[:, None] + held)).reshape(shape)
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
    log_pi, success = _fit(log_pi=log_pi, success=success)
    if not np.all((success == 0) | (success == 1)):
        raise ValueError(f"success holds {success[(success != 0) & (success != 1)].flat[0]}, which is neither 1 nor 0")
    shape = log_pi.shape[:-1]
    start = np.clip(_mean(log_pi, success), 0, 1).ravel()
    beta = np.broadcast_to(_positive(beta, "beta", shape[:-1])[..., None], shape).ravel()
    odds = np.full(start.shape, 0.0)
    [active] = np.nonzero((start > 0) & (start < 1))

    def excess(eta, i):  # inverse temperature that the success rate at eta asks for, less eta
        return group_weight(start[i] / (start[i] + (1 - start[i]) * np.exp(-eta)), group_size) / beta[i] - eta

    most = group_weight(1.0, group_size) / beta[active]  # c_G is largest at a = 0 and 1
    odds[active] = find_root(excess, (0 * most, 2 * most), args=(active,)).x
    tilted = log_pi + odds.reshape(shape)[..., None] * success
    return tilted - logsumexp(tilted, axis=-1, keepdims=True)


def clipped_surrogate(log_p: Array, log_s: Array, advantage: Array, epsilon: float, weights: Array) -> Array:
    """E_ρ E_s min(u A, clip(u, 1 − ε, 1 + ε) A), u = p/s: what GRPO ascends between two samplings from s > 0."""
    log_p, log_s, advantage = _fit(log_p=log_p, log_s=log_s, advantage=advantage)
    _above_zero(log_s=log_s)
    epsilon = _scale(epsilon, "epsilon", log_p.shape[:-2])[..., None, None]
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


def _weights(weights, shape):
    """`weights`, which must be distributions over the last axis of `shape` (..., prompts)."""
    weights = np.asarray(weights, dtype=float)
    if weights.ndim < 1 or not np.all(weights >= 0) or not np.all(np.abs(weights.sum(-1) - 1) <= TOLERANCE):
        raise ValueError(f"weights of shape {weights.shape} are not probabilities of prompts that sum to 1")
    _broadcasts(weights.shape, shape, "weights", "prompts", weights.shape[-1:] == shape[-1:])
    return weights


def _reward(reward, name="reward"):
    reward = np.asarray(reward, dtype=float)
    if not np.isfinite(reward).all():
        raise ValueError(f"{name} holds {reward[~np.isfinite(reward)].flat[0]}: {name}s must be finite")
    return reward


def _scale(value, name, instances=()):
    value = np.asarray(value, dtype=float)
    if not np.all((value >= 0) & (value < np.inf)):
        raise ValueError(f"{name}={value[~((value >= 0) & (value < np.inf))].flat[0]} is not a finite number >= 0")
    _broadcasts(value.shape, instances, name)
    return value


def _positive(value, name, instances=()):
    value = _scale(value, name, instances)
    if not np.all(value > 0):
        raise ValueError(f"{name}={value.min()} is not above 0")
    return value


def _broadcasts(shape, other, name, what="instances", also=True):
    try:
        if not also:
            raise ValueError
        np.broadcast_shapes(shape, other)
    except ValueError:
        raise ValueError(f"shapes do not match: {name} {shape}, {what} {other}") from None


def _above_zero(**policy):
    [(name, log_p)] = policy.items()
    if np.isneginf(log_p).any():
        raise ValueError(f"{name} of shape {log_p.shape} holds a probability of 0: all must be above 0")


def _inside(**policies):
    (name, log_q), (other, log_s) = policies.items()
    if np.any(np.isneginf(log_s) & ~np.isneginf(log_q)):
        raise ValueError(f"{other} of shape {log_s.shape} excludes a response that {name} does not")


def _checked(array, name):
    if name.startswith("log_"):
        return _log_policy(array, name)
    return _reward(array, name) if name in ("reward", "advantage") else np.asarray(array, dtype=float)


def _fit(**arrays):
    """The arguments, checked as what their names say (`log_…`: policies) and broadcast to one shape."""
    arrays = {name: _checked(array, name) for name, array in arrays.items()}
    try:
        if len({array.shape[-2:] for array in arrays.values()}) > 1:
            raise ValueError
        return np.broadcast_arrays(*arrays.values())
    except ValueError:
        listed = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"shapes do not match: {listed}") from None


def _flatten(weights, arrays, *numbers):
    """Instances along one axis: their shape, weights (n, prompts), the arrays (n, prompts, responses), numbers (n,)."""
    weights = _weights(weights, arrays[0].shape[:-1])
    shape = np.broadcast_shapes(arrays[0].shape[:-2], weights.shape[:-1], *map(np.shape, numbers))
    size = arrays[0].shape[-2:]
    arrays = [np.broadcast_to(array, (*shape, *size)).reshape(-1, *size) for array in arrays]
    weights = np.broadcast_to(weights, (*shape, size[0])).reshape(-1, size[0])
    return shape, weights, *arrays, *(np.broadcast_to(number, shape).ravel() for number in numbers)
