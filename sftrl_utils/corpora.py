"""Datasets, prompts and responses: from a corpus name to what a trainer and an evaluation read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sftrl_utils import grammar
from sftrl_utils.config import InputError, RunConfig

if TYPE_CHECKING:  # to know what is in a corpus nobody needs to wait for these
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("unacceptable", "acceptable")  # indexed by label
SPLITS = ("train", "dev", "heldout")
COLA_FILES = {
    "train": "in_domain_train.tsv",
    "dev": "in_domain_dev.tsv",
    "heldout": "out_of_domain_dev.tsv",
}
COLA_IN_DOMAIN_DEV = 527  # GLUE's validation split is CoLA's in-domain dev file, then the out-of-domain one

PROMPTS = {
    "label": "Is this sentence acceptable English? Answer with one word, acceptable or unacceptable.\n{sentence}",
    "rationale": (
        "Is this sentence acceptable English? Answer acceptable or unacceptable and give a reason.\n{sentence}"
    ),
}
# The same question in other words, the first as in training: a judgement should not hang on the wording.
PARAPHRASES = {
    "label": (
        PROMPTS["label"],
        "Answer with one word, acceptable or unacceptable: is this acceptable English?\n{sentence}",
        "{sentence}\nIs this sentence acceptable English? Answer with one word, acceptable or unacceptable.",
        "Is this English sentence acceptable or unacceptable? Answer with one word.\n{sentence}",
        "Sentence: {sentence}\nIs it acceptable English? Answer acceptable or unacceptable.",
    ),
    "rationale": (
        PROMPTS["rationale"],
        "Answer acceptable or unacceptable and give a reason: is this acceptable English?\n{sentence}",
        "{sentence}\nIs this sentence acceptable English? Answer acceptable or unacceptable and give a reason.",
        "Is this English sentence acceptable or unacceptable? Answer and give a reason.\n{sentence}",
        "Sentence: {sentence}\nIs it acceptable English? Answer acceptable or unacceptable and give a reason.",
    ),
}


@dataclass(frozen=True)
class Corpus:
    """Three splits of judged sentences.

    Each frame in `splits` has columns `sentence`, `label` (0 or 1), `q` (true probability that an
    annotator says acceptable; NaN where unknown), `phenomenon` ("" where unknown). `revision` is a hash
    of all of them: two corpora with the same revision are the same data.
    """

    name: str
    splits: dict[str, pd.DataFrame]

    @property
    def revision(self) -> str:
        """Hash of every row of every split."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(self.splits[split].to_csv(index=False).encode())
        return digest.hexdigest()[:16]

    def summary(self) -> pd.DataFrame:
        """One row per split: sentences, share acceptable and, where q is known, the corpus's own limits.

        `entropy_floor` is E[H(q)] in nats per response, the lowest SFT loss per response; `bayes_reward`
        is the reward, on these labels, of the answer that q makes likelier, E|2q − 1| in expectation;
        `calibrated_reward` is that of answers drawn from q, E(2q − 1)² in expectation.
        """
        rows = {}
        for split, frame in self.splits.items():
            q, label = frame["q"].to_numpy(), frame["label"].to_numpy()
            entropy = -q * np.log(q) - (1 - q) * np.log1p(-q)
            rows[split] = {
                "sentences": len(frame),
                "acceptable": frame["label"].mean(),
                "entropy_floor": entropy.mean(),
                "bayes_reward": np.where(np.isnan(q), np.nan, 2.0 * ((q > 0.5) == label) - 1).mean(),
                "calibrated_reward": (2 * np.where(label == 1, q, 1 - q) - 1).mean(),
            }
        return pd.DataFrame(rows).T.astype({"sentences": int}).rename_axis("split")


def load_corpus(config: RunConfig) -> Corpus:
    """Corpus named by `config.corpus`: `graded`, `cola` or a folder of CoLA TSV files.

    `cola` is the folder in the environment variable `SFTRL_COLA_DIR` if set, else the hub's
    `nyu-mll/glue`. Raises `InputError` for a corpus that is missing, malformed or too small.
    """
    counts = {split: getattr(config, f"{split}_sentences") for split in SPLITS}
    if config.corpus == "graded":
        frames = {split: _graded(split, count) for split, count in counts.items()}
        return Corpus("graded", frames)
    if config.corpus == "cola":
        folder = os.environ.get("SFTRL_COLA_DIR")
        frames = _from_folder(Path(folder)) if folder else _cola_from_hub()
    elif Path(config.corpus).is_dir():
        frames = _from_folder(Path(config.corpus))
    else:
        raise InputError(
            f"corpus={config.corpus!r} is neither 'graded', 'cola' nor a folder holding {COLA_FILES['train']}"
        )
    chosen = {split: _first(config.corpus, split, frames[split], counts[split]) for split in SPLITS}
    return Corpus(config.corpus, chosen)


