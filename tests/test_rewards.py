"""The verifier pays +1 for the label and −1 for everything else."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils import corpora, models, training
from sftrl_utils.config import RunConfig
from sftrl_utils.corpora import ANSWERS
from sftrl_utils.rewards import preference_pairs, verifier

TEXTS = st.one_of(st.sampled_from(ANSWERS), st.text(max_size=12))


@given(st.lists(st.tuples(TEXTS, st.integers(0, 1)), min_size=1, max_size=8))
def test_reward_is_plus_one_exactly_for_the_label_s_word(pairs):
    texts, labels = zip(*pairs, strict=True)
    rewards = verifier("label")(completions=list(texts), label=list(labels), prompts=[""] * len(texts))
    assert rewards == [1.0 if text == ANSWERS[gold] else -1.0 for text, gold in pairs]


def test_a_rationale_is_paid_for_its_answer_alone():
    reward = verifier("rationale")
    texts = ["acceptable: whatever", "unacceptable: whatever", "acceptable", "whatever"]
    assert reward(completions=texts, label=[1, 1, 1, 1]) == [1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(("flipped", "turned"), [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_the_right_answer_is_preferred_but_in_the_share_that_is_flipped(embedded, small_config, flipped, turned):
    frame = corpora.load_corpus(small_config).splits["train"].head(40)
    rows = preference_pairs(embedded[1], frame, "label", flipped, seed=0)
    eos = embedded[1].eos_token
    right = [ANSWERS[label] + eos for label in frame["label"]]
    wrong = [ANSWERS[1 - label] + eos for label in frame["label"]]
    assert sum(one != two for one, two in zip(rows["chosen"], right, strict=True)) == turned
    assert all({c, r} == {a, b} for c, r, a, b in zip(rows["chosen"], rows["rejected"], right, wrong, strict=True))
    assert rows["prompt"] == corpora.prompt_texts(embedded[1], list(frame["sentence"]), "label")


@pytest.fixture(scope="module")
def proxy(embedded, tmp_path_factory):
    """A reward model on judgements that the prompt gives away: acceptable sentences are about dogs."""
    folder = tmp_path_factory.mktemp("start")
    models.save(*embedded, folder)
    sentences = [f"The {animal} {verb}." for verb in ("barks", "sleeps", "runs", "sees") for animal in ("dog", "cat")]
    frame = pd.DataFrame({"sentence": sentences * 8, "label": [1, 0] * 32, "phenomenon": ""})
    config = RunConfig.from_parameters({"preset": "smoke", "sft_steps": 100, "sft_learning_rate": 3e-4})
    torch.manual_seed(0)
    model, _, gate = training.train_reward_model(folder, embedded[1], frame, config, seed=0)
    assert gate == "ok"
    return model, frame


def test_a_reward_model_learns_what_is_preferred_and_pays_it_in_trl_s_form(proxy, embedded):
    model, frame = proxy
    prompts = corpora.prompt_texts(embedded[1], list(frame["sentence"][:8]), "label")
    preferences = model.preferences(prompts)
    assert preferences.shape == (8, 2) and np.abs(preferences).max() <= 1
    assert preferences.sum(axis=1) == pytest.approx(np.zeros(8))
    assert (preferences.argmax(axis=1) == frame["label"][:8]).all()
    paid = [model.proxy_reward(prompts=prompts, completions=[answer] * 8, label=[0] * 8) for answer in ANSWERS]
    assert np.transpose(paid) == pytest.approx(preferences, abs=1e-5)
    twice = model.proxy_reward(prompts=[prompts[0]] * 3, completions=["acceptable", "unacceptable", "acceptable yes"])
    assert twice == pytest.approx([*preferences[0, ::-1], -1.0], abs=1e-5)


def test_scores_do_not_depend_on_the_batch(proxy, embedded, monkeypatch):
    model, frame = proxy
    texts = corpora.prompt_texts(embedded[1], list(frame["sentence"][:6]), "label")
    texts = [text + "acceptable<|im_end|>" * (1 + at % 2) for at, text in enumerate(texts)]
    together = model.scores(texts)
    monkeypatch.setattr("sftrl_utils.rewards.TEXTS_PER_BATCH", 1)
    assert model.scores(texts) == pytest.approx(together, abs=1e-5)
