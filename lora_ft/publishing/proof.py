"""Prove that a folder is the adapter that was trained: a fresh process loads it with PEFT alone; logits are compared.

    make_probe(model, tokenizer)   -> probe.safetensors, sent along: 64 x 256 logits of the adapter, and of its base
    prove(folder, origin.loading(base, quant, model))
        SHA256SUMS                 -> every file is there, whole, and no other
        python -P alone.py         -> every key, shape and value is the file's; its logits are the probe's
        -> Proof(keys=210, distance=0.0, allowed=1e-05, effect=0.31, ...), or MismatchError

The same process tells without the adapter, so that a base that is another one is not taken for a broken adapter.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft.adapters.files import read_config
from lora_ft.adapters.provenance import Loading
from lora_ft.errors import MismatchError
from lora_ft.exports import verify
from lora_ft.io import untrusted
from lora_ft.publishing import sums

log = logging.getLogger("lora_ft")

PROBE = "probe.safetensors"

_TOKENS, _COLUMNS = 64, 256
_HEADER_LIMIT = 2**16
_MOST_BYTES = 2**20
# Of SmolLM2-135M without an adapter int8 lies 0.08 away, its bfloat16 products of 4 bits 0.01.
_KERNELS = 0.2
_ALONE = Path(__file__).with_name("alone.py")


@dataclass(frozen=True)
class Proof:
    """What a fresh process found, and what it was allowed to find.

    `distance` of its logits from the probe's and `effect` of the adapter on its base's are as of `verify.distance`;
    `kernels` is what the kernels of a quantized base round beyond its weights, for the median token, and not judged.
    """

    keys: int
    outputs: int  # matrices B
    zero_outputs: int
    files: int | None  # whole by SHA256SUMS; None where the folder has none
    distance: float | None  # None where the folder has no probe
    allowed: float
    effect: float
    kernels: float | None
    seconds: float
    versions: dict[str, str]


def make_probe(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The file that a folder is proven by: `ids` [T], `columns` [K] of the vocabulary, and logits in float32.

    `adapter` is [T, K]. `base` is its upper left corner: of tokens that were added the base alone knows nothing, ids
    and columns ascend, and attention is causal.
    """
    with_adapter = verify.probe(model, len(tokenizer))
    with model.disable_adapter():
        without = verify.probe(model, len(tokenizer))
    columns = torch.linspace(0, len(tokenizer) - 1, min(_COLUMNS, len(tokenizer))).long()
    known = min(_added(model), default=len(tokenizer))
    rows, width = int((with_adapter.ids < known).sum()), int((columns < known).sum())
    return safetensors.torch.save(
        {
            "ids": with_adapter.ids,
            "columns": columns,
            "adapter": with_adapter.logits[:, columns].contiguous(),
            "base": without.logits[:rows, columns[:width]].contiguous(),
        }
    )


def _added(model: PeftModel) -> list[int]:
    """Ids of the tokens whose rows the adapter brings."""
    indices = model.peft_config[model.active_adapter].trainable_token_indices or []
    return [i for rows in indices.values() for i in rows] if isinstance(indices, dict) else list(indices)


def prove(folder: Path, loading: Loading) -> Proof:
    """Load the folder's adapter in a fresh process, onto the base that `loading` names, and compare.

    Raises MismatchError where a file, a key or a value differs, where logits are further away than rounding explains,
    and where the adapter changes nothing; SecurityError for a folder that could run code.
    """
    read_config(folder)  # refuses what would make PEFT run code, or read pickles
    files = len(sums.check(folder)) if (folder / sums.SUMS).is_file() else None
    probe = _read_probe(folder / PROBE) if (folder / PROBE).is_file() else {}
    started = time.perf_counter()
    found, report = _alone(_request(folder, loading, probe))
    seconds = time.perf_counter() - started
    _check_keys(folder, report)
    dtype = getattr(torch, loading.dtype)
    allowed, distance = verify.tolerance(dtype), None
    if probe:
        corner = tuple(slice(size) for size in probe["base"].shape)
        _check_near(found["base"][corner], probe["base"], dtype, f"the base alone ({loading.place})")
        distance = _check_near(found["adapter"], probe["adapter"], dtype, f"the adapter in {folder} on its base")
    effect = verify.distance(found["adapter"], found["base"], dtype)
    if not effect > 0:
        raise MismatchError(f"the adapter in {folder} does not change a single logit of its base")
    if effect <= allowed:
        log.warning("the adapter changes its base's logits by %.1e, no more than rounding may: %.1e", effect, allowed)
    kernels = _rounding(found["as_loaded"], found["adapter"]) if "as_loaded" in found else None
    if kernels and kernels > _KERNELS:
        log.warning(
            "bitsandbytes' own kernels on this machine put the adapter's logits %.1e away from exact products of the "
            "same weights: whoever loads it on such a machine gets other answers",
            kernels,
        )
    return Proof(
        report["keys"], report["outputs"], len(report["zero"]), files, distance, allowed, effect, kernels,
        seconds, report["versions"],
    )  # fmt: skip


