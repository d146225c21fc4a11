"""A generator of English sentences whose probability q of being judged acceptable is known.

Each phenomenon is one function that fills its constructions with words and returns a well-formed
sentence, a violation of it (its minimal pair) and a marginal relative. q belongs to the construction,
never to the words, so that it can be learned.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sftrl_utils.config import InputError
from sftrl_utils.lexicon import (
    ADJECTIVES,
    ADVERBS,
    GIVE,
    HANDLE,
    INTRANSITIVE,
    IRREGULAR,
    LATINATE,
    MEN,
    NEAR,
    PARTICLE,
    PEOPLE,
    PLACES,
    REFLEXIVE,
    SOCIAL,
    THINGS,
    WOMEN,
)

WELL_FORMED, VIOLATION = 0.97, 0.03
ACCEPTABLE_SHARE = 0.70  # CoLA's: 6,023 of its 8,551 training sentences
MARGINAL_SHARE = 0.35  # enough that a policy that imitates q and one that answers its mode clearly differ
SPLITS = ("pretrain", "train", "dev", "heldout")
_PERCENT = {"pretrain": range(0, 60), "train": range(60, 88), "dev": range(88, 100)}
_SOURCE = "gr26"  # CoLA's first column: where a sentence comes from


@dataclass(frozen=True, slots=True)
class Example:
    """One judged sentence: `label` (1 acceptable) was drawn from `q`; `pair` names its minimal set."""

    sentence: str
    label: int
    q: float
    phenomenon: str
    pair: str


class _Set(NamedTuple):
    """One filling of a phenomenon's constructions. `key`: words that occur in all three sentences."""

    key: tuple[str, ...]
    good: str
    bad: str
    marginal: str
    q: float


class _Pick:
    """Uniform choices of words from one seeded stream."""

    def __init__(self, seed: int, phenomenon: str):
        self._rng = np.random.Generator(np.random.PCG64([seed, int(_digest(phenomenon), 16) % 2**31]))

    def __call__(self, options):
        return options[int(self._rng.integers(len(options)))]

    def two(self, options):
        first, second = self._rng.choice(len(options), size=2, replace=False)
        return options[int(first)], options[int(second)]


def _agreement(pick: _Pick) -> _Set:
    subject, other = pick.two(PEOPLE)
    verb, object_ = pick(SOCIAL), pick(PEOPLE).sg
    adjective = pick(ADJECTIVES)
    if pick((True, False)):
        form, right, wrong = subject.sg, verb.s, verb.base
        marginal, q = f"Either the {form} or the {other.pl} {right} the {object_}.", 0.35
    else:
        form, right, wrong = subject.pl, verb.base, verb.s
        marginal, q = f"Either the {form} or the {other.sg} {right} the {object_}.", 0.60
    good, bad = (f"The {adjective} {form} {verb_form} the {object_}." for verb_form in (right, wrong))
    return _Set((form, verb.base, object_), good, bad, marginal, q)


def _attraction(pick: _Pick) -> _Set:
    subject, near = pick.two(PEOPLE)
    verb, object_, where = pick(SOCIAL), pick(PEOPLE).sg, pick(NEAR)
    if pick((True, False)):
        form, same, opposite, right, wrong, q = subject.sg, near.sg, near.pl, verb.s, verb.base, 0.40
    else:
        form, same, opposite, right, wrong, q = subject.pl, near.pl, near.sg, verb.base, verb.s, 0.25
    good = f"The {form} {where} the {same} {right} the {object_}."
    bad = f"The {form} {where} the {same} {wrong} the {object_}."
    marginal = f"The {form} {where} the {opposite} {wrong} the {object_}."
    return _Set((form, near.sg, where, verb.base, object_), good, bad, marginal, q)


def _reflexives(pick: _Pick) -> _Set:
    subject, opposite = pick(MEN), pick(WOMEN)
    if pick((True, False)):
        subject, opposite = opposite, subject
    verb, place, adjective = pick(REFLEXIVE).past, pick(PLACES), pick(ADJECTIVES)
    start, end, right = f"The {adjective} {subject.sg}", f"in the {place}.", subject.reflexive
    good, bad = (f"{start} {verb} {reflexive} {end}" for reflexive in (right, opposite.reflexive))
    marginal, q = pick((
        (f"{start} said that the {opposite.sg} {verb} everyone but {right} {end}", 0.55),
        (f"{start} said that the {opposite.pl} {verb} {right} {end}", 0.20),
    ))  # fmt: skip
    return _Set((adjective, subject.sg, verb, place), good, bad, marginal, q)


