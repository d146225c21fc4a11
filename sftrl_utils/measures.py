"""Measures: each a number a seed, from published runs that are first held against their checksums."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sftrl_utils import analysis
from sftrl_utils.config import PRESETS, RunConfig
from sftrl_utils.records import PIPELINES, PUBLISHED, damaged_file, read_metrics, read_record, second_stage

SPLITS = ("_train", "_dev", "_heldout")
CORE = ("metrics.parquet", "report.parquet", "record.json")  # what every version of the code has published


class Runs(BaseModel):
    """Published runs: a store below the results, a pipeline, and settings of its last stage; seeds 0 to `seeds` − 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str = "."
    pipeline: str
    preset: str = "tiny"
    beta: float = 0.0
    settings: dict[str, Any] = {}
    seeds: Annotated[int, Field(ge=2)]

    @model_validator(mode="after")
    def _known(self) -> Runs:
        given = {"pipeline": {self.pipeline}, "preset": {self.preset}, "settings": set(self.settings)}
        there = {
            "pipeline": set(PIPELINES.values()),
            "preset": set(PRESETS),
            "settings": set(RunConfig.model_fields) - {"preset", "seed", "beta"},
        }
        for name, values in given.items():
            if unknown := values - there[name]:
                raise ValueError(
                    f"{name}={min(unknown)!r} does not exist: choose from {', '.join(sorted(there[name]))}"
                )
        return self

    def method(self) -> dict[str, Any]:
        """What `analysis.plane` takes for these runs."""
        plain = self.model_dump(include={"store", "pipeline", "preset", "beta"})
        return {**plain, **self.settings}


@dataclass(frozen=True)
class Question:
    """What a measure is asked: `runs`, below `results`, their `metric`, and the runs that they are compared with."""

    results: Path
    runs: Runs
    metric: str | None = None
    against: Runs | None = None


@dataclass(frozen=True)
class Measure:
    """A function of a `Question` that gives a number a seed; what it needs, and the pipeline that alone it is of."""

    function: Callable[[Question], pd.Series]
    metric: bool = False
    against: bool = False
    pipeline: str | None = None

    @property
    def summary(self) -> str:
        """What it measures, in a few words."""
        first = self.function.__doc__.splitlines()[0].rstrip(".")
        return first[0].lower() + first[1:]


def stages_of(runs: Runs, results: Path, needed: Collection[str] = ()) -> pd.DataFrame:
    """`second_stage` of `runs`, once every seed is there and every file of its stages and those before is whole.

    `LookupError` otherwise. The list of files must hold those `needed`, beside metrics, report and record.
    """
    store = results / runs.store
    table = second_stage(store, runs.pipeline, runs.preset, runs.beta, **runs.settings)
    if absent := set(range(runs.seeds)) - set(table["seed"]):
        raise LookupError(
            f"{store} holds no valid {runs.pipeline} with seed {min(absent)}, {len(absent)} of {runs.seeds} seeds lack"
        )
    table = table[table["seed"] < runs.seeds]
    for stage, rows in table.groupby("stage"):
        for name in chain(store, stage):
            if file := damaged_file(store / name, weights=False, needed={*CORE, *needed}):
                raise LookupError(f"{store / name / file} is missing, or not what was published")
        if len(rows) != len(read_metrics(store / stage)):
            raise LookupError(f"another folder of {store} says that it is {stage}")
    return table


def chain(store: Path, stage: str) -> list[str]:
    """`stage` and all before it, the last one first; `LookupError` if one of them is not in `store`."""
    names = [stage]
    while True:
        if not (store / names[-1] / "record.json").is_file():
            raise LookupError(f"{store / names[-1]} is missing, or not what was published")
        parent = read_record(store / names[-1]).parent
        if parent == "base":
            return names
        names.append(parent)


def versions_of(runs: Runs, results: Path) -> set[tuple[str, str]]:
    """Versions of the code and of the corpus that `runs` were trained with."""
    store = results / runs.store
    keys = [read_record(store / stage).key for stage in stages_of(runs, results)["stage"].unique()]
    return {(key["code"], key.get("corpus", "")) for key in keys}


def _ends(runs: Runs, asked: Question) -> tuple[pd.Series, pd.Series]:
    table = stages_of(runs, asked.results)
    if asked.metric not in table or not asked.metric.endswith(SPLITS):
        raise LookupError(f"metric={asked.metric!r} is none that stages of {runs.pipeline} have")
    seeds = table.groupby("seed")[asked.metric]
    return seeds.first(), seeds.last()


def _change(asked: Question) -> pd.Series:
    """End of the last stage minus its start."""
    start, end = _ends(asked.runs, asked)
    return end - start


def _change_beyond(asked: Question) -> pd.Series:
    """The change over the last stage, minus that of the runs it is compared with."""
    start, end = _ends(asked.against, asked)
    return _change(asked) - (end - start)


def _end(asked: Question) -> pd.Series:
    """The end of the last stage."""
    return _ends(asked.runs, asked)[1]


def _end_beyond(asked: Question) -> pd.Series:
    """The end of the last stage, minus the end of the runs it is compared with."""
    return _end(asked) - _ends(asked.against, asked)[1]


def _above_base(asked: Question) -> pd.Series:
    """The end of the last stage, minus what the untouched base model has."""
    return _end(asked) - _starts(asked, lambda names, kinds: names[-1])


def _above_first_start(asked: Question) -> pd.Series:
    """The end of the last stage, minus what the model has that the first stage starts from."""
    return _end(asked) - _starts(asked, lambda names, kinds: names[len(kinds) - 1])


