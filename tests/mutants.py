"""Break every public function of the theory on purpose, and name the test that notices: `make mutants`.

Each mutant is one small change to the source of `tabular` or `statements`: a sign, a factor, swapped arguments, a
shifted constant. It is run against the theory's tests in a copy of the package. Prints one line a mutant, with the
test that killed it; exits non-zero if one survives. Arguments name functions; none means all.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ("tabular", "statements")
TESTS = ("test_tabular.py", "test_statements.py")
KINDS = ("swapped arguments", "sign", "factor", "minus dropped", "result doubled")
PER_FUNCTION = 2  # of different kinds, the first of these
OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
TWO_SIDED = {"kl", "chi_square", "sft_loss", "expectation", "mixture", "gibbs", "_mean"}


def sites(function: ast.FunctionDef):
    """Every place of a function that can be broken, with the kind of the break."""
    # Functions inside it are searched for roots: their results may be scaled without harm.
    inside = {id(node) for part in function.body if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
            yield "sign" if isinstance(node.op, (ast.Add, ast.Sub)) else "factor", node
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in TWO_SIDED and ast.dump(node.args[0]) != ast.dump(node.args[1]):
                yield "swapped arguments", node
        elif (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.Constant)
        ):
            yield "minus dropped", node
        elif isinstance(node, ast.Return) and id(node) not in inside and "list" not in ast.dump(function.returns):
            yield "result doubled", node


def break_at(node: ast.AST, kind: str) -> None:
    """Change `node` in place."""
    if kind in ("sign", "factor"):
        node.op = OPPOSITE[type(node.op)]()
    elif kind == "swapped arguments":
        node.args[0], node.args[1] = node.args[1], node.args[0]
    elif kind == "minus dropped":
        node.op = ast.UAdd()
    else:
        node.value = ast.BinOp(ast.Constant(2), ast.Mult(), node.value)


def mutants(module: str, only: set[str]):
    """(function, kind, line, source of the whole module with one change)."""
    text = (ROOT / "sftrl_utils" / f"{module}.py").read_text(encoding="utf-8")
    for function in ast.parse(text).body:
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
            continue
        if only and function.name not in only:
            continue
        found = list(sites(function))
        for kind in [kind for kind in KINDS if kind in {other for other, _ in found}][:PER_FUNCTION]:
            places = [i for i, (other, _) in enumerate(found) if other == kind]
            tree = ast.parse(text)
            [copy] = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == function.name]
            place = list(sites(copy))[places[len(places) // 2]][1]
            break_at(place, kind)
            yield function.name, kind, place.lineno, ast.unparse(ast.fix_missing_locations(tree))


def killer(module: str, function: str, source: str) -> str | None:
    """The first test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "sftrl_utils", Path(folder) / "sftrl_utils")
        (Path(folder) / "sftrl_utils" / f"{module}.py").write_text(source, encoding="utf-8")
        for name in TESTS:
            shutil.copy(ROOT / "tests" / name, folder)
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS]
        parts = ["not any_instance", "any_instance"]  # what is quick first
        if module == "statements" and function not in ("random_instances", "identity", "bound", "table"):
            # A check has tests of its own: they come before all others.
            parts = [f"{part} and {function}" for part in parts] + [f"{part} and not {function}" for part in parts]
        for part in parts:
            run = subprocess.run(
                [*command, "-k", part], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
            )
            if failed := re.search(r"^FAILED \S*?([\w.]+(?:::\S+)?)", run.stdout, flags=re.MULTILINE):
                return failed[1]
            if run.returncode not in (0, 5):  # passed, or none of that name
                raise RuntimeError(
                    f"{module}.{function}: the tests do not start\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
                )
    return None


def main() -> int:
    jobs = [(module, *mutant) for module in MODULES for mutant in mutants(module, set(sys.argv[1:]))]
    survivors = 0
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        killers = pool.map(lambda job: killer(job[0], job[1], job[-1]), jobs)
        for (module, function, kind, line, _), name in zip(jobs, killers, strict=True):
            survivors += name is None
            print(f"{module}.{function}, line {line}, {kind}: {name or 'SURVIVES'}", flush=True)
    print(f"{len(jobs)} mutants, {survivors} survive")
    return 1 if survivors or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
