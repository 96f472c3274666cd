"""litgpt's finetune_lora on the pre-tokenized rows; LoRA on the same layers of its own model.

default: its micro-batch of one row, so that nothing is padded and rows weigh alike, not tokens
batch:   all rows of a step in one padded micro-batch

It has no clipping and no constant rate: its schedule is replaced by one, and nothing is clipped.
prepare converts the base with its own converter. The merged weights come back by its own converter, too, as a
transformers folder, since it writes no PEFT adapter.
"""

import shutil
import sys
from pathlib import Path

import litgpt.finetune.lora as finetune
import protocol
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt.utils import lazy_load
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

PADDING = 0


class Rows(DataModule):
    """Token rows as they are; its own modules tokenize text with prompt styles of theirs."""

    def __init__(self, case: Path, seed: int) -> None:
        super().__init__()
        self.case, self.seed, self.prompt_style = case, seed, Default()

    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length=None) -> None:
        self.batch_size = batch_size

    def _loader(self, part: str, rows: int | None, shuffle: bool) -> DataLoader:
        samples = [
            {
                "input_ids": torch.tensor(row["input_ids"]),
                "labels": torch.tensor(row["labels"]),
                "token_counts": {"raw": len(row["labels"]), "raw_plus_prompt_template": len(row["labels"])},
            }
            for row in protocol.token_rows(self.case, part)[:rows]
        ]
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            samples, self.batch_size, shuffle, generator=generator, collate_fn=get_sft_collate_fn(pad_id=PADDING)
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", None, True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("eval", 1, False)


def observe(watch: protocol.Stopwatch, micro_batches: int) -> None:
    """Let `watch` see losses, gradients, forward passes and optimizer steps of the coming run."""
    losses: list[float] = []
    fit, cross_entropy = finetune.fit, finetune.chunked_cross_entropy

    def loss_seen(logits, targets, **options):
        loss = cross_entropy(logits, targets, **options)
        if loss.requires_grad:
            losses.append(loss.item())
        return loss

    def before_step(optimizer, args, kwargs) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        watch.learned(sum(losses[-micro_batches:]) / micro_batches, torch.nn.utils.get_total_norm(grads).item())

    def fit_seen(**arguments):
        def forward_seen(module, args) -> None:
            if module.training:
                # Rows are padded with 0, which is no row's own token.
                watch.forward(int((args[0] != PADDING).sum()))

        arguments["model"].register_forward_pre_hook(forward_seen)
        return fit(**arguments)

    finetune.fit, finetune.chunked_cross_entropy = fit_seen, loss_seen
    register_optimizer_step_pre_hook(before_step)
    register_optimizer_step_post_hook(lambda *_: watch.step())


def prepare(given: protocol.Arguments) -> None:
    folder = base(given)
    shutil.copytree(given.settings.model, folder, dirs_exist_ok=True)
    convert_hf_checkpoint(folder, model_name="SmolLM2-135M-Instruct")


def base(given: protocol.Arguments) -> Path:
    return Path(given.settings.model).with_name("litgpt-base")


def train(given: protocol.Arguments) -> None:
    case, watch = given.settings, protocol.Stopwatch()
    micro_batch = {"default": 1, "batch": case.rows_per_step}[given.variant]
    lora = {"lora_r": case.r, "lora_alpha": case.alpha, "lora_dropout": 0.0, "lora_query": True, "lora_key": True,
            "lora_value": True, "lora_projection": True, "lora_mlp": True, "precision": "32-true"}  # fmt: skip
    # It reads its own command line again to write down what was asked for, which merging needs.
    sys.argv = ["litgpt", "finetune_lora", str(base(given)), *(f"--{name}={value}" for name, value in lora.items())]
    observe(watch, case.rows_per_step // micro_batch)
    finetune.get_lr_scheduler = lambda optimizer, warmup_steps, max_steps: LambdaLR(optimizer, lambda _: 1.0)
    finetune.setup(
        base(given), given.out, data=Rows(given.case, given.seed), seed=given.seed,
        train=TrainArgs(save_interval=None, log_interval=1, global_batch_size=case.rows_per_step,
                        micro_batch_size=micro_batch, lr_warmup_steps=1, epochs=2, max_steps=case.steps),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": case.lr, "weight_decay": 0.0}}, **lora,
    )  # fmt: skip
    protocol.report(watch.outcome(merged(given), "litgpt", "lightning"))


def merged(given: protocol.Arguments) -> Path:
    """The merged weights as a transformers folder; the head is the embedding, which training left as it was."""
    final, folder = given.out / "final", given.out / "merged"
    folder.mkdir()
    weights: dict[str, torch.Tensor] = {}
    lit = lazy_load(final / "lit_model.pth")
    copy_weights_llama(Config.from_file(final / "model_config.yaml"), weights, lit, untie_weights=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    shutil.copy(Path(given.settings.model) / "config.json", folder)
    return folder


given = protocol.arguments()
if given.variant == "prepare":
    prepare(given)
else:
    train(given)
