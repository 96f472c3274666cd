"""Do the tests notice? Break one file in many small ways, run its tests on each, and count the mutants that live.

    python tests/mutants.py lora_ft/data/packing.py tests/test_data_pack.py           # 45 of its mutants, seed 0
    python tests/mutants.py --most 200 --seed 1 lora_ft/io/durable.py tests/test_durable.py

A mutant has one comparison turned, one condition negated, one number moved by one, one value not returned or one call
left out. Words for people (messages, log lines, docstrings) are left alone. It is killed when a test fails or hangs;
those that live are printed, to be read: some compute the same. The package is copied, the checkout stays as it is.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
}  # fmt: skip
SECONDS = 120  # for the tests of one mutant

Change = Callable[[], None]


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What can be broken at this node: in words, and the function that does it."""

    def assign(what: str, owner: ast.AST, name: str, value: object) -> tuple[str, Change]:
        return what, lambda: setattr(owner, name, value)

    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield assign("comparison", node, "ops", [SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPPED:
        yield assign("operator", node, "op", SWAPPED[type(node.op)]())
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield assign("constant", node, "value", not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield assign("number", node, "value", node.value + 1)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield assign("condition", node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield assign("return value", node, "value", ast.Constant(None))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield assign("call", node, "value", ast.Constant(None))


def for_people(node: ast.AST) -> bool:
    """Messages, log lines, annotations: not what tests are about."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func).startswith("log.")
    return isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert))


def places(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns") and not for_people(child):
                yield from places(child)


def mutants(source: str) -> list[tuple[int, str, str]]:
    """Line, what was broken, and source of each mutant."""
    found = []
    for number, node in enumerate(places(tree := ast.parse(source))):
        for which in range(len(list(changes(node)))):
            broken = copy.deepcopy(tree)
            twin = next(n for i, n in enumerate(places(broken)) if i == number)
            what, change = list(changes(twin))[which]
            change()
            found.append((getattr(twin, "lineno", 0), what, ast.unparse(ast.fix_missing_locations(broken))))
    return found


def is_killed(place: Path, tests: list[str]) -> bool:
    """Whether the tests fail, in a process forked from this one: what takes long to import is imported once."""
    if not (child := os.fork()):
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(place)
        sys.path.insert(0, str(place))
        os.environ["PYTHONPATH"] = str(place)
        import pytest

        os._exit(int(pytest.main(["-x", "--assert=plain", "-p", "no:cacheprovider", *tests])))
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(SECONDS)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return status != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--most", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    import peft  # noqa: F401

    source = (ROOT / chosen.file).read_text("utf-8")
    every = mutants(source)
    picked = random.Random(chosen.seed).sample(every, min(chosen.most, len(every)))
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "copy"
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "benchmarks", "runs"))
        if is_killed(place, chosen.tests):
            raise SystemExit("the tests fail on the file as it is")
        for line, what, broken in sorted(picked):
            (place / chosen.file).write_text(broken, "utf-8")
            if is_killed(place, chosen.tests):
                killed += 1
            else:
                sys.stdout.write(f"{chosen.file}:{line}: {what}: lives\n")
                sys.stdout.flush()
    sys.stdout.write(f"{chosen.file}: {killed} of {len(picked)} killed ({len(every)} possible)\n")


if __name__ == "__main__":
    main()