def _polarity(pick: _Pick) -> _Set:
    subject, verb, object_ = pick(PEOPLE), pick(SOCIAL).participle, pick(PEOPLE).sg
    rest = f"ever {verb} the {object_}."
    good = pick(
        (f"No {subject.sg} has {rest}", f"Hardly any {subject.pl} have {rest}", f"Few {subject.pl} have {rest}")
    )
    bad = pick((f"The {subject.sg} has {rest}", f"Some {subject.pl} have {rest}", f"Every {subject.sg} has {rest}"))
    marginal, q = pick((
        (f"Exactly two {subject.pl} have {rest}", 0.45),
        (f"The {subject.sg} that nobody likes has {rest}", 0.25),
    ))  # fmt: skip
    return _Set((subject.sg, verb, object_), good, bad, marginal, q)


def _transitivity(pick: _Pick) -> _Set:
    subject, object_ = pick.two(PEOPLE)
    verb, place = pick(INTRANSITIVE).past, pick(PLACES)
    good = f"The {subject.pl} {verb} in the {place}."
    bad = f"The {subject.pl} {verb} the {object_.sg} in the {place}."
    marginal, q = pick((
        (f"The {subject.pl} {verb} themselves tired in the {place}.", 0.55),
        (f"There {verb} two {subject.pl} in the {place}.", 0.40),
    ))  # fmt: skip
    return _Set((subject.sg, verb, place), good, bad, marginal, q)


def _datives(pick: _Pick) -> _Set:
    giver, taker = (noun.sg for noun in pick.two(PEOPLE))
    thing, verb = pick(THINGS), pick(GIVE)
    good = pick((f"The {giver} {verb} the {taker} a {thing}.", f"The {giver} {verb} a {thing} to the {taker}."))
    bad = f"The {giver} {verb} a {thing} the {taker}."
    latinate = pick(LATINATE)
    marginal, q = pick((
        (f"The {giver} {latinate} the {taker} a {thing}.", 0.40),
        (f"The {giver} {verb} to the {taker} a {thing}.", 0.60),
    ))  # fmt: skip
    return _Set((giver, taker, thing), good, bad, marginal, q)


def _determiners(pick: _Pick) -> _Set:
    subject, verb, object_ = pick(PEOPLE), pick(SOCIAL).past, pick(PEOPLE).sg
    rest = f"{verb} the {object_} yesterday."
    good, bad = pick((
        (f"These {subject.pl} {rest}", f"This {subject.pl} {rest}"),
        (f"Many {subject.pl} {rest}", f"Much {subject.pl} {rest}"),
        (f"Each {subject.sg} {rest}", f"Each {subject.pl} {rest}"),
        (f"That {subject.sg} {rest}", f"Those {subject.sg} {rest}"),
    ))  # fmt: skip
    marginal, q = pick(((f"Less {subject.pl} {rest}", 0.45), (f"These kind of {subject.pl} {rest}", 0.55)))
    return _Set((subject.sg, verb, object_), good, bad, marginal, q)


def _verb_forms(pick: _Pick) -> _Set:
    subject, adjective, verb, thing = pick(PEOPLE).sg, pick(ADJECTIVES), pick(IRREGULAR), pick(THINGS)
    start, end = f"The {adjective} {subject}", f"the {thing}."
    good, bad = pick((
        (f"{start} has {verb.participle} {end}", f"{start} has {verb.base} {end}"),
        (f"{start} might {verb.base} {end}", f"{start} might {verb.participle} {end}"),
        (f"{start} did not {verb.base} {end}", f"{start} did not {verb.s} {end}"),
    ))  # fmt: skip
    marginal, q = pick((
        (f"{start} has {verb.past} {end}", 0.35),
        (f"{start} might could {verb.base} {end}", 0.25),
        (f"{start} used to could {verb.base} {end}", 0.20),
    ))  # fmt: skip
    return _Set((adjective, subject, verb.base, thing), good, bad, marginal, q)


