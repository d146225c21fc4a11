"""Executed notebooks for the book: run them once, and stage the executed copies into its pages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
import yaml
from nbformat import NotebookNode

from sftrl_utils.config import InputError, RunConfig, data_dir
from sftrl_utils.records import versions

EXECUTED = Path("_build/executed")
WIDGET = "application/vnd.jupyter.widget-view+json"
_STALE_METADATA = ("papermill", "execution", "widgets")


def notebooks(root: Path) -> list[Path]:
    """The book's notebooks in reading order, from `_toc.yml`. Raises `InputError` outside a checkout."""
    toc = root / "_toc.yml"
    if not toc.is_file():
        raise InputError(f"{str(root)!r} holds no _toc.yml: run this from the book's own folder")
    contents = yaml.safe_load(toc.read_text(encoding="utf-8"))
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    files = [root / f"{chapter['file']}.ipynb" for chapter in chapters]
    return [path for path in files if path.parent.name == "notebooks" and path.is_file()]


def execute(preset: str, root: Path = Path(".")) -> list[Path]:
    """Run every notebook of the book at `preset` whose executed copy is missing or out of date.

    A copy is written under another name and renamed when whole, with a run record beside it. Raises
    `InputError` naming the notebook and the last line of its error; other copies stay as they were.
    """
    copies = []
    for source in notebooks(root):
        copy = root / EXECUTED / preset / source.name
        key = notebook_key(source, preset, root)
        if copy.is_file() and read_run(copy).get("key") == key:
            print(f"{source.stem}: up to date", flush=True)
        else:
            _execute_one(source, copy, key, preset, root)
        copies.append(copy)
    return copies


def _execute_one(source: Path, copy: Path, key: str, preset: str, root: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished = copy.with_suffix(".unfinished.ipynb")
    clock = time.perf_counter()
    try:
        with copy.with_suffix(".log").open("w", encoding="utf-8") as log:
            run_notebook(source, unfinished, {"preset": preset}, root, log, progress_bar={"desc": source.stem})
    except papermill.PapermillExecutionError as error:
        reason = (str(error.evalue).splitlines() or ["no message"])[0]
        raise InputError(f"{source.name}: {error.ename}: {reason} (the run so far: {unfinished})") from None
    except RuntimeError as error:  # nbclient's DeadKernelError among them
        raise InputError(f"{source.name}: its kernel died or did not start: {error}") from None
    run = {
        "key": key,
        "preset": preset,
        "seed": RunConfig.from_parameters({"preset": preset}).seed,
        "date": datetime.now(UTC).date().isoformat(),
        "wall_s": round(time.perf_counter() - clock, 1),
        "device": _device(),
        "versions": versions(),
    }
    unfinished.replace(copy)
    _record_path(copy).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def run_notebook(
    source: Path, output: Path, parameters: dict[str, Any], folder: Path, log: TextIO, progress_bar: Any = False
) -> None:
    """Execute `source` with `parameters` in a kernel of its own, in `folder`; what its cells print goes to `log`.

    Raises what papermill raises: `PapermillExecutionError` for a cell, `RuntimeError` for a kernel.
    """
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                source, output, parameters, kernel_name="python3", cwd=folder,
                progress_bar=progress_bar, stdout_file=log, stderr_file=log,
            )  # fmt: skip
            return
        except RuntimeError:  # a kernel that died before it was ready, e.g. over a port: once more
            if attempt == 2:
                raise


