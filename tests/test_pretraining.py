"""The shipped base model can be rebuilt, and it is a fair starting point."""

import json

import numpy as np
import pytest

from sftrl_utils import corpora, pretraining, sources
from sftrl_utils.config import RunConfig
from sftrl_utils.evaluation import Evaluator


def test_rebuilding_gives_the_same_first_losses(tmp_path):
    shipped = json.loads((sources.base_dir() / "pretraining.json").read_text())
    rebuilt = pretraining.pretrain(tmp_path, max_steps=5)
    assert rebuilt == pytest.approx(shipped["first_losses"][:5], rel=1e-3)
    ours, theirs = (folder / "tokenizer.json" for folder in (tmp_path, sources.base_dir()))
    assert ours.read_bytes() == theirs.read_bytes()


def test_it_answers_in_format_better_than_chance_and_worse_than_bayes(embedded):
    model, tokenizer = embedded
    corpus = corpora.load_corpus(RunConfig.from_parameters({}))
    metrics = Evaluator(corpus, tokenizer, "label").evaluate(model)
    assert metrics["format_rate_dev"] > 0.98
    rate = corpus.splits["dev"]["label"].mean()
    chance = rate**2 + (1 - rate) ** 2  # answering at random with the corpus's own rate
    assert 2 * chance - 1 < metrics["mean_reward_dev"] < corpus.summary().loc["dev", "calibrated_reward"]
    assert metrics["kl_q_dev"] > 0.02


def test_judgements_heed_the_sentence_as_often_as_said():
    judged = pretraining.judged_sentences(20_000)
    from sftrl_utils import grammar

    q = np.array([example.q for example in grammar.examples("pretrain", 20_000, pretraining.SEED)])
    for low, high in [(0, 0.1), (0.9, 1)]:
        chosen = (q >= low) & (q <= high)
        expected = 0.8 * q[chosen].mean() + 0.14
        assert judged["label"][chosen].mean() == pytest.approx(expected, abs=0.02)