def write_graded_corpus(folder: Path, counts: dict[str, int]) -> None:
    """Write the graded corpus under CoLA's file names, `q` and `phenomenon` as further columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        grammar.write_tsv(grammar.examples(split, count), folder / COLA_FILES[split])


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase, sentences: list[str], style: str, paraphrase: int = 0
) -> list[str]:
    """Chat-template renderings (thinking off) of the question about each sentence, ready to be continued.

    `paraphrase` chooses one of `PARAPHRASES[style]`; 0 is the question of training. A BOS token that the tokenizer
    writes before any text is left to it, where the template writes one too.
    """
    template = PARAPHRASES[style][paraphrase]
    written = tokenizer.bos_token if tokenizer("")["input_ids"] == [tokenizer.bos_token_id] else ""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": template.format(sentence=sentence)}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        ).removeprefix(written)
        for sentence in sentences
    ]


def response_text(label: int, style: str, phenomenon: str = "") -> str:
    """The expert's response, without EOS: one word (`label`) or the word and a reason (`rationale`)."""
    answer = ANSWERS[label]
    return answer if style == "label" else f"{answer}: {grammar.reason(phenomenon, label)}"


def answer_texts(tokenizer: PreTrainedTokenizerBase, style: str) -> list[str]:
    """What a response must be (`label`) or start with (`rationale`) to count as answer 0 and answer 1."""
    end = tokenizer.eos_token if style == "label" else ":"
    return [answer + end for answer in ANSWERS]


def parse_response(text: str, style: str) -> int | None:
    """Label that a decoded response (special tokens removed) gives; None if it cannot be parsed."""
    answer = text if style == "label" else text.partition(":")[0] if ":" in text else ""
    return ANSWERS.index(answer) if answer in ANSWERS else None


def sft_dataset(tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, style: str) -> Dataset:
    """Rows of `prompt` and `completion` (EOS included) for TRL's `SFTTrainer`.

    The prompt is rendered here, not by TRL: its Qwen3 training template would also supervise the empty
    `<think>` block and the newline after EOS, and the loss would no longer be that of the response.
    """
    rows = frame.itertuples()
    completions = [response_text(row.label, style, row.phenomenon) + tokenizer.eos_token for row in rows]
    prompts = prompt_texts(tokenizer, list(frame["sentence"]), style)
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts, "completion": completions})


def rl_dataset(tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, style: str) -> Dataset:
    """Rows of `prompt` and `label` for TRL's `GRPOTrainer`; the label goes to the reward function."""
    prompts = prompt_texts(tokenizer, list(frame["sentence"]), style)
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts, "label": frame["label"].tolist()})


def _graded(split: str, count: int) -> pd.DataFrame:
    rows = [(e.sentence, e.label, e.q, e.phenomenon) for e in grammar.examples(split, count)]
    return pd.DataFrame(rows, columns=["sentence", "label", "q", "phenomenon"])


def _from_folder(folder: Path) -> dict[str, pd.DataFrame]:
    frames = {}
    for split, name in COLA_FILES.items():
        path = folder / name
        if not path.is_file():
            raise InputError(
                f"corpus folder {str(folder)!r} has no {name}: CoLA's public files are {', '.join(COLA_FILES.values())}"
            )
        frames[split] = _read_tsv(path)
    return frames


def _read_tsv(path: Path) -> pd.DataFrame:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    if lines and lines[0].count("\t") > 3:  # the graded corpus: CoLA's columns and more
        rows = [(e.sentence, e.label, e.q, e.phenomenon) for e in grammar.read_tsv(path)]
        return pd.DataFrame(rows, columns=["sentence", "label", "q", "phenomenon"])
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) != 4 or cells[1] not in {"0", "1"}:
            raise InputError(
                f"{path}, line {number}: {len(cells)} columns with label {cells[1:2]}, but CoLA has 4 "
                "(source, label 0 or 1, mark, sentence), separated by tabs"
            )
        rows.append((cells[3], int(cells[1]), np.nan, ""))
    return pd.DataFrame(rows, columns=["sentence", "label", "q", "phenomenon"])


def _cola_from_hub() -> dict[str, pd.DataFrame]:
    from datasets import load_dataset

    try:
        dataset = load_dataset("nyu-mll/glue", "cola")
    except Exception as error:  # the hub client raises many kinds for one cause: it cannot be reached
        raise InputError(
            "corpus='cola' could not be had from the hub (nyu-mll/glue): "
            f"{type(error).__name__}; set SFTRL_COLA_DIR to a folder with the public TSV files, or use corpus='graded'"
        ) from None
    valid = dataset["validation"]
    parts = {
        "train": dataset["train"],
        "dev": valid.select(range(COLA_IN_DOMAIN_DEV)),
        "heldout": valid.select(range(COLA_IN_DOMAIN_DEV, len(valid))),
    }
    return {
        split: pd.DataFrame({"sentence": part["sentence"], "label": part["label"], "q": np.nan, "phenomenon": ""})
        for split, part in parts.items()
    }


def _first(corpus: str, split: str, frame: pd.DataFrame, count: int) -> pd.DataFrame:
    if count > len(frame):
        raise InputError(f"{split}_sentences={count}, but corpus={corpus!r} has {len(frame)}: use at most that")
    return frame.sample(n=count, random_state=0).reset_index(drop=True)  # the files are ordered by source
