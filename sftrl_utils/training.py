"""TRL's trainers configured from a `RunConfig`, with evaluation in the loop and health gates."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, set_seed
from trl import GRPOConfig, RewardConfig, RewardTrainer, SFTConfig

from sftrl_utils import models
from sftrl_utils.config import InputError, RunConfig
from sftrl_utils.corpora import ANSWERS, Corpus, response_text, rl_dataset, sft_dataset
from sftrl_utils.evaluation import Evaluator
from sftrl_utils.joint import JointTrainer, step_weights
from sftrl_utils.prefix_sharing import PrefixSharingGRPOTrainer, PrefixSharingSFTTrainer
from sftrl_utils.rewards import RewardModel, constant_reward, preference_pairs, verifier

RL_KINDS = ("grpo", "proxy", "constant", "joint", "interleaved")


@dataclass(frozen=True)
class TrainedStage:
    """What training leaves: `metrics` (one row per evaluation), the gates, and the settings used."""

    metrics: pd.DataFrame
    gates: dict[str, str]
    trainer_config: dict[str, Any]
    trainer_differences: dict[str, tuple[Any, Any]]


def sft_config(config: RunConfig, seed: int, output_dir: str, steps: int | None = None) -> SFTConfig:
    """Settings of a supervised stage of `steps` (`config.sft_steps`): cross-entropy on responses, Eq. (sft-loss)."""
    return SFTConfig(
        max_steps=steps or config.sft_steps,
        learning_rate=config.sft_learning_rate,
        per_device_train_batch_size=config.batch_size,
        completion_only_loss=True,  # the prompt is given, not learned: L_SFT is over the response
        loss_type="nll",  # the plain cross-entropy of Eq. (sft-loss)
        packing=False,  # one row is one response, so a step is `batch_size` responses
        train_sampling_strategy="group_by_length",  # rows of similar length share a batch: little padding
        max_length=None,  # every prompt is short; TRL would cut at 1,024
        **_common(config, seed, output_dir),
    )


def grpo_config(
    config: RunConfig, seed: int, output_dir: str, max_completion_length: int, steps: int | None = None
) -> GRPOConfig:
    """Settings of a reinforcement stage of `steps` (`config.rl_steps`): Eq. (grpo)."""
    return GRPOConfig(
        max_steps=steps or config.rl_steps,
        learning_rate=config.rl_learning_rate,
        per_device_train_batch_size=config.batch_size,
        num_generations=config.group_size,
        max_completion_length=max_completion_length,
        beta=config.beta,  # TRL's default 0.0 is a choice here, swept by the book
        loss_type=config.loss_type,
        # GRPO's advantage is (r - mean) / std within the group (DeepSeekMath, Sec. 4.1); Dr. GRPO drops the std
        scale_rewards="none" if config.loss_type == "dr_grpo" else "group",
        num_iterations=1,  # on-policy: one update per batch of samples
        steps_per_generation=1,
        epsilon=0.2,  # PPO's clipping; without effect while on-policy
        use_bias_correction_kl=True,  # unbiased gradient of the reverse KL, the KL of the theory's J_beta
        importance_sampling_level="token",
        temperature=1.0,  # mean@1 is defined at temperature 1, top-p 1
        top_p=1.0,
        top_k=0,
        mask_truncated_completions=False,  # an unfinished answer is rewarded for what there is of it
        entropy_coef=0.0,
        disable_dropout=True,  # ratio 1 on-policy, exactly
        **_common(config, seed, output_dir),
    )


def reward_config(config: RunConfig, seed: int, output_dir: str) -> RewardConfig:
    """Settings of a reward model: as many updates, of as many pairs, at the same rate as an SFT stage."""
    return RewardConfig(
        max_steps=config.sft_steps,
        learning_rate=config.sft_learning_rate,
        per_device_train_batch_size=config.batch_size,
        max_length=None,  # every prompt is short; TRL would drop what is longer than 1,024
        disable_dropout=True,
        model_init_kwargs={"dtype": "float32"},
        center_rewards_coefficient=None,  # GRPO subtracts the mean of a group
        **_common(config, seed, output_dir),
    )


def train_reward_model(
    start: Path, tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, config: RunConfig, seed: int
) -> tuple[RewardModel, dict[str, Any], str]:
    """The proxy where no verifier exists: TRL's reward model, from the model in `start`, on `preference_pairs`.

    Also gives the settings of its training and the verdict of its health gate.
    """
    pairs = preference_pairs(tokenizer, frame, config.response_style, config.proxy_flipped, seed)
    with tempfile.TemporaryDirectory() as scratch:
        settings = reward_config(config, seed, scratch)
        trainer = RewardTrainer(str(start), settings, train_dataset=pairs, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Bar(config.sft_steps, f"reward model, seed {config.seed}"))
        _train_all(trainer, "the reward model", config.sft_steps)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    gate = "ok" if np.isfinite(losses).all() else "the reward model's loss is not finite"
    return RewardModel(trainer.model, tokenizer), _settings(settings), gate


def _common(config: RunConfig, seed: int, output_dir: str) -> dict[str, Any]:
    precision = models.precision()
    return {
        "output_dir": output_dir,
        "seed": seed,  # TRL's fixed 42 would make repeats identical
        "data_seed": seed,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "constant",  # the two stages are compared update for update
        "warmup_steps": 0,
        "weight_decay": 0.0,  # no pull towards zero beside the two objectives
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": precision == "bf16",  # autocast over float32 weights: small updates vanish in pure bfloat16
        "fp16": precision == "fp16",
        "activation_checkpointing": config.gradient_checkpointing,  # TRL's default is True, a third more time
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # else a loss that is not finite is logged as 0 and no gate sees it
        "save_strategy": "no",
        "eval_strategy": "no",  # our callback evaluates
        "report_to": "none",
        "disable_tqdm": True,  # our callback shows one bar
    }


def train(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    config: RunConfig,
    evaluator: Evaluator,
    seed: int,
) -> TrainedStage:
    """Train `model` in place by `kind`, evaluating at step 0, in between and at the end.

    `kind`: `sft`; `format`, SFT on labels drawn at random, half of them each; `grpo`, rewarded by the verifier;
    `proxy`, GRPO rewarded by a reward model that is trained here first; `constant`, GRPO with the same reward for every
    response; `joint` and `interleaved`, GRPO and SFT (`joint.step_weights`). Adapters, where `config.lora_rank` asks
    for them, are merged into `model` at the end.
    """
    datasets.disable_progress_bars()
    set_seed(seed)
    frame, style = corpus.splits["train"], config.response_style
    weights = step_weights(kind, config) if kind in {"joint", "interleaved"} else []
    steps = {"sft": config.sft_steps, "format": config.format_steps}.get(kind, len(weights) or config.rl_steps)
    watcher = _Watcher(evaluator, steps, 1 if kind == "format" else config.evaluations, f"{kind}, seed {config.seed}")
    shared = {"processing_class": tokenizer, "callbacks": [watcher], "peft_config": models.adapters(config.lora_rank)}
    with tempfile.TemporaryDirectory() as scratch:
        if kind in RL_KINDS:
            start = Path(scratch, "start")
            if kind == "proxy" or config.beta > 0:
                models.save(model, tokenizer, start)
            if config.beta > 0:  # TRL re-loads the anchor from this path, not from the policy in memory
                model.config._name_or_path = str(start)
            reward = constant_reward if kind == "constant" else verifier(style)
            if kind == "proxy":
                proxy, proxy_settings, proxy_gate = train_reward_model(start, tokenizer, frame, config, seed)
                evaluator.judge, reward = proxy.preferences, proxy.proxy_reward
            settings = grpo_config(config, seed, scratch, longest_response(tokenizer, frame, style) + 2, steps)
            shared["train_dataset"] = rl_dataset(tokenizer, frame, style)
            if weights:
                shared["sft_args"] = sft_config(config, seed, scratch)
                shared["sft_dataset"] = sft_dataset(tokenizer, frame, style)
                trainer = JointTrainer(model, reward, settings, weights=weights, **shared)
            else:
                trainer = PrefixSharingGRPOTrainer(model, reward, settings, **shared)
        else:
            if kind == "format":
                frame = frame.assign(label=np.random.default_rng(seed).permutation(np.arange(len(frame)) % 2))
            settings = sft_config(config, seed, scratch, steps)
            trainer = PrefixSharingSFTTrainer(
                model, settings, train_dataset=sft_dataset(tokenizer, frame, style), **shared
            )
        trainer.remove_callback(PrinterCallback)  # prints every log line where tqdm is off
        _train_all(trainer, kind, steps)
    if config.lora_rank:
        trainer.model.merge_and_unload()  # into `model`
    model.eval()
    chosen, default = _settings(settings), _defaults(type(settings))
    differences = {name: (default[name], value) for name, value in chosen.items() if value != default.get(name)}
    metrics = pd.DataFrame(watcher.rows)
    gates = health_gates(metrics, watcher.logs)
    if kind == "constant":
        del gates["reward_variance"]  # there is none, and should not be
    if weights:
        chosen |= {f"sft/{name}": value for name, value in _settings(shared["sft_args"]).items()}
    if kind == "proxy":
        chosen |= {f"reward_model/{name}": value for name, value in proxy_settings.items()}
        gates["reward_model"] = proxy_gate
    return TrainedStage(metrics, gates, chosen, differences)


def merge(model: PreTrainedModel, earlier: PreTrainedModel, share: float, evaluator: Evaluator) -> TrainedStage:
    """Turn the weights of `model` into `share` × themselves + (1 − `share`) × those of `earlier`; nothing is trained.

    The metrics are of `model` before (step 0) and after (step 1).
    """
    rows = [{"step": 0, **evaluator.evaluate(model, remember="start")}]
    with torch.no_grad():
        for weight, other in zip(model.parameters(), earlier.parameters(), strict=True):
            weight.copy_(torch.lerp(other, weight, share))
    rows.append({"step": 1, **evaluator.evaluate(model)})
    metrics = pd.DataFrame(rows)
    return TrainedStage(metrics, health_gates(metrics, []), {}, {})


def weights_needed(kind: str, config: RunConfig) -> int:
    """How many copies of a model's weights training by `kind` holds at least beside them, activations not counted.

    Gradients and AdamW's two moments, none to speak of with adapters; the anchor of β > 0, which with adapters is the
    model without them; a reward model, trained whole before GRPO begins.
    """
    own = 0 if config.lora_rank else 3 + (kind in RL_KINDS and config.beta > 0)
    return max(4, own + 1) if kind == "proxy" else own


def longest_response(tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, style: str) -> int:
    """Tokens, EOS included, of the longest response an expert gives in `frame`."""
    phenomena = frame["phenomenon"].unique() if style == "rationale" else [""]
    texts = [response_text(label, style, name) for name in phenomena for label in range(len(ANSWERS))]
    return 1 + max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which to evaluate: 0, `steps` and `evaluations − 1` evenly spaced ones in between."""
    return {round(point) for point in np.linspace(0, steps, evaluations + 1)}


