"""Sphinx extension: a notebook's page shows its executed copy, while links keep pointing at the source.

When Sphinx reads `notebooks/X.ipynb` its text is replaced by the copy that `sftrl book` executed, found
in the folder named by the environment variable SFTRL_EXECUTED; another folder means that every page is
read again. A missing, outdated or failed copy ends the build. The download button offers both.
"""

import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from sftrl_utils import publishing

GLUED_FROM = re.compile(r"notebooks/(\w+\.ipynb)")


def staged(app: Sphinx, docname: str, text: str) -> NotebookNode:
    """The page of a notebook whose source is `text`. Raises `ExtensionError` if its executed copy cannot be used."""
    root = Path(app.srcdir)
    copy = root / app.config.executed_notebooks / f"{Path(docname).name}.ipynb"
    if not copy.is_file():
        raise ExtensionError(f"{docname}: {copy} is missing: run `sftrl book`")
    try:
        return publishing.staged_notebook(
            nbformat.reads(text, as_version=4), nbformat.read(copy, as_version=4), publishing.read_run(copy), root
        )
    except ValueError as error:
        raise ExtensionError(f"{docname}: {error}: run `sftrl book`") from error


def stage(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace a notebook's text by its page; make a page that glues from notebooks depend on their copies."""
    folder = Path(app.srcdir) / app.config.executed_notebooks
    source = Path(app.env.doc2path(docname))
    if source.suffix == ".ipynb":
        content[0] = nbformat.writes(staged(app, docname, content[0]))
        app.env.note_dependency(str(folder / source.name))
    else:
        for name in set(GLUED_FROM.findall(content[0])):
            app.env.note_dependency(str(folder / name))


def offer_executed(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Put the executed notebook beside the built page, as that has it, and a link to it under the download button."""
    source = Path(app.srcdir, f"{pagename}.ipynb")
    buttons = [button for button in context.get("header_buttons", []) if button["label"] == "download-buttons"]
    if not (source.is_file() and buttons):
        return
    executed = Path("_executed", source.name)
    target = Path(app.outdir) / executed
    target.parent.mkdir(exist_ok=True)
    nbformat.write(staged(app, pagename, source.read_text(encoding="utf-8")), target)
    link = {"type": "link", "url": context["pathto"](executed.as_posix(), 1), "text": ".ipynb, executed"}
    link |= {"tooltip": "Download the notebook with its outputs", "icon": "fas fa-file-circle-check"}
    buttons[0]["buttons"].insert(1, link | {"label": "download-executed-button"})


def setup(app: Sphinx) -> dict[str, bool]:
    folder = os.environ.get("SFTRL_EXECUTED", str(publishing.EXECUTED / "tiny"))
    app.add_config_value("executed_notebooks", folder, "env")
    app.connect("source-read", stage)
    app.connect("html-page-context", offer_executed, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
