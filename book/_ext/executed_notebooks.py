"""Sphinx extension: a notebook's page shows its executed copy, while links keep pointing at the source.

When Sphinx reads `notebooks/X.ipynb` its text is replaced by the copy that `sftrl book` executed, found
in the folder named by the environment variable SFTRL_EXECUTED; another folder means that every page is
read again. A missing, outdated or failed copy ends the build. The download button offers both.
"""

import os
import re
from pathlib import Path

import nbformat
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from sftrl_utils import publishing

GLUED_FROM = re.compile(r"notebooks/(\w+\.ipynb)")


def stage(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace a notebook's text by its page; make a page that glues from notebooks depend on their copies."""
    root = Path(app.srcdir)
    folder = root / app.config.executed_notebooks
    source = Path(app.env.doc2path(docname))
    if source.suffix != ".ipynb":
        for name in set(GLUED_FROM.findall(content[0])):
            app.env.note_dependency(str(folder / name))
        return
    copy = folder / source.name
    if not copy.is_file():
        raise ExtensionError(f"{docname}: {copy} is missing: run `sftrl book`")
    try:
        executed = nbformat.read(copy, as_version=4)
        page = publishing.staged_notebook(
            nbformat.reads(content[0], as_version=4), executed, publishing.read_run(copy), root
        )
    except ValueError as error:
        raise ExtensionError(f"{docname}: {error}: run `sftrl book`") from error
    app.env.note_dependency(str(copy))
    content[0] = nbformat.writes(page)


def offer_executed(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Put the executed copy beside the built page, and a link to it under the download button."""
    copy = Path(app.srcdir) / app.config.executed_notebooks / f"{Path(pagename).name}.ipynb"
    buttons = [button for button in context.get("header_buttons", []) if button["label"] == "download-buttons"]
    if not (pagename.startswith("notebooks/") and copy.is_file() and buttons):
        return
    executed = Path("_executed", copy.name)
    target = Path(app.outdir) / executed
    target.parent.mkdir(exist_ok=True)
    nbformat.write(publishing.downloadable(copy, Path(app.srcdir)), target)
    link = {"type": "link", "url": context["pathto"](executed.as_posix(), 1), "text": ".ipynb, executed"}
    link |= {"tooltip": "Download the notebook with its outputs", "icon": "fas fa-file-circle-check"}
    buttons[0]["buttons"].insert(1, link | {"label": "download-executed-button"})


def setup(app: Sphinx) -> dict[str, bool]:
    folder = os.environ.get("SFTRL_EXECUTED", str(publishing.EXECUTED / "tiny"))
    app.add_config_value("executed_notebooks", folder, "env")
    app.connect("source-read", stage)
    app.connect("html-page-context", offer_executed, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
