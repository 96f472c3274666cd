"""Convert an adapter whose initialization changed its base (PiSSA, OLoRA, CorDA) into a LoRA of the unchanged base.

These initializations move a part of W into the adapter and keep the rest as the base:

    W = W_rest + s B0 A0       trained: W_rest + s B A  =  W + s (B A - B0 A0)  =  W + s [B, -B0] [A; A0]

So [B, -B0] and [A; A0], of twice the rank, are a LoRA of W itself. The conversion needs B0 and A0, which PEFT's LoRA
guide tells users to save before training; it looks for a folder pissa_init, olora_init or corda_init inside the
adapter's folder or beside it. LoftQ replaces W by another matrix, for which no such sum is known.
"""

import copy
import math
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from lora_ft.adapters import files, peft_folder
from lora_ft.errors import MismatchError
from lora_ft.io import durable
from lora_ft.models.load import Identity

_SCALES = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_CONVERTED = ("pissa", "olora", "corda")


def changes_base(saved: LoraConfig) -> bool:
    """Return True if the adapter's initialization changed the base's weights."""
    return _init(saved) in (*_CONVERTED, "loftq")


def _init(saved: LoraConfig) -> str:
    return str(saved.init_lora_weights).partition("_niter")[0]  # pissa_niter_16 is a faster pissa


def convert(adapter: Path, saved: LoraConfig, out: Path) -> None:
    """Write the adapter in folder `adapter`, with config `saved`, as a LoRA in PEFT's two files into the folder `out`.

    Raises MismatchError if its initial matrices are missing or belong to another adapter.
    """
    folder = _initial_folder(adapter, saved)
    initial, trained = files.read_tensors(folder), files.read_tensors(adapter)
    if initial.keys() != trained.keys() or any(initial[k].shape != trained[k].shape for k in trained):
        raise MismatchError(
            f"{folder} does not hold the initial matrices of the adapter in {adapter}: names or shapes differ"
        )
    if others := [key for key in trained if ".lora_A." not in key and ".lora_B." not in key]:
        raise MismatchError(f"{adapter} holds {others[0]}, which cannot be converted: only A and B can")
    tensors = {key: _joined(key, trained[key], initial[key]) for key in sorted(trained)}
    # s = alpha / r or alpha / sqrt(r) must not change although r doubles
    factor = math.sqrt(2) if saved.use_rslora else 2
    saved = copy.copy(saved)
    saved.r *= 2
    saved.lora_alpha *= factor
    saved.rank_pattern = {key: 2 * rank for key, rank in (saved.rank_pattern or {}).items()}
    saved.alpha_pattern = {key: factor * alpha for key, alpha in (saved.alpha_pattern or {}).items()}
    saved.init_lora_weights = True
    named = Identity(None, str(saved.base_model_name_or_path or ""), None, saved.revision, "", None)
    with durable.staged_folder(out) as staging:
        files.write_weights(staging, tensors)
        durable.write_json(staging / peft_folder.CONFIG, files.config_fields(saved, named))


def _initial_folder(adapter: Path, saved: LoraConfig) -> Path:
    """Return the folder that holds the adapter before training."""
    init = _init(saved)
    if init not in _CONVERTED:
        raise MismatchError(
            f"{adapter}: init_lora_weights={saved.init_lora_weights} changed its base in a way that cannot be "
            "undone: merge it on the machine that trained it, and publish the model"
        )
    for folder in (adapter / f"{init}_init", adapter.parent / f"{init}_init"):
        if (folder / peft_folder.WEIGHTS).is_file():
            initial = peft_folder.read_config(folder)
            if any(getattr(initial, n) != getattr(saved, n) for n in _SCALES):
                raise MismatchError(
                    f"{folder} does not hold the initial matrices of the adapter in {adapter}: rank or alpha differ"
                )
            return folder
    raise MismatchError(
        f"{adapter}: init_lora_weights={saved.init_lora_weights} moved a part of the base's weights into the adapter: "
        f"to convert it to a plain LoRA, put the adapter saved before training into a folder {init}_init, inside this "
        "folder or beside it (PEFT: path_initial_model_for_weight_conversion)"
    )


def _joined(key: str, trained: Tensor, initial: Tensor) -> Tensor:
    is_a = ".lora_A." in key
    return torch.cat([trained, initial if is_a else -initial], dim=0 if is_a else 1).contiguous()
