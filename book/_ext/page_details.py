"""Sphinx extension: what the theme leaves open on each page."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

GIT_PULL = "/hub/user-redirect/git-pull"


def remember_alt_texts(app: Sphinx, doctree: nodes.document) -> None:
    """Keep the alt text of every figure, by its file's name, which is a hash of what it shows."""
    alts = app.env.__dict__.setdefault("sftrl_alts", {})
    alts |= {Path(image["uri"]).name: image["alt"] for image in doctree.findall(nodes.image) if image.get("alt")}


def describe_glued_figures(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give a figure that is glued into another page the alt text that it has on its own."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt"):
            image["alt"] = app.env.sftrl_alts.get(Path(image["uri"]).name, "")


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Keep sphinx-thebe, which we do not use, from loading its script from elsewhere on every page."""
    for kind in ("script_files", "css_files"):
        context[kind] = [
            file
            for file in context.get(kind, [])
            if "thebe" not in f"{file.filename}{getattr(file, 'attributes', {}).get('body')}".lower()
        ]


def ask_for_the_hub(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Make the JupyterHub button ask which hub, unless `_config.yml` names one in place of the page that asks."""
    for group in context.get("header_buttons", []):
        for button in group.get("buttons", []):
            if ".html" + GIT_PULL in button.get("url", ""):
                button["url"] = button["url"].replace(GIT_PULL, "")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-read", remember_alt_texts)
    app.connect("doctree-resolved", describe_glued_figures)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", ask_for_the_hub, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
