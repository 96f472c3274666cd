"""Settings of training: steps, optimizer, fast paths, tracker."""

from dataclasses import dataclass

from lora_ft.settings.setting import OnResume, setting
from lora_ft.values import BlockKernels, DistMode, Keep, OnOom, Optimizer, Schedule, Tracker


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
    tokens_per_microbatch: int | str | None = setting(
        None,
        "maximum size of a forward pass; auto: the largest that fits into memory; null: the whole step",
        unit="tokens",
        at_least=1,
        pattern="auto",
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
    on_oom: OnOom = setting(
        OnOom.stop,
        "when memory runs out: stop with advice, or shrink (halve the micro-batch and repeat the step)",
        on_resume=OnResume.free,
    )
    deterministic: bool = setting(
        False, "CUDA: use only deterministic kernels, which are slower, so that a run gives the same bytes again"
    )
    log_every_steps: int = setting(
        1,
        "read the metrics of so many steps at once; above 1 a GPU need not wait at each step (float16: always 1)",
        unit="steps",
        at_least=1,
        on_resume=OnResume.free,
    )
    eval_every_steps: int | None = setting(
        None, "evaluate every so many steps; null: only at the start and the end", unit="steps", at_least=1
    )
    eval_rows: int = setting(
        64, "maximum number of eval rows used during training, of each source", unit="rows", at_least=1
    )
    eval_metrics: list[str] = setting(
        [],
        "metrics of each evaluation: accuracy, macro_f1, micro_f1, auroc, brier, ece, log_loss (of labels), "
        "exact_match, chrf, bleu, rouge_l (of generated answers)",
    )
    max_new_tokens: int = setting(
        64, "maximum length of an answer generated for train.eval_metrics", unit="tokens", at_least=1
    )
    best_metric: str = setting(
        "loss", "metric that train.keep=best, train.patience, halving and a sweep rank by: loss, or as in eval_metrics"
    )
    keep: Keep = setting(Keep.last, "state saved to adapter/: last, or best (by train.best_metric)")
    patience: int | None = setting(
        None,
        "early stopping: evaluations without improvement of train.best_metric",
        unit="evaluations",
        at_least=1,
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
        "checkpoints to keep, in addition to the best one by train.best_metric",
        at_least=1,
        on_resume=OnResume.free,
    )

    @property
    def microbatch_limit(self) -> int | None:
        """The number of tokens_per_microbatch; None for null, and for auto, which memory/auto.py settles."""
        return self.tokens_per_microbatch if isinstance(self.tokens_per_microbatch, int) else None


@dataclass(slots=True)
class Optim:
    name: Optimizer = setting(Optimizer.adamw, "optimizer; 8-bit and paged AdamW are from bitsandbytes")
    offload: bool = setting(
        False,
        "adamw: keep its state on the CPU between steps; 8 bytes per trained parameter less GPU memory, same numbers",
        on_resume=OnResume.free,
    )
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
class Fast:
    attention: bool = setting(True, "causal attention per document instead of a dense mask")
    loss: bool = setting(True, "head and loss in chunks, on supervised positions only")
    lora: bool = setting(True, "linear layer and its LoRA as one autograd function")
    norm: bool = setting(True, "norms that save only their input for backward")
    mlp: bool = setting(True, "MLPs and experts that save only their projections for backward")
    rope: bool = setting(True, "rotary position embedding in fewer passes")
    storage: bool = setting(True, "store float32 weights as bfloat16 if that is exact; upcast layer by layer")
    kernels: BlockKernels = setting(
        BlockKernels.auto,
        "norm, gated activation, rotary embedding: liger (package liger-kernel), compile (torch.compile), eager; "
        "auto: the first that a CUDA device and the installed packages allow, eager on a CPU",
    )


@dataclass(slots=True)
class Track:
    name: Tracker = setting(
        Tracker.none, "tracker that receives the metrics, in addition to metrics.jsonl", on_resume=OnResume.free
    )
    project: str = setting(
        "lora_ft", "project of the run in its tracker; mlflow: experiment", text=True, on_resume=OnResume.free
    )


@dataclass(slots=True)
class Dist:
    mode: DistMode = setting(
        DistMode.auto,
        "processes that train one adapter, started by torchrun: single (refuse several), ddp (each holds the base), "
        "shard (each holds a part of the base), auto (ddp if there are several)",
        on_resume=OnResume.free,
    )
    timeout: float = setting(
        1800.0,
        "end the run if another process does not answer for this long",
        unit="seconds",
        above=0,
        on_resume=OnResume.free,
    )
