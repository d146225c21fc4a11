"""A sweep: notebooks run with many parameters. Which cells it has, what they share, and what has come of them."""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import nbformat
import pandas as pd
import yaml
from filelock import FileLock, Timeout
from IPython.core.inputtransformer2 import TransformerManager
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sftrl_utils import corpora, keys, publishing, records, sources
from sftrl_utils.cell import SPEC
from sftrl_utils.config import InputError, RunConfig, one_line

Value = bool | int | float | str | None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_seeds(value: Any) -> Any:
    return list(range(value)) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


class Sweep(BaseModel):
    """What a sweep file says.

    `notebook`: one path or several, from the file's own folder. `fixed`: parameters of every cell. `grid`: values of
    parameters, of which every combination is run; `points`: combinations written out, beside those of the grid.
    `seeds`: a list, or how many from 0 on. `timeout_minutes`: a cell that takes longer has failed; waiting for a stage
    that another cell is training counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    notebook: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    fixed: dict[str, Value] = {}
    grid: dict[str, Annotated[list[Value], Field(min_length=1)]] = {}
    points: list[dict[str, Value]] = []
    seeds: Annotated[list[int], BeforeValidator(_as_seeds), Field(min_length=1)] = [0]
    timeout_minutes: Annotated[float, Field(gt=0)] = 120.0

    @model_validator(mode="after")
    def _each_parameter_once(self) -> Sweep:
        for name in ("seed", "out_dir"):
            if any(name in part for part in (self.fixed, self.grid, *self.points)):
                remedy = "use seeds" if name == "seed" else "use --dir"
                raise ValueError(f"{name} is not set by fixed, grid or points: {remedy}")
        if twice := set(self.fixed) & set(self.grid):
            raise ValueError(f"{min(twice)} is in fixed and in grid: take it out of one")
        return self

    def combinations(self) -> list[dict[str, Value]]:
        """The parameters of each cell but `seed` and `out_dir`; `fixed` is in all of them."""
        grid = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        chosen = (grid if self.grid or not self.points else []) + self.points
        return [{**self.fixed, **point} for point in chosen]


@dataclass(frozen=True)
class Notebook:
    """A notebook as it was when the sweep was planned: what is run, whatever becomes of its file meanwhile.

    `modules` of this package are what its code uses, `code` is their fingerprint; `key` a hash of both, of its own code
    cells and of the lock.
    """

    path: Path
    text: str
    pipelines: list[str]
    modules: list[str]
    code: str
    key: str

    @classmethod
    def read(cls, path: Path) -> Notebook:
        """The notebook at `path`. Raises `InputError` if it is not one, or holds a cell that is not Python."""
        try:
            text = path.read_text(encoding="utf-8")
            notebook = nbformat.reads(text, as_version=4)
            cells = [source for _, source in publishing.code_cells(notebook)]
            python = map(TransformerManager().transform_cell, cells)  # magics are no Python
            modules = imported_modules("\n".join(python))
        except (OSError, UnicodeDecodeError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
            reason = getattr(error, "strerror", None) or "it is not a notebook"
            raise InputError(f"notebook={str(path)!r} cannot be read ({reason}): give a path from the file") from None
        except SyntaxError as error:
            raise InputError(f"notebook={str(path)!r} holds a cell that is not Python: {error}") from None
        lock = Path(__file__).parent.parent / "requirements.lock"
        code = keys.code_fingerprint(modules)
        parts = [cells, code, lock.read_text(encoding="utf-8") if lock.is_file() else ""]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return cls(path.resolve(), text, notebook.metadata.get("sftrl", {}).get("pipelines", []), modules, code, key)


@dataclass(frozen=True)
class Cell:
    """One run of one notebook: `name` is the notebook's and a hash of all that its outputs depend on.

    `pipelines` maps those that the notebook trains (its metadata say which) to the names of their stages.
    """

    name: str
    notebook: Notebook
    parameters: dict[str, Value]
    config: RunConfig
    pipelines: dict[str, tuple[str, ...]]

    @property
    def stages(self) -> set[str]:
        """Names of all stages that the cell loads or trains."""
        return set(itertools.chain(*self.pipelines.values()))


@dataclass(frozen=True)
class Plan:
    """The cells of the sweep file `file`, and the store their stages are in."""

    file: Path
    sweep: Sweep
    store: Path
    cells: list[Cell]
    _rows: dict[str, tuple[float, pd.DataFrame]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def stages(self) -> set[str]:
        """Names of all stages that its cells ask for."""
        return set().union(*(cell.stages for cell in self.cells))

    @property
    def folder(self) -> Path:
        """Where the sweep's table and its cells are."""
        return self.store / "sweeps" / self.file.stem

    @property
    def cells_folder(self) -> Path:
        """Where each cell that has ended has its folder."""
        return self.folder / "cells"

    @property
    def results(self) -> Path:
        """The table of the sweep: see `results_table`."""
        return self.folder / "results.parquet"


