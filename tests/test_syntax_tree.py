"""Syntax tree checks: only io/durable.py writes files, nothing unpickles, and no code named by a file runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_ft

ROOT = Path(lora_ft.__file__).parent.parent
SOURCES = sorted([*ROOT.glob("lora_ft/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")])

STAGED = {"durable.staged_folder", "durable.scratch_folder"}
CODE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tempfile"}
CODE_CALLS = {
    "eval", "exec", "__import__", "torch.save", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "numpy.load", "np.load", "jinja2.Template", "jinja2.Environment",
}  # fmt: skip
LAST_NAMES = {"instantiate", "AutoPeftModelForCausalLM", "get_class", "get_method", "get_object"}

# functions of os and shutil, and methods of pathlib, safetensors, numpy and others, that change the disk
WRITING_MODULES = {
    "os": {"mkdir", "makedirs", "rename", "renames", "replace", "unlink", "remove", "removedirs", "rmdir", "truncate",
           "ftruncate", "symlink", "link", "chmod", "chown", "fchmod", "mkfifo", "utime"},
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move", "rmtree", "make_archive", "unpack_archive"},
    "np": {"save", "savez", "savez_compressed", "savetxt"},
    "numpy": {"save", "savez", "savez_compressed", "savetxt"},
}  # fmt: skip
WRITING_METHODS = {
    "write_text", "write_bytes", "mkdir", "rename", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod",
    "save_file", "tofile", "to_csv", "to_parquet", "to_json", "push_to_hub", "write_table",
}  # fmt: skip
WRITE_FLAGS = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC", "O_TMPFILE"}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for an expression of names and attributes, `?.c` if it begins with anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def runs_code(tree: ast.Module) -> Iterator[str]:
    """Yield statements that could run code from a file or named by one."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (f"imports {n}" for n in names if n.partition(".")[0] in CODE_MODULES or n in CODE_CALLS)
        yield from (f"imports {n}" for n in names if n.rpartition(".")[2] in LAST_NAMES)
        if isinstance(node, ast.Constant) and node.value == "_target_":
            yield "names _target_"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in CODE_CALLS or called.rpartition(".")[2] in LAST_NAMES:
                yield f"calls {called}"
            if called.endswith("import_module") and not (node.args and isinstance(node.args[0], ast.Constant)):
                yield "imports a module by a name that is computed"
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell", "use_kernels") and not is_false:
                    yield f"{keyword.arg} is not False"


def writes(tree: ast.Module) -> Iterator[str]:
    """Yield statements that could write to the disk without durable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names} & (
                WRITING_MODULES.get(str(node.module), set()) | {"save_file"}
            )
            yield from (f"imports {node.module}.{name}" for name in imported)
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        owner, _, name = called.rpartition(".")
        if name in WRITING_MODULES.get(owner, set()) or (owner != "durable" and owner and name in WRITING_METHODS):
            yield f"calls {called}"
        elif name == "replace" and isinstance(node.func, ast.Attribute) and len(node.args) == 1 and not node.keywords:
            yield f"calls {called}"  # Path.replace; str.replace has two arguments, dataclasses.replace has keywords
        elif called == "os.open":
            flags = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            if flags & WRITE_FLAGS and dotted(node.args[0]) != "os.devnull":
                yield "opens a file for writing"
        elif name == "open" and owner != "os" and not _reads(node, is_method=isinstance(node.func, ast.Attribute)):
            yield "opens a file for writing, or in a mode that is computed"


def _reads(call: ast.Call, *, is_method: bool) -> bool:
    position = 0 if is_method else 1
    modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[position : position + 1]
    return all(isinstance(m, ast.Constant) and set(str(m.value)) <= set("rbt") for m in modes)


def replaces_forwards(tree: ast.Module) -> Iterator[str]:
    """Yield assignments to an attribute `forward`, and other ways to set it by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "forward" and not isinstance(node.ctx, ast.Load):
            yield f"changes {dotted(node)}"
        if isinstance(node, ast.Call):
            called = dotted(node.func).rpartition(".")[2]
            if called in ("setattr", "delattr", "__setattr__", "update") and _names_forward(node):
                yield f"calls {called} with a forward"
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _names_forward(node.slice):
            yield "sets a key named forward"


