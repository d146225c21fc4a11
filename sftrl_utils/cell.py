"""One cell of a sweep, in a process of its own that ends with the one that started it: `python -m sftrl_utils.cell`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

import nbformat
import papermill
import psutil

from sftrl_utils import keys, publishing

SPEC, SOURCE, NOTEBOOK, REASON = "cell.json", "source.ipynb", "notebook.ipynb", "reason.txt"


def main(folder: Path) -> int:
    """Run `source.ipynb` in `folder` with the parameters of `cell.json` there, into `notebook.ipynb` beside it.

    If it fails, `reason.txt` says why in one line.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    reason = ""
    try:
        publishing.run_notebook(folder / SOURCE, folder / NOTEBOOK, spec["parameters"], Path("."), sys.stdout)
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {(str(error.evalue).splitlines() or ['no message'])[0]}"
    if keys.code_fingerprint(spec["modules"]) != spec["code"]:
        reason = "the package was edited after the sweep began: start it again"
    if (folder / NOTEBOOK).is_file():
        _shrink(folder / NOTEBOOK)
    if reason:
        print(f"\n{reason}", flush=True)
        (folder / REASON).write_text(reason, encoding="utf-8")
    return 1 if reason else 0


def _end_with_parent() -> None:
    """Wait until whoever holds the other end of standard input is gone, then end this process and its kernel."""
    try:
        os.read(0, 1)  # nobody writes there; not sys.stdin, whose lock would outlast the interpreter
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    finally:
        os._exit(1)


def _shrink(path: Path) -> None:
    """Drop what progress bars and widgets leave in an executed notebook."""
    notebook = nbformat.read(path, as_version=4)
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            publishing.cleaned(cell, Path("."))
            for output in cell.outputs:
                if output.get("name") == "stderr":  # a bar is drawn over itself with carriage returns
                    lines = output.text.split("\n")
                    output.text = "\n".join(line for line in lines if "\r" not in line and "%|" not in line)
            cell.outputs = [output for output in cell.outputs if output.get("text", "kept").strip()]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
