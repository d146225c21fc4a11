"""Sweeps: what is planned, what is shared, what is run again; and that nothing finished is lost, whatever happens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import sweep_kills
import yaml

from sftrl_utils import cli, engines, records, sweeps
from sftrl_utils.config import InputError

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SETUP = """from pathlib import Path
from sftrl_utils.config import RunConfig
config = RunConfig.from_parameters(globals())
with Path(out_dir, f"ran-{seed}").open("a") as ran:
    ran.write("once\\n")"""
TRAIN = 'from sftrl_utils import stages\nstages.train_stage(config, "sft")'


def notebook(path: Path, *code: str, pipelines=()) -> Path:
    """A notebook that counts its runs and then does `code`."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"sftrl": {"pipelines": list(pipelines)}, "kernelspec": kernel, "language_info": {"name": "python"}}
    made = nbformat.v4.new_notebook(metadata=metadata)
    parameters = nbformat.v4.new_code_cell('preset = "smoke"\nseed = 0\nbeta = None\nrl_steps = None\nout_dir = "runs"')
    parameters.metadata["tags"] = ["parameters"]
    made.cells = [parameters, *(nbformat.v4.new_code_cell(source) for source in (SETUP, *code))]
    nbformat.write(made, path)
    return path


def sweep_file(folder: Path, *code: str, pipelines=(), **content) -> Path:
    notebook(folder / "work.ipynb", *code, pipelines=pipelines)
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"notebook": "work.ipynb", "fixed": {"preset": "smoke"}, **content}))
    return file


def start(file: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "sftrl_utils.cli", "sweep", "run", str(file), "--dir", str(file.parent / "runs")]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(file: Path, *options: str) -> tuple[int, str]:
    process = start(file, *options)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed + errors


def planned(file: Path) -> sweeps.Plan:
    return sweeps.plan(file, file.parent / "runs")


def states(file: Path) -> dict[int, str]:
    """State of each cell by its seed."""
    plan = planned(file)
    found = sweeps.states(plan, sweeps.whole_stages(plan)[0])
    return {cell.parameters["seed"]: found[cell.name] for cell in plan.cells}


def times_run(file: Path, seed: int) -> int:
    path = file.parent / "runs" / f"ran-{seed}"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def until(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.1)


# The plan


def test_every_combination_and_every_point_is_a_cell_for_every_seed(tmp_path):
    file = sweep_file(tmp_path, grid={"beta": [0, 0.1], "rl_steps": [3, 4]}, points=[{"beta": 1}], seeds=[7, 9])
    cells = planned(file).cells
    assert len({cell.name for cell in cells}) == len(cells) == (2 * 2 + 1) * 2
    assert {(cell.config.beta, cell.config.rl_steps) for cell in cells} == {
        (0, 3), (0, 4), (0.1, 3), (0.1, 4), (1, 10),
    }  # fmt: skip
    assert all(cell.config.preset == "smoke" and cell.config.out_dir == tmp_path / "runs" for cell in cells)


def test_the_same_parameters_twice_are_one_cell(tmp_path):
    assert len(planned(sweep_file(tmp_path, grid={"beta": [0.1]}, points=[{"beta": 0.1}], seeds=2)).cells) == 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"grid": {"beta": []}}, "at least 1"),
        ({"grid": {"bata": [1]}}, "bata=1 is not a parameter"),
        ({"grid": {"beta": [-1]}}, "beta=-1"),
        ({"grid": {"preset": ["tiny"]}}, "preset is in fixed and in grid"),
        ({"grid": {"seed": [1]}}, "use seeds"),
        ({"points": [{"out_dir": "x"}]}, "use --dir"),
        ({"seeds": 0}, "seeds=0"),
        ({"notebook": "nowhere.ipynb"}, "nowhere.ipynb"),
        ({"notebooks": "work.ipynb"}, "notebooks="),
        ({"timeout_minutes": 0}, "timeout_minutes=0"),
    ],
)
def test_a_bad_sweep_file_is_one_line_and_nothing_is_made(tmp_path, capsys, content, named):
    file = sweep_file(tmp_path, **content)
    assert cli.main(["sweep", "run", str(file), "--dir", str(tmp_path / "runs")]) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["a: [", "just text", "", "\x00"])
def test_what_is_not_a_sweep_file_is_one_line(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        sweeps.read_sweep(tmp_path / "x.yaml")
    assert "x.yaml" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        sweeps.read_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["smoke", "coupling", "beta", "duration"])