def _adverbs(pick: _Pick) -> _Set:
    subject, judge = (noun.sg for noun in pick.two(PEOPLE))
    adverb, verb, thing = pick(ADVERBS), pick(HANDLE).past, pick(THINGS)
    good = pick((f"The {subject} {adverb} {verb} the {thing}.", f"The {subject} {verb} the {thing} {adverb}."))
    bad = pick((f"The {adverb} {subject} {verb} the {thing}.", f"The {subject} {verb} the {adverb} {thing}."))
    marginal, q = pick((
        (f"The {subject} {verb} {adverb} the {thing}.", 0.40),
        (f"The {subject} {verb} {adverb} the {thing} that the {judge} wanted.", 0.70),
    ))  # fmt: skip
    return _Set((subject, adverb, verb, thing), good, bad, marginal, q)


def _particles(pick: _Pick) -> _Set:
    subject, other = (noun.sg for noun in pick.two(PEOPLE))
    (verb, particle), thing = pick(PARTICLE), pick(THINGS)
    good = pick((f"The {subject} {verb} the {thing} {particle}.", f"The {subject} {verb} {particle} the {thing}."))
    bad = f"The {subject} {verb} the {particle} {thing}."
    marginal, q = pick((
        (f"The {subject} {verb} the {thing} that the {other} wanted {particle}.", 0.60),
        (f"The {subject} {verb} right {particle} the {thing}.", 0.35),
    ))  # fmt: skip
    return _Set((subject, verb, particle, thing), good, bad, marginal, q)


def _islands(pick: _Pick) -> _Set:
    subject, speaker = (noun.sg for noun in pick.two(PEOPLE))
    verb, thing = pick(HANDLE).past, pick(THINGS)
    start, end = f"Which {thing} did the {speaker}", f"the {subject} {verb}?"
    good, bad = f"{start} say that {end}", f"{start} laugh because {end}"
    marginal, q = pick(((f"{start} wonder whether {end}", 0.60), (f"{start} hear the rumour that {end}", 0.30)))
    return _Set((thing, speaker, subject, verb), good, bad, marginal, q)


def _pronoun_case(pick: _Pick) -> _Set:
    subject, other = (noun.sg for noun in pick.two(PEOPLE))
    verb, place = pick(SOCIAL).past, pick(PLACES)
    end = f"in the {place}."
    good, bad = pick((
        (f"The {subject} {verb} him {end}", f"The {subject} {verb} he {end}"),
        (f"She {verb} the {subject} {end}", f"Her {verb} the {subject} {end}"),
    ))  # fmt: skip
    marginal, q = pick((
        (f"Her and the {subject} {verb} him {end}", 0.40),
        (f"The {subject} {verb} the {other} and I {end}", 0.60),
    ))  # fmt: skip
    return _Set((subject, verb, place), good, bad, marginal, q)


_BUILDERS: dict[str, Callable[[_Pick], _Set]] = {
    "agreement": _agreement,
    "attraction": _attraction,
    "reflexives": _reflexives,
    "polarity": _polarity,
    "transitivity": _transitivity,
    "datives": _datives,
    "determiners": _determiners,
    "verb forms": _verb_forms,
    "adverbs": _adverbs,
    "particles": _particles,
    "islands": _islands,
    "pronoun case": _pronoun_case,
}
PHENOMENA = tuple(_BUILDERS)
HELD_OUT = ("islands", "pronoun case")  # in no split but `heldout`

_REASONS = {  # phenomenon: reason for label 0, reason for label 1
    "agreement": ("the verb does not agree with its subject", "the verb agrees with its subject"),
    "attraction": ("the verb agrees with the wrong noun", "the verb agrees with the right noun"),
    "reflexives": ("the reflexive has no proper antecedent", "the reflexive has a proper antecedent"),
    "polarity": ("nothing licenses the polarity item", "the polarity item is licensed"),
    "transitivity": ("the verb does not take these arguments", "the verb takes these arguments"),
    "datives": ("the verb does not allow this dative", "the verb allows this dative"),
    "determiners": ("the determiner does not fit its noun", "the determiner fits its noun"),
    "verb forms": ("the auxiliary needs another verb form", "the auxiliary has the right verb form"),
    "adverbs": ("the adverb is in the wrong place", "the adverb is in a proper place"),
    "particles": ("the particle is in the wrong place", "the particle is in a proper place"),
    "islands": ("the question crosses an island", "the question crosses no island"),
    "pronoun case": ("the pronoun has the wrong case", "the pronoun has the right case"),
}


def reason(phenomenon: str, label: int) -> str:
    """A short reason for judging a sentence of `phenomenon` acceptable (1) or not (0)."""
    return _REASONS[phenomenon][label]


