"""Objects that the jobs of a sweep share: tokenizer, rows and the loaded base. A single run has its own.

shared = prepare(cfg)                      # no weights yet
shared.base = load(cfg, shared.tokenizer)  # frozen, accelerated, its weights hashed
"""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lora_ft import config, objectives
from lora_ft.adapters import targets
from lora_ft.classes import Classes
from lora_ft.evaluation.comparison import Comparison
from lora_ft.evaluation.loss import EvalLoss
from lora_ft.models.acceleration import Accelerated, accelerate
from lora_ft.models.device import resolve_device
from lora_ft.models.fingerprint import fingerprint
from lora_ft.models.load import Base, load_base, load_tokenizer
from lora_ft.models.resolve import locate
from lora_ft.ops.dropout import switch_off_dropout
from lora_ft.ops.kernels import choose_kernels
from lora_ft.ops.ranks import ALONE, Ranks
from lora_ft.training.deterministic import fix_workspace
from lora_ft.training.dry_run import Rows, check_machine, read_rows


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base, accelerated, with the fingerprint of its weights."""

    base: Base
    accelerated: Accelerated
    fingerprint: str


@dataclass
class Shared:
    """Tokenizer, rows and, once loaded, the base of one run or of several jobs.

    ranks: the processes that train each run together. base_losses, comparisons: caches of measurements of the bare
    base, keyed by rows and batch size.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    ranks: Ranks = ALONE
    base: LoadedBase | None = None
    base_losses: dict[object, EvalLoss] = field(default_factory=dict)
    comparisons: dict[object, Comparison] = field(default_factory=dict)


def prepare(cfg: config.TrainRun, ranks: Ranks = ALONE) -> Shared:
    """Read the tokenizer and the rows of a run; no weights are loaded. Each machine downloads and tokenizes once."""
    if cfg.train.deterministic:
        fix_workspace()  # before `check_machine`, which starts CUDA
    check_machine(cfg)
    with ranks.first_on_machine():
        if ranks.world_size > 1:
            locate(cfg.model)  # downloads or converts the weights
        tokenizer = load_tokenizer(cfg.model)
        return Shared(tokenizer, read_rows(cfg, tokenizer), ranks)


def load(cfg: config.TrainRun, tokenizer: PreTrainedTokenizerBase, classes: Classes | None = None) -> LoadedBase:
    """Load the base of a run, freeze and accelerate it; `classes` are those of a classifier."""
    kernels = choose_kernels(resolve_device(cfg.device), cfg.fast.kernels)
    model_class = objectives.find(cfg.objective).model_class
    base = load_base(cfg.model, cfg.quant, cfg.device, tokenizer, model_class, classes)
    switch_off_dropout(base.model)
    before = fingerprint(base.model)
    made = accelerate(
        base.model, cfg.fast, kernels, targets.with_own_storage(base.model, objectives.complete(cfg).adapter)
    )
    return LoadedBase(base, made, before)
