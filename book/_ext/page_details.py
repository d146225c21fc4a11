"""Sphinx extension: what the theme leaves open on each page."""

from pathlib import Path

from bs4 import BeautifulSoup
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


def notice_static_files(app: Sphinx, env: object, added: set, changed: set, removed: set) -> list[str]:
    """Read the first page again when a file of `_static` has changed: a build without a changed page copies none."""
    static = Path(app.confdir, app.config.html_static_path[0])
    copied = Path(app.outdir, "_static")
    for file in filter(Path.is_file, static.rglob("*")):
        copy = copied / file.relative_to(static)
        if not copy.is_file() or copy.stat().st_mtime < file.stat().st_mtime:
            return [app.config.root_doc]
    return []


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


def prepare_single_page(app: Sphinx) -> None:
    """Let the builder of one page write every node as that of many does, and without a search that it cannot have."""
    if app.builder.name == "singlehtml":
        # An extension names some nodes for this builder alone, which hides from it all that are named for HTML.
        handlers = app.registry.translation_handlers
        handlers["singlehtml"] = handlers["html"] | handlers.get("singlehtml", {})
        app.config.html_sidebars = {"**": ["sbt-sidebar-nav.html"]}


def finish_single_page(app: Sphinx, error: Exception | None) -> None:
    """Make `index.html` the one page: the builder writes its links as if the first page were not in a folder."""
    page = Path(app.outdir, f"{app.config.root_doc}.html")
    if app.builder.name == "singlehtml" and not error and page.is_file():
        first = app.config.root_doc
        text = page.read_text(encoding="utf-8").replace(f'href="{first}.html#', 'href="#').replace('="../_', '="_')
        soup = BeautifulSoup(text.replace(f'href="#document-{first}"', 'href="#"'), "html.parser")
        for search in soup.select("[class^=search-button], #pst-search-dialog, #searchbox, [src*=search]"):
            search.decompose()
        menu = soup.new_tag("ul", attrs={"class": "nav bd-sidenav"})
        for start in soup.select("span[id^=document-]"):
            chapter = soup.new_tag("a", href=f"#{start['id']}")
            chapter.string = start.find_next(["h1", "h2", "h3"]).get_text().rstrip("#")
            menu.append(soup.new_tag("li", attrs={"class": "toctree-l1"}))
            menu.contents[-1].append(chapter)
        soup.select_one(".bd-sidebar-primary .bd-toc-item").replace_with(menu)
        Path(app.outdir, "index.html").write_text(str(soup), encoding="utf-8")
        page.unlink()
        page.parent.rmdir()


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", prepare_single_page)
    app.connect("build-finished", finish_single_page)
    app.connect("env-get-outdated", notice_static_files)
    app.connect("doctree-read", remember_alt_texts)
    app.connect("doctree-resolved", describe_glued_figures)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", ask_for_the_hub, priority=900)
    return {"parallel_read_safe": False}  # alt texts are kept in the environment
