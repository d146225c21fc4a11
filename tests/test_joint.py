"""The joint trainer is TRL's GRPO and SFT, step for step; joint, interleaved and merged stages are in the store."""

import numpy as np
import pytest
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import GRPOTrainer, SFTTrainer

from sftrl_utils import corpora, evaluation, joint, models, stages, training
from sftrl_utils.config import InputError
from sftrl_utils.rewards import verifier


class Gradients(TrainerCallback):
    """Keeps the gradient of every update, as the optimiser will see it."""

    def __init__(self):
        self.seen, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        self.rates.append(optimizer.param_groups[0]["lr"])


class SeededOrder(TrainerCallback):
    """Before a plain trainer draws the order of its data: the seed that the joint trainer draws it from."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        torch.manual_seed(args.seed + int(state.epoch or 0))


def run(config, folder, make):
    """Train a fresh copy of the base model by the trainer that `make(model, tokenizer, grpo, sft, data)` builds."""
    model, tokenizer = models.load("embedded")
    frame = corpora.load_corpus(config).splits["train"]
    grpo = training.grpo_config(config, 7, str(folder), max_completion_length=6)
    sft = training.sft_config(config, 7, str(folder))
    grpo.max_grad_norm = sft.max_grad_norm = 0.0  # clipping would hide that gradients add
    data = {
        "rl": corpora.rl_dataset(tokenizer, frame, "label"),
        "sft": corpora.sft_dataset(tokenizer, frame, "label"),
    }
    set_seed(7)
    trainer, kept = make(model, tokenizer, grpo, sft, data), Gradients()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(kept)
    trainer.train()
    return model, kept


def joint_run(config, folder, weights):
    def make(model, tokenizer, grpo, sft, data):
        grpo.max_steps = len(weights)
        expert = {"sft_args": sft, "sft_dataset": data["sft"], "weights": weights}
        shared = {"train_dataset": data["rl"], "processing_class": tokenizer}
        return joint.JointTrainer(model, verifier("label"), grpo, **expert, **shared)

    return run(config, folder, make)


@pytest.fixture(scope="module")
def four_steps(small_config):
    rates = {"rl_learning_rate": 3e-4, "sft_learning_rate": 1e-3}
    return small_config.model_copy(update={"sft_steps": 4, "rl_steps": 4, **rates})


def equal_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("plain", [SFTTrainer, joint.PrefixSharingSFTTrainer])
def test_without_grpo_it_is_trl_s_sft(four_steps, tmp_path, plain):
    def make(model, tokenizer, grpo, sft, data):
        shared = {"train_dataset": data["sft"], "processing_class": tokenizer}
        return plain(model, sft, callbacks=[SeededOrder()], **shared)

    model, kept = run(four_steps, tmp_path, make)
    ours, ours_kept = joint_run(four_steps, tmp_path, [(0.0, 1.0)] * 4)
    assert ours_kept.rates == kept.rates == [1e-3] * 4
    for one, other in zip(kept.seen, ours_kept.seen, strict=True):
        assert torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0) > 1 - 1e-6
        assert other.norm() == pytest.approx(one.norm().item(), rel=1e-3)
    assert equal_weights(model, ours) or plain is SFTTrainer  # plain TRL rounds otherwise, and Adam divides by it


def test_without_sft_it_is_grpo(four_steps, tmp_path):
    def plain(model, tokenizer, grpo, sft, data):
        shared = {"train_dataset": data["rl"], "processing_class": tokenizer}
        return joint.PrefixSharingGRPOTrainer(model, verifier("label"), grpo, **shared)

    model, kept = run(four_steps, tmp_path, plain)
    ours, ours_kept = joint_run(four_steps, tmp_path, [(1.0, 0.0)] * 4)
    assert ours_kept.rates == kept.rates == [3e-4] * 4
    assert equal_weights(model, ours) and not equal_weights(model, models.load("embedded")[0])


def test_gradients_of_a_joint_step_add(four_steps, tmp_path):
    first = {w: joint_run(four_steps, tmp_path, [w])[1].seen[0] for w in [(1.0, 0.0), (0.0, 1.0), (1.0, 0.7)]}
    expected = first[1.0, 0.0] + 0.7 * first[0.0, 1.0]
    assert first[1.0, 0.0].norm() > 0.01 and first[0.0, 1.0].norm() > 0.01
    assert torch.allclose(first[1.0, 0.7], expected, atol=1e-5 * float(expected.norm()))


def test_by_turns_each_update_has_its_own_learning_rate_and_samples_only_for_rl(four_steps, tmp_path, monkeypatch):
    sampled = []
    original = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions", lambda self, batch: sampled.append(1) or original(self, batch)
    )
    config = four_steps.model_copy(update={"cycles": 2})
    _, kept = joint_run(config, tmp_path, joint.step_weights("interleaved", config))
    assert kept.rates == [1e-3, 1e-3, 3e-4, 3e-4] * 2 and len(sampled) == 4


def test_the_sft_term_is_the_loss_that_evaluation_reports(four_steps, tmp_path):
    config = four_steps.model_copy(update={"train_sentences": 8, "dev_sentences": 8})
    terms = []

    class Kept(joint.PrefixSharingSFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            terms.append(loss.item())
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "PrefixSharingSFTTrainer", Kept)
        joint_run(config, tmp_path, [(1.0, 0.5)])  # its one batch is the whole of the 8 sentences
    model, tokenizer = models.load("embedded")
    evaluator = evaluation.Evaluator(corpora.load_corpus(config), tokenizer, "label")
    assert terms == pytest.approx([evaluator.evaluate(model)["sft_loss_train"]], abs=1e-5)


def test_weights_of_the_updates(small_config):
    assert joint.step_weights("joint", small_config.model_copy(update={"sft_weight": 0.3})) == [(1.0, 0.3)] * 10
    turns = joint.step_weights("interleaved", small_config.model_copy(update={"cycles": 5}))
    assert turns == [(0.0, 1.0)] * 2 + [(1.0, 0.0)] * 2 + turns[:16]
    with pytest.raises(InputError, match="cycles=3 does not divide sft_steps=10"):
        stages.train_pipeline(small_config.model_copy(update={"cycles": 3}), "interleaved")


@pytest.mark.parametrize("pipeline", ["joint", "interleaved", "sft_then_interleaved"])
def test_stages_of_both_losses(small_config, pipeline):
    config = small_config.model_copy(update={"cycles": 5})
    stage = stages.train_pipeline(config, pipeline)[-1]
    steps = {"joint": 10}.get(pipeline, 20)
    assert stage.record.pipeline == pipeline and stage.record.valid and stage.metrics["step"].iloc[-1] == steps
    assert stage.record.gates["reward_variance"] == "ok"
    assert stage.metrics["sft_loss_train"].nunique() > 1


def test_a_heavier_sft_term_ends_at_a_lower_sft_loss(small_config):
    settings = {"rl_learning_rate": 1e-3, "rl_steps": 20}
    ends = [
        stages.train_stage(small_config.model_copy(update={"sft_weight": weight, **settings}), "joint")
        .metrics["sft_loss_train"]
        .iloc[-1]
        for weight in (0.0, 10.0)
    ]
    assert ends[1] < ends[0] - 0.01


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_merged_weights_lie_between_the_two_ends(sft_then_rl, small_config, share):
    earlier, later = (stage.load_model()[0] for stage in sft_then_rl)
    config = small_config.model_copy(update={"interpolation": share})
    stage = stages.train_stage(config, "merged", parent=sft_then_rl[1])
    merged = stage.load_model()[0]
    for one, two, both in zip(earlier.parameters(), later.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(both, one + share * (two - one))
    assert stage.record.pipeline == "sft_then_rl_merged" and stage.record.valid
    if share in (0.0, 1.0):
        end = sft_then_rl[int(share)].metrics["sft_loss_dev"].iloc[-1]
        assert stage.metrics["sft_loss_dev"].iloc[-1] == pytest.approx(end, abs=1e-6)


def test_the_answers_of_a_stage_give_its_metrics(sft_then_rl):
    first, second = (stage.answers for stage in sft_then_rl)
    assert set(first["point"]) == {"start", "end"} and set(second["point"]) == {"end"}
    for table, point, metrics in [
        (first, "start", sft_then_rl[0].metrics.iloc[0]),
        (first, "end", sft_then_rl[0].metrics.iloc[-1]),
        (second, "end", sft_then_rl[1].metrics.iloc[-1]),
    ]:
        for split, rows in table[table["point"] == point].groupby("split", observed=True):
            chosen = np.where(rows["label"] == 1, rows["acceptable"], rows["unacceptable"])
            assert -chosen.mean() == pytest.approx(metrics[f"sft_loss_sum_{split}"], abs=1e-5)
            assert (2 * np.exp(chosen) - 1).mean() == pytest.approx(metrics[f"mean_reward_{split}"], abs=1e-5)
