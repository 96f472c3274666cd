"""Take over the embedding and head that PEFT saves beside an adapter, and compare copies of the base's weights with it.

...embed_tokens.weight [520, 64]               of a resized vocabulary: replaces the base's 512 rows
...embed_tokens.base_layer.weight [512, 64]    beside an adapted embedding: must equal the base's
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_ft.adapters.attach import base_layer
from lora_ft.adapters.tensor_names import ENDS
from lora_ft.errors import MismatchError
from lora_ft.models.cpu_embedding import is_on_cpu

log = logging.getLogger("lora_ft")


def is_end(name: str) -> bool:
    """Return True for the name of a weight of an embedding or of a head."""
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and layer.rpartition(".")[2] in ENDS


def refuse(folder: Path, whole: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MismatchError if a file holds an embedding or head whole, which an adapter that trains does not have."""
    if whole:
        name, shape = next(iter(whole.items()))
        raise MismatchError(
            f"the adapter in {folder} holds {name} {list(shape)} whole, of a vocabulary that was resized: merge it "
            f"first (lora-ft merge adapter_path={folder} out=MERGED), and use the result as the base"
        )


def take(
    model: PreTrainedModel,
    folder: Path,
    whole: Mapping[str, Tensor],
    frozen: dict[str, Tensor],
    in_full: dict[str, Tensor],
) -> None:
    """Replace embedding and head of a base by those that a file holds whole, and compare copies of other weights.

    A copy (`frozen`), or an embedding trained in full, with other rows than the base's is of a resized vocabulary too.
    Raises MismatchError for a tensor of another layer, width or value, and if embedding and head share one matrix but
    the file's differ.
    """
    resized = {name: tensor for name, tensor in (in_full | frozen).items() if _is_resized(model, name, tensor)}
    check_copies(model, folder, {name: tensor for name, tensor in frozen.items() if name not in resized})
    replaced = dict(whole) | resized
    if not replaced:
        return
    layers = {name: _layer(model, folder, name) for name in replaced}
    for name, layer in layers.items():
        if replaced[name].shape[1:] != layer.weight.shape[1:]:
            raise _unfitting(folder, name, replaced[name], layer.weight)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if unknown := [name for name, layer in layers.items() if not any(layer is end for end in ends)]:
        raise MismatchError(f"the adapter in {folder} holds {unknown[0]}, which is no embedding or head of this base")
    tied = ends[1] is not None and ends[1].weight is ends[0].weight
    first = next(iter(replaced.values()))
    if tied and any(not torch.equal(first, tensor) for tensor in replaced.values()):
        raise MismatchError(
            f"the adapter in {folder} holds an embedding and a head that differ, but those of this base share one "
            "matrix: name a base with tie_word_embeddings=false"
        )
    before = ends[0].weight.shape[0]
    given = [first, first] if tied else [next((replaced[n] for n in layers if layers[n] is end), None) for end in ends]
    _check_both(folder, ends, given)
    _replace(ends, given, tied)
    rows = ends[0].weight.shape[0]
    model.config.get_text_config().vocab_size = rows
    log.warning(
        "%s holds %s whole (%d rows, the base has %d): they replace the base's, also where the base is evaluated alone",
        folder, " and ".join(replaced), rows, before,
    )  # fmt: skip


def check_copies(model: PreTrainedModel | PeftModel, folder: Path, frozen: Mapping[str, Tensor]) -> None:
    """Compare copies of the base's weights with the base, rounded to the coarser dtype of the two.

    Raises MismatchError for a copy that differs. Copies of quantized weights are not compared.
    """
    compared, others = [], []
    for name, tensor in frozen.items():
        weight = getattr(_layer(model, folder, name), name.rpartition(".")[2], None)
        if weight is None or not weight.is_floating_point():
            others.append(name)
        elif weight.shape != tensor.shape:
            raise _unfitting(folder, name, tensor, weight)
        else:
            _compare(folder, name, tensor, weight.detach().cpu())
            compared.append(name)
    if compared:
        log.info("%s holds copies of the base's weights, which equal the base: %s", folder, ", ".join(compared))
    if others:
        log.warning("%s holds copies of weights that are quantized here, which are ignored: %s", folder, others[0])


def _compare(folder: Path, name: str, copy: Tensor, weight: Tensor) -> None:
    if not (torch.equal(copy.to(weight.dtype), weight) or torch.equal(copy, weight.to(copy.dtype))):
        raise MismatchError(
            f"the adapter in {folder} holds a copy of its base's {name}, which differs from this base: name the base "
            "that the adapter was trained on"
        )


def _layer(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> Any:
    """Return the base's own layer with the weight `name`."""
    module: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for part in name.split(".")[:-1]:
        module = base_layer(getattr(module, part, None))
        if module is None:
            raise MismatchError(f"the adapter in {folder} holds {name}, and this base has no such layer")
    return module


def _is_resized(model: PreTrainedModel, name: str, copy: Tensor) -> bool:
    """Return True for a copy of an embedding or head that has other rows than the base's."""
    end = next((module for path, module in model.named_modules() if f"{path}.weight" == name), None)
    return is_end(name) and end is not None and len(end.weight) != len(copy)


def _unfitting(folder: Path, name: str, found: Tensor, expected: Tensor) -> MismatchError:
    return MismatchError(
        f"the adapter in {folder} does not fit this base: {name} is {list(found.shape)} instead of "
        f"{list(expected.shape)}"
    )


def _check_both(folder: Path, ends: list[Any], given: list[Tensor | None]) -> None:
    """Raise MismatchError if the embedding is resized and the head is not, or the reverse."""
    rows = [
        tensor.shape[0] if tensor is not None else end.weight.shape[0]
        for end, tensor in zip(ends, given, strict=True)
        if end is not None
    ]
    if len(set(rows)) > 1:
        raise MismatchError(
            f"the adapter in {folder} holds the embedding or the head of a resized vocabulary, and not the other: "
            f"they would have {rows[0]} and {rows[1]} rows"
        )


def _replace(ends: list[Any], given: list[Tensor | None], tied: bool) -> None:
    for end, tensor in zip(ends, given, strict=True):
        if end is None or tensor is None:
            continue
        weight = tensor.to(end.weight.device, end.weight.dtype)
        if is_on_cpu(end):
            end._buffers["weight"] = weight
        else:  # a new parameter: the old one may be mapped from the base's file
            end.weight = nn.Parameter(weight, requires_grad=False)
        if isinstance(end, nn.Embedding):
            end.num_embeddings = len(weight)
        else:
            end.out_features = len(weight)
    if tied:
        ends[1].weight = ends[0].weight
