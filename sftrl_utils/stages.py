"""The stage graph: base → SFT / GRPO → …; a content-addressed store from which a stage is loaded or trained."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sftrl_utils import corpora, keys, models, protocol, records, sources, training
from sftrl_utils.config import InputError, RunConfig
from sftrl_utils.evaluation import Evaluator
from sftrl_utils.joint import step_weights
from sftrl_utils.records import RunRecord

SEED_STRIDE = 1_000_003  # a stage must not replay the order of data or samples of the one before


@dataclass(frozen=True)
class Stage:
    """A finished stage in the store: its folder, record, metrics (one row per evaluation) and report."""

    path: Path
    record: RunRecord
    metrics: pd.DataFrame
    report: pd.DataFrame

    @property
    def answers(self) -> pd.DataFrame:
        """What the model answers to each sentence: see `records.read_answers`."""
        return records.read_answers(self.path)

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The trained model and its tokenizer."""
        return models.load(str(self.path / "model"))

    def summary(self) -> pd.DataFrame:
        """Every metric at the start and the end of the stage: rows are metrics, columns (split, start | end)."""
        ends = self.metrics.iloc[[0, -1]].drop(columns="step").set_axis(["start", "end"]).T
        ends.index = pd.MultiIndex.from_tuples([name.rsplit("_", 1) for name in ends.index], names=["metric", "split"])
        table = ends.unstack("split").swaplevel(axis=1)
        columns = [(split, end) for split in corpora.SPLITS for end in ends.columns]
        return table.loc[ends.index.get_level_values("metric").unique(), columns]


def train_stage(config: RunConfig, kind: str, parent: Stage | None = None) -> Stage:
    """Load the stage `kind` (see `training.train`) after `parent` (None: the base model), or train it.

    Where `config.format_steps` asks for it, the base model is taught the form of an answer first, once for all seeds.

    The stage's folder is named by a hash of all that its numbers depend on. A lock keeps two processes
    from training it twice; it is written under another name and renamed when whole, so a killed run
    leaves nothing that could be read as finished. A stage of which a file is no longer what was written is
    trained again, and a line says so. Raises `InputError` before training for input that cannot be used,
    and after it for a disk that is full.
    """
    if kind == "proxy" and config.response_style != "label":
        raise InputError(
            f"response_style={config.response_style!r}: a reward model compares one-word answers, use 'label'"
        )
    if kind == "interleaved":
        step_weights(kind, config)  # says what does not divide
    if parent is None and kind != "format" and config.format_steps:
        parent = train_stage(config.model_copy(update={"seed": 0}), "format")
    corpus = corpora.load_corpus(config)
    before = parent.record.stage if parent else sources.revision(config.model)
    key = keys.stage_key(config, kind, corpus.revision, before)
    name = keys.stage_name(key)
    store = records.writable_store(config.out_dir)
    with FileLock(store / f".{name}.lock"):  # the system drops it when its process dies: no lock is ever stale
        finished = (store / name / "record.json").is_file()
        if finished and (file := records.damaged_file(store / name)):
            print(f"{store / name / file} is damaged: the stage is trained again")
            finished = False
        if not finished:
            _train_into(store, name, key, config, kind, corpus, parent)
    stage = open_stage(store / name)
    if not stage.record.valid:
        print(f"{name} is INVALID, its numbers say nothing about coupling: {stage.record.failed_gates}")
    return stage


def train_pipeline(config: RunConfig, pipeline: str) -> list[Stage]:
    """Load or train the stages of `pipeline` (`sft_then_rl`, …) in order; the last one ends it."""
    done: list[Stage] = []
    for kind in keys.kinds_of(pipeline):
        done.append(train_stage(config, kind, done[-1] if done else None))
    return done


def open_stage(path: Path) -> Stage:
    """The finished stage in folder `path`."""
    return Stage(path, records.read_record(path), records.read_metrics(path), records.read_report(path))


def chain(stage: Stage) -> list[Stage]:
    """`stage` and all before it in the same store, the first one first."""
    stages = [stage]
    while stages[0].record.parent != "base":
        stages.insert(0, open_stage(stage.path.parent / stages[0].record.parent))
    return stages


