"""Prompts, responses and corpora: what trainers and evaluation read."""

import copy
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from sftrl_utils import corpora
from sftrl_utils.config import InputError, RunConfig


def config(**parameters):
    return RunConfig.from_parameters({"preset": "smoke", **parameters})


@pytest.fixture
def cola_like(tmp_path):
    """A folder of well-formed files in CoLA's format."""
    for name, count in zip(corpora.COLA_FILES.values(), (200, 40, 40), strict=True):
        rows = [f"x01\t{i % 2}\t{'' if i % 2 else '*'}\tSentence number {i} of {name}." for i in range(count)]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    return tmp_path


def test_prompts_end_after_an_empty_think_block(embedded):
    _, tokenizer = embedded
    [text] = corpora.prompt_texts(tokenizer, ["Dogs bark."], "label")
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "Dogs bark." in text


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5"])
def test_a_prompt_is_token_by_token_what_trl_s_own_template_gives_with_thinking_off(embedded, name):
    tokenizer = copy.deepcopy(embedded[1])
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    sentences = ["Dogs bark.", "Them is  here — “really”?"]
    for paraphrase, question in enumerate(corpora.PARAPHRASES["label"]):
        tokenizer.chat_template = template
        prompts = corpora.prompt_texts(tokenizer, sentences, "label", paraphrase)
        for sentence, prompt in zip(sentences, prompts, strict=True):
            theirs = tokenizer.apply_chat_template(
                [{"role": "user", "content": question.format(sentence=sentence)}],
                chat_template=template,
                enable_thinking=False,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert tokenizer(prompt)["input_ids"] == theirs


def test_a_tokenizer_that_writes_bos_before_any_text_writes_the_template_s_no_second_time(embedded):
    tokenizer = copy.deepcopy(embedded[1])
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    [before] = corpora.prompt_texts(tokenizer, ["Dogs bark."], "label")  # nothing but the template writes it
    assert tokenizer(before)["input_ids"][0] == bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    [prompt] = corpora.prompt_texts(tokenizer, ["Dogs bark."], "label")
    assert tokenizer(prompt)["input_ids"] == embedded[1](before)["input_ids"]
    assert tokenizer(prompt)["input_ids"].count(bos) == 1


@pytest.mark.parametrize("style", ["label", "rationale"])
@pytest.mark.parametrize("label", [0, 1])
def test_every_expert_response_parses_to_its_label(style, label):
    from sftrl_utils.grammar import PHENOMENA

    for phenomenon in PHENOMENA:
        assert corpora.parse_response(corpora.response_text(label, style, phenomenon), style) == label


@given(st.text(max_size=20))
def test_only_the_two_words_parse_as_labels(text):
    parsed = corpora.parse_response(text, "label")
    assert (parsed is not None) == (text in corpora.ANSWERS)


@pytest.mark.parametrize("text", ["acceptable", "acceptable because", "Acceptable: yes", "very acceptable: so"])
def test_a_rationale_must_start_with_answer_and_colon(text):
    assert corpora.parse_response(text, "rationale") is None


def test_summary_agrees_with_its_definitions():
    corpus = corpora.load_corpus(config(train_sentences=9_000))
    row, frame = corpus.summary().loc["train"], corpus.splits["train"]
    pairs = list(zip(frame["q"], frame["label"], strict=True))
    assert row["bayes_reward"] == pytest.approx(np.mean([1 if (q > 0.5) == y else -1 for q, y in pairs]))
    assert row["calibrated_reward"] == pytest.approx(np.mean([2 * q - 1 if y else 1 - 2 * q for q, y in pairs]))
    floor = np.mean([-(q * np.log(q) + (1 - q) * np.log(1 - q)) for q, _ in pairs])
    assert row["entropy_floor"] == pytest.approx(floor)
    assert row["bayes_reward"] == pytest.approx(np.mean([abs(2 * q - 1) for q, _ in pairs]), abs=0.02)
    assert row["calibrated_reward"] == pytest.approx(np.mean([(2 * q - 1) ** 2 for q, _ in pairs]), abs=0.02)


def test_revision_changes_with_one_label():
    corpus = corpora.load_corpus(config())
    before = corpus.revision
    corpus.splits["dev"].loc[0, "label"] = 1 - corpus.splits["dev"].loc[0, "label"]
    assert corpus.revision != before


def test_a_folder_of_cola_files_is_read(cola_like):
    corpus = corpora.load_corpus(config(corpus=str(cola_like), train_sentences=150))
    assert [len(corpus.splits[split]) for split in corpora.SPLITS] == [150, 40, 40]
    for row in corpus.splits["train"].itertuples():
        assert row.label == int(row.sentence.split()[2]) % 2 and np.isnan(row.q)


def test_the_written_graded_corpus_reads_back_with_its_q(tmp_path):
    counts = {"train": 200, "dev": 40, "heldout": 40}
    corpora.write_graded_corpus(tmp_path, counts)
    read = corpora.load_corpus(config(corpus=str(tmp_path)))
    made = corpora.load_corpus(config())
    for split in corpora.SPLITS:
        columns = ["sentence", "label", "q", "phenomenon"]
        left, right = (c.splits[split].sort_values("sentence")[columns].values.tolist() for c in (read, made))
        assert left == right


def test_public_cola_counts_and_rates(cola_dir, monkeypatch):
    monkeypatch.setenv("SFTRL_COLA_DIR", str(cola_dir))
    counts = {"train_sentences": 8551, "dev_sentences": 527, "heldout_sentences": 516}
    corpus = corpora.load_corpus(config(corpus="cola", **counts))
    assert corpus.splits["dev"]["label"].sum() == 365  # the constant answer: 0.6926 accuracy
    assert corpus.splits["train"]["label"].mean() == pytest.approx(0.7044, abs=1e-4)
    assert corpus.splits["heldout"]["label"].sum() == 354


def test_the_hub_s_validation_split_is_taken_apart_into_both_dev_files(cola_dir, monkeypatch):
    monkeypatch.setenv("SFTRL_COLA_DIR", str(cola_dir))
    sizes = config(corpus="cola", train_sentences=8551, dev_sentences=527, heldout_sentences=516)
    from_files = corpora.load_corpus(sizes)
    parts = {split: corpora._read_tsv(cola_dir / name) for split, name in corpora.COLA_FILES.items()}
    parts["validation"] = pd.concat([parts.pop("dev"), parts.pop("heldout")])
    glue = {split: Dataset.from_pandas(part[["sentence", "label"]]) for split, part in parts.items()}
    monkeypatch.delenv("SFTRL_COLA_DIR")
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: glue if name == ("nyu-mll/glue", "cola") else None)
    from_hub = corpora.load_corpus(sizes)
    for split in corpora.SPLITS:
        pd.testing.assert_frame_equal(from_hub.splits[split], from_files.splits[split], check_dtype=False)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "in_domain_dev.tsv").unlink(), "has no in_domain_dev.tsv"),
        (lambda folder: (folder / "in_domain_dev.tsv").write_text("x01\t1\tno mark column\n"), "line 1: 3 columns"),
        (lambda folder: (folder / "in_domain_dev.tsv").write_text("x01\tyes\t\tBad label.\n"), "label ['yes']"),
        (lambda folder: (folder / "in_domain_dev.tsv").write_text("x01\t1\t\tOnly one.\n"), "dev_sentences=40"),
    ],
    ids=["missing file", "missing column", "bad label", "too few"],
)
def test_a_broken_folder_is_one_line(cola_like, break_it, message):
    break_it(cola_like)
    with pytest.raises(InputError) as caught:
        corpora.load_corpus(config(corpus=str(cola_like)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_corpus_says_what_would_do():
    with pytest.raises(InputError, match="corpus='grded' is neither 'graded', 'cola' nor a folder"):
        corpora.load_corpus(config(corpus="grded"))


def test_cola_without_folder_or_network_is_one_line(monkeypatch):
    monkeypatch.delenv("SFTRL_COLA_DIR", raising=False)
    with pytest.raises(InputError, match="set SFTRL_COLA_DIR") as caught:
        corpora.load_corpus(config(corpus="cola"))
    assert "\n" not in str(caught.value)
