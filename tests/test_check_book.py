"""The browser test sees what a reader would: each fault on a small page of its own, and none on a good one."""

from pathlib import Path

import check_book
import pytest

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<link rel="icon" href="data:,"></head><body><main><h1>A page</h1>{body}</main></body></html>"""
DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
GOOD = (
    f'<p id="there">5 $ and <code>{{role}}`x`</code>.</p><img src="{DOT}" alt="A dot">'
    '<a href="#there">up</a><a href="good.html#there">up</a>'
)
FAULTS = [
    ('<img src="gone.png" alt="A dot">', "broken image gone.png"),
    (f'<img src="{DOT}" alt="">', "no alt text"),
    (f'<img src="{DOT}" alt="../_images/0a1b.png">', "alt text is a file name"),
    ('<span class="math">\\(x\\)</span>', "unrendered math"),
    ("<p>See {ref}`nowhere`.</p>", "left over: {ref}`nowhere`"),
    ("<p>Costs $x^2$ a step.</p>", "left over: $x^2$"),
    ("<p>:::{note}</p>", "left over: :::{note}"),
    ('<div style="width: 3000px">wide</div>', "desktop, light: the page scrolls sideways"),
    ('<div style="width: 600px">wider than a phone</div>', "phone, light: the page scrolls sideways"),
    ("<script>console.error('broken on purpose')</script>", "console: broken on purpose"),
    ("<script>throw new Error('thrown')</script>", "script: thrown"),
    ('<script src="https://example.org/x.js"></script>', "request failed: https://example.org/x.js"),
    ('<script src="gone.js"></script>', "status 404"),
    ('<p style="color: #ccc; background: #fff">pale</p>', "desktop, light: axe, serious: color-contrast"),
    (
        "<style>@media (prefers-color-scheme: dark) { body { background: #111; color: #333 } }</style><p>Text</p>",
        "desktop, dark: axe, serious: color-contrast",
    ),
    ('<a href="gone.html">there</a>', "link to gone.html: no such file"),
    ('<a href="#gone">there</a>', "link to #gone: no such anchor"),
    ('<a href="good.html#gone">there</a>', "link to good.html#gone: no such anchor"),
    ('<div style="width: 200px; overflow: hidden"><p style="width: 300px">lost</p></div>', "cut off by 100 px: DIV"),
    ('<details><summary>More</summary><img src="gone.png" alt="A dot"></details>', "broken image gone.png"),
    ("<button></button>", "axe, critical: button-name"),
]


@pytest.fixture(scope="module")
def checked(tmp_path_factory, browser):
    """What `check` says of a book of one good page and one page a fault; its screenshots."""
    html, shots = (tmp_path_factory.mktemp(name) for name in ("html", "shots"))
    for name, body in [("good", GOOD), *((f"fault{number}", body) for number, (body, _) in enumerate(FAULTS))]:
        (html / f"{name}.html").write_text(PAGE.format(body=body), encoding="utf-8")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(html.parent)  # as `make check-book` does: a folder relative to where it is started
    problems = check_book.check(Path(html.name), shots)
    monkeypatch.undo()
    return problems, shots


def test_a_good_page_has_no_fault(checked):
    assert [problem for problem in checked[0] if problem.startswith("good")] == []


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault for _, fault in FAULTS])
def test_each_fault_is_found_on_its_page(checked, number):
    found = [problem for problem in checked[0] if problem.startswith(f"fault{number}.html")]
    assert any(FAULTS[number][1] in problem for problem in found)


def test_what_is_wrong_at_one_width_or_theme_is_said_of_no_other(checked):
    for number, (_, fault) in enumerate(FAULTS):
        if fault.startswith(("phone", "desktop, dark")):
            where = "phone" if fault.startswith("phone") else "desktop, dark"
            found = [problem for problem in checked[0] if problem.startswith(f"fault{number}.html")]
            assert found and all(where in problem for problem in found)


def test_screenshots_are_of_every_page_width_and_theme(checked):
    assert len(list(checked[1].glob("good-*.png"))) == 4
