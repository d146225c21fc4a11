"""Run records and result tables: what a finished stage leaves behind, and how it is listed."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "numpy")
SUMMARY = (
    "sft_loss_train",
    "sft_loss_dev",
    "mean_reward_dev",
    "greedy_accuracy_dev",
    "mcc_dev",
    "acceptable_rate_dev",
    "kl_start_dev",
)
PIPELINES = {
    ("sft",): "sft",
    ("grpo",): "grpo",
    ("sft", "grpo"): "sft_then_rl",
    ("grpo", "sft"): "rl_then_sft",
    ("sft", "sft"): "sft_then_sft",
    ("grpo", "grpo"): "rl_then_rl",
    ("constant",): "constant_rl",
    ("sft", "constant"): "sft_then_constant_rl",
    ("constant", "sft"): "constant_rl_then_sft",
}


class RunRecord(BaseModel):
    """Everything needed to say where one stage's numbers come from.

    `gates` maps each health gate to "ok" or to one line that says why the run is invalid.
    `trainer_differences` maps each trainer setting to (TRL's default, ours) where the two differ.
    """

    stage: str
    kind: str
    parent: str
    kinds: tuple[str, ...]
    preset: str
    model: str
    corpus: str
    seed: int
    beta: float
    config: dict[str, Any]
    key: dict[str, Any]
    versions: dict[str, str]
    git_commit: str
    device: str
    started: str
    wall_s: float
    trainer_config: dict[str, Any]
    trainer_differences: dict[str, tuple[Any, Any]]
    gates: dict[str, str]

    @property
    def pipeline(self) -> str:
        """Name of the chain of stages from the base model to this one: `sft_then_rl`, …"""
        return PIPELINES.get(self.kinds, "_then_".join(self.kinds))

    def provenance(self) -> pd.DataFrame:
        """One-column table for a page: where the stage's numbers come from, and whether they may be used."""
        names = ("stage", "parent", "seed", "device", "wall_s", "started", "git_commit")
        rows = {("run", name): str(getattr(self, name)) for name in names}
        rows |= {("version", name): version for name, version in self.versions.items()}
        differences = self.trainer_differences.items()
        rows |= {("trainer", name): f"{ours!r} (TRL: {default!r})" for name, (default, ours) in differences}
        rows |= {("health gate", name): verdict for name, verdict in self.gates.items()}
        table = pd.Series(rows, name="value").to_frame()
        return table.rename_axis(["record", "field"])

    @property
    def valid(self) -> bool:
        """True when every health gate is ok."""
        return not self.failed_gates

    @property
    def failed_gates(self) -> str:
        """The gates that are not ok, each with its reason; "" if the run is valid."""
        return "; ".join(f"{gate}: {verdict}" for gate, verdict in self.gates.items() if verdict != "ok")


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str:
    """Commit of the checkout the package runs from, with `+` when it has local changes; else `""`."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return ""
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    return head.stdout.strip() + ("+" if changed else "")


def read_record(stage_dir: Path) -> RunRecord:
    """Record of the finished stage in `stage_dir`. Raises `OSError` or pydantic's `ValidationError`."""
    return RunRecord.model_validate_json((stage_dir / "record.json").read_text(encoding="utf-8"))


def read_metrics(stage_dir: Path) -> pd.DataFrame:
    """Metrics table of a stage: one row per evaluation, `step` plus one column per metric and split."""
    return pd.read_parquet(stage_dir / "metrics.parquet")


def read_report(stage_dir: Path) -> pd.DataFrame:
    """The harder judgement of a stage's end, and of its start where that is the base model: see `protocol.report`.

    Columns `point` (`start` or `end`), `metric`, `value`, `low`, `high`.
    """
    return pd.read_parquet(stage_dir / "report.parquet")


def finished_stages(store: Path) -> list[Path]:
    """Folders of the finished stages in `store`, by name; half-written ones start with a dot."""
    return sorted(path.parent for path in store.glob("[!.]*/record.json"))


def runs_table(store: Path) -> pd.DataFrame:
    """One row per finished stage: where it came from, and its metrics at the start and the end."""
    rows = []
    for stage_dir in finished_stages(store):
        record, metrics = read_record(stage_dir), read_metrics(stage_dir)
        fields = ("stage", "kind", "parent", "pipeline", "preset", "model", "corpus", "seed", "beta")
        row = {name: getattr(record, name) for name in fields}
        row |= {name: record.config[name] for name in ("response_style", "sft_steps", "rl_steps")}
        for metric in SUMMARY:
            row[f"{metric}_start"], row[f"{metric}_end"] = metrics[metric].iloc[[0, -1]].astype(float)
        row |= {"wall_s": record.wall_s, "device": record.device, "gates": record.failed_gates or "ok"}
        rows.append(row)
    return pd.DataFrame(rows)


def runs_json(store: Path) -> str:
    """`runs_table` as a JSON list of objects; a value that is not a number is `null`."""
    return json.dumps(json.loads(runs_table(store).to_json(orient="records", double_precision=15)), indent=2)


def runs_text(store: Path) -> str:
    """`runs_table` for a terminal: one line per stage, the main columns."""
    table = runs_table(store)
    if table.empty:
        return f"no finished stages in {store}"
    columns = ["stage", "pipeline", "preset", "seed", "beta", "sft_loss_dev_start", "sft_loss_dev_end"]
    columns += ["mean_reward_dev_start", "mean_reward_dev_end", "wall_s", "gates"]
    return table[columns].to_string(index=False, float_format=lambda value: f"{value:.3f}")


def publish(store: Path, target: Path) -> int:
    """Make `target` hold record, metrics and report, no weights, of every finished stage in `store`; returns how many.

    Stages in `target` that `store` lacks are removed. Raises `ValueError`, `target` untouched, if the stages were
    trained by different versions of the code, whose numbers must not be mixed, or before stages had a report.
    """
    stages = finished_stages(store)
    versions_of_code = {read_record(stage_dir).key["code"] for stage_dir in stages}
    if len(versions_of_code) > 1:
        raise ValueError(
            f"{store} holds stages of {len(versions_of_code)} versions of the code: train into an empty one"
        )
    names = ("metrics.parquet", "report.parquet", "record.json")
    lacking = [stage_dir / name for stage_dir in stages for name in names if not (stage_dir / name).is_file()]
    if lacking:
        raise ValueError(f"{lacking[0]} is not there, an earlier version trained this stage: train it again")
    for old in finished_stages(target):
        shutil.rmtree(old)
    for stage_dir in stages:
        (target / stage_dir.name).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(stage_dir / name, target / stage_dir.name / name)
    return len(stages)


def metrics_table(store: Path, **where: Any) -> pd.DataFrame:
    """All evaluations of the stages in `store` whose record matches `where`, e.g. `pipeline="sft_then_rl"`.

    Columns of the metrics tables plus `stage`, `pipeline`, `seed`, `beta`, `preset`.
    """
    tables = []
    for stage_dir in finished_stages(store):
        record = read_record(stage_dir)
        if all(getattr(record, name) == value for name, value in where.items()):
            fields = {name: getattr(record, name) for name in ("stage", "pipeline", "seed", "beta", "preset")}
            tables.append(read_metrics(stage_dir).assign(**fields))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def second_stage(store: Path, pipeline: str, preset: str = "tiny") -> pd.DataFrame:
    """Evaluations of the last stage of `pipeline`, one valid stage per seed, at β = 0, by `seed` and `step`.

    Raises `LookupError` if there is none, or more than one for a seed.
    """
    table = metrics_table(store, pipeline=pipeline, preset=preset, beta=0.0, valid=True)
    if table.empty:
        raise LookupError(f"{store} holds no valid stage with pipeline={pipeline!r}, preset={preset!r}, beta=0")
    twice = table.groupby("seed")["stage"].nunique().loc[lambda count: count > 1]
    if len(twice):
        raise LookupError(f"{store} holds several stages of pipeline={pipeline!r} with seed={twice.index[0]}")
    return table.sort_values(["seed", "step"], ignore_index=True)


def base_metrics(store: Path, preset: str = "tiny") -> pd.Series:
    """Metrics of the base model: those at step 0 of the first stages, which all start there."""
    table = second_stage(store, "sft", preset)
    return table[table["step"] == 0].iloc[0]
