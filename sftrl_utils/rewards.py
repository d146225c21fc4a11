"""Rewards: the verifier, +1 if the parsed answer equals the label and −1 if not; a proxy; and one that says nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.special import expit
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
    """A trained proxy of the verifier: `model` is a sequence classifier with one output, its score the reward."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: str):
        self._model, self._tokenizer, self._style = model.eval(), tokenizer, style

    @torch.no_grad()
    def scores(self, texts: list[str]) -> np.ndarray:
        """Score of each text (prompt, response and EOS), shape (N,)."""
        parts = []
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            batch = texts[start : start + TEXTS_PER_BATCH]
            inputs = self._tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
            parts.append(self._model(**inputs.to(self._model.device)).logits[:, 0].float().cpu().numpy())
        return np.concatenate(parts)

    def proxy_reward(self, prompts: list[str], completions: list[str], **_) -> list[float]:
        """Reward function in the form TRL calls. TRL decodes without EOS: it is put back, as in training."""
        eos = self._tokenizer.eos_token
        return self.scores([p + c + eos for p, c in zip(prompts, completions, strict=True)]).tolist()

    def preferences(self, prompts: list[str]) -> np.ndarray:
        """How much each of the two answers is preferred, shape (N, 2), in [−1, 1]: 2 σ(s − s′) − 1, the model's own
        probability of a preference (Bradley and Terry) on the verifier's scale. A `rationale` is scored by its answer.
        """
        eos = self._tokenizer.eos_token
        one, two = (self.scores([prompt + answer + eos for prompt in prompts]) for answer in ANSWERS)
        right = 2 * expit(two - one) - 1
        return np.stack([-right, right], axis=1)
