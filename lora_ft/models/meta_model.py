"""A base model without its weights: modules, names and shapes from config.json, on torch's meta device.

    base = load_skeleton(cfg.model, cfg.quant, cfg.device, tokenizer)      # 8B parameters in no memory

It takes a quarter of a second where weights take seconds to minutes, and those of a hub id are not even fetched, so
that what an adapter's settings get wrong is known before. Quantized layers are plain ones here: they have the same
names and shapes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_ft import config
from lora_ft.errors import ConfigError
from lora_ft.models import load
from lora_ft.models.load import Base
from lora_ft.models.resolve import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_skeleton(
    model: config.Model,
    quant: config.Quant,
    device: str,
    tokenizer: "PreTrainedTokenizerBase",
    model_class: Any = None,
) -> Base:
    """The base that `load_base` loads for these settings, its parameters on the meta device.

    Raises what `load_base` raises, but for what only the weights themselves can show.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    identity = locate(model, weights=False)
    target = load.resolve_device(device)
    dtype = load.resolve_dtype(model.dtype, target)
    if quant.compute_dtype is not config.Dtype.auto:
        load.resolve_dtype(quant.compute_dtype, target)
    folder = Path(str(identity.folder))
    try:
        with load.quiet(), torch.device("meta"):
            described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            network = (model_class or AutoModelForCausalLM).from_config(described, dtype=dtype, trust_remote_code=False)
            if (folder / "generation_config.json").is_file():  # its end tokens, which are not always config.json's
                network.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path={model.path} cannot be loaded: {load.first_line(error)}") from None
    load.fit_embeddings(network, tokenizer, len(model.added_tokens))
    return Base(network.requires_grad_(False).eval(), tokenizer, identity, ())
