"""Change a file in every small way, one at a time, and see whether its tests notice.

    python benchmarks/mutants.py src/silotune/algorithms/fedavg.py tests/unit/algorithms
    python benchmarks/mutants.py src/silotune/algorithms/rolora.py -- tests/unit -k rolora

Operators, comparisons, constants and conditions are changed; statements and keyword arguments are
removed. Every mutant runs the given tests in a fork of this process, which has imported the large
libraries already; the source on the disk stays as it is. A mutant on which no test fails has
survived: it is printed with its line, and either needs a test or changes nothing that anybody could
see. Docstrings, types and the facts of an algorithm are left alone. Not part of `make`.
"""

import argparse
import ast
import copy
import importlib
import importlib.machinery
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
LARGE = ("numpy", "scipy.special", "torch", "pydantic", "hypothesis", "transformers", "peft")
"""Imported once, before the forks."""
LONGEST_S = 180
"""Seconds after which a mutant counts as noticed: it hangs."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.MatMult: ast.Add,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd,
}  # fmt: skip
REMOVED = (ast.Assign, ast.AugAssign, ast.Expr, ast.Raise)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """Every mutant of a module: line, what was changed, and the tree."""
    tree = ast.parse(source)
    skipped = {id(n) for top in ast.walk(tree) if _left_alone(top) for n in ast.walk(top)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in skipped:
            continue
        for what, change in _changes(node):
            other = copy.deepcopy(tree)
            twin = next(n for i, n in enumerate(ast.walk(other)) if i == number)
            change(twin)
            yield getattr(node, "lineno", 0), what, ast.fix_missing_locations(other)


def _left_alone(node: ast.AST) -> bool:
    """Docstrings, annotations, imports, and the facts of an algorithm."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.AnnAssign):
        return not isinstance(node.value, ast.Call) or "facts" in ast.unparse(node.target)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr | ast.arg)


def _changes(node: ast.AST):
    """(what, function that makes the change on a copy of the node)."""
    for field in ("op", "ops"):
        ops = getattr(node, field, None)
        one = ops[0] if isinstance(ops, list) else ops
        if one is not None and type(one) in SWAPS:
            new = SWAPS[type(one)]

            def swap(twin, field=field, new=new):
                setattr(twin, field, [new()] if field == "ops" else new())

            yield f"{type(one).__name__} -> {new.__name__}", swap
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        other = not value if isinstance(value, bool) else value + 1
        yield f"{value} -> {other}", lambda twin: setattr(twin, "value", other)
    if isinstance(node, ast.If | ast.IfExp):
        yield (
            "condition negated",
            lambda twin: setattr(twin, "test", ast.UnaryOp(ast.Not(), twin.test)),
        )
    for i, keyword in enumerate(node.keywords if isinstance(node, ast.Call) else ()):
        if keyword.arg is not None:
            yield f"removed: {keyword.arg} =", lambda twin, i=i: twin.keywords.pop(i)
    for field in ("body", "orelse"):
        block = getattr(node, field, None)
        for i, statement in enumerate(block if isinstance(block, list) else ()):
            if isinstance(statement, REMOVED) and not _left_alone(statement):

                def remove(twin, field=field, i=i):
                    getattr(twin, field)[i] = ast.Pass()

                yield f"removed: {ast.unparse(statement)[:60]}", remove


def noticed(path: Path, tree: ast.Module, tests: list[str]) -> bool:
    """Whether the tests fail on a mutant."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        loader, plain = importlib.machinery.SourceFileLoader, None
        plain = loader.get_code

        def get_code(self, fullname):
            if Path(self.path) == path:
                return compile(tree, str(path), "exec")
            return plain(self, fullname)

        loader.get_code = get_code
        imported = "ignore::pytest.PytestAssertRewriteWarning"  # of hypothesis, before the fork
        words = ["-x", "-q", "-p", "no:cacheprovider", "-W", imported, *tests]
        os._exit(int(pytest.main(words)) != 0)
    began = time.monotonic()
    while time.monotonic() - began < LONGEST_S:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True


def main() -> None:
    """Run all mutants of a file, and print those that survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", nargs="+")
    given = parser.parse_args()
    path = given.file.resolve()
    for name in LARGE:
        importlib.import_module(name)
    assert not any(name.startswith("silotune") for name in sys.modules)
    source = path.read_text(encoding="utf-8")
    if noticed(path, ast.parse(source), given.tests):
        sys.exit(f"the tests fail on {given.file} as it is")
    found = list(mutants(source))
    killed = 0
    for number, (line, what, tree) in enumerate(found, start=1):
        if noticed(path, tree, given.tests):
            killed += 1
        else:
            print(f"  {number} of {len(found)}, line {line}: {what}", flush=True)
    share = f" ({killed / len(found):.0%})" if found else ""
    print(f"{given.file.name}: {killed} of {len(found)} noticed{share}")


if __name__ == "__main__":
    main()
