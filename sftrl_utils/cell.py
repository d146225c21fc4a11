"""One cell of a sweep, in a process of its own that ends with the one that started it: `python -m sftrl_utils.cell`."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import nbformat
import papermill
import psutil

from sftrl_utils import publishing

SPEC, NOTEBOOK = "cell.json", "notebook.ipynb"


def main(folder: Path) -> int:
    """Run the notebook that `cell.json` in `folder` names, with its parameters, into `notebook.ipynb` beside it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    output = folder / NOTEBOOK
    try:
        publishing.run_notebook(Path(spec["notebook"]), output, spec["parameters"], Path("."), sys.stdout)
    except papermill.PapermillExecutionError as error:
        print(f"{error.ename}: {error.evalue}", flush=True)
        return 1
    _shrink(output)
    return 0


def _end_with_parent() -> None:
    """Wait until whoever holds the other end of standard input is gone, then end this process and its kernel."""
    os.read(0, 1)  # nobody writes there; not sys.stdin, whose lock would outlast the interpreter
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def _shrink(path: Path) -> None:
    """Drop what progress bars and widgets leave in an executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            publishing.cleaned(cell, Path("."))
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
    nbformat.write(notebook, path)


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr" and "\r" in output.text


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