def _names_forward(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value == "forward" for part in ast.walk(node)) or (
        isinstance(node, ast.Call) and any(keyword.arg == "forward" for keyword in node.keywords)
    )


def saved_unstaged(trees: dict[str, ast.Module]) -> list[str]:
    """Return calls of save_pretrained outside every `with` of a staged or scratch folder.

    A function that saves into a folder it is given needs the `with` at each of its calls instead.
    """
    duties, wrong = {"save_pretrained"}, []
    for _ in range(3):
        wrong = [(path, *call) for path, tree in trees.items() for call in _bare(tree, duties, STAGED)]
        duties |= {function for _, function, _ in wrong if function in ("write", "write_folder")}
    return [f"{path}: {function} calls {name}" for path, function, name in wrong
            if function not in duties]  # fmt: skip


def _bare(tree: ast.Module, duties: set[str], blocks: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (function, callee) for each call of a callee in `duties` outside every `with` of these blocks."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With) and any(_opens(item.context_expr, blocks) for item in node.items):
            return
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            owner, _, name = called.rpartition(".")
            if name in duties and (name != "write" or owner == "merge"):
                yield function, called
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(tree, "module")


def _opens(context: ast.expr, blocks: set[str]) -> bool:
    """Return True for a call of one of `blocks`, and for a choice between such calls."""
    if isinstance(context, ast.IfExp):
        return _opens(context.body, blocks) and _opens(context.orelse, blocks)
    return isinstance(context, ast.Call) and dotted(context.func) in blocks


def relative_path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


TREES = {relative_path(file): ast.parse(file.read_text("utf-8")) for file in SOURCES}


def test_no_module_runs_code_named_by_data() -> None:
    allowed = {
        "lora_ft/cli/guard.py": {"names _target_"},  # to refuse it
        "lora_ft/cli/entry.py": {"imports a module by a name that is computed"},  # a command of config.SCHEMAS
    }
    violations = {path: set(runs_code(tree)) - allowed.get(path, set()) for path, tree in TREES.items()}
    assert {path: kinds for path, kinds in violations.items() if kinds} == {}


def test_only_durable_writes_files() -> None:
    # predictions.py writes Parquet into memory; streams.py opens standard streams that were closed, and /dev/null.
    allowed = ["lora_ft/evaluation/predictions.py", "lora_ft/io/durable.py", "lora_ft/io/streams.py"]
    assert [path for path in TREES if any(writes(TREES[path]))] == allowed


def test_only_acceleration_replaces_forwards() -> None:
    # verify_worker.py is a separate program that runs without lora_ft.
    allowed = {"lora_ft/models/acceleration.py", "lora_ft/publishing/verify_worker.py"}
    assert {path for path in TREES if any(replaces_forwards(TREES[path]))} <= allowed


@pytest.mark.parametrize(
    "snippet",
    [
        "layer.forward = f", "a.b.forward: F = f", "del layer.forward", "setattr(layer, 'forward', f)",
        "layer.__dict__['forward'] = f", "vars(layer)['forward'] = f", "vars(layer).update(forward=f)",
        "layer.forward, x = f, 1", "object.__setattr__(layer, 'forward', f)",
    ],
)  # fmt: skip
def test_replaced_forwards_are_detected(snippet: str) -> None:
    assert list(replaces_forwards(ast.parse(snippet)))
    assert not list(replaces_forwards(ast.parse("y = layer.forward(x)\nf = vars(layer).get('forward')")))


def test_save_pretrained_writes_only_into_staged_folders() -> None:
    assert saved_unstaged(TREES) == []


def test_allowed_exceptions_are_still_needed() -> None:
    assert set(runs_code(TREES["lora_ft/cli/guard.py"])) and set(runs_code(TREES["lora_ft/cli/entry.py"]))
    assert set(writes(TREES["lora_ft/io/durable.py"]))


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle", "from pickle import loads", "import joblib.numpy_pickle", "from torch import load",
        "torch.load(path)", "torch.save(state, path)", "yaml.load(text, yaml.Loader)", "eval(text)", "exec(text)",
        "from hydra.utils import instantiate", "hydra.utils.instantiate(cfg)", "cfg['_target_']", "os.system(command)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "f(trust_remote_code=cfg.trust)",
        "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "importlib.import_module(name)",
        "from peft import AutoPeftModelForCausalLM", "__import__(name)", "jinja2.Template(text).render()",
    ],
)  # fmt: skip
def test_code_execution_is_detected(snippet: str) -> None:
    assert list(runs_code(ast.parse(snippet)))


