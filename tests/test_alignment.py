"""Gradients of the two objectives: inner products are those of autograd, and the spectral bound holds."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sftrl_utils import alignment, corpora, evaluation, records, stages
from sftrl_utils.config import InputError


@pytest.fixture(scope="module")
def measured(embedded, small_config):
    model, tokenizer = embedded
    frame = corpora.load_corpus(small_config).splits["dev"].head(3)
    return frame, *alignment.answer_gradients(model, tokenizer, list(frame["sentence"]), "label")


def test_log_probabilities_are_the_evaluator_s(measured, embedded, small_config):
    frame, logprob, _ = measured
    evaluator = evaluation.Evaluator(corpora.load_corpus(small_config), embedded[1], "label")
    expected = evaluator.answer_scores(embedded[0], "dev").logprob[: len(frame)]
    assert logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("known_q", [False, True])
def test_the_cosine_is_that_of_the_objectives_own_gradients(measured, embedded, known_q):
    """By hand: −L and R of the three sentences as one expression each, differentiated."""
    frame, logprob, grams = measured
    model, tokenizer = embedded
    label, q = frame["label"].to_numpy(), frame["q"].to_numpy()
    acceptable = torch.tensor(q if known_q else label, dtype=torch.float32)
    prompts, answers = (
        corpora.prompt_texts(tokenizer, list(frame["sentence"]), "label"),
        corpora.answer_texts(tokenizer, "label"),
    )
    log_p = torch.stack([
        torch.stack([alignment._log_probability(model, tokenizer, prompt, answer) for answer in answers])
        for prompt in prompts
    ])  # fmt: skip
    target = torch.stack([1 - acceptable, acceptable], 1)
    objectives = (target * log_p).sum(1).mean(), ((2 * target - 1) * log_p.exp()).sum(1).mean()
    weights = list(model.parameters())
    gradients = [
        torch.cat([part.flatten() for part in torch.autograd.grad(value, weights, retain_graph=True)]).double()
        for value in objectives
    ]
    c, d = alignment.coefficients(logprob, label, q if known_q else None)
    expected = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    assert alignment.cosine(grams["all"], c, d) == pytest.approx(expected, abs=1e-4)
    assert float(np.sqrt(c @ grams["all"] @ c)) == pytest.approx(gradients[0].norm().item(), rel=1e-3)


def test_layers_hold_every_weight_once(embedded):
    model, _ = embedded
    groups = alignment.layers(model)
    found = [id(weight) for group in groups.values() for weight in group]
    assert sorted(found) == sorted(id(weight) for weight in model.parameters())
    assert list(groups)[0] == "embedding" and list(groups)[-1] == "head" and "layer 0" in groups


@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12))
def test_the_spectral_bound_holds_and_ends_at_the_whole(seed, rows, columns):
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(rows, columns)) * rng.gamma(0.5, size=(rows, 1))
    gram, c, d = jacobian @ jacobian.T, rng.normal(size=rows), rng.normal(size=rows)
    table = alignment.spectrum(gram, c, d)
    assert table["slack"].min() > -1e-6
    assert table["eigenvalue"].is_monotonic_decreasing and table["k"].tolist() == list(range(1, rows + 1))
    assert table[["energy_sft", "energy_rl"]].iloc[-1].tolist() == pytest.approx([1, 1])
    assert table["cosine_k"].iloc[-1] == pytest.approx(alignment.cosine(gram, c, d), abs=1e-6)


def test_a_store_is_measured_stage_by_stage(sft_then_rl, small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "SENTENCES", 2)
    for stage in sft_then_rl:
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / stage.path.name).symlink_to(stage.path)
    assert alignment.measure_store(tmp_path / "store", tmp_path / "to") == 2
    cosines, spectra = (pd.read_parquet(tmp_path / "to" / f"{name}.parquet") for name in ("cosines", "spectra"))
    assert set(cosines["stage"]) == set(spectra["stage"]) == {stage.path.name for stage in sft_then_rl}
    assert set(cosines["labels"]) == set(alignment.LABELS) and cosines["cosine"].between(-1, 1).all()
    assert len(spectra) == 2 * 2 * 4 and spectra["slack"].min() > -1e-4


def test_a_store_without_weights_is_refused(sft_then_rl, tmp_path):
    records.publish(sft_then_rl[0].path.parent, tmp_path / "published")
    with pytest.raises(InputError, match="holds no stage with its weights"):
        alignment.measure_store(tmp_path / "published", tmp_path / "to")
    assert stages.open_stage(sft_then_rl[0].path).record.valid
