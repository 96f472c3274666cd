"""Which test holds which known failure closed: tests/CATALOGUE.md, written from the `closes` marks of the tests.

    @pytest.mark.closes("A01", "A02")      ->      | A01 | ... | `test_metamorphic.py::test_a_step_may_be_cut_...` |

python tests/catalogue.py     (make catalogue) writes the table; test_catalogue.py compares it with what stands there

The marks are read from the syntax trees, so that nothing is imported.
"""

import ast
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE = HERE / "CATALOGUE.md"

GROUPS = {
    "A": "Training that goes wrong in silence",
    "B": "Quantization",
    "C": "Checkpoints and resume",
    "D": "Loading and passing on adapters",
    "E": "Sweeps",
    "F": "Data",
    "G": "The hub",
}
FAILURES = {
    "A01": "loss and gradients depend on how a step is cut into micro-batches",
    "A02": "the same again for some model, wrapper or short last step, where tokens are counted elsewhere",
    "A03": "several processes average gradients by rank, although they hold different numbers of tokens",
    "A04": "nothing is supervised, so nothing is learned",
    "A05": "the end token is masked because padding has the same id: the model never stops",
    "A06": "the end of a turn is missing or not supervised: the model never stops",
    "A07": "two BOS tokens, from the template and from the tokenizer",
    "A08": "the prompt at inference is not the one of training",
    "A09": "the first or last tokens of an answer are masked, or a prompt's supervised",
    "A10": "packed rows see each other",
    "A11": "packing is off, or loses rows, without a word",
    "A12": "a long row loses its answer",
    "A13": "the learning rate moves at the wrong pace, or a warm-up is ignored",
    "A14": "dropout acts in evaluation, or not in training",
    "A15": "training that continues from an adapter changes nothing",
    "A16": "recomputed activations cut the gradient off, and the run stays green",
    "A17": "adapters in half precision overflow, or lose their updates",
    "A18": "a loss that is not a number is averaged away",
    "A19": "layers that store their weight transposed (GPT-2) are adapted or merged wrongly",
    "A20": "one of two tied matrices is adapted: saved or merged, the pair falls apart",
    "A21": "fewer layers are adapted than was meant",
    "A22": "added tokens stay untrained, or are not saved",
    "A23": "the same seed gives another result",
    "A24": "a sweep over ranks changes the effective learning rate as well",
    "A25": "the eval loss depends on the batches that it is computed in",
    "A26": "text of a user becomes control tokens",
    "B01": "trained on 4-bit weights, merged into the unquantized ones",
    "B02": "merged into the 4-bit weights themselves: rounding swallows the update",
    "B03": "weights are dequantized wrongly, or not at all, before a merge",
    "B04": "the head is quantized, or a layer left out",
    "B05": "an adapter is put onto a base that is quantized in another way",
    "B06": "a kernel is wrong on this hardware",
    "B07": "the state of an 8-bit optimizer is not 8-bit, or does not survive",
    "B08": "the merged model does not load, or is still quantized",
    "C01": "a folder that a killed run left half written is resumed from",
    "C02": "several processes rename one checkpoint",
    "C03": "a resumed run draws other random numbers",
    "C04": "a resumed run repeats rows, or skips some",
    "C05": "a resumed run starts afresh, or from old weights, without a word",
    "C06": "a resumed run has other settings than it says",
    "C07": "the best checkpoint is deleted, or points nowhere",
    "C08": "a full disk destroys the only copy",
    "C09": "others may not read the adapter's file",
    "C10": "the adapter's file holds no tensors",
    "C11": "a signal to stop loses work",
    "D01": "keys are missing or too many, so that an adapter does nothing, with a warning at most",
    "D02": "a newer library reads an old adapter as something else",
    "D03": "an adapter is put onto another base",
    "D04": "the base moved on the hub under its adapter",
    "D05": "the sizes of vocabulary and adapter differ",
    "D06": "an older PEFT cannot read the config, or a newer one drops its keys",
    "D07": "an adapter's name is part of another's, or a path",
    "D08": "an adapter that changed its base is put onto the plain one",
    "D09": "others cannot use an adapter, or it names a private path",
    "E01": "one failed job stops the others, or is not seen",
    "E02": "memory of a failed job is kept, and the next ones run out of it",
    "E03": "jobs write into one folder",
    "E04": "a sweep cannot be continued",
    "E05": "state of one job leaks into the next",
    "E06": "a mistyped setting trains something else",
    "E07": "a run that failed or is not a number counts as the best",
    "F01": "a broken row is not named",
    "F02": "a column changes its type halfway through a file",
    "F03": "empty rows and empty answers are trained on",
    "F04": "bytes, marks or characters of a text are damaged",
    "F05": "rows that are too long disappear",
    "F06": "a cache of other rows, or of another tokenizer, is used",
    "F07": "eval rows are trained on",
    "F08": "order or split are not the same the next time",
    "F09": "a huge or nested file exhausts the memory",
    "G01": "a secret is written to a file, or published",
    "G02": "what was to be private is public",
    "G03": "others see half of an upload",
    "G04": "a private file is uploaded",
    "G05": "somebody else's model is overwritten, or licence and base are missing",
}


def closed_by(folder: Path = HERE) -> dict[str, list[str]]:
    """Tests by the failures that they close, `file::test`, in order; ValueError for a mark that says nothing."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        name, tree = path.relative_to(folder).as_posix(), ast.parse(path.read_text("utf-8"))
        tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        of_mark = {id(mark): test for test in tests for mark in test.decorator_list}
        for mark in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is(node.func, "closes")):
            if id(mark) not in of_mark:
                raise ValueError(f"{name}:{mark.lineno}: closes is a mark of one test, written above it")
            for argument in mark.args or [mark]:
                failure = argument.value if isinstance(argument, ast.Constant) else None
                if failure not in FAILURES:
                    raise ValueError(f"{name}:{mark.lineno}: no such failure: {ast.unparse(argument)}")
                found.setdefault(failure, []).append(f"`{name}::{of_mark[id(mark)].name}`{_when(of_mark[id(mark)])}")
    return found


def _when(test: ast.FunctionDef) -> str:
    """Where a test runs at night only, that it does."""
    marks = [getattr(mark, "func", mark) for mark in test.decorator_list]
    return " (nightly)" if any(_is(mark, "nightly") for mark in marks) else ""


def _is(function: ast.expr, mark: str) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == mark


def table(closed: dict[str, list[str]]) -> str:
    """The page: a table a group, a row a failure."""
    lines = [
        "# Failures that are known, and the tests that hold them closed",
        "",
        "Written by `make catalogue` from the marks `closes` of the tests; a test compares the two. "
        f"{len(closed)} of {len(FAILURES)} are closed.",
    ]
    for letter, title in GROUPS.items():
        lines += ["", f"## {letter}: {title}", "", "| ID | failure | closed by |", "|---|---|---|"]
        for number, failure in FAILURES.items():
            if number.startswith(letter):
                tests = "<br>".join(closed.get(number, [])) or "open"
                lines.append(f"| {number} | {failure} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    closed = closed_by()
    TABLE.write_text(table(closed), "utf-8")
    sys.stdout.write(f"{TABLE}: {len(closed)} of {len(FAILURES)} closed\n")
