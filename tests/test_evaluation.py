"""Evaluation is exact: against naive forward passes, TRL's own loss, sampling and hand-made cases."""

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from trl import SFTTrainer

from sftrl_utils import corpora, evaluation, models, training
from sftrl_utils.evaluation import Evaluator, ResponseScores
from sftrl_utils.rewards import verifier


@pytest.fixture(scope="module")
def corpus(small_config):
    return corpora.load_corpus(small_config)


@pytest.fixture(scope="module")
def trained(sft_then_rl):
    return sft_then_rl[0].load_model()


def naive_scores(model, tokenizer, prompt, response):
    """Log-probability of `response` and whether it is the greedy one, from one plain forward pass."""
    prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + response)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(len(prompt_ids), len(ids))
    total = sum(logprobs[place - 1, ids[place]].item() for place in places)
    return total, len(places), all(logprobs[place - 1].argmax() == ids[place] for place in places)


@pytest.mark.parametrize("style", ["label", "rationale"])
def test_scores_equal_plain_forward_passes(trained, corpus, style):
    model, tokenizer = trained
    frame = corpus.splits["dev"].head(12)
    prompts = corpora.prompt_texts(tokenizer, list(frame["sentence"]), style)
    responses = [
        [corpora.response_text(label, style, row.phenomenon) + tokenizer.eos_token for label in (0, 1)]
        for row in frame.itertuples()
    ]
    scores = evaluation.score_responses(model, tokenizer, prompts, responses, prompts_per_batch=5)
    for i, prompt in enumerate(prompts):
        for j in (0, 1):
            logprob, tokens, greedy = naive_scores(model, tokenizer, prompt, responses[i][j])
            assert scores.logprob[i, j] == pytest.approx(logprob, abs=1e-4)
            assert scores.tokens[i, j] == tokens
            assert scores.greedy[i, j] == greedy


def test_the_sft_loss_is_trl_s(trained, corpus, small_config, tmp_path):
    model, tokenizer = trained
    frame = corpus.splits["dev"].head(20)
    settings = training.sft_config(small_config, 0, str(tmp_path))
    settings.per_device_eval_batch_size = len(frame)
    data = corpora.sft_dataset(tokenizer, frame, "label")
    trainer = SFTTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    theirs = trainer.evaluate()["eval_loss"]
    ours = Evaluator(corpora.Corpus("", {"dev": frame}), tokenizer, "label").evaluate(model)["sft_loss_dev"]
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_exact_mean_reward_agrees_with_mean_at_64_by_sampling(trained, corpus):
    model, tokenizer = trained
    frame = corpus.splits["dev"]
    evaluator = Evaluator(corpora.Corpus("", {"dev": frame}), tokenizer, "label")
    probabilities = evaluation.answer_probabilities(evaluator.answer_scores(model, "dev"))
    correct = probabilities[np.arange(len(frame)), frame["label"]]
    rewards = evaluation.sampled_rewards(model, tokenizer, frame, "label", verifier("label"), k=64, seed=0)
    standard_error = np.sqrt((4 * correct * (1 - correct) / 64).sum()) / len(frame)
    assert rewards.shape == (len(frame), 64) and set(np.unique(rewards)) <= {-1.0, 1.0}
    assert abs(rewards.mean() - (2 * correct - 1).mean()) <= 3 * standard_error
    assert evaluator.evaluate(model)["mean_reward_dev"] == pytest.approx((2 * correct - 1).mean())


def test_kl_to_the_start_is_zero_at_the_start_and_not_after(trained, embedded, corpus):
    evaluator = Evaluator(corpora.Corpus("", {"dev": corpus.splits["dev"]}), trained[1], "label")
    assert evaluator.evaluate(embedded[0], remember="start")["kl_start_dev"] == 0
    assert evaluator.evaluate(trained[0])["kl_start_dev"] > 0
    assert evaluator.evaluate(trained[0], remember="start")["kl_start_dev"] == 0
    assert evaluator.evaluate(trained[0])["kl_base_dev"] > 0  # the first that was remembered


