"""Gradients of the two objectives at one policy: their cosine by layer, and the spectrum they live in (T5)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftrl_utils import corpora, models, records
from sftrl_utils.config import InputError, RunConfig

SENTENCES = 48  # of the dev split, the same for all stages: two seconds a stage
LABELS = ("sample", "population")


def answer_gradients(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str], style: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities of the two answers to each of N sentences, and inner products of their gradients.

    The first result has shape (N, 2). The second maps each layer, and `all` for their sum, to the Gram matrix, shape
    (2N, 2N), of the gradients of these 2N log-probabilities with respect to the layer's weights.
    """
    prompts = corpora.prompt_texts(tokenizer, sentences, style)
    answers = corpora.answer_texts(tokenizer, style)
    groups = layers(model)
    logprobs, rows = [], {name: [] for name in groups}
    for prompt in prompts:
        for answer in answers:
            value = _log_probability(model, tokenizer, prompt, answer)
            gradients = dict(zip(groups, _by_group(value, list(groups.values())), strict=True))
            logprobs.append(value.item())
            for name, gradient in gradients.items():
                rows[name].append(gradient)
    grams = {name: _gram(torch.stack(parts)) for name, parts in rows.items()}
    grams["all"] = np.sum(list(grams.values()), axis=0)
    return np.reshape(logprobs, (-1, 2)), grams


def layers(model: PreTrainedModel) -> dict[str, list[torch.nn.Parameter]]:
    """The model's weights by layer: `embedding`, `layer 0`, …, `head` (the final norm, and a head that is not tied)."""
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        number = name.partition(".layers.")[2].partition(".")[0]
        group = f"layer {number}" if number else "embedding" if "embed" in name else "head"
        groups.setdefault(group, []).append(weight)
    return groups


def coefficients(logprob: np.ndarray, label: np.ndarray, q: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What the gradients of −L and of R weigh each ∇ log p(answer) by, shapes (2N,).

    −L = mean Σ_y target(y) log p(y) and R = mean Σ_y r(y) p(y) over N sentences. With `q` None the target is the label
    and r is ±1 by it, as in training; else the target is q and r its expectation ±(2q − 1), as in the theory.
    """
    acceptable = label.astype(float) if q is None else q
    target = np.stack([1 - acceptable, acceptable], axis=1)
    reward = 2 * target - 1
    return (target / len(label)).ravel(), (reward * np.exp(logprob) / len(label)).ravel()


def cosine(gram: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
    """Cosine of the gradients Jᵀc and Jᵀd, from `gram` = J Jᵀ."""
    return float(c @ gram @ d / np.sqrt((c @ gram @ c) * (d @ gram @ d)))


def spectrum(gram: np.ndarray, c: np.ndarray, d: np.ndarray) -> pd.DataFrame:
    """One row a k: the k-th eigenvalue of `gram`, and both gradients in the span of the first k directions.

    `energy_sft` and `energy_rl` are the shares of their squared lengths that lie there, `cosine_k` the cosine within
    it, `slack` what the bound |cos − √(e_L e_R) cos_k| ≤ √((1 − e_L)(1 − e_R)) has left: below 0 by rounding only.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    parts = [np.sqrt(values) * (vectors.T @ weights) for weights in (c, d)]
    squares = [np.cumsum(part**2) for part in parts]
    inner = np.cumsum(parts[0] * parts[1])
    energies = [np.minimum(square / square[-1], 1.0) for square in squares]
    within = inner / np.sqrt(squares[0] * squares[1])
    gap = np.abs(within[-1] - np.sqrt(energies[0] * energies[1]) * within)
    slack = np.sqrt((1 - energies[0]) * (1 - energies[1])) - gap
    columns = {"eigenvalue": values, "energy_sft": energies[0], "energy_rl": energies[1]}
    return pd.DataFrame({"k": np.arange(1, len(values) + 1), **columns, "cosine_k": within, "slack": slack})


def measure(stage_dir: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cosines (one row a layer and kind of labels) and spectrum (one row a kind and k) of the model in `stage_dir`.

    On the first `SENTENCES` of its dev split. `cosine` is of −∇L and ∇R: below 0, a step for the one costs the other.
    """
    config = RunConfig.from_parameters({**records.read_record(stage_dir).config})
    frame = corpora.load_corpus(config).splits["dev"].head(SENTENCES)
    model, tokenizer = models.load(str(stage_dir / "model"))
    logprob, grams = answer_gradients(model, tokenizer, list(frame["sentence"]), config.response_style)
    label, q = frame["label"].to_numpy(), frame["q"].to_numpy()
    cosines, spectra = [], []
    for kind in LABELS:
        if kind == "population" and np.isnan(q).any():
            continue
        c, d = coefficients(logprob, label, q if kind == "population" else None)
        cosines += [{"labels": kind, "layer": name, "cosine": cosine(gram, c, d)} for name, gram in grams.items()]
        spectra.append(spectrum(grams["all"], c, d).assign(labels=kind))
    return pd.DataFrame(cosines).assign(stage=stage_dir.name), pd.concat(spectra).assign(stage=stage_dir.name)


def measure_store(store: Path, folder: Path, names: Collection[str] | None = None) -> int:
    """Measure finished stages of `store` that have their weights; write both tables to `folder`. Returns how many.

    All of them, or those of `names`. Raises `InputError` if there is none, or not all that are named.
    """
    found = [path for path in records.finished_stages(store) if (path / "model").is_dir()]
    if names is not None:
        found = [path for path in found if path.name in names]
        if len(found) < len(names):
            raise InputError(f"{store} holds {len(found)} of {len(names)} stages: run the sweep to its end first")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file: name a folder")
    if not found:
        raise InputError(f"{store} holds no stage with its weights: name the store that was trained into")
    cosines, spectra = zip(*(measure(path) for path in tqdm(found, unit="stage")), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in (("cosines", cosines), ("spectra", spectra)):
        pd.concat(parts, ignore_index=True).to_parquet(folder / f"{name}.parquet", index=False, compression="zstd")
    records.write_checksums(folder)
    return len(found)


def _log_probability(model, tokenizer, prompt: str, answer: str) -> torch.Tensor:
    given = tokenizer(prompt)["input_ids"]
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([given + said], device=model.device)
    logits = model(input_ids=ids, logits_to_keep=len(said) + 1).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, -len(said) :, None]).sum()


def _by_group(value: torch.Tensor, groups: list[list[torch.nn.Parameter]]) -> list[torch.Tensor]:
    """Gradient of `value`, one flat vector a group."""
    gradients = iter(torch.autograd.grad(value, [weight for group in groups for weight in group]))
    return [torch.cat([next(gradients).flatten() for _ in group]) for group in groups]


def _gram(rows: torch.Tensor) -> np.ndarray:
    rows = rows.double()  # in float32 the lesser half of the spectrum would be rounding
    return (rows @ rows.T).cpu().numpy()
