"""Write docs/models.md: what works for each model family, found by trying it on the zoo's tiny models.

python tests/models_page.py            # two minutes; `make docs` runs it
python tests/models_page.py gemma2     # shows one row
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from finished import finished_run
from states import detach, state_on, trained
from transformers.utils import logging
from zoo import ZOO, zoo_folder, zoo_model

import lora_ft
from lora_ft import config
from lora_ft.adapters.experts import expert_parameters
from lora_ft.export.gguf import adapter as gguf_adapter
from lora_ft.export.gguf import model as gguf_model
from lora_ft.models.acceleration import Accelerated, accelerate
from lora_ft.models.load import load_base
from lora_ft.values import GgufType

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Model families

What works for each family, found by `make docs` on tiny random models with all the kinds of layers of the family. A
family that is not listed is treated the same: `train` checks every fast path on the loaded base, and logs what it
switches off.

- **documents**: how the documents of a micro-batch share a forward pass. `packed`: one after the other in one row,
  without padding. `side by side`: as rows of similar length, padded on the right, for models whose state or positions
  run on along a row. `one by one`: one row in a forward pass.
- **attention** for these documents. `packed`: on a GPU flash attention over their boundaries, or torch's kernel for
  each document; on a CPU tiles of rows. `packed, capped` and `packed, sinks`: the same for soft-capped scores and
  attention sinks, by [blocks of rows](../lora_ft/ops/scored_attention.py) except for sinks on a GPU, where flash
  attention knows them. `own`: the model's attention.
- **fast blocks**: norms, MLPs and rotary positions that keep less for the backward.
- **trains**: with `adapter.target_modules=[all-linear]`. **quantized**: the same with `quant=nf4` and `quant=int8`.
- **experts**: `trained` or `frozen` by such a run; `-` if the family has none.
- **merges**: the merged model computes the logits of base and adapter. **GGUF**: what llama.cpp can load, the
  `adapter` or the `merged` model.
"""


class Row(NamedTuple):
    """The cells of a family."""

    documents: str
    attention: str
    blocks: str
    trains: bool
    quantized: str
    experts: str
    merges: bool
    gguf: str


def shared(made: Accelerated) -> tuple[str, str, str]:
    """Return how documents share a pass, their attention, and the fast blocks, of an accelerated model."""
    documents = "packed" if made.paths.packs else "side by side" if getattr(made.paths, "pads", False) else "one by one"
    attention = "own"
    if made.paths.passes_starts:
        lines = " ".join(made.reasons)
        attention = "packed" + (", capped" if "capped" in lines else ", sinks" if "sinks" in lines else "")
    counted = next((line for line in made.reasons if line.startswith("accelerated blocks: ")), "")
    return documents, attention, ", ".join(word for word in ("norm", "mlp", "rope") if f" {word}" in counted) or "-"


def row(name: str, folder: Path) -> Row:
    """Try everything on a family's tiny model."""
    model = zoo_model(name).requires_grad_(False)
    made = accelerate(model, config.Fast())
    first = shared(made)
    made.restore()
    base = zoo_folder(folder, name)
    kinds = [kind for kind in ("nf4", "int8") if _works(lambda: _train(_quantized(base, kind), folder / kind))]  # noqa: B023
    run = folder / "run"
    has_run = _works(lambda: finished_run(folder, name))
    merges = has_run and _works(lambda: lora_ft.merge(run, folder / "merged", ["device=cpu"]))
    base_config = json.loads((base / "config.json").read_text())
    forms = {
        "adapter": lambda: gguf_adapter.write(run / "adapter", base_config, folder / "adapter.gguf"),
        "merged": lambda: gguf_model.write(folder / "merged", folder / "merged.gguf", GgufType.f32),
    }
    exports = [form for form, write in forms.items() if merges and _works(write)]
    parameters: list[str] = []
    trains = _works(lambda: parameters.extend(_train(model, folder / "none")))
    return Row(*first, trains, ", ".join(kinds), _experts(model, parameters), merges, ", ".join(exports))


def _experts(model: Any, trained: list[str]) -> str:
    """Say what a run with these trained parameters does with the matrices of experts."""
    modules = {name.rpartition(".")[0] for name in expert_parameters(model)}
    if not modules:
        return "-"
    return "trained" if all(any(f".{module}." in name for name in trained) for module in modules) else "frozen"


def _quantized(base: Path, kind: str) -> Any:
    return load_base(config.Model(path=str(base)), config.Quant(kind=config.QuantKind[kind]), "cpu").model


def _train(model: Any, folder: Path) -> list[str]:
    """Train two steps, in which every matrix must get a gradient; return the names of the parameters."""
    optim = config.Optim(lr=1e-3, warmup_steps=0)
    state = state_on(model, folder, optim=optim, train=config.Train(max_steps=2, tokens_per_step=60))
    try:
        trained(state)
        return list(state.parameters)
    finally:
        detach(state)


problems: list[str] = []


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception as error:  # a refusal, or a defect: both mean that it does not work
        problems.append(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return False
    return True


def page(rows: dict[str, Row]) -> str:
    """Return the page for the rows of families, by name."""
    lines = [
        "| family | documents | attention | fast blocks | trains | quantized | experts | merges | GGUF |",
        "|" + "---|" * 9,
    ]
    for name, found in rows.items():
        lines.append(f"| {name} | {' | '.join(as_cells(found))} |")
    return f"{HEAD}\n{_counts(rows)}\n\n" + "\n".join(lines) + "\n"


def as_cells(found: Row) -> list[str]:
    """Return a row as the page shows it."""
    return [("yes" if cell else "no") if isinstance(cell, bool) else cell or "-" for cell in found]


def _counts(rows: dict[str, Row]) -> str:
    found = list(rows.values())
    packed = sum(r.documents == "packed" for r in found)
    aside = sum(r.documents == "side by side" for r in found)
    return (
        f"Of {len(found)} families {sum(r.trains for r in found)} train with all linear layers, {packed} are packed, "
        f"{aside} are computed side by side, {sum(r.merges for r in found)} merge, "
        f"{sum('merged' in r.gguf for r in found)} are exported to GGUF."
    )


def cells(name: str) -> list[str]:
    """Read the cells of a family from the page."""
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == name:
            return cells[1:]
    raise KeyError(name)


def main(names: list[str]) -> None:
    rows = {}
    for name in names or ZOO:
        problems.clear()
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(name, Path(folder))
        sys.stdout.write(" | ".join(map(str, [name, *rows[name], *problems])) + "\n")
        sys.stdout.flush()
    if not names:
        PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    main(sys.argv[1:])