def read_sweep(file: Path) -> Sweep:
    """The sweep in the YAML file `file`. Raises `InputError`, one line, for what is not one."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read ({error.strerror}): name a sweep file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{file}: {one_line(error)}") from None


def plan(file: Path, store: Path) -> Plan:
    """All cells of the sweep file `file` with their stages in `store`; trains nothing.

    Cells with the same parameters are one cell. Raises `InputError` for a notebook or a parameter that cannot be used.
    """
    sweep = read_sweep(file)
    revision = functools.cache(sources.revision)
    cells: dict[str, Cell] = {}
    corpus_revisions: dict[tuple, str] = {}
    for notebook in [Notebook.read(file.parent / name) for name in sweep.notebook]:
        for point, seed in itertools.product(sweep.combinations(), sweep.seeds):
            parameters = {**point, "seed": seed, "out_dir": str(store)}
            config = RunConfig.from_parameters(dict(parameters))
            asked = (config.corpus, config.train_sentences, config.dev_sentences, config.heldout_sentences)
            if asked not in corpus_revisions:
                corpus_revisions[asked] = corpora.load_corpus(config).revision
            corpus, base = corpus_revisions[asked], revision(config.model)
            settings = config.model_dump(mode="json", exclude={"out_dir"})
            key = json.dumps([notebook.key, settings, corpus, base], sort_keys=True)
            name = f"{notebook.path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
            pipelines = {each: tuple(keys.pipeline_names(config, each, corpus, base)) for each in notebook.pipelines}
            cells.setdefault(name, Cell(name, notebook, parameters, config, pipelines))
    return Plan(file, sweep, store, early_sharing(cells.values()))


def imported_modules(code: str) -> list[str]:
    """Names of this package's modules that Python `code` imports, and those that these import."""
    found: set[str] = set()
    queue = [ast.parse(code)]
    while queue:
        for node in ast.walk(queue.pop()):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in (name.split(".")[1] for name in names if name.startswith("sftrl_utils.")):
                path = Path(__file__).parent / f"{name}.py"
                if name not in found and path.is_file():
                    found.add(name)
                    queue.append(ast.parse(path.read_text(encoding="utf-8")))
    return sorted(found)


def early_sharing(cells: Iterable[Cell]) -> list[Cell]:
    """`cells` in the order to start them in: those first that between them train each shared stage once.

    A cell's place is how many before it share the stage that most do: cells that would wait for each other are apart.
    """
    cells = list(cells)
    users = Counter(itertools.chain.from_iterable(cell.stages for cell in cells))
    before: Counter[str] = Counter()
    places = []
    for cell in cells:
        shared = [stage for stage in cell.stages if 1 < users[stage] < len(cells)]  # what all share tells none apart
        places.append(max((before[stage] for stage in shared), default=0))
        before.update(shared)
    order = sorted(range(len(cells)), key=places.__getitem__)
    return [cells[at] for at in order]


def whole_stages(plan: Plan, weights: bool = True) -> tuple[set[str], list[Path]]:
    """Stages of `plan` that are in its store and whole, by checksum; and the files that are damaged.

    Without `weights` models are not read: they can be large.
    """
    whole, damaged = set(), []
    for name in sorted(plan.stages):
        folder = plan.store / name
        if (folder / "record.json").is_file():
            if file := records.damaged_file(folder, weights):
                damaged.append(folder / file)
            else:
                whole.add(name)
    return whole, damaged


