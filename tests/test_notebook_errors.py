"""Bad input ends a notebook with one line, before anything is trained."""

from pathlib import Path

import pytest
from conftest import code_cells, papermill

from sftrl_utils import records

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "02_sft.ipynb"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [  # a wrong setting, a missing file, a wrong folder: other values of each in test_config and test_stages
        ({"preset": "smoke", "bata": 1}, "bata=1 is not a parameter"),
        ({"preset": "smoke", "model": "./nowhere"}, "model='./nowhere' is neither"),
        ({"preset": "smoke", "out_dir": "/dev/null/runs"}, "out_dir='/dev/null/runs' cannot be written to"),
    ],
    ids=["setting", "model", "folder"],
)
def test_bad_input_ends_a_notebook_with_one_line_before_training(parameters, message, tmp_path):
    output, run = papermill(NOTEBOOK, tmp_path, parameters)
    assert run.returncode != 0
    [error] = [out for cell in code_cells(output) for out in cell.outputs if out.output_type == "error"]
    assert error.ename == "InputError" and message in error.evalue
    assert error.traceback == [f"InputError: {error.evalue}"] and "\n" not in error.evalue
    assert not (tmp_path / "runs").exists() or records.finished_stages(tmp_path / "runs") == []
