"""A policy judged harder than in the loop: paraphrased prompts and sampling seeds, votes over k samples, calibration.

Everything is computed from the probabilities of the two answers and of anything else, which are exact; sampling draws
from them, which is what sampling responses and parsing them does.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import gammaln, logsumexp, xlogy
from scipy.stats import bootstrap
from sklearn.metrics import matthews_corrcoef
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftrl_utils.corpora import PARAPHRASES, answer_texts, prompt_texts
from sftrl_utils.evaluation import answer_probabilities, score_responses

SAMPLING_SEEDS = 3
VOTES = (4, 16)  # samples a prompt: what test-time compute buys


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, style: str) -> pd.DataFrame:
    """Index `metric`, columns `value`, `low`, `high`: what `model` is worth on the N sentences of `frame`.

    `robust_mean_reward` is mean@1 over paraphrases and sampling seeds (`robust_mean_reward`); the others are at the
    prompt of training: `votes`, `calibration`, MCC and acceptable rate of the likelier answer. Only the first has an
    interval, over sentences; the seeds of training are the unit for all else.
    """
    label = frame["label"].to_numpy()
    p = answer_distributions(model, tokenizer, list(frame["sentence"]), style)
    value, low, high = robust_mean_reward(p, label)
    rows = {"robust_mean_reward": (value, low, high)}
    likelier = p[0, :, :2].argmax(axis=1)
    others = {"mean_reward": float((2 * p[0, np.arange(len(label)), label] - 1).mean())}
    others |= {"mcc": float(matthews_corrcoef(label, likelier)), "acceptable_rate": float(likelier.mean())}
    for k in VOTES:
        others |= {f"{name}@{k}": score for name, score in votes(p[0], label, k).items()}
    others |= calibration(p[0], label)
    rows |= {name: (score, np.nan, np.nan) for name, score in others.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"]).rename_axis("metric")


def answer_distributions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str], style: str
) -> np.ndarray:
    """Shape (paraphrases, N, 3): probability of answering unacceptable, acceptable, or anything else."""
    answers = [answer_texts(tokenizer, style)] * len(sentences)
    parts = []
    for paraphrase in range(len(PARAPHRASES[style])):
        prompts = prompt_texts(tokenizer, sentences, style, paraphrase)
        parts.append(answer_probabilities(score_responses(model, tokenizer, prompts, answers)))
    return np.stack(parts)


def robust_mean_reward(p: np.ndarray, label: np.ndarray, seeds: int = SAMPLING_SEEDS) -> tuple[float, float, float]:
    """Mean reward of one response for each of P paraphrases and each sampling seed, `(mean, low, high)`.

    `p`, shape (P, N, 3). The 95 % BCa interval resamples the N sentences, each with all its P × seeds responses: those
    to one sentence are not independent.
    """
    rewards = []
    for seed in range(seeds):
        draws = np.random.default_rng(seed).random((*p.shape[:2], 1))
        answer = (draws > p.cumsum(axis=-1)).sum(axis=-1)
        rewards.append(np.where(answer == label, 1.0, -1.0))
    sentences = np.mean(rewards, axis=(0, 1))
    mean = float(sentences.mean())
    if np.ptp(sentences) == 0:  # BCa is undefined there
        return mean, mean, mean
    interval = bootstrap((sentences,), np.mean, n_resamples=2000, rng=np.random.default_rng(0)).confidence_interval
    return mean, float(interval.low), float(interval.high)


def votes(p: np.ndarray, label: np.ndarray, k: int) -> dict[str, float]:
    """`maj` and `pass` of k samples a sentence, exact, as shares of N sentences; `p`, shape (N, 3).

    pass@k: at least one of the k is right. maj@k: most of those that can be parsed are; a tie is decided by a coin,
    and where none can be parsed the vote is wrong.
    """
    right, wrong = (p[np.arange(len(label)), answer] for answer in (label, 1 - label))
    i, j = (part.ravel() for part in np.indices((k + 1, k + 1)))
    i, j = i[i + j <= k], j[i + j <= k]  # i right ones, j wrong ones
    outcomes = gammaln(k + 1) - gammaln(i + 1) - gammaln(j + 1) - gammaln(k - i - j + 1)
    chance = np.exp(outcomes + xlogy(i, right[:, None]) + xlogy(j, wrong[:, None]) + xlogy(k - i - j, p[:, 2:]))
    won = (i > j) + 0.5 * ((i == j) & (i > 0))
    return {"maj": float((chance @ won).mean()), "pass": float((1 - (1 - right) ** k).mean())}


def calibration(p: np.ndarray, label: np.ndarray, bins: int = 10) -> dict[str, float]:
    """How far confidence is from accuracy, and what one temperature mends; of the two answers alone, `p` (N, 3).

    `ece`: expected calibration error over `bins` equal intervals of confidence. `answer_loss`: mean negative
    log-likelihood of the label in nats. `answer_loss_tempered`: the same for p^(1/T), T fitted on every other sentence
    and applied to the rest, both ways; `temperature`: the geometric mean of the two T.
    """
    with np.errstate(divide="ignore"):
        log_p = np.log(p[:, :2])
    log_p = np.maximum(log_p - logsumexp(log_p, axis=1, keepdims=True), -700.0)
    confidence = np.exp(log_p.max(axis=1))
    correct = log_p.argmax(axis=1) == label
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(correct[place == at].mean() - confidence[place == at].mean()) * (place == at).mean()
            for at in np.unique(place)]  # fmt: skip
    halves = [np.arange(len(label)) % 2 == part for part in (0, 1)]
    fitted = [_fit_temperature(log_p[half], label[half]) for half in halves]
    losses = [_tempered_loss(log_p[half], label[half], t).sum() for half, t in zip(halves, fitted[::-1], strict=True)]
    return {
        "ece": float(sum(gaps)),
        "answer_loss": float(_tempered_loss(log_p, label, 1.0).mean()),
        "answer_loss_tempered": float(sum(losses) / len(label)),
        "temperature": float(np.sqrt(fitted[0] * fitted[1])),
    }


def _tempered_loss(log_p: np.ndarray, label: np.ndarray, temperature: float) -> np.ndarray:
    scaled = log_p / temperature
    return logsumexp(scaled, axis=1) - scaled[np.arange(len(label)), label]


def _fit_temperature(log_p: np.ndarray, label: np.ndarray) -> float:
    def loss(log_t: float) -> float:
        return _tempered_loss(log_p, label, np.exp(log_t)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-4.0, 6.0), method="bounded").x))  # T from 0.02 to 400
