"""Rewards: the verifier, +1 if the parsed answer equals the label and −1 if not; a proxy; and one that says nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftrl_utils.corpora import ANSWERS, parse_response, prompt_texts, response_text

TEXTS_PER_BATCH = 64  # as many sequences as an evaluation scores at once


def verifier(style: str) -> Callable[..., list[float]]:
    """Reward function for responses of `style`, in the form TRL calls: lists in, list of ±1 out."""

    def verifiable_reward(completions: list[str], label: list[int], **_) -> list[float]:
        pairs = zip(completions, label, strict=True)
        return [1.0 if parse_response(text, style) == gold else -1.0 for text, gold in pairs]

    return verifiable_reward


def constant_reward(completions: list[str], **_) -> list[float]:
    """0 for every response: what RL does when nothing is rewarded, the control of RL itself."""
    return [0.0] * len(completions)


def preference_pairs(
    tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, style: str, flipped: float, seed: int
) -> Dataset:
    """Rows of `prompt`, `chosen` and `rejected` (EOS included) for TRL's `RewardTrainer`.

    The right answer is preferred to the wrong one; in a share `flipped` of the rows, drawn by `seed`, the reverse.
    """
    rng = np.random.default_rng(seed)
    turned = rng.permutation(len(frame)) < round(flipped * len(frame))
    preferred = np.where(turned, 1 - frame["label"], frame["label"])
    chosen, rejected = (
        [
            response_text(answer, style, name) + tokenizer.eos_token
            for answer, name in zip(answers, frame["phenomenon"], strict=True)
        ]
        for answers in (preferred, 1 - preferred)
    )
    prompts = prompt_texts(tokenizer, list(frame["sentence"]), style)
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


class RewardModel:
    """A trained proxy of the verifier, for `label` responses: `model` is a sequence classifier with one output."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def scores(self, texts: list[str]) -> np.ndarray:
        """Score of each text (prompt, response and EOS), shape (N,)."""
        parts = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = texts[start : start + TEXTS_PER_BATCH]
            inputs = self._tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
            parts.append(self._model(**inputs.to(self._model.device)).logits[:, 0].double().cpu().numpy())
        return np.concatenate(parts)

    def preferences(self, prompts: list[str]) -> np.ndarray:
        """How much each of the two answers is preferred to the other, shape (N, 2), in [−1, 1]: 2 σ(s − s′) − 1.

        σ(s − s′) is the model's probability of the preference (Bradley and Terry), here on the verifier's scale.
        """
        texts = [prompt + answer + self._tokenizer.eos_token for prompt in prompts for answer in ANSWERS]
        scores = self.scores(texts).reshape(-1, 2)
        right = np.tanh((scores[:, 1] - scores[:, 0]) / 2)
        return np.stack([-right, right], axis=1)

    def proxy_reward(self, prompts: list[str], completions: list[str], **_) -> list[float]:
        """Reward function in the form TRL calls: `preferences` of the answer, −1 for what is no answer.

        A reward model has seen nothing but answers, and may rate what it has not seen above both.
        """
        distinct = list(dict.fromkeys(prompts))
        preferences = dict(zip(distinct, self.preferences(distinct), strict=True))
        answers = [parse_response(text, "label") for text in completions]
        pairs = zip(prompts, answers, strict=True)
        return [-1.0 if answer is None else float(preferences[prompt][answer]) for prompt, answer in pairs]