@pytest.mark.parametrize(
    "snippet",
    [
        "open(p, 'w')", "open(p, mode='ab')", "open(p, mode)", "path.open('x')", "path.open('r+')", "Path(p).open(m)",
        "os.open(p, os.O_WRONLY | os.O_CREAT)", "path.write_text('x')", "(a / b).write_bytes(b'')", "path.mkdir()",
        "path.rename(other)", "path.replace(other)", "(a / 'b').unlink()", "os.rename(a, b)", "os.makedirs(p)",
        "shutil.rmtree(p)", "shutil.copy(a, b)", "from shutil import move", "from os import replace",
        "safetensors.torch.save_file(t, p)", "from safetensors.torch import save_file", "np.save(p, x)",
        "table.to_parquet(p)", "path.touch()", "path.symlink_to(other)", "array.tofile(p)",
    ],
)  # fmt: skip
def test_writes_are_detected(snippet: str) -> None:
    assert list(writes(ast.parse(snippet)))


@pytest.mark.parametrize(
    "snippet",
    [
        "open(p)", "open(p, 'rb')", "path.open()", "path.open('rb')", "os.open(p, os.O_RDONLY)",
        "text.replace('a', 'b')",
        "dataclasses.replace(cfg, r=4)", "replace(cfg, r=4)", "durable.write_text(p, 'x')", "path.read_text()",
        "os.open(os.devnull, os.O_WRONLY)", "shutil.disk_usage(p)", "safetensors.torch.save(tensors)",
        "importlib.import_module('flash_attn')", "model.eval()", "re.compile('x')", "yaml.safe_load(text)",
    ],
)  # fmt: skip
def test_harmless_calls_are_not_reported(snippet: str) -> None:
    assert [*runs_code(ast.parse(snippet)), *writes(ast.parse(snippet))] == []


def test_saving_outside_a_staged_folder_is_detected() -> None:
    bare = ast.parse("def save(folder):\n    tokenizer.save_pretrained(folder)")
    staged = ast.parse("def save(f):\n    with durable.staged_folder(f) as s:\n        tokenizer.save_pretrained(s)")
    chosen = "def save(f):\n    with {} if gguf else {} as s:\n        tokenizer.save_pretrained(s)"
    either = ast.parse(chosen.format("durable.scratch_folder(f)", "durable.staged_folder(f)"))
    neither = ast.parse(chosen.format("durable.scratch_folder(f)", "folder(f)"))
    passed_on = ast.parse("def write_folder(f):\n    t.save_pretrained(f)\ndef other(f):\n    write_folder(f)")
    assert saved_unstaged({"a": bare}) == ["a: save calls tokenizer.save_pretrained"]
    assert saved_unstaged({"a": staged}) == [] and saved_unstaged({"a": either}) == []
    assert saved_unstaged({"a": neither}) == ["a: save calls tokenizer.save_pretrained"]
    assert saved_unstaged({"a": passed_on}) == ["a: other calls write_folder"]
