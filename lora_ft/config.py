"""The declaration of every setting: name, type, default, unit, rule and meaning. No torch here.

Each command has one root dataclass (`TrainRun`, `EvalRun`, ...), which Hydra uses as its schema;
the YAML files in `conf/` name choices and hold only what differs from the defaults below.

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

# In a checkout conf/ lies beside the package; in an installed wheel it lies inside it.
_HERE = Path(__file__).resolve().parent
CONF = next(d for d in (_HERE / "conf", _HERE.parent / "conf") if d.is_dir())


@dataclass
class Model:
    path: str = setting("", "base model: hub id, local folder, GGUF file, or package:NAME/FILE.gguf", path=True)
    revision: str | None = setting(None, "branch, tag or commit of a hub id; recorded as a commit", text=True)
    hub_id: str | None = setting(
        None, "public hub id written into the adapter when path is a folder or a file", text=True
    )
    dtype: Dtype = setting(Dtype.auto, "dtype of weights and computation; auto: bfloat16 on GPUs that have it")
    chat_template: str | None = setting(None, "Jinja file that replaces the tokenizer's chat template", path=True)
    added_tokens: list[str] = setting([], "tokens to add; their rows are trained and saved with the adapter")


@dataclass
class Quant:
    kind: QuantKind = setting(QuantKind.none, "precision of the frozen linear layers")
    double: bool = setting(True, "nf4, fp4: quantize the scales as well")
    compute_dtype: Dtype = setting(Dtype.auto, "nf4, fp4: dtype of the products; auto: model.dtype")


@dataclass
class RecordedQuant(Quant):
    """Quantization of an adapter's base; `adapters.loading.with_base` fills in the record's, and makes it a Quant."""

    kind: QuantKind | None = setting(  # type: ignore[assignment]
        None, "precision of the frozen linear layers; null: as the adapter's record says"
    )
    double: bool | None = setting(  # type: ignore[assignment]
        None, "nf4, fp4: quantize the scales as well; null: as the adapter's record says"
    )


@dataclass
class Adapter:
    r: int = setting(16, "rank", at_least=1)
    lora_alpha: float = setting(32.0, "the update is scaled by lora_alpha / r", above=0)
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", at_least=0, below=1)
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)")
    use_dora: bool = setting(False, "learn magnitude and direction apart (arXiv 2402.09353)")
    target_modules: list[str] = setting(
        ["all-linear"], "names of the layers to adapt, or all-linear (all but the head)"
    )
    modules_to_save: list[str] = setting([], "layers trained in full and saved with the adapter")
    rank_pattern: dict[str, int] = setting({}, "ranks that differ from r, by layer name")
    alpha_pattern: dict[str, float] = setting({}, "alphas that differ from lora_alpha, by layer name")
    init: str = setting("default", "how the matrices start: default or gaussian", text=True)
    init_from: str | None = setting(None, "adapter folder to continue from; its base must be this base", path=True)


@dataclass
class Data:
    path: str = setting(
        "", "rows: .jsonl .json .csv .parquet .txt file, folder, hub id, or package:NAME/FOLDER", path=True
    )
    format: Format = setting(Format.auto, "what a row is; auto: by its columns")
    columns: dict[str, str] = setting({}, "other names of columns, expected name to name in the file")
    name: str | None = setting(None, "configuration of a hub dataset", text=True)
    split: str = setting(
        "train", "split of a hub dataset, or of a folder with files named for splits; all: every file", text=True
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub dataset", text=True)
    prompt: str | None = setting(None, "table: template of the prompt, with {column} fields", text=True)
    answer: str | None = setting(None, "table: template of the answer, with {column} fields", text=True)
    system: str | None = setting(None, "system message for chat rows that have none", text=True)
    deduplicate: bool = setting(False, "leave out rows equal to an earlier one but for case and blanks")
    max_rows: int | None = setting(None, "read at most so many rows", unit="rows", at_least=1)
    max_length: int = setting(1024, "longest row", unit="tokens", at_least=2)
    too_long: TooLong = setting(
        TooLong.error, "what happens to a longer row; answers are never cut; split: plain text into windows"
    )
    train_on: TrainOn = setting(TrainOn.answers, "which tokens are supervised")
    eval_fraction: float = setting(0.05, "eval part of the rows, chosen by their content; 0: none", at_least=0, below=1)
    eval_split: str | None = setting(
        None, "split to evaluate on; null: a folder's validation files if it has any, else eval_fraction", text=True
    )
    eval_path: str | None = setting(
        None, "eval rows from a file, folder or hub dataset of their own; eval_fraction is then unused", path=True
    )


@dataclass
class Objective:
    name: str = setting("sft", "what is learned; sft: to write the supervised tokens", text=True)


@dataclass
class Optim:
    name: Optimizer = setting(Optimizer.adamw, "optimizer; the 8-bit and paged ones are bitsandbytes'")
    lr: float = setting(2e-4, "peak learning rate", above=0)
    lora_plus_ratio: float = setting(1.0, "learning rate of lora_B over lora_A's (arXiv 2402.12354)", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", at_least=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    schedule: Schedule = setting(Schedule.linear, "shape of the learning rate after the warm-up")
    warmup_steps: int = setting(0, "linear rise to lr", unit="steps", at_least=0)
    decay_fraction: float = setting(
        0.2, "wsd: last part of the run, in which lr falls to min_lr_ratio", above=0, at_most=1
    )
    min_lr_ratio: float = setting(0.0, "learning rate at the end, over lr", at_least=0, at_most=1)
    max_grad_norm: float = setting(1.0, "largest gradient norm; 0: no clipping", at_least=0)


@dataclass
class Train:
    epochs: int = setting(1, "passes over the data", at_least=1, on_resume=OnResume.higher)
    max_steps: int | None = setting(
        None,
        "optimizer steps; overrides epochs, repeats the data",
        unit="steps",
        at_least=1,
        on_resume=OnResume.higher,
    )
    tokens_per_step: int = setting(1024, "size of an optimizer step", unit="tokens", at_least=1)
    tokens_per_microbatch: int | None = setting(
        None, "most tokens in one forward pass; null: the whole step", unit="tokens", at_least=1
    )
    packing: bool = setting(
        True, "several rows in one forward pass; changes rounding only (adapter.lora_dropout draws other noise)"
    )
    gradient_checkpointing: str = setting(
        "auto",
        "recompute activations: off, every_k for each k-th layer, auto for as few layers as memory allows",
        pattern=r"auto|off|every_[1-9][0-9]*",
        on_resume=OnResume.free,
    )
    eval_every_steps: int | None = setting(
        None, "eval loss every so many steps; null: at the start and the end", unit="steps", at_least=1
    )
    eval_rows: int = setting(64, "most eval rows that an evaluation inside train reads", unit="rows", at_least=1)
    keep: Keep = setting(Keep.last, "state that adapter/ holds at the end; best: lowest eval loss")
    patience: int | None = setting(
        None, "stop after so many evaluations without a better one", unit="evaluations", at_least=1
    )
    samples: int = setting(
        3,
        "eval prompts answered by base and adapter at the end",
        unit="rows",
        at_least=0,
        on_resume=OnResume.free,
    )
    save_every_steps: int | None = setting(
        200,
        "checkpoint every so many steps; always at the end, and when a signal stops the run",
        unit="steps",
        at_least=1,
        on_resume=OnResume.free,
    )
    keep_checkpoints: int = setting(
        2,
        "newest checkpoints kept; the one of the lowest eval loss is kept as well",
        at_least=1,
        on_resume=OnResume.free,
    )


@dataclass
class Fast:
    attention: bool = setting(True, "per-document causal attention instead of a dense mask")
    loss: bool = setting(True, "head and loss on supervised positions only, in chunks")
    lora: bool = setting(True, "a linear layer and its LoRA as one function while training")
    norm: bool = setting(True, "norms that keep their input only while training")
    mlp: bool = setting(True, "MLPs that keep their projections only while training")
    rope: bool = setting(True, "rotary positions in fewer passes while training")
    storage: bool = setting(True, "float32 weights whose values are bfloat16's stored as such, upcast layer by layer")
    compile: bool = setting(False, "CUDA: norm, SwiGLU and rotary positions compiled by torch; seconds at the start")
    liger: bool = setting(False, "CUDA: the same three by the Triton kernels of the package liger-kernel")


@dataclass
class Track:
    name: Tracker = setting(
        Tracker.none, "tracker that receives the metrics beside metrics.jsonl", on_resume=OnResume.free
    )
    project: str = setting(
        "lora_ft", "project of the run in its tracker; mlflow: experiment", text=True, on_resume=OnResume.free
    )


@dataclass
class Eval:
    rows: int | None = setting(None, "most eval rows; null: all", unit="rows", at_least=1)
    metrics: list[str] = setting([], "of exact_match, accuracy, f1, chrf, bleu, rouge_l, on generated answers")
    samples: int = setting(3, "answers shown side by side", unit="rows", at_least=0)
    max_new_tokens: int = setting(64, "longest generated answer", unit="tokens", at_least=1)
    tokens_per_microbatch: int = setting(1024, "most tokens in one forward pass", unit="tokens", at_least=1)


@dataclass
class Sampling:
    max_new_tokens: int = setting(256, "longest answer", unit="tokens", at_least=1)
    temperature: float = setting(0.0, "0: the likeliest token each time", at_least=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens of this total probability", above=0, at_most=1)


# Settings that several commands have.
_seed = partial(setting, 0, "source of every random choice: order of rows, adapter init, dropout", at_least=0)
_device = partial(
    setting, "auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:[0-9]+)?", on_resume=OnResume.free
)
_run = partial(setting, None, "run folder that train wrote", path=True)
_adapter_path = partial(
    setting, None, "adapter made elsewhere: folder or hub id; model= where it does not name its base", path=True
)


@dataclass
class TrainRun:
    """Fit an adapter to rows of data over a frozen base model."""

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
        "run folder to continue with its own settings; auto: continue hydra.run.dir, or begin it",
        text=True,
        on_resume=OnResume.free,
    )


@dataclass
class CheckRun(TrainRun):
    """Show what train would do with the same overrides: rows, masks, steps, layers; no weights are loaded."""


@dataclass
class SweepRun(TrainRun):
    """Train once for each combination of values, as adapter.r=4,8,16, over one base, and report."""

    sweep: Sweep = field(default_factory=Sweep)


@dataclass
class ReportRun:
    """Tables and curves of a sweep: report.md, report.html, report.json and pictures in its folder."""

    sweep: str = setting("", "sweep folder", path=True)


@dataclass
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


@dataclass
class ChatRun:
    """Talk to base or adapter; with prompt= one answer and out."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    prompt: str | None = setting(None, "one question; without it an interactive session", text=True)
    system: str | None = setting(None, "system message; null: the one of the run's data", text=True)
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    data: Data = field(default_factory=Data)
    sampling: Sampling = field(default_factory=Sampling)
    device: str = _device()
    seed: int = _seed()


