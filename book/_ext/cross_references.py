"""Sphinx extension: a statement, its check, the experiment that tests it and its claims lead to each other.

Nothing of this is written by hand: a claim in `book/claims.yml` names its statements and its notebook, a notebook
names statements by `{prf:ref}`, and a dropdown names the function that it shows.
"""

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import nbformat
from docutils import nodes
from nbformat import NotebookNode
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

from sftrl_utils import claims, statements

LEDGER, MAP, THEORY = "book/ledger", "book/map", "notebooks/01_theory"
REFERENCE = re.compile(r"\{prf:ref\}`([\w-]+)`")
# The module and the name of what a page shows the source of; of a private method, its class, which the reference has.
SHOWN = re.compile(r"```\{literalinclude\} \.\./(sftrl_utils)/(\w+)\.py\n:pyobject: (\w+(?:\.(?!_)\w+)*)")


def verdicts(env: BuildEnvironment, root: Path) -> list[tuple[claims.Claim, claims.Verdict]]:
    """Every claim with its verdict; computed again only after a change of the ledger or of a published file."""
    state = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in _judged(root)]
    known, pairs = getattr(env, "sftrl_verdicts", (None, []))
    if known != state:
        entries = claims.read_ledger(root / "book" / "claims.yml")
        pairs = [(claim, claims.judge(claim, root / "data" / "results")) for claim in entries]
        env.sftrl_verdicts = state, pairs
    for path, *_ in state:
        env.note_dependency(path)
    return pairs


def _judged(root: Path) -> list[Path]:
    return [root / "book" / "claims.yml", *sorted(filter(Path.is_file, (root / "data" / "results").rglob("*")))]


def ledger(env: BuildEnvironment, root: Path) -> str:
    """The ledger's table and entries, as the published results have it now."""
    entries, found = zip(*verdicts(env, root), strict=True)
    return claims.page(list(entries), list(found), root / "data" / "results")


def quotes(pairs: Iterable[tuple[claims.Claim, claims.Verdict]]) -> list[str]:
    """A line of Markdown for each claim: its sentence, and its verdict as a link into the ledger."""
    return [f"{claim.claim} [{verdict.verdict}](#claim-{claim.id})" for claim, verdict in pairs]


def with_references(page: NotebookNode) -> NotebookNode:
    """`page` with a link to the reference inside each dropdown that shows a function; changed in place."""
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = SHOWN.sub(r"In the reference: {py:obj}`\1.\2.\3`.\n\n\g<0>", cell.source)
    return page


def experiment(page: NotebookNode, name: str, pairs: list[tuple[claims.Claim, claims.Verdict]]) -> NotebookNode:
    """A notebook's page with the claims that its runs decide at its end; changed in place."""
    if own := [pair for pair in pairs if pair[0].experiment == name]:
        lines = ["## In the ledger", "", "What it says of these runs:", "", *(f"- {line}" for line in quotes(own))]
        page.cells.append(nbformat.v4.new_markdown_cell("\n".join(lines), id="in-the-ledger"))
    return page


def theory(
    page: NotebookNode, users: dict[str, list[str]], pairs: list[tuple[claims.Claim, claims.Verdict]]
) -> NotebookNode:
    """The theory's page with, under each statement's check, where it is used and which claims test it."""
    labels = {statement.__name__: statement.__name__.replace("_", "-") for statement in statements.STATEMENTS}
    for cell in page.cells:
        for _, module, function in SHOWN.findall(cell.source) if cell.cell_type == "markdown" else []:
            if module != "statements" or function not in labels:
                continue
            label = labels[function]
            pages = ", ".join(f"[]({name}.ipynb)" for name in users.get(label, []))
            tested = [f"- {line}" for line in quotes(pair for pair in pairs if label in pair[0].statements)]
            if pages:
                cell.source += f"\n\nUsed in {pages}."
            if tested:
                cell.source += "\n\nTested in experiments:\n\n" + "\n".join(tested)
    return page


def users_of_statements(root: Path) -> dict[str, list[str]]:
    """For each label the notebooks, the theory's own left out, that refer to it."""
    users: dict[str, list[str]] = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if path.stem != Path(THEORY).name:
            for label in sorted(set(REFERENCE.findall(path.read_text(encoding="utf-8")))):
                users.setdefault(label, []).append(path.stem)
    return users


def modules_table(root: Path) -> str:
    """CONTRIBUTING's table of the package, each module a link into the reference."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text[text.index("| modules |") :].partition("\n\n")[0].splitlines()
    linked = [re.sub(r"`(\w+)`", r"{py:mod}`\1 <sftrl_utils.\1>`", row.split("|")[1]) for row in rows]
    return "\n".join(f"|{link}|{row.split('|', 2)[2]}" for link, row in zip(linked, rows, strict=True))


def add_to_pages(app: Sphinx, docname: str, content: list[str]) -> None:
    """Add to a page what it leads to. Runs after the executed copy is in place."""
    root, env = Path(app.srcdir), app.env
    if docname == LEDGER:
        content[0] += "\n" + ledger(env, root)
    elif docname == MAP:
        env.note_dependency(str(root / "CONTRIBUTING.md"))
        content[0] = content[0].replace("<!-- modules -->", modules_table(root))
    elif docname.startswith("notebooks/"):
        page = with_references(nbformat.reads(content[0], as_version=4))
        if docname == THEORY:
            for path in (root / "notebooks").glob("*.ipynb"):
                env.note_dependency(str(path))
            page = theory(page, users_of_statements(root), verdicts(env, root))
        else:
            page = experiment(page, Path(docname).name, verdicts(env, root))
        content[0] = nbformat.writes(page)


def index_statements(app: Sphinx, doctree: nodes.document) -> None:
    """Put every statement into the index under its title; the search reads that from the page itself."""
    indexed = app.env.get_domain("index").entries[app.env.docname]
    for node in list(doctree.findall(nodes.Element)):
        if {"label", "realtype"} <= node.attributes.keys() and (title := node.get("title", "").strip(" ()")):
            entry = ("single", title, node["label"], "main", None)
            indexed.append(entry)
            node.parent.insert(node.parent.index(node), addnodes.index(entries=[entry]))


def process_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In the reference, docstrings are plain text with `code`, and a check leads to the statement that it checks."""
    lines[:] = [re.sub(r"(`[^`]*`)|([*|])", lambda part: part[1] or "\\" + part[2], line) for line in lines]
    if obj in statements.STATEMENTS:
        lines += ["", f"Checks :prf:ref:`{obj.__name__.replace('_', '-')}`."]


def process_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A class is called with names and defaults: what pydantic checks them with is not for readers."""
    if what == "class" and signature:
        full = inspect.signature(obj)
        plain = [part.replace(annotation=part.empty) for part in full.parameters.values()]
        return str(full.replace(parameters=plain, return_annotation=full.empty)), None
    return signature, returns


def skip_member(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out of the reference what pydantic and named tuples say of themselves."""
    alias = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if name == "model_config" or alias else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_to_pages, priority=600)
    app.connect("doctree-read", index_statements)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    return {"parallel_read_safe": False}  # verdicts are kept in the environment
