"""The package installed away from the checkout carries what it needs to run a notebook."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

import sftrl_utils

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Python of a new environment that holds our wheel; dependencies come from this environment's packages.

    Its site-packages are appended by path, so that no editable install of the checkout is followed.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    venv.create(folder / "env", with_pip=False)
    [wheel] = folder.glob("*.whl")
    [site] = (folder / "env").glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env" / "bin" / "python"


def run(python, *arguments, cwd):
    return subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)


def test_it_is_imported_from_the_wheel_and_carries_its_data(installed, tmp_path):
    script = """
import json, sftrl_utils
from sftrl_utils import claims, config, effects, records, sources
assert len(claims.read_ledger(claims.ledger_file())) >= 14
print(json.dumps([sftrl_utils.__file__, str(sources.base_dir()), list(config.PRESETS),
                  len(records.finished_stages(effects.published_results()))]))
"""
    result = run(installed, "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    file, base, presets, published = json.loads(result.stdout)
    for path in (file, base):
        assert path.startswith(str(installed.parent.parent)) and not path.startswith(str(ROOT))
    assert (Path(base) / "model.safetensors").is_file() and "paper" in presets and published >= 20


def test_a_notebook_runs_from_another_folder(installed, tmp_path):
    shutil.copy(ROOT / "notebooks" / "04_sft_then_rl.ipynb", tmp_path)
    kernels = tmp_path / "kernels" / "kernels" / "wheel"
    kernels.mkdir(parents=True)
    spec = {"argv": [str(installed), "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "wheel"}
    (kernels / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    command = ["env", f"JUPYTER_PATH={tmp_path / 'kernels'}", sys.executable, "-m", "papermill", "-k", "wheel"]
    parameters = ["-p", "preset", "smoke", "-p", "seed", "1"]
    result = subprocess.run(
        [*command, "04_sft_then_rl.ipynb", "out.ipynb", *parameters],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    listed = run(installed, "-m", "sftrl_utils.cli", "runs", "--json", cwd=tmp_path)
    trained = {"sft", "sft_then_rl", "sft_then_sft", "sft_then_constant_rl"}
    assert {row["pipeline"] for row in json.loads(listed.stdout)} == trained


@pytest.mark.slow
def test_the_first_cell_installs_everything_where_there_is_only_jupyter(tmp_path):
    """As in Colab or on a hub: a new environment, the notebook alone, and the repository behind its address."""
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    subprocess.run([programs / "pip", "install", "-q", "--disable-pip-version-check", "jupyter"], check=True)
    assert run(programs / "python", "-c", "import myst_nb", cwd=tmp_path).returncode
    subprocess.run(["git", "clone", "-q", "--bare", ROOT, tmp_path / "repository"], check=True)
    tag = ["tag", "-f", f"v{sftrl_utils.__version__}"]
    subprocess.run(["git", "-C", tmp_path / "repository", *tag], check=True)
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    redirected = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{tmp_path / 'repository'}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    shutil.copy(ROOT / "notebooks" / "10_sweeps.ipynb", tmp_path)
    command = [programs / "jupyter", "execute", "--inplace", "--timeout=-1", "10_sweeps.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | redirected, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    where = run(programs / "python", "-c", "import sftrl_utils; print(sftrl_utils.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(programs.parent))
