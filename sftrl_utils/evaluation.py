"""What a policy does on a split: SFT loss, exact mean reward, accuracy, MCC, KL, entropy; mean@k by sampling."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from scipy.special import rel_entr, xlogy
from sklearn.metrics import matthews_corrcoef
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from sftrl_utils.corpora import ANSWERS, Corpus, answer_texts, prompt_texts, response_text

PROMPTS_PER_BATCH = 32  # of 32, 64 and 128, lengths sorted: least padding and memory, as fast on a CPU


@dataclass(frozen=True)
class ResponseScores:
    """Teacher-forced scores of R responses to each of N prompts.

    `logprob`, shape (N, R): log-probability of the whole response in nats. `tokens`, shape (N, R): its
    length. `greedy`, shape (N, R): whether greedy decoding would produce it.
    """

    logprob: np.ndarray
    tokens: np.ndarray
    greedy: np.ndarray


@torch.no_grad()
def score_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    responses: list[list[str]],
    prompts_per_batch: int = PROMPTS_PER_BATCH,
) -> ResponseScores:
    """Score `responses[i]` (R strings, special tokens written out) as continuations of `prompts[i]`.

    Each prompt is encoded once, what a batch of prompts begin with once a batch; the key/value cache is expanded
    over the responses. Prompts of similar length share a batch. Left padding, explicit position ids: the result
    does not depend on the batch.
    """
    was_training = model.training
    model.eval()
    encoded = tokenizer(prompts)["input_ids"]
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    shape = (len(prompts), len(responses[0]))
    scores = ResponseScores(np.zeros(shape), np.zeros(shape, dtype=int), np.zeros(shape, dtype=bool))
    for start in range(0, len(order), prompts_per_batch):
        rows = order[start : start + prompts_per_batch]
        flat = [text for row in rows for text in responses[row]]
        batch = _score_batch(model, tokenizer, [encoded[row] for row in rows], flat, shape[1])
        for target, value in zip((scores.logprob, scores.tokens, scores.greedy), batch, strict=True):
            target[rows] = value.reshape(len(rows), shape[1]).cpu().numpy()
    model.train(was_training)
    return scores


def _score_batch(model, tokenizer, rows, responses, per_prompt):
    """Log-probability, length and greediness of each of the `len(rows) * per_prompt` responses."""
    forward = getattr(model, "_original_forward", model)  # without the autocast that a trainer wraps around it
    shared = len(os.path.commonprefix(rows)) if len(rows) > 1 else 0
    shared = min(shared, min(map(len, rows)) - 1)  # the template and the question: encoded once
    cache = DynamicCache(config=model.config.get_text_config())
    if shared > 0:
        first = torch.tensor([rows[0][:shared]], device=model.device)
        model.get_decoder()(input_ids=first, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    prompt = tokenizer.pad({"input_ids": [row[shared:] for row in rows]}, padding_side="left", return_tensors="pt")
    prompt = prompt.to(model.device)
    answer = tokenizer(responses, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False).to(
        model.device
    )
    mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.long).to(model.device), prompt["attention_mask"]], 1)
    positions = shared + (prompt["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    encoded = forward(
        input_ids=prompt["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(per_prompt)
    width = answer["input_ids"].shape[1]
    prompt_mask = mask.repeat_interleave(per_prompt, dim=0)
    prompt_end = positions[:, -1:].repeat_interleave(per_prompt, dim=0)
    rest = forward(
        input_ids=answer["input_ids"][:, :-1],
        attention_mask=torch.cat([prompt_mask, answer["attention_mask"][:, :-1]], dim=1),
        position_ids=prompt_end + torch.arange(1, width, device=model.device),
        past_key_values=cache,
    ).logits
    mask = answer["attention_mask"].bool()
    first = _token_scores(encoded.logits, answer["input_ids"][:, 0].view(len(rows), per_prompt))
    parts = zip(first, _token_scores(rest, answer["input_ids"][:, 1:]), strict=True)
    logprob, greedy = (torch.cat([head.reshape(-1, 1), tail], dim=1) for head, tail in parts)
    return logprob.masked_fill(~mask, 0.0).sum(-1), mask.sum(-1), (greedy | ~mask).all(-1)


def _token_scores(logits, ids):
    """Log-probability of each token, in float64 (those near 0 need the digits), and whether it is the likeliest."""
    chosen = logits.expand(*ids.shape, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    # In parts: a copy of all logits in float64 would be the peak of memory.
    total = torch.cat([part.double().logsumexp(-1) for part in logits.split(8)])
    return chosen - total, logits.argmax(-1) == ids


@dataclass
class Evaluator:
    """Evaluates policies on the splits of one corpus; remembers reference policies for the KL.

    `references` maps a name (`start`, `base`) to answer probabilities per split, as `answer_probabilities`
    returns them; `evaluate` reports the KL from each. `answers` holds the log-probabilities of the two answers, shape
    (N, 2) per split, that the remembered policies and, under `end`, the last of the others gave. `judge`, where there
    is one, maps prompts to the preference of a proxy for each of the two answers, shape (N, 2), in [−1, 1].
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    style: str
    references: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    answers: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    judge: Callable[[list[str]], np.ndarray] | None = None

    def __post_init__(self) -> None:
        # The train split is judged on as many sentences as dev: the loop's cost should not grow with it.
        limit = len(self.corpus.splits["dev"])
        self._frames = {split: frame.head(limit) for split, frame in self.corpus.splits.items()}
        self._prompts = {
            split: prompt_texts(self.tokenizer, list(frame["sentence"]), self.style)
            for split, frame in self._frames.items()
        }
        self._preferences: dict[str, np.ndarray] = {}

    def answer_scores(self, model: PreTrainedModel, split: str) -> ResponseScores:
        """Scores of the two answers, columns (unacceptable, acceptable), for each sentence of `split`."""
        answers = answer_texts(self.tokenizer, self.style)
        return score_responses(model, self.tokenizer, self._prompts[split], [answers] * len(self._prompts[split]))

    def evaluate(self, model: PreTrainedModel, remember: str | None = None) -> dict[str, float]:
        """Metrics of `model`, each under `<metric>_<split>`: see `answer_metrics`, `_sft_loss` and `_proxy_reward`.

        `remember` makes `model` the reference policy of that name; what is remembered first is also `base`.
        """
        result = {}
        for split, frame in self._frames.items():
            scores = self.answer_scores(model, split)
            self.answers.setdefault(remember or "end", {})[split] = scores.logprob
            if remember:
                self.references.setdefault(remember, {})[split] = answer_probabilities(scores)
                self.references.setdefault("base", {}).setdefault(split, self.references[remember][split])
            references = {name: kept[split] for name, kept in self.references.items()}
            metrics = self._sft_loss(model, split, scores)
            metrics |= answer_metrics(scores, frame["label"].to_numpy(), frame["q"].to_numpy(), references)
            if self.judge:
                metrics |= self._proxy_reward(split, answer_probabilities(scores))
            result |= {f"{name}_{split}": value for name, value in metrics.items()}
        return result

    def answer_table(self, point: str) -> pd.DataFrame:
        """`answers[point]` with the label, q and phenomenon of each sentence: see `records.read_answers`."""
        parts = [
            frame[["label", "q", "phenomenon"]].assign(
                split=split, **dict(zip(ANSWERS, self.answers[point][split].T.astype(np.float32), strict=True))
            )
            for split, frame in self._frames.items()
        ]
        table = pd.concat(parts, ignore_index=True)
        return table.astype({"label": "int8", "q": "float32", "phenomenon": "category", "split": "category"})

    def _proxy_reward(self, split: str, p: np.ndarray) -> dict[str, float]:
        """Exact mean of what the proxy thinks of one response, −1 for what cannot be parsed; its own accuracy."""
        if split not in self._preferences:
            self._preferences[split] = self.judge(self._prompts[split])
        preferences, label = self._preferences[split], self._frames[split]["label"].to_numpy()
        return {
            "proxy_reward": float(((p[:, :2] * preferences).sum(axis=1) - p[:, 2]).mean()),
            "proxy_accuracy": float((preferences.argmax(axis=1) == label).mean()),
        }

    def _sft_loss(self, model: PreTrainedModel, split: str, answers: ResponseScores) -> dict[str, float]:
        """L_SFT, Eq. (sft-loss): mean negative log-likelihood per response token, and per response (`_sum`)."""
        frame = self._frames[split]
        if self.style == "label":
            rows = np.arange(len(frame))
            logprob, tokens = (a[rows, frame["label"]] for a in (answers.logprob, answers.tokens))
        else:
            eos = self.tokenizer.eos_token
            gold = [[response_text(r.label, self.style, r.phenomenon) + eos] for r in frame.itertuples()]
            scores = score_responses(model, self.tokenizer, self._prompts[split], gold)
            logprob, tokens = scores.logprob[:, 0], scores.tokens[:, 0]
        return {"sft_loss": float(-logprob.sum() / tokens.sum()), "sft_loss_sum": float(-logprob.mean())}


