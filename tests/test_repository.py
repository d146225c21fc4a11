"""The tree keeps its own rules: imports point downwards, pins agree, what ships is declared."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "sftrl_utils").glob("*.py"))
ROWS = [
    {"cli"},
    {"engines"},
    {"sweeps"},
    {"cell"},
    {"publishing", "hub", "analysis_figures"},
    {"claims", "figures"},
    {"measures"},
    {"effects", "analysis", "costs"},
    {"stages"},
    {"alignment"},
    {"training", "pretraining", "protocol"},
    {"joint"},
    {"evaluation", "rewards", "prefix_sharing"},
    {"corpora", "models", "keys"},
    {"sources"},
    {"statements", "counterexamples"},
    {"grammar", "tabular"},
    {"lexicon"},
    {"records"},
    {"config"},
]
ROW = {module: row for row, modules in enumerate(ROWS) for module in modules}
# What an import name is called where packages are declared.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "PyYAML", "myst_nb": "myst-nb"}


def imports(code):
    """Every module that a piece of code imports, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_a_module_imports_only_from_rows_below_its_own(path):
    if path.stem == "__init__":
        assert list(imports(path.read_text())) == []
        return
    ours = {name.split(".")[1] for name in imports(path.read_text()) if name.startswith("sftrl_utils.")}
    modules = {module.stem for module in PACKAGE}
    for other in ours & modules:
        assert ROW[other] > ROW[path.stem], f"{path.stem} imports {other}, which is not in a row below"


def test_contributing_shows_the_same_rows():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines() if line.startswith("| `")]
    modules = {path.stem for path in PACKAGE}
    assert [row & modules for row in ROWS if row & modules and row != {"lexicon"}] == [
        row - {"lexicon"} for row in shown
    ]


def requirements():
    """Everything that pyproject.toml declares, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        yield Requirement(line)


def declared():
    """Names of the packages that a user of the wheel gets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {Requirement(line).name.lower() for line in project["dependencies"]}


def test_every_package_that_the_code_imports_is_declared():
    needed = declared()
    used = {name.split(".")[0] for path in PACKAGE for name in imports(path.read_text())}
    foreign = used - set(sys.stdlib_module_names) - {"sftrl_utils", "ray"}  # Ray is an extra, asked for by name
    assert foreign and {DISTRIBUTIONS.get(name, name).lower() for name in foreign} <= needed


def test_every_package_that_a_notebook_imports_comes_with_the_wheel():
    needed = declared()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        code = "\n".join(TransformerManager().transform_cell("".join(lines)) for lines in cells)  # magics are no Python
        used = {name.split(".")[0] for name in imports(code)}
        foreign = used - set(sys.stdlib_module_names) - {"sftrl_utils"}
        assert {DISTRIBUTIONS.get(name, name).lower() for name in foreign} <= needed, path.name


def test_the_lock_pins_everything_declared_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!-]+", line) for line in lines)
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is declared but not locked: run `make lock`"
        assert requirement.specifier.contains(pinned[name]), f"{name} is locked out of its range: run `make lock`"


def test_conda_users_get_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [python] = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    version = python.removeprefix("python=")
    assert SpecifierSet(project["requires-python"]).contains(version)
    locked = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"with Python {version}" in locked  # pip-compile says for which it chose


def test_what_the_pages_load_is_the_version_that_is_declared():
    declared = json.loads((ROOT / "book" / "package.json").read_text(encoding="utf-8"))["dependencies"]
    lock = json.loads((ROOT / "book" / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert {name: lock[f"node_modules/{name}"]["version"] for name in declared} == declared
    assert all("integrity" in package and "resolved" not in package for name, package in lock.items() if name)
    vendor = ROOT / "book" / "_static" / "vendor"
    assert f'"{declared["mathjax"]}"' in (vendor / "mathjax" / "tex-mml-chtml.js").read_text(encoding="utf-8")
    style = (ROOT / "book" / "_static" / "book.css").read_text(encoding="utf-8")
    fonts = re.findall(r'url\("([^"]+)"\)', style)
    assert len(fonts) == 4 and all((ROOT / "book" / "_static" / font).is_file() for font in fonts)
    assert {path.parent.name for path in vendor.glob("*/LICENSE")} == {"mathjax", "source-sans-3"}


def test_ci_calls_make_test_and_the_workflow_calls_ci():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make test"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    runs = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in runs and "make book" in runs
    scheduled = yaml.safe_load((ROOT / ".github" / "workflows" / "scheduled.yml").read_text())
    runs = {name: [step.get("run") for step in job["steps"]] for name, job in scheduled["jobs"].items()}
    assert "make lock UPGRADE=--upgrade" in runs["newest"] and ".ci/run" in runs["newest"]
    assert "make links" in runs["links"]


def test_every_target_that_a_page_names_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "book").glob("*.md")]
    named = {
        name for page in pages for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE)
    }
    assert named <= targets and {"book", "test", "check-book", "vendor"} <= named


def test_the_reference_has_every_module():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "book" / "api").glob("*.md")]
    shown = sorted(name for page in pages for name in re.findall(r"automodule:: sftrl_utils\.(\w+)", page))
    assert shown == sorted(path.stem for path in PACKAGE if path.stem != "__init__")


def test_nothing_unsafe_is_loaded():
    for path in PACKAGE:
        text = path.read_text(encoding="utf-8")
        for word in ("trust_remote_code=True", "yaml.load(", "shell=True", "pickle", "os.system"):
            assert word not in text, f"{path.name}: {word}"
