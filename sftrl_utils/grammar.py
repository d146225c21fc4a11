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
from itertools import accumulate, pairwise
from math import floor
from pathlib import Path
from random import Random
from typing import NamedTuple

from sftrl_utils.config import InputError
from sftrl_utils.lexicon import (
    ADJECTIVES,
    ADVERBS,
    ARRIVING,
    DELIBERATE,
    GIVE,
    HANDLE,
    IRREGULAR,
    LATINATE,
    MEN,
    NEAR,
    NOISY,
    PARTICLE,
    PEOPLE,
    PLACES,
    REFLEXIVE,
    ROLES,
    SILENT,
    SOCIAL,
    THINGS,
    WOMEN,
)

WELL_FORMED, VIOLATION = 0.97, 0.03
ACCEPTABLE_SHARE = 0.70  # CoLA's: 6,023 of its 8,551 training sentences
MARGINAL_SHARE = 0.30  # enough that a policy that imitates q and one that answers its mode clearly differ
# How many distinct sentences a call can ask for: every one uses up a minimal set.
AVAILABLE = {"pretrain": 120_000, "train": 50_000, "dev": 20_000, "heldout": 20_000}
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
    """One filling of a phenomenon's constructions.

    `key`: words whose lemmas stand in all three sentences, so that a sentence belongs to one key only.
    """

    key: tuple[str, ...]
    good: str
    bad: str
    marginal: str
    q: float


class _Pick:
    """Uniform choices of words from one seeded stream, by `Random.random`, which no version changes."""

    def __init__(self, seed: int, phenomenon: str):
        self._uniform = Random(f"{seed} {phenomenon}").random

    def __call__(self, options):
        return options[int(self._uniform() * len(options))]

    def some(self, options, count: int) -> list:
        """`count` different ones."""
        chosen: list = []
        while len(chosen) < count:
            option = self(options)
            if option not in chosen:
                chosen.append(option)
        return chosen


def _agreement(pick: _Pick) -> _Set:
    subject, other, object_ = pick.some(PEOPLE, 3)
    verb, adjective, end = pick(SOCIAL), pick(ADJECTIVES), f"the {object_.sg}."
    if pick((True, False)):
        form, right, wrong = subject.sg, verb.s, verb.base
        marginal, q = pick((
            (f"Either the {form} or the {other.pl} {verb.s} {end}", 0.35),
            (f"Neither the {form} nor the {other.sg} {verb.base} {end}", 0.75),
        ))  # fmt: skip
    else:
        form, right, wrong = subject.pl, verb.base, verb.s
        marginal, q = pick((
            (f"Either the {form} or the {other.sg} {verb.base} {end}", 0.60),
            (f"Every one of the {form} {verb.base} {end}", 0.45),
        ))  # fmt: skip
    good, bad = (f"The {adjective} {form} {verb_form} {end}" for verb_form in (right, wrong))
    return _Set((subject.sg, verb.base, object_.sg), good, bad, marginal, q)


def _attraction(pick: _Pick) -> _Set:
    subject, near, object_ = pick.some(PEOPLE, 3)
    liking, verb = pick.some(SOCIAL, 2)
    end = f"the {object_.sg}."
    if pick((True, False)):
        where = pick(NEAR)
        same, opposite = f"{where} the {near.sg}", f"{where} the {near.pl}"
        q_singular, q_plural = 0.40, 0.25
    else:
        where = f"that {liking.base}"
        same, opposite = f"that the {near.sg} {liking.s}", f"that the {near.pl} {liking.base}"
        q_singular, q_plural = 0.35, 0.20
    if pick((True, False)):
        form, right, wrong, q = subject.sg, verb.s, verb.base, q_singular
    else:
        form, right, wrong, q = subject.pl, verb.base, verb.s, q_plural
        same, opposite = opposite, same
    good = f"The {form} {pick((same, opposite))} {right} {end}"
    bad = f"The {form} {same} {wrong} {end}"
    marginal = f"The {form} {opposite} {wrong} {end}"
    return _Set((subject.sg, where, near.sg, verb.base, object_.sg), good, bad, marginal, q)


