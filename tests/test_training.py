"""Trainers are TRL's, set as the book says, and an unhealthy run is called invalid."""

import pandas as pd
import pytest
import torch
from trl import GRPOTrainer, SFTTrainer

from sftrl_utils import corpora, evaluation, models, prefix_sharing, training
from sftrl_utils.config import RunConfig


@pytest.mark.parametrize("style", ["label", "rationale"])
def test_only_the_response_and_eos_are_supervised(embedded, small_config, tmp_path, style):
    model, tokenizer = embedded
    frame = corpora.load_corpus(small_config).splits["train"].head(4)
    data = corpora.sft_dataset(tokenizer, frame, style)
    settings = training.sft_config(small_config, 0, str(tmp_path))
    settings.shuffle_dataset = False
    rows = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer).train_dataset
    for row, source in zip(rows, frame.itertuples(), strict=True):
        supervised = [token for token in row["labels"] if token != -100]
        expected = corpora.response_text(source.label, style, source.phenomenon) + "<|im_end|>"
        assert tokenizer.decode(supervised) == expected
        prompt = tokenizer.decode(row["input_ids"][: -len(supervised)])
        assert prompt == corpora.prompt_texts(tokenizer, [source.sentence], style)[0]


def test_settings_that_make_the_method_are_explicit(small_config, tmp_path):
    config = small_config.model_copy(update={"beta": 0.1, "loss_type": "dr_grpo"})
    grpo = training.grpo_config(config, 5, str(tmp_path), max_completion_length=4)
    sft = training.sft_config(config, 5, str(tmp_path))
    assert (grpo.beta, grpo.loss_type, grpo.num_generations, grpo.num_iterations) == (0.1, "dr_grpo", 4, 1)
    assert (grpo.temperature, grpo.top_p, grpo.top_k) == (1.0, 1.0, 0)
    assert grpo.learning_rate == config.rl_learning_rate and sft.learning_rate == config.sft_learning_rate
    assert sft.completion_only_loss and not sft.packing
    for settings in (grpo, sft):
        assert (settings.seed, settings.report_to, settings.activation_checkpointing) == (5, [], False)
        assert settings.per_device_train_batch_size == config.batch_size


@pytest.mark.parametrize(("steps", "evaluations"), [(200, 10), (10, 10), (37, 10), (3, 10)])
def test_evaluations_are_at_both_ends_and_evenly_between(steps, evaluations):
    chosen = sorted(training.evaluation_steps(steps, evaluations))
    assert chosen[0] == 0 and chosen[-1] == steps
    assert len(chosen) == min(steps, evaluations) + 1
    assert max(b - a for a, b in zip(chosen, chosen[1:], strict=False)) <= steps / evaluations + 1


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_anchor_is_the_policy_in_memory_not_the_checkpoint_it_came_from(monkeypatch, tmp_path, beta):
    made = []

    class Kept(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(training, "PrefixSharingGRPOTrainer", Kept)
    config = RunConfig.from_parameters({"preset": "smoke", "beta": beta, "rl_steps": 1, "dev_sentences": 4})
    model, tokenizer = models.load("embedded-random")  # TRL would anchor it to the trained base model
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    corpus = corpora.load_corpus(config)
    training.train("grpo", model, tokenizer, corpus, config, evaluation.Evaluator(corpus, tokenizer, "label"), 0)
    if beta == 0:
        assert made[0].ref_model is None
    else:
        anchor = made[0].ref_model.state_dict()
        assert all((anchor[name] == start[name]).all() for name in start)


@pytest.mark.parametrize("trainer", [GRPOTrainer, prefix_sharing.PrefixSharingGRPOTrainer])
def test_the_anchor_of_adapters_is_the_model_without_them(monkeypatch, trainer):
    logs = []

    class Kept(trainer):
        def train(self):
            super().train()
            logs.extend(entry["kl"] for entry in self.state.log_history if "kl" in entry)

    monkeypatch.setattr(training, "PrefixSharingGRPOTrainer", Kept)
    settings = {"preset": "smoke", "model": "embedded", "dev_sentences": 4, "lora_rank": 4, "rl_steps": 4}
    config = RunConfig.from_parameters({**settings, "beta": 0.5, "rl_learning_rate": 3e-3})
    corpus, (model, tokenizer) = corpora.load_corpus(config), models.load(config.model)
    with torch.no_grad():
        model.model.norm.weight.mul_(0.8)  # an earlier stage: the policy in memory is no longer the checkpoint
    training.train("grpo", model, tokenizer, corpus, config, evaluation.Evaluator(corpus, tokenizer, "label"), 0)
    assert logs[0] == pytest.approx(0.0, abs=1e-6) and logs[-1] > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "copies"),
    [
        ("sft", {"beta": 0.1}, 3),
        ("grpo", {}, 3),
        ("grpo", {"beta": 0.1}, 4),
        ("grpo", {"beta": 0.1, "lora_rank": 8}, 0),
        ("proxy", {"lora_rank": 8}, 4),
        ("proxy", {"beta": 0.1}, 5),
    ],
)
def test_the_copies_of_the_weights_that_a_stage_holds(small_config, kind, settings, copies):
    assert training.weights_needed(kind, small_config.model_copy(update=settings)) == copies


def test_the_record_of_settings_names_what_differs_from_trl(sft_then_rl):
    differences = sft_then_rl[1].record.trainer_differences
    assert differences["loss_type"] == ("dapo", "grpo")
    assert differences["seed"][0] == 42
    assert "learning_rate" in differences and "temperature" not in differences


METRICS = pd.DataFrame({"step": [0, 1], "sft_loss_dev": [0.5, 0.6], "format_rate_train": [1.0, 1.0]})
HEALTHY = {"loss": 0.1, "frac_reward_zero_std": 0.2, "clip_ratio/region_mean": 0.0, "completions/clipped_ratio": 0.0}


def test_a_healthy_run_passes_every_gate():
    assert set(training.health_gates(METRICS, [HEALTHY] * 10).values()) == {"ok"}


@pytest.mark.parametrize(
    ("gate", "metrics", "log"),
    [
        ("finite_loss", {}, {"loss": float("nan")}),
        ("finite_metrics", {"sft_loss_dev": [0.5, float("inf")]}, {}),
        ("answers_parse", {"format_rate_train": [1.0, 0.0]}, {}),
        ("reward_variance", {}, {"frac_reward_zero_std": 1.0}),
        ("clipping", {}, {"clip_ratio/region_mean": 1.0}),
        ("eos", {}, {"completions/clipped_ratio": 1.0}),
    ],
)
def test_each_gate_catches_its_fault_alone(gate, metrics, log):
    gates = training.health_gates(METRICS.assign(**metrics), [{**HEALTHY, **log}] * 10)
    assert gates.pop(gate) != "ok"
    assert set(gates.values()) == {"ok"}


def test_sft_has_no_gates_on_sampling():
    assert set(training.health_gates(METRICS, [{"loss": 0.1}])) == {"finite_loss", "finite_metrics", "answers_parse"}
