"""Convert an adapter that changed its base when it started (PiSSA, OLoRA, CorDA) into a LoRA of the unchanged base.

These initializations move a part of W into the adapter and keep the rest as base:

    W = W_rest + s B0 A0       trained: W_rest + s B A  =  W + s (B A - B0 A0)  =  W + s [B, -B0] [A; A0]

So [B, -B0] and [A; A0], of twice the rank, are a LoRA of W itself. The conversion needs B0 and A0, which users of PEFT
save before training (as its LoRA guide says) in a folder pissa_init, olora_init or corda_init inside the adapter's
folder or beside it. LoftQ replaces W by another matrix, for which no such sum is known.
"""

import copy
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
    """Return whether the adapter's initialization changed the base's weights."""
    return _kind(saved) in (*_CONVERTED, "loftq")


def _kind(saved: LoraConfig) -> str:
    return str(saved.init_lora_weights).partition("_niter")[0]  # pissa_niter_16 is a faster pissa


def convert(adapter: Path, saved: LoraConfig, out: Path) -> None:
    """Write the adapter in folder `adapter`, with config `saved`, as PEFT's two files of a LoRA into the folder `out`.

    Raises MismatchError if its initial matrices are missing or belong to another adapter.
    """
    before = _initial(adapter, saved)
    began, ended = files.read_tensors(before), files.read_tensors(adapter)
    if began.keys() != ended.keys() or any(began[k].shape != ended[k].shape for k in ended):
        raise MismatchError(
            f"{before} does not hold the initial matrices of the adapter in {adapter}: names or shapes differ"
        )
    if others := [key for key in ended if ".lora_A." not in key and ".lora_B." not in key]:
        raise MismatchError(f"{adapter} holds {others[0]}, which cannot be converted with its A and B")
    tensors = {key: _joined(key, ended[key], began[key]) for key in sorted(ended)}
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
        durable.write_bytes(staging / files.WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        durable.write_json(staging / files.CONFIG, files.config_fields(saved, named))


def _initial(adapter: Path, saved: LoraConfig) -> Path:
    """Return the folder of the adapter as it was before training."""
    kind = _kind(saved)
    if kind not in _CONVERTED:
        raise MismatchError(
            f"{adapter}: init_lora_weights={saved.init_lora_weights} changed its base in a way that cannot be "
            "undone: merge it on the machine that trained it, and publish the model"
        )
    for folder in (adapter / f"{kind}_init", adapter.parent / f"{kind}_init"):
        if (folder / files.WEIGHTS).is_file():
            start = files.read_config(folder)
            if any(getattr(start, n) != getattr(saved, n) for n in _SCALES):
                raise MismatchError(
                    f"{folder} does not hold the initial matrices of the adapter in {adapter}: rank or alpha differ"
                )
            return folder
    raise MismatchError(
        f"{adapter}: init_lora_weights={saved.init_lora_weights} moved a part of the base's weights into the adapter: "
        f"to convert it to a plain LoRA, put the adapter as it was before training into {kind}_init, inside this "
        "folder or beside it (PEFT: path_initial_model_for_weight_conversion)"
    )


def _joined(key: str, ended: Tensor, began: Tensor) -> Tensor:
    a = ".lora_A." in key
    return torch.cat([ended, began if a else -began], dim=0 if a else 1).contiguous()
