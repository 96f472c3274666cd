"""Verify that a folder is the adapter that was trained: a new process loads it with PEFT alone, logits are compared.

    make_probe(model, tokenizer)          -> probe.safetensors: 64 x 256 logits of the adapter, and of its base
    verify(folder, origin.loading(base, quant, model))
        SHA256SUMS                        -> every file is there and complete, and no other
        python -P verify_worker.py        -> every key, shape and value equals the file's; its logits equal the probe's
        -> Verification(keys=210, distance=0.0, allowed=1e-05, effect=0.31, ...), or MismatchError

The worker also computes logits without the adapter, which tells a wrong base from a broken adapter.
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
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft.adapters.files import read_config
from lora_ft.adapters.provenance import Loading
from lora_ft.errors import MismatchError
from lora_ft.export.verify import distance as logit_distance
from lora_ft.export.verify import probe, tolerance
from lora_ft.io import untrusted
from lora_ft.publishing import checksums

log = logging.getLogger("lora_ft")

PROBE = "probe.safetensors"

_TOKENS, _COLUMNS = 64, 256
_HEADER_LIMIT = 2**16
_MOST_BYTES = 2**20
# Measured on SmolLM2-135M without an adapter: 0.08 for int8, 0.01 for 4-bit products in bfloat16.
_KERNEL_LIMIT = 0.2
_WORKER = Path(__file__).with_name("verify_worker.py")


@dataclass(frozen=True)
class Verification:
    """The findings of the worker, and their limits.

    `distance` of its logits from the probe's and `effect` of the adapter on its base's logits are measured by
    `exports.verify.distance`. `kernels` is the rounding that the kernels of a quantized base add; it has no limit.
    """

    keys: int
    outputs: int  # matrices B
    zero_outputs: int
    files: int | None  # number that match SHA256SUMS; None if the folder has none
    distance: float | None  # None if the folder has no probe
    allowed: float
    effect: float
    kernels: float | None
    seconds: float
    versions: dict[str, str]


def make_probe(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return a probe file: `ids` [T], `columns` [K] of the vocabulary, and float32 logits `adapter` [T, K] and `base`.

    `base` covers the upper left corner of [T, K] without added tokens, which the base does not know: ids and columns
    ascend, and attention is causal.
    """
    with_adapter = probe(model, len(tokenizer))
    with model.disable_adapter():
        without = probe(model, len(tokenizer))
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
    """Return the ids of tokens whose embedding rows are part of the adapter."""
    indices = model.peft_config[model.active_adapter].trainable_token_indices or []
    return [i for rows in indices.values() for i in rows] if isinstance(indices, dict) else list(indices)


def verify(folder: Path, loading: Loading, saved: LoraConfig | None = None) -> Verification:
    """Load the folder's adapter in a new process onto the base that `loading` names, and compare.

    `saved` is the folder's config if it was read already. Raises MismatchError if a file, key or value differs, if
    logits are further away than rounding explains, and if the adapter changes nothing; SecurityError for a folder that
    could run code.
    """
    if saved is None:
        read_config(folder)  # refuses settings with which PEFT would run code, and pickles
    files = len(checksums.check(folder)) if (folder / checksums.FILE).is_file() else None
    expected = _read_probe(folder / PROBE) if (folder / PROBE).is_file() else {}
    started = time.perf_counter()
    found, report = _run_worker(_request(folder, loading, expected))
    seconds = time.perf_counter() - started
    _check_keys(folder, report)
    dtype = getattr(torch, loading.dtype)
    allowed, distance = tolerance(dtype), None
    if expected:
        corner = tuple(slice(size) for size in expected["base"].shape)
        _check_near(found["base"][corner], expected["base"], dtype, f"the base alone ({loading.place})")
        distance = _check_near(found["adapter"], expected["adapter"], dtype, f"the adapter in {folder} on its base")
    effect = logit_distance(found["adapter"], found["base"], dtype)
    if not effect > 0:
        raise MismatchError(f"the adapter in {folder} does not change any logit of its base")
    if effect <= allowed:
        log.warning(
            "the adapter changes its base's logits by %.1e, which rounding alone can do (%.1e)", effect, allowed
        )
    kernels = None
    if "as_loaded" in found:  # quantized kernels compute in half precision, whatever the dtype
        kernels = logit_distance(found["as_loaded"], found["adapter"], torch.bfloat16)
        if kernels > _KERNEL_LIMIT:
            log.warning(
                "bitsandbytes' kernels on this machine move the adapter's logits by %.1e from exact products of the "
                "same weights: outputs on such a machine will differ",
                kernels,
            )
    return Verification(
        report["keys"], report["outputs"], len(report["zero"]), files, distance, allowed, effect, kernels,
        seconds, report["versions"],
    )  # fmt: skip


def _read_probe(path: Path) -> dict[str, Tensor]:
    untrusted.check_place(path, path.parent)
    if path.stat().st_size > _MOST_BYTES:
        raise MismatchError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB, too large for a probe")
    untrusted.tensor_header(path, _HEADER_LIMIT, MismatchError)
    found = safetensors.torch.load_file(path)
    kinds = {name: (t.dtype, t.dim()) for name, t in found.items()}
    indices, logits = (torch.int64, 1), (torch.float32, 2)
    if kinds != {"ids": indices, "columns": indices, "adapter": logits, "base": logits}:
        raise MismatchError(f"{path} is not a probe: it must hold ids, columns, adapter and base, got {sorted(kinds)}")
    expected, corner = (found["ids"].numel(), found["columns"].numel()), tuple(found["base"].shape)
    fits = 0 < corner[0] <= expected[0] <= _TOKENS and 0 < corner[1] <= expected[1] <= _COLUMNS
    if tuple(found["adapter"].shape) != expected or not fits:
        raise MismatchError(
            f"{path} is not a probe: expected {expected} logits of the adapter, at most {_TOKENS} x {_COLUMNS}, and no "
            f"more for the base, got {tuple(found['adapter'].shape)} and {corner}"
        )
    return found


def _request(folder: Path, loading: Loading, expected: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "base": dataclasses.asdict(loading),
        "ids": expected["ids"].tolist() if expected else None,
        "columns": expected["columns"].tolist() if expected else None,
    }


def _run_worker(request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the logits and the report of verify_worker.py; MismatchError with its last line if PEFT cannot load."""
    ended = subprocess.run(
        [sys.executable, "-P", str(_WORKER)], input=json.dumps(request).encode(), capture_output=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # the base is on this machine, nothing else is needed
    )  # fmt: skip
    if ended.returncode:
        reason = (ended.stderr.decode(errors="replace").strip() or f"exit code {ended.returncode}").splitlines()
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
        raise MismatchError(f"the adapter in {folder} differs from what PEFT loads: {'; '.join(problems)}")
    if report["outputs"] and len(report["zero"]) == report["outputs"]:
        raise MismatchError(f"the adapter in {folder} changes nothing: all of its {report['outputs']} matrices B are 0")


def _check_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    distance, allowed = logit_distance(found, expected, dtype), tolerance(dtype)
    if not distance <= allowed:
        raise MismatchError(
            f"{what} does not match the probe: its logits are {distance:.1e} away, {allowed:.1e} is allowed in {dtype}"
        )
    return distance
