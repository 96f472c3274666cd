"""Verify that a folder holds the trained adapter: load it with PEFT in a process without lora_ft, and compare logits.

    make_probe(model, tokenizer)          -> probe.safetensors: 64 x 256 logits of the adapter, and of its base
    verify(folder, provenance.loading(base, quant, model))
        SHA256SUMS                        -> the folder has every listed file, unchanged, and no other
        python -P verify_worker.py        -> every key, shape and value equals the file's; its logits equal the probe's
        -> Verification(keys=210, distance=0.0, allowed=1e-05, effect=0.31, ...), or MismatchError

The worker also computes logits without the adapter, to distinguish a wrong base from a broken adapter.
"""

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_ft.adapters.peft_folder import read_config
from lora_ft.adapters.provenance import RECORD, Loading, read_record, template_of
from lora_ft.data.rendering import DATE, render
from lora_ft.data.template_variables import without_defaults
from lora_ft.errors import MismatchError
from lora_ft.export.verify import distance as logit_distance
from lora_ft.export.verify import probe, tolerance
from lora_ft.io import untrusted
from lora_ft.models import heads
from lora_ft.models.load import read_tokenizer
from lora_ft.publishing import checksums

log = logging.getLogger("lora_ft")

PROBE = "probe.safetensors"

_CHAT = [{"role": "user", "content": "What is the capital of France?"}]
_COLUMNS = 256
_HEADER_LIMIT = 2**16  # bytes
# Measured on SmolLM2-135M without an adapter: 0.08 for int8, 0.01 for 4-bit products in bfloat16.
_KERNEL_LIMIT = 0.2
_WORKER = Path(__file__).with_name("verify_worker.py")


@dataclass(frozen=True)
class Verification:
    """The findings of the worker; distances are measured by `export.verify.distance`.

    keys, outputs, zero_outputs: numbers of tensors, of matrices B, of those that are zero. files: number of files that
    match SHA256SUMS, None if the folder has no such file. distance: from the probe's logits, None if the folder has no
    probe; `allowed` is its limit. effect: of the adapter on its base's logits. kernels: rounding that the kernels of a
    quantized base add, without a limit; None if the base is not quantized.
    """

    keys: int
    outputs: int
    zero_outputs: int
    files: int | None
    distance: float | None
    allowed: float
    effect: float
    kernels: float | None
    versions: dict[str, str]


