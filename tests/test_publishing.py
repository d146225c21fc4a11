"""The pages show executed copies: what is staged, what is refused, what is run again."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import check_book
import nbformat
import papermill
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sftrl_utils import claims, publishing, statements
from sftrl_utils.config import PRESETS, InputError

ROOT = Path(__file__).parent.parent
RUN = {"date": "2026-01-02", "preset": "tiny", "seed": 3, "wall_s": 61.4, "device": "2 CPU cores"}
RUN |= {"versions": {"torch": "9.9"}}


@pytest.fixture
def source():
    return new_notebook(
        cells=[
            new_markdown_cell("# Title", id="title"),
            new_code_cell('preset = "tiny"', id="params", metadata={"tags": ["parameters"]}),
            new_markdown_cell("New prose", id="prose"),
            new_code_cell("1 + 1", id="sum"),
        ],
        metadata={"language_info": {"name": "python"}},
    )


@pytest.fixture
def executed(source, tmp_path):
    """The source as papermill leaves it, with older prose, output, stale metadata and an absolute path."""
    copy = nbformat.from_dict(source)
    copy = nbformat.reads(nbformat.writes(copy), as_version=4)
    copy.cells[2].source = "Old prose"
    text = f"saved to {tmp_path.resolve()}/runs"
    copy.cells[3].outputs = [
        new_output("stream", text=text),
        new_output("execute_result", data={"text/plain": text}, metadata={"papermill": {}}),
    ]
    copy.cells[3].outputs.append(new_output("display_data", data={publishing.WIDGET: {"model_id": "1"}}))
    copy.cells[3].metadata = {"papermill": {"duration": 1}, "execution": {"a": 1}}
    copy.metadata = {"papermill": {"parameters": {}}, "widgets": {}}
    copy.cells.insert(2, new_code_cell('preset = "smoke"', metadata={"tags": ["injected-parameters"]}))
    return copy


def page_of(source, executed, root):
    page = publishing.staged_notebook(source, executed, RUN, root)
    return page, {cell.id: cell for cell in page.cells}


def test_prose_and_metadata_come_from_the_source_and_outputs_from_the_copy(source, executed, tmp_path):
    source.cells[3].metadata = {"tags": ["hide-input"]}
    _, cells = page_of(source, executed, tmp_path)
    assert cells["prose"].source == "New prose" and cells["sum"].metadata["tags"] == ["hide-input"]
    assert len(cells["sum"].outputs) == 2


def test_the_last_run_line_follows_the_title(source, executed, tmp_path):
    page, _ = page_of(source, executed, tmp_path)
    assert page.cells[0].id == "title" and page.cells[1].id == "last-run"
    for part in ("2026-01-02", "`tiny`", "seed 3", "61 s on 2 CPU cores", "torch 9.9"):
        assert part in page.cells[1].source


def test_the_injected_cell_is_hidden_and_metadata_is_clean(source, executed, tmp_path):
    page, cells = page_of(source, executed, tmp_path)
    [injected] = [cell for cell in page.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "remove-cell" in injected.metadata["tags"]
    assert page.cells.index(injected) == page.cells.index(cells["params"]) + 1
    text = nbformat.writes(page)
    assert "papermill" not in text.replace("injected-parameters", "") and "widgets" not in text
    assert not cells["sum"].metadata and len(cells["sum"].outputs) == 2


def test_absolute_paths_become_relative(source, executed, tmp_path):
    _, cells = page_of(source, executed, tmp_path)
    stream, result = cells["sum"].outputs
    assert stream.text == result.data["text/plain"] == "saved to runs"


def test_a_copy_of_other_code_is_refused(source, executed, tmp_path):
    source.cells[3].source = "1 + 2"
    with pytest.raises(ValueError, match="other code"):
        publishing.staged_notebook(source, executed, RUN, tmp_path)


def test_a_copy_with_an_error_is_refused(source, executed, tmp_path):
    executed.cells[4].outputs = [new_output("error", ename="E", evalue="v", traceback=[])]
    with pytest.raises(ValueError, match="error"):
        publishing.staged_notebook(source, executed, RUN, tmp_path)


@pytest.fixture
def small_book(tmp_path, source):
    """A book of one notebook that needs no training."""
    (tmp_path / "notebooks").mkdir()
    nbformat.write(source, tmp_path / "notebooks" / "one.ipynb")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/welcome\nparts:\n- chapters:\n  - file: notebooks/one\n  - file: book/page\n"
    )
    (tmp_path / "requirements.lock").write_text("torch==1\n")
    return tmp_path


def test_a_notebook_is_executed_once_and_again_after_a_change(small_book):
    [copy] = publishing.execute("smoke", small_book)
    assert copy == small_book / "_build" / "executed" / "smoke" / "one.ipynb"
    executed = nbformat.read(copy, as_version=4)
    assert executed.cells[-1].outputs[0].data["text/plain"] == "2"
    assert 'preset = "smoke"' in executed.cells[2].source
    run = publishing.read_run(copy)
    assert run["preset"] == "smoke" and run["wall_s"] > 0 and run["device"]
    assert sorted(path.suffix for path in copy.parent.iterdir()) == [".ipynb", ".json", ".log"]
    first = copy.stat().st_mtime_ns
    publishing.execute("smoke", small_book)
    assert copy.stat().st_mtime_ns == first
    notebook = nbformat.read(small_book / "notebooks" / "one.ipynb", as_version=4)
    notebook.cells[2].source = "Only prose changed"
    nbformat.write(notebook, small_book / "notebooks" / "one.ipynb")
    publishing.execute("smoke", small_book)
    assert copy.stat().st_mtime_ns == first
    notebook.cells[3].source = "2 + 3"
    nbformat.write(notebook, small_book / "notebooks" / "one.ipynb")
    publishing.execute("smoke", small_book)
    assert nbformat.read(copy, as_version=4).cells[-1].outputs[0].data["text/plain"] == "5"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "raise ValueError('broken on purpose\\nand more')",
            "one.ipynb: ValueError: broken on purpose (the run so far",
        ),
        ("assert False", "one.ipynb: AssertionError: no message (the run so far"),
    ],
)
def test_a_failing_notebook_is_one_line_and_the_last_good_copy_stays(small_book, line, message):
    [copy] = publishing.execute("smoke", small_book)
    good = copy.read_bytes()
    notebook = nbformat.read(small_book / "notebooks" / "one.ipynb", as_version=4)
    notebook.cells[3].source = line
    nbformat.write(notebook, small_book / "notebooks" / "one.ipynb")
    with pytest.raises(InputError) as caught:
        publishing.execute("smoke", small_book)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert copy.read_bytes() == good


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_kernel_that_does_not_start_is_tried_once_more(small_book, monkeypatch, deaths):
    real, calls = papermill.execute_notebook, []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) <= deaths:
            raise RuntimeError("port taken")
        return real(*args, **kwargs)

    monkeypatch.setattr(papermill, "execute_notebook", flaky)
    if deaths == 1:
        assert publishing.execute("smoke", small_book)[0].is_file()
    else:
        with pytest.raises(InputError, match="one.ipynb: its kernel died or did not start: port taken"):
            publishing.execute("smoke", small_book)
    assert len(calls) == 2


@pytest.mark.parametrize("changed", ["preset", "lock"])
def test_preset_and_lock_count_for_the_key(small_book, changed):
    notebook = small_book / "notebooks" / "one.ipynb"
    before = publishing.notebook_key(notebook, "smoke", small_book)
    if changed == "lock":
        (small_book / "requirements.lock").write_text("torch==2\n")
    assert publishing.notebook_key(notebook, "tiny" if changed == "preset" else "smoke", small_book) != before


def test_outside_a_checkout_it_says_where_to_go(tmp_path):
    with pytest.raises(InputError, match="holds no _toc.yml"):
        publishing.execute("smoke", tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The real book, its notebooks executed at `smoke`, built with warnings as errors."""
    root = tmp_path_factory.mktemp("book") / "checkout"
    ignored = shutil.ignore_patterns(".venv", "_build", "runs", ".git", "__pycache__", "tests")
    shutil.copytree(ROOT, root, ignore=ignored)
    copies = publishing.execute("smoke", root)
    index = publishing.build("smoke", root)
    return root, copies, index


