"""TRL's trainers, encoding once what the sequences of a batch share; three of their methods are replaced.

The completions of a GRPO group share their prompt. TRL encodes it once a completion, to sample and again to take the
gradient. Here each distinct prompt of a batch is encoded once, and its key/value cache is handed to its completions,
with its gradient. In SFT all prompts share their first tokens, the chat template and the question: they are encoded
once a batch, and only supervised positions are projected onto the vocabulary (plain TRL does that where Triton is).
Losses, metrics, logging, checkpoints and resuming are TRL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer
from trl import GRPOTrainer, SFTTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import pad

# What a model's generation_config may say without a bearing on TRL's samples: TRL sets it, or it is bookkeeping.
PLAIN_GENERATION = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "max_length", "max_new_tokens"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "output_attentions", "output_hidden_states"),
    *("_from_model_config", "transformers_version"),
}


def common_prefix(input_ids: Tensor, attention_mask: Tensor) -> int:
    """Number of leading tokens that all rows share, at least one token of each row left over."""
    same = (input_ids == input_ids[0]) & attention_mask.bool()
    shared = int(same.all(0).long().cumprod(0).sum())
    return max(0, min(shared, int(attention_mask.sum(1).min()) - 1))


@contextmanager
def scored_positions_only() -> Iterator[None]:
    """Let TRL's fused head project only the positions that are scored, on every device.

    Without Triton it projects all of them, to spare compilers a new shape a batch; on a CPU nothing is compiled.
    """
    with mock.patch.object(trl_utils, "_use_triton", return_value=True):
        yield


def cast_once(device: torch.device) -> torch.autocast:
    """Context for the passes of one step: autocast is off, and what it casts where it is on is kept until the end.

    A copy of the weights in half precision is else made for every pass. The first pass must have a gradient: a copy
    made without one would serve the others as well.
    """
    return torch.autocast(device.type, enabled=False)


class PrefixSharingSFTTrainer(SFTTrainer):
    """`SFTTrainer` that encodes the prompts' common prefix once a batch; takes the same arguments.

    `shared_prefix=False` gives plain TRL, and so do settings under which sharing would not be exact.
    """

    def __init__(self, *args, shared_prefix: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.shared_prefix = _settled(shared_prefix, self._obstacles())

    def _obstacles(self) -> list[str]:
        obstacles = {  # under these TRL's loss runs the model twice: the second run would find the first one's cache
            "label_smoothing_factor is set": self.label_smoother is not None,
            "there is a compute_loss_func": self.compute_loss_func is not None,
        }
        return [*_obstacles(self), *(reason for reason, applies in obstacles.items() if applies)]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss and metrics, computed from what follows the common prefix."""
        shared = common_prefix(inputs["input_ids"], inputs["attention_mask"]) if self.shared_prefix else 0
        # A supervised token must not be in the prefix, nor come right after it: its prediction would be lost.
        supervised = (inputs["labels"] != -100).any(0).nonzero()
        shared = min(shared, int(supervised[0]) - 1 if len(supervised) else 0)
        if shared < 1 or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        cache = DynamicCache(config=self.model.config.get_text_config())
        with cast_once(model.device), scored_positions_only():
            with self.accelerator.autocast():
                model.get_decoder()(input_ids=inputs["input_ids"][:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(inputs["input_ids"]))
            rest = {name: inputs[name][:, shared:] for name in ("input_ids", "labels")}
            inputs = {**inputs, **rest, "past_key_values": cache}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class PrefixSharingGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` that encodes each distinct prompt of a batch once; takes the same arguments.

    `shared_prefix=False` gives plain TRL, and so does, with one warning, a setting under which sharing would not be
    exact: several processes, gradient checkpointing, dropout or noise, vLLM, continuous batching, a learned PEFT
    prompt, a cache of a kind of its own (sliding windows, say), positions that are not rotary, images, tools, or a
    sampler beyond temperature, top-k and top-p.
    """

    def __init__(self, *args, shared_prefix: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.shared_prefix = _settled(shared_prefix, self._obstacles())
        self._pad_id = self._tokenizer.pad_token_id
        self._encoded = None  # what sampling left for the loss of the same batch
        self._text_config = self.model.config.get_text_config()
        self._warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            self._warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            self._warpers.append(TopPLogitsWarper(self.top_p))

    def _obstacles(self) -> list[str]:
        args = self.args
        obstacles = {
            "vLLM samples": self.use_vllm,
            "continuous batching samples": self.use_transformers_continuous_batching,
            "there are tools or a rollout function": bool(self.tools) or self.rollout_func is not None,
            "the language-model head is cast": args.cast_lm_head_to_fp32,
            "min_p or repetition_penalty is set": args.min_p is not None or args.repetition_penalty != 1.0,
            "generation_kwargs is set": bool(args.generation_kwargs),
            "cache_implementation is set": args.cache_implementation is not None,
            # `generate` counts positions from a prompt's first token, here they count its padding
            "positions are not rotary": not getattr(self.model.config.get_text_config(), "rope_parameters", None),
        }
        asked = set(self.model.generation_config.to_diff_dict()) - PLAIN_GENERATION
        obstacles |= {f"the model's generation_config sets {name}": True for name in sorted(asked)}
        return [*_obstacles(self), *(reason for reason, applies in obstacles.items() if applies)]

    def training_step(self, *args, **kwargs):
        """TRL's step; what sampling kept for its loss does not outlive it, an error included."""
        try:
            with cast_once(self.accelerator.device) if self._sampled_once else nullcontext():
                return super().training_step(*args, **kwargs)
        finally:
            self._encoded = None

    @property
    def _sampled_once(self) -> bool:
        """Whether an update is the only one that uses its samples: the encoding of their prompts has a gradient."""
        return self.shared_prefix and self.args.steps_per_generation * self.num_iterations == 1

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **others
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities (and entropies) of the last `logits_to_keep` tokens of each row, each (rows, tokens)."""
        if not self.shared_prefix or any(value not in (None, False) for value in others.values()):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        parts = [
            self._score(model, ids, mask, logits_to_keep)
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        logps, entropies = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return logps, entropies if compute_entropy else None, None

    def _score(self, model, input_ids, attention_mask, n_tokens) -> tuple[Tensor, Tensor]:
        completions, scored = input_ids[:, -n_tokens:], attention_mask[:, -n_tokens:].bool()
        prompts, mask, rows = self._distinct(input_ids[:, :-n_tokens], attention_mask[:, :-n_tokens])
        with self.accelerator.autocast():
            logits, cache = self._encode(model, prompts, mask)
            first = torch.log_softmax(logits.float() / self.temperature, -1)
            logps = [first[rows, completions[:, 0]].unsqueeze(1)]
            entropies = [-(first.exp() * first).sum(-1)[rows].unsqueeze(1)]
            if n_tokens > 1:
                cache.batch_select_indices(rows)
                rest = model(
                    input_ids=completions[:, :-1],
                    attention_mask=torch.cat([mask[rows], scored[:, :-1].to(attention_mask)], 1),
                    past_key_values=cache,
                    shift_labels=completions[:, 1:].masked_fill(~scored[:, 1:], -100),
                    fused_lm_head=True,
                )
                logps.append(rest.log_probs)
                entropies.append(rest.entropy if rest.entropy is not None else torch.zeros_like(rest.log_probs))
        return torch.cat(logps, 1) * scored, torch.cat(entropies, 1) * scored

    def _distinct(self, prompts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct rows of left-padded prompts, their masks, and which of them each row is."""
        prompts = prompts.masked_fill(mask == 0, self._pad_id)
        distinct, rows = torch.stack([prompts, mask], -1).unique(dim=0, return_inverse=True)
        return distinct[..., 0], distinct[..., 1], rows

    def _encode(self, model, prompts: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
        """Logits of the token after each prompt, and the prompts' key/value cache; what sampling kept is used up."""
        if torch.is_grad_enabled() and self._encoded is not None:
            (kept_model, *kept), logits, cache = self._encoded
            self._encoded = None
            if kept_model is model and all(map(torch.equal, kept, (prompts, mask))):
                return logits, cache
        cache = DynamicCache(config=self._text_config)
        logits = model(
            input_ids=prompts, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        return logits, cache

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Token ids of one sampled completion a prompt, each distinct prompt encoded once; no log-probabilities.

        Where the next update is the only one that uses the samples, its loss takes the prompts' encoding over.
        """
        if not self.shared_prefix or images or multimodal_fields:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        tokens = [torch.tensor(prompt, device=self.accelerator.device) for prompt in prompt_ids]
        prompts, mask, rows = self._distinct(
            pad(tokens, padding_value=self._pad_id, padding_side="left"),
            pad([torch.ones_like(prompt) for prompt in tokens], padding_value=0, padding_side="left"),
        )
        once = self.model.training and self._sampled_once
        self._encoded = None
        with self.accelerator.autocast(), torch.set_grad_enabled(once):
            logits, cache = self._encode(self.model, prompts, mask)
        if once:
            kept = copy(cache)
            kept.layers = [copy(layer) for layer in cache.layers]  # sampling puts other tensors in their place
            self._encoded = ((self.model, prompts, mask), logits, kept)
        with torch.no_grad(), self.accelerator.autocast():
            return self._sample(logits, cache, mask, rows), None

    def _sample(self, logits: Tensor, cache: DynamicCache, mask: Tensor, rows: Tensor) -> list[list[int]]:
        """One completion for each entry of `rows`, an index into what `_encode` returned; EOS included."""
        sampled, alive = [[] for _ in rows], torch.arange(len(rows), device=rows.device)
        ends = torch.tensor(self.eos_token_ids, device=rows.device)
        logits, mask = logits[rows], mask[rows]
        cache.batch_select_indices(rows)
        for step in range(self.max_completion_length):
            scores = self._warpers(None, logits.float())
            tokens = torch.multinomial(scores.softmax(-1), 1)
            for row, token in zip(alive.tolist(), tokens[:, 0].tolist(), strict=True):
                sampled[row].append(token)
            [going] = torch.nonzero(~torch.isin(tokens[:, 0], ends), as_tuple=True)
            if len(going) == 0 or step == self.max_completion_length - 1:
                break
            if len(going) < len(alive):  # what has ended costs nothing more
                cache.batch_select_indices(going)
                mask, alive, tokens = mask[going], alive[going], tokens[going]
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            logits = self.model(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
        return sampled


def _obstacles(trainer: SFTTrainer | GRPOTrainer) -> list[str]:
    """Why encoding a prefix once would not be exact under this trainer's settings."""
    args, config = trainer.args, trainer.model.config.get_text_config()
    adapters = getattr(trainer.model, "peft_config", {}).values()
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    obstacles = {
        "there are several processes": trainer.accelerator.num_processes > 1,  # DDP must see one forward pass
        "activations are checkpointed": args.activation_checkpointing or trainer.model.is_activation_checkpointing,
        "PEFT learns a prompt": any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters),
        "the model caches more than keys and values (a sliding window, say)": not layers <= {DynamicLayer},
        "prompts hold images": trainer._is_vlm,
        "the router has a loss": trainer.aux_loss_enabled,
        "dropout is on": _drops(trainer.model),  # completions would share what is dropped of their prompt
        "neftune_noise_alpha is set": args.neftune_noise_alpha is not None,  # and the noise as well
        "sequences are packed": getattr(args, "packing", False) or getattr(args, "padding_free", False),
    }
    return [reason for reason, applies in obstacles.items() if applies]


def _drops(model) -> bool:
    modules = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    return max([getattr(model.config.get_text_config(), "attention_dropout", 0) or 0, *modules], default=0) > 0


def _settled(wanted: bool, obstacles: list[str]) -> bool:
    """Whether to share; says once why not, where it was wanted."""
    if wanted and obstacles:
        warnings.warn(f"no prefix is shared, this is plain TRL: {obstacles[0]}", stacklevel=3)
    return wanted and not obstacles