def states(plan: Plan, whole: set[str]) -> dict[str, str]:
    """State of each cell: `finished` (and all its stages `whole`), `failed`, `running` or `waiting`."""
    found = {}
    for cell in plan.cells:
        state = read_outcome(plan.cells_folder / cell.name).get("state")
        if state == "finished" and cell.stages <= whole:
            found[cell.name] = "finished"
        elif is_running(plan, cell.name):
            found[cell.name] = "running"
        else:
            found[cell.name] = "failed" if state == "failed" else "waiting"
    return found


def read_outcome(folder: Path) -> dict[str, Any]:
    """What the cell in `folder` left: `state`, `reason`, `wall_s`, …; empty if it has not ended."""
    try:
        return json.loads((folder / SPEC).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def cell_lock(plan: Plan, name: str) -> Path:
    """The file whose lock the cell `name` holds while it runs."""
    return plan.cells_folder / f".{name}.lock"


def is_running(plan: Plan, name: str) -> bool:
    """Whether a sweep, this one or another, is running the cell `name`."""
    path = cell_lock(plan, name)
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def results_table(plan: Plan) -> pd.DataFrame:
    """One row per cell and evaluation of its stages that are in the store, however they came there.

    Columns: `cell`, `notebook`, every parameter, `pipeline`, `stage`, `record` (its path in the store), `valid`, `step`
    and the metrics.
    """
    parts, cells = [], []
    for cell in plan.cells:
        settings = cell.config.model_dump(mode="json", exclude={"out_dir"})
        for name in dict.fromkeys(itertools.chain(*cell.pipelines.values())):
            rows = _stage_rows(plan, name)
            parts.append(rows)
            cells += [{"cell": cell.name, "notebook": cell.notebook.path.stem, **settings}] * len(rows)
    if not cells:
        return pd.DataFrame()
    return pd.concat([pd.DataFrame(cells), pd.concat(parts, ignore_index=True)], axis=1)


def _stage_rows(plan: Plan, name: str) -> pd.DataFrame:
    folder = plan.store / name
    try:
        written = (folder / "record.json").stat().st_mtime
        if plan._rows.get(name, (None,))[0] != written:
            record, metrics = records.read_record(folder), records.read_metrics(folder)
            first = {"pipeline": record.pipeline, "stage": name, "record": f"{name}/record.json", "valid": record.valid}
            rows = pd.concat([pd.DataFrame([first] * len(metrics)), metrics], axis=1)
            plan._rows[name] = (written, rows)
    except (OSError, InputError):  # not there yet, or damaged: `whole_stages` says so
        return pd.DataFrame()
    return plan._rows[name][1]


def write_results(plan: Plan) -> None:
    """Write `results_table`, if it has rows, to the sweep's folder; whoever reads it meanwhile has the table before."""
    table = results_table(plan)
    if table.empty:  # no stage yet: no columns to read
        return
    plan.folder.mkdir(parents=True, exist_ok=True)
    unfinished = plan.results.with_suffix(f".{os.getpid()}.tmp")
    try:
        table.to_parquet(unfinished, index=False)
        unfinished.replace(plan.results)
    finally:
        unfinished.unlink(missing_ok=True)


def describe(plan: Plan) -> str:
    """What `--dry-run` prints: each cell, its own parameters and its stages, and how much is shared."""
    whole, _ = whole_stages(plan, weights=False)
    users = Counter(itertools.chain.from_iterable(cell.stages for cell in plan.cells))
    varied = {name for cell in plan.cells for name, value in cell.parameters.items()
              if any(other.parameters.get(name) != value for other in plan.cells[:1])}  # fmt: skip
    lines = []
    for cell in plan.cells:
        own = ", ".join(f"{name}={cell.parameters.get(name)}" for name in sorted(varied))
        lines.append(f"{cell.name}  {own}")
        for name in dict.fromkeys(itertools.chain(*cell.pipelines.values())):
            note = "in the store" if name in whole else f"shared by {users[name]}" if users[name] > 1 else ""
            lines.append(f"    {name}  {note}".rstrip())
    asked = f"{len(plan.cells)} cells ask for {users.total()} stages"
    lines.append(f"{asked}, {len(users)} different ones, {len(whole)} of them in the store")
    return "\n".join(lines)
