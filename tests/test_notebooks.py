"""Every notebook through papermill, and what each leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from sftrl_utils import records

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("0*.ipynb"))
LEAVES = {
    "02_sft": {"sft"},
    "03_grpo": {"grpo"},
    "04_sft_then_rl": {"sft", "sft_then_rl"},
    "05_rl_then_sft": {"grpo", "rl_then_sft"},
}
PARAMETERS = {
    "label": {"preset": "smoke", "model": "embedded", "seed": 1},
    "rationale": {"preset": "smoke", "response_style": "rationale", "beta": 0.05, "group_size": 2, "seed": 2},
}


def papermill(notebook, folder, parameters, **options):
    """Run papermill as a user does: its command line, from `folder`."""
    output = folder / f"{notebook.stem}.ipynb"
    command = [sys.executable, "-m", "papermill", str(notebook), str(output), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    return output, subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, **options)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebook_runs_from_any_folder_and_leaves_its_stages(notebook, name, tmp_path):
    parameters = PARAMETERS[name]
    output, run = papermill(notebook, tmp_path, parameters)
    assert run.returncode == 0, run.stderr[-2000:]
    store = tmp_path / "runs"
    rows = json.loads(records.runs_json(store))
    assert {row["pipeline"] for row in rows} == LEAVES[notebook.stem]
    for row in rows:
        assert row["preset"] == "smoke" and row["seed"] == parameters["seed"]
        assert row["beta"] == (0.0 if row["pipeline"] == "sft" else parameters.get("beta", 0.0))
        assert row["response_style"] == parameters.get("response_style", "label")
        metrics = records.read_metrics(store / row["stage"])
        assert metrics["step"].iloc[-1] == 10 and metrics["sft_loss_dev"].notna().all()
        assert (store / row["stage"] / "model" / "model.safetensors").is_file()
    cells = code_cells(output)
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 1


def test_the_second_notebook_loads_what_the_first_one_trained_and_a_rerun_is_identical(tmp_path):
    first, second = (next(path for path in NOTEBOOKS if path.stem == stem) for stem in ("02_sft", "04_sft_then_rl"))
    stores = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        assert papermill(first, folder, PARAMETERS["label"])[1].returncode == 0
        stores += records.finished_stages(folder / "runs")
    one, two = stores
    assert one.name == two.name
    pd.testing.assert_frame_equal(records.read_metrics(one), records.read_metrics(two), check_exact=True)
    before = (one / "record.json").stat().st_mtime_ns
    assert papermill(second, tmp_path / "one", PARAMETERS["label"])[1].returncode == 0
    assert (one / "record.json").stat().st_mtime_ns == before
    assert len(records.finished_stages(tmp_path / "one" / "runs")) == 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"preset": "huge"}, "preset='huge' does not exist: choose one of smoke, tiny"),
        ({"preset": "smoke", "bata": 1}, "bata=1 is not a parameter"),
        ({"preset": "smoke", "beta": -1}, "beta=-1: input should be greater than or equal to 0"),
        ({"preset": "smoke", "model": "./nowhere"}, "model='./nowhere' is neither"),
        ({"preset": "smoke", "corpus": "nowhere"}, "corpus='nowhere' is neither"),
        ({"preset": "smoke", "out_dir": "/dev/null/runs"}, "out_dir='/dev/null/runs' cannot be written to"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_bad_input_ends_a_notebook_with_one_line_before_training(parameters, message, tmp_path):
    output, run = papermill(NOTEBOOKS[0], tmp_path, parameters)
    assert run.returncode != 0
    [error] = [out for cell in code_cells(output) for out in cell.outputs if out.output_type == "error"]
    assert error.ename == "InputError" and message in error.evalue
    assert error.traceback == [f"InputError: {error.evalue}"] and "\n" not in error.evalue
    assert not (tmp_path / "runs").exists() or records.finished_stages(tmp_path / "runs") == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_source_is_clean_and_short(notebook):
    cells = code_cells(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in cells if cell is not parameters) <= 12
    first = code_cells(NOTEBOOKS[0])[0]
    assert parameters.source == first.source  # the same names, in the same order, everywhere
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert names == [
        *("preset", "model", "corpus", "response_style", "seed", "beta", "sft_steps", "rl_steps"),
        *("sft_learning_rate", "rl_learning_rate", "batch_size", "group_size", "loss_type", "out_dir"),
    ]


def test_no_notebook_is_missing():
    assert {path.stem for path in NOTEBOOKS} >= set(LEAVES)