def test_a_trainer_s_autocast_does_not_reach_an_evaluation(corpus):
    model, tokenizer = models.load("embedded")
    evaluator = Evaluator(corpora.Corpus("", {"dev": corpus.splits["dev"]}), tokenizer, "label")
    before = evaluator.evaluate(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # as every trainer does
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    ids = torch.tensor([tokenizer("The dog barks.")["input_ids"]])
    with torch.no_grad():
        assert not torch.equal(wrapped(ids).logits, wrapped._original_forward(ids).logits)
    after = evaluator.evaluate(wrapped)
    assert all(before[name] == after[name] for name in before if name != "kl_q_dev")


def test_the_proxy_reward_is_the_mean_of_what_the_judge_prefers(embedded, corpus):
    frame = corpus.splits["dev"]
    right = 2.0 * np.stack([frame["label"] == 0, frame["label"] == 1], axis=1) - 1
    for sign in (1, -1):  # a judge that knows the labels, and one that has them reversed
        evaluator = Evaluator(
            corpora.Corpus("", {"dev": frame}), embedded[1], "label", judge=lambda _, sign=sign: sign * right
        )
        metrics = evaluator.evaluate(embedded[0])
        rest = 1 - metrics["format_rate_dev"]  # pays -1 to both
        assert metrics["proxy_reward_dev"] == pytest.approx(sign * (metrics["mean_reward_dev"] + rest) - rest, abs=1e-6)
        assert metrics["proxy_accuracy_dev"] == (sign > 0)


def scores_of(p_unacceptable, p_acceptable):
    """Scores of a policy with these answer probabilities."""
    p = np.stack([p_unacceptable, p_acceptable], axis=1)
    with np.errstate(divide="ignore"):
        return ResponseScores(np.log(p), np.full(p.shape, 2), p > 0.5)


def test_the_constant_answer_on_cola_s_dev_file_earns_the_paper_s_reward():
    label = np.array([1] * 365 + [0] * 162)
    metrics = evaluation.answer_metrics(scores_of(np.zeros(527), np.ones(527)), label, np.full(527, 0.7), {})
    assert metrics["mean_reward"] == pytest.approx(0.3852, abs=1e-4)
    assert metrics["greedy_accuracy"] == pytest.approx(0.6926, abs=1e-4)
    assert metrics["mcc"] == 0 and metrics["acceptable_rate"] == 1
    assert metrics["entropy"] == pytest.approx(0, abs=1e-9)


def test_an_answer_that_cannot_be_parsed_is_wrong():
    metrics = evaluation.answer_metrics(
        scores_of(np.full(4, 0.1), np.full(4, 0.1)), np.array([0, 1, 0, 1]), np.full(4, 0.5), {}
    )
    assert metrics["greedy_accuracy"] == 0 and metrics["acceptable_rate"] == 0
    assert metrics["format_rate"] == pytest.approx(0.2) and metrics["mean_reward"] == pytest.approx(-0.8)


PROBABILITIES = hnp.arrays(float, (6, 3), elements=st.floats(1e-6, 1)).map(lambda a: a / a.sum(1, keepdims=True))


@given(PROBABILITIES, PROBABILITIES, hnp.arrays(int, 6, elements=st.integers(0, 1)))
def test_metrics_obey_their_bounds(p, reference, label):
    scores = ResponseScores(np.log(p[:, :2]), np.full((6, 2), 2), p[:, :2] > 0.5)
    q = np.full(6, 0.7)
    metrics = evaluation.answer_metrics(scores, label, q, {"start": reference, "self": p})
    assert -1 <= metrics["mean_reward"] <= 1 and -1 <= metrics["mcc"] <= 1
    assert 0 <= metrics["entropy"] <= np.log(3) + 1e-9
    assert metrics["kl_start"] >= -1e-12 and abs(metrics["kl_self"]) < 1e-9
    by_hand = (p * np.log(p / reference)).sum(1).mean()
    assert metrics["kl_start"] == pytest.approx(by_hand, abs=1e-6)


def test_unknown_q_gives_no_divergence_from_it(embedded):
    frame = pd.DataFrame({"sentence": ["Dogs bark."] * 3, "label": 1, "q": np.nan, "phenomenon": ""})
    metrics = Evaluator(corpora.Corpus("", {"dev": frame}), embedded[1], "label").evaluate(embedded[0])
    assert np.isnan(metrics["kl_q_dev"]) and np.isfinite(metrics["sft_loss_dev"])
