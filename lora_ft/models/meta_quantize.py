"""Quantize a base without weights: the layers, dtypes and bytes of the quantized model, without a value.

transformers replaces the layers and bitsandbytes packs them, as for a real model; both run on torch's meta device.
"""

import dataclasses
from typing import Any

import torch

from lora_ft import config
from lora_ft.models import quantize, quantize_experts, stored, stored_layers


def quantize_meta(network: Any, quant: config.Quant, compute: torch.dtype) -> tuple[str, ...]:
    """Quantize the layers and experts of a model on the meta device; return their names.

    Raises ConfigError as loading does. If the files of the base are quantized, as its config says, the layers are
    theirs. A layer of a meta model costs nothing, so an 8B model takes a second.
    """
    files = stored.of_config(network.config)
    if files and files.trains:
        quant, files = stored.agreed(quant, files), dataclasses.replace(files, storage="uint8")
    settings = quantize.bitsandbytes_config(quant, compute, files if files and files.trains else None)
    if settings is None:
        if files:
            stored_layers.keep_meta(network, files)
        return ()
    from transformers.quantizers import AutoHfQuantizer

    # bitsandbytes keeps this table for the whole process, on the device of the first weight that it quantizes.
    functional = quantize.import_bitsandbytes().functional
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    with torch.device("meta"):
        quantizer.preprocess_model(network, dtype=network.dtype, device_map={"": torch.device("meta")})
        for module in network.modules():
            if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "_quantize"):
                module.weight.data = module.weight.data.to(network.dtype)  # the dtype in which weights are loaded
                module.weight = module.weight._quantize("meta")
        if not (files and files.trains):
            quantize_experts.quantize(network, settings)
    quantizer.postprocess_model(network)
    names = quantize.check_plan(network, files)
    quantize.keep_as_quantized(network, names)
    return names