def judged(stages: list[Stage]) -> pd.DataFrame:
    """The harder judgement along a pipeline: rows are metrics of `protocol.report`, columns the base and each stage."""
    columns = {"base": stages[0].report.query("point == 'start'")}
    columns |= {" → ".join(stage.record.kinds): stage.report.query("point == 'end'") for stage in stages}
    return pd.DataFrame({name: part.set_index("metric")["value"] for name, part in columns.items()})


def _train_into(store, name, key, config, kind, corpus, parent) -> None:
    for leftover in store.glob(f".{name}.*.tmp"):  # of a run that was killed: we hold its lock
        shutil.rmtree(leftover)
    model, tokenizer = parent.load_model() if parent else models.load(config.model)
    models.require_memory(config.model, model, training.weights_needed(kind, config))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    evaluator = Evaluator(corpus, tokenizer, config.response_style)
    judge = partial(protocol.report, tokenizer=tokenizer, frame=corpus.splits["dev"], style=config.response_style)
    kinds = parent.record.kinds if parent else ()
    reports = {} if kinds else {"start": judge(model)}  # no stage yet: it starts from the base
    if kinds:
        evaluator.references["base"] = _base_answers(parent, evaluator, corpus)
    started, clock = datetime.now(UTC), time.perf_counter()
    depth = -1 if kind == "format" else len(kinds)
    seed = (config.seed + SEED_STRIDE * depth) % 2**31
    if kind == "merged":
        trained = training.merge(model, _parent_model(parent), config.interpolation, evaluator)
    else:
        trained = training.train(kind, model, tokenizer, corpus, config, evaluator, seed)
    reports["end"] = judge(model)
    record = RunRecord(
        stage=name,
        kind=kind,
        parent=parent.record.stage if parent else "base",
        kinds=kinds if kind == "format" else (*kinds, kind),
        preset=config.preset,
        model=config.model,
        corpus=config.corpus,
        seed=config.seed,
        beta=config.beta if kind in training.RL_KINDS else parent.record.beta if parent else 0.0,
        config=config.model_dump(mode="json", exclude={"out_dir"}),
        key=key,
        versions=records.versions(),
        git_commit=COMMIT,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        started=started.isoformat(timespec="seconds"),
        wall_s=round(time.perf_counter() - clock, 2),
        peak_mb=_peak_mb(),
        trainer_config=trained.trainer_config,
        trainer_differences=trained.trainer_differences,
        gates=trained.gates,
    )
    unfinished = store / f".{name}.{os.getpid()}.tmp"
    try:
        models.save(model, tokenizer, unfinished / "model")
        np.savez(unfinished / "base.npz", **evaluator.references["base"])
        trained.metrics.to_parquet(unfinished / "metrics.parquet", index=False)
        pd.concat(reports, names=["point"]).reset_index().to_parquet(unfinished / "report.parquet", index=False)
        answers = pd.concat([evaluator.answer_table(point).assign(point=point) for point in reports])
        answers.to_parquet(unfinished / "answers.parquet", index=False, compression="zstd")
        (unfinished / "record.json").write_text(record.model_dump_json(indent=2), encoding="utf-8")
        records.write_checksums(unfinished)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"out_dir={str(store)!r}: {name} cannot be written ({reason}): make room there") from None
    shutil.rmtree(store / name, ignore_errors=True)  # damaged, or without a record and nobody's
    unfinished.rename(store / name)


def _parent_model(stage: Stage) -> PreTrainedModel:
    """The model that `stage` started from."""
    if stage.record.parent == "base":
        return models.load(stage.record.model)[0]
    return open_stage(stage.path.parent / stage.record.parent).load_model()[0]


def _base_answers(parent: Stage, evaluator: Evaluator, corpus: corpora.Corpus) -> dict[str, np.ndarray]:
    """The base model's answers to every split: `parent` kept them, if it was asked the same."""
    asked = (parent.record.key["corpus"], parent.record.config["response_style"])
    if asked == (corpus.revision, evaluator.style) and (parent.path / "base.npz").is_file():
        with np.load(parent.path / "base.npz") as kept:
            return dict(kept)
    first = chain(parent)[0]
    model, _ = models.load(first.record.model) if first.record.kinds else first.load_model()
    evaluator.evaluate(model, remember="base")
    return evaluator.references["base"]


def _peak_mb() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        import resource
    except ImportError:  # not a POSIX system: nobody counts
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


COMMIT = records.git_commit()  # of the code that was imported, not of files edited since
