"""The ledger: every claim of the book, computed from published runs into a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import nbformat
import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sftrl_utils.config import InputError, data_dir, one_line
from sftrl_utils.effects import mean_change
from sftrl_utils.measures import MEASURES, Question, Runs, stages_of, versions_of
from sftrl_utils.records import read_record

VERDICTS = ("supported", "refuted", "inconclusive", "missing")


class Claim(BaseModel):
    """One entry of the ledger.

    `statistic` names one of `measures.MEASURES`, which gives a number a seed; `metric` is its argument where it takes
    one, `against` the runs that it compares with. The claim is that the mean over seeds is `above` `margin`, `below`
    −`margin`, or `within` ± `margin`. `experiment` is the notebook that shows the runs, `statements` are labels of what
    the theory says of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    claim: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    statements: tuple[str, ...] = ()
    experiment: Annotated[str, Field(pattern=r"^\d\d_\w+$")]
    statistic: str
    metric: str | None = None
    runs: Runs
    against: Runs | None = None
    direction: Literal["above", "below", "within"]
    margin: Annotated[float, Field(ge=0)] = 0.0
    unit: str = ""

    @model_validator(mode="after")
    def _fits_its_measure(self) -> Claim:
        if self.statistic not in MEASURES:
            raise ValueError(f"statistic={self.statistic!r} does not exist: choose one of {', '.join(MEASURES)}")
        measure = MEASURES[self.statistic]
        for name, needed in (("metric", measure.metric), ("against", measure.against)):
            if needed != (getattr(self, name) is not None):
                raise ValueError(f"statistic={self.statistic!r} {'needs' if needed else 'takes no'} {name}")
        if measure.pipeline not in (None, self.runs.pipeline):
            raise ValueError(f"statistic={self.statistic!r} is of pipeline {measure.pipeline!r} alone")
        if self.against and self.against.seeds != self.runs.seeds:
            raise ValueError(
                f"against has {self.against.seeds} seeds, runs {self.runs.seeds}: they are compared in pairs"
            )
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
        entries = list(yaml.safe_load(path.read_text(encoding="utf-8"))["claims"])
    except OSError:
        raise InputError(f"{path} is not there: run this in the checkout") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no ledger, a mapping with a list `claims`: {reason}") from None
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
    return set(map(str, yaml.safe_load(path.read_text(encoding="utf-8")).get("figures", [])))


def judge(claim: Claim, results: Path) -> Verdict:
    """The verdict of published runs in `results` on `claim`; `missing` if any of them is not there, or is damaged."""
    try:
        versions = {version for runs in (claim.runs, claim.against) if runs for version in versions_of(runs, results)}
        if len(versions) > 1:
            raise LookupError(f"its runs are of {len(versions)} versions of the code or the corpus")
        asked = Question(results, claim.runs, claim.metric, claim.against)
        values = MEASURES[claim.statistic].function(asked).loc[lambda seeds: seeds.index < claim.runs.seeds]
        if not np.isfinite(values).all():
            raise LookupError(f"{claim.statistic} is not finite for every seed")
    except LookupError as error:
        return Verdict(claim.id, "missing", reason=str(error.args[0]))
    except (OSError, InputError) as error:  # published stages are not trained again: half of the message is for others
        return Verdict(claim.id, "missing", reason=str(error).partition(": remove")[0])
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


# ---- What pages say


QUOTE = re.compile(r"\[([^\]]*)\]\([\w./]*#claim-([a-z0-9-]+)\)")
# A number with two decimals or more that is neither in code, nor in mathematics, nor glued, nor part of a name.
TYPED = re.compile(r"(?<![\w.$])[−+-]?\d+\.\d{2,}(?!\.?\d)")
UNREAD = re.compile(
    r"```.*?```|~~~.*?~~~|``[^`]*``|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)*\$|\{[\w:]+\}`[^`]*`|\]\([^)\n]*\)"
    r"|</?[A-Za-z][^>\n]*>|https?://\S+",
    re.DOTALL,
)