def _starts(asked: Question, which: Callable[[list[str], tuple[str, ...]], str]) -> pd.Series:
    """The metric at the start of a stage of each seed's chain: `which` of its names, the last one first."""
    store, stages = _store(asked), _last_stages(asked)
    chosen = [which(chain(store, stage), read_record(store / stage).kinds) for stage in stages]
    return pd.Series([read_metrics(store / name)[asked.metric].iloc[0] for name in chosen], index=stages.index)


def _confidence_beyond_judgement(asked: Question) -> pd.Series:
    """Part of the change of the loss over both answers that one temperature takes back, minus the part that is left."""
    parts = analysis.parts_of_the_loss(*_place(asked), **asked.runs.settings)
    return parts["confidence"] - parts["judgement"]


def _answers_beyond_confidence(asked: Question) -> pd.Series:
    """Part of the change of the mean reward that changed answers make, minus the part that changed confidence makes."""
    parts = analysis.parts_of_the_reward(*_place(asked, PUBLISHED), **asked.runs.settings)
    return parts["answers"] - parts["confidence"]


def _fixed_point_miss(asked: Question) -> pd.Series:
    """Distance of the SFT loss after RL from that of GRPO's fixed point, minus a fifth of the change predicted."""
    store, _, preset, beta = _place(asked, PUBLISHED)
    table = analysis.loss_predictions(store, [beta], preset, **asked.runs.settings).set_index("seed")
    predicted = (table["fixed_point"] - table["before"]).abs()
    return (table["measured"] - table["fixed_point"]).abs() - predicted / 5


def _gibbs_share(asked: Question) -> pd.Series:
    """Share of the variance of log(p/s) that a multiple of the reward explains."""
    store, _, preset, beta = _place(asked, PUBLISHED)
    return analysis.loss_predictions(store, [beta], preset, **asked.runs.settings).set_index("seed")["gibbs_share"]


def _threshold_agreement(asked: Question) -> pd.Series:
    """Share of RL lengths at which the loss has risen exactly if the fitted duration is beyond the break-even one."""
    table = analysis.threshold_signs(_all_lengths(asked), asked.runs.preset)
    return (table["predicted"] == table["measured"]).groupby(table["seed"]).mean()


def _stopping_octaves(asked: Question) -> pd.Series:
    """log₂ of the RL step of least SFT loss over the step at which the model's reward reaches the data's.

    A step 0 counts as 1, one that no run reached as the longest run's last.
    """
    table = analysis.stopping_steps(_all_lengths(asked), asked.runs.preset)
    return np.log2(table["measured"].clip(lower=1) / table["predicted"].clip(1, max(analysis.RL_LENGTHS)))


def _gradient_cosine(asked: Question) -> pd.Series:
    """Cosine of −∇L and ∇R at the end of the last stage, in the layer `metric`, over the q of 48 dev sentences."""
    stages = _last_stages(asked)
    folder = asked.results / "gradients"
    if file := damaged_file(folder, needed=["cosines.parquet"]):
        raise LookupError(f"{folder / file} is missing, or not what was published")
    cosines = pd.read_parquet(folder / "cosines.parquet")
    chosen = cosines.query("layer == @asked.metric and labels == 'population'").set_index("stage")["cosine"]
    return chosen.loc[stages].set_axis(stages.index)


def _excess_beyond(asked: Question) -> pd.Series:
    """Distance of the SFT loss above the least at the same reward, minus that of the runs it is compared with."""
    for runs in (asked.runs, asked.against):
        stages_of(runs, asked.results, PUBLISHED)
    ends = analysis.plane(asked.results, {"own": asked.runs.method(), "other": asked.against.method()})
    excess = ends.pivot(index="seed", columns="method", values="excess")
    return excess["own"] - excess["other"]


def _store(asked: Question) -> Path:
    return asked.results / asked.runs.store


def _last_stages(asked: Question) -> pd.Series:
    """Name of the last stage by seed."""
    return stages_of(asked.runs, asked.results).groupby("seed")["stage"].first()


def _place(asked: Question, needed: Collection[str] = ()) -> tuple[Path, str, str, float]:
    """Where the runs are, once all of them are known to be there."""
    stages_of(asked.runs, asked.results, needed)
    return _store(asked), asked.runs.pipeline, asked.runs.preset, asked.runs.beta


def _all_lengths(asked: Question) -> Path:
    """The store of the runs, once those of every length of RL are known to be there."""
    for steps in analysis.RL_LENGTHS:
        settings = {**asked.runs.settings, "rl_steps": steps}
        stages_of(asked.runs.model_copy(update={"settings": settings}), asked.results, PUBLISHED)
    return _store(asked)


MEASURES = {
    "change": Measure(_change, metric=True),
    "change beyond": Measure(_change_beyond, metric=True, against=True),
    "end": Measure(_end, metric=True),
    "end beyond": Measure(_end_beyond, metric=True, against=True),
    "above base": Measure(_above_base, metric=True),
    "above the first start": Measure(_above_first_start, metric=True),
    "confidence beyond judgement": Measure(_confidence_beyond_judgement),
    "answers beyond confidence": Measure(_answers_beyond_confidence),
    "excess beyond": Measure(_excess_beyond, against=True),
    "fixed-point miss": Measure(_fixed_point_miss, pipeline="sft_then_rl"),
    "Gibbs share": Measure(_gibbs_share, pipeline="sft_then_rl"),
    "threshold agreement": Measure(_threshold_agreement, pipeline="sft_then_rl"),
    "stopping octaves": Measure(_stopping_octaves, pipeline="sft_then_rl"),
    "gradient cosine": Measure(_gradient_cosine, metric=True),
}
