"""Declarations of all settings: name, type, default, unit, rule and meaning. No torch here.

Each command has one root dataclass (`TrainRun`, `EvalRun`, ...), which Hydra uses as its schema. The YAML files in
`conf/` are named choices with only the values that differ from the defaults below.

    lora-ft train model=smollm2_135m adapter.r=8        # composes conf/train.yaml over TrainRun
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_ft.setting import OnResume, setting
from lora_ft.sweep_config import Launcher as Launcher
from lora_ft.sweep_config import Sweep
from lora_ft.values import (
    AdapterFormat,
    BaseWeights,
    Combination,
    Dtype,
    Format,
    GgufType,
    Keep,
    Optimizer,
    QuantKind,
    Schedule,
    TooLong,
    Tracker,
    TrainOn,
)

# In a checkout conf/ is next to the package; in an installed wheel it is inside the package.
_HERE = Path(__file__).resolve().parent
CONF = next(d for d in (_HERE / "conf", _HERE.parent / "conf") if d.is_dir())


@dataclass(slots=True)
class Model:
    path: str = setting("", "base model: hub id, local folder, GGUF file, or package:NAME/FILE.gguf", path=True)
    revision: str | None = setting(None, "branch, tag or commit of a hub id; recorded as a commit", text=True)
    hub_id: str | None = setting(
        None, "hub id of the base for the adapter's files, if path is a local folder or file", text=True
    )
    dtype: Dtype = setting(Dtype.auto, "dtype of weights and computation; auto: bfloat16 on GPUs that support it")
    chat_template: str | None = setting(None, "Jinja file that replaces the tokenizer's chat template", path=True)
    added_tokens: list[str] = setting([], "tokens to add; their embeddings are trained and saved with the adapter")


@dataclass(slots=True)
class Quant:
    kind: QuantKind = setting(QuantKind.none, "precision of the frozen linear layers")
    double: bool = setting(True, "nf4, fp4: quantize the scales as well")
    compute_dtype: Dtype = setting(Dtype.auto, "nf4, fp4: dtype of matrix products; auto: model.dtype")


@dataclass(slots=True)
class RecordedQuant(Quant):
    """Quantization of an adapter's base; null settings are taken from the adapter's record (adapters/loading.py)."""

    kind: QuantKind | None = setting(  # type: ignore[assignment]
        None, "precision of the frozen linear layers; null: as recorded in the adapter"
    )
    double: bool | None = setting(  # type: ignore[assignment]
        None, "nf4, fp4: quantize the scales as well; null: as recorded in the adapter"
    )


@dataclass(slots=True)
class Adapter:
    r: int = setting(16, "rank", at_least=1)
    lora_alpha: float = setting(32.0, "the update is scaled by lora_alpha / r", above=0)
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", at_least=0, below=1)
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)")
    use_dora: bool = setting(False, "train magnitude and direction separately (arXiv 2402.09353)")
    target_modules: list[str] = setting(
        ["all-linear"], "names of layers to adapt, or all-linear (every linear layer but the head)"
    )
    modules_to_save: list[str] = setting([], "layers to train in full and save with the adapter")
    rank_pattern: dict[str, int] = setting({}, "ranks other than r, by layer name")
    alpha_pattern: dict[str, float] = setting({}, "lora_alpha of single layers, by layer name")
    init: str = setting("default", "initialization of the matrices: default or gaussian", text=True)
    init_from: str | None = setting(
        None, "adapter folder to start from; it must have been trained on this base", path=True
    )


@dataclass(slots=True)
class Data:
    path: str = setting(
        "", "rows: .jsonl .json .csv .tsv .parquet .txt file, folder, hub id, or package:NAME/FOLDER", path=True
    )
    format: Format = setting(Format.auto, "format of a row; auto: by its columns")
    columns: dict[str, str] = setting({}, "names of columns in the file, by the expected name")
    name: str | None = setting(None, "configuration of a hub dataset", text=True)
    split: str = setting(
        "train", "split of a hub dataset, or of a folder whose files are named by split; all: every file", text=True
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub dataset", text=True)
    prompt: str | None = setting(None, "table: template of the prompt, with {column} fields", text=True)
    answer: str | None = setting(None, "table: template of the answer, with {column} fields", text=True)
    system: str | None = setting(None, "system message for chat rows that have none", text=True)
    deduplicate: bool = setting(False, "leave out duplicate rows (ignoring case and whitespace)")
    max_rows: int | None = setting(None, "maximum number of rows to read", unit="rows", at_least=1)
    max_length: int = setting(1024, "maximum length of a row", unit="tokens", at_least=2)
    too_long: TooLong = setting(
        TooLong.error, "handling of longer rows; answers are never truncated; split: cut plain text into windows"
    )
    train_on: TrainOn = setting(TrainOn.answers, "which tokens are supervised")
    eval_fraction: float = setting(
        0.05, "fraction of the rows in the eval set, chosen by a hash of their content; 0: none", at_least=0, below=1
    )
    eval_split: str | None = setting(
        None, "split to evaluate on; null: a folder's validation files if it has any, else eval_fraction", text=True
    )
    eval_path: str | None = setting(
        None, "eval rows: another file, folder or hub dataset, instead of eval_fraction", path=True
    )


@dataclass(slots=True)
class Objective:
    name: str = setting("sft", "training objective; sft: cross-entropy of the supervised tokens", text=True)


@dataclass(slots=True)
class Optim:
    name: Optimizer = setting(Optimizer.adamw, "optimizer; 8-bit and paged AdamW are from bitsandbytes")
    lr: float = setting(2e-4, "peak learning rate", above=0)
    lora_plus_ratio: float = setting(
        1.0, "learning rate of lora_B divided by that of lora_A (arXiv 2402.12354)", above=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "term added to the root of the second moment", above=0)
    schedule: Schedule = setting(Schedule.linear, "learning rate schedule after the warm-up")
    warmup_steps: int = setting(0, "linear warm-up to lr", unit="steps", at_least=0)
    decay_fraction: float = setting(
        0.2, "wsd: last fraction of the run, in which lr decays to lr * min_lr_ratio", above=0, at_most=1
    )
    min_lr_ratio: float = setting(0.0, "final learning rate divided by lr", at_least=0, at_most=1)
    max_grad_norm: float = setting(1.0, "gradient norm to clip to; 0: no clipping", at_least=0)


@dataclass(slots=True)
class Train:
    epochs: int = setting(1, "passes over the data", at_least=1, on_resume=OnResume.higher)
    max_steps: int | None = setting(
        None,
        "optimizer steps, instead of epochs; repeats the data if needed",
        unit="steps",
        at_least=1,
        on_resume=OnResume.higher,
    )
    tokens_per_step: int = setting(1024, "maximum size of an optimizer step", unit="tokens", at_least=1)
    tokens_per_microbatch: int | None = setting(
        None, "maximum size of a forward pass; null: the whole step", unit="tokens", at_least=1
    )
    packing: bool = setting(
        True, "pack several rows into one sequence; changes only rounding (and the masks of lora_dropout)"
    )
    gradient_checkpointing: str = setting(
        "auto",
        "recompute activations in backward: off, every_k (each k-th layer), auto (as few as memory allows)",
        pattern=r"auto|off|every_[1-9][0-9]*",
        on_resume=OnResume.free,
    )
    eval_every_steps: int | None = setting(
        None, "evaluate every so many steps; null: only at the start and the end", unit="steps", at_least=1
    )
    eval_rows: int = setting(64, "maximum number of eval rows used during training", unit="rows", at_least=1)
    keep: Keep = setting(Keep.last, "state saved to adapter/: last, or best (lowest eval loss)")
    patience: int | None = setting(
        None, "early stopping: evaluations without improvement", unit="evaluations", at_least=1
    )
    samples: int = setting(
        3,
        "eval prompts answered by base and adapter at the end, for comparison",
        unit="rows",
        at_least=0,
        on_resume=OnResume.free,
    )
    save_every_steps: int | None = setting(
        200,
        "checkpoint every so many steps; null: only at the end and when a signal stops the run",
        unit="steps",
        at_least=1,
        on_resume=OnResume.free,
    )
    keep_checkpoints: int = setting(
        2,
        "checkpoints to keep, in addition to the one with the lowest eval loss",
        at_least=1,
        on_resume=OnResume.free,
    )


@dataclass(slots=True)
class Fast:
    attention: bool = setting(True, "causal attention per document instead of a dense mask")
    loss: bool = setting(True, "head and loss in chunks, on supervised positions only")
    lora: bool = setting(True, "linear layer and its LoRA as one autograd function")
    norm: bool = setting(True, "norms that save only their input for backward")
    mlp: bool = setting(True, "MLPs that save only their projections for backward")
    rope: bool = setting(True, "rotary position embedding in fewer passes")
    storage: bool = setting(True, "store float32 weights as bfloat16 if that is exact; upcast layer by layer")
    compile: bool = setting(
        False, "CUDA: compile norm, SwiGLU and rotary embedding with torch.compile; adds seconds at the start"
    )
    liger: bool = setting(False, "CUDA: norm, SwiGLU and rotary embedding by the package liger-kernel")


@dataclass(slots=True)
class Track:
    name: Tracker = setting(
        Tracker.none, "tracker that receives the metrics, in addition to metrics.jsonl", on_resume=OnResume.free
    )
    project: str = setting(
        "lora_ft", "project of the run in its tracker; mlflow: experiment", text=True, on_resume=OnResume.free
    )


@dataclass(slots=True)
class Eval:
    rows: int | None = setting(None, "maximum number of eval rows; null: all", unit="rows", at_least=1)
    metrics: list[str] = setting([], "metrics of generated answers: exact_match, accuracy, f1, chrf, bleu, rouge_l")
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
    device: str = _device()
    seed: int = _seed()
    resume: str | None = setting(
        None,
        "run folder to continue; auto: continue the run in hydra.run.dir, or start it",
        text=True,
        on_resume=OnResume.free,
    )


@dataclass(slots=True)
class CheckRun(TrainRun):
    """Show what train would do with the same overrides: rows, loss mask, steps, layers. Loads no weights."""


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
    "eval": EvalRun,
    "chat": ChatRun,
    "merge": MergeRun,
    "publish": PublishRun,
    "report": ReportRun,
}

# Settings of lora_ft 0.1 by their names now: for error messages, not accepted.
RENAMED = {
    "model.id": "model.hub_id",
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "adapter.rslora": "adapter.use_rslora",
    "adapter.dora": "adapter.use_dora",
    "adapter.targets": "adapter.target_modules",
    "optim.clip": "optim.max_grad_norm",
    "train.checkpoint": "train.gradient_checkpointing",
    "onto": "base_weights",
    "also": "formats",
}