def examples(split: str, count: int, seed: int = 0) -> list[Example]:
    """`count` distinct judged sentences of `split` (`pretrain`, `train`, `dev` or `heldout`), shuffled.

    The same arguments give the same list on every platform. A minimal set belongs to one split by a hash
    of its words, whatever the seed, so no sentence is ever in two splits. The numbers of well-formed
    sentences and violations are set so that the mean of q is 0.70; labels are then drawn by systematic
    sampling in random order: each is 1 with probability exactly q, and their sum is fixed within one.
    Raises `InputError` for an unknown split, a count below 1 or one that the grammar cannot fill.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r} does not exist: choose one of {', '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"count={count}: at least 1 sentence is needed")
    rng = np.random.Generator(np.random.PCG64([seed, SPLITS.index(split)]))
    marginals = round(MARGINAL_SHARE * count)
    sets = _sets(split, seed, count)
    chosen = [next(sets) for _ in range(max(marginals, 1))]
    marginal_q = sum(filled.q for _, filled in chosen[:marginals])
    clear = count - marginals
    good = round((ACCEPTABLE_SHARE * count - marginal_q - VIOLATION * clear) / (WELL_FORMED - VIOLATION))
    chosen += [next(sets) for _ in range(good - len(chosen))]
    rows = [(name, filled, filled.marginal, filled.q) for name, filled in chosen[:marginals]]
    rows += [(name, filled, filled.good, WELL_FORMED) for name, filled in chosen[:good]]
    paired = rng.permutation(good)[: clear - good]
    rows += [(*chosen[i], chosen[i][1].bad, VIOLATION) for i in sorted(paired)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    labels = _systematic(np.array([row[3] for row in rows]), rng)
    return [
        Example(sentence, int(label), q, name, f"{name}: {' '.join(filled.key)}")
        for (name, filled, sentence, q), label in zip(rows, labels, strict=True)
    ]


def _sets(split: str, seed: int, count: int) -> Iterator[tuple[str, _Set]]:
    """Fillings that belong to `split`, phenomena in turn, no sentence twice."""
    names = [name for name in PHENOMENA if (name in HELD_OUT) == (split == "heldout")]
    picks = {name: _Pick(seed, f"{split} {name}") for name in names}
    seen: set[str] = set()
    misses = 0
    while True:
        for name in names:
            while misses < 20_000:
                filled = _BUILDERS[name](picks[name])
                sentences = {filled.good, filled.bad, filled.marginal}
                if _belongs(name, filled.key, split) and not sentences & seen:
                    break
                misses += 1
            else:
                raise InputError(f"count={count}: the grammar has too few sentences for split={split!r}, ask for fewer")
            misses = 0
            seen |= sentences
            yield name, filled


def _belongs(name: str, key: tuple[str, ...], split: str) -> bool:
    return split == "heldout" or int(_digest(" ".join((name, *key))), 16) % 100 in _PERCENT[split]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _systematic(q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0/1 draws with P(draw i = 1) = q_i exactly and a sum within one of Σ q."""
    passed = np.floor(np.concatenate([[0.0], np.cumsum(q)]) + rng.random())
    return np.diff(passed).astype(int)


def write_tsv(rows: list[Example], path: Path) -> None:
    """Write CoLA's four columns (source, label, mark, sentence), then q, phenomenon and pair."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
        for row in rows:
            mark = "" if row.label else "*"
            writer.writerow([_SOURCE, row.label, mark, row.sentence, repr(row.q), row.phenomenon, row.pair])


def read_tsv(path: Path) -> list[Example]:
    """Read what `write_tsv` wrote. Raises `InputError` naming the file, the line and what is wrong."""
    rows = []
    with path.open(encoding="utf-8", newline="") as stream:
        for number, cells in enumerate(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            where = f"{path}, line {number}"
            if len(cells) != 7:
                raise InputError(f"{where}: {len(cells)} columns, but the graded corpus has 7, separated by tabs")
            _, label, _, sentence, q, phenomenon, pair = cells
            if label not in {"0", "1"}:
                raise InputError(f"{where}: label={label!r}, but it must be 0 or 1")
            if not _is_probability(q):
                raise InputError(f"{where}: q={q!r}, but it must be a number strictly between 0 and 1")
            if phenomenon not in PHENOMENA:
                raise InputError(f"{where}: phenomenon={phenomenon!r}, but it must be one of {', '.join(PHENOMENA)}")
            rows.append(Example(sentence, int(label), float(q), phenomenon, pair))
    return rows


def _is_probability(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