def test_the_sweeps_that_ship_can_be_planned(name, tmp_path):
    plan = sweeps.plan(NOTEBOOKS / "sweeps" / f"{name}.yaml", tmp_path)
    assert len(plan.cells) == {"smoke": 24, "coupling": 40, "beta": 80, "duration": 60}[name]
    seeds = {cell.config.seed for cell in plan.cells}
    assert len(seeds) >= (6 if name == "smoke" else 10)
    assert all(cell.pipelines for cell in plan.cells)


def test_an_edit_runs_again_exactly_what_it_affects(tmp_path, monkeypatch):
    package = tmp_path / "package"
    shutil.copytree(Path(sweeps.__file__).parent, package, ignore=shutil.ignore_patterns("_*"))
    for module in (sweeps, sweeps.keys):
        monkeypatch.setattr(module, "__file__", str(package / "x.py"))
    file = sweep_file(tmp_path, "from sftrl_utils import figures", seeds=2)

    def names():
        return [cell.name for cell in planned(file).cells]

    before = names()

    def edit(name):
        with (package / name).open("a") as stream:
            stream.write("\nEDITED = True\n")

    edit("hub.py"), edit("engines.py")  # neither the notebook nor what it imports imports these
    assert names() == before
    made = nbformat.read(tmp_path / "work.ipynb", as_version=4)
    made.cells.append(nbformat.v4.new_markdown_cell("prose"))
    nbformat.write(made, tmp_path / "work.ipynb")
    assert names() == before
    edit("records.py")  # figures imports it
    after = names()
    assert not set(before) & set(after)
    notebook(tmp_path / "work.ipynb", "from sftrl_utils import figures", "1 + 1")
    assert not set(after) & set(names())


def test_another_corpus_or_lock_makes_other_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "__file__", str(tmp_path / "package" / "sweeps.py"))
    for name in ("corpora", "records"):
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / f"{name}.py").write_text("")
    rows = [f"x01\t{i % 2}\t{'' if i % 2 else '*'}\tSentence number {i}." for i in range(200)]
    for name in ("in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    file = sweep_file(tmp_path, grid={"corpus": [str(tmp_path)]})
    names = [planned(file).cells[0].name]
    (tmp_path / "in_domain_dev.tsv").write_text("\n".join(reversed(rows)) + "\n")
    names.append(planned(file).cells[0].name)
    (tmp_path / "requirements.lock").write_text("torch==0.0.1\n")
    names.append(planned(file).cells[0].name)
    assert len(set(names)) == 3 and planned(file).cells[0].name == names[-1]


PLAN = """
import psutil, sys, time
began = time.perf_counter()
from pathlib import Path
from sftrl_utils import sweeps
plan = sweeps.plan(Path(sys.argv[1]), Path("runs"))
sweeps.states(plan, sweeps.whole_stages(plan)[0])
assert sweeps.describe(plan).count("shared by") == 10_000
print(len(plan.cells), time.perf_counter() - began, psutil.Process().memory_info().rss / 2**20)
"""


def test_ten_thousand_cells_are_planned_in_seconds(tmp_path):
    grid = {"beta": [i / 50 for i in range(50)], "rl_steps": list(range(1, 21))}
    file = sweep_file(tmp_path, pipelines=["sft_then_rl"], grid=grid, seeds=10)
    printed = subprocess.run([sys.executable, "-c", PLAN, str(file)], check=True, capture_output=True, text=True).stdout
    cells, seconds, megabytes = map(float, printed.split())
    assert cells == 10_000 and seconds < 20 and megabytes < 500  # 4 s on a free machine; asked for: 10 s, 500 MB


@pytest.mark.parametrize(
    "code",
    ["%%bash\necho", "x = !ls", "x = %who_ls", "len?", 'print("%d"\n      % 3)', "import sftrl_utils.hub"],
)
def test_a_notebook_may_hold_magics(tmp_path, code):
    [cell] = planned(sweep_file(tmp_path, code)).cells
    assert ("hub" in cell.notebook.modules) == ("hub" in code)


def test_a_cell_that_is_not_python_is_one_line(tmp_path):
    with pytest.raises(InputError, match="work.ipynb.* holds a cell that is not Python"):
        planned(sweep_file(tmp_path, "this is no Python"))


def test_a_notebook_edited_meanwhile_runs_as_it_was_planned(tmp_path):
    file = sweep_file(tmp_path, 'print("as planned")')
    plan = planned(file)
    notebook(tmp_path / "work.ipynb", 'print("other")')
    assert engines.run(plan, engines.local(1), 1, {cell.name: {} for cell in plan.cells}) == 0
    executed = (plan.cells_folder / plan.cells[0].name / "notebook.ipynb").read_text()
    assert "as planned" in executed and "other" not in executed


def test_what_another_sweep_has_finished_meanwhile_is_kept(copied):
    plan = planned(copied)
    chosen = {cell.name: {} for cell in plan.cells}  # as if nothing had been there when they were chosen
    assert engines.run(plan, engines.local(2), 1, chosen) == 0
    assert (times_run(copied, 0), times_run(copied, 1)) == (1, 1)


def test_a_fault_about_one_cell_ends_no_other(tmp_path, capsys):
    plan = planned(sweep_file(tmp_path, seeds=3))

    def faulty(job, stopped):
        if job.cell.parameters["seed"] == 1:
            raise RuntimeError("no reason at all\nsecond line")
        return engines.run_job(job, stopped)

    engine = engines.Engine(faulty, lambda: 1)
    assert engines.run(plan, engine, 1, {cell.name: {} for cell in plan.cells}) == 1
    errors = capsys.readouterr().err
    assert "RuntimeError: no reason at all" in errors and "`sftrl sweep run" in errors and "retry" not in errors
    assert sorted(sweeps.states(plan, set()).values()) == ["finished", "finished", "waiting"]


def test_a_notebook_that_does_not_train_what_it_says_has_failed(tmp_path):
    status, printed = run(sweep_file(tmp_path, pipelines=["sft"]))
    assert status == 1 and "it did not train sft-" in printed


def test_retrying_what_never_ran_is_no_fault(tmp_path, capsys):
    file = sweep_file(tmp_path)
    assert cli.main(["sweep", "retry", "--failed", str(file), "--dir", str(tmp_path / "runs")]) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--engine", "ray", "--jobs", "2"], "--jobs=2"),
        (["--address", "auto"], "--engine ray"),
        (["--gpus", "1"], "--engine ray"),
    ],
)
def test_an_option_that_has_no_effect_is_refused(tmp_path, capsys, options, named):
    assert cli.main(["sweep", "run", str(sweep_file(tmp_path)), *options]) == 2
    assert named in capsys.readouterr().err


