"""The ledger: every claim of the book, computed from published runs into a verdict."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import nbformat
import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sftrl_utils import analysis, records
from sftrl_utils.config import InputError, data_dir, one_line
from sftrl_utils.effects import mean_change
from sftrl_utils.records import damaged_file, read_record, second_stage

VERDICTS = ("supported", "refuted", "inconclusive", "missing")


class Runs(BaseModel):
    """Published runs: a store below the results, a pipeline, and settings of its last stage; seeds 0 to `seeds` − 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str = "."
    pipeline: str
    preset: str = "tiny"
    beta: float = 0.0
    settings: dict[str, Any] = {}
    seeds: Annotated[int, Field(ge=2)]


class Claim(BaseModel):
    """One entry of the ledger.

    `statistic` names a function of `STATISTICS`, which gives a number a seed; `metric` is its argument where it takes
    one, `against` the runs that it compares with. The claim is that the mean over seeds is `above` `margin`, `below`
    −`margin`, or `within` ± `margin`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    claim: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    statistic: str
    metric: str | None = None
    runs: Runs
    against: Runs | None = None
    direction: Literal["above", "below", "within"]
    margin: Annotated[float, Field(ge=0)] = 0.0
    unit: str = ""

    @model_validator(mode="after")
    def _known(self) -> Claim:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic={self.statistic!r} does not exist: choose one of {', '.join(STATISTICS)}")
        if self.direction == "within" and not self.margin:
            raise ValueError("direction='within' needs a margin above 0")
        return self


@dataclass(frozen=True)
class Verdict:
    """What the data say of one claim: `verdict` is supported, refuted, inconclusive or missing, with `reason`."""

    id: str
    verdict: str
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    reason: str = ""


def ledger_file() -> Path:
    """`book/claims.yml` of the checkout, or its copy in a wheel."""
    installed = data_dir() / "claims.yml"
    return installed if installed.is_file() else data_dir().parent / "book" / "claims.yml"


def read_ledger(path: Path) -> list[Claim]:
    """The claims in `path` (`book/claims.yml`). Raises `InputError` naming the entry that is wrong."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as a ledger ({type(error).__name__}): run this in the checkout"
        ) from None
    claims = []
    for entry in entries:
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            name = entry.get("id", entry) if isinstance(entry, dict) else entry
            raise InputError(f"{path}, claim {name!r}: {one_line(error)}") from None
    ids = [claim.id for claim in claims]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise InputError(f"{path}: id {min(twice)!r} is there twice")
    return claims


def quotable_figures(path: Path) -> set[str]:
    """Numbers that the prose may hold since the paper reports them: `figures` of the ledger in `path`."""
    return set(yaml.safe_load(path.read_text(encoding="utf-8")).get("figures", []))


