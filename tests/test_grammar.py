"""The graded corpus: distinct sentences, known q, labels drawn from it, splits that never meet."""

import hashlib
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from sftrl_utils import grammar
from sftrl_utils.config import InputError


@pytest.fixture(scope="module")
def large():
    counts = {"pretrain": 60_000, "train": 20_000, "dev": 5_000, "heldout": 5_000}
    return {split: grammar.examples(split, count) for split, count in counts.items()}


def test_more_than_twenty_thousand_distinct_sentences_and_no_split_shares_one(large):
    seen = Counter(sentence for rows in large.values() for sentence in {row.sentence for row in rows})
    assert len(seen) == sum(len(rows) for rows in large.values()) and max(seen.values()) == 1


@pytest.mark.parametrize("seed", [1, 2])
def test_splits_never_meet_whatever_the_seed(large, seed):
    train = {row.sentence for row in large["train"]} | {row.sentence for row in grammar.examples("train", 9_000, seed)}
    dev = {row.sentence for row in large["dev"]} | {row.sentence for row in grammar.examples("dev", 4_000, seed)}
    pretrain = {row.sentence for row in large["pretrain"]}
    assert not train & dev and not train & pretrain and not dev & pretrain


def test_held_out_phenomena_are_held_out(large):
    for split, rows in large.items():
        names = {row.phenomenon for row in rows}
        expected = set(grammar.HELD_OUT) if split == "heldout" else set(grammar.PHENOMENA) - set(grammar.HELD_OUT)
        assert names == expected
    assert len(grammar.PHENOMENA) - len(grammar.HELD_OUT) >= 8


@settings(max_examples=30, deadline=None)
@given(
    split=st.sampled_from(sorted(grammar.AVAILABLE)), count=st.integers(200, 1_500), seed=st.integers(0, 10_000)
)  # fmt: skip
def test_seventy_percent_are_acceptable_within_one_in_every_split(split, count, seed):
    rows = grammar.examples(split, count, seed)
    assert len(rows) == len({row.sentence for row in rows}) == count
    assert 0.69 <= np.mean([row.label for row in rows]) <= 0.71
    assert 0.69 <= np.mean([row.q for row in rows]) <= 0.71


def test_labels_are_drawn_from_q():
    drawn = defaultdict(list)
    for seed in range(40):
        for row in grammar.examples("train", 400, seed):
            drawn[row.q].append(row.label)
    assert len(drawn) >= 7
    statistic = sum(
        (np.sum(labels) - q * len(labels)) ** 2 / (len(labels) * q * (1 - q)) for q, labels in drawn.items()
    )
    assert statistic < chi2.ppf(0.999, len(drawn))


def test_one_sentence_s_label_varies_with_the_seed_as_q_says():
    q = np.array([0.97, 0.5, 0.03, 0.4] * 50)
    draws = [np.array(grammar._systematic(q.tolist(), Random(seed).random)) for seed in range(2_000)]
    assert all(abs(draw.sum() - q.sum()) < 1 for draw in draws)
    assert np.abs(np.mean(draws, axis=0) - q).max() < 4.5 * 0.5 / np.sqrt(2_000)


def test_q_is_high_low_or_marginal_and_belongs_to_the_construction(large):
    values = Counter(row.q for row in large["train"])
    marginal = {q for q in values if q not in (grammar.WELL_FORMED, grammar.VIOLATION)}
    assert all(0.15 <= q <= 0.85 for q in marginal) and len(marginal) >= 5
    share = sum(values[q] for q in marginal) / len(large["train"])
    assert 0.25 <= share <= 0.34
    q = np.array([row.q for row in large["train"]])
    assert 0.85 <= np.maximum(q, 1 - q).mean() <= 0.95  # accuracy of the best answer
    for name in grammar.PHENOMENA:
        found = {row.q for rows in large.values() for row in rows if row.phenomenon == name}
        assert {grammar.WELL_FORMED, grammar.VIOLATION} < found


