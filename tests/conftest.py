"""Shared fixtures: one store of small trained stages, made once for the whole session."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers share two cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub

import check_book  # the script beside this file
import nbformat
import pandas as pd
import pytest

from sftrl_utils import models, records, stages
from sftrl_utils.config import PRESETS, RunConfig

SMALL = {"preset": "smoke", "model": "embedded", "dev_sentences": 40, "sft_steps": 10, "rl_steps": 10}


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory) -> Path:
    """One folder for all test workers: the store's own locks keep a stage from being trained twice."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    return shared / "store"


@pytest.fixture(scope="session")
def small_config(shared_store) -> RunConfig:
    """Ten updates of the shipped base model on 200 sentences."""
    return RunConfig.from_parameters({**SMALL, "out_dir": str(shared_store)})


@pytest.fixture(scope="session")
def embedded():
    """The shipped base model and its tokenizer; tests must not change them."""
    return models.load("embedded")


@pytest.fixture(scope="session")
def sft_then_rl(small_config):
    return stages.train_pipeline(small_config, "sft_then_rl")


@pytest.fixture(scope="session")
def rl_then_sft(small_config):
    return stages.train_pipeline(small_config, "rl_then_sft")


@pytest.fixture(scope="session")
def browser() -> str:
    """A Chromium. Where continuous integration lacks one its browser tests fail, they are not skipped."""
    path = check_book.browser_path()
    if not path and not os.environ.get("CI"):
        pytest.skip("needs a Chromium: on Debian, apt-get install chromium")
    assert path, "no Chromium: .ci/run installs one"
    return path


@pytest.fixture(scope="session")
def cola_dir() -> Path:
    folder = os.environ.get("SFTRL_COLA_DIR")
    if not folder:
        pytest.skip("needs CoLA's public TSV files: set SFTRL_COLA_DIR to their folder")
    return Path(folder)


def papermill(notebook, folder, parameters, **options):
    """Run papermill as a user does: its command line, from `folder`."""
    output = folder / f"{notebook.stem}.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    return output, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, **options)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def publish_stage(store, seed, kinds, values, parent="base", beta=0.0, answers=None, report=None, **settings):
    """A published stage with metrics (a column each, a row an evaluation), answers, report and settings as given."""
    name = f"{kinds[-1]}-{'-'.join(kinds)}-{seed}-{beta}" + "".join(f"-{value}" for value in settings.values())
    record = records.RunRecord(
        stage=name, kind=kinds[-1], parent=parent, kinds=kinds, preset="tiny", model="embedded", corpus="graded",
        seed=seed, beta=beta, config={**PRESETS["tiny"], "preset": "tiny", "seed": seed, "beta": beta, **settings},
        key={"code": "x"}, versions={}, git_commit="", device="cpu", started="", wall_s=1.0, trainer_config={},
        trainer_differences={}, gates={},
    )  # fmt: skip
    folder = store / name
    folder.mkdir(parents=True)
    table = pd.DataFrame(values)
    (table if "step" in table else table.rename_axis("step").reset_index()).to_parquet(folder / "metrics.parquet")
    report = report or {("end", "mcc"): 0.0}
    rows = [{"point": point, "metric": metric, "value": value} for (point, metric), value in report.items()]
    pd.DataFrame(rows).to_parquet(folder / "report.parquet")
    if answers is not None:
        answers.to_parquet(folder / "answers.parquet")
    (folder / "record.json").write_text(record.model_dump_json())
    records.write_checksums(folder)
    return name
