"""The architecture: imports go only to lower floors, without cycles, and docs/architecture.md describes the layout.

The tests read the table of floors in docs/architecture.md:  | 5 | `exports/`: merged models, GGUF, ... |
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import architecture_map
import pytest

import lora_ft

PACKAGE = Path(lora_ft.__file__).parent
COMMANDS = {"train", "sweep", "check", "plan", "eval", "chat", "merge", "publish", "report"}
VAGUE = ("util", "helper", "manager", "common", "misc", "base_")

# Imports that break a rule today, with the reason. Delete an entry when its cause is gone; a test reports stale ones.
KNOWN_VIOLATIONS: dict[str, str] = {}


def floors() -> dict[str, int]:
    """Return the floor of each folder and module in the table of docs/architecture.md."""
    rows = re.findall(r"^\| (\d) \| (.*) \|$", architecture_map.PAGE.read_text("utf-8"), re.MULTILINE)
    return {name.rstrip("/"): int(floor) for floor, names in rows for name in re.findall(r"`([\w/]+)`", names)}


def modules() -> dict[str, Path]:
    """Return the files of the package by module, `sweeps.jobs`; for `__init__.py` the folder, `sweeps`."""
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yield the modules of lora_ft that a file imports anywhere, except in TYPE_CHECKING blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("lora_ft."))
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "lora_ft":
            parent = str(node.module).partition(".")[2]
            for alias in node.names:
                name = f"{parent}.{alias.name}".lstrip(".")
                yield name if name in known else parent or "__init__"
        yield from imports(node, known)


MODULES = modules()
GRAPH = {
    name: set(imports(ast.parse(path.read_text("utf-8")), set(MODULES))) for name, path in MODULES.items()
}  # fmt: skip
FLOORS = floors()


def violations(graph: dict[str, set[str]]) -> Iterator[str]:
    """Yield the imports from a floor that is not lower, and those of `cli` by a module that is not a command."""
    for name, others in graph.items():
        top = name.partition(".")[0]
        for other, below in ((other, other.partition(".")[0]) for other in sorted(others)):
            is_command = name in COMMANDS | {"__init__", "__main__"}
            is_within = top == below or FLOORS[top] == FLOORS[below] == 0
            if below == "cli" and top != "cli" and not is_command:
                yield f"{name} imports {other}: only a command may"
            elif not is_within and FLOORS[below] >= FLOORS[top]:
                yield f"{name} (floor {FLOORS[top]}) imports {other} (floor {FLOORS[below]})"


def test_floor_table_lists_every_folder_and_module() -> None:
    assert FLOORS.keys() == {name.partition(".")[0] for name in MODULES}


def test_modules_import_only_from_lower_floors() -> None:
    assert set(violations(GRAPH)) == set(KNOWN_VIOLATIONS)


def test_imports_have_no_cycle() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # CycleError names the cycle


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from lora_ft.sweeps import jobs", ["models.load (floor 2) imports sweeps.jobs (floor 7)"]),
        ("import lora_ft.data.rows", ["models.load (floor 2) imports data.rows (floor 2)"]),
        ("def f():\n    from lora_ft import train", ["models.load (floor 2) imports train (floor 6)"]),
        ("from lora_ft.cli.tasks import FAILED", ["models.load imports cli.tasks: only a command may"]),
        ("if TYPE_CHECKING:\n    from lora_ft import train", []),
        ("from lora_ft import config\nfrom lora_ft.ops import norm\nfrom lora_ft.models import quantize", []),
    ],
)
def test_wrong_imports_are_detected(code: str, expected: list[str]) -> None:
    assert list(violations({"models.load": set(imports(ast.parse(code), set(MODULES)))})) == expected


def test_floor_zero_imports_no_torch() -> None:
    names = [f"lora_ft.{name}" for name in MODULES if FLOORS[name.partition(".")[0]] == 0]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_a_module_has_no_side_effects() -> None:
    allowed = {
        "adapters": ["import_bitsandbytes()"],  # explained in adapters/__init__.py
        "ops.attention": [
            "ALL_ATTENTION_FUNCTIONS.register(NAME, packed_causal_attention)"
        ],  # registers a name of lora_ft's own
    }
    calls_of = {}
    for name, path in MODULES.items():
        body = ast.parse(path.read_text("utf-8")).body
        calls = [ast.unparse(n) for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
        calls_of |= {name: calls} if calls else {}
    assert calls_of == allowed


def test_no_file_is_longer_than_400_lines() -> None:
    assert {n: count for n, p in MODULES.items() if (count := len(p.read_text("utf-8").splitlines())) > 400} == {}


def test_module_names_are_not_vague() -> None:
    assert [name for name in MODULES if any(word in name for word in VAGUE)] == []


def test_map_in_the_docs_is_current() -> None:
    assert architecture_map.PAGE.read_text("utf-8") == architecture_map.page(), "run python tests/architecture_map.py"