def test_the_book_builds_without_a_warning_and_shows_both_claims_first(built):
    root, copies, index = built
    assert len(copies) >= 4 and index.is_file()
    welcome = (root / "_build" / "html" / "book" / "welcome.html").read_text(encoding="utf-8")
    article = welcome[welcome.index("<article") :]
    first_screen = article[: article.index("Where to go")]
    text = re.sub(r"<[^>]+>", "", first_screen)
    assert "RL after SFT raises the SFT loss" in text and "SFT after RL lowers the reward" in text
    pictures = re.findall(r'<img[^>]+src="\.\./(_images/[^"]+\.png)"', first_screen)
    assert len(set(pictures)) == 2


def test_every_picture_of_every_page_is_there(built):
    pages = list((built[0] / "_build" / "html").rglob("*.html"))
    shown = {(page, src) for page in pages for src in re.findall(r'<img[^>]+src="([^":]+)"', page.read_text("utf-8"))}
    assert len(shown) >= 10
    assert [(page.name, src) for page, src in shown if not (page.parent / src).is_file()] == []


def test_pages_show_outputs_source_code_and_the_last_run(built):
    root, copies, _ = built
    for copy in copies:
        page = (root / "_build" / "html" / "notebooks" / f"{copy.stem}.html").read_text(encoding="utf-8")
        assert "Last run" in page and "preset <code" in page
        functions = re.findall(r":pyobject: (?:\w+\.)?(\w+)", copy.read_text(encoding="utf-8"))
        assert functions and all(re.search(f'<span class="n[fc]">{name}</span>', page) for name in functions)
        assert "injected" not in page and "{glue" not in page and str(root) not in page


