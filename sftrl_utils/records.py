"""Run records and result tables: what a finished stage leaves behind, and how it is listed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError

from sftrl_utils.config import PRESETS, InputError

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy")
CHECKSUMS = "SHA256SUMS"
PUBLISHED = (
    "metrics.parquet",
    "report.parquet",
    "answers.parquet",
    "record.json",
)  # files of a stage: all but its model
SUMMARY = (
    "sft_loss_train",
    "sft_loss_dev",
    "mean_reward_dev",
    "greedy_accuracy_dev",
    "mcc_dev",
    "acceptable_rate_dev",
    "kl_start_dev",
)
OPTIONS = ("format_steps", "lora_rank", "proxy_flipped")  # settings that most runs leave at 0
PIPELINES = {
    ("sft",): "sft",
    ("grpo",): "grpo",
    ("sft", "grpo"): "sft_then_rl",
    ("grpo", "sft"): "rl_then_sft",
    ("sft", "sft"): "sft_then_sft",
    ("grpo", "grpo"): "rl_then_rl",
    ("proxy",): "proxy_rl",
    ("constant",): "constant_rl",
    ("sft", "constant"): "sft_then_constant_rl",
    ("constant", "sft"): "constant_rl_then_sft",
    ("joint",): "joint",
    ("interleaved",): "interleaved",
    ("sft", "interleaved"): "sft_then_interleaved",
    ("sft", "grpo", "merged"): "sft_then_rl_merged",
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
    peak_mb: int | None = None  # the most memory the process held until then; on a GPU, of tensors
    trainer_config: dict[str, Any]
    trainer_differences: dict[str, tuple[Any, Any]]
    gates: dict[str, str]

    @property
    def pipeline(self) -> str:
        """Name of the chain of stages from the base model to this one: `sft_then_rl`, …; `format` before any."""
        return PIPELINES.get(self.kinds) or "_then_".join(self.kinds) or "format"

    @property
    def command(self) -> str:
        """The command that trains this stage, and those before it if their settings were the same; "" for `format`."""
        if self.kinds not in PIPELINES:
            return ""
        preset = {"preset": self.preset, **PRESETS[self.preset]}
        given = {"preset": self.preset} | {name: value for name, value in self.config.items() if value != preset[name]}
        words = [word for name, value in given.items() for word in ("-p", name, str(value))]
        return shlex.join(["sftrl", "run", self.pipeline, *words])

    def provenance(self) -> pd.DataFrame:
        """One-column table for a page: where the stage's numbers come from, and whether they may be used."""
        names = ("stage", "parent", "seed", "device", "wall_s", "peak_mb", "started", "git_commit")
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
    """Record of the finished stage in `stage_dir`. Raises `OSError`, or `InputError` if it is damaged."""
    path = stage_dir / "record.json"
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        raise InputError(f"{path} is damaged: remove {stage_dir}, and the stage is trained again") from None


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` for every file under `folder`, as `sha256sum -c` reads it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in found]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def damaged_file(
    folder: Path,
    weights: bool = True,
    needed: Collection[str] = ("metrics.parquet", "report.parquet", "record.json"),
) -> str:
    """Name of a file in `folder`, a stage's, that is missing or not what `write_checksums` saw; "" if there is none.

    The list must hold all that are `needed`. Without `weights` only the small files are looked at.
    """
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return CHECKSUMS
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not set(needed) <= set(listed):
        return CHECKSUMS
    for name, digest in listed.items():
        try:
            if (weights or not name.startswith("model/")) and _sha256(folder / name) != digest:
                return name
        except OSError:
            return name
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_metrics(stage_dir: Path) -> pd.DataFrame:
    """Metrics table of a stage: one row per evaluation, `step` plus one column per metric and split.

    Raises `InputError` if it cannot be read.
    """
    return _read_table(stage_dir, "metrics.parquet")


def _read_table(stage_dir: Path, name: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(stage_dir / name)
    except (OSError, ValueError):  # pyarrow's errors are both
        damaged = stage_dir / name
        raise InputError(f"{damaged} is damaged: remove {stage_dir}, and the stage is trained again") from None


def read_report(stage_dir: Path) -> pd.DataFrame:
    """The harder judgement of a stage's end, and of its start where that is the base model: see `protocol.report`.

    Columns `point` (`start` or `end`), `metric`, `value`, `low`, `high`.
    """
    return _read_table(stage_dir, "report.parquet")


def read_answers(stage_dir: Path) -> pd.DataFrame:
    """What the model at a stage's end, and at its start where that is the base model, answers to each sentence.

    Columns `point` (`start` or `end`), `split`, `label`, `q` and `phenomenon` of the sentence, and log-probabilities
    `unacceptable` and `acceptable` in nats; rows of a split are in the corpus's order.
    """
    return _read_table(stage_dir, "answers.parquet")


def writable_store(folder: Path) -> Path:
    """`folder`, made if it is not there. Raises `InputError` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"out_dir={str(folder)!r} cannot be written to ({error.strerror}): name another folder"
        ) from None
    return folder


def finished_stages(store: Path) -> list[Path]:
    """Folders of the finished stages in `store`, by name; half-written ones start with a dot."""
    return sorted(path.parent for path in store.glob("[!.]*/record.json"))


def read_records(store: Path) -> list[RunRecord]:
    """Records of the finished stages in `store`."""
    return [read_record(stage_dir) for stage_dir in finished_stages(store)]


def runs_table(store: Path) -> pd.DataFrame:
    """One row per finished stage: where it came from, and its metrics at the start and the end."""
    rows = []
    for stage_dir in finished_stages(store):
        record, metrics = read_record(stage_dir), read_metrics(stage_dir)
        fields = ("stage", "kind", "parent", "pipeline", "preset", "model", "corpus", "seed", "beta")
        row = {name: getattr(record, name) for name in fields}
        row |= {name: record.config[name] for name in ("response_style", "sft_steps", "rl_steps", *OPTIONS)}
        for metric in SUMMARY:
            row[f"{metric}_start"], row[f"{metric}_end"] = metrics[metric].iloc[[0, -1]].astype(float)
        row |= {"wall_s": record.wall_s, "device": record.device, "gates": record.failed_gates or "ok"}
        row |= {"command": record.command}
        rows.append(row)
    return pd.DataFrame(rows)


def runs_json(store: Path) -> str:
    """`runs_table` as a JSON list of objects; a value that is not a number is `null`."""
    return json.dumps(json.loads(runs_table(store).to_json(orient="records", double_precision=15)), indent=2)


def runs_text(store: Path) -> str:
    """`runs_table` for a terminal: one line per stage, the main columns, and options that any stage makes use of."""
    table = runs_table(store)
    if table.empty:
        return f"no finished stages in {store}"
    columns = ["stage", "pipeline", "preset", "seed", "beta", *(name for name in OPTIONS if table[name].any())]
    columns += ["sft_loss_dev_start", "sft_loss_dev_end"]
    columns += ["mean_reward_dev_start", "mean_reward_dev_end", "wall_s", "gates"]
    return table[columns].to_string(index=False, float_format=lambda value: f"{value:.3f}")


def publish(store: Path, target: Path, names: Collection[str] | None = None) -> list[RunRecord]:
    """Copy record, metrics, report and answers, no weights, of finished stages in `store` to `target`.

    All of them, or those of `names`; returns their records. Tables of sweeps go with them.

    What `target` holds of another version of the code is removed, the rest stays. Raises `ValueError`, `target`
    untouched, if the stages were trained by different versions of the code, whose numbers must not be mixed, or before
    stages had a report.
    """
    if target.exists() and (not target.is_dir() or target.samefile(store)):
        raise ValueError(f"{target} is a file, or the store itself: name another folder")
    stages = [path for path in finished_stages(store) if names is None or path.name in names]
    if names is not None and len(stages) < len(names):
        raise ValueError(f"{store} holds {len(stages)} of {len(names)} stages: run the sweep to its end first")
    if not stages:
        raise ValueError(f"{store} holds no finished stage: nothing to publish")
    copied = [read_record(stage_dir) for stage_dir in stages]
    versions_of_code = {record.key["code"] for record in copied}
    if len(versions_of_code) > 1:
        raise ValueError(
            f"{store} holds stages of {len(versions_of_code)} versions of the code: train into an empty one"
        )
    lacking = [stage_dir / name for stage_dir in stages for name in PUBLISHED if not (stage_dir / name).is_file()]
    if lacking:
        raise ValueError(f"{lacking[0]} is not there, an earlier version trained this stage: train it again")
    for stage_dir in stages:
        if (stage_dir / CHECKSUMS).is_file() and (file := damaged_file(stage_dir, weights=False)):
            raise ValueError(f"{stage_dir / file} is damaged: run what trained the stage once more")
    tables = sorted(store.glob("sweeps/*/results.parquet"))
    outdated = [old for old in finished_stages(target) if read_record(old).key["code"] not in versions_of_code]
    for old in outdated:
        shutil.rmtree(old)
    if outdated:
        shutil.rmtree(target / "sweeps", ignore_errors=True)  # their rows are of stages that are gone
    for stage_dir in stages:
        (target / stage_dir.name).mkdir(parents=True, exist_ok=True)
        for name in PUBLISHED:
            shutil.copyfile(stage_dir / name, target / stage_dir.name / name)
        # The same numbers without pandas' and Arrow's description of them, which is three times their size.
        plain = {"index": False, "store_schema": False, "use_dictionary": False, "write_statistics": False}
        read_metrics(stage_dir).to_parquet(target / stage_dir.name / "metrics.parquet", **plain)
        write_checksums(target / stage_dir.name)
    for table in tables:
        if not set(pd.read_parquet(table, columns=["stage"])["stage"]) <= {record.stage for record in copied}:
            continue  # of an earlier version of the code
        (target / table.parent.relative_to(store)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table, target / table.relative_to(store))
    return copied


def metrics_table(store: Path, **where: Any) -> pd.DataFrame:
    """All evaluations of the stages in `store` whose record matches `where`, e.g. `pipeline="sft_then_rl"`.

    `where` names a field of the record or a setting of its run. Columns of the metrics tables plus `stage`, `pipeline`,
    `seed`, `beta`, `preset`.
    """
    tables = []
    for stage_dir in finished_stages(store):
        record = read_record(stage_dir)
        if all(getattr(record, name, record.config.get(name)) == value for name, value in where.items()):
            fields = {name: getattr(record, name) for name in ("stage", "pipeline", "seed", "beta", "preset")}
            tables.append(read_metrics(stage_dir).assign(**fields))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def second_stage(store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any) -> pd.DataFrame:
    """Evaluations of the last stage of `pipeline`, one valid stage per seed, by `seed` and `step`.

    `where` as in `metrics_table`. Raises `LookupError` if there is none, or more than one for a seed.
    """
    table = metrics_table(store, pipeline=pipeline, preset=preset, beta=beta, valid=True, **where)
    if table.empty:
        raise LookupError(f"{store} holds no valid stage with pipeline={pipeline!r}, preset={preset!r}, beta={beta:g}")
    twice = table.groupby("seed")["stage"].nunique().loc[lambda count: count > 1]
    if len(twice):
        raise LookupError(f"{store} holds several stages of pipeline={pipeline!r} with seed={twice.index[0]}")
    return table.sort_values(["seed", "step"], ignore_index=True)


def base_metrics(store: Path, preset: str = "tiny") -> pd.Series:
    """Metrics of the base model: those at step 0 of the first stages, which all start there."""
    table = second_stage(store, "sft", preset)
    return table[table["step"] == 0].iloc[0]


def reports(store: Path, pipeline: str, preset: str = "tiny", beta: float = 0.0, **where: Any) -> pd.DataFrame:
    """The harder judgement along `pipeline`, one row per seed, point and metric: see `protocol.report`.

    `point` is the number of stages done: 0 for the base model. `where` and errors as `second_stage`.
    """
    tables = []
    for seed, name in second_stage(store, pipeline, preset, beta, **where).groupby("seed")["stage"].first().items():
        chain = [name]
        while len(chain) < len(read_record(store / name).kinds):
            chain.insert(0, read_record(store / chain[0]).parent)
        for done, stage in enumerate(chain, start=1):
            report = read_report(store / stage).set_index("point")
            if done == 1:
                tables.append(report.loc["start"].assign(seed=seed, point=0))
            tables.append(report.loc["end"].assign(seed=seed, point=done))
    return pd.concat(tables, ignore_index=True)


def proxy_shares(store: Path, preset: str = "tiny") -> list[float]:
    """Shares of flipped preference pairs of the valid `proxy_rl` stages in `store`, β = 0. `LookupError` if none."""
    found = {
        record.config["proxy_flipped"]
        for record in read_records(store)
        if (record.pipeline, record.preset, record.beta, record.valid) == ("proxy_rl", preset, 0.0, True)
    }
    if not found:
        raise LookupError(f"{store} holds no valid stage of GRPO against a reward model, preset={preset!r}")
    return sorted(found)


def costs_table(*stores: Path) -> pd.DataFrame:
    """One row a preset, device and kind of stage: how many, median seconds, median of the peak memory in MB.

    A preset of which `stores` hold no stage has a row that says so.
    """
    names = ("preset", "device", "kind", "wall_s", "peak_mb")
    rows = [{name: getattr(record, name) for name in names} for store in stores for record in read_records(store)]
    groups = pd.DataFrame(rows, columns=names).groupby(["preset", "device", "kind"])
    table = groups.agg(stages=("wall_s", "size"), wall_s=("wall_s", "median"), peak_mb=("peak_mb", "median"))
    for preset in set(PRESETS) - set(table.index.get_level_values("preset")):
        table.loc[(preset, "not run", ""), "stages"] = 0
    return table.sort_index().astype({"stages": int})