def _read_probe(path: Path) -> dict[str, Tensor]:
    untrusted.check_place(path, path.parent)
    if path.stat().st_size > _MOST_BYTES:
        raise MismatchError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB, which no probe is")
    untrusted.tensor_header(path, _HEADER_LIMIT, MismatchError)
    found = safetensors.torch.load_file(path)
    kinds = {name: (t.dtype, t.dim()) for name, t in found.items()}
    whole, real = (torch.int64, 1), (torch.float32, 2)
    if kinds != {"ids": whole, "columns": whole, "adapter": real, "base": real}:
        raise MismatchError(f"{path} is no probe: it must hold ids, columns, adapter and base, got {sorted(kinds)}")
    expected, corner = (found["ids"].numel(), found["columns"].numel()), tuple(found["base"].shape)
    fits = 0 < corner[0] <= expected[0] <= _TOKENS and 0 < corner[1] <= expected[1] <= _COLUMNS
    if tuple(found["adapter"].shape) != expected or not fits:
        raise MismatchError(
            f"{path} is no probe: {expected} logits of the adapter were expected, at most {_TOKENS} x {_COLUMNS}, "
            f"and of the base no more than these, got {tuple(found['adapter'].shape)} and {corner}"
        )
    return found


def _request(folder: Path, loading: Loading, probe: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "base": dataclasses.asdict(loading),
        "ids": probe["ids"].tolist() if probe else None,
        "columns": probe["columns"].tolist() if probe else None,
    }


def _alone(request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What alone.py answers; MismatchError with its last line where PEFT cannot load the adapter."""
    ended = subprocess.run(
        [sys.executable, "-P", str(_ALONE)], input=json.dumps(request).encode(), capture_output=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # the base is on this machine, and nothing else is to be asked for
    )  # fmt: skip
    if ended.returncode:
        reason = (ended.stderr.decode(errors="replace").strip() or f"it ended with {ended.returncode}").splitlines()
        raise MismatchError(f"the adapter in {request['folder']} does not load with PEFT alone: {reason[-1]}")
    length = int.from_bytes(ended.stdout[:8], "little")
    report = json.loads(json.loads(ended.stdout[8 : 8 + length])["__metadata__"]["report"])
    return safetensors.torch.load(ended.stdout), report


def _check_keys(folder: Path, report: dict[str, Any]) -> None:
    problems = [
        f"{kind}: {len(report[kind])}, first {', '.join(report[kind][:5])}"
        for kind in ("missing", "unexpected", "differing")
        if report[kind]
    ]
    if problems:
        raise MismatchError(f"the adapter in {folder} is not what PEFT loads from it: {'; '.join(problems)}")
    if report["outputs"] and len(report["zero"]) == report["outputs"]:
        raise MismatchError(f"the adapter in {folder} changes nothing: all of its {report['outputs']} matrices B are 0")


def _rounding(found: Tensor, exact: Tensor) -> float:
    return verify.distance(found, exact, torch.bfloat16)  # whatever the dtype: these kernels compute in half precision


def _check_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    distance, allowed = verify.distance(found, expected, dtype), verify.tolerance(dtype)
    if not distance <= allowed:
        raise MismatchError(
            f"{what} is not what the probe was made with: its logits are {distance:.1e} away, "
            f"{allowed:.1e} is allowed in {dtype}"
        )
    return distance