def _reflexives(pick: _Pick) -> _Set:
    verb, place, adjective = pick(REFLEXIVE).past, pick(PLACES), pick(ADJECTIVES)
    end = f"in the {place}."
    if pick((True, False)):
        man, woman = pick(MEN), pick(WOMEN)
        subject, opposite = pick(((man, woman), (woman, man)))
        start = f"The {adjective} {subject.sg}"
        good = f"{start} {verb} {subject.reflexive} {end}"
        bad = f"{start} {verb} {opposite.reflexive} {end}"
        marginal = f"{start} said that the {opposite.sg} {verb} everyone but {subject.reflexive} {end}"
        q = 0.55
    else:
        subject = pick(ROLES)
        good = f"The {adjective} {subject.pl} {verb} themselves {end}"
        bad = f"The {adjective} {subject.pl} {verb} {pick(('himself', 'herself'))} {end}"
        marginal = f"The {adjective} {subject.sg} {verb} themselves {end}"
        q = 0.40
    return _Set((adjective, subject.sg, verb, place), good, bad, marginal, q)


def _polarity(pick: _Pick) -> _Set:
    subject, object_ = pick.some(PEOPLE, 2)
    verb = pick(SOCIAL).participle
    rest = pick((f"ever {verb} the {object_.sg}.", f"{verb} any {object_.pl}."))
    licensed, bare = pick((
        (f"No {subject.sg} has", f"The {subject.sg} has"),
        (f"Not many {subject.pl} have", f"Many {subject.pl} have"),
        (f"Few {subject.pl} have", f"Almost all {subject.pl} have"),
    ))  # fmt: skip
    weak, q = pick((
        (f"At most three {subject.pl} have", 0.80),
        (f"Exactly three {subject.pl} have", 0.50),
        (f"The {subject.sg} that nobody likes has", 0.25),
    ))  # fmt: skip
    good, bad, marginal = (f"{start} {rest}" for start in (licensed, bare, weak))
    return _Set((subject.sg, verb, object_.sg), good, bad, marginal, q)


def _transitivity(pick: _Pick) -> _Set:
    subject, object_ = pick.some(PEOPLE, 2)
    verb, end = pick(ARRIVING + NOISY + SILENT), f"in the {pick(PLACES)}."
    good = f"The {subject.pl} {verb} {end}"
    bad = f"The {subject.pl} {verb} the {object_.sg} {end}"
    presented = f"There {verb} two {subject.pl} {end}"
    if verb in NOISY:
        marginal, q = pick(((f"The {subject.pl} {verb} themselves tired {end}", 0.65), (presented, 0.30)))
    else:
        marginal, q = presented, 0.80 if verb in ARRIVING else 0.30
    return _Set((subject.sg, verb, end), good, bad, marginal, q)


def _datives(pick: _Pick) -> _Set:
    giver, taker, other = (noun.sg for noun in pick.some(PEOPLE, 3))
    thing, verb = pick(THINGS), pick(GIVE)
    good = pick((f"The {giver} {verb} the {taker} a {thing}.", f"The {giver} {verb} a {thing} to the {taker}."))
    bad = f"The {giver} {verb} a {thing} the {taker}."
    marginal, q = pick((
        (f"The {giver} {pick(LATINATE)} the {taker} a {thing}.", 0.40),
        (f"The {giver} {verb} to the {taker} a {thing}.", 0.50),
        (f"The {giver} {verb} to the {taker} a {thing} that the {other} wanted.", 0.80),
    ))  # fmt: skip
    return _Set((giver, taker, thing), good, bad, marginal, q)


def _determiners(pick: _Pick) -> _Set:
    subject, object_ = pick.some(PEOPLE, 2)
    verb = pick(SOCIAL).past
    rest = f"{verb} the {object_.sg} yesterday."
    good, bad = pick((
        (f"These {subject.pl} {rest}", f"This {subject.pl} {rest}"),
        (f"Many {subject.pl} {rest}", f"Much {subject.pl} {rest}"),
        (f"Each {subject.sg} {rest}", f"Each {subject.pl} {rest}"),
        (f"That {subject.sg} {rest}", f"Those {subject.sg} {rest}"),
    ))  # fmt: skip
    marginal, q = pick(((f"Less {subject.pl} {rest}", 0.45), (f"These kind of {subject.pl} {rest}", 0.60)))
    return _Set((subject.sg, verb, object_.sg), good, bad, marginal, q)