def make_probe(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return a probe file: `ids` [T], `columns` [K] of the vocabulary, and float32 logits `adapter` [T, K] and `base`.

    Of a classifier, K are the classes, and `base` is the base's body with the adapter's head, since it has none.

    `base` is the upper left corner of [T, K] without added tokens, which the base does not know. Ids and columns
    ascend and attention is causal, so the corner does not depend on them.
    """
    with_adapter = probe(model, len(tokenizer))
    with _same_head(model), model.disable_adapter():
        without = probe(model, len(tokenizer))
    columns = torch.linspace(0, len(tokenizer) - 1, min(_COLUMNS, len(tokenizer))).long()
    known = min(_added(model), default=len(tokenizer))
    rows, width = int((with_adapter.ids < known).sum()), int((columns < known).sum())
    if with_adapter.classifies:
        width = with_adapter.logits.shape[1]
        columns = torch.arange(width)
    return safetensors.torch.save(
        {
            "ids": with_adapter.ids,
            "columns": columns,
            "adapter": with_adapter.logits[:, columns].contiguous(),
            "base": without.logits[:rows, columns[:width]].contiguous(),
        }
    )


@contextlib.contextmanager
def _same_head(model: PeftModel) -> Iterator[None]:
    """Give the base of a classifier the head of its adapter until the block ends."""
    if not heads.is_classifier(model.get_base_model()):
        yield
        return
    wrapper = heads.head(model.get_base_model())
    own, trained = wrapper.original_module, wrapper.modules_to_save[model.active_adapter]
    before = own.weight.data
    own.weight.data = trained.weight.data.to(before.dtype)
    try:
        yield
    finally:
        own.weight.data = before


def _added(model: PeftModel) -> list[int]:
    """Return the ids of tokens whose embedding rows are part of the adapter."""
    indices = model.peft_config[model.active_adapter].trainable_token_indices or []
    return [i for rows in indices.values() for i in rows] if isinstance(indices, dict) else list(indices)


def verify(folder: Path, loading: Loading) -> Verification:
    """Load the folder's adapter in a new process onto the base that `loading` names, and compare.

    Raises MismatchError if a file, key or value differs, if logits are further away than rounding explains, or if the
    adapter changes nothing; SecurityError for a folder that could run code.
    """
    read_config(folder)  # refuses settings with which PEFT would run code, and pickles
    files = len(checksums.check(folder)) if (folder / checksums.FILE).is_file() else None
    expected = _read_probe(folder / PROBE) if (folder / PROBE).is_file() else {}
    prompt = _prompt(folder)
    found, report = _run_worker({
        "prompt": prompt and {"messages": _CHAT, "date_string": DATE},
        "folder": str(folder.resolve()),
        "base": dataclasses.asdict(loading),
        "ids": expected["ids"].tolist() if expected else None,
        "columns": expected["columns"].tolist() if expected else None,
    })  # fmt: skip
    _check_keys(folder, report)
    if report["prompt"] != prompt:
        raise MismatchError(
            f"the chat template in {folder} writes another prompt than in training: {report['prompt']!r} instead of "
            f"{prompt!r}"
        )
    dtype = getattr(torch, loading.dtype)
    allowed, distance = tolerance(dtype), None
    if expected:
        corner = tuple(slice(size) for size in expected["base"].shape)
        _check_near(found["base"][corner], expected["base"], dtype, f"the base {loading.path}")
        distance = _check_near(found["adapter"], expected["adapter"], dtype, f"the adapter in {folder} on its base")
    effect = logit_distance(found["adapter"], found["base"], dtype)
    if not effect > 0:
        raise MismatchError(f"the adapter in {folder} does not change any logit of its base")
    if effect <= allowed:
        log.warning("the adapter changes its base's logits by %.1e, which is within rounding (%.1e)", effect, allowed)
    kernels = None
    if "as_loaded" in found:  # quantized kernels compute in half precision, whatever the dtype
        kernels = logit_distance(found["as_loaded"], found["adapter"], torch.bfloat16)
        if kernels > _KERNEL_LIMIT:
            log.warning(
                "bitsandbytes' kernels on this machine change the adapter's logits by %.1e compared with exact "
                "products of the same weights: outputs on such a machine will differ",
                kernels,
            )
    return Verification(
        report["keys"], report["outputs"], len(report["zero"]), files, distance, allowed, effect, kernels,
        report["versions"],
    )  # fmt: skip


def _prompt(folder: Path) -> str | None:
    """Return a prompt with the values of template variables in the folder's record; None if it has none."""
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    if not (variables := template_of(record)):
        return None
    tokenizer = read_tokenizer(folder, str(folder))
    tokenizer.chat_template = without_defaults(tokenizer.chat_template)
    return render(_CHAT, tokenizer, True, variables=variables)


def _read_probe(path: Path) -> dict[str, Tensor]:
    untrusted.check_place(path, path.parent)
    untrusted.tensor_header(path, _HEADER_LIMIT, MismatchError)
    found = safetensors.torch.load_file(path)
    types = {name: (t.dtype, t.dim()) for name, t in found.items()}
    indices, logits = (torch.int64, 1), (torch.float32, 2)
    if types != {"ids": indices, "columns": indices, "adapter": logits, "base": logits}:
        raise MismatchError(f"{path} is not a probe: it must hold ids, columns, adapter and base, got {sorted(types)}")
    expected, corner = (found["ids"].numel(), found["columns"].numel()), tuple(found["base"].shape)
    fits = 0 < corner[0] <= expected[0] and 0 < corner[1] <= expected[1]
    if tuple(found["adapter"].shape) != expected or not fits:
        raise MismatchError(
            f"{path} is not a probe: adapter must have shape {expected} and base must not be larger, "
            f"got {tuple(found['adapter'].shape)} and {corner}"
        )
    return found


def _run_worker(request: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return logits and report of verify_worker.py; raises MismatchError with its last line if PEFT cannot load."""
    ended = subprocess.run(
        [sys.executable, "-P", str(_WORKER)], input=json.dumps(request).encode(), capture_output=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},  # the base is on this machine
    )  # fmt: skip
    if ended.returncode:
        reason = (ended.stderr.decode(errors="replace").strip() or f"exit code {ended.returncode}").splitlines()
        raise MismatchError(f"PEFT cannot load the adapter in {request['folder']}: {reason[-1]}")
    length = int.from_bytes(ended.stdout[:8], "little")
    report = json.loads(json.loads(ended.stdout[8 : 8 + length])["__metadata__"]["report"])
    return safetensors.torch.load(ended.stdout), report


def _check_keys(folder: Path, report: dict[str, Any]) -> None:
    problems = [
        f"{fault}: {len(report[fault])}, first {', '.join(report[fault][:5])}"
        for fault in ("missing", "unexpected", "differing")
        if report[fault]
    ]
    if problems:
        raise MismatchError(f"the adapter in {folder} differs from what PEFT loads: {'; '.join(problems)}")
    if report["outputs"] and len(report["zero"]) == report["outputs"]:
        raise MismatchError(f"the adapter in {folder} changes nothing: all of its {report['outputs']} matrices B are 0")


def _check_near(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> float:
    distance, allowed = logit_distance(found, expected, dtype), tolerance(dtype)
    if not distance <= allowed:
        raise MismatchError(
            f"{name} does not match the probe: its logits are {distance:.1e} away, {allowed:.1e} is allowed in {dtype}"
        )
    return distance