@dataclass
class MergeRun:
    """Write a model that needs no adapter; or make one adapter of several, or a smaller one."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    out: str = setting("", "folder to write, or with gguf= a file; must not exist", path=True)
    base_weights: BaseWeights = setting(
        BaseWeights.auto,
        "weights that a quantized run's adapter is added to: dequantized, those it was trained on; original, those of "
        "the base; auto: measure both on the eval rows and take the better",
    )
    dtype: Dtype = setting(Dtype.auto, "dtype of the written weights; auto: the dtype of computation")
    gguf: GgufType | None = setting(None, "write one GGUF file instead of a folder, its matrices of this type")
    adapters: list[str] = setting([], "run or adapter folders to combine into one adapter; no model is written then")
    weights: list[float] = setting([], "adapters: weight of each; []: equal, 1 in all")
    method: Combination = setting(
        Combination.svd,
        "adapters: svd, the weighted sum of their updates; linear, ties, dare_ties add matrices instead, as PEFT does",
    )
    density: float = setting(0.5, "ties, dare_ties: part of each update that is kept", above=0, at_most=1)
    truncate_rank: int | None = setting(
        None,
        "write a smaller adapter of at most this rank instead, by SVD; the loss at each rank is printed",
        at_least=1,
    )
    model: Model = field(default_factory=Model)
    quant: Quant = field(default_factory=RecordedQuant)
    data: Data = field(default_factory=Data)
    eval_rows: int = setting(64, "most eval rows that are measured", unit="rows", at_least=1)
    device: str = _device()
    seed: int = _seed()


@dataclass
class PublishRun:
    """Package an adapter, verify it with PEFT alone, send it, and compare what arrived."""

    run: str | None = _run()
    adapter_path: str | None = _adapter_path()
    to: str = setting("", "dir:PATH, hf:OWNER/NAME, or a URL of fsspec (s3://..., gs://...)", text=True)
    public: bool = setting(False, "hf: a new repository is public")
    license: str | None = setting(None, "license of the adapter, as the hub names it: apache-2.0, mit, ...", text=True)
    formats: list[AdapterFormat] = setting([], "additional formats: gguf for llama.cpp, mlx for MLX")
    dry_run: bool = setting(False, "make and verify the package, send nothing")
    lint_only: bool = setting(False, "show which programs can load the adapter, and do nothing else")
    verify_only: bool = setting(False, "verify a published adapter again: adapter_path=DIR_OR_ID")
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
