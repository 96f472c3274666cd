"""Write tests/CATALOGUE.md, the table of known failures and the tests that exclude them, from the `closes` marks.

    @pytest.mark.closes("A01", "A02")      ->      | A01 | ... | `test_metamorphic.py::test_the_cut_into_...` |

python tests/catalogue.py     (make catalogue) writes the table; test_catalogue.py checks that it is current

Marks are read from syntax trees; no test is imported.
"""

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "CATALOGUE.md"

GROUPS = {
    "A": "Silently wrong training",
    "B": "Quantization",
    "C": "Checkpoints and resume",
    "D": "Adapter files",
    "E": "Sweeps",
    "F": "Data",
    "G": "The hub",
}
FAILURES = {
    "A01": "loss and gradients depend on the division of a step into micro-batches",
    "A02": "the same for one model, wrapper or short last step, because tokens are counted elsewhere",
    "A03": "gradients are averaged over ranks with different numbers of tokens",
    "A04": "no token is supervised",
    "A05": "the end token is masked because the padding token has the same id, so the model never stops",
    "A06": "the end of a turn is missing or not supervised, so the model never stops",
    "A07": "both the template and the tokenizer add a BOS token",
    "A08": "the prompt differs between training and inference",
    "A09": "the first or last tokens of an answer are masked, or tokens of a prompt are supervised",
    "A10": "packed rows attend to each other",
    "A11": "packing is silently off, or silently loses rows",
    "A12": "truncation removes the answer of a long row",
    "A13": "the learning rate does not follow its schedule, or warmup is ignored",
    "A14": "dropout is active in evaluation, or inactive in training",
    "A15": "training that continues an adapter does not change it",
    "A16": "gradient checkpointing cuts the gradient off without an error",
    "A17": "half-precision adapter weights overflow, or lose small updates",
    "A18": "a non-finite loss disappears in an average",
    "A19": "layers with transposed weights (GPT-2) are adapted or merged wrongly",
    "A20": "one of two tied matrices is adapted, and the tie is lost on saving or merging",
    "A21": "fewer layers are adapted than intended",
    "A22": "added tokens are not trained, or not saved",
    "A23": "the same seed gives different results",
    "A24": "a sweep over ranks also changes the effective learning rate",
    "A25": "the eval loss depends on the batch size",
    "A26": "text of a row becomes control tokens",
    "B01": "an adapter trained on 4-bit weights is merged into the unquantized weights",
    "B02": "an adapter is merged into 4-bit weights, and rounding removes the update",
    "B03": "weights are dequantized wrongly or not at all before a merge",
    "B04": "the head is quantized, or another layer is not",
    "B05": "an adapter is loaded on a base with another quantization",
    "B06": "a kernel computes wrong results on this hardware",
    "B07": "the state of an 8-bit optimizer is not in 8 bits, or is not restored exactly",
    "B08": "the merged model does not load, or is still quantized",
    "C01": "a run resumes from a partly written checkpoint",
    "C02": "several processes write the same checkpoint",
    "C03": "a resumed run uses different random numbers",
    "C04": "a resumed run repeats or skips rows",
    "C05": "a resumed run silently starts at step 0 or from old weights",
    "C06": "a resumed run uses other settings than it records",
    "C07": "the best checkpoint is deleted",
    "C08": "a full disk destroys the only checkpoint",
    "C09": "other users cannot read the adapter file",
    "C10": "the adapter file lacks tensors",
    "C11": "a stop signal loses finished steps",
    "D01": "missing or unknown keys leave an adapter without effect, with a warning at most",
    "D02": "a newer library reads an old adapter differently",
    "D03": "an adapter is loaded on another base",
    "D04": "the base on the hub changed after training",
    "D05": "the vocabulary sizes of base and adapter differ",
    "D06": "an older PEFT cannot read the adapter config, or a newer one ignores its keys",
    "D07": "an adapter name is a path or part of another adapter's name",
    "D08": "an adapter whose initialization changed the base is loaded on the unchanged base",
    "D09": "a published adapter is unusable for others, or contains a private path",
    "E01": "one failed job stops the others, or is not reported",
    "E02": "a failed job keeps its memory, and later jobs run out of memory",
    "E03": "several jobs write into the same folder",
    "E04": "a sweep cannot be resumed",
    "E05": "state of one job affects the next",
    "E06": "a misspelled setting is silently ignored",
    "E07": "a failed run or a non-finite loss is ranked best",
    "F01": "an invalid row is not located",
    "F02": "a column changes its type within a file",
    "F03": "rows with an empty prompt or answer are trained on",
    "F04": "reading changes the bytes or characters of a text",
    "F05": "rows that are too long are silently dropped",
    "F06": "a cache of other rows or another tokenizer is used",
    "F07": "eval rows are trained on",
    "F08": "the order or the split is not reproducible",
    "F09": "a deeply nested file ends the process",
    "G01": "a secret is written to a file, or published",
    "G02": "a private repository becomes public",
    "G03": "a partial upload is visible",
    "G04": "a private file is uploaded",
    "G05": "another user's model is overwritten, or license and base are not named",
}


def closed_by(folder: Path = HERE) -> dict[str, list[str]]:
    """Return the tests of each failure as `file::test`, in order. Raises ValueError for an invalid mark."""
    closed: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        name, tree = path.relative_to(folder).as_posix(), ast.parse(path.read_text("utf-8"))
        tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        of_mark = {id(mark): test for test in tests for mark in test.decorator_list}
        for mark in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is(node.func, "closes")):
            if id(mark) not in of_mark:
                raise ValueError(f"{name}:{mark.lineno}: closes must be a decorator of a test function")
            for argument in mark.args or [mark]:
                failure = argument.value if isinstance(argument, ast.Constant) else None
                if failure not in FAILURES:
                    raise ValueError(f"{name}:{mark.lineno}: unknown failure: {ast.unparse(argument)}")
                closed.setdefault(failure, []).append(f"`{name}::{of_mark[id(mark)].name}`{_when(of_mark[id(mark)])}")
    return closed


def _when(test: ast.FunctionDef) -> str:
    """Return " (nightly)" for a test that runs only with -m nightly."""
    marks = [getattr(mark, "func", mark) for mark in test.decorator_list]
    return " (nightly)" if any(_is(mark, "nightly") for mark in marks) else ""


def _is(function: ast.expr, mark: str) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == mark


def table(closed: dict[str, list[str]]) -> str:
    """Return the page, with a table for each group and a row for each failure."""
    lines = [
        "# Known failures and the tests that exclude them",
        "",
        "Generated by `make catalogue` from the `closes` marks of the tests. "
        f"{len(closed)} of {len(FAILURES)} failures have a test.",
    ]
    for letter, title in GROUPS.items():
        lines += ["", f"## {letter}: {title}", "", "| ID | failure | tests |", "|---|---|---|"]
        for number, failure in FAILURES.items():
            if number.startswith(letter):
                tests = "<br>".join(closed.get(number, [])) or "none"
                lines.append(f"| {number} | {failure} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    closed = closed_by()
    TABLE.write_text(table(closed), "utf-8")
    sys.stdout.write(f"{TABLE}: {len(closed)} of {len(FAILURES)} failures have a test\n")