def _verb_forms(pick: _Pick) -> _Set:
    subject, adjective, verb, thing = pick(PEOPLE).sg, pick(ADJECTIVES), pick(IRREGULAR), pick(THINGS)
    start, end = f"The {adjective} {subject}", f"the {thing}."
    good, bad = pick((
        (f"{start} has {verb.participle} {end}", f"{start} has {verb.base} {end}"),
        (f"{start} might {verb.base} {end}", f"{start} might {verb.participle} {end}"),
        (f"{start} did not {verb.base} {end}", f"{start} did not {verb.s} {end}"),
    ))  # fmt: skip
    marginal, q = pick((
        (f"{start} has {verb.past} {end}", 0.40),
        (f"{start} might could {verb.base} {end}", 0.30),
        (f"{start} dared {verb.base} {end}", 0.70),
    ))  # fmt: skip
    return _Set((adjective, subject, verb.base, thing), good, bad, marginal, q)


def _adverbs(pick: _Pick) -> _Set:
    subject, judge = (noun.sg for noun in pick.some(PEOPLE, 2))
    adverb, verb, thing = pick(ADVERBS), pick(DELIBERATE).past, pick(THINGS)
    good, bad = pick((
        (f"The {subject} {adverb} {verb} the {thing}.", f"The {adverb} {subject} {verb} the {thing}."),
        (f"The {subject} {verb} the {thing} {adverb}.", f"The {subject} {verb} the {adverb} {thing}."),
    ))  # fmt: skip
    marginal, q = pick((
        (f"The {subject} {verb} {adverb} the {thing}.", 0.35),
        (f"The {subject} {verb} {adverb} the {thing} that the {judge} wanted.", 0.75),
        (f"{adverb.capitalize()} the {subject} {verb} the {thing}.", 0.85),
    ))  # fmt: skip
    return _Set((subject, adverb, verb, thing), good, bad, marginal, q)


def _particles(pick: _Pick) -> _Set:
    subject, other = (noun.sg for noun in pick.some(PEOPLE, 2))
    (verb, particle), thing, adjective = pick(PARTICLE), pick(THINGS), pick(ADJECTIVES)
    start = f"The {adjective} {subject} {verb}"
    good = pick((f"{start} the {thing} {particle}.", f"{start} {particle} the {thing}."))
    bad = f"{start} the {particle} {thing}."
    marginal, q = pick((
        (f"{start} the {thing} that the {other} wanted {particle}.", 0.50),
        (f"{start} the {thing} from the {pick(PLACES)} {particle}.", 0.70),
        (f"{start} right {particle} the {thing}.", 0.35),
    ))  # fmt: skip
    return _Set((adjective, subject, verb, particle, thing), good, bad, marginal, q)


def _islands(pick: _Pick) -> _Set:
    asker, speaker, subject = (noun.sg for noun in pick.some(PEOPLE, 3))
    verb, thing = pick(HANDLE).past, pick(THINGS)
    start = f"The {asker} asked which {thing} the {speaker}"
    end = f"the {subject} {verb}"
    good, bad = f"{start} said that {end}.", f"{start} laughed because {end}."
    marginal, q = pick((
        (f"{start} wondered whether {end}.", 0.60),
        (f"{start} heard the rumour that {end}.", 0.30),
        (f"{start} wondered whether {end} it.", 0.20),
        (f"The {asker} asked which {subject} the {speaker} said that {verb} the {thing}.", 0.40),
    ))  # fmt: skip
    return _Set((asker, speaker, subject, verb, thing), good, bad, marginal, q)