def test_cells_that_share_a_stage_are_started_apart(tmp_path):
    file = sweep_file(tmp_path, pipelines=["sft_then_rl"], grid={"beta": [0.1, 0.2, 0.3]}, seeds=4)
    cells = planned(file).cells
    assert {cell.config.seed for cell in cells[:4]} == {0, 1, 2, 3}  # each trains its own SFT stage
    first, second = cells[0], next(cell for cell in cells[1:] if cell.config.seed == cells[0].config.seed)
    plan = planned(file)
    # While the first trains their SFT stage the second is passed over; when it alone is left it is started.
    assert engines._next(plan, [second, cells[1]], [first]) is cells[1]
    assert engines._next(plan, [second], [first]) is second


def test_a_dry_run_lists_cells_and_what_they_share(tmp_path, capsys):
    file = sweep_file(tmp_path, pipelines=["sft_then_rl"], grid={"beta": [0.1, 0.2]}, seeds=1)
    assert cli.main(["sweep", "run", str(file), "--dir", str(tmp_path / "runs"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("shared by 2") == 2 and "beta=0.2" in printed
    assert "2 cells ask for 4 stages, 3 different ones, 0 of them in the store" in printed
    assert not (tmp_path / "runs").exists()


# Running


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished sweep of two cells that train one stage each."""
    file = sweep_file(tmp_path_factory.mktemp("trained"), TRAIN, pipelines=["sft"], seeds=2)
    settings = {"preset": "smoke", "model": "embedded", "sft_steps": 2, "evaluations": 1}
    file.write_text(yaml.safe_dump({"notebook": "work.ipynb", "fixed": settings, "seeds": 2}))
    status, printed = run(file)
    assert status == 0, printed
    return file


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished sweep, to do harm to."""
    shutil.copytree(trained.parent, tmp_path / "sweep")
    return tmp_path / "sweep" / trained.name


def test_a_sweep_leaves_a_table_with_a_row_for_each_cell_and_evaluation(trained):
    plan = planned(trained)
    table = pd.read_parquet(plan.results)
    assert set(table["cell"]) == {cell.name for cell in plan.cells} and len(table) == 2 * 2
    assert table.groupby("cell")["step"].apply(list).tolist() == [[0, 2]] * 2
    assert set(table["seed"]) == {0, 1} and set(table["sft_steps"]) == {2} and table["valid"].all()
    for row in table.itertuples():
        record = records.read_record((plan.store / row.record).parent)
        assert (record.stage, record.seed) == (row.stage, row.seed)
    assert {"sft_loss_dev", "mean_reward_dev", "mcc_heldout"} <= set(table)
    leftovers = [path for path in plan.folder.rglob("*.tmp*")]
    assert leftovers == [] and states(trained) == {0: "finished", 1: "finished"}


def test_an_executed_notebook_has_no_residue_of_progress_bars(trained):
    plan = planned(trained)
    for cell in plan.cells:
        content = (plan.cells_folder / cell.name / "notebook.ipynb").read_text()
        assert "step/s" not in content and "widget" not in content and len(content) < 20_000
        assert "step/s" in (plan.cells_folder / cell.name / "log.txt").read_text()  # there it may be read


def test_what_is_finished_is_not_run_again(copied):
    status, printed = run(copied)
    assert status == 0 and (times_run(copied, 0), times_run(copied, 1)) == (1, 1), printed


def test_papermill_by_hand_lands_in_the_same_table(trained, tmp_path):
    file = sweep_file(tmp_path, TRAIN, pipelines=["sft"])
    file.write_text(trained.read_text())
    plan = planned(file)
    plan.store.mkdir()
    given = {**plan.sweep.fixed, "seed": 1, "out_dir": plan.store}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", tmp_path / "work.ipynb", tmp_path / "out.ipynb", *words]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    mine = sweeps.results_table(plan)
    theirs = pd.read_parquet(planned(trained).results).query("seed == 1").reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, theirs, check_like=True)


@pytest.mark.parametrize("file", ["metrics.parquet", "model/model.safetensors"])
def test_a_damaged_stage_is_reported_and_trained_again_with_the_cells_that_need_it(copied, file):
    table, plan = pd.read_parquet(planned(copied).results), planned(copied)
    cell = next(cell for cell in plan.cells if cell.parameters["seed"] == 1)
    [stage] = cell.stages
    path = plan.store / stage / file
    path.write_bytes(path.read_bytes()[:-10] + bytes(10))
    assert states(copied) == {0: "finished", 1: "waiting"}
    status, printed = run(copied)
    assert status == 0 and f"{path} is damaged" in printed
    assert (times_run(copied, 0), times_run(copied, 1)) == (1, 2)
    pd.testing.assert_frame_equal(pd.read_parquet(plan.results), table)


def test_a_cell_that_raises_is_named_and_the_others_finish(tmp_path):
    code = 'if seed == 1 and not Path(out_dir, "mended").exists(): raise ValueError("seed 1!")'
    file = sweep_file(tmp_path, code, seeds=3)
    status, printed = run(file, "--jobs", "2")
    assert status == 1 and states(file) == {0: "finished", 1: "failed", 2: "finished"}
    failed = next(cell.name for cell in planned(file).cells if cell.parameters["seed"] == 1)
    assert f"FAILED {failed}: ValueError: seed 1!" in printed and "1 of 3 cells failed" in printed
    status, printed = run(file)  # a failed cell waits to be asked for
    assert status == 1 and failed in printed and times_run(file, 1) == 1
    (tmp_path / "runs" / "mended").touch()
    assert cli.main(["sweep", "retry", "--failed", str(file), "--dir", str(tmp_path / "runs")]) == 0
    assert [times_run(file, seed) for seed in range(3)] == [1, 2, 1] and set(states(file).values()) == {"finished"}


def test_a_cell_that_hangs_is_ended_with_its_kernel(tmp_path):
    file = sweep_file(tmp_path, "import time\nif seed == 0: time.sleep(600)", seeds=2, timeout_minutes=0.6)
    status, printed = run(file, "--jobs", "2")
    assert status == 1 and states(file) == {0: "failed", 1: "finished"}
    assert "it took longer than 0.6 minutes" in printed and processes_in(tmp_path) == []


def processes_in(folder: Path) -> list[psutil.Process]:
    """Cells and their kernels that work in `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if str(folder) in command or (process.cwd() == str(folder) and "ipykernel" in command):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def waits_in_seed_0(tmp_path) -> Path:
    code = 'import time\nwhile seed == 0 and not Path(out_dir, "go").exists(): time.sleep(0.1)'
    return sweep_file(tmp_path, code, seeds=3)


def test_a_killed_cell_has_failed_and_the_others_finish(tmp_path):
    file = waits_in_seed_0(tmp_path)
    process = start(file, "--jobs", "2")
    until(lambda: times_run(file, 0) and list(states(file).values()).count("finished") == 2)
    [cell] = [each for each in processes_in(tmp_path) if "sftrl_utils.cell" in each.cmdline()]
    cell.send_signal(signal.SIGKILL)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "killed by signal 9" in errors
    assert states(file) == {0: "failed", 1: "finished", 2: "finished"}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=["kill", "ctrl-c", "term"])
def test_a_sweep_that_is_ended_takes_its_cells_along_and_can_be_resumed(tmp_path, sent):
    file = waits_in_seed_0(tmp_path)
    process = start(file, "--jobs", "2")
    until(lambda: times_run(file, 0) and list(states(file).values()).count("finished") == 2)
    assert states(file)[0] == "running"
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if sent == signal.SIGKILL else 130)
    until(lambda: processes_in(tmp_path) == [], 20)
    assert states(file) == {0: "waiting", 1: "finished", 2: "finished"}
    (tmp_path / "runs" / "go").touch()
    assert run(file)[0] == 0 and [times_run(file, seed) for seed in range(3)] == [2, 1, 1]


def test_two_sweeps_on_one_store_run_each_cell_once(tmp_path):
    file = sweep_file(tmp_path, "import time\ntime.sleep(1)", seeds=3)
    both = [start(file, "--jobs", "2"), start(file, "--jobs", "2")]
    printed = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert [times_run(file, seed) for seed in range(3)] == [1, 1, 1]
    assert set(states(file).values()) == {"finished"}


def test_a_full_disk_loses_nothing_and_is_named(tmp_path):
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        fill = 'if seed == 1: Path(out_dir, "big").write_bytes(bytes(10**7))'
        file = sweep_file(tmp_path, fill, seeds=3)
        status, printed = run(file, "--jobs", "1")
        assert status == 1 and "No space left on device" in printed
        assert states(file)[0] == "finished" and states(file)[1] != "finished"
        (tmp_path / "runs" / "big").unlink()
        subprocess.run(["mount", "-o", "remount,size=40m", tmp_path], check=True)
        run(file)  # a cell that could leave nothing
        assert cli.main(["sweep", "retry", "--failed", str(file), "--dir", str(tmp_path / "runs")]) == 0
        assert set(states(file).values()) == {"finished"} and times_run(file, 0) == 1
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_sweep_survives_random_kills(trained, tmp_path):
    """The short form of `python tests/sweep_kills.py`."""
    file = sweep_file(tmp_path, TRAIN, pipelines=["sft"])
    file.write_text(trained.read_text())
    counts = sweep_kills.kill_and_resume(file, tmp_path / "runs", kills=3, longest_s=6.0, seed=0)
    assert counts["kills"] >= 1 and sweep_kills.unharmed(counts), counts
    tables = [pd.read_parquet(planned(each).results) for each in (file, trained)]
    pd.testing.assert_frame_equal(*tables)


# Ray


def test_ray_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = sweep_file(tmp_path)
    assert cli.main(["sweep", "run", str(file), "--dir", str(tmp_path / "runs"), "--engine", "ray"]) == 2
    assert "pip install 'sftrl_utils[ray]'" in capsys.readouterr().err


def test_a_cell_that_fits_no_machine_is_refused(tmp_path, capsys):
    file = sweep_file(tmp_path)
    assert (
        cli.main(["sweep", "run", str(file), "--dir", str(tmp_path / "runs"), "--engine", "ray", "--cpus", "999"]) == 2
    )
    assert "no machine of the cluster has as many" in capsys.readouterr().err


def test_ray_gives_the_same_table(trained, tmp_path):
    file = sweep_file(tmp_path, TRAIN, pipelines=["sft"])
    file.write_text(trained.read_text())
    status, printed = run(file, "--engine", "ray")
    assert status == 0, printed
    tables = [pd.read_parquet(planned(each).results) for each in (file, trained)]
    pd.testing.assert_frame_equal(*tables)


def test_a_cell_whose_ray_worker_is_killed_is_run_again(tmp_path):
    code = 'import time\nwhile seed == 0 and not Path(out_dir, "go").exists(): time.sleep(0.1)'
    file = sweep_file(tmp_path, code, seeds=2)
    process = start(file, "--engine", "ray")
    until(lambda: times_run(file, 0))
    [cell] = [each for each in processes_in(tmp_path) if "sftrl_utils.cell" in each.cmdline() and spec_seed(each) == 0]
    cell.parent().send_signal(signal.SIGKILL)  # the worker
    until(lambda: times_run(file, 0) == 2)
    (tmp_path / "runs" / "go").touch()
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert set(states(file).values()) == {"finished"} and times_run(file, 1) == 1


def spec_seed(process: psutil.Process) -> int:
    return json.loads(Path(process.cmdline()[-1], "cell.json").read_text())["parameters"]["seed"]
