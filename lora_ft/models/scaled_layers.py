"""Keep the linear layers of a base in FP8 as they are stored: 8 bits per weight, with the numbers of dequantized ones.

    layers in the files    class Model + its __init__ -> ScaledLinear(codes, scales)      before transformers reads them
    without weights        every linear layer that config.json does not leave out         for the prediction of memory

Layers under names that transformers changes while it loads, such as experts, and the head are dequantized.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_ft.models.dequantized_files import FLOAT8, Lazy, Scaled
from lora_ft.models.stored import Stored
from lora_ft.ops.weights import ScaledLinear

_BLOCKS = (128, 128)  # of files whose config does not name them


def as_stored(tensors: dict[str, Any], plain: Any) -> tuple[dict[str, Any], dict[str, Scaled]]:
    """Return the tensors of files with codes and scales apart, and the weights that stay in FP8 by layer.

    `plain` is the model without values that the tensors belong to.
    """
    linear = _linear_layers(plain)
    kept = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Scaled) and name.removesuffix(".weight") in linear
    }
    apart = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in kept}
    for layer, tensor in kept.items():
        apart |= {f"{layer}.codes": Lazy(tensor.read_codes), f"{layer}.scales": Lazy(tensor.read_scales)}
    return apart, kept


def model_class(plain: type, kept: dict[str, Scaled]) -> type:
    """Return a class of transformers whose models have these layers in FP8 from the start.

    transformers makes a model without values, then loads it: there is no other moment to replace layers.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
        for name, tensor in kept.items():
            _replace(self, name, tensor.float8, tensor.grid, tensor.blocks)

    return type(plain.__name__, (plain,), {"__init__": init, "__module__": plain.__module__})


def keep_meta(network: Any, files: Stored) -> None:
    """Give a model on the meta device the layers that loading its files would give it, as far as config.json tells."""
    settings = files.settings
    skipped = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    rows = files.method == "fbgemm_fp8"
    for name, layer in _linear_layers(network).items():
        if should_convert_module(name, list(skipped)):
            size = (layer.out_features, layer.in_features)
            blocks = (1, size[1]) if rows else tuple(settings.get("weight_block_size") or _BLOCKS)
            grid = tuple(-(-length // block) for length, block in zip(size, blocks, strict=True))
            _replace(network, name, FLOAT8["F8_E4M3"], grid, blocks)


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}


def _replace(model: Any, name: str, float8: torch.dtype, grid: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    layer = ScaledLinear(model.get_submodule(name), float8, grid, (blocks[0], blocks[1]))
    layer._is_hf_initialized = True  # transformers draws no values for it
    model.set_submodule(name, layer)
