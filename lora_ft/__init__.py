"""Train LoRA adapters on frozen GPT models. Importing this package imports no other module and has no side effects.

    import lora_ft

    cfg = lora_ft.compose("train", ["model=qwen3_0_6b", "quant=nf4", "adapter.r=16"])
    run = lora_ft.train(cfg, rows=[{"prompt": "2+2?", "completion": "4"}, ...], folder="my_run")
    model, tokenizer = lora_ft.load("my_run")

Errors that a user can act on are `lora_ft.errors.LoraFtError`. docs/python.md shows every function.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lora_ft import config
    from lora_ft.eval import EvalResult
    from lora_ft.memory.planning import Plan
    from lora_ft.merge import MergeResult
    from lora_ft.publish import PublishResult
    from lora_ft.sweeps.leaderboard import Ranking
    from lora_ft.train import Run
    from lora_ft.training.callbacks import Callback

    Rows: TypeAlias = Iterable[Mapping[str, Any]] | Dataset
    Source: TypeAlias = str | Path

__all__ = ["Callback", "compose", "evaluate", "load", "merge", "plan", "publish", "sweep", "train"]


def compose(command: str, overrides: Sequence[str] = (), config_dir: "str | Path | None" = None) -> Any:
    """Compose the config of a command from overrides, as on the command line; a plain, typed dataclass.

    Raises ConfigError for an unknown setting or choice, or a value that breaks its rule. Required settings, such as
    data, are checked when the config is used.
    """
    from lora_ft.cli import composition

    return composition.compose(command, _listed(overrides), Path(config_dir) if config_dir else None)


def train(
    cfg: "config.TrainRun",
    rows: "Rows | None" = None,
    eval_rows: "Rows | None" = None,
    folder: "Source | None" = None,
    callbacks: "Sequence[Callback]" = (),
) -> "Run":
    """Train one adapter and return its run: `folder`, `result`, `history` (one dict per step).

    rows, eval_rows: dicts or a `datasets.Dataset`; by default those of `cfg.data`. They are stored in the run folder
    for `evaluate` and a resumed run. folder: by default a new one under `runs/`. With `cfg.resume = "auto"` the run in
    the folder is continued. SIGINT (Ctrl-C) finishes the current step and saves a checkpoint.
    """
    _prepare()
    from lora_ft.train import train as implementation

    return implementation(cfg, rows, eval_rows, folder, callbacks)


def plan(cfg: "config.TrainRun", hardware: "str | config.Hardware | None" = None) -> "Plan":
    """Predict the memory, the time and the files of a run, as `lora-ft plan` does; no weights are needed.

    cfg: of `compose` for train, check or plan, with or without data. hardware: a name of conf/hardware such as
    "rtx_4090", or a config.Hardware; by default that of `cfg`, else this machine. `to_dict()` of the result is JSON.
    """
    _prepare()
    from lora_ft.plan import plan as implementation

    return implementation(cfg, hardware)


def load(
    source: "Source", overrides: Sequence[str] = (), device: str = "auto"
) -> "tuple[PeftModel, PreTrainedTokenizerBase]":
    """Load an adapter onto its base for inference: a run folder, an adapter folder or a hub id.

    `overrides` select the base if the adapter does not name it, as in `["model=smollm2_135m"]`.
    """
    _prepare()
    from lora_ft.adapters import loading

    cfg = compose("chat", [*_source(source), f"device={device}", *overrides])
    return loading.load(cfg)


def evaluate(source: "Source", metrics: Sequence[str] = (), overrides: Sequence[str] = ()) -> "EvalResult":
    """Compare base and adapter on eval rows: loss, and metrics of generated answers, as `lora-ft eval` does."""
    _prepare()
    from lora_ft.eval import evaluate as implementation

    overrides = [*_source(source), *([f"eval.metrics=[{','.join(metrics)}]"] if metrics else []), *overrides]
    return implementation(compose("eval", overrides), overrides)


def merge(source: "Source", out: "Source", overrides: Sequence[str] = ()) -> "MergeResult":
    """Merge an adapter into its base and write the model to `out`, as `lora-ft merge` does."""
    _prepare()
    from lora_ft.merge import merge as implementation

    return implementation(compose("merge", [*_source(source), f"out={out}", *overrides]))


def publish(source: "Source", to: str, overrides: Sequence[str] = ()) -> "PublishResult":
    """Package an adapter, verify it and upload it to `dir:PATH`, `hf:OWNER/NAME` or an fsspec URL."""
    _prepare()
    from lora_ft.publish import publish as implementation

    return implementation(compose("publish", [*_source(source), f"to={to}", *overrides]))


def sweep(overrides: Sequence[str], folder: "Source") -> "Ranking":
    """Train once for each combination of values, as in `["adapter.r=4,8"]`; return the ranking of the jobs.

    The folder gets a run folder per job and the report. Failed jobs are part of the ranking.
    """
    _prepare()
    from lora_ft.sweep import sweep as implementation

    return implementation(_listed(overrides), Path(folder))


def _prepare() -> None:
    """Set up allocators, and block compiled code from the hub, before the libraries that need both are imported."""
    from lora_ft.io import process

    process.prepare()


def _listed(overrides: Sequence[str]) -> list[str]:
    from lora_ft.errors import ConfigError

    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list, as in ['adapter.r=8'], got {overrides!r}")
    return list(overrides)


def _source(source: "Source") -> list[str]:
    """Return the override that names an adapter: `run=` for a run folder, else `adapter_path=`."""
    is_run = (Path(source).expanduser() / "config.yaml").is_file()
    return [f"run={source}" if is_run else f"adapter_path={source}"]


def __getattr__(name: str) -> Any:
    if name == "Callback":  # lazy: `import lora_ft` imports no other module
        from lora_ft.training.callbacks import Callback

        return Callback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)


class _Package(ModuleType):
    """Keeps the functions above when a module of the same name (lora_ft.train) is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
