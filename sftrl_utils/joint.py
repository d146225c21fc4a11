"""GRPO and SFT in one stage: both losses in every step, or updates of the one and of the other by turns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from trl import GRPOConfig, SFTConfig

from sftrl_utils.config import InputError, RunConfig
from sftrl_utils.prefix_sharing import PrefixSharingGRPOTrainer, PrefixSharingSFTTrainer


def step_weights(kind: str, config: RunConfig) -> list[tuple[float, float]]:
    """Weights (of the GRPO loss, of the SFT loss) in each update of a stage of `kind`.

    `joint`: `rl_steps` updates, each of the GRPO loss + μ L_SFT, μ = `sft_weight`: Eq. (joint-objective).
    `interleaved`: `cycles` times `sft_steps / cycles` updates of SFT, then `rl_steps / cycles` of GRPO. Either way GRPO
    has `rl_steps` batches.
    Raises `InputError` if the steps do not divide into the cycles.
    """
    if kind == "joint":
        return [(1.0, config.sft_weight)] * config.rl_steps
    for name in ("sft_steps", "rl_steps"):
        if getattr(config, name) % config.cycles:
            raise InputError(
                f"cycles={config.cycles} does not divide {name}={getattr(config, name)}: use one that does"
            )
    sft, rl = config.sft_steps // config.cycles, config.rl_steps // config.cycles
    return ([(0.0, 1.0)] * sft + [(1.0, 0.0)] * rl) * config.cycles


class JointTrainer(PrefixSharingGRPOTrainer):
    """GRPO with expert data beside it: update t minimises w_t × the GRPO loss + v_t × L_SFT, Eq. (sft-loss).

    `weights` holds (w_t, v_t), one pair an update. The SFT term is that of a `PrefixSharingSFTTrainer` with settings
    `sft_args` on `sft_dataset`, in an order that its seed alone decides. An update without GRPO samples nothing and has
    the learning rate of `sft_args`; all others have that of `args`. One optimiser serves both. One process, and no
    accumulation of gradients: `ValueError` otherwise.
    """

    def __init__(
        self,
        model,
        reward_funcs,
        args: GRPOConfig,
        *,
        sft_args: SFTConfig,
        sft_dataset: Dataset,
        weights: Sequence[tuple[float, float]],
        **kwargs,
    ):
        super().__init__(model, reward_funcs, args, **kwargs)
        if self.accelerator.num_processes > 1 or args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{self.accelerator.num_processes} processes, gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps}: a joint stage has one process and accumulates nothing"
            )
        self._weights = weights
        self._sft = PrefixSharingSFTTrainer(
            self.model, sft_args, train_dataset=sft_dataset, processing_class=kwargs["processing_class"]
        )
        self._expert_batches = self._endless_batches()

    def _endless_batches(self) -> Iterator[dict]:
        loader = self._sft.get_train_dataloader()
        for epoch in itertools.count():
            with torch.random.fork_rng():  # the order must not hang on what RL has sampled, nor change its samples
                torch.manual_seed(self._sft.args.seed + epoch)
                batches = iter(loader)
                first = next(batches)  # draws the order of all
            yield from itertools.chain([first], batches)

    def training_step(self, *args, **kwargs):
        """TRL's step, at the learning rate of what it trains."""
        rl, _ = self._weights[self.state.global_step]
        for group in self.optimizer.param_groups:
            group["lr"] = (self.args if rl else self._sft.args).learning_rate
        return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        """TRL's samples and their advantages, where this update has a use for them."""
        rl, _ = self._weights[self.state.global_step]
        return super()._prepare_inputs(generation_batch) if rl else generation_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum of TRL's two losses."""
        rl, sft = self._weights[self.state.global_step]
        loss = rl * super().compute_loss(model, inputs, return_outputs, num_items_in_batch) if rl else 0.0
        if sft:
            batch = self._sft._prepare_inputs(next(self._expert_batches))
            sft_loss = self._sft.compute_loss(model, batch)
            self._metrics["train"]["sft_loss"].append(sft_loss.item())
            loss = loss + sft * sft_loss
        return loss
