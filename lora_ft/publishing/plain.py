"""An adapter that changed its base when it began, as a plain LoRA for the base as it is.

PiSSA, OLoRA and CorDA start from a part of W, and leave the rest as base:

    W = W_rest + s B0 A0       trained: W_rest + s B A  =  W + s (B A - B0 A0)  =  W + s [B, -B0] [A; A0]

So [B, -B0] and [A; A0], of twice the rank, are a LoRA of W itself. It takes B0 and A0, which PEFT's users save before
they train (as its guide to LoRA says): a folder pissa_init, olora_init or corda_init, inside of the adapter's or beside
it. LoftQ replaces W by another matrix, of which no such sum is known.
"""

import math
from pathlib import Path

import safetensors.torch
import torch
from peft import LoraConfig
from torch import Tensor

from lora_ft.adapters import files
from lora_ft.errors import MismatchError
from lora_ft.io import durable
from lora_ft.models.load import Identity

_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_CONVERTED = ("pissa", "olora", "corda")


def changes_base(saved: LoraConfig) -> bool:
    """Whether the adapter's initialization gave it another base than the plain one."""
    return _kind(saved) in (*_CONVERTED, "loftq")


def _kind(saved: LoraConfig) -> str:
    return str(saved.init_lora_weights).partition("_niter")[0]  # pissa_niter_16 is a faster pissa


def convert(adapter: Path, out: Path) -> None:
    """Write the adapter in folder `adapter` as a plain LoRA into the new folder `out`: PEFT's two files.

    Raises MismatchError where the matrices that it began with are not there, or are another adapter's.
    """
    saved = files.read_config(adapter)
    before = _initial(adapter, saved)
    began, ended = files.read_tensors(before), files.read_tensors(adapter)
    if began.keys() != ended.keys() or any(began[k].shape != ended[k].shape for k in ended):
        raise MismatchError(f"{before} does not hold the start of the adapter in {adapter}: names or shapes differ")
    if others := [key for key in ended if ".lora_A." not in key and ".lora_B." not in key]:
        raise MismatchError(f"{adapter} holds {others[0]}, which cannot be converted with its A and B")
    tensors = {key: _joined(key, ended[key], began[key]) for key in sorted(ended)}
    # s must stay: alpha / r with twice the rank, or alpha / sqrt(r)
    factor = math.sqrt(2) if saved.use_rslora else 2
    saved.r *= 2
    saved.lora_alpha *= factor
    saved.rank_pattern = {key: 2 * rank for key, rank in (saved.rank_pattern or {}).items()}
    saved.alpha_pattern = {key: factor * alpha for key, alpha in (saved.alpha_pattern or {}).items()}
    saved.init_lora_weights = True
    named = Identity(None, str(saved.base_model_name_or_path or ""), None, saved.revision, "", None)
    with durable.staged_folder(out) as staging:
        durable.write_bytes(staging / files.WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        durable.write_json(staging / files.CONFIG, files.config_fields(saved, named))


def _initial(adapter: Path, saved: LoraConfig) -> Path:
    """The folder of the adapter as it was before training."""
    kind = _kind(saved)
    if kind not in _CONVERTED:
        raise MismatchError(
            f"{adapter}: init_lora_weights={saved.init_lora_weights} gave it a base of its own, which cannot be "
            "undone: merge it where it was trained, and publish the model"
        )
    for folder in (adapter / f"{kind}_init", adapter.parent / f"{kind}_init"):
        if (folder / files.WEIGHTS).is_file():
            start = files.read_config(folder)
            if any(getattr(start, n) != getattr(saved, n) for n in _SCALES):
                raise MismatchError(f"{folder} is not the start of the adapter in {adapter}: rank or alpha differ")
            return folder
    raise MismatchError(
        f"{adapter}: init_lora_weights={saved.init_lora_weights} took a part out of the base's weights: to become a "
        f"plain LoRA it needs the adapter as it was before training, in {kind}_init inside this folder or beside it "
        "(PEFT: path_initial_model_for_weight_conversion)"
    )


def _joined(key: str, ended: Tensor, began: Tensor) -> Tensor:
    a = ".lora_A." in key
    return torch.cat([ended, began if a else -began], dim=0 if a else 1).contiguous()