def test_a_minimal_pair_differs_in_few_words(large):
    pairs = defaultdict(list)
    for row in large["train"]:
        pairs[row.pair].append(row)
    assert all(len({row.q for row in rows}) == len(rows) for rows in pairs.values())
    by_q = [{row.q: Counter(row.sentence.lower().split()) for row in rows} for rows in pairs.values()]
    both = [found for found in by_q if grammar.VIOLATION in found]
    assert len(both) > 1_000
    for found in both:
        good, bad = found[grammar.WELL_FORMED], found[grammar.VIOLATION]
        # A moved word leaves the same words behind; three where an attractor's clause changes number too.
        assert (good - bad).total() <= 3 and abs(good.total() - bad.total()) <= 2


@pytest.mark.parametrize("split", sorted(grammar.AVAILABLE))
def test_all_that_is_promised_is_there(split):
    count = grammar.AVAILABLE[split]
    for seed in (0, 1):
        rows = grammar.examples(split, count, seed)
        assert len({row.sentence for row in rows}) == count
        assert sum(row.label for row in rows) == pytest.approx(0.7 * count, abs=2)


def test_a_sentence_has_one_q_and_one_pair_whatever_the_seed():
    known = {}
    for seed in range(20):
        for split in grammar.AVAILABLE:
            for row in grammar.examples(split, 2_000, seed):
                here = (row.q, row.phenomenon, row.pair, split)
                assert known.setdefault(row.sentence, here) == here


def test_sentences_look_like_sentences(large):
    for rows in large.values():
        for row in rows:
            assert re.fullmatch(r"[A-Z][a-z]*( [A-Za-z]+)*[.?]", row.sentence), row.sentence
            assert 4 <= len(row.sentence.split()) <= 16


def digest(rows):
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_any_process():
    code = (
        "import hashlib; from sftrl_utils import grammar;"
        "print(hashlib.sha256(repr(grammar.examples('train', 500, 7)).encode()).hexdigest())"
    )
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == digest(grammar.examples("train", 500, 7))
    assert digest(grammar.examples("train", 500, 8)) != digest(grammar.examples("train", 500, 7))


def test_the_corpus_that_results_rest_on_has_not_changed():
    assert digest(grammar.examples("train", 500)).startswith("15533321ca")


@pytest.mark.parametrize("phenomenon", grammar.PHENOMENA)
def test_reasons_are_short_and_differ(phenomenon):
    bad, good = (grammar.reason(phenomenon, label) for label in (0, 1))
    assert bad != good and max(len(text.split()) for text in (bad, good)) <= 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", 10), "split='test' does not exist: choose one of pretrain"),
        (("train", 0), "count=0"),
        (("dev", 10**6), f"count=1000000: split='dev' needs a count from 1 to {grammar.AVAILABLE['dev']}"),
    ],
)
def test_what_cannot_be_made_is_one_line(arguments, message):
    with pytest.raises(InputError) as caught:
        grammar.examples(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tsv_round_trip(tmp_path):
    rows = grammar.examples("dev", 300)
    grammar.write_tsv(rows, tmp_path / "dev.tsv")
    assert grammar.read_tsv(tmp_path / "dev.tsv") == rows
    source, label, mark, sentence, *_ = (tmp_path / "dev.tsv").read_text().splitlines()[0].split("\t")
    assert (source, sentence, mark == "*") == ("gr26", rows[0].sentence, label == "0")


GOOD_LINE = "gr26\t1\t\tDogs bark.\t0.97\tagreement\tagreement: Dogs"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD_LINE.replace("\tagreement: Dogs", ""), "line 2: 6 columns"),
        (GOOD_LINE.replace("\t1\t", "\t2\t"), "label='2'"),
        (GOOD_LINE.replace("0.97", "1.0"), "q='1.0'"),
        (GOOD_LINE.replace("0.97", "high"), "q='high'"),
        (GOOD_LINE.replace("\tagreement\t", "\tpoetry\t"), "phenomenon='poetry'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "x.tsv").write_text(f"{GOOD_LINE}\n{line}\n")
    with pytest.raises(InputError) as caught:
        grammar.read_tsv(tmp_path / "x.tsv")
    assert message in str(caught.value) and "x.tsv" in str(caught.value)


def test_the_data_card_shows_sentences_of_the_corpus(large):
    card = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    known = {row.sentence: row for rows in large.values() for row in rows}
    rows = re.findall(r"^\| ([a-z ]+) \| ([A-Z].*?) \| ([\d.]+) \|$", card, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == set(grammar.PHENOMENA)
    for name, sentence, q in rows:
        assert known[sentence].phenomenon == name and known[sentence].q == float(q)