def answer_probabilities(scores: ResponseScores) -> np.ndarray:
    """Shape (N, 3): probability of answering unacceptable, acceptable, or anything else."""
    answers = np.exp(scores.logprob)
    other = np.clip(1 - answers.sum(axis=1, keepdims=True), 1e-12, 1)  # rounding must not make a KL infinite
    return np.concatenate([answers, other], axis=1)


def answer_metrics(
    scores: ResponseScores, label: np.ndarray, q: np.ndarray, references: dict[str, np.ndarray]
) -> dict[str, float]:
    """Metrics of the answer distribution over N sentences.

    `mean_reward` is the exact mean@1, E[2 p(label) − 1]. `greedy_accuracy`, `mcc` (Matthews correlation) and
    `acceptable_rate` are of the greedy answer; one that cannot be parsed counts as the wrong answer in the
    first two and as not acceptable in the third. `format_rate` is the probability of a parseable response.
    `entropy` and `kl_<reference>` (nats per response, KL(policy ‖ reference)) are over {unacceptable,
    acceptable, anything else}, exact where all else has probability 0 and a lower bound otherwise. `kl_q`,
    where q is known, is KL(q ‖ policy).
    """
    p = answer_probabilities(scores)
    correct = p[np.arange(len(label)), label]
    answer = np.select([scores.greedy[:, 0], scores.greedy[:, 1]], [0, 1], default=-1)
    data = np.stack([1 - q, q], axis=1)
    metrics = {
        "mean_reward": (2 * correct - 1).mean(),
        "greedy_accuracy": (answer == label).mean(),
        "mcc": matthews_corrcoef(label, np.where(answer < 0, 1 - label, answer)),
        "acceptable_rate": (answer == 1).mean(),
        "acceptable_probability": p[:, 1].mean(),
        "format_rate": p[:, :2].sum(axis=1).mean(),
        "entropy": -xlogy(p, p).sum(axis=1).mean(),
        "kl_q": (data * (np.log(data) - scores.logprob)).sum(axis=1).mean(),
    }
    for name, reference in references.items():
        metrics[f"kl_{name}"] = rel_entr(p, reference).sum(axis=1).mean()
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def sampled_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: pd.DataFrame,
    style: str,
    reward: Callable[..., list[float]],
    k: int,
    seed: int,
) -> np.ndarray:
    """Rewards of k sampled responses per sentence, shape (N, k), at temperature 1 and top-p 1.

    mean@k is the mean of the result. `reward` is called as TRL calls it: `reward(completions=, label=)`.
    """
    torch.manual_seed(seed)
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in ANSWERS)
    prompts = prompt_texts(tokenizer, list(frame["sentence"]), style)
    rewards = []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        chunk = slice(start, start + PROMPTS_PER_BATCH)
        inputs = tokenizer(prompts[chunk], return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            **inputs.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            num_return_sequences=k,
            max_new_tokens=longest + 2,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        labels = frame["label"].to_numpy()[chunk].repeat(k).tolist()
        rewards.append(np.reshape(reward(completions=texts, label=labels), (-1, k)))
    return np.concatenate(rewards)
