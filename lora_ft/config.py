"""Schemas of the commands, composed from the groups of settings in `settings/`. No torch here.

Each command has one root dataclass (`TrainRun`, `EvalRun`, ...), which Hydra uses as its schema. A setting is declared
once, with name, type, default, unit, rule and meaning. The YAML files in `conf/` are named choices with only the values
that differ from the defaults.

    lora-ft train model=smollm2_135m adapter.r=8        # composes conf/train.yaml over TrainRun
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from lora_ft.settings.data import Data
from lora_ft.settings.model import Adapter, Model, Objective, Quant, RecordedQuant
from lora_ft.settings.plan import Hardware
from lora_ft.settings.setting import OnResume, setting
from lora_ft.settings.sweep import Launcher as Launcher
from lora_ft.settings.sweep import Sweep
from lora_ft.settings.training import Dist, Fast, Optim, Track, Train
from lora_ft.values import AdapterFormat, BaseWeights, Combination, Dtype, GgufType
from lora_ft.values import DistMode as DistMode
from lora_ft.values import Format as Format
from lora_ft.values import Keep as Keep
from lora_ft.values import MixUntil as MixUntil
from lora_ft.values import OnOom as OnOom
from lora_ft.values import Optimizer as Optimizer
from lora_ft.values import QuantKind as QuantKind
from lora_ft.values import Schedule as Schedule
from lora_ft.values import TooLong as TooLong
from lora_ft.values import Tracker as Tracker
from lora_ft.values import TrainOn as TrainOn
from lora_ft.values import Turns as Turns

# In a checkout conf/ is next to the package; in an installed wheel it is inside the package.
_HERE = Path(__file__).resolve().parent
CONF = next(d for d in (_HERE / "conf", _HERE.parent / "conf") if d.is_dir())


@dataclass(slots=True)
class Eval:
    rows: int | None = setting(None, "maximum number of eval rows, of each source; null: all", unit="rows", at_least=1)
    metrics: list[str] = setting(
        [],
        "metrics of generated answers: exact_match, chrf, bleu, rouge_l; or of labels: accuracy, macro_f1, micro_f1, "
        "auroc, brier, ece, log_loss (all of them with data.labels)",
    )
    calibrate: bool = setting(
        False, "fit a temperature of the labels' probabilities on the eval rows, and store it with the adapter"
    )
    samples: int = setting(3, "answers shown for comparison", unit="rows", at_least=0)
    max_new_tokens: int = setting(64, "maximum length of a generated answer", unit="tokens", at_least=1)
    tokens_per_microbatch: int = setting(1024, "maximum size of a forward pass", unit="tokens", at_least=1)


@dataclass(slots=True)
class Sampling:
    max_new_tokens: int = setting(256, "maximum length of an answer", unit="tokens", at_least=1)
    temperature: float = setting(0.0, "0: greedy", at_least=0)
    top_p: float = setting(1.0, "sample from the most likely tokens with this total probability", above=0, at_most=1)


# Settings of several commands.
_seed = partial(setting, 0, "seed of the order of rows, the adapter's initialization and dropout", at_least=0)
_device = partial(
    setting, "auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:[0-9]+)?", on_resume=OnResume.free
)
_run = partial(setting, None, "run folder written by train", path=True)
_adapter_path = partial(
    setting, None, "adapter folder or hub id, instead of run; add model= if it does not name its base", path=True
)


@dataclass(slots=True)
class TrainRun:
    """Train an adapter on rows of data, on a frozen base model."""

    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=Quant)
    adapter: Adapter = field(default_factory=Adapter)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    fast: Fast = field(default_factory=Fast)
    track: Track = field(default_factory=Track)
    dist: Dist = field(default_factory=Dist)
    device: str = _device()
    seed: int = _seed()
    resume: str | None = setting(
        None,
        "run folder to continue; auto: continue the run in hydra.run.dir, or start it",
        text=True,
        on_resume=OnResume.free,
    )

    def with_train(self, **values: Any) -> Self:
        """Return a copy with other values of settings of `train`."""
        return replace(self, train=replace(self.train, **values))


@dataclass(slots=True)
class CheckRun(TrainRun):
    """Show what train would do with the same overrides: rows, loss mask, steps, layers. Loads no weights."""

    hardware: Hardware = field(default_factory=Hardware)


@dataclass(slots=True)
class PlanRun(CheckRun):
    """Predict memory, time and files of a training on any device; exit code 7 if it does not fit."""

    fit: bool = setting(False, "list the changes that save memory also if the run fits")
    out: str | None = setting(None, "picture of the memory over a step: new .png or .html file", path=True)


@dataclass(slots=True)
class SweepRun(TrainRun):
    """Train once for each combination of values, as in adapter.r=4,8,16, on one loaded base, and report."""

    sweep: Sweep = field(default_factory=Sweep)


@dataclass(slots=True)
class ReportRun:
    """Write tables and curves of a sweep into its folder: report.md, report.html, report.json, pictures."""

    sweep: str = setting("", "sweep folder", path=True)


@dataclass(slots=True)
class EvalRun:
    """Compare base and adapter on eval rows: loss, perplexity, task metrics, answers."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    predict: str | None = setting(
        None, "rows whose labels are predicted, with or without labels: file, folder or hub id; needs out", path=True
    )
    out: str | None = setting(None, "new file of predictions: .csv, .jsonl or .parquet", path=True)
    fast: Fast = field(default_factory=Fast)
    eval: Eval = field(default_factory=Eval)
    device: str = _device()
    seed: int = _seed()