def _device() -> str:
    import torch  # here, since only a notebook that has just run needs it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def notebook_key(source: Path, preset: str, root: Path) -> str:
    """Hash of all that an executed copy depends on: code cells, preset, package, shipped data, lock, ledger."""
    digest = hashlib.sha256(f"{preset}\n{json.dumps(code_cells(nbformat.read(source, as_version=4)))}".encode())
    package = sorted(Path(__file__).parent.glob("*.py"))
    shipped = sorted(path for name in ("base", "results") for path in (data_dir() / name).rglob("*"))
    others = [root / "requirements.lock", root / "book" / "claims.yml"]
    for path in filter(Path.is_file, [*package, *shipped, *others]):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def code_cells(notebook: NotebookNode) -> list[tuple[str, str]]:
    """Id and source of each code cell that a person wrote (papermill's injected one left out)."""
    return [
        (cell.id, cell.source)
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def read_run(copy: Path) -> dict[str, Any]:
    """The run record beside an executed copy; empty if there is none, or only half of one."""
    try:
        return json.loads(_record_path(copy).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _record_path(copy: Path) -> Path:
    return copy.with_suffix(".json")


def build(preset: str, root: Path = Path("."), builder: str = "html") -> Path:
    """Build the book from the executed copies of `preset`; a warning is an error. Returns its first page.

    `builder` is `html`, or `singlehtml` for one page of everything. Raises `InputError` if the book does not build.
    """
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--path-output", ".", "--builder", builder]
    command += ["-W", "-n", "--keep-going", "-q"]
    environment = {**os.environ, "SFTRL_EXECUTED": str(EXECUTED / preset)}
    built = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if built.returncode:
        print(built.stderr, file=sys.stderr)
        # The next build must read every page again, or it would pass for want of the warnings of this one.
        shutil.rmtree(root / "_build" / ".doctrees", ignore_errors=True)
        raise InputError("the book did not build: the warnings above say where")
    return root / "_build" / builder / "index.html"


def staged_notebook(source: NotebookNode, executed: NotebookNode, run: dict[str, Any], root: Path) -> NotebookNode:
    """The page of a notebook: markdown and metadata from `source`, code and outputs from `executed`.

    Adds a "last run" line after the title, hides papermill's parameters cell, drops what papermill and
    widgets left in the metadata, and makes paths under `root` relative. Raises `ValueError` if the copy's
    code is not the source's or if it holds an error.
    """
    if code_cells(source) != code_cells(executed):
        raise ValueError("its executed copy was made from other code")
    outputs = [output for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        raise ValueError("its executed copy holds an error")
    ran = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}
    page = nbformat.v4.new_notebook(metadata=source.metadata)
    for cell in source.cells:
        if cell.cell_type == "code":
            ran[cell.id].metadata = cell.metadata  # captions and tags, like prose, need no new run
        page.cells.append(cleaned(ran[cell.id], root) if cell.cell_type == "code" else cell)
        if len(page.cells) == 1 and run:
            page.cells.append(nbformat.v4.new_markdown_cell(last_run_line(run), id="last-run"))
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    for cell in injected:
        place = next(i for i, c in enumerate(page.cells) if "parameters" in c.metadata.get("tags", [])) + 1
        cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
        page.cells.insert(place, cleaned(cell, root))
    return page


def last_run_line(run: dict[str, Any]) -> str:
    """One line of Markdown: when, how and with what the page was computed."""
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    settings = f"preset `{run['preset']}`, seed {run['seed']}"
    return f"*Last run {run['date']}: {settings}, {run['wall_s']:.0f} s on {run['device']}; {packages}.*"


def cleaned(cell: NotebookNode, root: Path) -> NotebookNode:
    """`cell` without what papermill and widgets left in it, paths under `root` made relative; changed in place."""
    for name in _STALE_METADATA:
        cell.metadata.pop(name, None)
    prefix = str(root.resolve()) + os.sep
    # A widget without its state shows nothing, and its page would load scripts from elsewhere.
    cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    for output in cell.outputs:
        for name in _STALE_METADATA:
            output.get("metadata", {}).pop(name, None)
        if "text" in output:
            output.text = output.text.replace(prefix, "")
        for mime, value in output.get("data", {}).items():
            if isinstance(value, str) and mime.startswith("text/"):
                output.data[mime] = value.replace(prefix, "")
    return cell
