"""Open every page of the built book in a headless browser, cut off from the network, and say what is wrong with it.

`make check-book` builds the book and runs this: two widths, light and dark. A problem is a line; the status is 1 then.
"""

import argparse
import functools
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from playwright.sync_api import Error, sync_playwright
from tqdm import tqdm

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Nothing is looked up but this machine: a request for anything else fails, and is a problem of its own.
FLAGS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

# Without `preload`, which asks for style sheets at addresses that a page does not have.
AXE = {"resultTypes": ["violations"], "preload": False}
NO_COLORS = {"rules": {"color-contrast": {"enabled": False}}}  # the slowest rule; colours do not depend on the width

# In the page: what a reader would see to be broken.
FAULTS = r"""
async () => {
  if (window.MathJax) await MathJax.startup.promise;
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  for (const button of document.querySelectorAll(".toggle-button-hidden")) button.click();
  await new Promise((done) => setTimeout(done, 50));  // what the page itself does once its formulas are there
  for (const animation of document.getAnimations()) {
    if (animation.effect.getComputedTiming().endTime < Infinity) animation.finish();  // what fades in is not pale
  }
  const faults = [], shown = (element) => element.textContent.trim().slice(0, 60);
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => faults.push(`broken image ${image.getAttribute("src")}`));
    if (!image.alt.trim()) faults.push(`no alt text on ${image.getAttribute("src")}`);
    else if (/^(\.\.\/)*_images\//.test(image.alt)) faults.push(`alt text is a file name on ${image.alt}`);
  }
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container") && math.textContent.trim()) faults.push(`unrendered math: ${shown(math)}`);
  for (const error of document.querySelectorAll("mjx-merror")) faults.push(`wrong math: ${shown(error)}`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const leftover = node.data.match(/\{[a-z][\w:-]*\}`[^`]*`?|^:{3,}(\{[\w:-]*\})?|\$[^$\s][^$]*\$/);
    if (leftover && !node.parentElement.closest("code, pre, script, style, noscript, mjx-container, .math, .output"))
      faults.push(`left over: ${leftover[0]}`);
  }
  const wide = document.scrollingElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) {
    const edge = document.documentElement.clientWidth + 1;
    const scrolls = (element) => element && element !== document.body &&
      (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
    const out = [...document.body.querySelectorAll("*")].find((element) =>
      element.getBoundingClientRect().right > edge && !scrolls(element.parentElement));
    faults.push(`the page scrolls sideways by ${wide} px: ${out ? `${out.tagName}.${out.className}` : "?"}`);
  }
  // Text that an ancestor hides and no scrolling shows; what is there for screen readers alone is meant to be hidden.
  const clips = (element) => /hidden|clip/.test(getComputedStyle(element).overflowX);
  const keeper = (element) => {
    do element = element.parentElement;
    while (getComputedStyle(element).overflowX === "visible" && element !== document.body);
    return element;
  };
  for (const element of document.body.querySelectorAll("main *")) {
    if (element.closest("mjx-assistive-mml, svg, .visually-hidden, [aria-hidden=true]")) continue;
    const box = keeper(element);
    const lost = Math.round(element.getBoundingClientRect().right - box.getBoundingClientRect().right);
    if (lost > 1 && clips(box) && box.clientWidth > 50 && element.textContent.trim())
      faults.push(`cut off by ${lost} px: ${box.tagName}.${box.className}: ${shown(element)}`);
  }
  return faults;
}
"""


def browser_path() -> str | None:
    """A Chromium of this machine."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def served(html: Path):
    """Serve the built book on this machine; gives its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def opened(**options):
    """An empty page, of Playwright's `options`, in a browser that is cut off from the network."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield browser.new_page(**options)
        browser.close()


def pages_of(html: Path) -> list[Path]:
    """The book's pages, without what Sphinx copies and the one that only leads to the first."""
    found = (path for path in html.rglob("*.html") if "_static" not in path.relative_to(html).parts)
    return sorted(path for path in found if 'http-equiv="Refresh"' not in path.read_text(encoding="utf-8"))


def broken_links(html: Path) -> list[str]:
    """Links between pages whose file or anchor is not there."""
    html = html.resolve()
    soups = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in pages_of(html)}
    anchors = {path: {tag.get("id") or tag.get("name") for tag in soup.find_all(True)} for path, soup in soups.items()}
    problems = []
    for path, soup in soups.items():
        for href in {tag["href"] for tag in soup.find_all("a", href=True)}:
            address, fragment = urldefrag(href)
            if urlsplit(href).scheme:
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                problems.append(f"{path.relative_to(html)}: link to {href}: no such file")
            elif fragment and target in anchors and unquote(fragment) not in anchors[target]:
                problems.append(f"{path.relative_to(html)}: link to {href}: no such anchor")
    return problems


def faults_of(page, address: str, rules: dict) -> list[str]:
    """What is wrong with the page at `address`, as the browser shows it, by our eyes and by axe-core's `rules`."""
    heard = []
    listeners = {
        "console": lambda message: message.type == "error" and heard.append(f"console: {message.text}"),
        "pageerror": lambda error: heard.append(f"script: {error}"),
        "requestfailed": lambda request: heard.append(f"request failed: {request.url}"),
        "response": lambda answer: answer.status >= 400 and heard.append(f"status {answer.status}: {answer.url}"),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(address, wait_until="load")
        found = page.evaluate(FAULTS)
        violations = [
            f"axe, {rule['impact']}: {rule['id']}: {node['html'][:120]}"
            for rule in Axe().run(page, options=rules).response["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"][:3]
        ]
    except Error as error:
        found, violations = [f"did not open: {error.message.splitlines()[0]}"], []
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
    return [*heard, *found, *violations]


def check(html: Path, shots: Path | None = None) -> list[str]:
    """Every problem of the book in `html`, a line each; screenshots of every page into `shots`. Needs a Chromium."""
    pages = pages_of(html)
    looks = list(product(WIDTHS, THEMES))
    with served(html) as address, ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = tqdm(total=len(looks) * len(pages), unit="page", disable=None)

        def look_at_all(width: str, theme: str) -> list[str]:
            across, down = WIDTHS[width]
            rules = AXE if width == "desktop" else AXE | NO_COLORS
            problems = []
            with opened(viewport={"width": across, "height": down}, color_scheme=theme) as page:
                for path in pages:
                    name = path.relative_to(html).as_posix()
                    faults = faults_of(page, f"{address}/{name}", rules)
                    problems += [f"{name}, {width}, {theme}: {fault}" for fault in faults]
                    if shots:
                        target = shots / f"{name.removesuffix('.html').replace('/', '-')}-{width}-{theme}.png"
                        page.screenshot(
                            path=target,
                            full_page=True,
                            animations="disabled",
                            clip={"x": 0, "y": 0, "width": across, "height": 3 * down},
                        )
                    bar.update()
            return problems

        found = pool.map(look_at_all, *zip(*looks, strict=True))
        problems = [*broken_links(html), *(problem for part in found for problem in part)]
        bar.close()
    return list(dict.fromkeys(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("html", type=Path, help="the folder of the built book")
    parser.add_argument("--shots", type=Path, help="folder for a screenshot of every page, width and theme")
    options = parser.parse_args()
    if not (options.html / "index.html").is_file():
        sys.exit(f"{options.html} holds no book: build it with `make book`")
    if not browser_path():
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: on Debian, `apt-get install chromium`")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    problems = check(options.html, options.shots)
    print("\n".join(problems) or f"{len(pages_of(options.html))} pages, no problem")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