def health_gates(metrics: pd.DataFrame, logs: list[dict[str, float]]) -> dict[str, str]:
    """Verdict of each gate, "ok" or why the run is invalid; a run that fails one shows nothing about coupling.

    `logs` are the trainer's own, one per step. Gates on sampling apply only where it sampled.
    """
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    bad_steps = [step for step, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
    numbers = metrics.drop(columns=[name for name in metrics if name.startswith("kl_q") and metrics[name].isna().all()])
    bad_metrics = [name for name in numbers if not np.isfinite(numbers[name]).all()]
    format_rate = metrics["format_rate_train"].iloc[-1]
    gates = {
        "finite_loss": f"loss is not finite from step {bad_steps[0]}" if bad_steps else "ok",
        "finite_metrics": f"{bad_metrics[0]} is not finite" if bad_metrics else "ok",
        "answers_parse": "ok"
        if format_rate > 0.05
        else f"{format_rate:.3f} of responses can be parsed, see format_steps",
    }
    sampled = [entry for entry in logs if "frac_reward_zero_std" in entry and "loss" in entry]
    if sampled:
        first = sampled[: max(5, len(sampled) // 20)]  # a step of the smoke preset has two groups only
        zero_variance = np.mean([entry["frac_reward_zero_std"] for entry in first])
        clipped = max(entry.get("clip_ratio/region_mean", 0.0) for entry in sampled)
        unfinished = np.mean([entry["completions/clipped_ratio"] for entry in sampled])
        gates["reward_variance"] = (
            "ok" if zero_variance < 0.95 else f"{zero_variance:.2f} of groups have equal rewards from the start"
        )
        gates["clipping"] = "ok" if clipped < 0.95 else f"clipped ratio reaches {clipped:.2f}"
        gates["eos"] = "ok" if unfinished < 0.95 else f"{unfinished:.2f} of completions have no EOS"
    return gates


def _settings(arguments: SFTConfig | GRPOConfig) -> dict[str, Any]:
    """Plain values of a trainer's settings, without paths."""
    return _plain({field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)})


def _defaults(arguments: type[SFTConfig] | type[GRPOConfig]) -> dict[str, Any]:
    """The plain defaults that TRL declares."""
    return _plain({field.name: field.default for field in dataclasses.fields(arguments)})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (bool, int, float, str, type(None))) and not name.endswith("_dir")
    }


