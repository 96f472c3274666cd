"""The layout is the architecture: imports go down only, floor 0 needs no torch, no name is a shrug."""

import ast
import subprocess
import sys
from pathlib import Path

import architecture_map

import lora_ft

PACKAGE = Path(lora_ft.__file__).parent

FLOORS = {
    "__main__": 9,
    "sweep": 8, "report": 8, "check": 8, "eval": 8, "chat": 8, "merge": 8, "publish": 8,
    "sweeps": 7,
    "train": 6, "publishing": 6,
    "export": 5,
    "training": 4,
    "adapters": 3, "evaluation": 3,
    "models": 2, "data": 2,
    "ops": 1,
    "config": 0, "validation": 0, "cli": 0, "errors": 0, "io": 0, "runs": 0, "setting": 0, "values": 0,
}  # fmt: skip
VERBS = {"sweep", "report", "check", "eval", "chat", "merge", "publish"}  # train stands below them
SHRUGS = ("util", "helper", "manager", "common", "misc", "base_")


def sources() -> dict[str, Path]:
    return {p.relative_to(PACKAGE).with_suffix("").as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Top names inside lora_ft that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_ft":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lora_ft.")}
    return found


def test_every_file_stands_on_a_floor() -> None:
    places = {name.split("/")[0] for name in sources()} - {"__init__"}
    assert places - FLOORS.keys() == set()
    assert FLOORS.keys() - places == set()


def test_imports_go_down_only() -> None:
    wrong = []
    for name, path in sources().items():
        place = name.split("/")[0]
        for other in imported(path) if place != "__init__" else ():
            same_folder = other == place
            below = FLOORS[other] < FLOORS[place] or FLOORS[place] == FLOORS[other] == 0
            if not (same_folder or below):
                wrong.append(f"{name} imports {other}")
            if place in VERBS and other in VERBS:
                wrong.append(f"verb {name} imports verb {other}")
    assert wrong == []


def test_floor_zero_imports_no_torch() -> None:
    modules = [f"lora_ft.{name}" for name, floor in FLOORS.items() if floor == 0]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_file_is_longer_than_its_question() -> None:
    assert {name: n for name, path in sources().items() if (n := len(path.read_text("utf-8").splitlines())) > 400} == {}


def test_no_name_is_a_shrug() -> None:
    assert [name for name in sources() if any(shrug in name for shrug in SHRUGS)] == []


def test_the_map_in_the_docs_is_the_tree() -> None:
    assert architecture_map.PAGE.read_text("utf-8") == architecture_map.page(), "run python tests/architecture_map.py"