def _pronoun_case(pick: _Pick) -> _Set:
    subject, other = (noun.sg for noun in pick.some(PEOPLE, 2))
    verb, end = pick(SOCIAL).past, f"in the {pick(PLACES)}."
    good, bad = pick((
        (f"The {subject} {verb} him {end}", f"The {subject} {verb} he {end}"),
        (f"She {verb} the {subject} {end}", f"Her {verb} the {subject} {end}"),
    ))  # fmt: skip
    marginal, q = pick((
        (f"Her and the {subject} {verb} him {end}", 0.40),
        (f"The {subject} {verb} the {other} and I {end}", 0.60),
        (f"It was him that {verb} the {subject} {end}", 0.85),
    ))  # fmt: skip
    return _Set((subject, verb, end), good, bad, marginal, q)


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
    of its words, whatever the seed, so no sentence is ever in two splits; held-out phenomena are in
    `heldout` only. The numbers of well-formed sentences and violations are set so that the mean of q is
    0.70; labels are then drawn by systematic sampling in random order: each is 1 with probability exactly
    q, and their sum is fixed within one. Raises `InputError` for an unknown split, a count below 1 or one
    above `AVAILABLE`.
    """
    if split not in AVAILABLE:
        raise InputError(f"split={split!r} does not exist: choose one of {', '.join(AVAILABLE)}")
    if not 1 <= count <= AVAILABLE[split]:
        raise InputError(f"count={count}: split={split!r} needs a count from 1 to {AVAILABLE[split]}")
    uniform = Random(f"{seed} {split}").random
    rows = _shuffled(_composed(_sets(split, seed), count, uniform), uniform)
    labels = _systematic([q for _, _, _, q in rows], uniform)
    return [
        Example(sentence, label, q, name, f"{name}: {' '.join(key).rstrip('.')}")
        for (name, key, sentence, q), label in zip(rows, labels, strict=True)
    ]


_Row = tuple[str, tuple[str, ...], str, float]  # phenomenon, key, sentence, q


def _composed(sets: Iterator[tuple[str, _Set]], count: int, uniform: Callable[[], float]) -> list[_Row]:
    """`count` rows whose mean q is `ACCEPTABLE_SHARE`, as nearly as whole sentences allow.

    The first sets give marginal sentences as well as well-formed ones; every violation has its
    well-formed partner among the rows.
    """
    marginals = round(MARGINAL_SHARE * count)
    chosen = [next(sets) for _ in range(marginals)]
    rows = [(name, filled.key, filled.marginal, filled.q) for name, filled in chosen]
    clear = count - marginals
    missing = ACCEPTABLE_SHARE * count - sum(filled.q for _, filled in chosen) - VIOLATION * clear
    good = round(missing / (WELL_FORMED - VIOLATION))
    chosen += [next(sets) for _ in range(good - marginals)]
    rows += [(name, filled.key, filled.good, WELL_FORMED) for name, filled in chosen[:good]]
    paired = _shuffled(chosen[:good], uniform)[: clear - good]
    return rows + [(name, filled.key, filled.bad, VIOLATION) for name, filled in paired]


def _sets(split: str, seed: int) -> Iterator[tuple[str, _Set]]:
    """Fillings that belong to `split`, phenomena in turn, no key twice."""
    names = [name for name in PHENOMENA if (name in HELD_OUT) == (split == "heldout")]
    picks = {name: _Pick(seed, f"{split} {name}") for name in names}
    seen: set[tuple[str, ...]] = set()
    while True:
        for name in names:
            while True:
                filled = _BUILDERS[name](picks[name])
                key = (name, *filled.key)
                if key not in seen and _belongs(key, split):
                    break
            seen.add(key)
            yield name, filled


def _belongs(key: tuple[str, ...], split: str) -> bool:
    if split == "heldout":
        return True
    return int(hashlib.sha256(" ".join(key).encode()).hexdigest()[:12], 16) % 100 in _PERCENT[split]


def _shuffled(rows: list, uniform: Callable[[], float]) -> list:
    return sorted(rows, key=lambda _: uniform())


def _systematic(q: list[float], uniform: Callable[[], float]) -> list[int]:
    """0/1 draws with P(draw i = 1) = q_i exactly and a sum within one of Σ q."""
    passed = accumulate(q, initial=uniform())
    return [floor(after) - floor(before) for before, after in pairwise(passed)]


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