@dataclass(slots=True)
class ChatRun:
    """Chat with base or adapter; prompt= gives one answer and exits."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    prompt: str | None = setting(None, "prompt to answer; null: interactive session", text=True)
    system: str | None = setting(None, "system message; null: data.system of the run", text=True)
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    device: str = _device()
    seed: int = _seed()


@dataclass(slots=True)
class MergeRun:
    """Merge an adapter into its base; or combine several adapters, or truncate one to a lower rank."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    out: str = setting("", "new folder to write, or new file with gguf=", path=True)
    base_weights: BaseWeights = setting(
        BaseWeights.auto,
        "weights to merge a quantized run's adapter into: dequantized (those it was trained on), original (before "
        "quantization), auto (the better of both on the eval rows)",
    )
    dtype: Dtype = setting(Dtype.auto, "dtype of the written weights; auto: dtype of computation")
    gguf: GgufType | None = setting(None, "write one GGUF file with matrices of this type, instead of a folder")
    adapters: list[str] = setting([], "run or adapter folders to combine into one adapter, instead of merging")
    weights: list[float] = setting([], "adapters: weight of each; []: equal weights that sum to 1")
    method: Combination = setting(
        Combination.svd,
        "adapters: svd (weighted sum of the updates), or PEFT's linear, ties, dare_ties (on the matrices)",
    )
    density: float = setting(0.5, "ties, dare_ties: fraction of values to keep", above=0, at_most=1)
    truncate_rank: int | None = setting(
        None,
        "truncate the adapter to at most this rank by SVD, instead of merging; prints the loss at each rank",
        at_least=1,
    )
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    eval_rows: int = setting(64, "maximum number of eval rows to measure on", unit="rows", at_least=1)
    device: str = _device()
    seed: int = _seed()


@dataclass(slots=True)
class PublishRun:
    """Package an adapter, verify it with PEFT alone, upload it, and compare the uploaded files."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    to: str = setting("", "dir:PATH, hf:OWNER/NAME, or a URL of fsspec (s3://..., gs://...)", text=True)
    public: bool = setting(False, "hf: make a new repository public")
    license: str | None = setting(None, "license of the adapter by its hub name: apache-2.0, mit, ...", text=True)
    formats: list[AdapterFormat] = setting([], "additional formats: gguf (llama.cpp), mlx (MLX)")
    dry_run: bool = setting(False, "build and verify the package, but upload nothing")
    lint_only: bool = setting(False, "only show which programs can load the adapter")
    verify_only: bool = setting(False, "only verify a published adapter: adapter_path=FOLDER_OR_HUB_ID")
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    device: str = _device()


SCHEMAS: dict[str, type] = {
    "train": TrainRun,
    "sweep": SweepRun,
    "check": CheckRun,
    "plan": PlanRun,
    "eval": EvalRun,
    "chat": ChatRun,
    "merge": MergeRun,
    "publish": PublishRun,
    "report": ReportRun,
}

# Settings of earlier versions by their names now: for error messages, not accepted.
RENAMED = {
    "model.id": "model.hub_id",
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "adapter.rslora": "adapter.use_rslora",
    "adapter.dora": "adapter.use_dora",
    "adapter.targets": "adapter.target_modules",
    "optim.clip": "optim.max_grad_norm",
    "fast.compile": "fast.kernels",
    "fast.liger": "fast.kernels",
    "train.checkpoint": "train.gradient_checkpointing",
    "onto": "base_weights",
    "also": "formats",
}
