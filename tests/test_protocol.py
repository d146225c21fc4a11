"""The harder judgement is exact where it says so, and agrees with samples where it stands for them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sftrl_utils import corpora, evaluation, protocol
from sftrl_utils.rewards import verifier


@pytest.fixture(scope="module")
def frame(small_config):
    return corpora.load_corpus(small_config).splits["dev"]


@pytest.fixture(scope="module")
def model(sft_then_rl):
    return sft_then_rl[0].load_model()


def policies(sentences=6):
    weights = hnp.arrays(float, (sentences, 3), elements=st.floats(0.01, 1))
    return st.tuples(
        weights.map(lambda w: w / w.sum(1, keepdims=True)), hnp.arrays(int, sentences, elements=st.integers(0, 1))
    )


@given(policies(), st.integers(1, 5))
def test_votes_are_those_of_every_sequence_of_samples(policy, k):
    p, label = policy
    won, passed = np.zeros(len(p)), np.zeros(len(p))
    for answers in itertools.product(range(3), repeat=k):
        chance = np.prod([p[:, answer] for answer in answers], axis=0)
        right, wrong = (sum(answer == which for answer in np.array(answers)[:, None]) for which in (label, 1 - label))
        won += chance * np.where(right > wrong, 1.0, np.where((right == wrong) & (right > 0), 0.5, 0.0))
        passed += chance * (right > 0)
    votes = protocol.votes(p, label, k)
    assert votes["maj"] == pytest.approx(won.mean(), abs=1e-10)
    assert votes["pass"] == pytest.approx(passed.mean(), abs=1e-10)


def test_votes_of_certain_policies():
    label = np.array([0, 1])
    assert protocol.votes(np.eye(3)[[0, 1]], label, 16) == {"maj": 1.0, "pass": 1.0}
    assert protocol.votes(np.eye(3)[[2, 2]], label, 16) == {"maj": 0.0, "pass": 0.0}


def test_the_robust_mean_reward_is_the_expectation_within_its_interval():
    rng = np.random.default_rng(1)
    p, label = rng.dirichlet([2, 3, 0.5], size=(5, 2000)), rng.integers(0, 2, 2000)
    mean, low, high = protocol.robust_mean_reward(p, label)
    expected = (2 * p[:, np.arange(2000), label] - 1).mean()
    assert low < expected < high and low < mean < high
    assert high - low < 0.1
    one = np.tile(np.eye(3)[[1]], (5, 4, 1))
    assert protocol.robust_mean_reward(one, np.ones(4, dtype=int)) == (1.0, 1.0, 1.0)


def test_the_interval_is_over_sentences_not_over_responses():
    """Responses to one sentence that agree perfectly are one observation, however many there are."""
    rng = np.random.default_rng(2)
    answers = np.eye(3)[rng.integers(0, 2, 200)]
    label = np.ones(200, dtype=int)
    widths = [np.diff(protocol.robust_mean_reward(np.stack([answers] * count), label)[1:])[0] for count in (1, 5)]
    assert widths[0] == pytest.approx(widths[1])


def test_one_temperature_mends_confidence_and_nothing_else():
    rng = np.random.default_rng(3)
    truth = rng.uniform(0.05, 0.95, 4000)
    label = (rng.random(4000) < truth).astype(int)
    margin = np.log(truth / (1 - truth))

    def policy(scale):
        q = 1 / (1 + np.exp(-scale * margin))
        return np.stack([1 - q, q, 0 * q], axis=1)

    right, sharp = (protocol.calibration(policy(scale), label) for scale in (1.0, 5.0))
    assert right["temperature"] == pytest.approx(1, abs=0.1) and right["ece"] < 0.03 < sharp["ece"]
    assert sharp["temperature"] == pytest.approx(5, rel=0.1)
    assert sharp["answer_loss"] > sharp["answer_loss_tempered"] + 0.3
    assert sharp["answer_loss_tempered"] == pytest.approx(right["answer_loss"], abs=0.005)
    wrong = protocol.calibration(policy(-1.0), label)
    assert wrong["answer_loss_tempered"] == pytest.approx(np.log(2), abs=0.01)  # no temperature turns a judgement round


def test_calibration_of_the_certain_is_finite():
    certain = protocol.calibration(np.eye(3)[[0, 1, 1, 0]], np.array([0, 1, 0, 1]))
    assert all(np.isfinite(value) for value in certain.values()) and certain["ece"] == pytest.approx(0.5)


def test_the_report_agrees_with_the_loop_and_with_sampling(model, frame):
    table = protocol.report(*model, frame, "label")["value"]
    evaluator = evaluation.Evaluator(corpora.Corpus("x", {split: frame for split in corpora.SPLITS}), model[1], "label")
    metrics = evaluator.evaluate(model[0])
    assert table["mean_reward"] == pytest.approx(metrics["mean_reward_dev"], abs=1e-9)
    rewards = evaluation.sampled_rewards(*model, frame, "label", verifier("label"), k=16, seed=0)
    best = (rewards == 1).any(axis=1)
    assert abs(table["pass@16"] - best.mean()) < 4 * best.std() / len(best) ** 0.5 + 0.02
    most = np.select([rewards.mean(axis=1) > 0, rewards.mean(axis=1) < 0], [1.0, 0.0], default=0.5)
    assert abs(table["maj@16"] - most.mean()) < 0.1
    assert table.notna().all()


@pytest.mark.parametrize("style", corpora.PARAPHRASES)
def test_five_wordings_of_one_question(style, embedded):
    assert len(set(corpora.PARAPHRASES[style])) == 5 and corpora.PARAPHRASES[style][0] == corpora.PROMPTS[style]
    texts = [corpora.prompt_texts(embedded[1], ["Dogs bark."], style, at)[0] for at in range(5)]
    assert len(set(texts)) == 5 and all(text.count("Dogs bark.") == 1 for text in texts)
