"""Every notebook through papermill, and what each leaves behind."""

import json
import re
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import code_cells, papermill
from IPython.core.inputtransformer2 import TransformerManager

import sftrl_utils
from sftrl_utils import records, statements, sweeps

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
LEAVES = {
    "01_theory": set(),
    "02_sft": {"sft"},
    "03_grpo": {"grpo"},
    "04_sft_then_rl": {"sft", "sft_then_rl", "sft_then_sft", "sft_then_constant_rl"},
    "05_rl_then_sft": {"grpo", "rl_then_sft", "rl_then_rl", "constant_rl"},
    "06_joint": {"joint", "interleaved", "sft", "sft_then_rl", "sft_then_rl_merged"},
    "07_analysis": set(),
    "08_costs": set(),
    "09_pretrained": set(),
    "10_sweeps": set(),
}
PARAMETERS = {
    "label": {"preset": "smoke", "model": "embedded", "seed": 1},
    "rationale": {"preset": "smoke", "response_style": "rationale", "beta": 0.05, "group_size": 2, "seed": 2},
}


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Every notebook of training at every set of parameters: one folder a set, which its notebooks share in order."""

    @cache
    def execute(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, {path.stem: papermill(path, folder, PARAMETERS[name]) for path in NOTEBOOKS.values()}

    return execute


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("notebook", LEAVES)
def test_a_notebook_runs_from_any_folder_and_leaves_its_stages(notebook, name, executed):
    parameters, (folder, runs) = PARAMETERS[name], executed(name)
    output, run = runs[notebook]
    assert run.returncode == 0, run.stderr[-2000:]
    store = folder / "runs"
    rows = [row for row in json.loads(records.runs_json(store)) if row["pipeline"] in LEAVES[notebook]]
    assert {row["pipeline"] for row in rows} == LEAVES[notebook]
    for row in rows:
        assert row["preset"] == "smoke" and row["seed"] == parameters["seed"]
        assert row["beta"] == (0.0 if row["pipeline"] in {"sft", "sft_then_sft"} else parameters.get("beta", 0.0))
        assert row["response_style"] == parameters.get("response_style", "label")
        metrics = records.read_metrics(store / row["stage"])
        last = {"interleaved": 20, "sft_then_rl_merged": 1}.get(row["pipeline"], 10)
        last = 5 if "constant" in row["pipeline"] else last
        assert metrics["step"].iloc[-1] == last and metrics["sft_loss_dev"].notna().all()
        assert (store / row["stage"] / "model" / "model.safetensors").is_file()
    cells = code_cells(output)
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    pictures = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 1


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("notebook", LEAVES)
def test_a_sweep_knows_beforehand_which_stages_a_notebook_leaves(notebook, name, executed, tmp_path):
    fixed = {key: value for key, value in PARAMETERS[name].items() if key != "seed"}
    content = {"notebook": str(NOTEBOOKS[notebook]), "fixed": fixed, "seeds": [PARAMETERS[name]["seed"]]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    store = executed(name)[0] / "runs"
    [cell] = sweeps.plan(tmp_path / "sweep.yaml", store).cells
    rows = json.loads(records.runs_json(store))
    # The control with a constant reward runs fewer steps than the cell is asked for.
    pipelines = {pipeline for pipeline in LEAVES[notebook] if "constant" not in pipeline}
    assert cell.stages == {row["stage"] for row in rows if row["pipeline"] in pipelines}


def test_every_statement_has_its_check_and_every_check_holds(executed):
    output, _ = executed("label")[1]["01_theory"]
    cells = nbformat.read(output, as_version=4).cells
    prose = "".join(cell.source for cell in cells if cell.cell_type == "markdown")
    labels = re.findall(r":::\{prf:(?:theorem|corollary|proposition)\}.*\n:label: (.*)", prose)
    names = [statement.__name__ for statement in statements.STATEMENTS]
    assert [label.replace("-", "_") for label in labels] == names
    assert len(re.findall(r":::\{prf:proof\}", prose)) == len(labels)
    code = "".join(cell.source for cell in cells if cell.cell_type == "code")
    assert all(f"statements.{name})" in code for name in names)
    assert any("all hold: True" in out.get("text", "") for cell in cells for out in cell.get("outputs", []))


def test_a_notebook_loads_what_another_one_trained(executed):
    folder, _ = executed("label")
    # Two first stages, two second ones and the control of 04: 04 and 05 did not train their first ones again.
    pipelines = sorted(records.runs_table(folder / "runs")["pipeline"])
    assert pipelines == sorted(set().union(*LEAVES.values()))


def test_a_notebook_run_again_from_an_empty_store_gives_identical_metrics(executed, tmp_path):
    folder, _ = executed("label")
    _, run = papermill(NOTEBOOKS["04_sft_then_rl"], tmp_path, PARAMETERS["label"])
    assert run.returncode == 0, run.stderr[-2000:]
    again = records.finished_stages(tmp_path / "runs")
    assert len(again) == 4
    for stage in again:
        first = records.read_metrics(folder / "runs" / stage.name)
        pd.testing.assert_frame_equal(records.read_metrics(stage), first, check_exact=True)


def test_the_first_cell_installs_this_version_where_there_is_none():
    first = code_cells(NOTEBOOKS["01_theory"])[0].source
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    asked = []

    class Shell:
        def run_line_magic(self, name, line, **_):
            asked.append((name, line))

    code = TransformerManager().transform_cell(first).replace("import sftrl_utils", "import sftrl_utils_is_not_there")
    exec(code, {"get_ipython": Shell})
    assert asked == [("pip", f'install --quiet "sftrl_utils @ git+{repository}@v{sftrl_utils.__version__}"')]
    asked.clear()
    exec(TransformerManager().transform_cell(first), {"get_ipython": Shell})
    assert asked == []


@pytest.mark.parametrize("notebook", LEAVES)
def test_the_source_is_clean_and_short(notebook):
    cells = code_cells(NOTEBOOKS[notebook])
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in cells if cell is not parameters) <= 12
    # The first cell, and the names of the parameters with their order, are the same everywhere.
    assert [cells[0].source, parameters.source] == [cell.source for cell in code_cells(NOTEBOOKS["01_theory"])[:2]]
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert names == [
        *("preset", "model", "corpus", "response_style", "seed", "beta", "sft_steps", "rl_steps"),
        *("sft_learning_rate", "rl_learning_rate", "batch_size", "group_size", "loss_type", "out_dir"),
    ]