def _train_all(trainer: Trainer, name: str, steps: int) -> None:
    trainer.train()
    if trainer.state.global_step != steps:
        raise InputError(
            f"{name} ended after {trainer.state.global_step} of {steps} steps: give it more train_sentences"
        )


class _Bar(TrainerCallback):
    """One progress bar."""

    def __init__(self, steps: int, title: str):
        self._bar = tqdm(total=steps, desc=title, unit="step", mininterval=1.0)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


class _Watcher(_Bar):
    """Evaluates at the chosen steps and keeps the trainer's logs."""

    def __init__(self, evaluator: Evaluator, steps: int, evaluations: int, title: str):
        super().__init__(steps, title)
        self.rows: list[dict[str, float]] = []
        self.logs: list[dict[str, float]] = []
        self._evaluator = evaluator
        self._steps = evaluation_steps(steps, evaluations)

    def _evaluate(self, step: int, model: PreTrainedModel) -> None:
        row = {"step": step, **self._evaluator.evaluate(model, remember=None if step else "start")}
        self.rows.append(row)
        self._bar.set_postfix_str(f"sft_loss {row['sft_loss_dev']:.3f}, mean_reward {row['mean_reward_dev']:.3f}")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._evaluate(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control)
        if state.global_step in self._steps:
            self._evaluate(state.global_step, model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))
