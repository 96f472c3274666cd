"""Write the map in docs/architecture.md: each module with the first sentence of its docstring.

python tests/architecture_map.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: begin (python tests/architecture_map.py writes it) -->", "<!-- map: end -->"


def sentence(path: Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", first)[0].rstrip(".")


def rendered() -> str:
    """Return the map as a Markdown list, in which folders follow modules."""
    package = ROOT / "lora_ft"
    lines = [f"- `{p.name}`: {sentence(p)}" for p in sorted(package.glob("*.py")) if p.name != "__init__.py"]
    for folder in sorted(p.parent for p in package.rglob("__init__.py") if p.parent != package):
        name, depth = folder.relative_to(package).as_posix(), len(folder.relative_to(package).parts)
        lines.append(f"{'  ' * (depth - 1)}- **{name}/** {sentence(folder / '__init__.py')}")
        lines += [
            f"{'  ' * depth}- `{p.name}`: {sentence(p)}" for p in sorted(folder.glob("*.py")) if p.name != "__init__.py"
        ]
    return "\n".join(lines)


def page() -> str:
    """Return the page with the map of the current tree."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{rendered()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