def judge(claim: Claim, results: Path) -> Verdict:
    """The verdict of published runs in `results` on `claim`; `missing` if any of them is not there, or is damaged."""
    try:
        values = STATISTICS[claim.statistic](claim, results)
    except (LookupError, OSError, InputError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        return Verdict(claim.id, "missing", reason=str(reason))
    values = values[values.index < claim.runs.seeds]
    if not np.isfinite(values).all():
        return Verdict(claim.id, "missing", reason=f"{claim.statistic} is not finite for every seed")
    effect, low, high = mean_change(values)
    return Verdict(claim.id, decide(low, high, claim.direction, claim.margin), effect, low, high, len(values))


def decide(low: float, high: float, direction: str, margin: float) -> str:
    """`supported` if the whole interval is where the claim says, `refuted` if none of it is, else `inconclusive`."""
    if direction == "below":
        low, high = -high, -low
    if direction == "within":
        inside, outside = -margin < low and high < margin, high < -margin or low > margin
    else:
        inside, outside = low > margin, high <= margin
    return "supported" if inside else "refuted" if outside else "inconclusive"


def _table(runs: Runs, results: Path) -> pd.DataFrame:
    """`second_stage` of `runs`; `LookupError` if a seed is missing or a file is not what was published."""
    store = results / runs.store
    table = second_stage(store, runs.pipeline, runs.preset, runs.beta, **runs.settings)
    if absent := set(range(runs.seeds)) - set(table["seed"]):
        raise LookupError(
            f"{store} holds no valid {runs.pipeline} with seed {min(absent)}, {len(absent)} seeds are missing"
        )
    table = table[table["seed"] < runs.seeds]
    for stage in table["stage"].unique():
        while stage != "base" and (store / stage).is_dir():
            if file := damaged_file(store / stage, weights=False):
                raise LookupError(f"{store / stage / file} is missing, or not what was published")
            stage = read_record(store / stage).parent
    return table


def _ends(runs: Runs, metric: str, results: Path) -> tuple[pd.Series, pd.Series]:
    seeds = _table(runs, results).groupby("seed")[metric]
    return seeds.first(), seeds.last()


def _change(claim: Claim, results: Path) -> pd.Series:
    """End of the last stage minus its start."""
    start, end = _ends(claim.runs, claim.metric, results)
    return end - start


def _change_beyond(claim: Claim, results: Path) -> pd.Series:
    """The change, minus that of the runs it is compared with: a control."""
    start, end = _ends(claim.against, claim.metric, results)
    return _change(claim, results) - (end - start)


def _end_beyond(claim: Claim, results: Path) -> pd.Series:
    """The end, minus the end of the runs it is compared with."""
    return _ends(claim.runs, claim.metric, results)[1] - _ends(claim.against, claim.metric, results)[1]


def _above_base(claim: Claim, results: Path) -> pd.Series:
    """The end of the last stage, minus the base model's own."""
    _, end = _ends(claim.runs, claim.metric, results)
    return end - records.base_metrics(results / claim.runs.store, claim.runs.preset)[claim.metric]


def _end(claim: Claim, results: Path) -> pd.Series:
    """The end of the last stage."""
    return _ends(claim.runs, claim.metric, results)[1]


def _confidence_beyond_judgement(claim: Claim, results: Path) -> pd.Series:
    """Part of the change of the loss over both answers that one temperature takes back, minus the part that is left."""
    parts = analysis.parts_of_the_loss(*_place(claim, results), **claim.runs.settings)
    return parts["confidence"] - parts["judgement"]


def _answers_beyond_confidence(claim: Claim, results: Path) -> pd.Series:
    """Part of the change of the mean reward that changed answers make, minus the part that changed confidence makes."""
    parts = analysis.parts_of_the_reward(*_place(claim, results), **claim.runs.settings)
    return parts["answers"] - parts["confidence"]


def _fixed_point_error(claim: Claim, results: Path) -> pd.Series:
    """SFT loss after RL, measured minus predicted by GRPO's fixed point, as a share of the predicted change."""
    store, _, preset, beta = _place(claim, results)
    table = analysis.loss_predictions(store, [beta], preset).set_index("seed")
    return (table["measured"] - table["fixed_point"]) / (table["fixed_point"] - table["before"]).abs()


def _gibbs_share(claim: Claim, results: Path) -> pd.Series:
    """Share of the variance of log(p/s) that a multiple of the reward explains."""
    store, _, preset, beta = _place(claim, results)
    return analysis.loss_predictions(store, [beta], preset).set_index("seed")["gibbs_share"]


def _threshold_agreement(claim: Claim, results: Path) -> pd.Series:
    """Share of RL lengths at which the sign of the loss's change is the one that the threshold condition gives."""
    table = analysis.threshold_signs(_all_lengths(claim, results), claim.runs.preset)
    return (table["predicted"] == table["measured"]).groupby(table["seed"]).mean()


def _stopping_octaves(claim: Claim, results: Path) -> pd.Series:
    """log₂ of the RL step of least SFT loss over the step at which the model's reward reaches the data's.

    A step 0 counts as 1, one that no run reached as the longest run's last.
    """
    table = analysis.stopping_steps(_all_lengths(claim, results), claim.runs.preset)
    return np.log2(table["measured"].clip(lower=1) / table["predicted"].clip(1, max(analysis.RL_LENGTHS)))


def _gradient_cosine(claim: Claim, results: Path) -> pd.Series:
    """Cosine of −∇L and ∇R at the end of the last stage, all weights, expectations over q."""
    stages = _table(claim.runs, results).groupby("stage")["seed"].first()
    folder = results / "gradients"
    if file := damaged_file(folder, needed=["cosines.parquet"]):
        raise LookupError(f"{folder / file} is missing, or not what was published")
    cosines = pd.read_parquet(folder / "cosines.parquet")
    chosen = cosines[(cosines["layer"] == "all") & (cosines["labels"] == "population")].set_index("stage")["cosine"]
    return chosen.loc[stages.index].set_axis(stages)


def _all_lengths(claim: Claim, results: Path) -> Path:
    """The store of the runs of `claim`, once those of every length of RL are known to be there."""
    for steps in analysis.RL_LENGTHS:
        _table(claim.runs.model_copy(update={"settings": {**claim.runs.settings, "rl_steps": steps}}), results)
    return results / claim.runs.store


def _place(claim: Claim, results: Path) -> tuple[Path, str, str, float]:
    """Where the runs of `claim` are, once all of them are known to be there."""
    _table(claim.runs, results)
    return results / claim.runs.store, claim.runs.pipeline, claim.runs.preset, claim.runs.beta


STATISTICS: dict[str, Callable[[Claim, Path], pd.Series]] = {
    "change": _change,
    "change beyond": _change_beyond,
    "end": _end,
    "end beyond": _end_beyond,
    "above base": _above_base,
    "confidence beyond judgement": _confidence_beyond_judgement,
    "answers beyond confidence": _answers_beyond_confidence,
    "fixed-point error": _fixed_point_error,
    "Gibbs share": _gibbs_share,
    "threshold agreement": _threshold_agreement,
    "stopping octaves": _stopping_octaves,
    "gradient cosine": _gradient_cosine,
}


# ---- What pages say


QUOTE = re.compile(r"\[(supported|refuted|inconclusive|missing)\]\((?:[\w./]*)#claim-([a-z0-9-]+)\)")
# A number with two decimals or more that is neither in code, nor in mathematics, nor glued, nor part of a name.
TYPED = re.compile(r"(?<![\w.$/])[−+-]?\d+\.\d{2,}(?![\w.]*[\w/])")
UNREAD = re.compile(
    r"```.*?```|~~~.*?~~~|``[^`]*``|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\{[\w:]+\}`[^`]*`|\]\([^)]*\)|<[^>]*>", re.DOTALL
)


def pages(root: Path) -> dict[str, str]:
    """Markdown of every page of the book, by its path under `root`: `book/*.md` and the text cells of the notebooks."""
    found = {path: path.read_text(encoding="utf-8") for path in sorted((root / "book").glob("*.md"))}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        found[path] = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return {path.relative_to(root).as_posix(): text for path, text in found.items()}


def misquoted(texts: dict[str, str], verdicts: list[Verdict]) -> list[str]:
    """One line for each quotation `[supported](#claim-<id>)` in `texts` that is not the verdict of the data."""
    known = {verdict.id: verdict.verdict for verdict in verdicts}
    return [
        f"{page}: says that {name} is {said}, the data say {known.get(name, 'that there is no such claim')}"
        for page, text in texts.items()
        for said, name in QUOTE.findall(text)
        if known.get(name) != said
    ]


def typed_metrics(texts: dict[str, str], allowed: set[str]) -> list[str]:
    """One line for each number in the prose of `texts` that looks like a result and was typed by hand.

    Those that the paper reports, `allowed`, may be.
    """
    return [
        f"{page}: {number} is typed by hand, glue it from the run that gave it"
        for page, text in texts.items()
        for number in TYPED.findall(UNREAD.sub(" ", text))
        if number.lstrip("−+-") not in allowed
    ]


def table(claims: list[Claim], verdicts: list[Verdict]) -> pd.DataFrame:
    """One row a claim: its sentence, unit, verdict, effect, 95 % interval, number of seeds, and why it is missing."""
    rows = [
        {"claim": claim.claim, "unit": claim.unit, **asdict(verdict)}
        for claim, verdict in zip(claims, verdicts, strict=True)
    ]
    return pd.DataFrame(rows).set_index("id")


def text(claims: list[Claim], verdicts: list[Verdict]) -> str:
    """The ledger for a terminal: one line a claim, and why what is missing is missing."""
    lines = [
        f"{verdict.verdict:12}  {effect_text(claim, verdict) or verdict.reason:44}  {verdict.id}"
        for claim, verdict in zip(claims, verdicts, strict=True)
    ]
    counts = [f"{sum(v.verdict == name for v in verdicts)} {name}" for name in VERDICTS]
    return "\n".join([*lines, ", ".join(counts)])


def page(claims: list[Claim], verdicts: list[Verdict]) -> str:
    """The ledger as Markdown: a table of all claims, then an entry for each, which `#claim-<id>` links to."""
    lines = ["| claim | verdict | effect, 95 % interval | seeds |", "|---|---|---|---|"]
    for claim, verdict in zip(claims, verdicts, strict=True):
        cells = (
            f"[{claim.claim}](#claim-{claim.id})",
            verdict.verdict,
            effect_text(claim, verdict),
            verdict.seeds or "",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    entries = [_entry(claim, verdict) for claim, verdict in zip(claims, verdicts, strict=True)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(entries) + "\n"


def _entry(claim: Claim, verdict: Verdict) -> str:
    effect = effect_text(claim, verdict)
    found = f"{effect}, {verdict.seeds} seeds" if effect else verdict.reason
    conditions = {
        "above": f"above {claim.margin:g}",
        "below": f"below {-claim.margin:g}",
        "within": f"between −{claim.margin:g} and {claim.margin:g}",
    }
    statistic = claim.statistic + (f" of `{claim.metric}`" if claim.metric else "")
    return "\n\n".join([
        f"(claim-{claim.id})=\n### {claim.claim}",
        f"**{verdict.verdict.capitalize()}**: {found}.",
        f"It holds if the {statistic} is {conditions[claim.direction]}, all of the interval of its mean over seeds. "
        f"Statistic: {_summary(claim.statistic)}.",
        f"Source: {claim.source}.",
        f"Runs: {_runs(claim.runs)}" + (f"; against {_runs(claim.against)}." if claim.against else "."),
    ])  # fmt: skip


def effect_text(claim: Claim, verdict: Verdict) -> str:
    """Effect, 95 % interval and unit for a page; "" where there is none."""
    if verdict.effect is None:
        return ""
    unit = f" {claim.unit}" if claim.unit else ""
    return f"{verdict.effect:+.3f} ({verdict.low:+.3f} to {verdict.high:+.3f}){unit}"


def _summary(statistic: str) -> str:
    first = STATISTICS[statistic].__doc__.splitlines()[0].rstrip(".")
    return first[0].lower() + first[1:]


def _runs(runs: Runs) -> str:
    settings = {"beta": f"{runs.beta:g}", **runs.settings}
    place = "data/results" if runs.store == "." else f"data/results/{runs.store}"
    text = ", ".join(f"`{name}={value}`" for name, value in settings.items())
    return f"`{place}`, pipeline `{runs.pipeline}`, preset `{runs.preset}`, {text}, seeds 0 to {runs.seeds - 1}"
