"""Sphinx extension: a notebook's page shows its executed copy, while links keep pointing at the source.

When Sphinx reads `notebooks/X.ipynb` its text is replaced by the copy that `sftrl book` executed, found
in the folder named by the environment variable SFTRL_EXECUTED; another folder means that every page is
read again. A missing, outdated or failed copy ends the build. The ledger's page ends with the verdicts that the
published results give.
"""

import os
import re
from pathlib import Path

import nbformat
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from sftrl_utils import claims, publishing

LEDGER = "book/ledger"
GLUED_FROM = re.compile(r"notebooks/(\w+\.ipynb)")


def stage(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace a notebook's text by its page; make a page that glues from notebooks depend on their copies."""
    root = Path(app.srcdir)
    folder = root / app.config.executed_notebooks
    source = Path(app.env.doc2path(docname))
    if source.suffix != ".ipynb":
        for name in set(GLUED_FROM.findall(content[0])):
            app.env.note_dependency(str(folder / name))
        if docname == LEDGER:
            content[0] += "\n" + ledger(app, root)
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


def ledger(app: Sphinx, root: Path) -> str:
    """The ledger's table and entries, as the published results have it now."""
    results = root / "data" / "results"
    for path in [root / "book" / "claims.yml", *filter(Path.is_file, results.rglob("*"))]:
        app.env.note_dependency(str(path))
    entries = claims.read_ledger(root / "book" / "claims.yml")
    return claims.page(entries, [claims.judge(claim, results) for claim in entries])


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Keep sphinx-thebe, which we do not use, from loading its script from elsewhere on every page."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        script for script in scripts if "thebe" not in f"{script.filename}{script.attributes.get('body')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    folder = os.environ.get("SFTRL_EXECUTED", str(publishing.EXECUTED / "tiny"))
    app.add_config_value("executed_notebooks", folder, "env")
    app.connect("source-read", stage)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
