"""Rewards: the verifier, +1 if the parsed answer equals the label and −1 if not; and one that says nothing."""

from __future__ import annotations

from collections.abc import Callable

from sftrl_utils.corpora import parse_response


def verifier(style: str) -> Callable[..., list[float]]:
    """Reward function for responses of `style`, in the form TRL calls: lists in, list of ±1 out."""

    def verifiable_reward(completions: list[str], label: list[int], **_) -> list[float]:
        pairs = zip(completions, label, strict=True)
        return [1.0 if parse_response(text, style) == gold else -1.0 for text, gold in pairs]

    return verifiable_reward


def constant_reward(completions: list[str], **_) -> list[float]:
    """0 for every response: what RL does when nothing is rewarded, the control of RL itself."""
    return [0.0] * len(completions)