def pages(root: Path) -> dict[str, str]:
    """Text of every page by its path under `root`: `book/*.md`, the notebooks' Markdown and their lines with `glue`."""
    found = {path: path.read_text(encoding="utf-8") for path in sorted((root / "book").glob("*.md"))}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
        glued = [
            line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines() if "glue(" in line
        ]
        found[path] = "\n\n".join([*prose, *glued])
    return {path.relative_to(root).as_posix(): text for path, text in found.items()}


def misquoted(texts: dict[str, str], verdicts: list[Verdict]) -> list[str]:
    """One line for each link `[…](#claim-<id>)` in `texts` whose text is not the one word of the data's verdict."""
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


def page(claims: list[Claim], verdicts: list[Verdict], results: Path) -> str:
    """The ledger as Markdown: a table of all claims, then an entry for each, which `#claim-<id>` links to.

    An entry leads on: to the statements of the theory, to the notebook, and to the command that trains its runs in
    `results` again.
    """
    lines = ["| claim | verdict | effect, 95 % interval | seeds |", "|---|---|---|---|"]
    for claim, verdict in zip(claims, verdicts, strict=True):
        cells = (
            f"[{claim.claim}](#claim-{claim.id})",
            verdict.verdict,
            effect_text(claim, verdict),
            verdict.seeds or "",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    entries = [_entry(claim, verdict, results) for claim, verdict in zip(claims, verdicts, strict=True)]
    return "\n".join(lines) + "\n\n" + "\n\n".join(entries) + "\n"


def _entry(claim: Claim, verdict: Verdict, results: Path) -> str:
    effect = effect_text(claim, verdict)
    found = f"{effect}, {verdict.seeds} seeds" if effect else verdict.reason
    conditions = {
        "above": f"above {claim.margin:g}",
        "below": f"below {-claim.margin:g}",
        "within": f"between −{claim.margin:g} and {claim.margin:g}",
    }
    statistic = claim.statistic + (f" of `{claim.metric}`" if claim.metric else "")
    return "\n\n".join([
        f"(claim-{claim.id})=\n## {claim.claim}",
        f"**{verdict.verdict.capitalize()}**: {found}.",
        f"It holds if the {statistic} is {conditions[claim.direction]}, all of the interval of its mean over seeds. "
        f"Statistic: {MEASURES[claim.statistic].summary}.",
        f"Source: {claim.source}.",
        f"Runs: {_runs(claim.runs)}" + (f"; against {_runs(claim.against)}." if claim.against else "."),
        *_leads(claim, results),
    ])  # fmt: skip


def _leads(claim: Claim, results: Path) -> Iterator[str]:
    """Where the reader goes on from an entry, a paragraph each."""
    shown = f"The experiment: [](../notebooks/{claim.experiment}.ipynb)."
    if claim.statements:
        shown += " The theory: " + ", ".join(f"{{prf:ref}}`{label}`" for label in claim.statements) + "."
    yield shown
    commands = [command for runs in (claim.runs, claim.against) if runs and (command := _command(runs, results))]
    if commands:
        yield "Seed 0 again, the other seeds with `-p seed N`:\n\n```bash\n" + "\n".join(commands) + "\n```"


def _command(runs: Runs, results: Path) -> str:
    """The command that trains seed 0 of `runs`, from its record; "" where there is none."""
    try:
        table = stages_of(runs, results)
    except (LookupError, OSError, InputError):
        return ""
    return read_record(results / runs.store / table.loc[table["seed"] == 0, "stage"].iloc[0]).command


def effect_text(claim: Claim, verdict: Verdict) -> str:
    """Effect, 95 % interval and unit for a page; "" where there is none."""
    if verdict.effect is None:
        return ""
    unit = f" {claim.unit}" if claim.unit else ""
    return f"{verdict.effect:+.3f} ({verdict.low:+.3f} to {verdict.high:+.3f}){unit}"


def _runs(runs: Runs) -> str:
    settings = {"beta": f"{runs.beta:g}", **runs.settings}
    place = "data/results" if runs.store == "." else f"data/results/{runs.store}"
    text = ", ".join(f"`{name}={value}`" for name, value in settings.items())
    return f"`{place}`, pipeline `{runs.pipeline}`, preset `{runs.preset}`, {text}, seeds 0 to {runs.seeds - 1}"