def page_of_book(built, name):
    html = built[0] / "_build" / "html"
    return BeautifulSoup((html / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


def links_of(part):
    return {tag["href"] for tag in part.find_all("a", href=True)}


def test_every_page_opens_in_a_browser_without_a_fault(built, browser):
    html = built[0] / "_build" / "html"
    assert len(check_book.pages_of(html)) >= 20
    assert check_book.check(html) == []


def test_the_search_finds_every_statement_by_its_name(built, browser):
    html = built[0] / "_build" / "html"
    source = nbformat.read(ROOT / "notebooks" / "01_theory.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in source.cells)
    names = re.findall(r":::\{prf:(?!proof)\w+\} (.+)\n:label: ([\w-]+)", text)
    assert len(names) == len(statements.STATEMENTS)
    with check_book.served(html) as address, check_book.opened() as page:
        for name, label in names:
            page.goto(f"{address}/search.html?q={quote(name)}")
            page.wait_for_selector("#search-results .search-summary:has-text('found')")
            found = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
            assert any(f"01_theory.html#{label}" in link for link in found[:3]), name


def test_a_statement_its_check_its_experiments_and_its_claims_lead_to_each_other(built):
    pages = {"theory": "notebooks/01_theory", "ledger": "book/ledger", "reference": "book/api/theory"}
    theory, ledger, reference = (page_of_book(built, name) for name in pages.values())
    entries = claims.read_ledger(ROOT / "book" / "claims.yml")
    users = {}
    for copy in built[1]:
        for label in re.findall(r"\{prf:ref\}`([\w-]+)`", (ROOT / "notebooks" / copy.name).read_text(encoding="utf-8")):
            users.setdefault(label, set()).add(f"{copy.stem}.html")
    functions = {statement.__name__.replace("_", "-"): statement.__name__ for statement in statements.STATEMENTS}
    starts = [tag["id"] for tag in theory.find_all(id=True) if tag["id"] in functions]
    assert sorted(starts) == sorted(functions)
    for label, after in zip(starts, [*starts[1:], None], strict=True):
        links = set()
        for tag in theory.find(id=label).find_all_next(True):
            if tag.get("id") in ({after} if after else {"exercises"}):
                break
            links |= {tag["href"]} if tag.name == "a" and tag.has_attr("href") else set()
        check = f"sftrl_utils.statements.{functions[label]}"
        assert f"../book/api/theory.html#{check}" in links
        assert users.get(label, set()) - {"01_theory.html"} <= links
        assert {f"../book/ledger.html#claim-{entry.id}" for entry in entries if label in entry.statements} <= links
        assert f"../../notebooks/01_theory.html#{label}" in links_of(reference.find(id=check).find_parent("dl"))
    for entry in entries:
        links = links_of(ledger.find(id=f"claim-{entry.id}").find_parent("section"))
        assert {f"../notebooks/01_theory.html#{label}" for label in entry.statements} <= links
        assert f"../notebooks/{entry.experiment}.html" in links


@pytest.mark.parametrize(
    ("theorem", "experiment", "claim", "command"),
    [
        ("sft-loss-change", "04_sft_then_rl", "rl-raises-sft-loss-train", "sftrl run sft_then_rl -p preset tiny"),
        ("reward-change", "05_rl_then_sft", "sft-lowers-reward-train", "sftrl run rl_then_sft -p preset tiny"),
    ],
)
def test_the_first_page_leads_to_theorem_evidence_and_command(built, theorem, experiment, claim, command):
    links = links_of(page_of_book(built, "book/welcome").find("article"))
    assert f"../notebooks/01_theory.html#{theorem}" in links and f"../notebooks/{experiment}.html" in links
    assert f"ledger.html#claim-{claim}" in links
    target = page_of_book(built, "book/ledger").find(id=f"claim-{claim}")
    assert command in target.find_parent("section").get_text().splitlines()


def test_every_claim_is_on_the_page_of_its_experiment(built):
    for claim in claims.read_ledger(ROOT / "book" / "claims.yml"):
        listed = page_of_book(built, f"notebooks/{claim.experiment}").find(id="in-the-ledger")
        assert f"../book/ledger.html#claim-{claim.id}" in links_of(listed)


def test_launch_buttons_open_the_clean_source_and_both_copies_can_be_downloaded(built):
    root, copies, _ = built
    for copy in copies:
        links = links_of(page_of_book(built, f"notebooks/{copy.stem}"))
        name = f"notebooks/{copy.name}"
        colab = f"https://colab.research.google.com/github/sftrl/sftrl-book/blob/main/{name}"
        assert colab in links
        assert f"https://mybinder.org/v2/gh/sftrl/sftrl-book/main?urlpath=lab/tree/{name}" in links
        [hub] = [link for link in links if "nbgitpuller" in link]
        asked = parse_qs(urlsplit(hub).query)
        assert asked["repo"] == ["https://github.com/sftrl/sftrl-book"] and asked["branch"] == ["main"]
        assert asked["urlpath"] == [f"lab/tree/sftrl-book/{name}"] and urlsplit(hub).path.endswith("/link.html")
        html = root / "_build" / "html"
        assert {f"../_sources/{name}", f"../_executed/{copy.name}"} <= links
        clean = nbformat.read(html / "_sources" / name, as_version=4)
        assert clean == nbformat.read(ROOT / name, as_version=4)
        executed = (html / "_executed" / copy.name).read_text(encoding="utf-8")
        cells = nbformat.reads(executed, as_version=4).cells
        assert any(cell.get("outputs") for cell in cells) and str(root) not in executed
        assert not any({"papermill", "execution"} & set(cell.metadata) for cell in cells)
        prose = [cell.source for cell in clean.cells if cell.cell_type == "markdown"]
        assert [text for text in prose if text not in {cell.source for cell in cells}] == []


def test_every_notebook_has_exercises_with_folded_solutions(built):
    for copy in built[1]:
        page = page_of_book(built, f"notebooks/{copy.stem}")
        exercises = page.select("div.exercise")
        solutions = page.select("div.solution.dropdown")
        assert len(exercises) >= 2 and len(solutions) == len(exercises)


def test_every_work_cited_has_a_doi_or_an_address(built):
    for entry in page_of_book(built, "book/references").select("div.citation"):
        assert any(link.startswith("http") for link in links_of(entry)), entry.get_text()


def test_the_whole_book_is_also_one_page(built, browser):
    root = built[0]
    index = publishing.build("smoke", root, builder="singlehtml")
    assert index == root / "_build" / "singlehtml" / "index.html"
    assert check_book.broken_links(index.parent) == [] and check_book.pages_of(index.parent) == [index]
    page = BeautifulSoup(index.read_text(encoding="utf-8"), "html.parser")
    assert all(page.find(id=name) for name in ("rl-threshold", "claim-stopping-rule", "module-sftrl_utils.stages"))
    menu = page.select_one(".bd-sidebar-primary")
    assert {f"#document-notebooks/{copy.stem}" for copy in built[1]} <= links_of(menu) and not page.find("form")
    pictures = [tag["src"] for tag in page.find_all("img", src=True)]
    assert len(pictures) >= 10 and all((index.parent / src).is_file() for src in pictures)
    with check_book.served(index.parent) as address, check_book.opened(viewport={"width": 390, "height": 844}) as tab:
        assert check_book.faults_of(tab, f"{address}/index.html", check_book.AXE) == []


def test_another_preset_and_a_changed_number_reach_every_page(built):
    """An incremental build: pages that a changed copy is shown on, or glued into, are read again."""
    root, copies, _ = built
    other = root / publishing.EXECUTED / "tiny"
    shutil.copytree(copies[0].parent, other)
    for record in other.glob("*.json"):
        record.write_text(record.read_text().replace('"smoke"', '"tiny"'))
    publishing.build("tiny", root)
    html = root / "_build" / "html"
    assert "preset <code" in (page := (html / "notebooks" / "02_sft.html").read_text(encoding="utf-8"))
    assert "tiny" in page[page.index("Last run") :][:200]
    notebook = nbformat.read(other / "04_sft_then_rl.ipynb", as_version=4)
    [output] = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("metadata", {}).get("scrapbook", {}).get("name") == "sft_loss_base"
    ]
    output.data["application/papermill.record/text/plain"] = "76.54"
    nbformat.write(notebook, other / "04_sft_then_rl.ipynb")
    publishing.build("tiny", root)
    assert "76.54" in (html / "book" / "welcome.html").read_text(encoding="utf-8")


def test_a_warning_fails_the_next_build_too(built, capfd):
    root, _, _ = built
    page = root / "book" / "notation.md"
    good = page.read_text(encoding="utf-8")
    page.write_text(good + "\n{ref}`nowhere`\n", encoding="utf-8")
    try:
        for _ in range(2):
            with pytest.raises(InputError, match="did not build"):
                publishing.build("smoke", root)
            assert "nowhere" in capfd.readouterr().err
    finally:
        page.write_text(good, encoding="utf-8")


def test_a_missing_copy_stops_the_build(built, capfd):
    root, copies, _ = built
    hidden = copies[0].with_suffix(".hidden")
    copies[0].rename(hidden)
    (root / "notebooks" / copies[0].name).touch()
    try:
        with pytest.raises(InputError, match="did not build"):
            publishing.build("smoke", root)
        assert "run `sftrl book`" in "".join(capfd.readouterr())
    finally:
        hidden.rename(copies[0])


def test_the_page_on_reproducing_lists_every_preset_and_command():
    page = (ROOT / "book" / "reproducing.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE)) == set(PRESETS)
    shown = subprocess.run([sys.executable, "-m", "sftrl_utils.cli", "--help"], capture_output=True, text=True).stdout
    for command in re.findall(r"sftrl (\w+)", page):
        assert re.search(rf"^    {command}\s", shown, flags=re.MULTILINE)


def test_run_records_are_json_beside_the_copy(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RUN))
    assert publishing.read_run(tmp_path / "x.ipynb") == RUN
    assert publishing.read_run(tmp_path / "y.ipynb") == {}
